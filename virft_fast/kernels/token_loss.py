"""The loss of one token and its derivatives; the only torch code for GRPO's formulas.

`triton_rows.token_loss` is the GPU version; tests/test_triton.py checks that both agree.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
    *,
    beta: float,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None,
    capped: bool,
    kl: str,
) -> TokenLoss:
    """The loss of each token, for flat tensors of one dtype. Arguments as in `grpo_loss`; `capped`
    means cispo."""
    ratio, d_ratio = _exp(log_ratio)
    if capped:
        bounded = ratio.clamp(max=epsilon_high)
        loss = -bounded * advantage * logp
        d_log_ratio = torch.zeros_like(loss)
        d_logp = -bounded * advantage
        clipped_low = torch.zeros_like(loss, dtype=torch.bool)
        clipped_high = (ratio > epsilon_high) & (advantage > 0)
    else:
        low, high = 1 - epsilon_low, 1 + epsilon_high
        clipped = ratio.clamp(low, high)
        inside = (ratio >= low) & (ratio <= high)
        below_delta = torch.ones_like(inside)
        if delta is not None:
            below_delta = ratio <= delta
            ratio = ratio.clamp(max=delta)
        free, bound = ratio * advantage, clipped * advantage
        loss = -torch.minimum(free, bound)
        # The smaller branch gets the gradient; equal ones share it, as in autograd's minimum.
        share = 0.5 * ((free <= bound).to(loss) + (free < bound).to(loss))
        slope = share * below_delta + (1 - share) * inside
        d_log_ratio = -advantage * d_ratio * slope
        d_logp = torch.zeros_like(loss)
        clipped_low = (ratio < low) & (advantage < 0)
        clipped_high = (ratio > high) & (advantage > 0)
    estimate = torch.zeros_like(loss)
    if ref_logp is not None:
        estimate, d_estimate = kl_estimate(logp, ref_logp, kl)
        if beta > 0:
            loss = loss + beta * estimate
            d_logp = d_logp + beta * d_estimate
    return TokenLoss(loss, d_log_ratio, d_logp, estimate, clipped_low, clipped_high)


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
    return slope * (1 + (x - bounded)), slope
