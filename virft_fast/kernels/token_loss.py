"""The loss of one token and its derivatives; the only torch code for GRPO's formulas.

`triton_rows.token_loss` is the GPU version; tests/test_triton.py checks that both agree.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from virft_fast.kernels.loss_args import LossArgs

# Above it, exp continues as its tangent: finite, and the gradient keeps its size and sign.
MAX_EXPONENT = 20.0


class TokenLoss(NamedTuple):
    """Results per token, before the reduction's weight.

    Attributes:
        loss: policy term + beta * KL term.
        d_log_ratio, d_logp: derivatives of the loss in the log-ratio and in the log-prob itself.
        kl: KL estimate against the reference, 0 without one.
        clipped_low, clipped_high: bool; the ratio is clipped below with a negative advantage, or
            above with a positive one.
    """

    loss: Tensor
    d_log_ratio: Tensor
    d_logp: Tensor
    kl: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def token_loss(
    logp: Tensor,
    log_ratio: Tensor,
    ref_logp: Tensor | None,
    advantage: Tensor,
    args: LossArgs,
    *,
    weight: Tensor | None = None,
    phi: Tensor | None = None,
) -> TokenLoss:
    """The loss of each token, for flat tensors of one dtype.

    Args:
        args: names and numbers as in `grpo_loss`.
        weight: factor of the policy term, or None.
        phi: vespo's factor of the log-prob.
    """
    ratio, d_ratio = _exp(log_ratio)
    if args.loss_type == "sapo":
        policy = _soft(ratio, d_ratio, advantage, args)
    elif args.loss_type in ("cispo", "vespo"):
        policy = _weighted(ratio, logp, advantage, args.upper_epsilon, phi)
    else:
        policy = _clipped(ratio, d_ratio, advantage, args)
    loss, d_log_ratio, d_logp, clipped_low, clipped_high = policy
    if weight is not None:
        loss, d_log_ratio, d_logp = loss * weight, d_log_ratio * weight, d_logp * weight
    estimate = torch.zeros_like(loss)
    if ref_logp is not None:
        beta = args.beta
        estimate, d_estimate = kl_estimate(logp, ref_logp, args.kl)
        if args.use_bias_correction_kl:
            if beta > 0:
                d_log_ratio = d_log_ratio + beta * estimate * d_ratio
            estimate, d_estimate = estimate * ratio, d_estimate * ratio
        if beta > 0:
            loss = loss + beta * estimate
            d_logp = d_logp + beta * d_estimate
    return TokenLoss(loss, d_log_ratio, d_logp, estimate, clipped_low, clipped_high)


Policy = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # of a TokenLoss, all but the KL


def _clipped(ratio: Tensor, d_ratio: Tensor, advantage: Tensor, args: LossArgs) -> Policy:
    """The smaller of the free and the clipped ratio's objectives."""
    low, high = 1 - args.epsilon_low, 1 + args.upper_epsilon
    clipped = ratio.clamp(low, high)
    inside = (ratio >= low) & (ratio <= high)
    below_delta = torch.ones_like(inside)
    if args.delta is not None:
        below_delta = ratio <= args.delta
        ratio = ratio.clamp(max=args.delta)
    free, bound = ratio * advantage, clipped * advantage
    loss = -torch.minimum(free, bound)
    # The smaller branch gets the gradient; equal ones share it, as in autograd's minimum.
    share = 0.5 * ((free <= bound).to(loss) + (free < bound).to(loss))
    slope = share * below_delta + (1 - share) * inside
    clipped_low, clipped_high = (ratio < low) & (advantage < 0), (ratio > high) & (advantage > 0)
    d_logp = torch.zeros_like(loss)
    return loss, -advantage * d_ratio * slope, d_logp, clipped_low, clipped_high


def _weighted(
    ratio: Tensor, logp: Tensor, advantage: Tensor, cap: float, phi: Tensor | None
) -> Policy:
    """The log-prob times a constant: cispo's capped ratio, or vespo's `phi`."""
    factor = ratio.clamp(max=cap) if phi is None else phi
    zero, never = torch.zeros_like(ratio), torch.zeros_like(ratio, dtype=torch.bool)
    above = never if phi is not None else (ratio > cap) & (advantage > 0)
    return -factor * advantage * logp, zero, -factor * advantage, never, above


def _soft(ratio: Tensor, d_ratio: Tensor, advantage: Tensor, args: LossArgs) -> Policy:
    """sapo's sigmoid of the ratio, with slope 1 at a ratio of 1."""
    positive = advantage > 0
    t = by_sign(positive, args.sapo_temperature_pos, args.sapo_temperature_neg, ratio)
    gate, never = torch.sigmoid(t * (ratio - 1)), torch.zeros_like(positive)
    # 1 - gate would lose its digits where the gate is almost 1.
    d_log_ratio = -advantage * d_ratio * (4 * gate * torch.sigmoid(t * (1 - ratio)))
    return -gate * 4 / t * advantage, d_log_ratio, torch.zeros_like(ratio), never, never


def by_sign(positive: Tensor, above: float, below: float, like: Tensor) -> Tensor:
    """One of two numbers for each token, in the dtype of `like`."""
    return torch.full_like(like, below).masked_fill(positive, above)


def kl_estimate(logp: Tensor, ref_logp: Tensor, kl: str) -> tuple[Tensor, Tensor]:
    """The KL estimate against the reference and its derivative in `logp`, with d = ref - logp."""
    d = ref_logp - logp
    if kl == "k1":
        return -d, torch.ones_like(d)
    if kl == "k2":
        return 0.5 * d.square(), -d
    value, slope = _exp(d)
    return value - d - 1, 1 - slope


def _exp(x: Tensor) -> tuple[Tensor, Tensor]:
    """exp, continued by its tangent above MAX_EXPONENT, and its derivative."""
    bounded = x.clamp(max=MAX_EXPONENT)
    slope = bounded.exp()
    return slope * (1 + (x - MAX_EXPONENT).clamp(min=0)), slope  # 0 at -inf
