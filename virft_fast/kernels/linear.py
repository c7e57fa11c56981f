"""Log-probs and the GRPO loss from hidden states, without ever holding all tokens' logits.

Logits are computed, used and dropped in float32 tiles of a few rows. The host waits for the device
only to learn row counts: of the tokens that count, and, with sequence-level ratios, of each
sequence. It waits for neither if there is no mask and `cu_seqlens` is on the CPU.
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
    pick,
    rows_backward,
    rows_forward,
)
from virft_fast.kernels.loss_args import LossArgs, check_tensors, check_type, takes_loss_args

# Elements in one tile of logits: 32 MiB of float32 on a CPU; 1.2 GiB on a GPU, enough at V = 152k
# for the 2,048 rows that keep its matrix units busy. The GPU value is an estimate, not tuned.
TILE_ELEMENTS = {"cpu": 2**23, "cuda": 5 * 2**26}
MAX_TILE_ROWS = 2048

Rows = Tensor | slice  # (n,) int64 indices, or consecutive rows


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`logps_and_entropy` of the logits hidden @ weight.T + bias, computed tile by tile.

    Args:
        hidden: (..., D) floating point.
        weight: (V, D) floating point, same device.
        index: (...) int64, in [0, V).
        bias: (V,), or None.
        softcap: above 0; turns logits into softcap * tanh(logits / softcap), as Gemma does.
        temperature: above 0; divides the logits.
        chunk_tokens: rows per tile; None: chosen from V and the device.
    Returns:
        Log-probs and entropies, (...) each: float32, or float64 if an input is. Both are
        differentiable once, in `hidden`, `weight` and `bias`; the backward pass computes the logits
        a second time.
    Raises:
        ValueError: wrong shapes, dtypes or numbers; says what was expected and what was given.
    """
    _check(hidden, weight, index, bias, softcap, temperature, chunk_tokens)
    check_ids("index", index, weight.shape[0])
    rows = chunk_tokens or _tile_rows(weight)
    logps, _, entropy = _LinearLogps.apply(
        hidden.flatten(0, -2), weight, bias, index.reshape(-1), 1 / temperature,
        max(1, min(rows, index.numel())), factor_dtype(hidden, weight), softcap,
    )  # fmt: skip
    return logps.view(index.shape), entropy.view(index.shape)


