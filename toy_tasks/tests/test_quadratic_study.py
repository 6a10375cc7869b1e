"""The quadratic study: its errors against closed forms, its costs against the contraction they must follow."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gxpo_toy_tasks import cli
from gxpo_toy_tasks.plots.draw import draw
from gxpo_toy_tasks.quadratic_study import (
    DIM,
    LEVEL,
    PROBLEMS,
    costs_of,
    error,
    noises,
    parts,
    rules,
    study,
    tables,
    virtual_point,
)
from gxpo_toy_tasks.tasks.quadratics import Quadratic


@pytest.mark.parametrize("horizon", [3, 5, 10])
@pytest.mark.parametrize("lr", [0.1, 0.5, 1.0])
def test_a_diagonal_quadratic_is_predicted_exactly(horizon: int, lr: float) -> None:
    """The one case in which the method's assumption holds to the letter."""
    problem = Quadratic.diagonal(dim=DIM, condition=10.0, seed=1)
    assert error(problem, lr, horizon, virtual_point(problem, lr, horizon, "gradient")) < 1e-13


@pytest.mark.parametrize("estimator", ["gradient", "tensor", "r = 1"])
def test_two_steps_are_two_steps_whatever_the_estimator(estimator: str) -> None:
    problem = Quadratic.rotated(dim=DIM, condition=100.0, seed=2)
    assert error(problem, 0.5, 2, virtual_point(problem, 0.5, 2, estimator)) < 1e-13


def test_noise_that_the_passes_share_does_less_harm() -> None:
    """Why the same batch has to be used three times."""
    problem = Quadratic.diagonal(dim=DIM, condition=10.0, seed=3)

    def off(kind: str) -> float:
        made = [virtual_point(problem, 0.5, 5, "gradient", noises(seed, 0.1)[kind]) for seed in range(8)]
        return float(np.median([error(problem, 0.5, 5, point) for point in made]))

    assert off("none") < off("shared") < off("independent")


def test_gradient_descent_takes_as_many_steps_as_its_slowest_direction_needs() -> None:
    """Distances shrink by 1 - lr / condition a step, once only the flattest direction is left."""
    build = PROBLEMS["diagonal, condition 10"]
    (((steps, passes),),) = costs_of([build], rules()["gradient descent"], [1.0], [0])
    problem = build(0)
    away = np.abs(problem.start - problem.minimum)
    want = next(n for n in range(1000) if np.linalg.norm(away * 0.9**n) <= LEVEL * np.linalg.norm(away) or n == 999)
    exact = next(
        n
        for n in range(1000)
        if np.linalg.norm(away * (1 - np.diag(problem.matrix)) ** n) <= LEVEL * np.linalg.norm(away)
    )
    assert steps == passes == exact <= want


@pytest.mark.parametrize(
    ("rule", "each"), [("gradient descent", 1), ("GXPO K = 10, alpha = 1", 3), ("SFPO K = 10", 11)]
)
def test_passes_are_counted_as_they_are_made(rule: str, each: int) -> None:
    (((steps, passes),),) = costs_of([PROBLEMS["diagonal, condition 10"]], rules()[rule], [0.5], [0, 1])
    assert passes == each * steps


def test_problems_side_by_side_cost_what_they_cost_alone() -> None:
    """They share a batch for speed, which must not show."""
    rule = rules()["GXPO K = 10, alpha = 1"]
    builds = [PROBLEMS["diagonal, condition 10"], PROBLEMS["rotated, condition 100"]]
    together = costs_of(builds, rule, [0.1, 0.9], [0, 2])
    assert together == [costs_of([build], rule, [0.1, 0.9], [0, 2])[0] for build in builds]


def test_what_is_not_reached_is_never() -> None:
    (((steps, _),),) = costs_of([PROBLEMS["diagonal, condition 100"]], rules()["gradient descent"], [0.02], [0], cap=20)
    assert steps == np.inf


def test_the_quick_study_tells_and_draws(tmp_path: Path) -> None:
    seen = []
    results = study(True, lambda: seen.append(1))
    assert len(seen) == len(parts(True))
    told = tables(json.loads(json.dumps(results, allow_nan=False)))
    assert "backward passes than gradient descent" in told
    assert "never" in told
    assert {path.name for path in draw(results, tmp_path)} >= {"errors.png", "costs.png", "path.png"}
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())


def test_a_study_that_was_stopped_goes_on_and_comes_to_the_same(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Ctrl-C after nearly a minute: what the message promises. Nothing is computed twice."""
    done: list[str] = []

    def until(last: int) -> None:
        def on_step() -> None:
            done.append((tmp_path / "results.json").read_text())
            if len(done) == last:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            study(True, on_step, tmp_path)

    until(8)
    halfway = json.loads(done[-1])
    assert (len(halfway["costs"]) > 0, len(halfway["costs"]) < len(study(True)["costs"])) == (True, True)
    assert cli.main(["plot", str(tmp_path)]) == 2
    assert "results.json is unfinished: gxpo-toys run quadratics --out" in capsys.readouterr().err
    until(0)
    assert done[8:16] == done[7:8] * 8  # those that were there
    whole = json.loads((tmp_path / "results.json").read_text())
    assert whole == study(True)
    with pytest.raises(ValueError, match="holds other results: choose another --out, or delete that folder"):
        study(False, folder=tmp_path)


def test_the_animation_moves(tmp_path: Path) -> None:
    assert cli.main(["animate", "quadratics", "--out", str(tmp_path / "q.gif")]) == 0
    with Image.open(tmp_path / "q.gif") as gif:
        assert gif.n_frames >= 15
    assert (tmp_path / "q.gif").stat().st_size < 2_000_000
