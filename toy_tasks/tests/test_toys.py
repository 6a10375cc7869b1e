"""gxpo-toys as a student meets it, and the arithmetic behind its tables."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import select
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gxpo_toy_tasks import cli, experiment, hunt
from gxpo_toy_tasks.experiment import TUNE_SEEDS, Comparison, Plan
from gxpo_toy_tasks.measures import NEVER, first_at, price, quartiles, smoothed, speedup, times
from gxpo_toy_tasks.rules import ABOUT, rules
from gxpo_toy_tasks.tables import fewer, spread, verdict
from gxpo_toy_tasks.tasks.table import TASKS

SMALL = {"task": "bandit", "rules": ("grpo-scaled", "gxpo", "gxpo-gate"), "seeds": 2, "steps": 8}


@pytest.fixture(autouse=True)
def _no_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests leave threads in this process, which no fork survives for sure."""
    monkeypatch.setattr(experiment, "workers_for", lambda device: 1)


def folder_of(tmp_path: Path, *more: str) -> Path:
    arguments = ["run", "bandit", "--rules", "gxpo,gxpo-gate", "--lr", "0.05,0.2", "--seeds", "2", "--steps", "8"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out"), *more]) == 0
    return tmp_path / "out"


# ------------------------------------------------------------------------------------------------------ arithmetic


def test_smoothing_is_a_moving_mean_with_shorter_ends() -> None:
    curve = np.arange(20.0) ** 2
    want = [curve[max(0, n - 4) : n + 5].mean() for n in range(20)]
    np.testing.assert_allclose(smoothed(np.stack([curve, -curve]))[0], want, rtol=1e-12)


def test_what_is_never_reached_stays_never() -> None:
    """A median over the seeds that happened to arrive would flatter a rule that mostly fails."""
    assert first_at(np.array([0.1, 0.5, 0.4]), 0.5) == 1
    assert first_at(np.array([0.1, 0.5, 0.4]), 0.6) == NEVER
    assert price(NEVER, [0, 3, 6], {"update": 1.0, "rollouts": 1.0}).passes == NEVER
    assert times(10.0, NEVER) == 0.0
    assert spread(np.array([0.0, 0.0, 5.0])) == "never"
    assert spread(np.array([0.0, 4.0, 5.0])) == "4.00 (2.00-4.50)"


def test_a_price_is_made_of_what_was_measured() -> None:
    """6 of 12 passes and 2 of 4 rollouts: half of each time."""
    p = price(2.0, [0, 3, 6, 9, 12], {"update": 8.0, "rollouts": 2.0})
    assert (p.passes, p.update, p.seconds) == (6.0, 4.0, 5.0)


def cell(curves: list[list[float]], passes: int) -> dict[str, Any]:
    n = len(curves[0]) - 1
    return {
        "seeds": list(range(len(curves))),
        "lrs": [0.1],
        "accuracy": curves,
        "passes": [[passes * step for step in range(n + 1)] for _ in curves],
        "seconds": {"update": float(passes), "rollouts": 1.0},
    }


def test_speedups_by_both_definitions() -> None:
    slow = [min(1.0, n / 40) for n in range(61)]
    fast = [min(1.0, n / 10) for n in range(61)]
    found = speedup(cell([slow], 1), cell([fast], 3), 0.1, 0.1)
    assert found.paper[0] == 4.0  # 40 steps to the peak, and 10
    assert 3.0 < found.steps[0] < 4.0  # smoothing rounds the fast one's corner off
    assert found.passes[0] == pytest.approx(found.steps[0] / 3)
    assert found.update[0] == pytest.approx(found.steps[0] / 3)


def test_the_verdict_says_fewer_and_more() -> None:
    assert fewer({"steps": 4.83, "passes": 1.61}) == "needs 4.8 times fewer steps and 1.6 times fewer backward passes"
    assert fewer({"steps": 1.14, "passes": 0.38}) == "needs 1.1 times fewer steps and 2.6 times more backward passes"
    assert fewer({"steps": 1.0, "passes": 1.0}) == "needs as many steps and as many backward passes"
    assert fewer({"steps": 0.0, "passes": 0.0}) == "never gets to 95 % of GRPO's peak"


# ----------------------------------------------------------------------------------------------------- the plan


def test_tuning_never_sees_a_test_seed() -> None:
    """Or the tuned rows would be those that fit these seeds."""
    comparison = Comparison(Plan(seeds=50))
    assert not set(TUNE_SEEDS) & set(Plan(seeds=50).test_seeds)
    assert list(comparison.runs("tune", "gxpo").seeds) == list(TUNE_SEEDS)


def test_grpo_is_always_there_to_be_compared_with() -> None:
    assert list(Plan(rules=("gxpo",)).compared) == ["grpo", "gxpo"]


def test_every_rule_is_told_of_and_every_task_has_a_grid() -> None:
    assert list(ABOUT) == list(rules(5, 0.8))
    for name, setting in TASKS.items():
        assert setting.grid == tuple(sorted(setting.grid)), name
        assert setting.grid[0] <= setting.rate <= setting.grid[-1], name


def test_the_best_rate_is_the_one_with_the_highest_median_training() -> None:
    comparison = Comparison(Plan(task="bandit"))
    accuracy = [[0.1, 0.9], [0.1, 0.1], [0.1, 0.1], [0.4, 0.4], [0.5, 0.5], [0.3, 0.3]]  # the first rate wins once
    comparison.cells["tune/gxpo"] = {"lrs": [0.1, 0.2], "seeds": [0, 1, 2], "accuracy": accuracy}
    assert comparison.best_rate("gxpo") == 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "chess"}, "task must be one of bandit, "),
        ({"rules": ("gxpo", "sgd")}, "rules must be out of grpo, grpo-epochs, "),
        ({"lr": (0.0,)}, r"lr must be numbers > 0, got \(0.0,\)"),
        ({"seeds": 0}, "seeds must be an int >= 1, got 0"),
        ({"horizon": 1}, "horizon must be an int >= 2, got 1"),
        ({"alpha": math.nan}, "alpha must be a number >= 0, got nan"),
        ({"device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
    ],
)
def test_a_bad_setting_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**change)


