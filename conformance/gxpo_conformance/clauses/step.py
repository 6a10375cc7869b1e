"""One step: ratio, virtual point, partial move, corrective step, clipping, optimizer state, cost.

Gradients are scripted and dyadic: each is exact in every dtype, whatever point it was asked at. Cases about the ratio
use alpha = 1, where a wrong partial move does not show, and plain SGD, where the state does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gxpo_conformance.clauses.gate import CALM, observed
from gxpo_conformance.clauses.table import check
from gxpo_conformance.harness.findings import Failure, to_dtype
from gxpo_conformance.harness.harness import Harness
from gxpo_conformance.protocol import config, declares

MOMENTUM = {"lr": 0.125, "momentum": 0.5}
G0 = np.array([1.0, -1.0, 2.0, 0.5, -0.5, 1.5, -2.0, 0.75])
THETA = np.array([0.0, 0.5, -0.25, 1.0, -1.0, 0.125, 0.0, -0.5])
LAST = np.array([0.5, 0.25, -0.75, 1.0, -1.0, 0.375, 2.0, -0.125])


def ratios(r: list[float], horizon: int, harness: Harness, exact_ratio: bool = False, **settings: object) -> None:
    """One step in which coordinate i keeps r[i] of its gradient."""
    n = len(r)
    run = harness.begin({"w": THETA[:n]}, config(horizon=horizon, **settings), exact_ratio)
    run.step([{"w": G0[:n]}, {"w": G0[:n] * r}, {"w": LAST[:n]}])


@check("EST-01")
def ratio_is_coordinatewise(harness: Harness) -> None:
    for horizon in (4, 5):  # an even K does not tell r from -r
        ratios([0.5, 0.75, 1.125, -0.5, 0.25, 0.875, 0.0, -0.25], horizon, harness)
    run = harness.begin({"a": np.zeros(2), "b": np.zeros((2, 2))}, config(horizon=6))
    g0 = {"a": np.array([1.0, 2.0]), "b": np.array([[1.0, -1.0], [4.0, 0.5]])}
    g1 = {"a": np.array([0.5, 1.5]), "b": np.array([[0.25, -0.75], [-1.0, 0.5]])}
    run.step([g0, g1, g1])


@check("EST-02", coarse=True)
def small_coordinates_are_not_extrapolated(harness: Harness) -> None:
    # RMS is 0.9354 (14 of 16 are 1). At g1 = 1 every coordinate that took part would have r at the clamp.
    g0 = np.ones(16)
    g0[[3, 7]] = 0.0
    rms = np.sqrt(np.mean(g0**2))
    for share in (0.0, 0.5e-3, 0.9e-3, 1.1e-3, 2e-3):
        g0[3], g0[7] = share * rms, -share * rms
        run = harness.begin({"w": np.zeros(16)}, config(horizon=4))
        run.step([{"w": g0}, {"w": np.ones(16)}, {"w": np.ones(16)}])
    # RMS, not the mean magnitude: here 1e-3 RMS is 4 times 1e-3 of the mean.
    g0 = np.full(16, 2.0**-10)
    g0[0] = 1.0
    g0[1] = 1.5 * np.abs(g0).mean() * 1e-3
    run = harness.begin({"w": np.zeros(16)}, config(horizon=4))
    run.step([{"w": g0}, {"w": np.ones(16)}, {"w": np.ones(16)}])
    # Zeros are entries as any other: over all sixteen the bound is 0.25e-3, over those that are not zero 0.7e-3.
    g0 = np.zeros(16)
    g0[:2] = 1.0, 0.5e-3
    run = harness.begin({"w": np.zeros(16)}, config(horizon=4))
    run.step([{"w": g0}, {"w": g0}, {"w": g0}])
    # Of the tensor, not of a block of it, nor of its first entries.
    g0 = np.concatenate([np.full(5000, 2.0**-12), np.ones(1000)])
    run = harness.begin({"w": np.zeros(6000)}, config(horizon=4))
    run.step([{"w": g0}, {"w": np.ones(6000)}, {"w": g0}])
    # Nor of a row of it.
    rows = {"w": np.array([[1.0, -1.0], [2.0**-12, -(2.0**-12)]])}
    run = harness.begin({"w": np.zeros((2, 2))}, config(horizon=4))
    run.step([rows, {"w": np.ones((2, 2))}, rows])


@check("EST-03")
def each_tensor_has_its_own_rms(harness: Harness) -> None:
    run = harness.begin({"large": np.zeros(4), "small": np.zeros(4)}, config(horizon=6))
    large = {"large": np.array([1024.0, -1024.0, 512.0, 1024.0])}
    small = np.array([0.0625, 0.03125, -0.0625, 0.0625])
    run.step([{**large, "small": small}, {**large, "small": small * 0.5}, {**large, "small": small}])
    run.step([{**large, "small": small * k * 2.0**-40} for k in (1.0, 0.5, 1.0)])  # and however small it is
    small = np.array([0.0625, 2.0**-15, -0.0625, 0.0625])  # the second is half of its own tensor's bound
    run.step([{**large, "small": small}, {**large, "small": np.full(4, 0.0625)}, {**large, "small": small}])


@check("EST-04", dtypes=("float32",))
def overflowing_ratio_stays_finite(harness: Harness) -> None:
    # g1 / g0 = 2^129 at an active coordinate, above float32; both norms are finite and no square is subnormal that
    # matters. q = 1 is the rule; a port that divides in a wider type sees the clamp and q = K/2 + 1. The other tensor
    # keeps the norm of g0 from being a tiny one, which may count as zero.
    g0, g1, b = np.array([2.0**-58, 2.0**-66]), np.array([2.0**-58, 2.0**63]), np.ones(1)
    for horizon in (4, 5):  # in an odd sum an infinity may meet another
        start, most = {"w": np.zeros(2), "b": np.zeros(1)}, horizon / 2 + 1
        talk = harness.talk(start, config(horizon=horizon, optimizer={"lr": 2.0**-63}))
        asked = talk.step([{"w": g0, "b": b}, {"w": g1, "b": b}, {"w": g0, "b": b}]).asked
        if len(asked) != 3:
            raise Failure(f"{len(asked)} gradients asked, should be 3", phase="gradients asked")
        got = float(asked[2]["w"][1])
        if not (abs(got + 1.0) < 1e-5 or abs(got + most) < 1e-5):
            raise Failure(
                f"theta~ differs: w[1] is {got!r}, should be -1.0 (q = 1) or {-most} (q at its bound)",
                phase="theta~",
                tensor="w",
                coordinate=(1,),
                got=got,
                wanted=-1.0,
            )


@check("EST-10", leans=("OPT-02",))
def displacement_ratio(harness: Harness) -> None:
    run = harness.begin({"w": THETA / 4}, config(horizon=4, estimator="displacement", optimizer=MOMENTUM))
    for r in (0.25, 0.5):  # under momentum u1 / u0 is r + 0.5 at first, something else later
        run.step([{"w": G0}, {"w": G0 * r}, {"w": G0 * 0.5}])
    if declares(harness.capabilities, "optimizers:adamw"):  # decoupled weight decay is in the displacement
        adamw = {"name": "adamw", "lr": 0.0625, "betas": [0.5, 0.75], "eps": 2.0**-10, "weight_decay": 0.125}
        run = harness.begin({"w": THETA * 8}, config(horizon=4, estimator="displacement", optimizer=adamw))
        run.step([{"w": G0}, {"w": G0 * 0.25}, {"w": G0}])


@check("EST-11", leans=("OPT-02",))
def displacement_activity_reads_u0(harness: Harness) -> None:
    settings = config(horizon=4, estimator="displacement", optimizer=MOMENTUM)
    run = harness.begin({"w": np.zeros(4)}, settings)
    run.step([{"w": np.ones(4)}] * 3)
    # Now momentum moves coordinate 0, whose gradient is zero, and coordinate 1 stands still although its is not.
    buffer = run.traces[0].states["s'"]["momentum_buffer"]["w"]
    g0 = np.array([0.0, -0.5 * buffer[1], 1.0, -1.0])
    run.step([{"w": g0}, {"w": np.array([1.0, 1.0, 0.5, 0.25])}, {"w": g0}])
    # The rule is that of EST-02 and EST-03: on both sides of 1e-3 RMS, of the coordinate's own tensor.
    u0 = np.array([1.0, -1.0, 1.0, -1.0, 0.9e-3, -1.1e-3, 0.5e-3, 1.0])
    plain = config(horizon=4, estimator="displacement")
    one = harness.begin({"w": np.zeros(8)}, plain)
    one.step([{"w": u0}, {"w": np.ones(8)}, {"w": u0}])
    two = harness.begin({"large": np.zeros(2), "small": np.zeros(2)}, plain)
    large, small = np.array([1024.0, -512.0]), np.array([0.0625, -0.03125])
    two.step([{"large": large * k, "small": small * r} for k, r in ((1.0, 1.0), (0.5, 0.75), (1.0, 1.0))])
    idle = harness.begin({"w": THETA}, config(horizon=4, estimator="displacement", optimizer={"lr": 0.0}))
    idle.step([{"w": G0}, {"w": G0}, {"w": G0}])


@check("EST-12", leans=("OPT-02",))
def tensor_ratio_is_one_number(harness: Harness) -> None:
    run = harness.begin({"a": np.zeros(3), "b": np.zeros((2, 2))}, config(horizon=4, estimator="tensor"))
    g0 = {"a": np.array([1.0, 2.0, -1.0]), "b": np.array([[1.0, -1.0], [4.0, 0.5]])}
    g1 = {"a": np.array([1.0, 0.5, -0.25]), "b": np.array([[0.25, -0.75], [3.0, 4.0]])}
    run.step([g0, g1, g1])
    # It is about what moved: under momentum a tensor moves whose gradient is zero.
    run = harness.begin(
        {"a": np.zeros(3), "b": np.zeros((2, 2))}, config(horizon=4, estimator="tensor", optimizer=MOMENTUM)
    )
    run.step([g0, g1, g1])
    run.step([{**g0, "a": np.zeros(3)}, g1, g1])


@check("EST-13")
def tensor_without_displacement_is_neutral(harness: Harness) -> None:
    run = harness.begin({"a": np.zeros(2), "b": np.zeros(2)}, config(horizon=4, estimator="tensor"))
    g = {"a": np.zeros(2), "b": np.array([1.0, -1.0])}
    run.step([g, {"a": np.array([1.0, -0.5]), "b": np.array([0.5, -0.5])}, g])


@check("EST-14")
def tensor_ratio_has_no_additive_constant(harness: Harness) -> None:
    run = harness.begin({"w": np.zeros(3)}, config(horizon=4, estimator="tensor"))
    g0 = np.array([1.0, 2.0, -1.0]) * 2.0**-24  # |u0|^2 is about 1e-15
    run.step([{"w": g0}, {"w": g0 * 0.875}, {"w": g0}])
    run = harness.begin({"w": np.zeros(3), "large": np.zeros(1)}, config(horizon=4, estimator="tensor"))
    g0, large = g0 * 2.0**-16, np.ones(1)  # about 1e-24, beside a tensor that is no tiny one
    run.step([{"w": g0, "large": large}, {"w": g0 * 0.875, "large": large}, {"w": g0, "large": large}])


@check("EXT-01")
def scale_for_even_horizons(harness: Harness) -> None:
    for horizon in (4, 6, 10):
        ratios([0.5, 0.75, 1.03125, -0.5, 0.25, 0.9375, 0.0, -0.75], horizon, harness)


@check("EXT-02")
def scale_for_odd_horizons(harness: Harness) -> None:
    for horizon in (3, 5, 7):
        ratios([0.5, 0.75, 1.03125, -0.5, 0.25, 0.9375, 0.0, -0.25], horizon, harness)


@check("EXT-03")
def constant_gradient_gives_half_the_horizon(harness: Harness) -> None:
    for horizon in (3, 4, 5, 10):
        ratios([1.0, 1.0, 1.0, 1.0], horizon, harness)
        ratios([1.0 + 2.0**-7, 1.0 - 2.0**-7, 1.0 + 2.0**-11, 1.0 - 2.0**-11], horizon, harness)
    ratios([1.0 + 2.0**-20, 1.0 - 2.0**-20, 1.0 + 2.0**-16], 5, harness)


@check("EXT-04")
def scale_is_bounded(harness: Harness) -> None:
    for horizon in (3, 4, 5, 10):
        ratios([2.0, 1.75, 8.0, 64.0], horizon, harness)
    for horizon in (3, 5):  # below -1 the odd sum over 1 + r is negative
        ratios([-1.5, -1.25, -2.0, -8.0], horizon, harness)


@check("EXT-05", leans=("OPT-02",))
def scale_near_minus_one(harness: Harness) -> None:
    # Plain SGD hides q here, for theta2 - theta0 vanishes with 1 + r. Momentum 0.5 leaves half a step.
    for horizon in (4, 5, 10):
        ratios([-1.0, -1.0, -1.0], horizon, harness, exact_ratio=True, optimizer=MOMENTUM)
        ratios([-1.0 + 2.0**-6, -1.0 - 2.0**-6, -0.875, -1.0 + 2.0**-8], horizon, harness, optimizer=MOMENTUM)
    if harness.dtype == "float64":  # as near as a pole with a wider berth would show, for odd K q is at its bound
        for horizon in (3, 4, 7):
            ratios([-1.0 + 1e-3, -1.0 - 1e-3, -1.0 + 1e-5, -1.0 + 1e-7], horizon, harness, optimizer=MOMENTUM)


@check("EXT-06", coarse=True)
def short_horizons_are_refused(harness: Harness) -> None:
    for horizon in (1, 0, -3):
        settings = harness.config(config(horizon=horizon))
        try:
            harness.session({"w": to_dtype(THETA, harness.dtype)}, settings)
        except Failure as failure:
            if isinstance(failure.__cause__, ValueError):
                continue
            raise Failure(f"horizon {horizon} should be refused with a ValueError: {failure}") from failure
        raise Failure(f"start() took horizon {horizon}, should raise ValueError")


@check("MOV-01", coarse=True)
def alpha_scales_the_whole_move(harness: Harness) -> None:
    for alpha in (0.25, 0.5, 0.75, 1.0):  # K = 2: q is 1 everywhere, so theta~ is alpha of the way to theta2
        ratios([0.5, 1.0, 0.75, -0.5], 2, harness, alpha=alpha)


@check("MOV-02")
def alpha_scales_the_extrapolation(harness: Harness) -> None:
    for alpha in (0.25, 0.5, 0.75):
        ratios([1.0, 1.0, 0.75, 0.5], 5, harness, alpha=alpha)


@check("MOV-03", coarse=True)
def small_alpha_contracts(harness: Harness) -> None:
    ratios([1.0, 0.5, 0.75, 0.0], 5, harness, alpha=0.125)  # alpha q < 1: between theta0 and theta2, and so it stays


@check("MOV-04", leans=("OPT-02",))
def move_follows_the_optimizer(harness: Harness) -> None:
    ratios([0.5, 1.0, 0.75, -0.5], 4, harness, alpha=0.5, optimizer={**MOMENTUM, "weight_decay": 0.125})


@check("COR-01", coarse=True)
def corrective_step_starts_from_the_partial_move(harness: Harness) -> None:
    run = harness.begin({"w": np.zeros(4)}, config(horizon=4, alpha=0.5))
    g0 = np.array([1.0, -1.0, 0.5, 2.0])
    for last in ([4.0, 0.0, -8.0, 1.0], [-1.0, -1.0, 0.0, 3.0]):
        run.step([{"w": g0}, {"w": g0 * 0.5}, {"w": np.array(last)}])


def clipped(harness: Harness, horizon: int, limit: float, norms: Sequence[float]) -> None:
    """Gradients of these norms over two tensors together; 0.6 and 0.8 make neither tensor's own norm the whole."""
    run = harness.begin({"a": np.zeros(1), "b": np.zeros(1)}, config(horizon=horizon, max_grad_norm=limit))
    run.step([{"a": np.array([0.6 * h]), "b": np.array([0.8 * h])} for h in norms])


