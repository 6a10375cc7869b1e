"""Every task by its name, and how it is trained by default: a new one is listed here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gxpo_toy_tasks.engine import Task
from gxpo_toy_tasks.tasks.bandit_tasks import BanditTask, ContextualTask, SteepTask
from gxpo_toy_tasks.tasks.sequences import SequenceTask


@dataclass(frozen=True)
class Setting:
    """A task and how it is trained by default."""

    about: str
    build: Callable[[], Task]
    rate: float  # of AdamW, well below GRPO's best: where the method's claim is made
    grid: tuple[float, ...]
    steps: int


def rates(low: float, count: int) -> tuple[float, ...]:
    return tuple(float(f"{low * 2**n:.3g}") for n in range(count))


def sequences(about: str, problem: str, model: str = "gru") -> Setting:
    pretrained = "pretrained to 30 % right, held-out prompts"
    return Setting(f"{about}; {model}, {pretrained}", lambda: SequenceTask(problem, model), 3e-4, rates(3e-4, 8), 240)


TASKS = {
    "bandit": Setting("softmax policy over 10 arms", BanditTask, 0.01, rates(0.005, 9), 200),
    "bandit100": Setting("softmax policy over 100 arms", lambda: BanditTask(100), 0.02, rates(0.01, 9), 300),
    "contextual": Setting("16 contexts, 10 arms, a small MLP", ContextualTask, 2e-3, rates(1e-3, 10), 200),
    "steep": Setting("16 contexts, features of unlike scale, KL 0.3", SteepTask, 0.01, rates(0.005, 9), 300),
    "sort3": sequences("sort 3 digits", "sort3"),
    "sort4": sequences("sort 4 digits", "sort4"),
    "add": sequences("add two numbers of 2 digits, without carry", "add"),
    "copy": sequences("4 digits reversed", "copy"),
    "sort3-transformer": sequences("sort 3 digits", "sort3", "transformer"),
}
