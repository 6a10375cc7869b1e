"""check_same_batch: what must find a changing batch before a training is lost to it, and must not itself change one."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gxpo import GXPO
from gxpo_reference.same_batch import check_same_batch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def network(dropout: float = 0.5) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(dropout), nn.Linear(4, 1))


def squares(model: nn.Module, batches: Iterator[Tensor]) -> Callable[[], Tensor]:
    """The closure that takes the next batch each time."""

    def closure() -> Tensor:
        loss = model(next(batches)).square().mean()
        loss.backward()
        return loss

    return closure


def everything(model: nn.Module) -> list[Any]:
    """All that the check promises to leave alone: objects, values and random numbers."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    modes = [module.training for module in model.modules()]
    return [[id(t) for t in tensors], [t.detach().tolist() for t in tensors], modes, torch.get_rng_state().tolist()]


# -------------------------------------------------------------------------------------------------- what it has to find


def test_the_same_batch_twice_is_fine(device: str) -> None:
    """It would cry wolf at everybody who uses dropout and BatchNorm."""
    model, x = network().to(device), torch.randn(8, 3, device=device)
    assert check_same_batch(model, squares(model, itertools.repeat(x))) < 1e-5


def test_a_loader_that_advances_is_found() -> None:
    """The most natural mistake, next(loader) inside the closure: it trains, and the extrapolation follows the noise."""
    model = network(dropout=0.0)
    message = (
        r"differ by \d\S+, their norm is \d\S+\. Every pass has to use the same batch, rewards, advantages, old log-"
    )
    with pytest.raises(RuntimeError, match=message):
        check_same_batch(model, squares(model, iter(torch.randn(9, 8, 3))))


def test_advantages_of_new_samples_are_found() -> None:
    """Rollouts are the batch, too: sampled anew in each pass, no two gradients are of one loss."""
    policy, states, environment = nn.Linear(3, 2), torch.randn(8, 3), torch.Generator().manual_seed(0)

    def rollout() -> tuple[Tensor, Tensor]:
        rewards = torch.randn(8, generator=environment)
        return torch.randint(2, (8, 1), generator=environment), rewards - rewards.mean()

    def loss(actions: Tensor, advantages: Tensor) -> Tensor:
        return -(policy(states).log_softmax(-1).gather(1, actions)[:, 0] * advantages).mean()

    kept = rollout()
    assert check_same_batch(policy, lambda: loss(*kept).backward()) == 0.0
    with pytest.raises(RuntimeError, match="advantages"):
        check_same_batch(policy, lambda: loss(*rollout()).backward())


def test_dropout_is_replayed_as_gxpo_does(device: str) -> None:
    """With replay the masks of all passes agree and there is nothing to find; without it they do not."""
    model, x = network().to(device), torch.randn(8, 3, device=device)
    closure = squares(model, itertools.repeat(x))
    assert check_same_batch(model, closure, replay_rng=True) < 1e-5
    with pytest.raises(RuntimeError, match="with replay_rng=True torch's are replayed"):
        check_same_batch(model, closure, replay_rng=False)


def test_samples_of_torchs_own_generator_are_found_without_replay() -> None:
    """At one point they come out the same when replayed, and GXPO moves: this is how to see them."""
    policy, states = nn.Linear(3, 2), torch.randn(8, 3)

    def closure() -> None:
        logps = policy(states).log_softmax(-1)
        logps.gather(1, torch.multinomial(logps.exp(), 1)).mean().backward()

    assert check_same_batch(policy, closure) == 0.0
    with pytest.raises(RuntimeError, match="random numbers"):
        check_same_batch(policy, closure, replay_rng=False)


@pytest.mark.parametrize(("scale", "found"), [(1.009, False), (0.991, False), (1.011, True), (0.989, True)])
def test_one_percent_is_the_bound(scale: float, found: bool) -> None:
    """Kernels that add in another order differ by rounding; another batch by more than a hundredth."""
    theta, scales = torch.ones(3, requires_grad=True), iter((1.0, scale))
    closure = lambda: (next(scales) * theta.square().sum()).backward()  # noqa: E731
    if found:
        with pytest.raises(RuntimeError, match="differ by"):
            check_same_batch([theta], closure)
    else:
        assert check_same_batch([theta], closure) == pytest.approx(abs(scale - 1), rel=0.01)


