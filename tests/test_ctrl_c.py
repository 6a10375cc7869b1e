"""If these fail, Ctrl-C at some line leaves a step open that nobody began, or undoes one that was counted."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from odd_optimizers import START, bowl, closure_of, fresh
from torch import Tensor

from gxpo import GXPO, Gate

# --------------------------------------------------------------------------------------------------------------- Ctrl-C


@contextlib.contextmanager
def interrupt(point: tuple[CodeType, int] | None, seen: dict[tuple[CodeType, int], None]) -> Iterator[None]:
    """Ctrl-C as the line `point` of gxpo.py is reached for the first time. `seen` gets the lines that were reached."""
    file, previous = GXPO.passes.__code__.co_filename, sys.gettrace()

    def of_line(frame: FrameType, event: str, _: Any) -> Any:
        here = frame.f_code, frame.f_lineno
        if event == "line" and here not in seen:
            seen[here] = None
            if here == point:
                sys.settrace(None)
                raise KeyboardInterrupt
        return of_line

    def of_call(frame: FrameType, event: str, _: Any) -> Any:
        return of_line if frame.f_code.co_filename == file else None

    sys.settrace(of_call)
    try:
        yield
    finally:
        sys.settrace(previous)


@pytest.mark.parametrize("form", ["closure", "passes", "lookahead"])
def test_ctrl_c_at_every_line(form: str) -> None:
    """Ctrl-C in a few lines leaves a step open that nobody began, or undoes one that the gate has counted."""

    def make() -> tuple[GXPO, list[Tensor]]:
        params = fresh(START)
        base = torch.optim.SGD(params, lr=0.001, momentum=0.9)
        return GXPO(base, gate=Gate(window=2, threshold=1e9), optimizer_state="restore", max_grad_norm=0.5), params

    def step(opt: GXPO, params: list[Tensor]) -> None:
        if form == "closure":
            opt.step(closure_of(params))
        elif form == "passes":
            for _ in opt.passes():
                bowl(params).backward()
        else:
            opt.zero_grad()
            bowl(params).backward()
            while opt.lookahead():
                bowl(params).backward()
            opt.step()

    def everything(opt: GXPO, params: list[Tensor]) -> list[float]:
        tensors = [*params, *(opt.state[p]["momentum_buffer"] for p in params)]
        return torch.cat([t.detach().flatten() for t in tensors]).tolist()

    opt, params = make()
    step(opt, params)
    lines: dict[tuple[CodeType, int], None] = {}
    with interrupt(None, lines):
        step(opt, params)
    wrong = []
    for point in lines:
        before, counted = everything(opt, params), opt.gate_state.step
        try:
            with interrupt(point, {}), contextlib.suppress(KeyboardInterrupt):
                step(opt, params)
            if form != "closure":
                opt.abort()  # as passes() and lookahead() want it after an exception that is caught
            counted = opt.gate_state.step - counted
            changed = everything(opt, params) != before
            problem = None if counted == changed else f"{counted} step counted, but changed: {changed}"
            step(opt, params)
        except RuntimeError as error:
            problem = f"the next step: {error}"
        if problem:
            wrong.append(f"{point[0].co_name}, line {point[1]}: {problem}")
            opt, params = make()
            step(opt, params)
    assert len(lines) > 50
    assert not wrong, "\n".join(wrong)
