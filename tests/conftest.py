"""What several test modules of this folder share: processes that play ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks import Ranks

pytest.register_assert_rewrite("step_by_hand", "failing")


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Started once for all modules: a process takes seconds to import torch."""
    made = Ranks(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()