@pytest.mark.parametrize("routed", [(False, True), (True, False)])
def test_a_parameter_that_one_batch_alone_reaches_is_found(routed: tuple[bool, bool]) -> None:
    """An expert that only some batches are routed to; all the others' gradients may agree."""
    theta, expert, reach = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True), iter(routed)
    with pytest.raises(RuntimeError, match="differ by"):
        check_same_batch([theta, expert], lambda: (theta.sum() + (expert.sum() if next(reach) else 0.0)).backward())


@pytest.mark.parametrize(("values", "norms"), [((1.0, 0.0), "2"), ((0.0, 1.0), "2")])
def test_a_gradient_that_comes_or_goes_is_found(values: tuple[float, float], norms: str) -> None:
    """Nothing is divided by a norm of zero."""
    theta, scales = torch.ones(4, requires_grad=True), iter(values)
    with pytest.raises(RuntimeError, match=f"differ by {norms}, their norm is {norms}"):
        check_same_batch([theta], lambda: (next(scales) * theta.sum()).backward())


def test_a_zero_gradient_is_the_same_twice() -> None:
    """All advantages zero, common in GRPO: that is no mistake in the closure."""
    theta = torch.ones(4, requires_grad=True)
    assert check_same_batch([theta], lambda: (0.0 * theta.sum()).backward()) == 0.0


def test_half_precision_is_compared_in_a_wider_type() -> None:
    """The norm of a bfloat16 gradient is rounded by half a percent, half of what is allowed; float16's may overflow."""
    theta = torch.ones(300, dtype=torch.float16, requires_grad=True)
    assert check_same_batch([theta], lambda: (30000 * theta).sum().backward()) == 0.0


# ------------------------------------------------------------------------------------------- what it has to leave alone


def prepared() -> tuple[nn.Module, Tensor]:
    """A model in the midst of a training: gradients of micro-batches in it, one part frozen, one part in eval mode."""
    model, x = network(), torch.randn(8, 3)
    model[3].weight.requires_grad_(False)
    model[2].eval()
    model(x).sum().backward()
    return model, x


def test_a_training_goes_on_as_if_nothing_had_been_checked() -> None:
    """A check that moves running statistics or random numbers is a change to the training that it was to check."""
    model, x = prepared()
    model[2].train()
    before = everything(model)
    check_same_batch(model, squares(model, itertools.repeat(x)))
    assert everything(model) == before
    other, results = copy.deepcopy(model), []
    for m, checked in ((model, True), (other, False)):
        torch.manual_seed(1)
        m.zero_grad()
        opt = GXPO(torch.optim.AdamW(m.parameters(), lr=0.1))
        for _ in range(3):
            if checked:
                check_same_batch(m, squares(m, itertools.repeat(x)))
            opt.step(squares(m, itertools.repeat(x)))
        results.append([t.tolist() for t in m.state_dict().values()])
    assert results[0] == results[1]


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_exception_comes_out_and_everything_is_as_it_was(call: int, error: type[BaseException]) -> None:
    """Out of memory is when one checks with a smaller batch, in the same notebook."""
    model, x = prepared()
    before, calls = everything(model), itertools.count(1)

    def closure() -> None:
        model.eval()
        torch.rand(3)
        model.train()(x).sum().backward()
        if next(calls) == call:
            raise error

    with pytest.raises(error):
        check_same_batch(model, closure)
    assert everything(model) == before


@pytest.mark.parametrize("values", [(1.0, 1.0), (1.0, 2.0)])
def test_gradients_that_are_always_written_to_one_place_are_compared_and_put_back(values: tuple[float, float]) -> None:
    """DDP's gradient_as_bucket_view does so: the second would be compared with itself, and the one at hand be lost."""
    theta, place, new = torch.ones(3, requires_grad=True), torch.full((3,), 7.0), iter(values)
    theta.grad = place

    def closure() -> None:
        theta.grad = place.fill_(next(new))

    with contextlib.nullcontext() if values[0] == values[1] else pytest.raises(RuntimeError, match="differ by"):
        assert check_same_batch([theta], closure) == 0.0
    assert theta.grad is place
    assert place.tolist() == [7.0] * 3


