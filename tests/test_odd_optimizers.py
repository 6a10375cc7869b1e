"""If these fail, an optimizer that keeps state or weights in a way of its own breaks a step, or a step breaks it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from odd_optimizers import (
    CASES,
    REFUSAL,
    START,
    ByHand,
    Make,
    assert_close,
    bowl,
    check_reason,
    closure_of,
    fail,
    four_steps,
    fresh,
)
from torch import Tensor

import gxpo
from gxpo import GXPO

# --------------------------------------------------------------------------------------------- moved without a gradient


class ZeroFill(torch.optim.SGD):
    """As KellerJordan's Muon: no gradient is a gradient of zeros, so that momentum and decay go on."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
        super().step()


def zero_fill(params: list[Tensor]) -> torch.optim.Optimizer:
    return ZeroFill(params, lr=0.1, momentum=0.9, weight_decay=0.01)


def first_only(params: list[Tensor]) -> Tensor:
    return bowl(params[:1])


def test_parameters_moved_without_a_gradient() -> None:
    """An expert that routing skips gets two raw fast steps in every outer step, without alpha and q."""
    params = fresh(START)
    opt, hand = GXPO(zero_fill(params), gate=None), ByHand(zero_fill, START)
    for loss in (bowl, first_only, first_only, bowl):
        opt.step(closure_of(params, loss))
        hand.step(loss)
    assert_close(params, hand.params)


def test_a_failed_step_moves_no_parameter() -> None:
    """After an out-of-memory or Ctrl-C in mid-step, experts that were not routed stay where the fast steps put them."""
    params = fresh(START)
    opt = GXPO(zero_fill(params), gate=None)
    opt.step(closure_of(params))
    before = fresh(params)
    fail(opt, params, first_only)
    assert_close(params, before, tolerance=0.0)


# -------------------------------------------------------------------------- parameters written from the base's own copy


class Master(torch.optim.Optimizer):
    """SGD on float32 master weights in the state, as TransformerEngine's and apex's FusedAdam keep them."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            master = self.state[p].setdefault("master_param", p.detach().float().clone())
            master.sub_(self.param_groups[0]["lr"] * p.grad.float())
            p.copy_(master)


class DualAveraging(torch.optim.Optimizer):
    """SGD as dual averaging writes it, x = x0 - lr (g0 + g1 + ...), as dadaptation and madgrad do."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            x0, s = state.setdefault("x0", p.detach().clone()), state.setdefault("s", torch.zeros_like(p))
            s.add_(p.grad)
            p.copy_(x0 - self.param_groups[0]["lr"] * s)


OWN_COPY = r"\bmaster\b|\bcop(y|ies)\b|\bown\b|elsewhere|overwr|dual averaging"


@pytest.mark.parametrize("policy", gxpo.STATE_POLICIES)
@pytest.mark.parametrize("kind", [Master, DualAveraging])
def test_bases_that_keep_their_own_weights(kind: Make, policy: str) -> None:
    """The base overwrites theta~: three plain steps at three times the price, while the report says multiplier 9."""
    hand = ByHand(lambda ps: torch.optim.SGD(ps, lr=1e-3), [torch.ones(4)], policy, horizon=10, alpha=0.8)
    params = before = fresh([torch.ones(4)])
    try:  # such a base may make its copy only when it steps: a refusal counts in the first steps, too
        opt = GXPO(kind(params), gate=None, optimizer_state=policy, horizon=10, alpha=0.8)
        for _ in range(2):
            before = fresh(params)
            opt.step(closure_of(params))
            hand.step()
    except REFUSAL as error:
        check_reason(error, OWN_COPY)
        assert_close(params, before, tolerance=0.0)
        return
    moved, right = (1 - ps[0][0].item() for ps in (params, hand.params))
    assert moved == pytest.approx(right, rel=1e-3)


# -------------------------------------------------------------------------------------------- a container of optimizers


