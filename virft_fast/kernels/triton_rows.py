"""Triton kernels over rows of logits, and their launchers. Only `backend` imports this module.

A program handles one row (forward) or a block of a row (backward) in a 1-D grid, with 64-bit
addresses. Lengths, strides and the temperature are runtime arguments without specialization, so a
new completion length doesn't recompile. UNIT is 16 if all strides and V are multiples of 16; the
compiler must know that to load 128 bits at a time.

The file exceeds 500 lines because a kernel, its device functions and the launcher that passes its
arguments by position are read and changed together.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from virft_fast.kernels.loss_args import KL_KINDS, LossArgs
from virft_fast.kernels.token_loss import MAX_EXPONENT

FORWARD_BLOCK, FORWARD_WARPS = 4096, 4
BACKWARD_BLOCK, BACKWARD_WARPS = 4096, 4
# Each element of a strided block needs a 64-bit address; larger blocks run out of registers.
STRIDED_BLOCK = 512
# A vocabulary that is not a multiple of 16 is read one number at a time.
ODD_TILE_BLOCK = 2048
_MAX_EXPONENT = tl.constexpr(MAX_EXPONENT)
_RUNTIME = (
    "inner", "stride_outer", "stride_inner", "stride_v", "out_outer", "out_inner", "out_v",
    "vocab", "inv_temp", "blocks", "num_generations", "beta", "low", "high", "delta",
)  # fmt: skip
# Accessed one number at a time: alignment doesn't help, and it changes with slicing.
_VECTORS = (
    "IDS", "LOGPS", "NORMS", "ENTROPY", "MASK", "SEQUENCE", "ADVANTAGES", "WEIGHTS", "OLD", "REF",
    "FACTOR", "KL_OUT", "LOSS", "D_LOGPS", "CLIPPED", "GRAD_LOGPS", "GRAD_ENTROPY", "SCALE",
)  # fmt: skip


# ---- device functions ----------------------------------------------------------------------------


@triton.jit
def _row_offset(row, inner, stride_outer, stride_inner, UNIT: tl.constexpr):
    """First element of row `row` of a (outer, inner, V) view."""
    row64 = row.to(tl.int64)
    offset = (row64 // inner) * stride_outer + (row64 % inner) * stride_inner
    return offset * UNIT


@triton.jit
def _row_statistics(
    Z, vocab, stride_v, inv_temp, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, BLOCK: tl.constexpr
):
    """Maximum m, s = sum of exp(z - m), t = sum of exp(z - m) * (z - m), in one pass."""
    columns = vocab * UNIT
    m = -float("inf")
    s = 0.0
    t = 0.0
    for start in tl.range(0, columns, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        offsets = cols if CONTIGUOUS else cols.to(tl.int64) * stride_v
        z = tl.load(Z + offsets, mask=cols < columns, other=-float("inf")).to(tl.float32)
        z = z * inv_temp
        m_new = tl.maximum(m, tl.max(z, 0))
        d = z - m_new
        e = tl.exp(d)
        # Recentered on each new maximum, because z itself would cancel. Before the first number, m
        # is -inf.
        shift = tl.where(s > 0.0, m - m_new, 0.0)
        alpha = tl.exp(shift)
        t = alpha * (t + s * shift) + tl.sum(tl.where(e == 0.0, 0.0, e * d), 0)
        s = s * alpha + tl.sum(e, 0)
        # If a block has only banned tokens, the maximum stays -inf and d is nan.
        empty = m_new == -float("inf")
        s = tl.where(empty, 0.0, s)
        t = tl.where(empty, 0.0, t)
        m = m_new
    return m, s, t


@triton.jit
def _logp_and_entropy(
    Z, index, vocab, stride_v, inv_temp,
    UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-prob of `index`, norms and entropy of the row at Z; nan for an index outside V."""
    m, s, t = _row_statistics(Z, vocab, stride_v, inv_temp, UNIT, CONTIGUOUS, BLOCK)
    columns = vocab * UNIT
    offset = index if CONTIGUOUS else index * stride_v
    inside = (index >= 0) & (index < columns)
    z = tl.load(Z + offset, mask=inside, other=float("nan")).to(tl.float32) * inv_temp
    log_s = tl.log(s)
    largest = tl.log(columns.to(tl.float32))
    entropy = log_s - t / s
    # Rounding can leave the ranges, also where a GPU fuses z * inv_temp - m; nan must stay nan.
    logp = tl.where((z - m) - log_s > 0.0, 0.0, (z - m) - log_s)
    entropy = tl.where(entropy < 0.0, 0.0, tl.where(entropy > largest, largest, entropy))
    return logp, m, log_s, entropy


