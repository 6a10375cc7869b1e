"""If these fail, gradients in a buffer, quantized or tied parameters, or an odd device break a step."""

from __future__ import annotations

import collections
import itertools
from typing import Any

import pytest
import torch
from odd_optimizers import (
    REFUSAL,
    START,
    ByHand,
    assert_close,
    bowl,
    check_reason,
    closure_of,
    fail,
    four_steps,
    fresh,
    sgd,
)
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

import gxpo
from gxpo import GXPO

# ----------------------------------------------------------------------------------------------- preallocated gradients


@pytest.mark.parametrize("form", ["closure", "passes", "lookahead"])
def test_gradients_that_are_views_of_one_buffer(form: str) -> None:
    """A framework's flat buffer is reduced and scaled for nothing: GXPO has dropped the views, gradients are raw."""
    start = [torch.full((3,), 2.0, dtype=torch.float64), torch.full((3,), -1.0, dtype=torch.float64)]
    params, flat = fresh(start), torch.zeros(6, dtype=torch.float64)
    for p, view in zip(params, flat.split(3), strict=True):
        p.grad = view

    def backward() -> Tensor:
        flat.zero_()
        loss = bowl(params)
        loss.backward()
        flat.mul_(0.1)  # what a framework does with the buffer: reduce, scale, add noise
        return loss

    opt = GXPO(torch.optim.SGD(params, lr=0.1), gate=None)
    hand = ByHand(lambda ps: torch.optim.SGD(ps, lr=0.1), start)
    for _ in range(2):
        if form == "closure":
            opt.step(backward)
        elif form == "passes":
            for _ in opt.passes():
                backward()
        else:
            backward()
            while opt.lookahead():
                backward()
            opt.step()
        hand.step(lambda ps: 0.1 * bowl(ps))
        assert_close(params, hand.params)
    assert [p.grad.data_ptr() for p in params] == [view.data_ptr() for view in flat.split(3)]


# ------------------------------------------------------------------------------------------------ failing while undoing


class BareZeroGrad(torch.optim.SGD):
    """zero_grad() without an argument, as apex's FusedAdam has it."""

    def zero_grad(self) -> None:
        super().zero_grad()


def test_a_base_whose_zero_grad_takes_no_argument() -> None:
    """apex's FusedAdam cannot be used: TypeError, and from then on every step and abort() raises."""
    _, params, hand = four_steps(lambda ps: BareZeroGrad(ps, lr=0.01), "keep", with_failure=True)
    assert_close(params, hand.params)


def test_a_failing_rollback_ends_the_step() -> None:
    """Where undoing a step fails, the message says to call abort(), and that raises again, for as long as one tries."""
    (p,) = params = fresh([torch.ones(3, dtype=torch.float64)])
    opt = GXPO(sgd(params), gate=None)
    passes = itertools.count(1)

    def loss(ps: list[Tensor]) -> Tensor:
        if next(passes) == 2:
            p.data = torch.full((5,), 2.0, dtype=torch.float64)  # a vocabulary that grows in mid-step
            raise ZeroDivisionError
        return bowl(ps)

    with pytest.raises((ZeroDivisionError, RuntimeError)):
        opt.step(closure_of(params, loss))
    opt.abort()
    hand = ByHand(sgd, params)
    opt.step(closure_of(params))
    hand.step()
    assert_close(params, hand.params)


# -------------------------------------------------------------------------------------------------- assigned attributes


def test_the_state_can_be_assigned() -> None:
    """`opt.state = defaultdict(dict)`, the usual way to reset an optimizer, is an AttributeError."""
    params = fresh(START)
    opt = GXPO(torch.optim.AdamW(params, lr=0.01), gate=None)
    opt.step(closure_of(params))
    opt.state = state = collections.defaultdict(dict)
    assert opt.state is opt.base.state is state
    hand = ByHand(lambda ps: torch.optim.AdamW(ps, lr=0.01), params)  # a new optimizer, at this point
    opt.step(closure_of(params))
    hand.step()
    assert_close(params, hand.params)


def test_the_groups_can_be_assigned() -> None:
    """`opt.param_groups = [...]` is an AttributeError, where plain torch takes it."""
    params = fresh(START)
    opt = GXPO(sgd(params), gate=None)
    opt.param_groups = groups = [{**opt.param_groups[0], "lr": 0.02}]
    assert opt.param_groups is opt.base.param_groups is groups
    hand = ByHand(lambda ps: torch.optim.SGD(ps, lr=0.02), params)
    opt.step(closure_of(params))
    hand.step()
    assert_close(params, hand.params)


def test_wrapping_leaves_the_bases_defaults_alone() -> None:
    """Wrapping adds "differentiable" to a foreign base's defaults, and groups that are added later then have it."""

    class Foreign(torch.optim.Optimizer):
        def __init__(self, params: list[Tensor]) -> None:
            super().__init__(params, {"lr": 0.1})

    base = Foreign(fresh(START))
    GXPO(base)
    assert base.defaults == {"lr": 0.1}


