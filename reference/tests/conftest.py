"""What the test modules about TRL share: trainers, made and trained."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from trl import GRPOTrainer


@pytest.fixture(scope="module")
def light_garbage() -> Iterator[None]:
    """train() calls gc.collect(), which would walk through all that TRL has imported: half of a run's time here."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., GRPOTrainer]:
    """make(class, gxpo=..., model=..., trainer=..., **GRPOConfig's own): trl_cases.made in a folder of the test's."""
    from trl_cases import made

    return partial(made, tmp_path)


@pytest.fixture
def run(make: Callable[..., GRPOTrainer]) -> Callable[..., GRPOTrainer]:
    """make(...), trained. Seeds are set where a trainer is made: the next is made after the last has run."""
    from trl_cases import weights

    def run(*args: Any, watch: Callable[[GRPOTrainer], Any] = lambda trainer: None, **kwargs: Any) -> GRPOTrainer:
        trainer = make(*args, **kwargs)
        trainer.start, trainer.watched = weights(trainer), watch(trainer)
        trainer.train()
        return trainer

    return run