@check("CLP-01")
def each_gradient_is_clipped_by_its_global_norm(harness: Harness) -> None:
    for norms in ([4.0, 2.0, 8.0], [0.5, 4.0, 0.25], [4.0, 0.5, 0.5]):
        for scale in (1.0, 2.0**-10):  # where norms are small, the 1e-6 shows
            clipped(harness, 2, scale, [scale * h for h in norms])
    many = {"w": np.resize([1.0, -1.0, 0.5], 4100)}  # over all entries of a large tensor
    run = harness.begin({"w": np.zeros(4100)}, config(horizon=2, max_grad_norm=8.0))
    run.step([many, {"w": many["w"] * 0.5}, many])
    for limit in (1.0, 2.0**-10):  # a norm of C, and just below it, is scaled by C / (norm + 1e-6), too
        clipped(harness, 2, limit, [limit, limit - 2.0**-21, limit])


@check("CLP-02")
def ratio_is_of_clipped_gradients(harness: Harness) -> None:
    clipped(harness, 4, 1.0, [2.0, 1.5, 0.5])  # clipped both: r = 1, not 0.75
    clipped(harness, 4, 1.0, [0.75, 2.0, 0.5])  # only g1 clipped: r = 1.33, not 2.67


@check("CLP-03", coarse=True)
def gate_reads_norms_before_clipping(harness: Harness) -> None:
    # The calm norms lie below C = 2 and the spike above; clipped to 2 it would score 2.8.
    gate = {"window": 4, "threshold": 3.0}
    run = harness.begin({"w": np.zeros(2)}, config(max_grad_norm=2.0, gate=gate))
    for h in (1.0, 1.5, 0.5, 1.0, 64.0, 1.0):
        run.step(observed(h), judge="counts")


