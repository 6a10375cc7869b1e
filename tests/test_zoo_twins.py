"""If these fail, an optimizer that counts in an unusual place is not put back: one place each, none from a package."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from zoo_by_hand import ByHand, built, differences, record, start, take_step

import gxpo
from gxpo import GXPO

SHAPES = ((4, 3), (5,))


class Counting(torch.optim.SGD):
    """Steps that grow with the count. `place` is where it is kept."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, lr=0.003)
        self.place: Any = None
        self.prepare(params)

    def prepare(self, params: list[Tensor]) -> None:
        """Makes the place."""

    def counted(self, params: list[Tensor]) -> float:
        """The next count."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = self.param_groups[0]["params"]
        count = float(self.counted(params))
        for p in params:
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"] * math.sqrt(1.0 + count))


class Slots:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class InSlots(Counting):
    def prepare(self, params: list[Tensor]) -> None:
        self.place = Slots()

    def counted(self, params: list[Tensor]) -> float:
        self.place.count += 1
        return self.place.count


@dataclasses.dataclass(frozen=True)
class Frozen:
    count: Tensor


class InAFrozenDataclass(Counting):
    def prepare(self, params: list[Tensor]) -> None:
        self.place = Frozen(torch.zeros(()))

    def counted(self, params: list[Tensor]) -> float:
        return self.place.count.add_(1).item()


class Pair(NamedTuple):
    count: Tensor
    name: str


class InATuple(Counting):
    """As DASH's and SOAP's lists of factors, but one that cannot be written to."""

    def prepare(self, params: list[Tensor]) -> None:
        self.place = Pair(torch.zeros(()), "count")

    def counted(self, params: list[Tensor]) -> float:
        return self.place.count.add_(1).item()


class InAnArray(Counting):
    def prepare(self, params: list[Tensor]) -> None:
        self.place = np.zeros(2)

    def counted(self, params: list[Tensor]) -> float:
        self.place[1] += 1.0
        return self.place[1]


class InANumpyScalar(Counting):
    def prepare(self, params: list[Tensor]) -> None:
        self.place = np.float64(0.0)

    def counted(self, params: list[Tensor]) -> float:
        self.place += 1.0
        return self.place


class InADeque(Counting):
    def prepare(self, params: list[Tensor]) -> None:
        self.place = collections.deque([0], maxlen=3)

    def counted(self, params: list[Tensor]) -> float:
        self.place.append(self.place[-1] + 1)
        return self.place[-1]


class InASet(Counting):
    """As heavyball's of what is initialized."""

    def prepare(self, params: list[Tensor]) -> None:
        self.place = set()

    def counted(self, params: list[Tensor]) -> float:
        self.place.add(len(self.place))
        return len(self.place)


class Window(list):
    """A list with something of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0


class InASubclassOfList(Counting):
    def prepare(self, params: list[Tensor]) -> None:
        self.place = Window()

    def counted(self, params: list[Tensor]) -> float:
        self.place.append(1)
        self.place.total += 1
        return (len(self.place) + self.place.total) / 2


class ById(Counting):
    """As Magma's, whose keys are the numbers that id() gives to the parameters."""

    def prepare(self, params: list[Tensor]) -> None:
        self.place = {id(p): torch.zeros(()) for p in params}

    def counted(self, params: list[Tensor]) -> float:
        return self.place[id(params[0])].add_(1).item()


class ByParameterInTheGroup(Counting):
    """As GrokAdamW's: a dict in the group, with parameters for keys."""

    def counted(self, params: list[Tensor]) -> float:
        place = self.param_groups[0].setdefault("counts", {})
        place[params[0]] = place.get(params[0], 0) + 1
        return place[params[0]]


class InAPartial(Counting):
    """As in heavyball's chains of functions."""

    def prepare(self, params: list[Tensor]) -> None:
        self.place = functools.partial(lambda count: count.add_(1).item(), torch.zeros(()))

    def counted(self, params: list[Tensor]) -> float:
        return self.place()


class InItsOwnGenerator(Counting):
    def prepare(self, params: list[Tensor]) -> None:
        self.place = torch.Generator().manual_seed(0)

    def counted(self, params: list[Tensor]) -> float:
        return torch.rand((), generator=self.place).item()


class InPythonsGenerator(Counting):
    def prepare(self, params: list[Tensor]) -> None:
        self.place = random.Random(0)

    def counted(self, params: list[Tensor]) -> float:
        return self.place.random()


class InNumpysGenerator(Counting):
    def prepare(self, params: list[Tensor]) -> None:
        self.place = np.random.default_rng(0)

    def counted(self, params: list[Tensor]) -> float:
        return self.place.random()


class InTheDefaults(Counting):
    """As torch_optimizer's RAdam: the list in the defaults is also the group's."""

    def prepare(self, params: list[Tensor]) -> None:
        self.defaults["counts"] = self.param_groups[0]["counts"] = []

    def counted(self, params: list[Tensor]) -> float:
        self.defaults["counts"].append(1)
        return len(self.param_groups[0]["counts"])


class ThroughViews(Counting):
    """Writes to parameters through views that it holds, as heavyball where it merges dimensions."""

    def prepare(self, params: list[Tensor]) -> None:
        self.place = [p.detach().view(-1) for p in params]
        self.count = 0

    def counted(self, params: list[Tensor]) -> float:
        self.count += 1
        for flat in self.place:
            flat.mul_(0.999)
        return self.count


GENERATORS = (InItsOwnGenerator, InPythonsGenerator, InNumpysGenerator)
POLICY = pytest.mark.parametrize("policy", gxpo.STATE_POLICIES)


def of_kinds(*kinds: type[Counting]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.__name__)


@POLICY
@of_kinds(*(kind for kind in Counting.__subclasses__() if kind not in GENERATORS))
def test_the_count_is_that_of_the_steps_made(kind: type[Counting], policy: str) -> None:
    params, base = built(kind, start(SHAPES, torch.float64))
    opt, hand = GXPO(base, gate=None, optimizer_state=policy), ByHand(kind, params, policy)
    for n in range(3):
        take_step(opt, params, n)
        hand.step(n)
        for p, right in zip(params, hand.params, strict=True):
            torch.testing.assert_close(p, right, rtol=1e-12, atol=1e-12)


@of_kinds(*GENERATORS)
def test_a_generator_goes_on(kind: type[Counting]) -> None:
    """If not, one draw would be used twice, and noise have more variance than it was given."""
    params, base = built(kind, start(SHAPES, torch.float64))
    opt, hand = GXPO(base, gate=None), ByHand(kind, params, "keep")
    for n in range(3):
        take_step(opt, params, n)
        hand.step(n)
        for p, right in zip(params, hand.params, strict=True):
            torch.testing.assert_close(p, right, rtol=1e-12, atol=1e-12)


@POLICY
@of_kinds(*Counting.__subclasses__())
def test_a_failed_step_has_not_counted(kind: type[Counting], policy: str) -> None:
    params, base = built(kind, start(SHAPES, torch.float64))
    opt = GXPO(base, gate=None, optimizer_state=policy)
    for n in range(2):
        for at in (2, 3):
            before = record(base, params)
            with pytest.raises(ZeroDivisionError):
                take_step(opt, params, n, fail_in_pass=at)
            assert differences(before, record(base, params)) == []
        take_step(opt, params, n)
