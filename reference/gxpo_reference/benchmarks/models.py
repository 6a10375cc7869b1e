"""What is trained: a small transformer, and tensors with a gradient that costs next to nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

VOCABULARY, LENGTH, HEADS = 2048, 128, 4
SIZES = {  # parameters, about: width and layers of a transformer that has so many
    10**5: (20, 1),
    10**6: (128, 2),
    10**7: (320, 7),
    10**8: (832, 12),
    3 * 10**8: (1024, 24),
    10**9: (2048, 20),
}
Shapes = list[tuple[int, ...]]


def short(size: int) -> str:
    """1e8"""
    return f"{size:.0e}".replace("e+0", "e")


@dataclass(frozen=True)
class Problem:
    """Parameters, and one pass over their one batch."""

    what: str
    params: list[nn.Parameter]
    backward: Callable[[], Tensor]  # forward and backward; returns the loss
    tokens: int = 0

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.params)

    @property
    def nbytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.params)

    def clear(self) -> None:
        for p in self.params:
            p.grad = None

    def __str__(self) -> str:
        dtype = str(self.params[0].dtype).removeprefix("torch.")
        tokens = f", {self.tokens:,} tokens" if self.tokens else ""
        return f"{self.what}, {self.size:,} parameters in {len(self.params)} tensors{tokens}, {dtype}"


class Transformer(nn.Module):
    """A decoder of the usual kind, without dropout."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        layer = nn.TransformerEncoderLayer(width, HEADS, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.embed(tokens[:, :-1])
        mask = nn.Transformer.generate_square_subsequent_mask(states.shape[1], states.device, states.dtype)
        logits = self.head(self.blocks(states, mask=mask, is_causal=True))
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def transformer(width: int, layers: int, batch: int, device: str, dtype: torch.dtype) -> Problem:
    torch.manual_seed(0)
    with torch.device(device):
        net = Transformer(width, layers).to(dtype)
    tokens = torch.randint(0, VOCABULARY, (batch, LENGTH + 1), device=device)

    def backward() -> Tensor:
        loss = net(tokens)
        loss.backward()
        return loss

    return Problem("transformer", list(net.parameters()), backward, batch * LENGTH)


def transformer_shapes(width: int, layers: int) -> Shapes:
    """Of its parameters, without making any."""
    with torch.device("meta"):
        return [tuple(p.shape) for p in Transformer(width, layers).parameters()]


def tensors(shapes: Shapes, device: str, dtype: torch.dtype, what: str = "tensors") -> Problem:
    """The loss is c |theta|^2 / 2; its gradient c theta is written down, and nobody asks for its value: no activations,
    and a pass as cheap as a pass can be. c goes round and round, for a norm that never changes is what clipping twice
    looks like."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
    loss, factors = torch.zeros((), device=device), itertools.cycle((0.5, 0.51, 0.52, 0.53, 0.54))

    def backward() -> Tensor:
        c = next(factors)
        for p in params:
            p.grad = p.detach() * c
        return loss

    return Problem(what, params, backward)


def big_tensors(size: int, device: str, dtype: torch.dtype, count: int = 4) -> Problem:
    """`count` equal ones of `size` numbers together, rounded up."""
    rows = 64
    return tensors([(rows, -(-size // (rows * count)))] * count, device, dtype, "big tensors")