@check("CLP-04", coarse=True)
def single_pass_is_clipped(harness: Harness) -> None:
    run = harness.begin({"w": np.zeros(2)}, config(max_grad_norm=1.0, gate={"window": 4}))
    for h in (0.5, 0.625, 0.375, 0.5, 64.0):
        run.step(observed(h, g0=0.5), judge="counts")
    run.step([{"w": np.array([3.0, -4.0])}])
    run.step([{"w": np.array([0.375, -0.5])}])


@check("OPT-01", coarse=True)
def sgd_is_torchs(harness: Harness) -> None:
    for lr in (0.125, 0.5):
        run = harness.begin({"w": THETA}, config(horizon=2, optimizer={"lr": lr}))
        run.step([{"w": G0}, {"w": G0}, {"w": G0}], judge="update")


@check("OPT-02")
def momentum_and_weight_decay_are_torchs(harness: Harness) -> None:
    # What becomes of the state in an active step is another clause's (OPT-04, OPT-05): here both policies agree. In the
    # first step g0 and g1 outweigh the decay, so that the fast steps stand still and leave the state at 0; the third
    # gradient fills it. The second step's theta1 then shows momentum, and the decay that went through it.
    decay = 0.125
    run = harness.begin({"w": THETA}, config(horizon=2, optimizer={**MOMENTUM, "weight_decay": decay}))
    still = -decay * to_dtype(THETA, harness.dtype)
    run.step([{"w": still}, {"w": still}, {"w": LAST}], judge="update")
    run.step([{"w": G0}] * 3, judge="update")
    at_rest(harness, {**MOMENTUM, "weight_decay": decay})


