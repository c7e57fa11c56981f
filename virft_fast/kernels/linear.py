"""Log-probs and the GRPO loss straight from hidden states: the LM head without its logits.

Logits are formed, used and dropped tile by tile, some rows at a time, in float32. The host waits
for the device where it must know how many rows there are: once a call for the tokens that count,
and, where old log-probs make clipping possible, once or twice a tile for those that aren't clipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
from virft_fast.kernels.loss_args import LossArgs, takes_loss_args

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
        hidden.flatten(0, -2), weight, bias, index.reshape(-1), 1 / temperature, rows,
        factor_dtype(hidden, weight),
    )  # fmt: skip
    return logps.view(index.shape), entropy.view(index.shape)


def linear_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(n, D) @ (V, D).T in float32, however narrow the inputs, as the losses here form logits."""
    factor = factor_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        head = _Head(weight, None, compute_dtype(hidden, weight), factor, len(hidden))
        return head.logits(hidden)


@takes_loss_args
def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
    chunk_tokens: int | None = None,
    **loss: Any,
) -> GRPOLoss:
    """`grpo_loss` of the logits hidden @ weight.T + bias, which never exist as a whole.

    The gradients are computed together with the loss, so that each tile of logits serves both and
    `weight` is read in the forward pass alone (under ZeRO-3: one gather). The backward pass only
    scales them. With ratios of sequences, a sequence longer than a tile needs all its log-probs
    first: its logits are formed twice.

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
    terms = make_terms(layout, compute_dtype(hidden, weight), LossArgs(**loss))
    ids = completion_ids.reshape(-1).masked_fill(~layout.mask, 0)
    check_ids("completion_ids", ids, weight.shape[0])
    values = _LinearGRPO.apply(
        hidden.flatten(0, -2),
        weight,
        bias,
        ids,
        1 / temperature,
        chunk_tokens or _tile_rows(weight),
        factor_dtype(hidden, weight),
        terms,
        torch.is_grad_enabled(),
    )
    return make_result(terms, *values)


def factor_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the matrix products take their factors in; called where autocast is still on.

    A GPU multiplies bfloat16 into float32: bfloat16 inputs, both of them, and bfloat16 autocast go
    that way. So would float16, but the gradient of a logit, p / (N T) and less, underflows in it;
    and a CPU gains nothing. Those take float32, or float64 if an input is.
    """
    dtype = compute_dtype(hidden, weight)
    if dtype == torch.float64 or not _multiplies_16_bits(hidden.device):
        return dtype
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        narrow = torch.get_autocast_dtype(kind) == torch.bfloat16
    else:
        narrow = hidden.dtype == weight.dtype == torch.bfloat16
    return torch.bfloat16 if narrow else dtype


def _multiplies_16_bits(device: torch.device) -> bool:
    return device.type == "cuda"


