"""What a GXPO step costs, as ratios within one run: python -m gxpo_reference.bench [--device cuda]

A small transformer on a fixed batch of tokens. Plain steps, active steps (three gradients) and steps after fallback
take turns, so that a machine that slows down slows them all; each row is the median over the rounds. The floor of an
active step is 3.00 plain ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from gxpo import GXPO, Gate


class Transformer(nn.Module):
    """A decoder of the usual kind, without dropout."""

    def __init__(self, width: int, layers: int, vocabulary: int = 2048) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        logits = self.head(self.blocks(self.embed(tokens[:, :-1]), mask=mask[:-1, :-1], is_causal=True))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    options.add_argument("--width", type=int, default=320, help="of the transformer (default: %(default)s)")
    options.add_argument(
        "--layers", type=int, default=7, help="default: %(default)s, about 10M parameters with the width"
    )
    options.add_argument("--batch", type=int, default=16, help="sequences of 128 tokens (default: %(default)s)")
    options.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    given = options.parse_args(arguments)
    torch.manual_seed(0)
    tokens = torch.randint(0, 2048, (given.batch, 129), device=given.device)

    def contender(wrap: Callable[[torch.optim.Optimizer], torch.optim.Optimizer]) -> Callable[[], None]:
        net = Transformer(given.width, given.layers).to(given.device)
        opt = wrap(torch.optim.AdamW(net.parameters(), lr=1e-4))

        def closure() -> torch.Tensor:
            opt.zero_grad()
            loss = net(tokens)
            loss.backward()
            return loss

        def clip_and_step() -> None:
            closure()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()

        return (lambda: opt.step(closure)) if isinstance(opt, GXPO) else clip_and_step

    closed = Gate("never", max_active_steps=0)
    contenders = {
        "plain step, clipped": contender(lambda base: base),
        "GXPO, active": contender(lambda base: GXPO(base, max_grad_norm=1.0, gate=None)),
        "GXPO, active, rollback=False": contender(
            lambda base: GXPO(base, max_grad_norm=1.0, gate=None, rollback=False)
        ),
        "GXPO, active, displacement": contender(
            lambda base: GXPO(base, max_grad_norm=1.0, gate=None, estimator="displacement")
        ),
        "GXPO, after fallback": contender(lambda base: GXPO(base, max_grad_norm=1.0, gate=closed)),
    }
    size = sum(p.numel() for p in Transformer(given.width, given.layers).parameters()) / 1e6
    print(f"{size:.1f}M parameters, {given.batch * 128} tokens, {given.device}, AdamW, torch {torch.__version__}")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for n in range(given.rounds + 1):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            if given.device != "cpu":
                torch.cuda.synchronize()
            if n:  # the first round warms up
                times[name].append(time.perf_counter() - began)
    plain = times["plain step, clipped"]
    for name, taken in times.items():
        ratio = statistics.median(t / p for t, p in zip(taken, plain, strict=True))
        print(f"{name:<30} {1e3 * statistics.median(taken):9.1f} ms {ratio:7.2f} plain steps")


if __name__ == "__main__":
    main()