@triton.jit
def _grad_logits(z, cols, index, m, log_s, ENTROPY, g, h, inv_temp, HAS_ENTROPY: tl.constexpr):
    """Gradient of a block of logits; g and h are those of log-prob and entropy, times inv_temp."""
    log_p = (z * inv_temp - m) - log_s
    p = tl.exp(log_p)
    grad = g * (tl.where(cols == index, 1.0, 0.0) - p)
    if HAS_ENTROPY:
        grad -= tl.where(p == 0.0, 0.0, h * p * (log_p + tl.load(ENTROPY)))
    return grad


@triton.jit
def _exp(x):
    """exp, continued by its tangent above the largest exponent, and its derivative."""
    slope = tl.exp(tl.where(x > _MAX_EXPONENT, _MAX_EXPONENT, x))
    return slope * (1.0 + tl.maximum(x - _MAX_EXPONENT, 0.0)), slope  # 0 at -inf


@triton.jit
def token_loss(
    logp, log_ratio, ref_logp, advantage, factor, beta, low, high, delta,
    HAS_REF: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_FACTOR: tl.constexpr,
    POLICY: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr,
):  # fmt: skip
    """The GPU version of `kernels.token_loss.token_loss`; for low and high see `_bounds`.

    Returns the loss, its derivatives in the log-ratio and in the log-prob, the KL estimate, and -1
    or 1 where the ratio is clipped below or above, else 0.
    """
    ratio, d_ratio = _exp(log_ratio)
    free_ratio = ratio
    if POLICY == 1:  # cispo
        capped = tl.where(ratio > high, high, ratio)
        loss = -capped * advantage * logp
        d_log_ratio = 0.0 * loss
        d_logp = -capped * advantage
        clipped = tl.where((ratio > high) & (advantage > 0.0), 1.0, 0.0)
    elif POLICY == 2:  # sapo
        t = tl.where(advantage > 0.0, high, low)
        gate = tl.sigmoid(t * (ratio - 1.0))
        loss = -gate * 4.0 / t * advantage
        d_log_ratio = -advantage * d_ratio * (4.0 * gate * tl.sigmoid(t * (1.0 - ratio)))
        d_logp = 0.0 * loss
        clipped = 0.0 * loss
    else:
        bounded = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
        inside = tl.where((ratio >= low) & (ratio <= high), 1.0, 0.0)
        below_delta = 1.0 + 0.0 * inside
        if HAS_DELTA:
            below_delta = tl.where(ratio <= delta, 1.0, 0.0)
            ratio = tl.where(ratio > delta, delta, ratio)
        free = ratio * advantage
        bound = bounded * advantage
        loss = -tl.where(free < bound, free, bound)
        share = tl.where(free < bound, 1.0, tl.where(free == bound, 0.5, 0.0))
        slope = share * below_delta + (1.0 - share) * inside
        d_log_ratio = -advantage * d_ratio * slope
        d_logp = 0.0 * loss
        below = (ratio < low) & (advantage < 0.0)
        above = (ratio > high) & (advantage > 0.0)
        clipped = tl.where(below, -1.0, tl.where(above, 1.0, 0.0))
    if HAS_FACTOR:
        loss = loss * factor
        d_log_ratio = d_log_ratio * factor
        d_logp = d_logp * factor
    estimate = 0.0 * loss
    if HAS_REF:
        d = ref_logp - logp
        if KL == 1:
            estimate = -d
            d_estimate = 1.0 + 0.0 * d
        elif KL == 2:
            estimate = 0.5 * d * d
            d_estimate = -d
        else:
            value, steep = _exp(d)
            estimate = value - d - 1.0
            d_estimate = 1.0 - steep
        if KL_RATIO:
            if beta > 0.0:
                d_log_ratio = d_log_ratio + beta * estimate * d_ratio
            estimate = estimate * free_ratio
            d_estimate = d_estimate * free_ratio
        if beta > 0.0:  # else the KL, even if it is infinite, is only measured
            loss = loss + beta * estimate
            d_logp = d_logp + beta * d_estimate
    return loss, d_log_ratio, d_logp, estimate, clipped