def linear_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(n, D) @ (V, D).T in float32 for inputs of any dtype, as the losses here compute logits."""
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
    softcap: float | None = None,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
    chunk_tokens: int | None = None,
    **loss: Any,
) -> GRPOLoss:
    """`grpo_loss` of the logits hidden @ weight.T + bias, computed tile by tile.

    The forward pass computes the gradients along with the loss: each tile of logits serves both,
    and `weight` is read only once (one gather under ZeRO-3). The backward pass just scales them.
    With sequence-level ratios, a sequence longer than a tile needs all its log-probs first, so its
    logits are computed twice. `grpo_loss` describes the arguments that are not listed here.

    Args:
        hidden: (N, T, D) at the positions that predict `completion_ids`, or packed (S, D) with
            `cu_seqlens`. Masked rows may hold anything, NaN included.
        weight: (V, D), same device; its dtype may differ.
        bias: (V,), or None.
        softcap: as in `linear_logps`.
        chunk_tokens: rows per tile; None: chosen from V and the device.
    Returns:
        GRPOLoss; `loss` is differentiable once, in `hidden`, `weight` and `bias`.
    Raises:
        ValueError: wrong shapes, dtypes, devices, names or numbers; says what was expected and what
            was given.
    """
    layout = make_layout(completion_ids, completion_mask, cu_seqlens)
    _check(hidden, weight, completion_ids, bias, softcap, temperature, chunk_tokens)
    terms = make_terms(layout, compute_dtype(hidden, weight), LossArgs(**loss))
    ids = completion_ids.reshape(-1).masked_fill(~layout.mask, 0)
    check_ids("completion_ids", ids, weight.shape[0])
    values = _LinearGRPO.apply(
        hidden.flatten(0, -2), weight, bias, ids, 1 / temperature,
        chunk_tokens or _tile_rows(weight), factor_dtype(hidden, weight), softcap, terms,
        [_wants_gradient(x) for x in (hidden, weight, bias)],
    )  # fmt: skip
    return make_result(terms, *values[:5])


def _wants_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def factor_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the factors in matrix products. Call it where autocast is not disabled.

    A GPU multiplies bfloat16 factors into float32 products, so it uses bfloat16 under bfloat16
    autocast or if both inputs are bfloat16. All other cases use float32, or float64 if an input is
    float64. float16 is never used, because a logit's gradient, at most p / (N T), would underflow.
    On a CPU, 16 bits gain nothing.
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
    """left @ right into `out`, rounded only once, to the dtype of `out`."""
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
    """Computes tiles of logits from (R, D) hidden states, and the gradients back through them.

    Products of 16-bit factors are computed in `dtype`, float32 or float64; a gradient tile is
    rounded to `factor` before its two products. grad_weight accumulates the tiles in order in
    `dtype`, without atomics, so every run gives the same bits.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        factor: torch.dtype,
        tile_rows: int,
        softcap: float | None = None,
        wants_weight: bool = False,
        wants_bias: bool = False,
    ) -> None:
        self.dtype, self.factor, self.softcap = dtype, factor, softcap
        self.weight = weight.detach().to(factor)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.buffer = torch.empty((tile_rows, weight.shape[0]), dtype=dtype, device=weight.device)
        zeros = lambda like: torch.zeros(like.shape, dtype=dtype, device=like.device)  # noqa: E731
        self.grad_weight = zeros(weight) if wants_weight else None
        self.grad_bias = zeros(bias) if wants_bias and bias is not None else None

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, D) -> (n, V), valid until the next call."""
        tile = _mm(hidden.to(self.factor), self.weight.T, self.buffer[: len(hidden)])
        if self.bias is not None:
            tile.add_(self.bias)
        return tile if self.softcap is None else tile.div_(self.softcap).tanh_().mul_(self.softcap)

    def backward(self, tile: Tensor, hidden: Tensor, *gradient: Tensor | float | None) -> Tensor:
        """Add a tile's gradients to those of weight and bias. `gradient` holds arguments of
        `rows_backward`.

        Returns:
            (n, V) gradient of the logits in `factor`, for `grad_hidden`. It overwrites the tile.
        """
        grad = self._grad_logits(tile, *gradient)
        if self.grad_weight is not None:
            _add_mm(self.grad_weight, grad.T, hidden.to(self.factor))
        if self.grad_bias is not None:
            self.grad_bias += grad.sum(0, dtype=self.dtype)
        return grad

    def grad_hidden(self, grad: Tensor) -> Tensor:
        """(n, V) gradient of the logits -> (n, D) gradient of the hidden states in `dtype`."""
        shape = (len(grad), self.weight.shape[1])
        return _mm(grad, self.weight, torch.empty(shape, dtype=self.dtype, device=grad.device))

    def _grad_logits(self, tile, ids, norms, entropy, grad_logps, grad_entropy, inv_temp) -> Tensor:
        triton_rows = triton_for(tile)
        compiling = torch.compiler.is_compiling()
        fits = self.factor != self.dtype and self.softcap is None
        if triton_rows is not None and fits and not compiling:
            return triton_rows.tile_backward(
                tile, ids, norms, entropy, grad_logps, grad_entropy, inv_temp, self.factor
            )
        slope = None if self.softcap is None else 1 - (tile / self.softcap).square()
        rows_backward(tile, ids, norms, entropy, grad_logps, grad_entropy, inv_temp, tile)
        return (tile if slope is None else tile.mul_(slope)).to(self.factor)


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(hidden, weight, bias, index, inv_temp, tile_rows, factor, softcap):
        with torch.autocast(hidden.device.type, enabled=False):
            dtype = compute_dtype(hidden, weight)
            head = _Head(weight, bias, dtype, factor, tile_rows, softcap)
            return _all_logps(head, hidden.detach(), index, inv_temp)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.inv_temp, ctx.tile_rows, ctx.factor, ctx.softcap = inputs
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, _, grad_entropy):
        hidden, weight, bias, index, norms, entropy = ctx.saved_tensors
        if grad_logps is None and grad_entropy is None:
            return (None,) * 8
        wants_hidden, *wants = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            dtype = compute_dtype(hidden, weight)
            head = _Head(weight, bias, dtype, ctx.factor, ctx.tile_rows, ctx.softcap, *wants)
            grad_hidden = torch.empty_like(hidden) if wants_hidden else None
            for rows in _tiles(len(index), ctx.tile_rows):
                chunk = hidden.detach()[rows]
                grad = head.backward(
                    head.logits(chunk), chunk, index[rows], norms[rows], entropy[rows],
                    pick(grad_logps, rows), pick(grad_entropy, rows), ctx.inv_temp,
                )  # fmt: skip
                if grad_hidden is not None:
                    grad_hidden[rows] = head.grad_hidden(grad)
            del head.buffer  # before the gradient's cast takes its own memory
        grads = [
            None if grad is None else grad.to(parameter.dtype)
            for grad, parameter in ((head.grad_weight, weight), (head.grad_bias, bias))
        ]
        return (grad_hidden, *grads, *[None] * 5)


class _LinearGRPO(torch.autograd.Function):
    """The forward pass computes the loss, statistics and, if an input needs them, gradients."""

    @staticmethod
    def forward(hidden, weight, bias, ids, inv_temp, tile_rows, factor, softcap, terms, wants):
        with torch.autocast(hidden.device.type, enabled=False):
            tile_rows, dtype = max(1, min(tile_rows, len(ids))), compute_dtype(hidden, weight)
            head = _Head(weight, bias, dtype, factor, tile_rows, softcap, *wants[1:])
            run = _GRPORun(head, hidden.detach(), ids, inv_temp, tile_rows, terms, wants)
            run.all()
        rest = (run.logps, run.entropy, run.kl, run.clipped)
        return (run.loss, *rest, run.grad_hidden, head.grad_weight, head.grad_bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        # Rounded only once, to the inputs' dtypes, after the backward pass has scaled them.
        ctx.save_for_backward(*output[5:])
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
        ctx.mark_non_differentiable(*(x for x in output[1:] if x is not None))
        ctx.set_materialize_grads(False)  # else a second gradient of the weight, of zeros

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * 10
        # Out of place, so that retain_graph works. Checking for a scale of 1 would synchronize.
        scaled = lambda grad, dtype: (  # noqa: E731
            torch.mul(grad, grad_loss, out=grad.new_empty(grad.shape, dtype=dtype))
        )
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        grads = [None if grad is None else scaled(grad, dtype) for grad, dtype in pairs]
        return (*grads, *[None] * 7)


class _GRPORun:
    """One call of `linear_grpo_loss`; processes the tokens that count, tile by tile."""

    def __init__(self, head, hidden, ids, inv_temp, tile_rows, terms, wants):
        self.head, self.hidden, self.ids, self.inv_temp = head, hidden, ids, inv_temp
        self.tile_rows = tile_rows
        self.terms = terms.normalized()
        self.with_gradient = any(wants)
        self.grad_hidden = torch.zeros_like(hidden, dtype=head.dtype) if wants[0] else None
        vector = lambda: torch.zeros(len(ids), dtype=self.head.dtype, device=ids.device)  # noqa: E731
        self.logps, self.entropy, self.kl, self.clipped = vector(), vector(), vector(), vector()
        self.loss = torch.zeros((), dtype=self.head.dtype, device=ids.device)

    def all(self) -> None:
        """Process all tokens but masked ones; tokens without a gradient only take the forward
        pass."""
        mask = self.terms.layout.mask
        silent = torch.zeros_like(mask)
        args = self.terms.args
        may_be_silent = args.beta == args.entropy_coef == 0 and args.scope != "call"
        if may_be_silent and self.with_gradient:
            silent = self.terms.layout.per_token(self.terms.advantages) == 0
        if torch.compiler.is_compiling():
            self._everything()
            return
        if self.terms.layout.bounds is not None and (mask.is_cuda or not bool(silent.any())):
            # All tokens at once, without asking the device which ones are silent.
            self._some(slice(0, len(mask)), self.terms, self.with_gradient)
            return
        for tokens, with_gradient in ((mask & ~silent, self.with_gradient), (mask & silent, False)):
            rows = tokens.nonzero()[:, 0]
            if len(rows):
                self._some(rows, self.terms.take(rows), with_gradient)

    def _everything(self) -> None:
        """Process masked tokens as well, in a graph whose sizes don't depend on values."""
        layout = self.terms.layout
        self.hidden = torch.where(layout.mask[:, None], self.hidden, 0.0)
        run = self._some if self.terms.args.scope == "token" else self._twice
        run(slice(0, len(layout.mask)), self.terms, self.with_gradient)

    def _some(self, rows: Rows, terms: LossTerms, with_gradient: bool) -> None:
        """Process the tokens `rows`, ascending, with their own terms."""
        if terms.args.scope == "call":
            self._twice(rows, terms, with_gradient)
            return
        if terms.args.scope == "token":
            for chunk in _tiles(len(terms.weights), self.tile_rows):
                self._tile(_part(rows, chunk), terms.tile(chunk), with_gradient)
            return
        for first, last, chunk in _whole_sequences(terms.layout, self.tile_rows):
            fits = chunk.stop - chunk.start <= self.tile_rows
            run = self._tile if fits else self._twice
            run(_part(rows, chunk), terms.sequences(first, last, chunk), with_gradient)

    def _tile(self, rows: Rows, terms: LossTerms, with_gradient: bool) -> None:
        hidden, ids = self.hidden[rows], self.ids[rows]
        tile = self.head.logits(hidden)
        evaluated, norms, entropy = evaluate_rows(tile, ids, self.inv_temp, terms)
        self._store(rows, evaluated, entropy)
        if with_gradient:
            gradient = entropy, evaluated.d_logps, evaluated.d_entropy
            self._backward(tile, hidden, rows, ids, norms, *gradient)

    def _twice(self, rows: Rows, terms: LossTerms, with_gradient: bool) -> None:
        """Process more rows than a tile has, whose losses depend on each other: first all their
        log-probs, then their logits again."""
        ids = self.ids[rows]
        logps, norms, entropy = _all_logps(self.head, self.hidden[rows], ids, self.inv_temp)
        entropy = torch.where(terms.layout.mask, entropy, 0.0)
        evaluated = terms.evaluate(logps, entropy)
        self._store(rows, evaluated, entropy)
        if not with_gradient:
            return
        for chunk in _tiles(len(ids), self.tile_rows):
            hidden = self.hidden[_part(rows, chunk)]
            tile = self.head.logits(hidden)
            vectors = (norms, entropy, evaluated.d_logps, evaluated.d_entropy)
            of_chunk = (pick(vector, chunk) for vector in vectors)
            self._backward(tile, hidden, _part(rows, chunk), ids[chunk], *of_chunk)

    def _store(self, rows: Rows, evaluated: Evaluated, entropy: Tensor) -> None:
        self.loss += evaluated.loss
        self.logps[rows] = evaluated.logps
        self.entropy[rows] = entropy
        self.kl[rows] = evaluated.kl
        self.clipped[rows] = evaluated.clipped

    def _backward(self, tile, hidden, rows, ids, norms, entropy, d_logps, d_entropy) -> None:
        """Compute a tile's gradients. Clipped or left-out tokens have none; a CPU skips them, but a
        GPU's host would have to wait for their number."""
        if self.terms.may_drop and not (tile.is_cuda or torch.compiler.is_compiling()):
            keep = (d_logps if d_entropy is None else d_logps.abs() + d_entropy.abs()).nonzero()
            keep = keep[:, 0]
            if not len(keep):
                return
            if len(keep) < len(ids):
                tile, keep = _compacted(tile, keep)
                hidden, rows = hidden[keep], _part(rows, keep)
                ids, norms, entropy = ids[keep], norms[keep], entropy[keep]
                d_logps, d_entropy = d_logps[keep], pick(d_entropy, keep)
        gradient = norms, entropy, d_logps, d_entropy, self.inv_temp
        grad = self.head.backward(tile, hidden, ids, *gradient)
        if self.grad_hidden is not None:
            self.grad_hidden[rows] = self.head.grad_hidden(grad)


