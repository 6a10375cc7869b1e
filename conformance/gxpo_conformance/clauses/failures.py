"""What goes wrong inside a step: zero and non-finite gradients, exceptions; and what a checkpoint keeps."""

from __future__ import annotations

import numpy as np

from gxpo_conformance.clauses.gate import CALM, observed, play
from gxpo_conformance.clauses.table import check
from gxpo_conformance.harness.findings import Boom
from gxpo_conformance.harness.harness import Harness, Run
from gxpo_conformance.harness.recorder import Script
from gxpo_conformance.protocol import Config, config, declares

MOMENTUM = {"lr": 0.125, "momentum": 0.5}  # a state that remembers what should have left no trace
THETA = np.array([0.5, -0.25, 1.0, 0.0])
G0 = np.array([1.0, -1.0, 0.5, 2.0])
GOOD: Script = [{"w": G0}, {"w": G0 * 0.75}, {"w": G0 * 0.5}]
BAD = (np.nan, np.inf, -np.inf)


def bad(at: int, value: float) -> list[dict[str, np.ndarray]]:
    """GOOD with one non-finite coordinate in gradient `at`; a gradient asked for again is the first, as it was."""
    script = [{"w": g["w"].copy()} for g in GOOD]
    script[at]["w"][1] = value
    return script


def around(harness: Harness, script: Script, losses: list[float] | None = None) -> Run:
    """A good step, the odd one, a good one: the odd one may touch neither the first's state nor the third."""
    run = harness.begin({"w": THETA}, config(horizon=4, optimizer=MOMENTUM))
    run.step(GOOD)
    run.step(script, losses)
    run.step(GOOD)
    return run


@check("NUM-01", leans=("OPT-02",), coarse=True)
def a_zero_gradient_is_a_single_pass(harness: Harness) -> None:
    none = {"w": np.zeros(4)}
    run = harness.begin({"w": THETA}, config(horizon=4, optimizer={**MOMENTUM, "weight_decay": 0.125}))
    run.step(GOOD)
    run.step([none, none, none])  # momentum and weight decay still move the parameters
    run.step(GOOD)
    # Not an observation: with it the window of 4 were full, and 64 would trip.
    zero = [{"w": np.zeros(2)}] * 3
    play(harness, [1.0, 1.25, 0.75, zero, 64.0, 1.0], single=[3])
    if declares(harness.capabilities, "gate_options:patience"):  # nor does it end a streak
        play(harness, [*CALM, 2.0, zero, 2.0, 1.0], single=[5, 7], patience=2)


@check("NUM-02", leans=("OPT-02",), coarse=True)
def a_non_finite_first_gradient_skips_the_step(harness: Harness) -> None:
    for value in BAD:
        around(harness, bad(0, value))
    if harness.dtype == "float64":  # what float32 does not hold is finite
        big = [{"w": g["w"] * 2.0**200} for g in GOOD]
        run = harness.begin({"w": THETA}, config(horizon=4, optimizer={"lr": 2.0**-120}))
        run.step(big, [2.0**200] * 3)


@check("NUM-03", leans=("OPT-02",))
def a_non_finite_second_gradient_rolls_back(harness: Harness) -> None:
    for value in BAD:
        around(harness, bad(1, value))


@check("NUM-04", leans=("OPT-02",))
def a_non_finite_third_gradient_rolls_back(harness: Harness) -> None:
    for value in BAD:
        around(harness, bad(2, value))


@check("NUM-05", leans=("OPT-02",))
def a_non_finite_loss_is_treated_alike(harness: Harness) -> None:
    for losses in ([np.nan], [0.5, np.inf], [0.5, 0.5, np.nan]):
        around(harness, GOOD, losses)
    zero = [{"w": np.zeros(4)}, *GOOD[1:]]  # it comes before what a zero gradient would be
    run = harness.begin({"w": THETA}, config(horizon=4, optimizer={**MOMENTUM, "weight_decay": 0.125}))
    run.step(GOOD)
    run.step(zero, [np.nan])
    run.step(GOOD)


