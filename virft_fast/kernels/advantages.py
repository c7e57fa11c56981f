"""Group-relative advantages."""

from __future__ import annotations

import torch
from torch import Tensor

SCALES = ("group", "batch", "none")
ADVANTAGE_EPS = 1e-4  # as in TRL 1.16


def group_advantages(
    rewards: Tensor,
    num_generations: int,
    *,
    scale_rewards: str = "group",
    eps: float = ADVANTAGE_EPS,
) -> Tensor:
    """Rewards centered in their group and divided by a standard deviation.

    Args:
        rewards: (N,) floating point, prompt-major: N is a multiple of `num_generations`. A row with
            a non-finite reward is excluded from every mean and std.
        num_generations: completions per prompt.
        scale_rewards: divide by the std of the "group" or of the whole "batch", or by nothing
            ("none"). The std is unbiased (n - 1), plus `eps`.
        eps: above 0.
    Returns:
        (N,) float32 (float64 for float64 rewards), not differentiable. Exactly 0 for excluded rows,
        for a group whose rewards are all equal, and for the only scored row of a group.
    Raises:
        ValueError: shape, dtype, `num_generations`, `scale_rewards` or `eps`.
    NaN is handled as in TRL 1.16. For an infinite reward, TRL drops the whole group; here, only its
    row is excluded.
    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.
    """
    check_rewards(rewards, num_generations)
    if scale_rewards not in SCALES:
        raise ValueError(f"scale_rewards: expected one of {SCALES}, got {scale_rewards!r}")
    if not eps > 0:
        raise ValueError(f"eps: expected > 0, got {eps}; it keeps the division finite")
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    groups = rewards.detach().to(dtype).view(-1, num_generations)  # (B, G)
    scored = groups.isfinite()
    count = scored.sum(1, keepdim=True)
    mean = torch.where(scored, groups, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(scored, groups - mean, 0.0)
    # The rounded mean of equal rewards can be off by an ulp, which eps would magnify to 1e-3.
    inf = float("inf")
    highest = torch.where(scored, groups, -inf).amax(1, keepdim=True)
    lowest = torch.where(scored, groups, inf).amin(1, keepdim=True)
    centred = torch.where(highest > lowest, centred, 0.0)
    if scale_rewards == "group":
        std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (std + eps)
    elif scale_rewards == "batch":
        centred = centred / (_std(groups, scored) + eps)
    return centred.view(-1)


def _std(values: Tensor, valid: Tensor) -> Tensor:
    """Unbiased std of the valid entries, 0-d; 0 if there are fewer than two."""
    count = valid.sum()
    mean = torch.where(valid, values, 0.0).sum() / count.clamp(min=1)
    squares = torch.where(valid, values - mean, 0.0).square().sum()
    return (squares / (count - 1).clamp(min=1)).sqrt()


def check_rewards(rewards: Tensor, num_generations: int) -> None:
    """Raise ValueError unless rewards are (N,) floating point, in groups of `num_generations`."""
    if rewards.ndim != 1 or not rewards.is_floating_point():
        raise ValueError(
            f"rewards: expected (N,) floating point, got {tuple(rewards.shape)} {rewards.dtype}; "
            "flatten prompt-major, sum over reward functions first"
        )
    if num_generations < 1 or rewards.shape[0] % num_generations:
        raise ValueError(
            f"num_generations: expected a divisor of the {rewards.shape[0]} rewards, got "
            f"{num_generations}; every prompt needs as many completions"
        )
