"""Which awkward runs show which clause: what they vary, what happens in them, what of a step is judged.

A clause's runs vary what is settled before it in SPEC.md's order and what it is itself about, nothing that a later one
is about, so that a mistake fails first the clause that it belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gxpo_conformance.runs.build import TARGETS, Event
from gxpo_conformance.runs.dice import Dice
from gxpo_conformance.runs.levels import FACTORS, Levels, covering

ALL = FACTORS
NUMBERS = {"numbers": ("usual", "odd"), "start": ALL["start"]}
SMALL = {"sizes": ("few", "one", "scalar", "several", "empty"), "scale": ("unit", "small", "mixed")}
STATEFUL = {"optimizer": ("momentum", "adamw"), "decay": (False, True)}
OPTIMIZERS = {"optimizer": ALL["optimizer"], "decay": (False, True)}
STEP = {"horizon": (5, 2, 4, 7, 20), "alpha": (0.5, 0.8, 0.3, 1.0)}
POLICY = {"policy": ALL["policy"]}
CLIP = {"clip": ("off", "all", "some", "at")}
SCORE = {"window": ALL["window"], "threshold": ALL["threshold"], **NUMBERS}
WATCHED = {"statistic": ("corrective_norm", "initial_norm", "disagreement", "supplied"), "baseline": ALL["baseline"]}
GATE = {k: ALL[k] for k in ("patience", "two_sided", "warmup", "cooldown", "max_active_steps")}
ANYTHING = {**NUMBERS, **SMALL, **OPTIMIZERS, **STEP, **POLICY, **CLIP, **SCORE, **WATCHED, **GATE}

COUNTED = {**NUMBERS, **SCORE, **WATCHED, "sizes": ("few", "several"), "clip": ("off", "all")}  # what the gate shows

# A mix of what the gate is to see: weights by the names of TARGETS.
MILD = {"calm": 4.0, "below": 3.0, "above": 1.0, "low": 1.0, "not so low": 0.5}
LIVELY = {"calm": 2.0, "below": 2.0, "above": 3.0, "far": 0.5, "low": 1.0, "not so low": 0.5}
CALM = {"calm": 1.0}
NON_ZERO = {"": 6.0, "zero": 1.0}
RESUMED = {"": 1.5, "resume": 1.0}


@dataclass(frozen=True)
class Focus:
    """The awkward runs of one clause. `odd`: weights of accidents, "" for none; `must`: accidents, one of which every
    run has at its third step at the latest."""

    vary: dict[str, tuple[Any, ...]]
    rows: int = 6
    steps: int = 1
    judge: str = "all"
    targets: dict[str, float] = field(default_factory=lambda: CALM)
    odd: dict[str, float] = field(default_factory=lambda: {"": 1.0})
    at: tuple[int, ...] = (0, 1, 2)  # gradients that accidents happen in
    must: tuple[str, ...] = ()
    untidy: bool = False

    def plan(self, key: str) -> list[tuple[Levels, tuple[Event, ...]]]:
        """(levels, events) of every run. `key`: of the dice."""
        rows = covering(key, tuple(self.vary.items()), self.rows)
        return [(row, self.events(Dice(key, n, "events"))) for n, row in enumerate(rows)]

    def events(self, dice: Dice) -> tuple[Event, ...]:
        due = int(dice.number(0, min(3, self.steps)))
        made = []
        for n in range(self.steps):
            odd = dice.choice(self.must) if self.must and n == due else dice.weighted(self.odd)
            made.append(Event(n, dice.weighted(self.targets), odd, dice.choice(self.at)))
        return tuple(made)


def gate(*own: str, rows: int = 5, steps: int = 12, **more: Any) -> Focus:
    """A clause about the gate: its own factors never at their simplest, those of SCORE varied, counts judged."""
    vary: dict[str, tuple[Any, ...]] = {**SCORE, "sizes": ("few", "one", "several")}
    vary |= {name: ALL[name][1:] for name in own}
    vary |= more.pop("vary", {})
    return Focus(vary, rows, steps, "counts", more.pop("targets", LIVELY), more.pop("odd", NON_ZERO), (0,), **more)


def accident(*must: str, at: tuple[int, ...] = (0, 1, 2), rows: int = 7, steps: int = 8, **more: Any) -> Focus:
    return Focus(ANYTHING, rows, steps, "all", LIVELY, {"": 4.0, **dict.fromkeys(must, 1.0)}, at, must, **more)


def streak(odd: str) -> Focus:
    """Accidents in the middle of streaks, and where an observation would have been made."""
    vary = {**COUNTED, "patience": (2, 3, 1), "cooldown": (None, 0, 1), "two_sided": (False, True)}
    return Focus(vary, 7, 13, "counts", {"above": 3.0, "calm": 1.0, "below": 1.0}, {"": 2.0, odd: 1.0})


def counting(odd: str) -> Focus:
    """Accidents while something is counted: warm-up, cooldown, the budget of active steps."""
    vary = {**COUNTED, "warmup": (0, 1, 2, 3), "cooldown": ALL["cooldown"], "max_active_steps": (None, 1, 2, 4, 6)}
    return Focus(vary, 8, 13, "counts", LIVELY, {"": 2.0, odd: 1.0})


def policy(**own: tuple[Any, ...]) -> Focus:
    """What becomes of the optimizer's state, through single passes as well."""
    vary = {**NUMBERS, **STEP, "decay": (False, True), "window": (2, 3), "sizes": ("few", "several"), **own}
    return Focus(vary, 8, 7, "all", MILD, NON_ZERO, (0,))


