"""Group-relative advantages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from virft_fast.kernels.loss_args import check_tensors, check_type

SCALES = ("group", "batch", "none")
ESTIMATORS = ("grpo", "rloo", "reinforce_pp")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
ADVANTAGE_EPS = 1e-4  # as in TRL 1.16


def group_advantages(
    rewards: Tensor,
    num_generations: int,
    *,
    scale_rewards: str = "group",
    advantage_estimator: str = "grpo",
    eps: float = ADVANTAGE_EPS,
) -> Tensor:
    """Rewards centered in their group and divided by a standard deviation.

    With r a row's reward and n the number of rows of its group, `advantage_estimator` is one of:

    - "grpo": (r - mean of the group) / (std + eps), with the std that `scale_rewards` names.
    - "rloo": r - mean of the group's other rows = n / (n - 1) * (r - mean of the group).
    - "reinforce_pp": (r - mean of the group) / (std + eps), where std is that of the numerators in
      the whole batch: the baseline variant of REINFORCE++. Pass the rewards of all ranks.

    Args:
        rewards: (N,) floating point, prompt-major: N is a multiple of `num_generations`. A row with
            a non-finite reward is excluded from every mean and std.
        num_generations: completions per prompt.
        scale_rewards: divide by the std of the "group" or of the whole "batch", or by nothing
            ("none"). The std is unbiased (n - 1), plus `eps`. Only "grpo" uses it.
        eps: above 0.
    Returns:
        (N,) float32 (float64 for float64 rewards), not differentiable. Exactly 0 for excluded rows,
        for a group whose rewards are all equal, and for the only scored row of a group.
    Raises:
        ValueError: shape, dtype, `num_generations`, `scale_rewards`, `advantage_estimator` or
            `eps`.
    NaN is handled as in TRL 1.16. For an infinite reward, TRL drops the whole group; here, only its
    row is excluded.
    Sources: GRPO, Shao et al. 2024, arXiv:2402.03300, section 4.1; RLOO, Ahmadian et al. 2024,
    arXiv:2402.14740, as TRL's RLOOTrainer without its KL penalty; REINFORCE++, Hu et al. 2025,
    arXiv:2501.03262, as `reinforce_plus_plus` in ms-swift and `reinforce_baseline` in OpenRLHF.
    """
    check_rewards(rewards, num_generations)
    if scale_rewards not in SCALES:
        raise ValueError(f"scale_rewards: expected one of {SCALES}, got {scale_rewards!r}")
    if advantage_estimator not in ESTIMATORS:
        raise ValueError(
            f"advantage_estimator: expected one of {ESTIMATORS}, got {advantage_estimator!r}"
        )
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
    if advantage_estimator == "rloo":
        centred = centred * (count / (count - 1).clamp(min=1))
    elif advantage_estimator == "reinforce_pp":
        centred = centred / (_std(centred, scored) + eps)
    elif scale_rewards == "group":
        std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (std + eps)
    elif scale_rewards == "batch":
        centred = centred / (_std(groups, scored) + eps)
    return centred.view(-1)


def normalize_then_sum(
    rewards: Tensor, weights: Sequence[float], num_generations: int, *, eps: float = ADVANTAGE_EPS
) -> Tensor:
    """Advantages of several rewards, each normalized in its group before they are summed.

    A = S / (std(S) + eps), where S is the weighted sum of `group_advantages` of each reward, and
    std that of all rows in the batch. A reward with a wide range can't hide the others, and a group
    whose rewards differ but have equal sums has advantages, too.

    Args:
        rewards: (N, R) floating point, prompt-major, the rows of all ranks; not finite where a
            function gave none.
        weights: R numbers.
    Returns:
        (N,), as from `group_advantages`; exactly 0 for rows without any reward.
    Raises:
        ValueError: see `group_advantages`; or there is not one weight for each reward.
    Equals `multi_objective_aggregation="normalize_then_sum"` in TRL 1.16, which also subtracts the
    mean of S: 0, except for rounding. Source: GDPO, Liu et al. 2026, arXiv:2601.05242.
    """
    if rewards.ndim != 2 or rewards.shape[1] != len(weights):
        raise ValueError(
            f"rewards: expected (N, {len(weights)}), one column for each weight, got "
            f"{tuple(rewards.shape)}"
        )
    columns = [group_advantages(column, num_generations, eps=eps) for column in rewards.T]
    each = torch.stack(columns, 1)  # (N, R)
    total = (each * each.new_tensor(weights)).sum(1)
    return total / (_std(total, rewards.isfinite().any(1)) + eps)


def _std(values: Tensor, valid: Tensor) -> Tensor:
    """Unbiased std of the valid entries, 0-d; 0 if there are fewer than two."""
    count = valid.sum()
    mean = torch.where(valid, values, 0.0).sum() / count.clamp(min=1)
    squares = torch.where(valid, values - mean, 0.0).square().sum()
    return (squares / (count - 1).clamp(min=1)).sqrt()


def check_rewards(rewards: Tensor, num_generations: int) -> None:
    """Raise ValueError unless rewards are (N,) floating point, in groups of `num_generations`."""
    check_tensors(rewards=rewards)
    if rewards.ndim != 1 or not rewards.is_floating_point():
        raise ValueError(
            f"rewards: expected (N,) floating point, got {tuple(rewards.shape)} {rewards.dtype}; "
            "flatten prompt-major, sum over reward functions first"
        )
    check_type("num_generations", num_generations, "int")
    if num_generations < 1 or rewards.shape[0] % num_generations:
        raise ValueError(
            f"num_generations: expected a divisor of the {rewards.shape[0]} rewards, got "
            f"{num_generations}; every prompt needs as many completions"
        )
