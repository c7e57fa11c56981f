"""Log-probs and the GRPO loss straight from hidden states: the LM head without its logits.

Logits are formed, used and dropped tile by tile, some rows at a time, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from virft_fast.kernels.grpo_loss import GRPOLoss, LossTerms, make_terms
from virft_fast.kernels.layout import make_layout
from virft_fast.kernels.logprobs import (
    check_temperature,
    compute_dtype,
    row_backward,
    row_forward,
)

# Elements of one tile of logits: 64 MiB of float32 on a CPU; on a GPU 1 GiB, which at V = 152k is
# about the 2,048 rows that keep its matrix units busy. Estimates, not tuned.
TILE_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}
MAX_TILE_ROWS = 2048


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`logps_and_entropy` of the logits hidden @ weight.T + bias, which never exist as a whole.

    Args:
        hidden: (..., D) floating point.
        weight: (V, D) floating point, same device.
        index: (...) int64, in [0, V).
        bias: (V,), or None.
        temperature: > 0, divides the logits.
        chunk_tokens: rows of a tile; None chooses by V and device.
    Returns:
        logps, entropy: (...) float32 (float64 if an input is), both differentiable once, in
        `hidden`, `weight` and `bias`; the backward pass forms the logits a second time.
    Raises:
        ValueError: shapes, dtypes or numbers; says what was expected and what came.
    """
    _check(hidden, weight, index, bias, temperature, chunk_tokens)
    rows = chunk_tokens or _tile_rows(weight)
    logps, entropy = _LinearLogps.apply(
        hidden.flatten(0, -2), weight, bias, index.reshape(-1), temperature, rows
    )
    return logps.view(index.shape), entropy.view(index.shape)


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    rewards: Tensor | None = None,
    advantages: Tensor | None = None,
    num_generations: int | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    epsilon_low: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    loss_type: str = "grpo",
    importance_sampling_level: str = "token",
    kl: str = "k3",
    temperature: float = 1.0,
    max_completion_length: int | None = None,
    num_items: int | float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> GRPOLoss:
    """`grpo_loss` of the logits hidden @ weight.T + bias, which never exist as a whole.

    The gradients are computed together with the loss, so that each tile of logits serves both and
    `weight` is read in the forward pass alone (under ZeRO-3: one gather). The backward pass only
    scales them. Ratios of sequences need all log-probs first and form the logits twice.

    Args:
        hidden: (N, T, D) at the positions that predict `completion_ids`, or packed (S, D) with
            `cu_seqlens`. Rows that are masked may hold anything, NaN included.
        weight: (V, D), same device; its dtype may differ.
        bias: (V,), or None.
        chunk_tokens: rows of a tile; None chooses by V and device.
        The rest: see `grpo_loss`.
    Returns:
        GRPOLoss; `loss` is differentiable once, in `hidden`, `weight` and `bias`.
    Raises:
        ValueError: shapes, dtypes, devices, names or numbers; says what was expected and what came.
    """
    layout = make_layout(completion_ids, completion_mask, cu_seqlens)
    _check(hidden, weight, completion_ids, bias, temperature, chunk_tokens)
    terms = make_terms(
        layout,
        dtype=compute_dtype(hidden, weight),
        rewards=rewards,
        advantages=advantages,
        num_generations=num_generations,
        old_logps=old_logps,
        ref_logps=ref_logps,
        beta=beta,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        delta=delta,
        loss_type=loss_type,
        importance_sampling_level=importance_sampling_level,
        kl=kl,
        max_completion_length=max_completion_length,
        num_items=num_items,
    )
    loss, logps, entropy = _LinearGRPO.apply(
        hidden.flatten(0, -2).masked_fill(~layout.mask[:, None], 0.0),
        weight,
        bias,
        completion_ids.reshape(-1).masked_fill(~layout.mask, 0),
        temperature,
        chunk_tokens or _tile_rows(weight),
        terms,
        torch.is_grad_enabled(),
    )
    return terms.result(loss, logps, entropy)


class _Head:
    """Tiles of scaled logits of one (R, D) hidden, and the gradients back through them."""

    def __init__(self, hidden, weight, bias, temperature, needs_grad):
        self.dtype = compute_dtype(hidden, weight)
        self.hidden = hidden.detach()
        self.weight = weight.detach().to(self.dtype)
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        self.temperature = temperature
        wants = needs_grad
        self.grad_hidden = torch.zeros_like(self.hidden) if wants[0] else None
        # In float32 across the tiles, whatever the weight's own dtype.
        self.grad_weight = torch.zeros_like(self.weight) if wants[1] else None
        self.grad_bias = torch.zeros_like(self.bias) if wants[2] and bias is not None else None

    def scaled_logits(self, rows: slice) -> Tensor:
        logits = self.hidden[rows].to(self.dtype) @ self.weight.T  # (tile, V)
        if self.bias is not None:
            logits += self.bias
        return logits.div_(self.temperature)

    def add_gradient(self, rows: slice, grad_scaled: Tensor) -> None:
        grad = grad_scaled.div_(self.temperature)  # (tile, V), in the logits
        if self.grad_hidden is not None:
            self.grad_hidden[rows] = (grad @ self.weight).to(self.grad_hidden.dtype)
        if self.grad_weight is not None:
            self.grad_weight.addmm_(grad.T, self.hidden[rows].to(self.dtype))
        if self.grad_bias is not None:
            self.grad_bias += grad.sum(0)


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, index, temperature, tile_rows):
        ctx.save_for_backward(hidden, weight, bias, index)
        ctx.temperature, ctx.tile_rows = temperature, tile_rows
        ctx.set_materialize_grads(False)
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(hidden, weight, bias, temperature, (False, False, False))
            return _all_logps(head, index, tile_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_entropy):
        hidden, weight, bias, index = ctx.saved_tensors
        if grad_logps is None and grad_entropy is None:
            return (None,) * 6
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(hidden, weight, bias, ctx.temperature, ctx.needs_input_grad[:3])
            for rows in _tiles(len(index), ctx.tile_rows):
                grad = row_backward(
                    head.scaled_logits(rows),
                    index[rows],
                    None if grad_logps is None else grad_logps[rows],
                    None if grad_entropy is None else grad_entropy[rows],
                )
                head.add_gradient(rows, grad)
        return (
            head.grad_hidden,
            _as(head.grad_weight, weight),
            _as(head.grad_bias, bias),
            None,
            None,
            None,
        )


