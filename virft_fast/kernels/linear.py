"""Log-probs and the GRPO loss straight from hidden states: the LM head without its logits.

Logits are formed, used and dropped tile by tile, some rows at a time, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from virft_fast.kernels.backend import triton_for
from virft_fast.kernels.grpo_loss import (
    Evaluated,
    GRPOLoss,
    LossTerms,
    evaluate_rows,
    make_result,
    make_terms,
)
from virft_fast.kernels.layout import Layout, make_layout
from virft_fast.kernels.logprobs import (
    check_ids,
    check_temperature,
    compute_dtype,
    rows_backward,
    rows_forward,
)

# Elements of one tile of logits: 32 MiB of float32 on a CPU; on a GPU 1.2 GiB, which at V = 152k is
# the 2,048 rows that keep its matrix units busy. The second is an estimate, not tuned.
TILE_ELEMENTS = {"cpu": 2**23, "cuda": 5 * 2**26}
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
    check_ids("index", index, weight.shape[0])
    rows = chunk_tokens or _tile_rows(weight)
    logps, entropy = _LinearLogps.apply(
        hidden.flatten(0, -2), weight, bias, index.reshape(-1), 1 / temperature, rows
    )
    return logps.view(index.shape), entropy.view(index.shape)


def linear_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(n, D) @ (V, D).T in float32, however narrow the inputs, as the losses here form logits."""
    head = _Head(weight, None, hidden.dtype, len(hidden), False, False)
    return head.logits(hidden)


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
    ids = completion_ids.reshape(-1).masked_fill(~layout.mask, 0)
    check_ids("completion_ids", ids, weight.shape[0])
    values = _LinearGRPO.apply(
        hidden.flatten(0, -2),
        weight,
        bias,
        ids,
        1 / temperature,
        chunk_tokens or _tile_rows(weight),
        terms,
        torch.is_grad_enabled(),
    )
    return make_result(terms, *values)


