"""If these fail, GXPO takes a setting, an optimizer or a checkpoint that it cannot use, or does not say which."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from failing import Case, refused

from gxpo import GXPO, Gate


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"horizon": 1}, "horizon must be an int >= 2, got 1"),
        ({"horizon": 2.0}, "horizon must be an int >= 2, got 2.0"),
        ({"horizon": True}, "horizon must be an int >= 2, got True"),
        ({"alpha": -0.1}, "alpha must be a number >= 0, got -0.1"),
        ({"alpha": float("nan")}, "alpha must be a number >= 0, got nan"),
        ({"estimator": "secant"}, r"estimator must be one of .*tensor.*, got 'secant'"),
        ({"optimizer_state": "reset"}, r"optimizer_state must be one of .*restore.*, got 'reset'"),
        ({"max_grad_norm": 0}, "max_grad_norm must be None or a number > 0, got 0"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm must be None or a number > 0, got inf"),
        ({"rollback": None}, "rollback must be True or False, got None"),
        ({"replay_rng": 1}, "replay_rng must be True or False, got 1"),
        ({"gate": 3.0}, r"gate must be None \(never\) or a Gate, got 3.0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"statistic": "entropy"}, r"statistic must be one of .*supplied.*, got 'entropy'"),
        ({"baseline": "mean"}, r"baseline must be one of .*ema.*, got 'mean'"),
        ({"window": 1}, "window must be an int >= 2, got 1"),
        ({"omega": 0.0}, r"omega must be a number in \(0, 1\], got 0.0"),
        ({"threshold": 0}, "threshold must be a number > 0, got 0"),
        ({"patience": 0}, "patience must be an int >= 1, got 0"),
        ({"two_sided": 1}, "two_sided must be True or False, got 1"),
        ({"warmup": -1}, "warmup must be an int >= 0, got -1"),
        ({"cooldown": 1.5}, "cooldown must be None or an int >= 0, got 1.5"),
        ({"max_active_steps": -1}, "max_active_steps must be None or an int >= 0, got -1"),
    ],
)
def test_bad_gates_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gate(**arguments)


def test_bases_that_cannot_be_wrapped() -> None:
    theta = torch.ones(2, requires_grad=True)
    for base in (torch.optim.LBFGS([theta]), GXPO(torch.optim.SGD([theta], lr=0.1)), [theta]):
        with pytest.raises(TypeError, match="base must be a torch.optim.Optimizer that steps without a closure"):
            GXPO(base)
    spin = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(TypeError, match="real parameters only, got torch.complex64"):
        GXPO(torch.optim.SGD([spin], lr=0.1))


class OnlyWraps(torch.optim.Optimizer):
    """An Optimizer by name, with nothing that its class's constructor makes, as timm's Lookahead is."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups, self.defaults = optimizer, optimizer.param_groups, optimizer.defaults


def test_a_base_that_only_wraps_another_is_refused() -> None:
    theta = torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match="OnlyWraps'> is built around another optimizer.*put GXPO around the inner"):
        GXPO(OnlyWraps(torch.optim.SGD([theta], lr=0.1)))


def test_checkpoints_from_the_future_are_refused() -> None:
    case = Case()
    saved = case.opt.state_dict()
    saved["gxpo"] = {"version": "9.0", "gate": {"step": 3, "mood": 1.0}}
    refused(case, ValueError, r"cannot read \['mood'\], saved by 9.0", lambda: case.opt.load_state_dict(saved))
