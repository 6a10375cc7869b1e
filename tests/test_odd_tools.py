"""If these fail, checkpoint tools, hooks, the compiler or threads are promised more than they get."""

from __future__ import annotations

import collections
import copy
import re
import threading
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from odd_optimizers import REFUSAL, START, ByHand, assert_close, bowl, check_reason, closure_of, documented, fresh, sgd
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from gxpo import GXPO, Gate

# ----------------------------------------------------------------------------------------- torch.distributed.checkpoint


class Resumable:
    """A GXPO around AdamW whose gate closes after two steps, on a model that `seed` makes."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = torch.nn.Linear(3, 1)
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.opt = GXPO(torch.optim.AdamW(self.model.parameters(), lr=0.1), gate=Gate(max_active_steps=2))

    def step(self) -> None:
        x = torch.linspace(-1.0, 1.0, 24).view(8, 3)
        for _ in self.opt.passes():
            self.model(x).square().mean().backward()


def test_a_checkpoint_is_asked_for_before_the_first_step() -> None:
    """DCP's first call on a fresh optimizer raises "step() needs a closure" and leaves every learning rate at 0."""
    run = Resumable(0)
    before = fresh(run.model.parameters())
    try:
        get_state_dict(run.model, run.opt)
    finally:
        assert run.opt.param_groups[0]["lr"] == 0.1
        assert_close(run.model.parameters(), before, tolerance=0.0)
    assert (run.opt.active, run.opt.gate_state.step) == (True, 0)


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "one step made"])
def test_resume_by_distributed_checkpoint(warm: bool) -> None:
    """A resumed run stops with an error; in a process that has stepped it goes on, with the gate open again."""
    old, new = Resumable(0), Resumable(1)
    for _ in range(3):
        old.step()
    if warm:
        new.step()
    weights, state = (copy.deepcopy(part) for part in get_state_dict(old.model, old.opt))
    set_state_dict(new.model, new.opt, model_state_dict=weights, optim_state_dict=state)
    assert (new.opt.active, new.opt.gate_state.step) == (old.opt.active, old.opt.gate_state.step) == (False, 3)
    assert new.opt.param_groups[0]["lr"] == 0.1
    old.step(), new.step()
    assert_close(new.model.parameters(), old.model.parameters(), tolerance=0.0)


# -------------------------------------------------------------------------------------------- hooks that edit gradients


@pytest.mark.parametrize("form", ["passes", "closure"])
@pytest.mark.parametrize("where", ["base", "gxpo"])
def test_a_step_pre_hook_that_edits_gradients(where: str, form: str) -> None:
    """A hook that clips sees one gradient of three or none; on the base, q still comes from what the hook took away."""
    if where == "gxpo" and documented("hook", r"\bbase\b", "gradient"):
        return  # said: a hook that edits gradients belongs on the base
    p = torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    opt = GXPO(torch.optim.SGD([p], lr=0.1), gate=None)

    def clip(*_: Any) -> None:
        if p.grad is not None:
            p.grad.clamp_(-0.5, 0.5)

    (opt if where == "gxpo" else opt.base).register_step_pre_hook(clip)
    if form == "passes":
        for _ in opt.passes():
            (p**2).sum().backward()
    else:
        opt.step(closure_of([p], lambda ps: (ps[0] ** 2).sum()))
    # three gradients of 0.5, steps of 0.05: r = 1, q = K/2 = 2.5, 0.5 x 2.5 x 0.1 + 0.05
    assert_close([2.0 - p], [torch.full((3,), 0.175, dtype=torch.float64)])


# -------------------------------------------------------------------------------------------------------- torch.compile


def test_a_compiled_step() -> None:
    """torch.compile(opt.step) fails at its second step, and abort(), which the message advises, undoes the first."""
    params = fresh(START)
    opt = GXPO(sgd(params), gate=None)
    hand = ByHand(sgd, START)
    torch._dynamo.reset()
    try:
        step = torch.compile(opt.step, backend="eager")
        for n in range(1, 3):
            opt.zero_grad()
            bowl(params).backward()
            while opt.lookahead():
                bowl(params).backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                step()  # of all forms the one that takes the compiler least time
            opt.abort()  # harmless where no step is in progress
            hand.step()
            assert_close(params, hand.params)
            assert opt.gate_state.step == n
    finally:
        torch._dynamo.reset()


# ------------------------------------------------------------------------------------------- a history of other figures


