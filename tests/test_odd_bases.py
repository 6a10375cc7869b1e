"""If these fail, the trial of a base in its first step, or the snapshot, takes ordinary things for something else."""

from __future__ import annotations

import collections
import copy
import itertools
import random
import types
from typing import Any, ClassVar

import pytest
import torch
from odd_optimizers import CASES, START, assert_close, bowl, closure_of, fail, four_steps, fresh, sgd
from test_odd_optimizers import first_only, zero_fill
from test_odd_parameters import Halves
from torch import Tensor

import gxpo
from gxpo import GXPO

# -------------------------------------------------------------------------------------- what the trial must accept


class Bounded(torch.optim.SGD):
    """Keeps its parameters below a bound, as CLIP does with its logit_scale, and some at 0, as pruning does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for n, p in enumerate(self.param_groups[0]["params"]):
            p.clamp_(max=0.5) if n == 0 else p.mul_(0.0)


class FromTwo(torch.optim.SGD):
    """Divides by how much the gradient has changed, as Barzilai and Borwein do: the same one twice is an error."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            before = self.state[p].get("before")
            change = 1.0 if before is None else (p.grad - before).norm().item()
            self.state[p]["before"] = p.grad.clone()
            p.sub_(p.grad * (0.01 / change / change * change))
            if change == 0:
                raise ZeroDivisionError


@CASES
@pytest.mark.parametrize("kind", [Bounded, FromTwo])
def test_bases_that_clamp_or_refuse_a_gradient_twice(kind: Any, policy: str, with_failure: bool) -> None:
    """The trial pushes parameters and steps with one gradient; neither may be held against a base, or be seen."""
    _, params, hand = four_steps(lambda ps: kind(ps, lr=0.01), policy, with_failure)
    assert_close(params, hand.params)


def test_an_expert_that_the_first_step_does_not_route() -> None:
    """A base that fills in zeros for gradients leaves none behind from the trial."""
    params = fresh(START)
    opt = GXPO(zero_fill(params), gate=None)
    opt.step(closure_of(params, first_only))
    assert opt.report.outcome == "active"


def test_the_trial_is_made_once_and_runs_no_hooks() -> None:
    params, seen = fresh(START), []
    opt = GXPO(sgd(params), gate=None)
    opt.base.register_step_post_hook(lambda *_: seen.append(1))
    for _ in range(2):
        opt.step(closure_of(params))
    assert len(seen) == 6


# ------------------------------------------------------------------------------------------- what the snapshot meets


class Rows(list):
    """A list that counts itself, and whose copy is its own affair."""

    total = 0

    def copy(self) -> Any:
        raise TypeError("no copies")


class Counts(torch.optim.SGD):
    """Counts its steps in many places at once, beside what is no state."""

    def __init__(self, params: list[Tensor], **options: Any) -> None:
        super().__init__(params, **options)
        self.library, self.count, self.turn = torch, itertools.count(), itertools.cycle(params)
        self.in_a_tuple = (self.count, "two")
        self.tally, self.rows, self.ordered = collections.Counter(), Rows(), collections.OrderedDict(a=0, b=0)
        self.view = types.MappingProxyType({"steps": [0]})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        n = next(self.count)
        self.tally["steps"] += 1
        self.rows.append(n)
        self.rows.total += 1
        self.ordered.move_to_end("a" if n % 2 else "b")
        self.view["steps"][0] += 1
        turn = next(self.turn)
        turn.add_(0.001 * (n + self.rows.total + self.view["steps"][0] + self.tally["steps"]))

    def places(self) -> tuple[Any, ...]:
        return dict(self.tally), list(self.rows), self.rows.total, list(self.ordered), self.view["steps"][0]


@CASES
def test_counts_in_odd_places(policy: str, with_failure: bool) -> None:
    steps = {"keep": 12, "restore": 4}[policy]
    params = fresh(START)
    opt = GXPO(Counts(params, lr=0.003), gate=None, optimizer_state=policy)
    for n in range(4):
        if with_failure and n == 2:
            before = opt.base.places()
            fail(opt, params)
            assert opt.base.places() == before
        opt.step(closure_of(params))
    tally, rows, total, _, seen = opt.base.places()
    assert (tally["steps"], len(rows), total, seen) == (steps,) * 4
    assert rows == list(range(steps))
    assert opt.base.in_a_tuple[0] is opt.base.count  # one for all its holders
    assert next(opt.base.turn) is params[steps % 2]