@check("OPT-03")
def adamw_is_torchs(harness: Harness) -> None:
    # The bias correction shows in a second update: at K = 2 and alpha = 1 theta~ is theta2 (INV-01).
    adamw = {"name": "adamw", "lr": 0.0625, "betas": [0.5, 0.75], "eps": 2.0**-10, "weight_decay": 0.125}
    small = np.array([2.0**-10, -(2.0**-12), 2.0**-8, 1.0])  # where eps shows
    for theta, g0 in ((THETA, G0), (np.zeros(4), small)):
        run = harness.begin({"w": theta}, config(horizon=2, optimizer=adamw))
        run.step([{"w": g0}, {"w": g0 * 0.5}, {"w": g0}], judge="fast steps")
    run = harness.begin({"w": THETA}, config(horizon=2, optimizer={**adamw, "betas": [0.875, 0.9375]}))  # no 1 - beta
    run.step([{"w": G0}, {"w": G0 * 0.5}, {"w": G0}], judge="fast steps")
    run = harness.begin({"w": THETA}, config(horizon=2, optimizer={**adamw, "eps": 0.0}))  # 0 is a number, too
    run.step([{"w": G0}, {"w": G0 * 0.5}, {"w": G0}], judge="fast steps")
    at_rest(harness, adamw)