# ------------------------------------------------------------------------------------------------- quantized parameters


class Halves(Tensor):
    """A parameter stored as halves of its values, with what plain SGD needs and nothing else (as torchao's int8 weight,
    which has no addcmul, but exact)."""

    @staticmethod
    def __new__(cls: type[Halves], half: Tensor) -> Halves:
        made = Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype, device=half.device)
        made.half = half
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["half"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Halves:
        return cls(inner["half"])

    def dequantize(self) -> Tensor:
        return self.half * 2

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, first = torch.ops.aten, args[0]
        if func in (aten.detach.default, aten.clone.default):
            return return_and_correct_aliasing(func, args, kwargs or {}, cls(func(first.half)))
        if func is aten.copy_.default and isinstance(first, Halves):
            first.half.copy_(args[1].half if isinstance(args[1], Halves) else args[1] / 2)
            return first
        if func is aten.add_.Tensor and isinstance(first, Halves):
            first.half.add_(args[1] / 2, **kwargs or {})
            return first
        raise NotImplementedError(f"Halves has no {func}")


SUBCLASS = r"subclass|quantiz|addcmul|arithmetic|parameters? of type|Halves|Int8"


def test_parameters_of_a_tensor_subclass() -> None:
    """Quantized training, which plain SGD does, stops in its first step, deep inside torch, without saying why."""
    start, slope = START[0], torch.linspace(1.0, 2.0, 4, dtype=torch.float64)
    p = torch.nn.Parameter(Halves(start / 2))
    try:
        opt = GXPO(torch.optim.SGD([p], lr=0.1, foreach=False), gate=None)
    except REFUSAL as error:
        check_reason(error, SUBCLASS)
        return
    for _ in opt.passes():
        p.grad = slope.clone()
    # a constant gradient: r = 1, q = K/2 = 2.5, 0.5 x 2.5 x 2 + 1 steps
    assert_close([p.detach().dequantize()], [start - 3.5 * 0.1 * slope])


# --------------------------------------------------------------------------------------------- devices without a module


@pytest.mark.parametrize("device", ["xla:0", "hpu:0"])
def test_a_device_that_torch_has_no_module_for(device: str) -> None:
    """On XLA the first pass dies of "module 'torch' has no attribute 'xla'", unless replay_rng is False."""

    class Elsewhere(torch.nn.Parameter):
        """Says that it is on that device."""

        device = property(lambda self: torch.device(device))

    opt = GXPO(torch.optim.SGD([Elsewhere(torch.ones(3))], lr=0.1), gate=None)
    passes = opt.passes()
    try:
        assert next(passes) == 0
    except REFUSAL as error:
        check_reason(error, "replay_rng")
    finally:
        passes.close()


# --------------------------------------------------------------------------------- two Parameters over one storage


def tied_through_data(params: list[Tensor]) -> list[Tensor]:
    """An embedding and a head, two Parameters, as some checkpoints' loaders leave them."""
    params[1].data = params[0].data
    return params


class TiedByHand(ByHand):
    def _copy(self) -> tuple[list[Tensor], torch.optim.Optimizer]:
        params, base = super()._copy()
        return tied_through_data(params), base


@pytest.mark.parametrize("policy", gxpo.STATE_POLICIES)
@pytest.mark.parametrize("with_failure", [False, True])
def test_parameters_tied_through_data_move_once(with_failure: bool, policy: str) -> None:
    """Each of the two would otherwise be extrapolated from where the other has been moved to."""
    start = [START[0], START[0]]

    def loss(params: list[Tensor]) -> Tensor:
        return bowl(params[:1]) + (params[1] ** 3).sum()

    params = tied_through_data(fresh(start))
    opt = GXPO(torch.optim.SGD(params, lr=0.01, momentum=0.9), gate=None, optimizer_state=policy)
    hand = TiedByHand(lambda ps: torch.optim.SGD(tied_through_data(ps), lr=0.01, momentum=0.9), start, policy)
    for n in range(3):
        if with_failure and n == 1:
            fail(opt, params, loss)
        opt.step(closure_of(params, loss))
        hand.step(loss)
    assert params[0].data_ptr() == params[1].data_ptr()
    assert_close(params, hand.params)


# -------------------------------------------------------------------------------------------------- gradients lost


@pytest.mark.parametrize("form", ["closure", "passes"])
def test_what_is_accumulated_into_an_old_gradient_is_not_lost(form: str) -> None:
    """The last step's gradient is still in .grad; a micro-batch outside the step adds to it and would be dropped."""
    params = fresh(START)
    opt = GXPO(sgd(params), gate=None)
    opt.step(closure_of(params))
    bowl(params).backward()  # without zero_grad()
    begin = {"closure": lambda: opt.step(closure_of(params)), "passes": lambda: next(iter(opt.passes()))}[form]
    with pytest.raises(RuntimeError, match="there are gradients that no pass has made"):
        begin()
    opt.zero_grad()
    opt.step(closure_of(params))
    opt.zero_grad(set_to_none=False)  # zeros are no gradients
    opt.step(closure_of(params))
