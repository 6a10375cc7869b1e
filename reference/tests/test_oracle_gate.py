"""The oracle's gate against series worked out by hand: an error here closes every port's gate at a wrong step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from oracle_cases import EMA, GATE, arrays, close, config, same, scripted

from gxpo_reference.oracle import Oracle, Trace


def one(oracle: Oracle, h: float | None = None, g: float = 1.0) -> Trace:
    return oracle.step(lambda p: (0.0, arrays(w=[g, -g])), supplied=h)


def gated(**changes: Any) -> Oracle:
    return Oracle(arrays(w=[1.0, 2.0]), config(gate=GATE | changes))


def feed(oracle: Oracle, hs: Sequence[float | None]) -> list[Trace]:
    return [one(oracle, h) for h in hs]


def outcomes(traces: list[Trace]) -> str:
    return "".join({"active": "a", "single": "s", "rolled back": "r", "skipped": "k"}[t.outcome] for t in traces)


def test_window_scores_against_the_preceding_values_only() -> None:
    """A window that contains the value it scores cannot reach sqrt(w - 1) and goes blind; std is of the population."""
    traces = feed(gated(), [1, 2, 3, 4, 10])
    assert [t.z for t in traces[:4]] == [None] * 4
    assert [t.baseline for t in traces[:4]] == [None] * 4
    assert traces[4].baseline == (2.5, math.sqrt(1.25))
    close(traces[4].z, 7.5 / (math.sqrt(1.25) + 1e-9))
    assert [t.statistic for t in traces] == [1, 2, 3, 4, 10]
    assert [t.tripped for t in traces] == [False] * 4 + [True]


def test_window_slides() -> None:
    oracle = gated(threshold=100.0)
    traces = feed(oracle, [1, 2, 3, 4, 10, 5])
    close(traces[5].baseline, [4.75, np.std([2, 3, 4, 10])])
    assert oracle.gate.recent.tolist() == [3, 4, 10, 5]  # all that is kept


def test_unfilled_window_never_trips() -> None:
    """Nothing is known yet, however wild the value."""
    traces = feed(gated(window=5), [1, 1, 1, 1e9])
    assert outcomes(traces) == "aaaa"
    assert not any(t.tripped for t in traces)


def test_sigma_has_a_small_constant_and_no_more() -> None:
    """On a flat window z is the distance over 1e-9, not over a comfortable floor."""
    close(feed(gated(threshold=1e9), [2, 2, 2, 2, 2.5])[4].z, 0.5 / 1e-9)


def test_threshold_itself_trips_and_just_below_does_not() -> None:
    z = 4 / (1 + 1e-9)
    for threshold, tripped in ((z, True), (math.nextafter(z, 9), False)):
        assert feed(gated(threshold=threshold), [1, 3, 1, 3, 6])[4].tripped is tripped


def test_step_that_trips_stands_and_the_next_is_the_first_single_pass() -> None:
    """The tripping step is a whole active step; after it, one pass each, for good."""
    oracle = gated()
    traces = feed(oracle, [1, 3, 1, 3, 6, None, None, None])
    assert outcomes(traces) == "aaaaasss"
    assert (traces[4].passes, traces[5].passes) == (3, 1)
    assert traces[5].why == "gate closed at step 4"
    close(traces[4].points["theta'"]["w"], [1 - 5 * 0.35, 2 + 5 * 0.35])  # alpha K + 1 = 3.5 steps of 0.1 each
    close(oracle.params["w"], [1 - 5 * 0.35 - 0.3, 2 + 5 * 0.35 + 0.3])
    assert (traces[5].statistic, traces[5].z, traces[5].r) == (None, None, None)
    assert traces[5].points.keys() == {"theta0", "theta'"}


def test_patience_scores_the_whole_streak_against_the_baseline_of_its_first_member() -> None:
    """Window (1, 3, 1, 3): three sixes score 4, 4, 4. Unpinned, the second would score 1.5 and the gate stay open."""
    traces = feed(gated(patience=3), [1, 3, 1, 3, 6, 6, 6, None])
    assert [t.streak for t in traces] == [0, 0, 0, 0, 1, 2, 3, 0]
    close([t.z for t in traces[4:7]], [4 / (1 + 1e-9)] * 3)
    assert [t.baseline for t in traces[4:7]] == [(2.0, 1.0)] * 3
    assert [t.tripped for t in traces[4:7]] == [False, False, True]
    assert outcomes(traces) == "aaaaaaas"


def test_broken_streak_unpins_and_the_history_has_grown_underneath() -> None:
    """6, 6, then 2: not in a row, so no trip; the next value is scored by (3, 6, 6, 2)."""
    traces = feed(gated(patience=3), [1, 3, 1, 3, 6, 6, 2, 6, 6])
    assert [t.streak for t in traces] == [0, 0, 0, 0, 1, 2, 0, 0, 0]
    assert traces[6].baseline == (2.0, 1.0)  # the value that breaks it is still scored by the pinned one
    close(traces[7].baseline, [4.25, np.std([3, 6, 6, 2])])
    assert outcomes(traces) == "a" * 9


def test_low_values_are_a_sign_of_danger_only_when_two_sided() -> None:
    for two_sided in (False, True):
        trace = feed(gated(two_sided=two_sided), [1, 3, 1, 3, -2])[4]
        close(trace.z, -4 / (1 + 1e-9))
        assert trace.tripped is two_sided


@pytest.mark.parametrize("cooldown", [0, 1, 3])
def test_cooldown_counts_single_passes_then_goes_on_with_its_baseline_and_no_streak(cooldown: int) -> None:
    """Trip at step 5; active again at 6 + n, scored at once by what was seen before, streak from 0, unpinned."""
    hs = [1, 3, 1, 3, 6, 6] + [None] * cooldown + [9, 6]
    traces = feed(gated(patience=2, cooldown=cooldown), hs)
    assert outcomes(traces) == "a" * 6 + "s" * cooldown + "aa"
    assert (traces[5].tripped, traces[5].streak) == (True, 2)
    back = traces[6 + cooldown]
    assert back.step == 6 + cooldown
    close(back.baseline, [4.0, np.std([1, 3, 6, 6])])
    assert (back.streak, back.tripped) == (0, False)  # z = 5 / 2.1 < 3


def test_gate_can_trip_again_after_a_cooldown() -> None:
    traces = feed(gated(cooldown=1), [1, 3, 1, 3, 6, None, 30, None, 6])
    assert outcomes(traces) == "aaaaasasa"
    assert traces[7].why == "gate closed at step 6"


@pytest.mark.parametrize("statistic", ["supplied", "never"])
@pytest.mark.parametrize("budget", [0, 1, 3])
def test_budget_is_for_good_even_with_a_cooldown(statistic: str, budget: int) -> None:
    """The hard limit on cost holds whatever the gate says."""
    oracle = gated(statistic=statistic, max_active_steps=budget, cooldown=1)
    traces = feed(oracle, [1.0] * 6)
    assert outcomes(traces) == "a" * budget + "s" * (6 - budget)
    assert traces[-1].why == f"budget of {budget} active steps spent"


def test_budget_counts_completed_active_steps_only() -> None:
    """Rolled-back, skipped and zero-gradient steps did not spend it."""
    oracle = gated(statistic="never", max_active_steps=2)
    nan, good, zero = arrays(w=[math.nan, 1]), arrays(w=[1, 1]), arrays(w=[0, 0])
    traces = [oracle.step(scripted(*g)) for g in ([good, nan], [nan], [zero], [good] * 3, [good] * 3, [good])]
    assert outcomes(traces) == "rksaas"


def test_warmup_steps_are_active_and_observe_nothing_that_lasts() -> None:
    """The wild first steps must neither fill the window nor be scored."""
    traces = feed(gated(warmup=3), [None, 1e9, -1e9, 1, 3, 1, 3, 6])
    assert outcomes(traces) == "a" * 8
    assert [t.statistic for t in traces[:4]] == [None, None, None, 1]
    assert [t.z is None for t in traces] == [True] * 7 + [False]
    assert traces[7].baseline == (2.0, 1.0)


def test_warmup_counts_outer_steps_of_any_outcome() -> None:
    oracle = gated(warmup=2)
    one(oracle, None, g=math.nan)
    one(oracle, None, g=0.0)
    assert one(oracle, 5.0).statistic == 5.0


def test_ema_by_hand_with_two_unscored_observations() -> None:
    """omega 1/2 from (1, 1): 3 -> (2, 2.5), 2 -> (2, 1.25), then 4 scores 2 / sqrt(1.25) and gives (3, 2.625)."""
    traces = feed(gated(**EMA), [3, 2, 4, 6, 6])
    assert [t.z for t in traces[:2]] == [None, None]
    close(traces[2].baseline, [2, math.sqrt(1.25)])
    close(traces[2].z, 2 / (math.sqrt(1.25) + 1e-9))
    close(traces[3].baseline, [3, math.sqrt(2.625)])  # sigma moves by the old mean: by the new one it is 1.27
    close(traces[4].baseline, [4.5, math.sqrt(2.625 / 2 + 9 / 2)])


def test_ema_weighs_the_new_value_by_omega() -> None:
    """omega 0.1 is a memory of ten steps; by 1 - omega it would be one of none."""
    traces = feed(gated(baseline="ema", omega=0.1), [3, 2, 2])
    # (1, 1) -> 3 -> (1.2, 0.9 + 0.4) -> 2 -> (1.28, 1.17 + 0.064)
    close(traces[2].baseline, [1.28, math.sqrt(1.234)])


def test_ema_cold_start_does_not_trip() -> None:
    """Against (1, 1) any real gradient norm would: the first two observations only teach."""
    assert not any(t.tripped for t in feed(gated(**EMA, threshold=0.5), [50.0, 50.0]))


def test_ema_sigma_has_a_floor_where_it_is_read() -> None:
    """On a flat series sigma reads 0.01; the variance underneath goes on shrinking and comes back without a debt."""
    traces = feed(gated(**EMA, threshold=100.0), [1.0] * 20 + [1.5, 1.5])
    close(traces[20].baseline, [1.0, 0.01])
    close(traces[20].z, 0.5 / (0.01 + 1e-9))
    close(traces[21].baseline, [1.25, math.sqrt(2.0**-21 + 0.125)])


def test_ema_streak_is_pinned_too() -> None:
    traces = feed(gated(**EMA, patience=3, threshold=2.0), [1, 1, 9, 9, 1, 1])
    assert [t.streak for t in traces] == [0, 0, 1, 2, 0, 0]
    assert [t.baseline for t in traces[2:5]] == [(1.0, 0.5)] * 3
    # underneath: (5, 32.125) after the first 9, (7, 24.0625) after the second, (4, 30.03125) after the 1
    close(traces[5].baseline, [4.0, math.sqrt(30.03125)])


@pytest.mark.parametrize(
    ("corrective", "want"), [([1.0, 0.0], 0.0), ([0.0, 5.0], 1.0), ([-3.0, 0.0], 0.0), ([0.0, 0.0], 1.0)]
)
def test_disagreement_is_of_all_tensors_together(corrective: list[float], want: float) -> None:
    """Per-tensor cosines averaged would call (1, 0) against (0, 5) something else; an opposite g~ agrees, by the
    cosine's absolute value; a zero g~ counts as cosine 0."""
    oracle = Oracle(arrays(a=1.0, b=[2.0]), config(gate=GATE | {"statistic": "disagreement"}))
    script = scripted(arrays(a=2, b=[0]), arrays(a=1, b=[0]), arrays(a=corrective[0], b=[corrective[1]]))
    close(oracle.step(script).statistic, want)