# ----------------------------------------------------------------------------------------------- what is left behind


def test_all_three_phases_and_their_verdict() -> None:
    plan = Plan(task="bandit", rules=("grpo-scaled", "gxpo"), seeds=2, steps=6)
    results = Comparison(plan).go()
    assert list(results["cells"]) == [f"{phase}/{n}" for phase in ("same", "tune", "best") for n in plan.compared]
    said = verdict(results)
    assert said[0].startswith("With every rule at its own best rate, gxpo ")  # where it loses comes first
    assert any(line.startswith("With every rule at lr 0.01, gxpo ") for line in said)
    json.dumps(results, allow_nan=False)


def test_an_interrupted_comparison_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after an hour must not cost the hour."""
    plan = Plan(lr=(0.1,), **SMALL)
    whole = Comparison(plan).go()
    comparison = Comparison(plan, tmp_path)

    def on_step(steps: int) -> None:
        if len(comparison.cells) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        comparison.go(on_step)
    resumed = Comparison(plan, tmp_path)
    kept = set(resumed.cells)
    assert len(kept) == 2
    asked: list[str] = []
    real = Comparison.trained

    def trained(self: Comparison, names: list[str], *given: Any) -> Any:
        asked.extend(names)
        return real(self, names, *given)

    monkeypatch.setattr(Comparison, "trained", trained)
    results = resumed.go()
    assert {f"same/{name}" for name in asked} == whole["cells"].keys() - kept  # nothing twice that was done
    assert list(results["cells"]) == list(whole["cells"])
    for name, cell in whole["cells"].items():
        assert results["cells"][name]["accuracy"] == cell["accuracy"]
    assert json.loads((tmp_path / "results.json").read_text())["cells"].keys() == whole["cells"].keys()


@pytest.mark.skipif(experiment.workers_for("cpu") < 2, reason="one core, no fork, or a CUDA device")
@pytest.mark.parametrize("presses", [1, 5])
def test_ctrl_c_reaches_the_workers_and_the_same_command_goes_on(tmp_path: Path, presses: int) -> None:
    """The command as it is, in a terminal of its own: workers must end with it, and what they had done must count. An
    impatient user presses more than once."""
    arguments = ["run", "bandit", "--rules", "gxpo,sfpo", "--lr", "0.1", "--seeds", "2", "--steps", "300"]
    command = [sys.executable, "-m", "gxpo_toy_tasks.cli", *arguments, "--out", str(tmp_path)]
    began = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while began.poll() is None and not (tmp_path / "results.json").exists():
        select.select([], [], [], 0.02)
    for _ in range(presses):
        os.killpg(began.pid, signal.SIGINT)
        select.select([], [], [], 0.002)
    _, said = began.communicate(timeout=60)
    assert began.returncode == 130, said
    assert "what was done is kept" in said
    assert "Traceback" not in said
    kept = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert 1 <= len(kept) < 3
    assert subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    whole = Comparison(Plan(task="bandit", rules=("gxpo", "sfpo"), lr=(0.1,), seeds=2, steps=300)).go()["cells"]
    assert list(cells) == list(whole)
    assert all(cells[name] == kept[name] for name in kept)  # to the times it took
    assert all(cells[name]["accuracy"] == whole[name]["accuracy"] for name in whole)


def test_progress_counts_every_step_once() -> None:
    """A bar that stops at 83 % looks like a crash; the workers' steps come in lumps."""
    told: list[int] = []
    comparison = Comparison(Plan(lr=(0.1,), **SMALL))
    comparison.go(told.append)
    assert sum(told) == len(comparison.jobs()) * comparison.plan.length


def test_another_plans_folder_is_refused(tmp_path: Path) -> None:
    """Half the curves of one setting and half of another would look like a result."""
    plan = Plan(lr=(0.1,), **SMALL)
    Comparison(plan, tmp_path).go()
    with pytest.raises(ValueError, match=r"holds results of another plan \(alpha differ\)"):
        Comparison(dataclasses.replace(plan, alpha=0.5), tmp_path)