@check("NUM-06", coarse=True)
def a_failed_step_does_not_reach_the_gate(harness: Harness) -> None:
    for at in (1, 2):
        odd = [dict(g) for g in observed(1.0)]
        odd[at] = {"w": np.array([np.nan, 0.0])}
        run = harness.begin({"w": np.zeros(2)}, config(gate={"window": 4}))
        for script in (*map(observed, CALM[:3]), odd, observed(64.0), observed(1.0)):
            run.step(script, judge="counts")
    if declares(harness.capabilities, "gate_statistics:initial_norm"):  # whose observation is there early
        for at in (1, 2):
            odd = [dict(g) for g in observed(1.0)]
            odd[at] = {"w": np.array([np.nan, 0.0])}
            settings = config(gate={"window": 4, "statistic": "initial_norm"})
            run = harness.begin({"w": np.zeros(2)}, settings)
            for script in (*(observed(1.0, h) for h in CALM[:3]), odd, observed(1.0, 64.0), observed(1.0)):
                run.step(script, judge="counts")
    if declares(harness.capabilities, "gate_options:warmup"):  # though it is a step: one of the warm-up is over
        for at in (0, 1, 2):
            odd = [dict(g) for g in observed(1.0)]
            odd[at] = {"w": np.array([np.nan, 0.0])}
            run = harness.begin({"w": np.zeros(2)}, config(gate={"window": 2, "warmup": 2}))
            for script in (odd, *map(observed, (64.0, 1.0, 1.25, 64.0, 1.0))):
                run.step(script, judge="counts")
    if declares(harness.capabilities, "gate_options:patience"):  # it neither ends a streak nor belongs to it
        for at in (0, 1, 2):
            odd = [dict(g) for g in observed(2.0)]
            odd[at] = {"w": np.array([np.nan, 0.0])}
            for patience, later in ((2, (2.0, 1.0)), (3, (2.0, 1.0, 1.0))):
                run = harness.begin({"w": np.zeros(2)}, config(gate={"window": 4, "patience": patience}))
                for script in (*map(observed, (*CALM, 2.0)), odd, *map(observed, later)):
                    run.step(script, judge="counts")


@check("ATM-01", coarse=True)
def an_exception_comes_out_and_parameters_are_back(harness: Harness) -> None:
    for at in (0, 1, 2):
        run = harness.begin({"w": THETA}, config(horizon=4))
        run.step(GOOD)
        run.raising(GOOD, at)


@check("ATM-02", leans=("OPT-02",))
def an_exception_leaves_the_optimizer_as_it_was(harness: Harness) -> None:
    for at in (0, 1, 2):
        run = harness.begin({"w": THETA}, config(horizon=4, optimizer=MOMENTUM))
        run.raising(GOOD, at)  # before there is any state
        run.step(GOOD)
        run.raising(GOOD, at)
        run.step(GOOD)


@check("ATM-03", coarse=True)
def an_exception_does_not_reach_the_gate(harness: Harness) -> None:
    run = harness.begin({"w": np.zeros(2)}, config(gate={"window": 4}))
    for h in CALM[:3]:
        run.step(observed(h), judge="counts")
    run.raising(observed(1.0), 2)
    run.step(observed(64.0), judge="counts")  # the fourth observation: still not scored
    run.step(observed(1.0), judge="counts")
    not_a_step(harness, Boom)


def not_a_step(harness: Harness, what: type[BaseException]) -> None:
    """A step that raises uses up neither warm-up nor budget, and ends no streak."""
    if declares(harness.capabilities, "gate_options:warmup"):
        run = harness.begin({"w": np.zeros(2)}, config(gate={"window": 2, "warmup": 2}))
        run.raising(observed(1.0), 0, what=what)
        for h in (64.0, 1.0, 1.25, 64.0, 1.0):  # the second 64 is the second observation, and not scored
            run.step(observed(h), judge="counts")
    if declares(harness.capabilities, "gate_options:max_active_steps"):
        run = harness.begin({"w": np.zeros(2)}, config(gate={"max_active_steps": 2}))
        for at in (0, 2):
            run.raising(observed(1.0), at, what=what)
            run.step(observed(1.0), judge="counts")
        run.step(observed(1.0), judge="counts")
    if declares(harness.capabilities, "gate_options:patience"):
        run = harness.begin({"w": np.zeros(2)}, config(gate={"window": 4, "patience": 2}))
        for h in (*CALM, 2.0):
            run.step(observed(h), judge="counts")
        run.raising(observed(2.0), 2, what=what)
        for h in (2.0, 1.0):
            run.step(observed(h), judge="counts")


@check("ATM-04", leans=("OPT-02",), coarse=True)
def an_interrupt_leaves_everything_as_it_was(harness: Harness) -> None:
    for what in (KeyboardInterrupt, SystemExit):  # Ctrl-C, and what a handler of SIGTERM raises
        for at in (0, 1, 2):
            run = harness.begin({"w": THETA}, config(horizon=4, optimizer=MOMENTUM))
            run.step(GOOD)
            run.raising(GOOD, at, what=what)
            run.step(GOOD)
    not_a_step(harness, KeyboardInterrupt)


def resumed(harness: Harness, norms: list[float], later: list[float], settings: Config) -> None:
    """Steps with |g~| in `norms`, save, load into a fresh session, go on with `later`."""
    run = harness.begin({"w": np.zeros(2)}, settings)
    for h in norms:
        run.step(observed(h))
    run.talk.resume(observed(7.0), astray=False)
    for h in later:
        run.step(observed(h))


