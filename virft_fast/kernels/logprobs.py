"""Log-prob of the sampled token and entropy of the distribution, from logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def selective_log_softmax(logits: Tensor, index: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of one token a row.

    Args:
        logits: (..., V) floating point; -inf bans a token.
        index: (...) int64, in [0, V).
        temperature: > 0, divides the logits.
    Returns:
        (...) float32 (float64 for float64 logits), <= 0. Differentiable once, in `logits`.
    Raises:
        ValueError: shapes, index dtype or temperature; says what was expected and what came.
    """
    check_rows(logits, index, temperature)
    return _LogpsAndEntropy.apply(logits, index, temperature, False)[0]


def logps_and_entropy(
    logits: Tensor, index: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of one token a row, and the entropy of the row's distribution in nats.

    Args:
        logits: (..., V) floating point; -inf bans a token.
        index: (...) int64, in [0, V).
        temperature: > 0, divides the logits.
    Returns:
        logps: (...) float32 (float64 for float64 logits), <= 0.
        entropy: (...), same dtype, in [0, log V]. Both differentiable once, in `logits`.
    Raises:
        ValueError: shapes, index dtype or temperature; says what was expected and what came.
    """
    check_rows(logits, index, temperature)
    return _LogpsAndEntropy.apply(logits, index, temperature, True)


def check_rows(logits: Tensor, index: Tensor, temperature: float) -> None:
    """The input checks of both functions above. Values of `index` are not read: that would sync."""
    if logits.ndim < 1 or logits.shape[-1] < 1 or not logits.is_floating_point():
        raise ValueError(
            f"logits: expected (..., V) floating point with V >= 1, got {tuple(logits.shape)} "
            f"{logits.dtype}"
        )
    if index.shape != logits.shape[:-1] or index.dtype != torch.int64:
        raise ValueError(
            f"index: expected {tuple(logits.shape[:-1])} int64, got {tuple(index.shape)} "
            f"{index.dtype}; one token id a row of logits"
        )
    check_temperature(temperature)


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless 0 < temperature < inf."""
    if not 0.0 < temperature < math.inf:
        raise ValueError(
            f"temperature: expected a finite number > 0, got {temperature}; greedy decoding has no "
            "log-probs to train on"
        )


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is, else float32."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def row_forward(scaled: Tensor, index: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Values of both quantities from logits already divided by the temperature.

    `scaled` is (R, V) float32 or float64, `index` (R,); returns (R,) and (R,) or None.
    """
    log_p = scaled.log_softmax(-1)
    logps = log_p.gather(-1, index[..., None])[..., 0]
    if not with_entropy:
        return logps, None
    return logps, _entropy(log_p, log_p.exp())


def row_backward(
    scaled: Tensor, index: Tensor, grad_logps: Tensor | None, grad_entropy: Tensor | None
) -> Tensor:
    """Gradient in `scaled`, (R, V), of sum(grad_logps * logps) + sum(grad_entropy * entropy).

    d logps / d z_j = 1[j = index] - p_j and d entropy / d z_j = -p_j (log p_j + entropy).
    """
    log_p = scaled.log_softmax(-1)
    p = log_p.exp()
    grad = torch.zeros_like(p)
    if grad_entropy is not None:
        surprise = torch.where(p > 0, log_p, 0.0) + _entropy(log_p, p)[..., None]
        grad -= grad_entropy[..., None] * p * surprise
    if grad_logps is not None:
        grad -= grad_logps[..., None] * p
        grad.scatter_add_(-1, index[..., None], grad_logps[..., None].to(grad.dtype))
    return grad


def _entropy(log_p: Tensor, p: Tensor) -> Tensor:
    # A banned token has p = 0 and log p = -inf, whose product would be NaN and has the limit 0.
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    # Rounding alone can leave the range, by an ulp; NaN stays NaN.
    return entropy.clamp(0.0, math.log(log_p.shape[-1]))


class _LogpsAndEntropy(torch.autograd.Function):
    """Saves the logits as they came and recomputes the softmax: no second (..., V) tensor lives."""

    @staticmethod
    def forward(ctx, logits, index, temperature, with_entropy):
        ctx.save_for_backward(logits, index)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        scaled = logits.to(compute_dtype(logits)) / temperature
        return row_forward(scaled, index, with_entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_entropy):
        logits, index = ctx.saved_tensors
        if grad_logps is None and grad_entropy is None:
            return None, None, None, None
        scaled = logits.to(compute_dtype(logits)) / ctx.temperature
        grad = row_backward(scaled, index, grad_logps, grad_entropy) / ctx.temperature
        return grad.to(logits.dtype), None, None, None