# ---------------------------------------------------------------------------------------------------- the command


def test_list_names_every_task_and_rule(capsys: Any) -> None:
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*TASKS, *ABOUT, "quadratics"))


def test_run_prints_a_table_and_leaves_numbers_and_pictures(tmp_path: Path, capsys: Any) -> None:
    out = folder_of(tmp_path)
    printed = capsys.readouterr().out
    assert "Every rule at lr 0.05" in printed
    assert "Every rule at lr 0.2" in printed
    assert "than GRPO to 95 % of GRPO's peak" in printed
    results = json.loads((out / "results.json").read_text())
    assert len(results["cells"]["same/gxpo"]["accuracy"]) == 4
    for name in ("learning", "inside"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / f"{name}.svg").read_text()


def test_plot_draws_the_same_again(tmp_path: Path, capsys: Any) -> None:
    out = folder_of(tmp_path)
    before = (out / "learning.svg").read_text()
    (out / "learning.svg").unlink()
    assert cli.main(["plot", str(out)]) == 0
    assert (out / "learning.svg").read_text() == before


def test_flags_go_on_top_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('seeds = 1\nsteps = 4\nlr = [0.1]\nrules = ["gxpo"]\n')
    arguments = ["run", "bandit", "--config", str(tmp_path / "c.toml"), "--steps", "5", "--out", str(tmp_path / "o")]
    assert cli.main(arguments) == 0
    plan = json.loads((tmp_path / "o" / "results.json").read_text())["plan"]
    assert (plan["seeds"], plan["steps"], plan["lr"], plan["rules"]) == (1, 5, [0.1], ["gxpo"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rules", "gxpo,adam"], "rules must be out of grpo, "),
        (["--lr", "-1"], "lr must be numbers > 0"),
        (["--config", "no.toml"], "--config no.toml: "),
    ],
)
def test_a_bad_option_is_one_line(
    arguments: list[str], message: str, capsys: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "bandit", *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []  # and nothing is left lying about


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run quadratics --seeds 3 --device cuda", "quadratics takes --out and --quick, got --seeds, --device"),
        ("run quadratics --quick --out taken", "taken"),
        ("run bandit --quick --out taken", "taken"),
        ("animate quadratics --out folder", "--out must be a file that ends in .gif, got folder"),
        ("plot nowhere", "nowhere"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    line: str, message: str, capsys: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """An option that a task leaves aside in silence lets a table say what it does not show."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    assert cli.main(line.split()) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_an_unknown_setting_in_the_file_names_those_there_are(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "c.toml").write_text("sedes = 3\n")
    assert cli.main(["run", "bandit", "--config", str(tmp_path / "c.toml")]) == 2
    assert "no setting 'sedes'; there are alpha, device, horizon," in capsys.readouterr().err


def test_ctrl_c_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "train", stop)
    assert cli.main(["run", "bandit", "--quick", "--out", str(tmp_path)]) == 130
    assert "what was done is kept" in capsys.readouterr().err


def test_quartiles_are_in_order() -> None:
    assert quartiles(np.array([4.0, 1.0, 3.0, 2.0, 5.0])) == (2.0, 3.0, 4.0)


# ------------------------------------------------------------------------------------------------------- the pages

PAGES = [Path(cli.__file__).with_name("CLASSROOM.md"), Path(__file__).parents[2] / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_the_pages_is_one(page: Path) -> None:
    """A student who pastes a line with an option that is gone stops there."""
    text = page.read_text(encoding="utf-8")
    lines = [line for line in re.findall(r"gxpo-toys (?:list|run|plot|animate)[^`\n]*", text) if "TASK" not in line]
    assert lines
    for line in lines:
        given = cli.parser().parse_args(shlex.split(line.rstrip(" .,;"))[1:])
        if given.command == "run" and given.task != cli.QUADRATICS:
            cli.plan_of(given)


def test_the_results_page_has_every_table() -> None:
    """RESULTS.md speaks of them, and one command has to be able to write them again."""
    page = hunt.PAGE.read_text(encoding="utf-8")
    for name, search in hunt.SEARCHES.items():
        table = page.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0]
        assert {line.split("|")[1].strip() for line in table.splitlines()[4:] if line} >= set(search.tried) - {""}


def test_a_search_measures_with_other_seeds_than_it_tunes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not set(hunt.SEEDS) & set(hunt.TEST_SEEDS)
    tried = {"GRPO": hunt.OTHERS["GRPO"], "GXPO": hunt.gxpo(5, 0.8)}
    level, found = hunt.look(hunt.Search("bandit", "adamw", (0.05, 0.2), 24, tried))
    assert 0.4 < level < 1
    text = hunt.table(level, found)
    assert text.count("\n") == 5
    assert "| GRPO |" in text
    assert hunt.put("<!-- a -->old<!-- end of a -->", "a", text).count(text) == 1
    with pytest.raises(ValueError, match="has 0 places for b"):
        hunt.put("<!-- a -->old<!-- end of a -->", "b", text)