def resumed(**own: tuple[Any, ...]) -> Focus:
    vary = {**NUMBERS, **STEP, **POLICY, "decay": (False, True), "sizes": ("few", "several"), **own}
    return Focus(vary, 6, 6, "all", MILD, RESUMED, must=("resume",))


EVEN, ODD = (4, 6, 10, 20, 80), (3, 5, 7, 33)
FINE = {"numbers": ("odd", "usual"), "start": ALL["start"]}
SHAPED = {**FINE, "sizes": ALL["sizes"]}
FEW = {"sizes": ("few", "several")}
# Two sets of runs for a clause are told apart by what follows the stroke.
FOCUS: dict[str, Focus] = {
    "EST-01": Focus(
        {**FINE, "horizon": (5, 4, 7, 10), "sizes": ("few", "one", "scalar", "several"), "scale": ALL["scale"]},
        8,
        judge="fast steps",
    ),
    "EST-02": Focus(
        {**FINE, "horizon": (5, 4), "sizes": ("thousands", "few", "hundreds", "empty")}, 8, 2, judge="fast steps"
    ),
    "EST-03": Focus(
        {**FINE, "horizon": (5, 4), "sizes": ("few", "several", "empty", "thousands"), "scale": ("mixed",)},
        6,
        judge="fast steps",
    ),
    "EST-10": Focus(
        {**SHAPED, **STATEFUL, "estimator": ("displacement",), "horizon": (5, 4, 10)}, 8, 3, judge="fast steps"
    ),
    "EST-11": Focus(
        {**FINE, **OPTIMIZERS, "estimator": ("displacement",), "horizon": (5, 4), "scale": ("unit", "mixed")}
        | {"sizes": ("few", "several", "hundreds")},
        8,
        3,
        judge="fast steps",
    ),
    "EST-12": Focus(
        {**SHAPED, **OPTIMIZERS, "estimator": ("tensor",), "horizon": (5, 4, 10), "scale": ALL["scale"]},
        8,
        3,
        judge="fast steps",
    ),
    "EXT-01": Focus({**FINE, **FEW, "horizon": EVEN, "ratios": ALL["ratios"]}, 8, judge="fast steps"),
    "EXT-02": Focus({**FINE, **FEW, "horizon": ODD, "ratios": ALL["ratios"]}, 8, judge="fast steps"),
    "MOV-02": Focus(
        {
            **FINE,
            "horizon": (5, 2, 4, 20),
            "alpha": ALL["alpha"],
            "scale": ("unit", "small"),
            "sizes": ("few", "empty"),
        },
        8,
        judge="fast steps",
    ),
    "MOV-04": Focus({**FINE, **STEP, **STATEFUL, "sizes": ("few", "scalar", "empty")}, 8, judge="fast steps"),
    "COR-01": Focus({**SHAPED, **STEP, "scale": ALL["scale"]}, 6, 2),
    "CLP-01": Focus(
        {**SHAPED, "horizon": (2,), "alpha": (1.0, 0.5), "clip": ("all", "some", "at", "loose"), "scale": ALL["scale"]},
        8,
        2,
    ),
    "CLP-02": Focus(
        {**FINE, **FEW, **STEP, **OPTIMIZERS, "clip": ("all", "some", "at"), "estimator": ALL["estimator"]}, 10, 2
    ),
    "CLP-03": gate(rows=5, vary={"clip": ("all", "some"), **FEW}),
    "CLP-04": Focus(
        {**FINE, **FEW, **OPTIMIZERS, "clip": ("all", "some", "at"), "window": (2, 3)},
        6,
        8,
        targets={"calm": 1, "above": 2},
    ),
    "OPT-01": Focus({**SHAPED, "scale": ALL["scale"]}, 6, 2, "update"),
    "OPT-02": Focus(
        {**FINE, "optimizer": ("momentum", "sgd"), "decay": (True, False), "horizon": (2,)}
        | {"sizes": ("few", "several", "empty", "scalar")},
        8,
        judge="fast steps",
    ),
    "OPT-03": Focus(
        {**SHAPED, "optimizer": ("adamw",), "horizon": (2,), "decay": (True, False), "scale": ALL["scale"]},
        8,
        judge="fast steps",
    ),
    "OPT-04": policy(optimizer=("momentum",), policy=("keep",)),
    "OPT-05": policy(optimizer=("momentum",), policy=("restore",)),
    "OPT-06": policy(optimizer=("adamw",), policy=ALL["policy"], estimator=ALL["estimator"]),
    "GAT-01": gate(rows=6),
    "GAT-03": gate(rows=5, targets=MILD),
    "GAT-05": gate(rows=4, targets={"calm": 2, "low": 2, "not so low": 1, "below": 1}),
    "GAT-06": gate(rows=5, steps=20, targets={"calm": 2, "below": 3, "low": 0.5, "above": 0.2}),
    "GAT-07": gate(rows=5, vary={"sizes": ("several", "few", "empty", "hundreds"), "scale": ("unit", "mixed")}),
    "GAT-08": Focus({**SCORE, **FEW, **OPTIMIZERS}, 8, 9, "all", LIVELY, NON_ZERO, (0,)),
    "GAT-10": gate("patience", rows=6),
    "GAT-11": gate("patience", rows=4, targets={"above": 3, "calm": 1, "below": 1}),
    "GAT-12": gate("patience", rows=5, steps=20, targets={"above": 3, "calm": 1, "below": 1}),
    "GAT-13": gate(
        "two_sided", vary={"patience": (1, 2)}, targets={"calm": 2, "low": 2, "not so low": 2, "below": 1, "above": 1}
    ),
    "GAT-14": gate("warmup", rows=5, vary={"two_sided": (False, True), "patience": (1, 2)}),
    "GAT-15": gate("cooldown", rows=5, steps=18, vary={"warmup": (0, 2), "two_sided": (False, True)}),
    "GAT-16": gate("cooldown", rows=4, steps=18, vary={"patience": (1, 2)}),
    "GAT-17": gate("max_active_steps", rows=5, vary={"warmup": (0, 3), "statistic": ("corrective_norm", "never")}),
    "GAT-18": gate("baseline", rows=7, vary={"warmup": (0, 2), "two_sided": (False, True), "cooldown": (None, 2)}),
    "GAT-19": gate(
        "baseline",
        rows=6,
        steps=18,
        vary={"numbers": ("odd",), "two_sided": (True, False), "threshold": (0.6, 1.3)},
        targets={"calm": 3, "low": 1.5, "not so low": 1, "below": 1},
    ),
    "GAT-20": gate(
        rows=6,
        vary={
            "statistic": ("initial_norm",),
            "baseline": ALL["baseline"],
            "clip": ("off", "all"),
            "cooldown": (None, 2),
        }
        | {"sizes": ("few", "several", "thousands"), "scale": ("unit", "mixed")},
    ),
    "GAT-21": gate(
        rows=6,
        vary={"statistic": ("disagreement",), "baseline": ALL["baseline"], "clip": ("off", "all")}
        | {"sizes": ("few", "several", "hundreds"), "scale": ("unit", "tiny", "mixed")},
    ),
    "GAT-22": gate(rows=4, vary={"statistic": ("never",), **GATE}),
    "GAT-23": gate("baseline", "patience", rows=5, vary={"two_sided": (False, True)}),
    "GAT-24": gate("cooldown", "patience", rows=5, steps=18, targets={"above": 3, "calm": 1, "below": 1}),
    "GAT-25": gate(
        rows=6,
        steps=20,
        vary={"cooldown": (0, 1, 2), "max_active_steps": (1, 2, 4, 6), "patience": (1, 2), "warmup": (0, 2)},
    ),
    "GAT-26": gate(rows=5, vary={"statistic": ("supplied",), "baseline": ALL["baseline"], **GATE}),
    "NUM-01": Focus(ANYTHING, 8, 9, "all", LIVELY, {"": 3.0, "zero": 1.0}, (0, 1, 2), ("zero",)),
    "NUM-01/streak": streak("zero"),
    "NUM-01/count": counting("zero"),
    "NUM-02": accident("gradient", at=(0,)),
    "NUM-03": accident("gradient", at=(1,)),
    "NUM-04": accident("gradient", at=(2,)),
    "NUM-05": accident("loss", "zero and loss", rows=7),
    "NUM-05/streak": streak("loss"),
    "NUM-06": streak("gradient"),
    "NUM-06/count": counting("gradient"),
    "ATM-01": Focus(
        {**NUMBERS, **SMALL, **OPTIMIZERS, **STEP, **POLICY, **CLIP}, 6, 6, odd={"": 3.0, "raise": 1.0}, must=("raise",)
    ),
    "ATM-02": accident("raise", rows=7),
    "ATM-03": streak("raise"),
    "ATM-03/count": counting("raise"),
    "ATM-04": accident("interrupt", rows=6),
    "CST-01": gate(rows=5, vary={"horizon": (2, 4, 7, 33), "alpha": (0.5, 0.0, 1.0)}),
    "DEV-01": Focus({**SHAPED, **STEP, **OPTIMIZERS, **CLIP, "scale": ALL["scale"]}, 8, 2),
    "DEV-03": Focus({**STEP, **OPTIMIZERS, **CLIP, "sizes": ("several", "few", "scalar")}, 5, 2, untidy=True),
    "DEV-03/gate": gate(rows=5, vary={**WATCHED, "sizes": ("several", "few")}, untidy=True),
    "CKP-01": gate(rows=5, steps=18, targets=MILD, odd=RESUMED, must=("resume",)),
    "CKP-02": gate("patience", rows=5, steps=16, odd=RESUMED, must=("resume",)),
    "CKP-02/ema": gate(
        "baseline", "patience", rows=5, steps=14, targets={"above": 2, "calm": 1, "below": 1}, odd=RESUMED
    ),
    "CKP-03": gate(rows=4, odd=RESUMED, must=("resume",)),
    "CKP-04": resumed(optimizer=("sgd", "momentum")),
    "CKP-05": gate("max_active_steps", rows=5, odd={**RESUMED, "zero": 0.7, "gradient": 0.7}, must=("resume",)),
    "CKP-06": gate("baseline", rows=5, steps=16, vary={"patience": (1, 2, 3)}, odd=RESUMED, must=("resume",)),
    "CKP-07": gate("cooldown", rows=5, steps=16, odd=RESUMED, must=("resume",)),
    "CKP-08": gate("warmup", rows=5, odd={**RESUMED, "zero": 0.7, "gradient": 0.7}, must=("resume",)),
    "CKP-09": resumed(optimizer=("adamw",)),
    "CKP-10": Focus(ANYTHING, 9, 9, "all", LIVELY, {"": 2.0, "resume": 1.0}, must=("resume",)),
}
assert all(set(f.targets) <= set(TARGETS) for f in FOCUS.values())