class Drawing(torch.optim.SGD):
    drawn: ClassVar[list[float]] = []  # of the class, where no snapshot comes

    def __init__(self, params: list[Tensor], **options: Any) -> None:
        super().__init__(params, **options)
        self.random = random.Random(0)

    def step(self, closure: Any = None) -> None:
        super().step()
        self.drawn.append(self.random.gauss(0.0, 1.0))


@pytest.mark.parametrize("policy", gxpo.STATE_POLICIES)
def test_a_generator_of_its_own_goes_on(policy: str) -> None:
    """Under "restore" the third step would else draw what the first drew. What the trial drew is drawn again."""
    params, right = fresh(START), random.Random(0)
    opt = GXPO(Drawing(params, lr=0.01), gate=None, optimizer_state=policy)
    opt.step(closure_of(params))
    assert opt.base.drawn[-3:] == [right.gauss(0.0, 1.0) for _ in range(3)]


class Strangers(torch.optim.SGD):
    """Steps an optimizer whose parameters nobody sees."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params[:1], lr=0.1)
        self.inner = torch.optim.SGD(params[1:], lr=0.1)

    def step(self, closure: Any = None) -> None:
        super().step()
        self.inner.step()


def test_parameters_that_only_an_inner_optimizer_has_are_refused() -> None:
    """They would take two raw steps more in each outer step, in silence."""
    params = fresh(START)
    before = fresh(params)
    with pytest.raises(RuntimeError, match="inner optimizers with 1 parameters that are not in its own param_groups"):
        GXPO(Strangers(params), gate=None).step(closure_of(params))
    assert_close(params, before, tolerance=0.0)


# ------------------------------------------------------------------------------------------ parameters and gradients


@pytest.mark.parametrize("estimator", ["displacement", "tensor"])
def test_quantized_parameters_with_the_other_estimators(estimator: str) -> None:
    start, slope = START[0], torch.linspace(1.0, 2.0, 4, dtype=torch.float64)
    p = torch.nn.Parameter(Halves(start / 2))
    opt = GXPO(torch.optim.SGD([p], lr=0.1, foreach=False), gate=None, estimator=estimator)
    for _ in opt.passes():
        p.grad = slope.clone()
    assert_close([p.detach().dequantize()], [start - 3.5 * 0.1 * slope])  # r = 1, q = K/2


def test_a_parameter_inside_another() -> None:
    """A view of one that is a parameter, too, shares its memory: the trial pushes both, and both move."""
    whole = torch.nn.Parameter(START[0].clone())
    part = torch.nn.Parameter(whole.detach()[:1])
    opt = GXPO(torch.optim.SGD([whole, part], lr=0.01), gate=None)
    opt.step(closure_of([whole, part]))
    assert opt.report.outcome == "active"


def test_gradients_of_somebody_that_are_no_views_stay() -> None:
    params = fresh(START)
    buffers = [torch.zeros_like(p) for p in params]
    for p, buffer in zip(params, buffers, strict=True):
        p.grad = buffer
    opt = GXPO(sgd(params), gate=None)
    for _ in range(3):
        opt.step(closure_of(params))
        assert [p.grad is buffer for p, buffer in zip(params, buffers, strict=True)] == [True, True]


def test_a_copied_model_with_a_gradient_that_was_added_to() -> None:
    """The copy of a used-up gradient is used up; what is accumulated into it is not."""
    params = fresh(START)
    opt = GXPO(sgd(params), gate=None)
    opt.step(closure_of(params))
    twin, copies = copy.deepcopy((opt, params))
    twin.step(closure_of(copies))
    twin, copies = copy.deepcopy((opt, params))
    for _ in range(2):
        bowl(copies).backward()
    with pytest.raises(RuntimeError, match="there are gradients that no pass has made"):
        twin.step(closure_of(copies))
