"""Triton kernels of attention over packed rows, and their launches. Only `backend` imports this
module.

Lengths are in the layout's tables, so a new row compiles nothing. Shapes and letters: see
`prefix_attention`. A completion's rows see two ranges of keys, its prompt's and its own; `starts`
has each row's first own key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from virft_fast.kernels.backend import interpreted
from virft_fast.kernels.triton_decode import _capability, _empty, _pad
from virft_fast.kernels.triton_rows import _on

if TYPE_CHECKING:
    from virft_fast.kernels.prefix_attention import PrefixLayout

_PRECISION = tl.constexpr("tf32x3")  # of float32 products: about that of float32
_LOG2E = tl.constexpr(1.4426950408889634)
# Blocks of a launch: CUDA has at most 65,535 programs on an axis other than the first, where heads
# are. A multiple of 16, so that the rest of a table is as aligned as its start.
MAX_BLOCKS = 65_520


# ---- device functions ----------------------------------------------------------------------------


@triton.jit
def _rows(
    P, first, end, stride, E: tl.constexpr, BE: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """(BLOCK, BE) numbers of a head from row `first` on, 0 from `end` on. WIDE: in float32, because
    the interpreter can't multiply in bfloat16."""
    n, e = tl.arange(0, BLOCK)[:, None], tl.arange(0, BE)[None]
    # 64-bit numbers are scalars: whole blocks of them would take too many registers.
    origin = P + tl.cast(first, tl.int64) * stride
    tile = tl.load(origin + n * stride + e, mask=(n < end - first) & (e < E), other=0.0)
    if WIDE:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _store_rows(
    P, first, end, stride, tile, E: tl.constexpr, BE: tl.constexpr, BLOCK: tl.constexpr
):
    n, e = tl.arange(0, BLOCK)[:, None], tl.arange(0, BE)[None]
    origin = P + tl.cast(first, tl.int64) * stride
    tl.store(origin + n * stride + e, tile.to(P.dtype.element_ty), mask=(n < end - first) & (e < E))


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision=_PRECISION)


@triton.jit
def _query_block(BLOCKS, STARTS, BM: tl.constexpr):
    """This program's block of queries: first row and end, first own key, the prompt's first key and
    end, the rows, and the first own key of each."""
    BLOCKS += tl.program_id(1) * 5
    first, end, own = tl.load(BLOCKS), tl.load(BLOCKS + 1), tl.load(BLOCKS + 2)
    rows = first + tl.arange(0, BM)
    starts = tl.load(STARTS + rows, mask=rows < end, other=0)
    return first, end, own, tl.load(BLOCKS + 3), tl.load(BLOCKS + 4), rows, starts