@pytest.mark.filterwarnings("ignore:the gate now watches:UserWarning")
@pytest.mark.parametrize(
    ("old", "new"),
    [("disagreement", "corrective_norm"), ("corrective_norm", "disagreement")],
    ids=["to norms", "to cosines"],
)
def test_a_history_of_another_statistic(old: str, new: str) -> None:
    """A checkpoint's cosines score a resumed run's norms: the gate closes for good after `patience` steps."""

    def train(statistic: str, steps: Iterable[int], state: dict[str, Any] | None = None) -> GXPO:
        params = fresh([torch.linspace(-1.0, 1.0, 8)])
        opt = GXPO(torch.optim.SGD(params, lr=1e-3), gate=Gate(statistic=statistic, window=10))
        if state is not None:
            opt.load_state_dict(state)
        for n in steps:
            batch = torch.randn(16, 8, generator=torch.Generator().manual_seed(n))
            for _ in opt.passes():
                (batch @ params[0]).square().mean().backward()
        return opt

    saved = train(old, range(12)).state_dict()
    assert train(new, range(17)).active  # never switched
    try:
        resumed = train(new, range(12, 17), saved)
    except ValueError as error:
        check_reason(error, "statistic")
        return
    assert resumed.active
    assert resumed.report.z is None  # five observations of its own are no window of ten


# ------------------------------------------------------------------------------------------------- the global generator


def test_another_thread_draws_the_same_numbers_again() -> None:
    """An asynchronous rollout samples the same tokens two or three times, because every pass rewinds its generator."""
    if documented("thread", "random|replay_rng|generator"):
        return  # said: replay_rng=False where other threads draw
    p, drawn = torch.nn.Parameter(torch.ones(8)), []
    opt = GXPO(torch.optim.SGD([p], lr=1e-3), gate=None)
    torch.manual_seed(0)
    for _ in opt.passes():
        rollout = threading.Thread(target=lambda: drawn.append(tuple(torch.rand(4).tolist())))
        rollout.start()
        rollout.join()
        (torch.nn.functional.dropout(p, 0.5) ** 2).sum().backward()
    assert len(set(drawn)) == len(drawn) == 3


# ---------------------------------------------------------------------------------------------------- the false warning


def regression(seed: int, steps: int, batches_of: int, lr: float, clip: float | None = None) -> list[str]:
    """The warnings of a run whose batches serve `batches_of` steps each."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    opt = GXPO(torch.optim.AdamW(model.parameters(), lr=lr))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in range(steps):
            if n % batches_of == 0:
                x, y = torch.randn(64, 6), torch.randn(64, 4)
            for _ in opt.passes():
                (model(x) - y).square().mean().backward()
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(("steps", "batches_of", "lr"), [(48, 4, 1e-6), (24, 24, 1e-5)], ids=["epochs", "full batch"])
def test_no_warning_of_clipping_where_nothing_is_clipped(steps: int, batches_of: int, lr: float) -> None:
    """With several iterations a batch, or one batch for all, users are told that they clip, and they do not."""
    assert regression(0, steps=24, batches_of=1, lr=1e-3, clip=0.1)  # who does clip is told
    warned = [seed for seed in range(8) if regression(seed, steps, batches_of, lr)]
    assert warned == []


# -------------------------------------------------------------------------------------------------- what the errors say


class Lookahead(torch.optim.Optimizer):
    """Built around another optimizer, without Optimizer.__init__, as timm's and pytorch_optimizer's are."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.state, self.defaults = inner, collections.defaultdict(dict), inner.defaults
        self._optimizer_step_pre_hooks: dict[int, Any] = collections.OrderedDict()
        self._optimizer_step_post_hooks: dict[int, Any] = collections.OrderedDict()
        self._patch_step_function()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def assert_refused_as_a_wrapper(base: torch.optim.Optimizer) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        GXPO(base)
    assert not re.search(r"\bprepare\b|accelerate", str(caught.value), re.IGNORECASE), caught.value
    assert type(base).__name__ in str(caught.value)
    assert re.search("wrap|around|inside|inner", str(caught.value)), caught.value


def test_an_optimizer_around_an_optimizer_is_not_told_about_accelerate() -> None:
    """Who wraps Lookahead, TRAC or DP-SGD is sent to prepare(), a function of a library that is not in use."""
    assert_refused_as_a_wrapper(Lookahead(torch.optim.SGD(fresh(START), lr=0.1)))


def test_an_optimizer_in_backward_is_named() -> None:
    """Where hooks step and free gradients during backward, "was backward() called" sends users the wrong way."""
    params = fresh(START)
    inner = {p: sgd([p]) for p in params}

    def step_and_free(p: Tensor) -> None:
        inner[p].step()
        inner[p].zero_grad()

    for p in params:
        p.register_post_accumulate_grad_hook(step_and_free)
    with pytest.raises(REFUSAL, match=r"(?i)hook|optimizer[- ]in[- ]backward|during backward"):
        GXPO(sgd(params)).step(closure_of(params))
