"""The cost benchmark measures what it says. What the figures are is for a quiet machine to say: no timing here."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gxpo import extrapolation_scale
from gxpo_reference.benchmarks import cli, contenders, growth, measure, memory, overhead, stages, steps, tables
from gxpo_reference.benchmarks.models import SIZES, big_tensors, transformer, transformer_shapes


def test_help_says_what_there_is() -> None:
    command = [sys.executable, "-m", "gxpo_reference.benchmarks", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    assert all(word in shown for word in (*cli.WHAT, "all"))
    assert all(f"--{option}" in shown for option in ("device", "dtype", "rounds", "out", "quick", "optimizer-state"))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("benchmarks") / "quick.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "TURN", 0.0)
        patch.setattr(stages, "TURN", 0.0)
        patch.setattr(overhead, "TURN", 0.0)
        cli.main(["all", "--quick", "--out", str(path)])
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_quick_run_writes_what_is_documented(quick: dict[str, Any]) -> None:
    documented = (Path(cli.__file__).parent / "results" / "README.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in documented for key in quick if key != "results")
    assert quick["config"]["rounds"] == 2
    assert quick["environment"].keys() >= {"torch", "python", "cores", "threads", "device", "load_average"}
    results = quick["results"]
    assert results.keys() == set(cli.WHAT)
    assert set(results["steps"]["contenders"]) == set(results["memory"]["contenders"]) - {contenders.PLAIN}
    for row in results["steps"]["contenders"].values():
        for own, plain, ratio in zip(*(row[key]["all"] for key in ("seconds", "plain_seconds", "ratio")), strict=True):
            assert ratio == pytest.approx(own / plain)
        assert len(row["ratio"]["all"]) == 2
        assert row["ratio"]["quartiles"][0] <= row["ratio"]["median"] <= row["ratio"]["quartiles"][1]
    for made in results["stages"]["settings"].values():
        assert list(made) == [*stages.STAGES, "all"]
        assert made["all"]["bytes"] == sum(made[stage]["bytes"] for stage in stages.STAGES)
        assert made["pass 2"]["operations"] > made["pass 3"]["operations"] > 0
    assert [row["kind"] for row in results["growth"]] == ["big tensors", "big tensors", "transformer"]
    assert all(row["steps"]["contenders"].keys() == {"GXPO", "GXPO, after fallback"} for row in results["growth"])


def test_the_tables_name_everything(quick: dict[str, Any]) -> None:
    results = quick["results"]
    assert tables.text(steps.table(results["steps"], "cpu")).count("\n") == len(results["steps"]["contenders"])
    assert tables.text(stages.table(results["stages"])).count("\n") == 5 * len(contenders.SETTINGS)
    assert tables.text(memory.table(results["memory"])).count("\n") == len(results["memory"]["contenders"])
    assert "big tensors" in tables.text(growth.table(results["growth"]))
    shown = tables.text(overhead.table(results["overhead"], "cpu"))
    assert all(name in shown for name in overhead.QUICK)


def test_what_does_not_fit_is_skipped_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "free_bytes", lambda device: 10**6)
    rows = growth.measure([10**5], 1, "cpu", torch.float32, 1)
    rows += overhead.measure({"large": [(1000, 100)]}, ["keep"], "cpu", torch.float32, 1)
    assert all(row["skipped"] == "skipped: needs about 0.0 GB, 0.0 GB free" for row in rows)
    assert "skipped" in tables.text(growth.table(rows[:2]))
    assert "skipped" in tables.text(overhead.table(rows[2:], "cpu"))


@pytest.mark.parametrize(
    "wrong",
    [
        ["--width", "10"],
        ["--rounds", "0"],
        ["--batch", "x"],
        ["--out", "no/such/folder.json"],
        ["--sizes", "12345", "overhead"],
        ["nothing"],
    ],
)
def test_a_wrong_option_is_refused_before_any_work(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(wrong)
    assert wrong[0].lstrip("-") in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- counting


def test_the_memory_counter_counts_what_is_alive_and_the_most_that_was() -> None:
    old = torch.ones(1000)
    unit = old.untyped_storage().nbytes()
    with measure.MemoryCounter() as counter:
        old.mul_(2.0)
        old[:10].add_(1.0)
        assert counter.alive == counter.peak == 0  # it was there before
        one, other = old.clone(), old.clone()
        assert counter.alive / unit == 2.00
        view = other.view(10, 100)[3:]
        assert counter.alive / unit == 2.00
        del other
        assert counter.alive / unit == 2.00  # the view holds it
        del view
        assert counter.alive / unit == 1.00
        one = one + 1.0  # both for a moment
        assert (counter.alive / unit, counter.peak / unit) == (1.00, 2.00)
        counter.reset_peak()
        assert counter.peak / unit == 1.00
    del one
    assert counter.alive == 0


def test_the_memory_counter_sees_a_backward_pass() -> None:
    x = torch.ones(1000, requires_grad=True)
    with measure.MemoryCounter() as counter:
        x.exp().sum().backward()  # keeps its result until it has made the gradient from it
    assert counter.peak >= 2 * 4000
    assert counter.alive == 4000  # x.grad


def test_memory_is_two_buffers_and_the_optimizers_state() -> None:
    """On tensors large enough that blocks are small beside them."""
    figures = memory.measure(big_tensors(4_000_000, "cpu", torch.float32), "cpu")["contenders"]
    wanted = {"GXPO": 4, "GXPO, rollback=False": 2, "GXPO, restore": 4, "GXPO, after fallback": 0}
    assert {name: round(figures[name]["extra_peak"], 2) for name in wanted} == wanted
    assert figures[contenders.TEXTBOOK]["extra_peak"] > 5
    assert all(round(row["extra_rest"], 2) == 0 for row in figures.values())


def test_operations_are_counted_without_views() -> None:
    x = torch.ones(4)
    with measure.OperationCounter() as counter:
        x.view(2, 2).add_(1.0)
        (x * 2.0)[:1].detach().sum()
    assert counter.count == 3


def test_time_aside_is_that_of_the_wrapped_calls() -> None:
    aside = measure.Aside(lambda: None)
    slow = aside(lambda: time.sleep(0.01))
    whole = measure.timed(slow, lambda: None, 3)
    assert 0.03 <= aside.seconds <= 3 * whole


def test_a_stage_is_a_lookahead_without_the_optimizers_step() -> None:
    problem = big_tensors(100, "cpu", torch.float32)
    opt, aside = stages.watched(problem, "cpu", {})
    assert len(stages.stages(opt, problem, aside)) == len(stages.STAGES)
    assert opt.report.passes == 3
    assert opt.report.active
    assert aside.seconds > 0


def test_the_least_that_must_be_moved() -> None:
    """AdamW's state is two numbers a parameter."""
    assert stages.units(2) == [10, 9, 1, 0]
    assert stages.units(2, rollback=False) == [6, 9, 1, 0]
    assert stages.units(2, optimizer_state="restore") == [10, 13, 1, 0]


