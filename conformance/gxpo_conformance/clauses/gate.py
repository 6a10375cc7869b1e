"""The gate: which step falls back. Scripted norms, one coordinate, so that every norm is exact; only the number of
gradients asked is judged, except where the clause is about the single pass itself.

CALM has mean 1 and population standard deviation 0.1768.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gxpo_conformance.clauses.table import check
from gxpo_conformance.harness.findings import CaseError
from gxpo_conformance.harness.harness import Harness, Run
from gxpo_conformance.harness.recorder import Script
from gxpo_conformance.protocol import config, declares
from gxpo_reference.oracle import Trace

CALM = (1.0, 1.25, 0.75, 1.0)


def observed(h: float, g0: float = 1.0) -> Script:
    """The gradients of a step with |g~| = h, |g0| = g0."""
    return [{"w": np.array([g, 0.0])} for g in (g0, 0.5 * g0, h)]


def play(harness: Harness, norms: Sequence[float | Script], single: Sequence[int] = (), **gate: object) -> Run:
    """Steps with these |g~| (or these gradients); those in `single` must be single passes, all others active."""
    run = harness.begin({"w": np.zeros(2)}, config(gate={"window": 4, "threshold": 3.0, **gate}))
    for n, h in enumerate(norms):
        expect(run.step(observed(h) if isinstance(h, float | int) else h, judge="counts"), n, n in single)
    return run


def expect(trace: Trace, n: int, single: bool) -> None:
    """The case is as it was meant: the oracle agrees with what is written beside it."""
    if (trace.outcome == "single") != single:
        raise CaseError(f"step {n} is {trace.outcome} for the oracle ({trace.why})")


@check("GAT-01", coarse=True)
def the_step_that_trips_stands_and_the_rest_are_single(harness: Harness) -> None:
    play(harness, [*CALM, 2.0, *([1.0] * 12)], single=range(5, 17))
    play(harness, [*CALM, *CALM, *CALM])
    play(harness, [*CALM, 1.5, 1.0], single=[5], threshold=2.0)  # z is 2.83
    play(harness, [*CALM, 1.625, 1.0], threshold=4.0)  # 3.54


@check("GAT-02", coarse=True)
def a_value_is_not_scored_against_itself(harness: Harness) -> None:
    play(harness, [*CALM, 64.0, 1.0], single=[5])  # in a window of 4 that holds it no value scores above 1.73


@check("GAT-03", coarse=True)
def deviation_is_the_populations(harness: Harness) -> None:
    play(harness, [*CALM, 1.5625, 1.0], single=[5])  # z is 3.18; with the sample's deviation 2.76
    play(harness, [*CALM, 1.5, 1.0, 1.0])  # z is 2.83; with the mean absolute deviation 4
    if harness.dtype == "float64":  # a spread so fine that the mean of squares less the square of the mean loses it
        fine = [1000.0 + 2.0**-15 * h for h in CALM]
        play(harness, [*fine, 1000.0 + 2.0**-15 * 1.75, 1000.0], single=[5])
        play(harness, [*fine, 1000.0 + 2.0**-15 * 1.375, 1000.0, 1000.0])


@check("GAT-04", coarse=True)
def an_unfilled_window_does_not_score(harness: Harness) -> None:
    play(harness, [1.0, 1.25, 0.75, 64.0, 1.0, 1.0])
    play(harness, [1.0, 64.0, 1.0, 1.0])


@check("GAT-05", coarse=True)
def a_low_value_is_no_danger(harness: Harness) -> None:
    play(harness, [*CALM, 0.0625, 1.0, 1.0])


@check("GAT-06", coarse=True)
def only_the_latest_window_counts(harness: Harness) -> None:
    play(harness, [64.0, *CALM, 2.0, 1.0], single=[6])
    play(harness, [*CALM * 32, 2.0, 1.0], single=[129], window=128)  # all of them, be they many


@check("GAT-07", coarse=True)
def statistic_is_the_corrective_norm(harness: Harness) -> None:
    play(harness, [*CALM, observed(1.0, g0=64.0), 1.0, 1.0])
    play(harness, [*CALM, 2.0, 1.0], single=[5])
    tiny = 2.0**-20  # however small they are
    play(harness, [*(tiny * h for h in CALM), 2.0 * tiny, tiny], single=[5])
    # Over all entries of a large tensor: the spike is its last one.
    run = harness.begin({"w": np.zeros(300)}, config(gate={"window": 4}))
    for n, h in enumerate([*CALM, 2.0, 1.0]):
        script = [{"w": np.concatenate([np.zeros(299), [g]])} for g in (1.0, 0.5, h)]
        expect(run.step(script, judge="counts"), n, n == 5)
    # Over all tensors together: 1 and 1.5 make 1.8, which trips; 1 and 1 make 1.41, which does not (their sum would).
    for b, trips in ((1.5, [5]), (1.0, [])):
        run = harness.begin({"w": np.zeros(2), "v": np.zeros(1)}, config(gate={"window": 4}))
        for n, second in enumerate([0.0] * 4 + [b, 0.0]):
            h = 1.0 if n >= 4 else CALM[n]
            trace = run.step(
                [{**g, "v": np.array([v])} for g, v in zip(observed(h), (0, 0, second), strict=True)], judge="counts"
            )
            expect(trace, n, n in trips)


@check("GAT-08", coarse=True)
def a_single_pass_is_the_plain_step(harness: Harness) -> None:
    run = play(harness, [*CALM, 2.0, 1.0], single=[5])
    for g in ([1.0, -2.0], [0.5, 0.25]):
        run.step([{"w": np.array(g)}])


@check("GAT-09", coarse=True)
def a_constant_history_is_no_error(harness: Harness) -> None:
    play(harness, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    play(harness, [1.0, 1.0, 1.0, 1.0, 1.125, 1.0], single=[5])
    if harness.dtype == "float64":  # what float32 does not hold, it does not hold constant
        play(harness, [1.0 + 2.0**-26] * 6)
        play(harness, [*[1.0 + 2.0**-26] * 4, 1.0 + 2.0**-24, 1.0], single=[5])


@check("GAT-10", coarse=True)
def patience_wants_them_in_a_row(harness: Harness) -> None:
    play(harness, [*CALM, 2.0, 1.0, 4.0, 1.0, 8.0, 8.0, 1.0], single=[10], patience=2)


@check("GAT-11", coarse=True)
def an_open_streak_keeps_its_baseline(harness: Harness) -> None:
    play(harness, [*CALM, 4.0, 4.0, 4.0, 1.0], single=[7], patience=3)  # unpinned, the second 4 scores 1.7


@check("GAT-12", coarse=True)
def history_grows_under_a_streak(harness: Harness) -> None:
    play(harness, [*CALM, 4.0, 4.0, 1.0, 4.0, 4.0, 4.0, 1.0], patience=3)  # 4 is usual by then


@check("GAT-13", coarse=True)
def two_sided_counts_low_values(harness: Harness) -> None:
    play(harness, [*CALM, 0.0625, 1.0], single=[5], two_sided=True)
    play(harness, [*CALM, 2.0, 1.0], single=[5], two_sided=True)
    if declares(harness.capabilities, "gate_options:patience"):
        play(harness, [*CALM, 0.0625, 1.0, 1.0], two_sided=True, patience=2)
        play(harness, [*CALM, 0.0625, 0.0625, 1.0], single=[6], two_sided=True, patience=2)


@check("GAT-14", coarse=True)
def warmup_observes_nothing_that_lasts(harness: Harness) -> None:
    play(harness, [1.0, 1.25, 0.75, 1.0, 64.0, 1.0], warmup=3)  # 64 is the second observation, the window not full
    play(harness, [1.0, 1.25, 0.75, 1.0, 64.0, 1.0], warmup=1)  # 64 is the fourth, the window lacks one
    play(harness, [64.0, 64.0, 64.0, *CALM, 2.0, 1.0], single=[8], warmup=3)


@check("GAT-15", coarse=True)
def cooldown_ends(harness: Harness) -> None:
    play(harness, [*CALM, 2.0, 1.0, 1.0, 1.0, 1.0], single=[5, 6], cooldown=2)
    play(harness, [*CALM, 2.0, 1.0, 1.0], cooldown=0)  # active again at once
    # After a second trip it is counted anew: 16 trips a window that has seen the 2.
    play(harness, [*CALM, 2.0, 1.0, 1.0, 16.0, 1.0, 1.0, 1.0], single=[5, 6, 8, 9], cooldown=2)


@check("GAT-16", coarse=True)
def cooldown_keeps_the_baseline(harness: Harness) -> None:
    loud = observed(1.0, g0=512.0)  # single passes: they observe nothing, however large their gradient
    # The step after the cooldown is scored at once, against the last four observations, the tripping one included.
    play(harness, [*CALM, 2.0, loud, loud, 8.0, 1.0], single=[5, 6, 8], cooldown=2)
    play(harness, [*CALM, 2.0, loud, loud, 2.0, 1.0], single=[5, 6], cooldown=2)


@check("GAT-17", coarse=True)
def budget_of_active_steps(harness: Harness) -> None:
    play(harness, [1.0] * 8, single=[3, 4, 5, 6, 7], max_active_steps=3)
    if declares(harness.capabilities, "gate_options:warmup"):  # steps of the warm-up are spent as well, and end with it
        play(harness, [1.0] * 6, single=[3, 4, 5], max_active_steps=3, warmup=2)
        play(harness, [1.0] * 6, single=[2, 3, 4, 5], max_active_steps=2, warmup=4)
    play(harness, [1.0] * 3, single=[0, 1, 2], max_active_steps=0)  # none is a number, too
    if declares(harness.capabilities, "gate_statistics:never"):  # it counts steps, not observations
        play(harness, [1.0] * 5, single=[3, 4], max_active_steps=3, statistic="never")


@check("GAT-18", coarse=True)
def ema_scores_from_before_the_update(harness: Harness) -> None:
    # From (1, 1): 8 would score 7 at once, but the first two are not scored. Then mu, sigma are 6.25, 4.32 (omega 0.5).
    ema = {"baseline": "ema", "omega": 0.5, "threshold": 2.0}
    play(harness, [8.0, 8.0, 8.0, 8.0, 8.0], **ema)
    play(harness, [1.0, 64.0, 1.0, 1.0], **ema)  # nor is the second, 63 off
    play(harness, [8.0, 8.0, 16.0, 8.0], single=[3], **ema)  # z = 2.26; from an updated mu, sigma never above 0.71
    play(harness, [8.0, 8.0, 14.0, 8.0], **ema)  # z = 1.79
    # The variance takes (h - old mu)^2: after 14, mu is 10.125, sigma 6.27, and 22 scores 1.89; with the new mu 2.4.
    play(harness, [8.0, 8.0, 14.0, 22.0, 8.0], **ema)
    play(harness, [*([8.0] * 12), 1.0, 8.0, 8.0], **ema)  # a low value, 60 deviations below
    if declares(harness.capabilities, "gate_options:two_sided"):
        play(harness, [*([8.0] * 12), 1.0, 8.0, 8.0], single=[13, 14], two_sided=True, **ema)


@check("GAT-19")
def ema_deviation_has_a_floor(harness: Harness) -> None:
    ema = {"baseline": "ema", "omega": 0.5}
    play(harness, [*([1.0] * 20), 1.015625, 1.0], **ema)  # z = 1.6 by sigma = 0.01; the variance alone says 16
    play(harness, [*([1.0] * 20), 1.25, 1.0], single=[21], **ema)


@check("GAT-20", coarse=True)
def initial_norm_is_watched(harness: Harness) -> None:
    calm = [observed(1.0, g0=h) for h in CALM]
    play(harness, [*calm, observed(1.0, g0=2.0), 1.0], single=[5], statistic="initial_norm")
    play(harness, [*calm, observed(64.0), 1.0], statistic="initial_norm")
    # Over all tensors together, as the corrective norm is.
    run = harness.begin({"w": np.zeros(2), "v": np.zeros(1)}, config(gate={"window": 4, "statistic": "initial_norm"}))
    for n, (h, other) in enumerate([*((h, 0.0) for h in CALM), (1.0, 1.0), (1.0, 1.75), (1.0, 0.0)]):
        script = [{**g, "v": np.array([other * (1.0, 0.5, 0.0)[i]])} for i, g in enumerate(observed(1.0, g0=h))]
        expect(run.step(script, judge="counts"), n, n == 6)


@check("GAT-21", coarse=True)
def disagreement_is_watched(harness: Harness) -> None:
    def turned(x: float, y: float) -> Script:
        return [{"w": np.array(g)} for g in ([1.0, 0.0], [0.5, 0.0], [x, y])]

    calm = [turned(3.0, 4.0), turned(4.0, 3.0), turned(3.0, -4.0), turned(4.0, -3.0)]  # 0.4, 0.2, 0.4, 0.2
    play(harness, [*calm, turned(0.0, 1.0), 1.0], single=[5], statistic="disagreement")
    play(harness, [*calm, turned(-1.0, 0.0), 1.0], statistic="disagreement")  # opposite agrees, by the absolute value
    play(harness, [*calm, turned(300.0, 400.0), 1.0], statistic="disagreement")
    play(harness, [*calm, turned(0.0, 0.0), 1.0], single=[5], statistic="disagreement")  # agrees with nothing: 1
    play(harness, [*calm, turned(3.0 * 2.0**-40, 4.0 * 2.0**-40), 1.0, 1.0], statistic="disagreement")
    # A zero g~ has cosine 0, so h = 1, no more: usual where 0.9 and 1 are.
    wide = [turned(0.1, 0.995), turned(0.0, 1.0), turned(-0.1, 0.995), turned(0.0, 1.0)]
    play(harness, [*wide, turned(0.0, 0.0), 1.0], statistic="disagreement")
    tiny = [[{"w": g["w"] * 2.0**-18} for g in script] for script in (*calm, turned(0.0, 1.0))]
    play(harness, [*tiny, 1.0], single=[5], statistic="disagreement")  # however small they are
    play(harness, [*calm, turned(0.38, 0.925), 1.0], single=[5], statistic="disagreement")  # 1 - cos^2 would score 2.5
    # One cosine over all tensors together: each alone turns by a right angle in the last step but one, or not at all.
    run = harness.begin({"w": np.zeros(2), "v": np.zeros(2)}, config(gate={"window": 4, "statistic": "disagreement"}))
    for n, (w, v) in enumerate([(0.8, 0.6), (0.6, 0.8), (0.8, 0.6), (0.6, 0.8), (0.7, 0.7), (0.0, 0.1), (1.0, 1.0)]):
        last = [np.array([c, (1 - c * c) ** 0.5]) for c in (w, v)]
        first = {"w": np.array([1.0, 0.0]), "v": np.array([4.0, 0.0])}
        script = [first, first, {"w": 8.0 * last[0], "v": last[1]}]
        expect(run.step(script, judge="counts"), n, n == 6)


@check("GAT-22", coarse=True)
def never_is_never(harness: Harness) -> None:
    play(harness, [*CALM, 64.0, 64.0, 64.0, 1.0], statistic="never")


@check("GAT-26", coarse=True)
def the_callers_number_is_watched(harness: Harness) -> None:
    # Norms that would trip at once, a number that does not; then the reverse.
    run = harness.begin({"w": np.zeros(2)}, config(gate={"statistic": "supplied", "window": 4}))
    for n, (supplied, h) in enumerate(zip([*CALM, 1.0, 2.0, 1.0], [1.0, 1.25, 0.75, 1.0, 64.0, 1.0, 1.0], strict=True)):
        expect(run.step(observed(h, g0=h), judge="counts", statistic=supplied), n, n == 6)
    run = harness.begin({"w": np.zeros(2)}, config(gate={"statistic": "supplied", "window": 4}))
    for n, supplied in enumerate([-0.5, 0.0, 0.5, 0.0, 1.5, 0.0]):  # any finite number: 0 and below are none too few
        expect(run.step(observed(1.0), judge="counts", statistic=supplied), n, n == 5)
    if declares(harness.capabilities, "gate_options:cooldown"):  # single passes observe nothing of it
        settings = config(gate={"statistic": "supplied", "window": 4, "cooldown": 2})
        run = harness.begin({"w": np.zeros(2)}, settings)
        for n, supplied in enumerate([*CALM, 2.0, 512.0, 512.0, 8.0, 1.0]):
            expect(run.step(observed(1.0), judge="counts", statistic=supplied), n, n in (5, 6, 8))


@check("GAT-23", coarse=True)
def an_open_streak_keeps_its_ema(harness: Harness) -> None:
    # After 8, 8: mu, sigma 6.25, 4.32; 40 scores 7.8. Unpinned the second 40 scores 1.4.
    ema = {"baseline": "ema", "omega": 0.5, "threshold": 2.0, "patience": 2}
    play(harness, [8.0, 8.0, 40.0, 40.0, 8.0], single=[4], **ema)


@check("GAT-24", coarse=True)
def cooldown_clears_the_streak(harness: Harness) -> None:
    # Steps 4 and 5 trip; after one single pass step 7 starts a new streak, which alone is not two in a row.
    play(harness, [*CALM, 2.0, 2.0, 1.0, 8.0, 1.0, 1.0], single=[6], patience=2, cooldown=1)


@check("GAT-25", coarse=True)
def budget_outlasts_a_cooldown(harness: Harness) -> None:
    play(harness, [*CALM, 2.0, 1.0, 1.0, 1.0, 1.0], single=[5, 7, 8], max_active_steps=6, cooldown=1)