class Container(torch.optim.Optimizer):
    """torchtitan's OptimizersContainer in small: steps inner optimizers, its own state stays empty."""

    def __init__(self, params: list[Tensor]) -> None:
        self.optimizers = [torch.optim.AdamW([p], lr=0.01) for p in params]
        super().__init__(params, {"lr": 0.01})

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


@CASES
def test_a_container_of_optimizers(policy: str, with_failure: bool) -> None:
    """The inner moments keep what the fast steps did: "restore" is ignored, and a failed step leaves its trace."""
    try:
        GXPO(Container(fresh(START)))
    except REFUSAL as error:
        check_reason(error, "optimizers")
        return
    _, params, hand = four_steps(Container, policy, with_failure, right=lambda ps: torch.optim.AdamW(ps, lr=0.01))
    assert_close(params, hand.params)


# -------------------------------------------------------------------------------------- state that the optimizer shares


class Nested(torch.optim.Optimizer):
    """SGD with momentum kept as DistributedShampoo keeps it: nested in the state, worked on through its own list."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {"lr": 0.01})
        self.mine = [torch.zeros_like(p) for p in params]
        for p, momentum in zip(params, self.mine, strict=True):
            self.state[p] = {"block_0": {"momentum": momentum}}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        for p, momentum in zip(group["params"], self.mine, strict=True):
            momentum.mul_(0.9).add_(p.grad)
            p.sub_(momentum, alpha=group["lr"])


@CASES
def test_nested_state_that_the_optimizer_also_holds(policy: str, with_failure: bool) -> None:
    """The state in use and the state in checkpoints part for good: one is never put back, the other never moves."""
    opt, params, hand = four_steps(
        Nested, policy, with_failure, right=lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9)
    )
    assert_close(params, hand.params)
    saved = opt.state_dict()["state"]
    assert_close(
        [saved[n]["block_0"]["momentum"] for n in range(2)],
        [hand.base.state[p]["momentum_buffer"] for p in hand.params],
    )


# -------------------------------------------------------------------------------------------- counters beside the state


class TensorCounter(torch.optim.SGD):
    """facebookresearch/madgrad's state["k"]: a tensor beside the parameters' state. Its steps grow with sqrt(k + 1)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        k = self.state.setdefault("k", torch.tensor([0]))
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"] * math.sqrt(k.item() + 1))
        k.add_(1)


class AttributeCounter(torch.optim.SGD):
    """StableSPAM's total_step: an attribute of the optimizer. Its steps grow with sqrt(total_step + 1)."""

    total_step = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"] * math.sqrt(self.total_step + 1))
        self.total_step += 1


@CASES
def test_a_tensor_beside_the_parameters_state(policy: str, with_failure: bool) -> None:
    """A counter in the state runs three times too fast under "restore" and counts failed steps: wrong step sizes."""
    opt, params, hand = four_steps(lambda ps: TensorCounter(ps, lr=0.003), policy, with_failure)
    assert opt.base.state["k"].item() == hand.base.state["k"].item() == {"keep": 12, "restore": 4}[policy]
    assert_close(params, hand.params)


@CASES
def test_a_counter_that_is_an_attribute(policy: str, with_failure: bool) -> None:
    """A schedule that lives in the optimizer's attributes runs ahead of the steps that were really made."""
    opt, params, hand = four_steps(lambda ps: AttributeCounter(ps, lr=0.003), policy, with_failure)
    assert opt.base.total_step == hand.base.total_step == {"keep": 12, "restore": 4}[policy]
    assert_close(params, hand.params)


# --------------------------------------------------------------------------------------- noise drawn by the base's step


