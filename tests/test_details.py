"""Details of gxpo.py that changing one token of it showed nobody was watching."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import gxpo
from gxpo import GXPO, Gate, GateState


def test_omega_is_bounded_by_one_and_may_be_one() -> None:
    """Above 1 the mean would swing about the observations; at 1 it is the latest of them."""
    assert Gate(omega=1.0).omega == 1.0
    with pytest.raises(ValueError, match=r"omega must be a number in \(0, 1\], got 1.5"):
        Gate(omega=1.5)


def watched(gate: Gate, values: list[float], state: GateState | None = None) -> tuple[GateState, list[float | None]]:
    state, scores = state or GateState(), []
    for h in values:
        state, z, _ = gate.after(state, True, h)
        scores.append(z)
    return state, scores


def test_a_checkpoint_read_with_a_longer_window_waits_until_it_is_full() -> None:
    """Thirty values taken for a hundred make mu small and sigma large: the first z of a resumed run would be noise."""
    past, _ = watched(Gate(window=10), [1.0, 1.2, 0.8, 1.1, 1.0, 0.9, 1.1, 1.0, 1.2, 0.8, 1.0, 1.1])
    assert len(past.history) == 10  # the window is all that is kept
    values = [1.0, 0.9, 1.1, 1.0]
    _, scores = watched(Gate(window=12), values, past)
    assert scores[:2] == [None, None]
    mu = math.fsum(whole := [*past.history, *values[:2]]) / 12
    sigma = math.sqrt(math.fsum((h - mu) ** 2 for h in whole) / 12)
    assert scores[2] == pytest.approx((values[2] - mu) / sigma, rel=1e-6)


def test_a_checkpoint_read_with_less_patience_closes_at_the_next_surprise() -> None:
    """Its open streak may be longer than the new patience, and would never be equal to it."""
    steady = [1.0, 1.2, 0.8, 1.1]
    past, _ = watched(Gate(window=4, patience=5), [*steady, 9.0, 9.0, 9.0])
    assert past.streak == 3
    state, _ = watched(Gate(window=4, patience=2), [9.0], past)
    assert state.fallback_step == 7


def optimizer(*tensors: torch.Tensor, **settings: object) -> GXPO:
    return GXPO(torch.optim.SGD(tensors, lr=0.1), **settings)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_the_report_says_which_of_the_two_was_not_finite(what: str, at: int) -> None:
    """One points at the reward, the other at the backward pass."""
    theta = torch.ones(3, dtype=torch.float64, requires_grad=True)
    opt = optimizer(theta)
    for n, _ in enumerate(opt.passes(), 1):
        loss = (theta**2).sum() * (math.nan if (what, n) == ("loss", at) else 1.0)
        opt.observe(loss=loss)
        (theta**2).sum().backward()
        if (what, n) == ("gradient", at):
            theta.grad[1] = math.nan
    assert opt.report.why == f"non-finite {what} in pass {at}"


def test_a_reopened_gate_is_not_reported_as_fallen_back() -> None:
    """A dashboard that shows a fallback for ever after the first cooldown misleads."""
    theta = torch.ones(3, dtype=torch.float64, requires_grad=True)
    opt = optimizer(theta, gate=Gate(window=2, threshold=1.0, patience=1, cooldown=1))
    seen = []
    for scale in (1.0, 1.0, 50.0, 1.0, 1.0):
        for n, _ in enumerate(opt.passes()):
            (theta.sum() * (scale if n == 2 else 1.0)).backward()
        seen.append((opt.report.passes, opt.report.fallback_step))
    assert seen == [(3, None), (3, None), (3, 2), (1, None), (3, None)]  # the next step, that is


def test_mean_q_counts_tensors_that_got_no_second_gradient_as_one() -> None:
    """They are not extrapolated; a mean without them, or less than 1, would be a lie."""
    a, b = (torch.ones(n, dtype=torch.float64, requires_grad=True) for n in (2, 6))
    opt = optimizer(a, b, horizon=4, alpha=1.0)
    for n, _ in enumerate(opt.passes()):
        (a.sum() + (b.sum() if n != 1 else 0.0)).backward()
    q = torch.cat([torch.full((2,), 2.0), torch.ones(6)])  # r = 1 gives K/2, r = 0 and r not there give 1
    assert opt.report.mean_q == pytest.approx(float(q.mean()), rel=1e-12)


def test_a_gate_that_went_through_json_is_the_same_gate() -> None:
    """JSON makes lists of tuples; a trainer's checkpoint may well be JSON."""
    theta = torch.ones(3, dtype=torch.float64, requires_grad=True)
    opt = optimizer(theta, gate=Gate(window=3, threshold=0.5, patience=3))
    for scale in (1.0, 2.0, 1.5, 9.0):
        for _ in opt.passes():
            (theta.sum() * scale).backward()
    assert opt.gate_state.pinned is not None
    saved = opt.state_dict()
    saved["gxpo"]["gate"] = {k: list(v) if isinstance(v, tuple) else v for k, v in saved["gxpo"]["gate"].items()}
    fresh = optimizer(theta, gate=Gate(window=3, threshold=0.5, patience=3))
    fresh.load_state_dict(saved)
    assert fresh.gate_state == opt.gate_state


def test_the_file_checks_itself_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python gxpo.py` of a damaged copy must not look like that of a whole one."""
    text = Path(gxpo.__file__).read_text(encoding="utf-8")
    broken = text.replace("q = r2 + one if", "q = 1.01 * r2 + one if")
    assert broken != text
    for source, fails in ((text, False), (broken, True)):
        names = {"__name__": "__main__", "__file__": gxpo.__file__}
        if fails:
            with pytest.raises(SystemExit, match=r"1 of \d checks failed"):
                exec(compile(source, "gxpo.py", "exec"), names)
        else:
            exec(compile(source, "gxpo.py", "exec"), names)
        printed = capsys.readouterr().out
        assert printed.startswith(f"gxpo.py {gxpo.__version__}, spec {gxpo.SPEC_VERSION}, torch {torch.__version__}\n")
        assert ("FAIL" in printed) == fails
        assert "ok    a spike of |g~| in step 4 closes the gate" in printed
