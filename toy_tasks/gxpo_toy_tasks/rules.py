"""The update rules that are compared, by name."""

from __future__ import annotations

from gxpo import Gate
from gxpo_toy_tasks.engine import Rule


def rules(horizon: int, alpha: float) -> dict[str, Rule]:
    """Every rule that can be compared. grpo-scaled is the control: plain GRPO, as far a step as GXPO's where nothing
    bends."""
    gxpo_like = {"fast": 2, "horizon": horizon, "alpha": alpha}
    entropy = Gate("supplied", window=30, threshold=1.0, patience=1, two_sided=True)
    made = [
        Rule("grpo"),
        Rule("grpo-epochs", epochs=3),
        Rule("grpo-scaled", lr_times=alpha * horizon + 1),
        Rule("sfpo", fast=3, horizon=3, alpha=0.8, gate=entropy),
        Rule("lookahead", fast=horizon, horizon=horizon, alpha=alpha),
        Rule("gxpo", estimator="gradient", **gxpo_like),
        Rule("gxpo-displacement", estimator="displacement", **gxpo_like),
        Rule("gxpo-tensor", estimator="tensor", **gxpo_like),
        Rule("gxpo-restore", estimator="gradient", optimizer_state="restore", **gxpo_like),
        Rule("gxpo-gate", estimator="gradient", gate=Gate(), **gxpo_like),
    ]
    return {rule.name: rule for rule in made}


ABOUT = {
    "grpo": "plain GRPO, one pass",
    "grpo-epochs": "three plain steps on each batch",
    "grpo-scaled": "plain GRPO at lr x (alpha K + 1), the control",
    "sfpo": "SFPO as released: K = 3, alpha 0.8, entropy gate",
    "lookahead": "K real steps, then as GXPO: SFPO at GXPO's K, no gate",
    "gxpo": "GXPO, gate off",
    "gxpo-displacement": "GXPO, r from what the optimizer did",
    "gxpo-tensor": "the same, one number a tensor",
    "gxpo-restore": "GXPO, the fast steps leave no trace in the optimizer's state",
    "gxpo-gate": "GXPO with the default gate",
}
USUAL = ("grpo", "grpo-epochs", "grpo-scaled", "sfpo", "lookahead", "gxpo", "gxpo-gate")