class Langevin(torch.optim.SGD):
    """SGLD: adds noise to what SGD does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for p in self.param_groups[0]["params"]:
            noise = torch.randn_like(p)
            self.drawn = [*getattr(self, "drawn", []), noise]
            p.add_(noise, alpha=0.01)


def test_noise_drawn_in_the_base_is_drawn_anew() -> None:
    """One draw is used three times: noise of SGLD or of stochastic rounding gets three times the variance."""
    torch.manual_seed(0)
    params, masks = fresh([torch.zeros(20_000)]), []

    def loss(ps: list[Tensor]) -> Tensor:
        masks.append(torch.rand(20_000) < 0.5)
        return (ps[0] * masks[-1]).sum() * 1e-9

    opt = GXPO(Langevin(params, lr=1e-6), gate=None)
    opt.step(closure_of(params, loss))
    assert all(torch.equal(mask, masks[0]) for mask in masks[1:])  # what replay_rng is for
    noise = torch.stack(opt.base.drawn)
    assert torch.corrcoef(noise).triu(1).abs().max() < 0.05
    # theta2 = e0 + e1, q = K/2 where a gradient does not change and 1 where it is zero, theta' = alpha q theta2 + e2
    q = 1 + 1.5 * masks[0]
    torch.testing.assert_close(params[0].detach(), 0.01 * (0.5 * q * (noise[0] + noise[1]) + noise[2]))
    assert params[0].detach()[masks[0]].std().item() == pytest.approx(0.01 * math.sqrt(2 * 1.25**2 + 1), rel=0.03)


# ---------------------------------------------------------------------------------------- state that is the parameter


class HoldsParameters(torch.optim.SGD):
    """Its state holds the parameter, and another tensor with the same memory."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p]["param"], self.state[p]["data"], self.state[p]["flat"] = p, p.data, p.detach().view(-1)


@CASES
def test_state_that_is_the_parameter(policy: str, with_failure: bool) -> None:
    """ "restore" would take the parameters back to theta0 with it, and the move to theta~ would be lost."""
    _, params, hand = four_steps(
        lambda ps: HoldsParameters(ps, lr=0.01, momentum=0.9),
        policy,
        with_failure,
        right=lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9),
    )
    assert_close(params, hand.params)


# ----------------------------------------------------------------------------------------------------- low-bit state


class Codes(Tensor):
    """A moment as 8-bit codes and a scale: it can be copied into, and has no clone, as torchao's."""

    @staticmethod
    def __new__(cls: type[Codes], codes: Tensor, scale: Tensor) -> Codes:
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Codes:
        return cls(inner["codes"], inner["scale"])

    def values(self) -> Tensor:
        return self.codes.float() * self.scale

    def write(self, values: Tensor) -> None:
        self.scale.copy_(values.abs().max().clamp_min(1e-12) / 127)
        self.codes.copy_((values / self.scale).round())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"Codes has no {func}")


class LowBit(torch.optim.Optimizer):
    """SGD with its momentum in eight bits."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state["momentum"] = Codes(torch.zeros(p.shape, dtype=torch.int8), torch.zeros(()))
            values = 0.9 * state["momentum"].values() + p.grad
            state["momentum"].write(values.float())
            p.sub_(state["momentum"].values(), alpha=self.param_groups[0]["lr"])


class Twin(LowBit):
    """The same with codes and scale as tensors of their own, which any copy takes along."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            old = state["codes"].float() * state["scale"] if state else torch.zeros(p.shape)
            values = (0.9 * old + p.grad).float()
            state["scale"] = values.abs().max().clamp_min(1e-12) / 127
            state["codes"] = (values / state["scale"]).round().to(torch.int8)
            p.sub_(state["codes"].float() * state["scale"], alpha=self.param_groups[0]["lr"])


@CASES
def test_state_that_has_no_clone(policy: str, with_failure: bool) -> None:
    """Of torchao's 8-bit and 4-bit optimizers no copy could be made in the usual way, and the first step stops."""
    opt, params, hand = four_steps(LowBit, policy, with_failure, right=Twin)
    assert_close(params, hand.params, tolerance=1e-7)
    saved = opt.state_dict()["state"][0]["momentum"]
    assert isinstance(saved, Codes)
    assert saved.codes.data_ptr() != opt.state[params[0]]["momentum"].codes.data_ptr()
