from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)  # tensors are tiny here; on a busy machine a second thread makes seconds minutes

# No deadlines (machines differ), no stored examples between runs; a failure prints its seed and a way to run it again.
settings.register_profile(
    "gxpo",
    deadline=None,
    database=None,
    print_blob=True,
    phases=[p for p in Phase if p is not Phase.explain],  # it multiplies the time of a failure
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("gxpo")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="this machine has no CUDA device"))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param