ACCIDENTS = {"zero": "", "gradient": "nonfinite_gradients", "loss": "nonfinite_losses"}
ACCIDENTS |= {"zero and loss": "nonfinite_losses"}
ACCIDENTS |= {"raise": "exceptions", "interrupt": "exceptions", "resume": "checkpoint"}  # and what each needs
RANDOM_STEPS = (4, 10)


def random_run(name: str, options: bool) -> tuple[Levels, tuple[Event, ...], str, bool]:
    """(levels, events, judge, untidy) of the random run of that name. `options`: over all that a port may declare, or
    the core alone."""
    dice = Dice(name, "random")
    core = {"numbers", "horizon", "alpha", "window", "threshold", "sizes", "scale", "start", "ratios"}
    levels: Levels = {}
    for factor, among in FACTORS.items():
        if not options and factor not in core:
            among = among[:2] if factor == "optimizer" else among if factor in ("decay", "policy") else among[:1]
        if factor == "sizes":
            among = (
                "few",
                "one",
                "scalar",
                "several",
                "empty",
                *(("hundreds", "thousands") if dice.chance(0.06) else ()),
            )
        if factor == "horizon" and dice.chance(0.6):
            among = among[:6]
        varied = dice.chance(0.3 if factor == "max_active_steps" else 0.7)
        levels[factor] = dice.choice(among) if varied else among[0]
    targets = dice.choice([MILD, LIVELY, LIVELY])
    odd = {"": 7.0, "zero": 1.0}
    if options:
        odd |= dict.fromkeys(ACCIDENTS, 0.8)
    events = []
    for n in range(int(dice.number(*RANDOM_STEPS))):
        events.append(Event(n, dice.weighted(targets), dice.weighted(odd), int(dice.number(0, 3))))
    return levels, tuple(events), "all", dice.chance(0.3)