def test_what_the_closure_does_to_the_model_is_undone() -> None:
    """Modes that it leaves switched, and a buffer that a module binds anew instead of writing into it."""

    class Counting(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self) -> Tensor:
            self.count = self.count + 1
            return self.weight.square().sum()

    model = Counting()
    before = everything(model)
    assert check_same_batch(model, lambda: model.eval()().backward()) == 0.0
    assert everything(model) == before


def test_graphs_made_before_can_still_be_gone_back_through() -> None:
    """A write into parameters, even of their own values, would end the backward() of a loss that is already there."""
    model, x = network(), torch.randn(8, 3)
    loss = model[3](model[0](x)).sum()
    check_same_batch(model, squares(model, itertools.repeat(x)))
    loss.backward()


def test_a_closure_that_steps_is_told_and_undone() -> None:
    """The old loop's body, pasted: GXPO's fast steps would come on top of the optimizer's own."""
    model, x = prepared()
    optimizer, before = torch.optim.SGD(model.parameters(), lr=0.1), everything(model)

    def closure() -> None:
        model(x).square().mean().backward()
        optimizer.step()

    with pytest.raises(RuntimeError, match="the closure moves parameters: it is to make the gradient, and leave"):
        check_same_batch(model, closure)
    assert everything(model) == before


# ---------------------------------------------------------------------------------------------- what cannot be compared


@pytest.mark.parametrize("call", [1, 2])
def test_a_call_without_any_gradient_is_told(call: int) -> None:
    """Nothing would be compared with nothing, and all be well."""
    model, x = prepared()
    before, calls = everything(model), itertools.count(1)
    with pytest.raises(RuntimeError, match=r"no parameter has a gradient: does the closure run backward\(\)"):
        check_same_batch(model, lambda: model(x).sum().backward() if next(calls) != call else None)
    assert everything(model) == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("values", [(True, False), (False, True), (True, True)])
def test_a_gradient_that_is_not_finite_is_told(value: float, values: tuple[bool, bool]) -> None:
    """NaN is larger than no bound: the check would pass."""
    theta, bad = torch.ones(3, requires_grad=True), iter(values)
    with pytest.raises(RuntimeError, match=r"the gradient is not finite, its norm is (nan|inf|1\.7\S+), then"):
        check_same_batch([theta], lambda: (theta.sum() * (value if next(bad) else 1.0)).backward())


@pytest.mark.parametrize(
    ("model", "closure", "settings", "message"),
    [
        (torch.optim.SGD([torch.ones(1)]), print, {}, r"model must be a module or its parameters.*got .*SGD"),
        (None, print, {}, "model must be a module or its parameters, which require gradients, got .*NoneType"),
        ([], print, {}, "model must be"),
        ([2 * torch.ones(1, requires_grad=True)], print, {}, "model must be"),
        (nn.ReLU(), print, {}, "model must be"),
        (nn.Linear(1, 1).requires_grad_(False), print, {}, "which require gradients"),
        (dict(nn.Linear(1, 1).named_parameters()), print, {}, "model must be a module or its parameters.*got .*dict"),
        (
            nn.Linear(1, 1),
            torch.ones(()),
            {},
            "closure must be a function that runs forward and backward, got .*Tensor",
        ),
        (nn.Linear(1, 1), print, {"replay_rng": None}, "replay_rng must be True or False, got None"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(
    model: Any, closure: Any, settings: dict[str, Any], message: str
) -> None:
    """Otherwise the error is torch's, from within, about something that nobody called."""
    with pytest.raises(TypeError, match=message):
        check_same_batch(model, closure, **settings)


def test_parameters_alone_will_do_and_no_grad_around_it_does_not_matter() -> None:
    """What is trained is not always one module; and checks are called where nothing is trained."""
    model, x = nn.Linear(3, 1), torch.randn(8, 3)
    with torch.no_grad():
        assert check_same_batch(model.parameters(), squares(model, itertools.repeat(x))) == 0.0
    with pytest.raises(RuntimeError, match="differ by"):
        check_same_batch(model.parameters(), squares(model, iter(torch.randn(9, 8, 3))))
