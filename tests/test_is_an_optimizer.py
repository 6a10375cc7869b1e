"""GXPO is a torch.optim.Optimizer: what trainers, schedulers and checkpoints do with one works.

Each test is a complaint that users of such wrappers have had about others.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import gxpo
from gxpo import GXPO, Gate
from gxpo_reference.baselines import GRPO, SFPO

SETTINGS = [
    {},
    {"estimator": "displacement", "optimizer_state": "restore", "max_grad_norm": 0.5},
    {"gate": Gate(window=3, threshold=1.0, patience=2, cooldown=2)},
    {"gate": Gate(baseline="ema", omega=0.3, threshold=0.5, patience=2, window=3)},
]


def make(settings: dict[str, Any], base: type = torch.optim.AdamW, **options: Any) -> tuple[GXPO, list[Tensor]]:
    params = [torch.linspace(-1, 1, 6).reshape(2, 3).requires_grad_(), torch.ones(4, requires_grad=True)]
    return GXPO(base(params, **{"lr": 0.05, **options}), **settings), params


def step(opt: GXPO, params: list[Tensor], n: int) -> None:
    """A problem that differs from step to step, with a few loud ones."""
    scale = 8.0 if n in (6, 7, 8) else 1.0 + 0.3 * (n % 3)

    def closure() -> Tensor:
        loss = scale * sum((p * p).sum() + (p + n).cos().sum() for p in params)
        loss.backward()
        return loss

    opt.step(closure)


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_state_and_groups_are_the_bases_own() -> None:
    """Copies go stale: a scheduler would change a learning rate that nobody reads."""
    opt, _ = make({})
    assert opt.param_groups is opt.base.param_groups
    assert opt.state is opt.base.state
    assert opt.defaults is opt.base.defaults
    assert isinstance(opt, torch.optim.Optimizer)
    extra = torch.zeros(2, requires_grad=True)
    opt.add_param_group({"params": [extra], "lr": 0.5})
    assert opt.base.param_groups[1]["params"][0] is extra
    extra.grad = torch.ones(2)
    opt.zero_grad()
    assert extra.grad is None


@pytest.mark.parametrize("form", ["closure", "passes"])
def test_schedulers_attach_and_do_not_warn(form: str) -> None:
    """The order warning, or a refusal, or a rate that advances with every pass."""
    opt, params = make({})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda n: 0.5**n)
        for n in range(3):
            if form == "closure":
                step(opt, params, n)
            else:
                for _ in opt.passes():
                    sum((p * p).sum() for p in params).backward()
            scheduler.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(0.05 / 8)
    cyclic, _ = make({}, torch.optim.SGD, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(cyclic, max_lr=0.1, total_steps=10)  # reads and writes defaults and momentum


@pytest.mark.parametrize("form", ["closure", "passes", "lookahead"])
def test_step_hooks_run_once_a_step_and_the_bases_three_times(form: str) -> None:
    opt, params = make({})
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    opt.base.register_step_post_hook(lambda *_: seen.append("base"))
    if form == "closure":
        step(opt, params, 0)
    elif form == "passes":
        for _ in opt.passes():
            sum((p * p).sum() for p in params).backward()
    else:
        sum((p * p).sum() for p in params).backward()
        while opt.lookahead():
            sum((p * p).sum() for p in params).backward()
        opt.step()
    assert (seen.count("pre"), seen.count("post"), seen.count("base")) == (1, 1, 3)


def test_state_dict_hooks_run() -> None:
    opt, params = make({})
    step(opt, params, 0)
    seen: list[str] = []
    opt.register_state_dict_pre_hook(lambda *_: seen.append("save"))
    opt.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    opt.register_load_state_dict_pre_hook(lambda *_: seen.append("load"))
    opt.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    opt.load_state_dict(opt.state_dict())
    assert seen == ["save", "saved", "load", "loaded"]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # the default from torch 2.6 on


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("at", range(1, 13))
def test_resume_is_bit_for_bit_at_any_step(settings: dict[str, Any], at: int) -> None:
    """Mid-window, mid-streak, after the trip, in a cooldown: a resumed run must not re-arm or forget."""
    whole, params = make(settings)
    for n in range(at):
        step(whole, params, n)
    other, resumed = make(settings)
    for p, q in zip(resumed, params, strict=True):
        p.detach().copy_(q.detach())
    other.load_state_dict(through_a_file(whole.state_dict()))
    for n in range(at, 14):
        step(whole, params, n)
        step(other, resumed, n)
        assert other.report == whole.report
    assert equal(params, resumed)


def test_the_streaks_and_trips_above_really_happen() -> None:
    """Otherwise the resume test would resume nothing of interest."""
    seen = []
    for settings in SETTINGS[2:]:
        opt, params = make(settings)
        for n in range(14):
            step(opt, params, n)
            seen.append((opt.report.streak, opt.report.outcome))
    assert {(1, "active"), (2, "active"), (0, "single")} <= set(seen)


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adafactor"])
def test_checkpoints_are_interchangeable_with_the_bases(kind: str) -> None:
    """A run that began without GXPO can go on with it, and the other way round; the base's moments are not lost. The
    gate comes back as it was, because it is in the groups, too."""
    if not hasattr(torch.optim, kind):
        pytest.skip(f"torch {torch.__version__} has no {kind}")
    base = getattr(torch.optim, kind)
    opt, params = make({}, base)
    for n in range(3):
        step(opt, params, n)
    plain = base([p.detach().clone().requires_grad_() for p in params], lr=0.05)
    plain.load_state_dict(through_a_file(opt.state_dict()))
    assert str(plain.state_dict()["state"]) == str(opt.base.state_dict()["state"])
    back, _ = make({}, base)
    back.load_state_dict(through_a_file(plain.state_dict()))
    assert str(back.base.state_dict()["state"]) == str(plain.state_dict()["state"])
    assert back.gate_state == opt.gate_state
    never = base([p.detach().clone().requires_grad_() for p in params], lr=0.05)
    back.load_state_dict(never.state_dict())
    assert back.gate_state == gxpo.GateState()


def test_the_extra_entry_is_plain_scalars() -> None:
    opt, params = make(SETTINGS[2])
    for n in range(8):
        step(opt, params, n)
    saved = opt.state_dict()
    assert saved.keys() == {"state", "param_groups", "gxpo"}
    assert json.loads(json.dumps(saved["gxpo"])) == saved["gxpo"]


def test_a_checkpoint_does_not_change_with_later_steps() -> None:
    """Aliased tensors made 'best' checkpoints in memory follow the training."""
    opt, params = make({})
    step(opt, params, 0)
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    step(opt, params, 1)
    assert str(saved) == str(kept)
    opt.load_state_dict(opt.state_dict())  # accelerate does this when it wraps
    step(opt, params, 2)


def test_a_failed_load_changes_nothing() -> None:
    opt, params = make(SETTINGS[2])
    for n in range(5):
        step(opt, params, n)
    before = str(opt.state_dict())
    other = GXPO(torch.optim.AdamW([torch.ones(1, requires_grad=True)], lr=0.05))
    with pytest.raises(ValueError, match="parameter group"):
        opt.load_state_dict(other.state_dict())
    assert str(opt.state_dict()) == before


@pytest.mark.parametrize("kind", [GXPO, SFPO, GRPO])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_pickle_and_deepcopy_go_on_alike(kind: type[GXPO], how: Any) -> None:
    params = [torch.ones(3, requires_grad=True)]
    settings = {"gate": Gate(window=3, threshold=1.0)} if kind is not GRPO else {}
    opt = kind(torch.optim.AdamW(params, lr=0.05), **settings)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda n: 1.0)  # patches opt.step
    for n in range(4):
        step(opt, params, n)
    twin, copies = how((opt, params))
    assert type(twin) is kind
    assert twin.param_groups[0]["params"][0] is copies[0]
    for n in range(4, 12):
        step(opt, params, n)
        step(twin, copies, n)
        assert twin.report == opt.report
    assert equal(params, copies)


def test_it_prints_what_it_is() -> None:
    opt, _ = make({})
    assert str(opt).startswith("GXPO(horizon=5, alpha=0.5, estimator='gradient', optimizer_state='keep'")
    assert "base=AdamW" in str(opt)


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"amsgrad": True}, {"maximize": True}])
def test_variants_of_the_base(options: dict[str, Any]) -> None:
    """A foreach or fused base computes the same; one that maximizes is followed uphill."""
    opt, params = make({})
    other, others = make({}, **options)
    for n in range(4):
        step(opt, params, n)
        step(other, others, n)
    assert other.report.outcome == "active"
    if "foreach" in options or "fused" in options:
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q)


def test_two_around_different_parameters_do_not_mix() -> None:
    one, a = make({})
    two, b = make(SETTINGS[1])
    alone, c = make({})
    for n in range(4):
        step(one, a, n)
        step(two, b, n)
        step(alone, c, n)
    assert equal(a, c)
    assert one.gate_state == alone.gate_state