def _part(rows: Rows, part: Rows) -> Rows:
    """Some of the rows, by their indices in `rows`."""
    if isinstance(rows, Tensor):
        return rows[part]
    if isinstance(part, Tensor):
        return part + rows.start
    return slice(rows.start + part.start, rows.start + part.stop)


def _compacted(tile: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Move the rows `keep`, ascending, to the top of the tile; returns the top and the order of the
    rows in it. Only rows below the top move, into the slots of dropped rows."""
    top = torch.zeros(len(tile), dtype=torch.bool, device=keep.device)
    top[keep] = True
    moved = keep[keep >= len(keep)]
    holes = top[: len(keep)].to(torch.int8).argsort(stable=True)[: len(moved)]
    size = max(1, len(tile) // 8)
    for source, target in zip(moved.split(size), holes.split(size), strict=True):
        tile[target] = tile[source]
    order = torch.arange(len(keep), device=keep.device)
    order[holes] = moved
    return tile[: len(keep)], order


def _whole_sequences(layout: Layout, tile_rows: int) -> Iterator[tuple[int, int, slice]]:
    """(first, last, positions) of runs of sequences that fit in a tile; a longer sequence is
    alone."""
    offsets = layout.bounds or layout.offsets.tolist()
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
    """Like `rows_forward`, for the logits of (R, D) hidden states."""
    shapes = (len(ids), (len(ids), 2), len(ids))
    logps, norms, entropy = (torch.empty(s, dtype=head.dtype, device=ids.device) for s in shapes)
    for rows in _tiles(len(ids), len(head.buffer)):
        values = rows_forward(head.logits(hidden[rows]), ids[rows], inv_temp)
        logps[rows], norms[rows], entropy[rows] = values
    return logps, norms, entropy


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
    softcap: float | None,
    temperature: float,
    chunk_tokens: int | None,
) -> None:
    check_tensors(hidden=hidden, weight=weight, index=index)
    check_type("bias", bias, "Tensor | None")
    if bias is not None:
        check_tensors(bias=bias)
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
    check_type("chunk_tokens", chunk_tokens, "int | None")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: expected >= 1 or None, got {chunk_tokens}")
    check_type("softcap", softcap, "float | None")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap: expected a number above 0 or None, got {softcap}")
    check_temperature(temperature)