def at_rest(harness: Harness, optimizer: dict) -> None:
    """A tensor whose gradient is zero decays, and has momentum, as any other."""
    run = harness.begin({"w": THETA[1:4], "still": THETA[1:4]}, config(horizon=2, optimizer=optimizer))
    run.step([{"w": G0[:3], "still": np.zeros(3)}] * 3, judge="update")


def state_policy(harness: Harness, policy: str, optimizer: dict) -> None:
    run = harness.begin({"w": THETA}, config(horizon=2, optimizer_state=policy, optimizer=optimizer))
    for n in range(4):
        g = G0 * (1.0, 0.5, 1.5, -0.25)[n]
        run.step([{"w": g}, {"w": g * 0.75}, {"w": LAST * (n + 1) / 4}])


@check("OPT-04", leans=("OPT-02",))
def keep_goes_on_from_s2(harness: Harness) -> None:
    state_policy(harness, "keep", MOMENTUM)


@check("OPT-05", leans=("OPT-02",))
def restore_starts_from_s0(harness: Harness) -> None:
    state_policy(harness, "restore", MOMENTUM)


@check("OPT-06", leans=("OPT-03",))
def adamw_state_follows_the_policy(harness: Harness) -> None:
    for policy in harness.capabilities["optimizer_state"]:
        adamw = {"name": "adamw", "lr": 0.0625, "betas": [0.5, 0.75], "eps": 2.0**-10}
        state_policy(harness, policy, adamw)
        slow = {"name": "adamw", "lr": 2.0**-10, "betas": [1 - 2.0**-4, 1 - 2.0**-10], "eps": 2.0**-27}
        run = harness.begin({"w": THETA}, config(horizon=4, optimizer_state=policy, optimizer=slow))
        for n in range(45):  # more than a hundred updates: the bias correction goes on
            run.step([{"w": G0 * (1 + n % 3)}, {"w": G0 * 0.75}, {"w": LAST}])
        if declares(harness.capabilities, "estimators:displacement"):
            settings = config(horizon=4, estimator="displacement", optimizer_state=policy, optimizer=adamw)
            run = harness.begin({"w": np.zeros(4)}, settings)
            for scale in (1.0, 0.5):
                g = np.array([1.0, -0.5, 2.0, 1.5]) * scale
                run.step([{"w": g}, {"w": g * 0.75}, {"w": g * 0.5}])


@check("CST-01", coarse=True)
def three_gradients_then_one(harness: Harness) -> None:
    for horizon in (2, 5, 10):
        run = harness.begin({"w": np.zeros(2)}, config(horizon=horizon, gate={"window": 4}))
        for h in (*CALM, 64.0, 1.0, 1.0):
            run.step(observed(h), [0.0, -2.0, 0.0], judge="counts")  # what the loss is does not matter, nor if it is 0