@triton.jit
def _group_advantage(REWARDS, sequence, num_generations, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """`group_advantages` of one sequence; rewards that aren't finite don't count."""
    first = (sequence // num_generations) * num_generations
    offsets = tl.arange(0, BLOCK)
    r = tl.load(REWARDS + first + offsets, mask=offsets < num_generations, other=float("nan"))
    scored = (r == r) & (tl.abs(r) != float("inf"))
    count = tl.sum(tl.where(scored, 1.0, 0.0), 0)
    mean = tl.sum(tl.where(scored, r, 0.0), 0) / tl.maximum(count, 1.0)
    centred = tl.where(scored, r - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / tl.maximum(count - 1.0, 1.0)
    # Equal rewards give exactly 0, even if their mean is rounded.
    highest = tl.max(tl.where(scored, r, -float("inf")), 0)
    lowest = tl.min(tl.where(scored, r, float("inf")), 0)
    own = tl.sum(tl.where(offsets == sequence - first, centred, 0.0), 0)
    return tl.where(highest > lowest, own / (tl.sqrt(variance) + EPS), 0.0)


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_VECTORS)
def rows_forward_kernel(
    Z, IDS, LOGPS, NORMS, ENTROPY,
    inner, stride_outer: tl.int64, stride_inner: tl.int64, stride_v: tl.int64, vocab, inv_temp,
    UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    Z += _row_offset(row, inner, stride_outer, stride_inner, UNIT)
    logp, m, log_s, entropy = _logp_and_entropy(
        Z, tl.load(IDS + row), vocab, stride_v, inv_temp, UNIT, CONTIGUOUS, BLOCK
    )
    tl.store(LOGPS + row, logp)
    tl.store(NORMS + 2 * row, m)
    tl.store(NORMS + 2 * row + 1, log_s)
    tl.store(ENTROPY + row, entropy)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_VECTORS)
def grpo_forward_kernel(
    Z, IDS, MASK, SEQUENCE, ADVANTAGES, WEIGHTS, OLD, REF, FACTOR,
    LOGPS, NORMS, ENTROPY, KL_OUT, LOSS, D_LOGPS, CLIPPED,
    inner, stride_outer: tl.int64, stride_inner: tl.int64, stride_v: tl.int64, vocab, inv_temp,
    num_generations, beta, low, high, delta,
    FROM_REWARDS: tl.constexpr, GROUP_BLOCK: tl.constexpr, EPS: tl.constexpr,
    HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, HAS_DELTA: tl.constexpr,
    HAS_FACTOR: tl.constexpr, POLICY: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr,
    UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-prob, entropy, group advantage, token loss and its gradient of one token."""
    row = tl.program_id(0)
    if tl.load(MASK + row) != 0:
        Z += _row_offset(row, inner, stride_outer, stride_inner, UNIT)
        logp, m, log_s, entropy = _logp_and_entropy(
            Z, tl.load(IDS + row), vocab, stride_v, inv_temp, UNIT, CONTIGUOUS, BLOCK
        )
        sequence = tl.load(SEQUENCE + row)
        if FROM_REWARDS:
            advantage = _group_advantage(ADVANTAGES, sequence, num_generations, EPS, GROUP_BLOCK)
        else:
            advantage = tl.load(ADVANTAGES + sequence)
        log_ratio = tl.where(logp == logp, 0.0, logp)  # NaN stays NaN
        if HAS_OLD:
            log_ratio = logp - tl.load(OLD + row)
        ref = logp
        if HAS_REF:
            ref = tl.load(REF + row)
        factor = 1.0
        if HAS_FACTOR:
            factor = tl.load(FACTOR + row)
        loss, d_log_ratio, d_logp, estimate, clipped = token_loss(
            logp, log_ratio, ref, advantage, factor, beta, low, high, delta,
            HAS_REF, HAS_DELTA, HAS_FACTOR, POLICY, KL, KL_RATIO,
        )  # fmt: skip
        weight = tl.load(WEIGHTS + row)
        tl.store(LOGPS + row, logp)
        tl.store(NORMS + 2 * row, m)
        tl.store(NORMS + 2 * row + 1, log_s)
        tl.store(ENTROPY + row, entropy)
        tl.store(KL_OUT + row, estimate)
        tl.store(LOSS + row, weight * loss)
        tl.store(D_LOGPS + row, weight * (d_log_ratio + d_logp))
        tl.store(CLIPPED + row, clipped)
    else:
        tl.store(LOGPS + row, 0.0)
        tl.store(NORMS + 2 * row, 0.0)
        tl.store(NORMS + 2 * row + 1, 0.0)
        tl.store(ENTROPY + row, 0.0)
        tl.store(KL_OUT + row, 0.0)
        tl.store(LOSS + row, 0.0)
        tl.store(D_LOGPS + row, 0.0)
        tl.store(CLIPPED + row, 0.0)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_VECTORS)
def rows_backward_kernel(
    Z, OUT, IDS, NORMS, ENTROPY, GRAD_LOGPS, GRAD_ENTROPY, SCALE,
    inner, stride_outer: tl.int64, stride_inner: tl.int64, stride_v: tl.int64,
    out_outer: tl.int64, out_inner: tl.int64, out_v: tl.int64, vocab, inv_temp, blocks,
    HAS_LOGPS: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_SCALE: tl.constexpr,
    UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, OUT_CONTIGUOUS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of d loss / d logits. OUT may be Z: each element is read before it is written."""
    program = tl.program_id(0)
    row = program // blocks
    g = 0.0
    h = 0.0
    if HAS_LOGPS:
        g = tl.load(GRAD_LOGPS + row) * inv_temp
    if HAS_ENTROPY:
        h = tl.load(GRAD_ENTROPY + row) * inv_temp
    if HAS_SCALE:
        scale = tl.load(SCALE).to(tl.float32)
        g = g * scale
        h = h * scale
    Z += _row_offset(row, inner, stride_outer, stride_inner, UNIT)
    OUT += _row_offset(row, inner, out_outer, out_inner, UNIT)
    columns = vocab * UNIT
    cols = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    offsets = cols if CONTIGUOUS else cols.to(tl.int64) * stride_v
    outs = cols if OUT_CONTIGUOUS else cols.to(tl.int64) * out_v
    if (g == 0.0) & (h == 0.0):  # a row without a gradient may hold anything, nan included
        tl.store(OUT + outs, tl.zeros((BLOCK,), OUT.dtype.element_ty), mask=cols < columns)
    else:
        z = tl.load(Z + offsets, mask=cols < columns, other=-float("inf")).to(tl.float32)
        index = tl.load(IDS + row)
        m = tl.load(NORMS + 2 * row)
        log_s = tl.load(NORMS + 2 * row + 1)
        grad = _grad_logits(z, cols, index, m, log_s, ENTROPY + row, g, h, inv_temp, HAS_ENTROPY)
        tl.store(OUT + outs, grad.to(OUT.dtype.element_ty), mask=cols < columns)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_VECTORS)
def tile_backward_kernel(
    Z, OUT, IDS, NORMS, ENTROPY, GRAD_LOGPS, GRAD_ENTROPY, vocab, inv_temp,
    HAS_LOGPS: tl.constexpr, HAS_ENTROPY: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d loss / d logits of a contiguous float32 tile, written as 16 bits over the tile itself.

    Element c of a row is read at byte 4c and written at byte 2c, so a program never overwrites
    unread elements. The barriers separate each block's reads from its writes.
    """
    row = tl.program_id(0)
    columns = vocab * UNIT
    Z += row.to(tl.int64) * columns
    OUT += row.to(tl.int64) * columns * 2
    g = 0.0
    h = 0.0
    if HAS_LOGPS:
        g = tl.load(GRAD_LOGPS + row) * inv_temp
    if HAS_ENTROPY:
        h = tl.load(GRAD_ENTROPY + row) * inv_temp
    silent = (g == 0.0) & (h == 0.0)
    m = tl.load(NORMS + 2 * row)
    log_s = tl.load(NORMS + 2 * row + 1)
    index = tl.load(IDS + row)
    for start in range(0, columns, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(Z + cols, mask=cols < columns, other=-float("inf"))
        grad = _grad_logits(z, cols, index, m, log_s, ENTROPY + row, g, h, inv_temp, HAS_ENTROPY)
        grad = tl.where(silent, 0.0, grad)
        tl.debug_barrier()
        tl.store(OUT + cols, grad.to(OUT.dtype.element_ty), mask=cols < columns)
        tl.debug_barrier()


# ---- launches ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """How to address the rows of a (..., V) tensor, viewed as (outer, inner, V).

    The row strides and `vocab` count units of `unit` elements, `column_stride` counts elements.
    """

    count: int
    inner: int
    outer_stride: int
    inner_stride: int
    column_stride: int
    vocab: int
    unit: int


def rows_of(logits: Tensor, unit: int = 16) -> tuple[Tensor, _Rows]:
    """The tensor and its addresses. Copies only if the leading dimensions can't fold into two."""
    vocab = logits.shape[-1]
    if logits.ndim == 1:
        logits = logits[None]
    if logits.ndim > 3:
        logits = logits.flatten(0, -3)
    outer, inner = (1, logits.shape[0]) if logits.ndim == 2 else logits.shape[:2]
    strides = logits.stride()
    outer_stride, inner_stride = (0, strides[0]) if logits.ndim == 2 else strides[:2]
    if strides[-1] != 1 or any(n % unit for n in (outer_stride, inner_stride, vocab)):
        unit = 1
    rows = _Rows(
        count=outer * inner,
        inner=max(inner, 1),
        outer_stride=outer_stride // unit,
        inner_stride=inner_stride // unit,
        column_stride=strides[-1],
        vocab=vocab // unit,
        unit=unit,
    )
    return logits, rows


def rows_forward(logits: Tensor, ids: Tensor, inv_temp: float) -> tuple[Tensor, Tensor, Tensor]:
    """(..., V) logits, (R,) ids -> log-probs (R,), norms (R, 2) and entropies (R,), float32."""
    logits, rows = rows_of(logits)
    logps, entropy = _empty(rows.count, logits.device, 2)
    (norms,) = _empty((rows.count, 2), logits.device, 1)
    if rows.count:
        with _on(logits.device):
            rows_forward_kernel[(rows.count,)](
                logits, ids.contiguous(), logps, norms, entropy,
                *_addresses(rows), rows.vocab, inv_temp,
                UNIT=rows.unit, CONTIGUOUS=rows.column_stride == 1, BLOCK=_forward_block(rows),
                num_warps=FORWARD_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    return logps, norms, entropy


def rows_backward(
    logits: Tensor,
    ids: Tensor,
    norms: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    inv_temp: float,
    out: Tensor,
    scale: Tensor | None = None,
) -> None:
    """Gradient in the logits into `out`, which may be `logits`; `scale` is a 0-d factor."""
    wanted = out
    out, out_rows = rows_of(out)
    copied = out.untyped_storage().data_ptr() != wanted.untyped_storage().data_ptr()
    logits, rows = rows_of(logits, out_rows.unit)
    if out_rows.unit != rows.unit:
        _, out_rows = rows_of(out, rows.unit)
    if not rows.count:
        return
    contiguous = rows.column_stride == out_rows.column_stride == 1
    block = BACKWARD_BLOCK if contiguous else STRIDED_BLOCK
    blocks = triton.cdiv(rows.vocab * rows.unit, block)
    with _on(logits.device):
        rows_backward_kernel[(rows.count * blocks,)](
            logits, out, ids.contiguous(), norms, norms if entropy is None else entropy,
            norms if grad_logps is None else grad_logps,
            norms if grad_entropy is None else grad_entropy,
            norms if scale is None else scale,
            *_addresses(rows), out_rows.outer_stride, out_rows.inner_stride, out_rows.column_stride,
            rows.vocab, inv_temp, blocks,
            HAS_LOGPS=grad_logps is not None, HAS_ENTROPY=grad_entropy is not None,
            HAS_SCALE=scale is not None,
            UNIT=rows.unit, CONTIGUOUS=rows.column_stride == 1,
            OUT_CONTIGUOUS=out_rows.column_stride == 1, BLOCK=block,
            num_warps=BACKWARD_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    if copied:
        wanted.copy_(out.view(wanted.shape))


def tile_backward(
    tile: Tensor,
    ids: Tensor,
    norms: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    inv_temp: float,
    dtype: torch.dtype,
) -> Tensor:
    """(R, V) 16-bit gradient, stored in the memory of the contiguous (R, V) float32 tile."""
    count, vocab = tile.shape
    out = tile.view(dtype)[:, :vocab]  # the front half of each row's bytes
    unit = 16 if vocab % 16 == 0 else 1
    if count:
        with _on(tile.device):
            tile_backward_kernel[(count,)](
                tile, out, ids.contiguous(), norms, norms if entropy is None else entropy,
                norms if grad_logps is None else grad_logps,
                norms if grad_entropy is None else grad_entropy,
                vocab // unit, inv_temp,
                HAS_LOGPS=grad_logps is not None, HAS_ENTROPY=grad_entropy is not None, UNIT=unit,
                BLOCK=FORWARD_BLOCK if unit == 16 else ODD_TILE_BLOCK,
                num_warps=FORWARD_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    return out


@dataclass(frozen=True)
class GRPORows:
    """The results of one launch, float32: norms (R, 2), the others (R,).

    `loss` and `d_logps` include the token's weight.
    """

    norms: Tensor
    logps: Tensor
    entropy: Tensor
    kl: Tensor
    loss: Tensor
    d_logps: Tensor
    clipped: Tensor


def grpo_forward(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor,
    sequence: Tensor,
    advantages: Tensor,
    weights: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    factor: Tensor | None,
    args: LossArgs,
    *,
    inv_temp: float,
    num_generations: int | None,
    eps: float,
) -> GRPORows:
    """The GRPO loss of R tokens and its gradient in their log-probs, in one launch.

    Args:
        logits: (..., V), R rows; ids, mask, sequence, weights, old_logps, ref_logps, factor: (R,).
        advantages: (N,); with `num_generations`, rewards to normalize here.
        args: names and numbers of a loss whose `scope` is a token.
    """
    logits, rows = rows_of(logits)
    (norms,) = _empty((rows.count, 2), logits.device, 1)
    outs = GRPORows(norms, *_empty(rows.count, logits.device, 6))
    if rows.count:
        with _on(logits.device):
            grpo_forward_kernel[(rows.count,)](
                logits, ids.contiguous(), mask.contiguous().view(torch.uint8), sequence,
                advantages, weights,
                weights if old_logps is None else old_logps,
                weights if ref_logps is None else ref_logps,
                weights if factor is None else factor,
                outs.logps, outs.norms, outs.entropy, outs.kl, outs.loss, outs.d_logps,
                outs.clipped,
                *_addresses(rows), rows.vocab, inv_temp,
                num_generations or 1, float(args.beta), *_bounds(args), float(args.delta or 0.0),
                FROM_REWARDS=num_generations is not None,
                GROUP_BLOCK=triton.next_power_of_2(num_generations or 1), EPS=eps,
                HAS_OLD=old_logps is not None, HAS_REF=ref_logps is not None,
                HAS_DELTA=args.delta is not None, HAS_FACTOR=factor is not None,
                **_formulas(args),
                UNIT=rows.unit, CONTIGUOUS=rows.column_stride == 1, BLOCK=_forward_block(rows),
                num_warps=FORWARD_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    return outs


def _bounds(args: LossArgs) -> tuple[float, float]:
    """`low` and `high`: the ratio's bounds, or sapo's temperatures."""
    if args.loss_type == "sapo":
        return float(args.sapo_temperature_neg), float(args.sapo_temperature_pos)
    if args.loss_type == "cispo":
        return 0.0, float(args.upper_epsilon)
    return float(1 - args.epsilon_low), float(1 + args.upper_epsilon)


def _formulas(args: LossArgs) -> dict[str, int]:
    """Which formulas `token_loss` is compiled for."""
    policy = {"cispo": 1, "sapo": 2}.get(args.loss_type, 0)
    kl_ratio = args.use_bias_correction_kl
    return {"POLICY": policy, "KL": KL_KINDS.index(args.kl) + 1, "KL_RATIO": kl_ratio}


def _forward_block(rows: _Rows) -> int:
    return FORWARD_BLOCK if rows.column_stride == 1 else STRIDED_BLOCK


def _addresses(rows: _Rows) -> tuple[int, int, int, int]:
    return rows.inner, rows.outer_stride, rows.inner_stride, rows.column_stride


def _empty(shape: int | tuple[int, ...], device: torch.device, number: int) -> list[Tensor]:
    return [torch.empty(shape, dtype=torch.float32, device=device) for _ in range(number)]


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Make the tensors' device current, because Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