@check("CKP-01", coarse=True)
def resumes_with_a_half_full_window(harness: Harness) -> None:
    resumed(harness, [1.0, 1.25], [0.75, 1.0, 2.0, 1.0], config(gate={"window": 4}))
    if harness.dtype == "float64":  # what float32 does not hold
        resumed(harness, [1.0 + 2.0**-26] * 4, [1.0 + 2.0**-26] * 3, config(gate={"window": 4}))


@check("CKP-02", coarse=True)
def resumes_inside_a_streak(harness: Harness) -> None:
    resumed(harness, [*CALM, 4.0, 4.0], [4.0, 1.0], config(gate={"window": 4, "patience": 3}))


@check("CKP-03", coarse=True)
def resumes_after_the_trip(harness: Harness) -> None:
    resumed(harness, [*CALM, 4.0], [1.0, 1.0], config(gate={"window": 4}))
    resumed(harness, [*CALM, 4.0, 1.0], [1.0, 1.0], config(gate={"window": 4}))


@check("CKP-04", leans=("OPT-02",))
def resumes_the_optimizers_state(harness: Harness) -> None:
    resumed(harness, [1.0, 1.25], [0.75, 1.0], config(horizon=4, optimizer=MOMENTUM))


@check("CKP-05", coarse=True)
def resumes_the_budget(harness: Harness) -> None:
    resumed(harness, [1.0, 1.0], [1.0, 1.0, 1.0], config(gate={"max_active_steps": 4}))


@check("CKP-06", coarse=True)
def resumes_the_ema(harness: Harness) -> None:
    # After 8, 8, 8: mu, sigma are 7.125, 3.29; 12 scores 1.5 and 64 then 13. From (1, 1) 12 would score 11.
    ema = {"baseline": "ema", "omega": 0.5, "threshold": 2.5}
    resumed(harness, [8.0, 8.0, 8.0], [12.0, 64.0, 8.0], config(gate=ema))
    resumed(harness, [8.0], [8.0, 64.0, 8.0], config(gate=ema))
    resumed(harness, [8.0], [64.0, 8.0], config(gate=ema))  # the second observation is not scored
    if declares(harness.capabilities, "gate_options:patience"):  # inside a streak, pinned to 6.25, 4.32
        resumed(harness, [8.0, 8.0, 40.0], [40.0, 8.0], config(gate={**ema, "threshold": 2.0, "patience": 2}))


@check("CKP-07", coarse=True)
def resumes_inside_a_cooldown(harness: Harness) -> None:
    resumed(harness, [*CALM, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0], config(gate={"window": 4, "cooldown": 3}))


@check("CKP-08", coarse=True)
def resumes_inside_the_warmup(harness: Harness) -> None:
    resumed(harness, [64.0, 64.0], [64.0, *CALM, 2.0, 1.0], config(gate={"window": 4, "warmup": 3}))


@check("CKP-09", leans=("OPT-03",))
def resumes_adamws_state(harness: Harness) -> None:
    adamw = {"name": "adamw", "lr": 0.0625, "betas": [0.5, 0.75], "eps": 2.0**-10}
    resumed(harness, [1.0, 1.25], [0.75, 1.0], config(horizon=4, optimizer=adamw))


@check("CKP-10", coarse=True)
def what_was_saved_stays_as_it_is(harness: Harness) -> None:
    # The window is full, and the session that it was taken from and one that it is given to trip at once.
    run = harness.begin({"w": np.zeros(2)}, config(horizon=4, gate={"window": 4}))
    for h in (*CALM, 1.25):
        run.step(observed(h))
    run.talk.resume(observed(64.0))
    for h in (1.25, 2.5, 1.0):
        run.step(observed(h))
    # Tensors may be called as what else is saved.
    theta = {name: np.array([0.5, -0.25]) for name in ("step", "gate", "momentum_buffer")}
    run = harness.begin(theta, config(horizon=4, optimizer=MOMENTUM))
    script = [{name: g * (n + 1.0) for n, name in enumerate(theta)} for g in (G0[:2], G0[:2] * 0.75, G0[:2] * 0.5)]
    run.step(script)
    run.talk.resume(script)
    run.step(script)
    # Nor is it what was saved before, though no active step lies between.
    run = harness.begin({"w": np.zeros(2)}, config(gate={"window": 4}, optimizer=MOMENTUM))
    for h in (*CALM, 64.0, 1.0):
        run.step(observed(h))
        harness.call("save()", lambda: run.talk.session.save())
    run.step(observed(1.0))
    run.talk.resume(observed(1.0))
    run.step(observed(1.0))
