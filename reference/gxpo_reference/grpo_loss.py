"""The GRPO loss as people use it, on per-token log-probabilities: group advantages, clipped ratio, k3 KL estimate.

    advantages = group_advantages(rewards).flatten()                # (groups, responses) -> (batch,)
    old_logps = policy(batch)                                       # once per outer step, at theta0
    loss, metrics = grpo_loss(policy(batch), old_logps, advantages, mask)

Source: DeepSeekMath, arXiv 2402.03300, equations 3 and 4; defaults and conventions as in TRL's GRPOTrainer with
loss_type="grpo".
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """(r - mean) / (std + 1e-4) within each group; rewards and result: (groups, responses).

    std is the sample one, as in TRL (torch.std). scale=False leaves it at r - mean (Dr. GRPO, arXiv 2503.20783).
    All-equal rewards give exact zeros. ValueError for another shape, or fewer than two responses.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards must have shape (groups, responses), responses at least 2, got {tuple(rewards.shape)}"
        )
    if not rewards.is_floating_point():
        rewards = rewards.float()
    # The mean of three 0.1 is not 0.1 in floating point; measured from the first reward, equal rewards are exact.
    advantages = rewards - rewards[:, :1]
    advantages = advantages - advantages.mean(dim=1, keepdim=True)
    return advantages / (rewards.std(dim=1, keepdim=True) + 1e-4) if scale else advantages


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    clip: float = 0.2,
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics), where a token costs -min(ratio A, clamp(ratio, 1 - clip, 1 + clip) A) + beta kl.

        ratio = exp(logps - old_logps)          kl = exp(ref_logps - logps) - (ref_logps - logps) - 1     (k3)

    logps: (batch, tokens), in nats, the only argument that gradients flow to. old_logps: the same shape, those of the
    policy that sampled, at theta0, for **all three passes** of a GXPO step: store them before the step. A loss that
    recomputes them on every pass has ratio 1 everywhere, so nothing is ever clipped: another loss.
    advantages: (batch,), one per response. mask: (batch, tokens), nonzero at a response's own tokens; what
    lies elsewhere does not matter, non-finite values included. None: every token counts.
    ref_logps: (batch, tokens), the fixed reference policy's; needed for beta > 0, with beta = 0 only a metric.

    Averaged over the tokens of a response, then over responses: GRPO's original, length-normalised form (TRL's
    loss_type="grpo"). A response without tokens adds 0 and is still counted.

    metrics, detached scalars averaged like the loss: "clip_fraction", tokens whose gradient the clip takes away;
    "ratio_mean"; "kl", only with ref_logps. Raises ValueError for a shape or a value out of bounds.
    """
    if logps.ndim != 2 or not logps.shape[0]:
        raise ValueError(f"logps must have shape (batch, tokens), batch at least 1, got {tuple(logps.shape)}")
    wanted = {"old_logps": (old_logps, logps.shape), "advantages": (advantages, logps.shape[:1])}
    wanted |= {"mask": (mask, logps.shape), "ref_logps": (ref_logps, logps.shape)}
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)} to fit logps, got {tuple(tensor.shape)}")
    if not clip > 0:
        raise ValueError(f"clip must be greater than 0, got {clip}")
    if not beta >= 0:
        raise ValueError(f"beta must be at least 0, got {beta}")
    if beta and ref_logps is None:
        raise ValueError(f"beta = {beta} needs ref_logps, got None: pass the reference policy's, or beta=0.0")

    tokens = torch.tensor(max(1, logps.shape[1])) if mask is None else mask.bool().sum(dim=1).clamp(min=1)

    def masked(per_token: Tensor) -> Tensor:
        return per_token if mask is None else per_token.masked_fill(~mask.bool(), 0.0)

    def mean(per_token: Tensor) -> Tensor:
        return (masked(per_token).sum(dim=1) / tokens).mean()

    # Masked before exp: padding may hold -inf or nan, and 0 * inf would carry nan into the loss and the gradient.
    ratio = masked(logps - old_logps.detach()).exp()
    advantages = advantages.detach().unsqueeze(1)
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -mean(torch.min(plain, clipped))
    with torch.no_grad():
        metrics = {"clip_fraction": mean((clipped < plain).to(loss.dtype)), "ratio_mean": mean(ratio)}

    if ref_logps is not None:
        apart = masked(ref_logps.detach() - logps)
        kl = mean(torch.expm1(apart) - apart)  # expm1: exp(d) - d - 1 is all rounding for small d
        metrics["kl"] = kl.detach()
        if beta:
            loss = loss + beta * kl
    return loss, metrics