def _mm(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left @ right into `out`, rounded to its dtype alone."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def _add_mm(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in the dtype of `total`."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


class _Head:
    """Tiles of logits of (R, D) hidden states, and the gradients back through them.

    Products of 16-bit factors are formed in `dtype`, float32 or float64; a gradient tile is rounded
    to `factor` before its two products. grad_weight is one accumulator in `dtype` over the tiles in
    their order: no atomics, the same bits in every run.
    """

    def __init__(
        self, weight, bias, dtype, factor, tile_rows, wants_weight=False, wants_bias=False
    ):
        self.dtype, self.factor = dtype, factor
        self.weight = weight.detach().to(factor)
        self.bias = None if bias is None else bias.detach().to(dtype)
        vocab = weight.shape[0]
        self.buffer = torch.empty((tile_rows, vocab), dtype=dtype, device=weight.device)
        zeros = lambda wanted, like: (  # noqa: E731
            torch.zeros(like.shape, dtype=dtype, device=like.device) if wanted else None
        )
        self.grad_weight = zeros(wants_weight, weight)
        self.grad_bias = zeros(wants_bias and bias is not None, self.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, D) -> (n, V), valid until the next tile is asked for."""
        tile = _mm(hidden.to(self.factor), self.weight.T, self.buffer[: len(hidden)])
        return tile if self.bias is None else tile.add_(self.bias)

    def backward(self, tile: Tensor, hidden: Tensor, *gradient, wants_hidden: bool = True):
        """Through the tile, which it overwrites; `gradient` as `rows_backward` takes it.

        Returns:
            (n, D) gradient of `hidden` in `dtype`, or None where nobody asks for it.
        """
        grad = self._grad_logits(tile, *gradient)
        if self.grad_weight is not None:
            _add_mm(self.grad_weight, grad.T, hidden.to(self.factor))
        if self.grad_bias is not None:
            self.grad_bias += grad.sum(0, dtype=self.dtype)
        if wants_hidden:
            return _mm(grad, self.weight, hidden.new_empty(hidden.shape, dtype=self.dtype))

    def _grad_logits(self, tile, ids, norms, entropy, grad_logps, grad_entropy, inv_temp) -> Tensor:
        triton_rows = triton_for(tile)
        if triton_rows is not None and self.factor != self.dtype:
            return triton_rows.tile_backward(
                tile, ids, norms, entropy, grad_logps, grad_entropy, inv_temp, self.factor
            )
        rows_backward(tile, ids, norms, entropy, grad_logps, grad_entropy, inv_temp, tile)
        return tile.to(self.factor)


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, index, inv_temp, tile_rows, factor):
        ctx.inv_temp, ctx.tile_rows, ctx.factor = (
            inv_temp,
            max(1, min(tile_rows, len(index))),
            factor,
        )
        ctx.set_materialize_grads(False)
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(weight, bias, compute_dtype(hidden, weight), factor, ctx.tile_rows)
            logps, norms, entropy = _all_logps(head, hidden.detach(), index, inv_temp)
        ctx.save_for_backward(hidden, weight, bias, index, norms, entropy)
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_entropy):
        hidden, weight, bias, index, norms, entropy = ctx.saved_tensors
        if grad_logps is None and grad_entropy is None:
            return (None,) * 7
        wants_hidden, *wants = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            dtype = compute_dtype(hidden, weight)
            head = _Head(weight, bias, dtype, ctx.factor, ctx.tile_rows, *wants)
            grad_hidden = torch.empty_like(hidden) if wants_hidden else None
            for rows in _tiles(len(index), ctx.tile_rows):
                part = hidden.detach()[rows]
                grad = head.backward(
                    head.logits(part),
                    part,
                    index[rows],
                    norms[rows],
                    entropy[rows],
                    None if grad_logps is None else grad_logps[rows].contiguous(),
                    None if grad_entropy is None else grad_entropy[rows].contiguous(),
                    ctx.inv_temp,
                    wants_hidden=wants_hidden,
                )
                if wants_hidden:
                    grad_hidden[rows] = grad
            del head.buffer  # before the gradient's cast takes its own memory
        grads = [
            None if grad is None else grad.to(parameter.dtype)
            for grad, parameter in ((head.grad_weight, weight), (head.grad_bias, bias))
        ]
        return (grad_hidden, *grads, None, None, None, None)


class _LinearGRPO(torch.autograd.Function):
    """Loss, statistics and, where anybody asks for them, the gradients, all in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, inv_temp, tile_rows, factor, terms, grad_enabled):
        wants = [grad_enabled and need for need in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden.device.type, enabled=False):
            tile_rows = max(1, min(tile_rows, len(ids)))
            head = _Head(weight, bias, compute_dtype(hidden, weight), factor, tile_rows, *wants[1:])
            run = _GRPORun(head, hidden.detach(), ids, inv_temp, tile_rows, terms, wants)
            run.all()
        # Rounded to the inputs' dtypes after the scaling of the backward pass: once.
        ctx.save_for_backward(run.grad_hidden, head.grad_weight, head.grad_bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        rest = (run.logps, run.entropy, run.kl, run.clipped)
        ctx.mark_non_differentiable(*rest)
        return (run.loss, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        # Out of place, so that retain_graph works; and no test against 1, which would synchronise.
        grads = [
            None
            if grad is None
            else torch.mul(grad, grad_loss, out=grad.new_empty(grad.shape, dtype=dtype))
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None, None, None, None)


class _GRPORun:
    """One call of `linear_grpo_loss`: the tokens that count, tile by tile."""

    def __init__(self, head, hidden, ids, inv_temp, tile_rows, terms, wants):
        self.head, self.hidden, self.ids, self.inv_temp = head, hidden, ids, inv_temp
        self.tile_rows = tile_rows
        self.terms = terms.normalised()
        self.with_gradient = any(wants)
        self.grad_hidden = torch.zeros_like(hidden, dtype=head.dtype) if wants[0] else None
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
        """Gradients of a tile, without the tokens that have none: clipped ones."""
        if self.terms.may_clip and self.terms.beta == 0:
            keep = d_logps.nonzero()[:, 0]
            if not len(keep):
                return
            if len(keep) < len(rows):
                tile, keep = _compacted(tile, keep)
                hidden, rows = hidden[keep], rows[keep]
                ids, norms, d_logps = ids[keep], norms[keep], d_logps[keep]
        wants_hidden = self.grad_hidden is not None
        grad_hidden = self.head.backward(
            tile, hidden, ids, norms, None, d_logps, None, self.inv_temp, wants_hidden=wants_hidden
        )
        if wants_hidden:
            self.grad_hidden[rows] = grad_hidden


def _compacted(tile: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `keep`, ascending, at the top of the tile, and their order there: the last of them go
    where one has been dropped, the others stay."""
    top = torch.zeros(len(tile), dtype=torch.bool, device=keep.device)
    top[keep] = True
    moved = keep[keep >= len(keep)]
    holes = top[: len(keep)].to(torch.int8).argsort(stable=True)[: len(moved)]
    size = max(1, len(tile) // 8)
    for some, where in zip(moved.split(size), holes.split(size), strict=True):
        tile[where] = tile[some]
    order = torch.arange(len(keep), device=keep.device)
    order[holes] = moved
    return tile[: len(keep)], order


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
    devices = {"weight": weight, "bias": bias, "the token ids": index}
    for name, tensor in devices.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{name}: expected on {hidden.device} like hidden, got {tensor.device}; move it"
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
