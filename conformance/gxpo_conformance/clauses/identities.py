"""Shapes and sessions, and the identities that need no oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from gxpo_conformance.clauses.table import check
from gxpo_conformance.harness.budget import ALLOWED, UNIT_ROUNDOFF
from gxpo_conformance.harness.findings import Failure, require_close, require_same
from gxpo_conformance.harness.harness import Harness
from gxpo_conformance.harness.recorder import Script, Source
from gxpo_conformance.protocol import Arrays, Config, Gradient, config, declares

THETA = np.array([0.5, -0.25, 1.0, -1.0, 0.125, 0.75, -0.5, 0.25])
G0 = np.array([1.0, -1.0, 2.0, 0.5, -0.5, 1.5, -2.0, 0.75])
R = np.array([0.5, 0.75, -0.25, 1.0, 0.875, 1.125, 0.25, 0.625])
SCRIPT = [{"w": G0}, {"w": G0 * R}, {"w": G0 * 0.5}]


@check("DEV-01")
def any_shape_will_do(harness: Harness) -> None:
    shapes: list[tuple[int, ...]] = [(0,), (), (1,), (2, 3), (2, 1, 2), (3, 0)]
    limits = (None, 1.0) if declares(harness.capabilities, "max_grad_norm") else (None,)
    for limit in limits:
        theta = {f"t{n}": np.resize(THETA, s) for n, s in enumerate(shapes)}
        run = harness.begin(theta, config(horizon=4, max_grad_norm=limit))
        for scale in (1.0, 0.5):
            g0 = {f"t{n}": np.resize(G0, s) * scale for n, s in enumerate(shapes)}
            g1 = {k: g * np.resize(R, g.shape) for k, g in g0.items()}
            run.step([g0, g1, g0])


@check("DEV-02", coarse=True)
def arrays_are_not_shared(harness: Harness) -> None:
    talk = harness.talk({"w": THETA}, config())
    handed_out = harness.call("params()", talk.session.params)
    if handed_out["w"].flags.writeable:
        handed_out["w"] += 1.0
    now = harness.params(talk.session, talk.start)
    require_same(now, talk.start, "after the caller changed what params() gave, theta")
    run = harness.begin({"w": THETA}, config(horizon=4, optimizer={"lr": 0.125, "momentum": 0.5}))
    run.talk.scribble = True  # nor does a loss that computes in the arrays that it is given
    run.step(SCRIPT)
    run.step(SCRIPT)
    run.step([{"w": np.zeros(8)}] * 3)  # a single pass hands out copies as well
    run.step(SCRIPT)
    if declares(harness.capabilities, "gate_options:max_active_steps"):  # nor in those of a closed gate
        run = harness.begin({"w": THETA}, config(gate={"max_active_steps": 0}))
        run.talk.scribble = True
        run.step(SCRIPT)


@check("DEV-03", coarse=True)
def gradients_are_taken_by_name(harness: Harness) -> None:
    theta = {"b": THETA[:4].reshape(2, 2), "a": THETA[4:].reshape(2, 2)}
    run = harness.begin(theta, config(horizon=4))
    run.talk.untidy = True
    script = [{"b": g["w"][:4].reshape(2, 2), "a": g["w"][4:].reshape(2, 2)} for g in SCRIPT]
    run.step(script)
    run.step(script)
    declared = harness.capabilities
    if declares(declared, "gate_statistics:disagreement") and declares(declared, "gate_baselines:window"):
        one, other = np.array([1.0, 0.0]), np.array([0.0, 1.0])
        along, across = {"b": one, "a": other}, {"b": other, "a": one}
        run = harness.begin(across, config(gate={"statistic": "disagreement", "window": 4}))
        run.talk.untidy = True
        for last in (along, along, along, along, across, along):  # by order it would be the reverse
            run.step([along, along, last], judge="counts")


def points(harness: Harness, theta: Arrays, settings: Config, steps: Sequence[Source]) -> list[Arrays]:
    """Every point the port asks at, and the end of every step, all of them active; no oracle."""
    talk = harness.talk(theta, settings)
    seen: list[Arrays] = []
    for n, source in enumerate(steps):
        asked = talk.step(source).asked
        if len(asked) != 3:
            text = f"step {n}: {len(asked)} gradients asked, should be 3: active step"
            raise Failure(text, step=n, phase="gradients asked", got=len(asked), wanted=3)
        seen += [*asked, talk.now]
    return seen


def agree(harness: Harness, got: Arrays, want: Arrays, scale: float, roundings: float, what: str) -> None:
    """Within so many roundings of numbers of this size."""
    budget = {k: np.full(v.shape, roundings * scale * UNIT_ROUNDOFF[harness.dtype] / ALLOWED) for k, v in want.items()}
    require_close(got, want, budget, what)


def same(one: list[Arrays], other: list[Arrays], what: str, harness: Harness, roundings: float = 0.0) -> None:
    for n, (a, b) in enumerate(zip(one, other, strict=True)):
        agree(harness, b, a, 8.0, roundings, f"{what}: point {n}")


@check("INV-01")
def horizon_two_is_two_step_lookahead(harness: Harness) -> None:
    for alpha in (0.5, 1.0):
        asked = points(harness, {"w": THETA}, config(horizon=2, alpha=alpha), [SCRIPT])
        want = THETA - alpha * 0.125 * (SCRIPT[0]["w"] + SCRIPT[1]["w"])
        agree(harness, asked[2], {"w": want}, 2.0, 8, "theta~ of two-step lookahead")


@check("INV-02", coarse=True)
def alpha_zero_steps_from_theta0(harness: Harness) -> None:
    asked = points(harness, {"w": THETA}, config(alpha=0.0), [SCRIPT])
    agree(harness, asked[2], {"w": THETA}, 2.0, 8, "theta~ at alpha = 0")
    agree(harness, asked[3], {"w": THETA - 0.125 * SCRIPT[2]["w"]}, 2.0, 8, "theta' at alpha = 0")


@check("INV-03")
def a_linear_loss_lands_k_steps_away(harness: Harness) -> None:
    for horizon in (2, 3, 5, 10):
        asked = points(harness, {"w": THETA}, config(horizon=horizon), [[{"w": G0}] * 3])
        agree(harness, asked[2], {"w": THETA - horizon * 0.125 * G0}, 2.0 + horizon / 4, 8, f"theta~ at K = {horizon}")


def bowl(curvature: np.ndarray) -> Gradient:
    def gradient(params: Arrays) -> tuple[float, Arrays]:
        return float(np.sum(curvature * params["w"] ** 2) / 2), {"w": curvature * params["w"]}

    return gradient


@check("INV-04")
def a_diagonal_quadratic_is_predicted_exactly(harness: Harness) -> None:
    curvature = np.array([4.0, 3.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0625])
    for horizon in (2, 3, 5, 10):
        asked = points(harness, {"w": THETA}, config(horizon=horizon), [bowl(curvature)])
        want = THETA * (1 - 0.125 * curvature) ** (horizon + 1)
        # a rounding of the ratio is worth up to K of the move
        agree(harness, asked[3], {"w": want}, 1.0, 16 * horizon, f"theta' against K + 1 = {horizon + 1} plain steps")


@check("INV-05")
def scaling_loss_and_rate_changes_nothing(harness: Harness) -> None:
    plain = points(harness, {"w": THETA}, config(alpha=0.5), [SCRIPT] * 2)
    tiny = [{k: g * 2.0**-14 for k, g in grads.items()} for grads in SCRIPT]
    scaled = points(harness, {"w": THETA}, config(alpha=0.5, optimizer={"lr": 0.125 * 2.0**14}), [tiny] * 2)
    same(plain, scaled, "loss times 2^-14, learning rate times 2^14", harness, 4)


Arrangement = Callable[[Arrays], Arrays]


def rearranged(
    harness: Harness,
    theta: Arrays,
    steps: list[Script],
    settings: Config,
    there: Arrangement,
    back: Arrangement,
    what: str,
) -> None:
    """The same run with its tensors arranged otherwise (`there`) must be the same, arranged back."""
    plain = points(harness, theta, settings, steps)
    other = points(harness, there(theta), settings, [[there(g) for g in script] for script in steps])
    same(plain, [back(p) for p in other], what, harness, 4)


def split(arrays: Arrays) -> Arrays:
    return {"a": arrays["w"][:4], "b": arrays["w"][4:]}


@check("INV-06")
def permuting_coordinates_permutes_the_step(harness: Harness) -> None:
    order = np.array([3, 7, 0, 5, 1, 6, 2, 4])

    def permuted(order: np.ndarray) -> Arrangement:
        return lambda arrays: {"w": arrays["w"][order]}

    there, back = permuted(order), permuted(np.argsort(order))
    rearranged(harness, {"w": THETA}, [SCRIPT] * 2, config(alpha=0.5), there, back, "coordinates permuted")


@check("INV-07")
def names_do_not_matter(harness: Harness) -> None:
    def there(arrays: Arrays) -> Arrays:
        return {"z.weight": arrays["a"], "0": arrays["b"]}

    def back(arrays: Arrays) -> Arrays:
        return {"a": arrays["z.weight"], "b": arrays["0"]}

    def named(a: str, b: str) -> tuple[Arrangement, Arrangement]:
        return (lambda arrays: {a: arrays["a"], b: arrays["b"]}), (lambda arrays: {"a": arrays[a], "b": arrays[b]})

    script = [split(g) for g in SCRIPT]
    settings = config(alpha=0.5, optimizer={"lr": 0.125, "momentum": 0.5, "weight_decay": 0.125})
    rearranged(harness, split({"w": THETA}), [script] * 2, settings, there, back, "tensors renamed")
    # Names that a trainer, or JavaScript, may have a meaning for.
    for pair in (("layers.0.bias", "norm.weight"), ("θ.weight", "constructor"), ("lora_B", "embed_tokens.weight")):
        rearranged(harness, split({"w": THETA}), [script] * 2, settings, *named(*pair), f"tensors renamed to {pair}")


@check("INV-08")
def splitting_a_tensor_changes_nothing(harness: Harness) -> None:
    # g0's halves have equal RMS: up to order and sign they hold the same numbers.
    g0 = np.array([1.0, -2.0, 0.5, 2.0**-12, 2.0**-12, 0.5, 2.0, -1.0])
    script = [{"w": g0}, {"w": g0 * R}, {"w": g0}]

    def joined(arrays: Arrays) -> Arrays:
        return {"w": np.concatenate([arrays["a"], arrays["b"]])}

    rearranged(harness, {"w": THETA}, [script], config(horizon=4), split, joined, "one tensor split in two")


@check("INV-09")
def sessions_do_not_touch_each_other(harness: Harness) -> None:
    momentum = {"lr": 0.125, "momentum": 0.5}
    has_window = declares(harness.capabilities, "gate_baselines:window")
    gates = ({"window": 2}, {"window": 3}) if has_window else ({}, {})
    one = harness.begin({"w": THETA}, config(horizon=4, optimizer=momentum, gate=gates[0]))
    two = harness.begin({"w": -THETA}, config(horizon=5, optimizer=momentum, gate=gates[1]))
    for first, second in ((1.0, 1.0), (0.5, 0.5), (0.75, 0.75), (64.0, 0.75), (1.0, 0.5)):  # 64 trips the first one
        one.step([{"w": g["w"] * first} for g in SCRIPT])
        two.step([{"w": -2.0 * second * g["w"]} for g in SCRIPT])

    if declares(harness.capabilities, "optimizers:adamw"):
        adamw = {"name": "adamw", "lr": 0.0625, "betas": [0.5, 0.75], "eps": 2.0**-10}
        first, second = (harness.begin({"w": THETA}, config(horizon=4, optimizer=adamw)) for _ in range(2))
        for scale in (1.0, 0.5):
            first.step([{"w": g["w"] * scale} for g in SCRIPT])
            second.step([{"w": -4.0 * g["w"]} for g in SCRIPT])
    # Nor do sessions of as many tensors and coordinates, divided otherwise.
    three = harness.begin({"a": THETA[:5], "b": THETA[5:]}, config(horizon=4))
    four = harness.begin({"a": THETA[:2], "b": THETA[2:]}, config(horizon=4))
    g0 = G0 * np.array([1024.0, 1024.0, 1.0, 1.0, 1.0, 2.0**-10, 2.0**-10, 2.0**-10])
    for run, cut in ((three, 5), (four, 2), (three, 5)):
        run.step([{"a": g[:cut], "b": g[cut:]} for g in (g0, g0 * R, g0 * 0.5)])


@check("INV-10", coarse=True)
def the_same_inputs_give_the_same_bits(harness: Harness) -> None:
    settings = config(alpha=0.5, optimizer={"lr": 0.1})
    first = points(harness, {"w": THETA}, settings, [SCRIPT] * 3)
    same(first, points(harness, {"w": THETA}, settings, [SCRIPT] * 3), "the same run again", harness)