class _Head:
    """Tiles of logits of (R, D) hidden states, and the gradients back through them.

    16-bit products are formed in float32 on a GPU, on the CPU in float32 from the start; a gradient
    tile is rounded to the inputs' 16 bits before its two products. grad_weight is one float32
    accumulator over the tiles in their order: no atomics, the same bits in every run.
    """

    def __init__(self, weight, bias, hidden_dtype, tile_rows, wants_weight, wants_bias):
        self.dtype = torch.promote_types(compute_dtype(weight), hidden_dtype)
        narrow = [t for t in (hidden_dtype, weight.dtype) if t in (torch.bfloat16, torch.float16)]
        self.factor_dtype = self.dtype
        if weight.is_cuda and narrow and self.dtype != torch.float64:
            self.factor_dtype = narrow[0]
        self.weight = weight.detach().to(self.factor_dtype)
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        vocab = weight.shape[0]
        self.buffer = torch.empty((tile_rows, vocab), dtype=self.dtype, device=weight.device)
        zeros = lambda wanted, like: (  # noqa: E731
            torch.zeros(like.shape, dtype=self.dtype, device=like.device) if wanted else None
        )
        self.grad_weight = zeros(wants_weight, weight)
        self.grad_bias = zeros(wants_bias and bias is not None, self.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, D) -> (n, V), valid until the next tile is asked for."""
        tile = self.buffer[: len(hidden)]
        hidden = hidden.to(self.factor_dtype)
        if self.factor_dtype == self.dtype:
            torch.mm(hidden, self.weight.T, out=tile)
        else:
            torch.mm(hidden, self.weight.T, out_dtype=self.dtype, out=tile)
        return tile if self.bias is None else tile.add_(self.bias)

    def backward(self, tile: Tensor, hidden: Tensor, *gradient, grad_hidden: Tensor | None) -> None:
        """Through the tile, which it overwrites; `gradient` as `rows_backward` takes it.

        grad_hidden: (n, D), filled here, or None where nobody asks for it.
        """
        grad = self._grad_logits(tile, *gradient)
        hidden = hidden.to(self.factor_dtype)
        if grad_hidden is not None:
            grad_hidden.copy_(grad @ self.weight)
        if self.grad_weight is not None:
            if self.factor_dtype == self.dtype:
                self.grad_weight.addmm_(grad.T, hidden)
            else:
                torch.addmm(
                    self.grad_weight, grad.T, hidden, out_dtype=self.dtype, out=self.grad_weight
                )
        if self.grad_bias is not None:
            self.grad_bias += grad.sum(0, dtype=self.dtype)

    def _grad_logits(self, tile, ids, norms, entropy, grad_logps, grad_entropy, inv_temp) -> Tensor:
        triton_rows = triton_for(tile)
        if triton_rows is not None and self.factor_dtype != self.dtype:
            return triton_rows.tile_backward(
                tile, ids, norms, entropy, grad_logps, grad_entropy, inv_temp, self.factor_dtype
            )
        rows_backward(tile, ids, norms, entropy, grad_logps, grad_entropy, inv_temp, tile)
        return tile.to(self.factor_dtype)


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, index, inv_temp, tile_rows):
        ctx.inv_temp, ctx.tile_rows = inv_temp, tile_rows
        ctx.set_materialize_grads(False)
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(weight, bias, hidden.dtype, min(tile_rows, len(index)), False, False)
            logps, norms, entropy = _all_logps(head, hidden.detach(), index, inv_temp)
        ctx.save_for_backward(hidden, weight, bias, index, norms, entropy)
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_entropy):
        hidden, weight, bias, index, norms, entropy = ctx.saved_tensors
        if grad_logps is None and grad_entropy is None:
            return (None,) * 6
        wants_hidden, *wants = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(weight, bias, hidden.dtype, min(ctx.tile_rows, len(index)), *wants)
            grad_hidden = torch.empty_like(hidden) if wants_hidden else None
            for rows in _tiles(len(index), ctx.tile_rows):
                part = hidden.detach()[rows]
                head.backward(
                    head.logits(part),
                    part,
                    index[rows],
                    norms[rows],
                    entropy[rows],
                    None if grad_logps is None else grad_logps[rows].contiguous(),
                    None if grad_entropy is None else grad_entropy[rows].contiguous(),
                    ctx.inv_temp,
                    grad_hidden=None if grad_hidden is None else grad_hidden[rows],
                )
        return (
            grad_hidden,
            _as(head.grad_weight, weight),
            _as(head.grad_bias, bias),
            None,
            None,
            None,
        )


class _LinearGRPO(torch.autograd.Function):
    """Loss, statistics and, where anybody asks for them, the gradients, all in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, inv_temp, tile_rows, terms, grad_enabled):
        wants = [grad_enabled and need for need in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden.device.type, enabled=False):
            run = _GRPORun(hidden.detach(), weight, bias, ids, inv_temp, tile_rows, terms, wants)
            run.all()
        head = run.head
        ctx.save_for_backward(
            run.grad_hidden, _as(head.grad_weight, weight), _as(head.grad_bias, bias)
        )
        rest = (run.logps, run.entropy, run.kl, run.clipped)
        ctx.mark_non_differentiable(*rest)
        return (run.loss, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        # Out of place, so that retain_graph works; and no test against 1, which would synchronise.
        grads = [None if g is None else (g * grad_loss).to(g.dtype) for g in ctx.saved_tensors]
        return (*grads, None, None, None, None, None)


class _GRPORun:
    """One call of `linear_grpo_loss`: the tokens that count, tile by tile."""

    def __init__(self, hidden, weight, bias, ids, inv_temp, tile_rows, terms, wants):
        self.hidden, self.ids, self.inv_temp = hidden, ids, inv_temp
        self.tile_rows = max(1, min(tile_rows, len(ids)))
        self.terms = terms.normalised()
        self.with_gradient = any(wants)
        self.head = _Head(weight, bias, hidden.dtype, self.tile_rows, *wants[1:])
        self.grad_hidden = torch.zeros_like(hidden) if wants[0] else None
        vector = lambda: torch.zeros(len(ids), dtype=self.head.dtype, device=ids.device)  # noqa: E731
        self.logps, self.entropy, self.kl, self.clipped = vector(), vector(), vector(), vector()
        self.loss = torch.zeros((), dtype=self.head.dtype, device=ids.device)

    def all(self) -> None:
        """Masked tokens go through nothing, those that can have no gradient not backward."""
        mask = self.terms.layout.mask
        silent = torch.zeros_like(mask)
        if self.terms.beta == 0 and self.with_gradient:
            silent = self.terms.layout.per_token(self.terms.advantages) == 0
        for tokens, with_gradient in ((mask & ~silent, self.with_gradient), (mask & silent, False)):
            rows = tokens.nonzero()[:, 0]
            if len(rows):
                self._some(rows, self.terms.take(rows), with_gradient)

    def _some(self, rows: Tensor, terms: LossTerms, with_gradient: bool) -> None:
        """The tokens `rows`, (n,) ascending, with their own terms."""
        if not terms.by_sequence:
            for part in _tiles(len(rows), self.tile_rows):
                self._tile(rows[part], terms.tile(part), with_gradient)
            return
        for first, last, part in _whole_sequences(terms.layout, self.tile_rows):
            of_part = terms.part(first, last, part)
            if part.stop - part.start <= self.tile_rows:
                self._tile(rows[part], of_part, with_gradient)
            else:
                self._long_sequence(rows[part], of_part, with_gradient)

    def _tile(self, rows: Tensor, terms: LossTerms, with_gradient: bool) -> None:
        hidden, ids = self.hidden[rows], self.ids[rows]
        tile = self.head.logits(hidden)
        evaluated, norms, entropy = evaluate_rows(tile, ids, self.inv_temp, terms)
        self._note(rows, evaluated, entropy)
        if with_gradient:
            self._backward(tile, hidden, rows, ids, norms, evaluated.d_logps)

    def _long_sequence(self, rows: Tensor, terms: LossTerms, with_gradient: bool) -> None:
        """Longer than a tile: all its log-probs first, then its logits a second time."""
        ids = self.ids[rows]
        logps, norms, entropy = _all_logps(self.head, self.hidden[rows], ids, self.inv_temp)
        evaluated = terms.evaluate(logps)
        self._note(rows, evaluated, entropy)
        if not with_gradient:
            return
        for part in _tiles(len(rows), self.tile_rows):
            hidden = self.hidden[rows[part]]
            tile = self.head.logits(hidden)
            d_logps = evaluated.d_logps[part]
            self._backward(tile, hidden, rows[part], ids[part], norms[part], d_logps)

    def _note(self, rows: Tensor, evaluated: Evaluated, entropy: Tensor) -> None:
        self.loss += evaluated.loss
        self.logps[rows] = evaluated.logps
        self.entropy[rows] = entropy
        self.kl[rows] = evaluated.kl
        self.clipped[rows] = evaluated.clipped

    def _backward(self, tile, hidden, rows, ids, norms, d_logps) -> None:
        """Gradients of a tile, without the tokens whose own is 0: clipped, or without advantage."""
        if self.terms.beta == 0:
            keep = d_logps.nonzero()[:, 0]
            if not len(keep):
                return
            if len(keep) < len(rows):
                tile = _compacted(tile, keep)
                hidden, rows = hidden[keep], rows[keep]
                ids, norms, d_logps = ids[keep], norms[keep], d_logps[keep]
        grad_hidden = None
        if self.grad_hidden is not None:
            grad_hidden = torch.empty_like(hidden)
        self.head.backward(
            tile, hidden, ids, norms, None, d_logps, None, self.inv_temp, grad_hidden=grad_hidden
        )
        if grad_hidden is not None:
            self.grad_hidden[rows] = grad_hidden


def _compacted(tile: Tensor, keep: Tensor) -> Tensor:
    """Rows `keep`, ascending, at the top of the tile; each is read before it is overwritten."""
    in_place = keep == torch.arange(len(keep), device=keep.device)
    size = max(1, len(tile) // 8)
    for start in range(int(in_place.sum()), len(keep), size):
        some = keep[start : start + size]
        tile[start : start + len(some)] = tile[some]
    return tile[: len(keep)]


def _whole_sequences(layout: Layout, tile_rows: int) -> Iterator[tuple[int, int, slice]]:
    """(first, last, positions) of runs of sequences that fill a tile; a longer one stands alone."""
    offsets = layout.offsets.tolist()
    first = 0
    for last in range(1, len(offsets)):
        full = last == len(offsets) - 1 or offsets[last + 1] - offsets[first] > tile_rows
        if full and offsets[last] > offsets[first]:
            yield first, last, slice(offsets[first], offsets[last])
        if full:
            first = last


def _all_logps(
    head: _Head, hidden: Tensor, ids: Tensor, inv_temp: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `rows_forward`, of the logits of (R, D) hidden states."""
    shapes = (len(ids), (len(ids), 2), len(ids))
    out = [torch.empty(shape, dtype=head.dtype, device=ids.device) for shape in shapes]
    for rows in _tiles(len(ids), len(head.buffer)):
        values = rows_forward(head.logits(hidden[rows]), ids[rows], inv_temp)
        for whole, part in zip(out, values, strict=True):
            whole[rows] = part
    return tuple(out)


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
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(
            f"bias: expected ({weight.shape[0]},) floating point, got {tuple(bias.shape)} "
            f"{bias.dtype}"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: expected >= 1 or None, got {chunk_tokens}")
    check_temperature(temperature)