class _LinearGRPO(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, index, temperature, tile_rows, terms, grad_enabled):
        wants = tuple(grad_enabled and need for need in ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(hidden, weight, bias, temperature, wants)
            run = _two_passes if terms.by_sequence else _one_pass
            loss, logps, entropy = run(head, index, tile_rows, terms, any(wants))
        ctx.save_for_backward(
            head.grad_hidden, _as(head.grad_weight, weight), _as(head.grad_bias, bias)
        )
        ctx.mark_non_differentiable(logps, entropy)
        return loss, logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _grad_logps, _grad_entropy):
        # Out of place, so that retain_graph works; and no test against 1, which would synchronise.
        grads = [None if g is None else (g * grad_loss).to(g.dtype) for g in ctx.saved_tensors]
        return (*grads, None, None, None, None, None)


def _one_pass(
    head: _Head, index: Tensor, tile_rows: int, terms: LossTerms, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss is a sum over tokens: each tile of logits yields its share and its gradient."""
    loss = torch.zeros((), dtype=head.dtype, device=index.device)
    logps = torch.zeros(index.shape, dtype=head.dtype, device=index.device)
    entropy = torch.zeros_like(logps)
    for rows in _tiles(len(index), tile_rows):
        scaled = head.scaled_logits(rows)
        logps[rows], entropy[rows] = row_forward(scaled, index[rows], True)
        share, grad_logps = _loss_and_gradient(terms, logps[rows], rows)
        loss += share
        if with_gradient:
            head.add_gradient(rows, row_backward(scaled, index[rows], grad_logps, None))
    return loss, logps, entropy


def _two_passes(
    head: _Head, index: Tensor, tile_rows: int, terms: LossTerms, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A sequence's ratio depends on all its tokens: every log-prob first, then the gradient."""
    logps, entropy = _all_logps(head, index, tile_rows)
    loss, grad_logps = _loss_and_gradient(terms, logps, slice(None))
    if with_gradient:
        for rows in _tiles(len(index), tile_rows):
            scaled = head.scaled_logits(rows)
            head.add_gradient(rows, row_backward(scaled, index[rows], grad_logps[rows], None))
    return loss, logps, entropy


def _all_logps(head: _Head, index: Tensor, tile_rows: int) -> tuple[Tensor, Tensor]:
    logps = torch.zeros(index.shape, dtype=head.dtype, device=index.device)
    entropy = torch.zeros_like(logps)
    for rows in _tiles(len(index), tile_rows):
        logps[rows], entropy[rows] = row_forward(head.scaled_logits(rows), index[rows], True)
    return logps, entropy


def _loss_and_gradient(terms: LossTerms, logps: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Loss of `rows` and its gradient in their log-probs, by autograd on the vectors alone."""
    with torch.enable_grad():
        leaf = logps.detach().clone().requires_grad_()
        loss = terms.loss(leaf, rows)
        (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


def _tiles(num_rows: int, tile_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, tile_rows):
        yield slice(start, min(start + tile_rows, num_rows))


def _tile_rows(weight: Tensor) -> int:
    elements = TILE_ELEMENTS.get(weight.device.type, TILE_ELEMENTS["cpu"])
    return max(1, min(elements // max(weight.shape[0], 1), MAX_TILE_ROWS))


def _as(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.to(parameter.dtype)


def _check(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None,
    temperature: float,
    chunk_tokens: int | None,
) -> None:
    if weight.ndim != 2 or weight.shape[0] < 1 or not weight.is_floating_point():
        raise ValueError(
            f"weight: expected (V, D) floating point, got {tuple(weight.shape)} {weight.dtype}; "
            "pass lm_head.weight as it is"
        )
    expected = (*index.shape, weight.shape[1])
    if index.ndim < 1 or hidden.shape != expected or not hidden.is_floating_point():
        raise ValueError(
            f"hidden: expected {expected} floating point for ids {tuple(index.shape)} and weight "
            f"{tuple(weight.shape)}, got {tuple(hidden.shape)} {hidden.dtype}"
        )
    if index.dtype != torch.int64:
        raise ValueError(f"index: expected int64 token ids, got {index.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected ({weight.shape[0]},), got {tuple(bias.shape)}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: expected >= 1 or None, got {chunk_tokens}")
    check_temperature(temperature)