@pytest.mark.parametrize(("statistic", "which"), [("initial_norm", 0), ("corrective_norm", 2)])
def test_norm_statistics_are_read_before_clipping(statistic: str, which: int) -> None:
    """After clipping a norm saturates at C: the spike from 5 to 500 under C = 1 would go unseen."""
    oracle = Oracle(arrays(w=[1.0, 2.0]), config(gate=GATE | {"statistic": statistic}, max_grad_norm=1.0))
    for scale in (0.9, 1.1, 0.9, 1.1, 100.0):
        grads = [arrays(w=[30.0, 40.0]) for _ in range(3)]
        grads[which] = arrays(w=[3.0 * scale, 4.0 * scale])
        trace = oracle.step(scripted(*grads))
        close(trace.statistic, 5 * scale)
    assert trace.tripped


def test_without_a_gate_or_with_never_no_value_closes_it() -> None:
    for gate in (None, GATE | {"statistic": "never"}):
        oracle = Oracle(arrays(w=[1.0, 2.0]), config(gate=gate))
        traces = [one(oracle, g=g) for g in (1, 1, 1, 1, 1, 1e9, 1e9)]
        assert outcomes(traces) == "a" * 7
        assert all(t.statistic is None for t in traces)


@pytest.mark.parametrize("supplied", [None, math.nan, math.inf, "1", True])
def test_missing_supplied_statistic_is_refused_before_anything_is_asked(supplied: Any) -> None:
    """Silently observing nothing would leave the user without the protection asked for."""
    oracle, asked = gated(), []
    before = oracle.save()
    with pytest.raises(ValueError, match="supplied must be a finite number"):
        oracle.step(lambda p: asked.append(p), supplied=supplied)
    assert not asked
    assert same(oracle.save(), before)