# ----------------------------------------------------------------------------------------------- gradients for nothing


def test_overhead_is_the_difference_as_a_share_of_three_plain_steps(quick: dict[str, Any]) -> None:
    rows = quick["results"]["overhead"]
    assert {row["shapes"] for row in rows} == set(overhead.QUICK)
    assert {row["freed_memory"] for row in rows} <= {"as it comes", "kept"}
    for row in rows:
        for own, plain, share in zip(*(row[key]["all"] for key in ("seconds", "plain_seconds", "share")), strict=True):
            assert share == pytest.approx((own - plain) / plain)
            assert min(own, plain) > 0
        assert row["share"]["quartiles"][0] <= row["share"]["median"] <= row["share"]["quartiles"][1]
        assert min(row["paged_in"], row["plain_paged_in"]) >= 0


@pytest.mark.parametrize("who", ["plain", "own"])
def test_either_side_clips_the_same_three_gradients_in_every_turn(who: str) -> None:
    """One that found its gradients clipped already would have less to do, and the share would be of nothing."""
    params = [torch.nn.Parameter(torch.randn(30, 20)) for _ in range(3)]
    grads = overhead.Gradients(params)
    turns = overhead.sides(params, grads, "keep")
    assert min(grads.norms) > 10 * overhead.MAX_NORM
    for _ in range(3):
        grads.renew()
        assert [grads._norm(g) for g in grads.passes] == pytest.approx(grads.norms, rel=1e-5)
        turns[who]()
        clipped = [grads._norm(g) for g in grads.passes]
        # the last of GXPO's gradients is clipped like the others, for passes() and step(closure) own it
        assert clipped == pytest.approx([overhead.MAX_NORM] * 3, rel=1e-5)
        assert grads.next == 0


def test_gxpos_side_is_an_active_step_around_the_same_optimizer() -> None:
    assert set(SIZES) >= {10**8, 10**9}
    shapes = transformer_shapes(*SIZES[10**5])
    problem = transformer(*SIZES[10**5], 1, "cpu", torch.float32)
    assert shapes == [tuple(p.shape) for p in problem.params]
    grads = overhead.Gradients(problem.params)
    step = overhead.sides(problem.params, grads, "restore")["own"]
    before = [p.detach().clone() for p in problem.params]
    step()
    assert all(not torch.equal(p, q) for p, q in zip(problem.params, before, strict=True))


def test_sizes_are_those_of_the_transformers() -> None:
    """Or a table's rows would be called what they are not."""
    for size, (width, layers) in SIZES.items():
        numbers = sum(torch.Size(shape).numel() for shape in transformer_shapes(width, layers))
        assert numbers == pytest.approx(size, rel=0.15)


# ------------------------------------------------------------------------------------------------------ same arithmetic


@pytest.mark.parametrize("horizon", [2, 3, 5, 8, 10])
def test_the_textbooks_q_is_gxpos_away_from_the_poles(horizon: int) -> None:
    r = torch.linspace(-2.0, 3.0, 5001, dtype=torch.float64)
    r = r[((r - 1).abs() > 0.1) & ((r + 1).abs() > 0.1)]
    off = contenders.textbook_scale(r, horizon) - extrapolation_scale(r, horizon)
    assert off.abs().max() < 1e-6


def test_all_active_contenders_take_the_same_step() -> None:
    """Or their costs could not be compared. The textbook form in float64, where it is wrong near r = 1 alone."""
    after = {}
    for name in ("GXPO", "GXPO, rollback=False", contenders.TEXTBOOK):
        problem = transformer(8, 1, 1, "cpu", torch.float64)
        contender = contenders.contenders(problem)[name]()
        for _ in range(3):
            contender.step()
        after[name] = torch.cat([p.detach().flatten() for p in problem.params])
    assert torch.equal(after["GXPO"], after["GXPO, rollback=False"])
    start = torch.cat([p.detach().flatten() for p in transformer(8, 1, 1, "cpu", torch.float64).params])
    moved = (after["GXPO"] - start).norm()
    assert moved > 0
    assert (after["GXPO"] - after[contenders.TEXTBOOK]).norm() < 0.01 * moved