@triton.jit
def _sees(rows, starts, cols, end, OWN: tl.constexpr):
    """(BM, BN), whether rows see keys: of the prompt, those before `end`; of their own, those from
    `starts` up to themselves."""
    if OWN:
        return (cols[None] <= rows[:, None]) & (cols[None] >= starts[:, None])
    else:
        return (cols < end)[None] & (rows >= 0)[:, None]


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["length"])
def forward_kernel(
    QUERY, KEY, VALUE, OUT, LSE, STARTS, BLOCKS, scale, length,
    q_row, q_head, k_row, k_head, v_row, v_head,
    REPEATS: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Program (query head, block of queries)."""
    head, heads = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    first, end, own, prompt, prompt_end, rows, starts = _query_block(BLOCKS, STARTS, BM)
    KEY += head // REPEATS * k_head
    VALUE += head // REPEATS * v_head
    dtype = VALUE.dtype.element_ty
    q = _rows(QUERY + head * q_head, first, end, q_row, E, BE, BM, WIDE)
    m = tl.full((BM,), -float("inf"), tl.float32)
    s = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BE), tl.float32)
    for OWN in tl.static_range(2):
        start = own if OWN else prompt
        stop = end if OWN else prompt_end
        for n in range(start, stop, BN):
            k = _rows(KEY, n, stop, k_row, E, BE, BN, WIDE)
            z = _dot(q, tl.trans(k)) * (scale * _LOG2E)
            z = tl.where(_sees(rows, starts, n + tl.arange(0, BN), stop, OWN), z, -float("inf"))
            new = tl.maximum(m, tl.max(z, 1))
            shift = tl.where(new == -float("inf"), 0.0, new)
            p = tl.exp2(z - shift[:, None])
            alpha = tl.exp2(m - shift)
            s = s * alpha + tl.sum(p, 1)
            v = _rows(VALUE, n, stop, v_row, E, BE, BN, WIDE)
            p = p.to(dtype).to(v.dtype)  # rounded as the values are
            acc = tl.dot(p, v, acc * alpha[:, None], input_precision=_PRECISION)
            m = new
    _store_rows(OUT + head * E, first, end, heads * E, acc / s[:, None], E, BE, BM)
    tl.store(LSE + head * length + rows, m + tl.log2(s), mask=rows < end)


@triton.jit(do_not_specialize=["length"])
def backward_query_kernel(
    QUERY, KEY, VALUE, OUT, GRAD, LSE, DELTA, GRAD_QUERY, STARTS, BLOCKS, scale, length,
    q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head,
    REPEATS: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Program (query head, block of queries). Also stores DELTA, each row's product of the output
    and its gradient."""
    head, heads = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    first, end, own, prompt, prompt_end, rows, starts = _query_block(BLOCKS, STARTS, BM)
    KEY += head // REPEATS * k_head
    VALUE += head // REPEATS * v_head
    dtype = KEY.dtype.element_ty
    g = _rows(GRAD + head * g_head, first, end, g_row, E, BE, BM, WIDE)
    out = _rows(OUT + head * E, first, end, heads * E, E, BE, BM, WIDE)
    delta = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
    place = head * length + rows
    tl.store(DELTA + place, delta, mask=rows < end)
    lse = tl.load(LSE + place, mask=rows < end, other=0.0)
    q = _rows(QUERY + head * q_head, first, end, q_row, E, BE, BM, WIDE)
    acc = tl.zeros((BM, BE), tl.float32)
    for OWN in tl.static_range(2):
        start = own if OWN else prompt
        stop = end if OWN else prompt_end
        for n in range(start, stop, BN):
            k = _rows(KEY, n, stop, k_row, E, BE, BN, WIDE)
            v = _rows(VALUE, n, stop, v_row, E, BE, BN, WIDE)
            z = _dot(q, tl.trans(k)) * (scale * _LOG2E) - lse[:, None]
            sees = _sees(rows, starts, n + tl.arange(0, BN), stop, OWN)
            d = tl.where(sees, tl.exp2(z), 0.0) * (_dot(g, tl.trans(v)) - delta[:, None])
            acc = tl.dot(d.to(dtype).to(k.dtype), k, acc, input_precision=_PRECISION)
    _store_rows(GRAD_QUERY + head * E, first, end, heads * E, acc * scale, E, BE, BM)


@triton.jit(do_not_specialize=["length"])
def backward_key_kernel(
    QUERY, KEY, VALUE, GRAD, LSE, DELTA, GRAD_KEY, GRAD_VALUE, SHARES, STARTS, ITEMS, scale, length,
    q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head,
    REPEATS: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Program (key/value head, item of `PrefixLayout.key_blocks`)."""
    head, heads = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    ITEMS += tl.program_id(1) * 7
    first, end, last = tl.load(ITEMS), tl.load(ITEMS + 1), tl.load(ITEMS + 2)
    completions, place = tl.load(ITEMS + 3), tl.load(ITEMS + 6)
    steps = tl.cdiv(last - first, BM)  # of a query head
    cols = first + tl.arange(0, BN)
    k = _rows(KEY + head * k_head, first, end, k_row, E, BE, BN, WIDE)
    v = _rows(VALUE + head * v_head, first, end, v_row, E, BE, BN, WIDE)
    dtype = QUERY.dtype.element_ty
    grad_key = tl.zeros((BN, BE), tl.float32)
    grad_value = tl.zeros((BN, BE), tl.float32)
    for step in range(tl.load(ITEMS + 4), tl.load(ITEMS + 5)):
        query_head = head * REPEATS + step // steps
        row = first + step % steps * BM
        rows = row + tl.arange(0, BM)
        ok = rows < last
        # All rows from the block on see a prompt's keys, but only one completion sees its own.
        starts = tl.load(STARTS + rows, mask=ok, other=0) * completions
        at = query_head * length + rows
        lse = tl.load(LSE + at, mask=ok, other=0.0)
        delta = tl.load(DELTA + at, mask=ok, other=0.0)
        q = _rows(QUERY + query_head * q_head, row, last, q_row, E, BE, BM, WIDE)
        g = _rows(GRAD + query_head * g_head, row, last, g_row, E, BE, BM, WIDE)
        # Keys before queries: their 64 rows are what one warp group multiplies.
        z = _dot(k, tl.trans(q)) * (scale * _LOG2E) - lse[None]
        sees = (cols[:, None] <= rows[None]) & (cols[:, None] >= starts[None]) & ok[None]
        p = tl.where(sees, tl.exp2(z), 0.0)
        d = p * (_dot(v, tl.trans(g)) - delta[None])
        p, d = p.to(dtype).to(g.dtype), d.to(dtype).to(q.dtype)
        grad_value = tl.dot(p, g, grad_value, input_precision=_PRECISION)
        grad_key = tl.dot(d, q, grad_key, input_precision=_PRECISION)
    if place < 0:
        _store_rows(GRAD_KEY + head * E, first, end, heads * E, grad_key * scale, E, BE, BN)
        _store_rows(GRAD_VALUE + head * E, first, end, heads * E, grad_value, E, BE, BN)
    else:
        SHARES += (place.to(tl.int64) * heads + head) * (2 * BN * E)
        _store_rows(SHARES, 0, BN, E, grad_key * scale, E, BE, BN)
        _store_rows(SHARES + BN * E, 0, BN, E, grad_value, E, BE, BN)


@triton.jit
def sum_shares_kernel(
    SHARES, GRAD_KEY, GRAD_VALUE, SPLIT, E: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr
):
    """Program (key/value head, split block): the sum of its items' shares, in their order."""
    head, heads = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    SPLIT += tl.program_id(1) * 4
    first, end, place, count = (
        tl.load(SPLIT), tl.load(SPLIT + 1), tl.load(SPLIT + 2), tl.load(SPLIT + 3),
    )  # fmt: skip
    grad_key = tl.zeros((BN, BE), tl.float32)
    grad_value = tl.zeros((BN, BE), tl.float32)
    for number in range(count):
        share = SHARES + ((place + number).to(tl.int64) * heads + head) * (2 * BN * E)
        grad_key += _rows(share, 0, BN, E, E, BE, BN, False)
        grad_value += _rows(share + BN * E, 0, BN, E, E, BE, BN, False)
    _store_rows(GRAD_KEY + head * E, first, end, heads * E, grad_key, E, BE, BN)
    _store_rows(GRAD_VALUE + head * E, first, end, heads * E, grad_value, E, BE, BN)


# ---- launches ------------------------------------------------------------------------------------

# By bits of the numbers and GPU (80: Ampere, 90: Hopper and later): queries and keys per step,
# warps, stages. Two programs of 16 bits fit on a multiprocessor at E = 128, and spill no registers,
# by scripts/check_triton.py; larger tiles spill. In float32, E = 128 spills up to 112 bytes. Timing
# chooses nothing: the tiles determine the order of sums, and every run has to give the same bits.
Tiles = dict[tuple[int, int], tuple[int, int, int, int]]
_FLOAT32: Tiles = dict.fromkeys([(32, 80), (32, 90)], (32, 32, 8, 1))
FORWARD: Tiles = {(16, 80): (64, 64, 4, 2), (16, 90): (64, 64, 4, 3)} | _FLOAT32
BACKWARD_QUERY: Tiles = {(16, 80): (64, 32, 4, 2), (16, 90): (64, 64, 4, 2)} | _FLOAT32
BACKWARD_KEY: Tiles = dict.fromkeys([(16, 80), (16, 90)], (32, 64, 4, 2)) | _FLOAT32


def tiles(kernel: Tiles, tensor: Tensor) -> tuple[int, int, dict[str, int | bool]]:
    """Queries and keys per step of a kernel for tensors like this one, and its launch options."""
    arch = 90 if _capability(tensor.device) >= 9 else 80
    queries, keys, warps, stages = kernel[8 * tensor.element_size(), arch]
    return queries, keys, {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def forward(
    query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, scaling: float
) -> tuple[Tensor, Tensor]:
    """Output (S, H, E), and the log-sum-exp of the scores, (H, S) float32 in base 2."""
    length, heads, _ = query.shape
    out = _empty(query.shape, query.dtype, query.device)
    lse = _empty((heads, length), torch.float32, query.device)
    queries, keys, options = tiles(FORWARD, query)
    blocks = layout.query_blocks(queries)
    for part in blocks.split(MAX_BLOCKS) if len(blocks) else ():
        with _on(query.device):
            forward_kernel[(heads, len(part))](
                query, key, value, out, lse, layout.segment_starts, part, scaling, length,
                *_strides(query, key, value), BM=queries, BN=keys, **_sizes(query, key), **options,
            )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    layout: PrefixLayout, scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value."""
    grad = grad if grad.stride(2) == 1 else grad.contiguous()
    grads = [_empty(states.shape, states.dtype, states.device) for states in (query, key, value)]
    queries, keys, options = tiles(BACKWARD_QUERY, query)
    blocks = layout.query_blocks(queries)
    if not blocks.numel():
        return grads[0], grads[1], grads[2]
    (length, heads, size), kv_heads = query.shape, key.shape[1]
    sizes, strides = _sizes(query, key), _strides(query, key, value, grad)
    delta, starts = _empty(lse.shape, torch.float32, query.device), layout.segment_starts
    with _on(query.device):
        for part in blocks.split(MAX_BLOCKS):
            backward_query_kernel[(heads, len(part))](
                query, key, value, out, grad, lse, delta, grads[0], starts, part, scaling, length,
                *strides, BM=queries, BN=keys, **sizes, **options,
            )  # fmt: skip
        queries, keys, options = tiles(BACKWARD_KEY, query)
        items, split, count = layout.key_blocks(queries, keys, heads, heads // kv_heads)
        shares = _empty((count, kv_heads, 2, keys, size), torch.float32, query.device)
        for part in items.split(MAX_BLOCKS):
            backward_key_kernel[(kv_heads, len(part))](
                query, key, value, grad, lse, delta, *grads[1:], shares, starts, part, scaling,
                length, *strides, BM=queries, BN=keys, **sizes, **options,
            )  # fmt: skip
        for part in split.split(MAX_BLOCKS) if len(split) else ():
            sum_shares_kernel[(kv_heads, len(part))](
                shares, *grads[1:], part, E=size, BE=_pad(size), BN=keys, enable_fp_fusion=True
            )
    return grads[0], grads[1], grads[2]


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(number for tensor in tensors for number in tensor.stride()[:2])


def _sizes(query: Tensor, key: Tensor) -> dict[str, int | bool]:
    size = query.shape[2]
    return {"REPEATS": query.shape[1] // key.shape[1], "E": size, "BE": _pad(size),
            "WIDE": interpreted()}  # fmt: skip
