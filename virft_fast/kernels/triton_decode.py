"""Triton kernels of one decoding step, and their launches. Only `backend` imports this module.

Lengths, positions and row offsets are read from memory. The sizes of heads, the number of tokens
per pass and the hidden size are compiled in; cache sizes and row counts are arguments. Shapes and
letters: see `decode`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from virft_fast.kernels.backend import interpreted
from virft_fast.kernels.triton_rows import _on

# By bits of the caches: keys per step of a program's loop, for heads of up to 128 numbers, and its
# stages.
KEYS_BLOCK, STAGES = {16: 64, 32: 32}, {16: 3, 32: 2}
# Queries (row, token and head) per program, the most that spill no registers by
# scripts/check_triton.py. On Hopper and Blackwell, 64 are one warp group's product.
QUERIES_BLOCK, LARGE_QUERIES_BLOCK, LARGE_ON = {16: 32, 32: 16}, 64, (9, 10)
MIN_SPLIT = 128  # keys; smaller splits write and read more partial sums than keys
ELEMENTS_BLOCK = 1024
_PRECISION = tl.constexpr("tf32x3")  # of float32 products: about that of float32
_RUNTIME = ("prompts", "prompt", "own", "splits", "rows", "scale", "eps")


# ---- device functions ----------------------------------------------------------------------------


@triton.jit
def _visit(
    q, KEYS, VALUES, start, stop, limit, m, s, acc, scale, E: tl.constexpr, BN: tl.constexpr
):
    """Fold keys `start` to `stop` into the running softmax (m, s, acc), in base 2. A query sees the
    keys below its `limit`."""
    e = tl.arange(0, q.shape[1])[None]
    for first in range(start, stop, BN):
        n = first + tl.arange(0, BN)
        place = n[:, None] * E + e
        inside = (n < stop)[:, None] & (e < E)
        k = tl.load(KEYS + place, mask=inside, other=0.0)
        v = tl.load(VALUES + place, mask=inside, other=0.0)
        z = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=_PRECISION) * scale
        z = tl.where(n[None] < limit[:, None], z, -float("inf"))
        new = tl.maximum(m, tl.max(z, 1))
        shift = tl.where(new == -float("inf"), 0.0, new)
        p = tl.exp2(z - shift[:, None])
        alpha = tl.exp2(m - shift)
        s = s * alpha + tl.sum(p, 1)
        p = p.to(v.dtype).to(q.dtype)  # rounded as the values are
        acc = tl.dot(p, v.to(q.dtype), acc * alpha[:, None], input_precision=_PRECISION)
        m = new
    return m, s, acc


@triton.jit
def _load_queries(
    QUERY, at, ok, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, WIDE: tl.constexpr
):
    """Queries (BM, BE), where they are, and an empty running softmax. WIDE: in float32, because the
    interpreter can't multiply in bfloat16."""
    e = tl.arange(0, BE)[None]
    place = at[:, None] * E + e
    inside = ok[:, None] & (e < E)
    q = tl.load(QUERY + place, mask=inside, other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    m = tl.full((BM,), -float("inf"), tl.float32)
    return q, place, inside, m, tl.zeros((BM,), tl.float32), tl.zeros((BM, BE), tl.float32)


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_RUNTIME)
def prompt_attention_kernel(
    QUERY, KEYS, VALUES, LENGTHS, FIRST_ROWS, M, S, ACC, prompt, splits, rows, scale,
    Q: tl.constexpr, K: tl.constexpr, REPEATS: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (prompt and tile, key/value head, split): BM queries of the prompt's rows over one
    split of its keys."""
    b, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    head, split = tl.program_id(1), tl.program_id(2)
    first, last = tl.load(FIRST_ROWS + b), tl.load(FIRST_ROWS + b + 1)
    if first + tile * BM // (Q * REPEATS) < last:
        i = tile * BM + tl.arange(0, BM)  # over (row, token, head of this key/value head)
        ok = first + i // (Q * REPEATS) < last
        # 64-bit numbers are scalars: whole blocks of them would take too many registers.
        origin = first.to(tl.int64) * (Q * K * REPEATS)
        at = i // REPEATS * (K * REPEATS) + head * REPEATS + i % REPEATS
        q, place, inside, m, s, acc = _load_queries(QUERY + origin * E, at, ok, E, BE, BM, WIDE)
        length = tl.load(LENGTHS + b).to(tl.int32)
        share = tl.cdiv(tl.cdiv(length, splits), BN) * BN
        start = split * share
        stop = tl.minimum(start + share, length)
        cache = (b.to(tl.int64) * K + head) * prompt * E
        limit = tl.zeros((BM,), tl.int32) + stop
        m, s, acc = _visit(
            q, KEYS + cache, VALUES + cache, start, stop, limit, m, s, acc, scale, E, BN
        )
        partial = origin + rows.to(tl.int64) * (Q * K * REPEATS) * split
        tl.store(M + partial + at, m, mask=ok)
        tl.store(S + partial + at, s, mask=ok)
        tl.store(ACC + partial * E + place, acc, mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def own_attention_kernel(
    QUERY, KEYS, VALUES, LENGTHS, FIRST_ROWS, M, S, ACC, OUT, prompts, own, splits, rows, scale,
    Q: tl.constexpr, K: tl.constexpr, REPEATS: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (row, key/value head, tile): BM queries of the row over its own keys, merged with the
    partial results of its prompt."""
    row, head = tl.program_id(0), tl.program_id(1)
    i = tl.program_id(2) * BM + tl.arange(0, BM)  # over (token, head of this key/value head)
    ok = i < Q * REPEATS
    origin = row.to(tl.int64) * (Q * K * REPEATS)
    at = i // REPEATS * (K * REPEATS) + head * REPEATS + i % REPEATS
    q, place, inside, m, s, acc = _load_queries(QUERY + origin * E, at, ok, E, BE, BM, WIDE)
    length = tl.load(LENGTHS + row).to(tl.int32)
    cache = (row.to(tl.int64) * K + head) * own * E
    m, s, acc = _visit(
        q, KEYS + cache, VALUES + cache, 0, length + Q, length + 1 + i // REPEATS, m, s, acc,
        scale, E, BN,
    )  # fmt: skip
    if row >= tl.load(FIRST_ROWS + prompts):
        splits = 0
    for split in range(0, splits):
        partial = origin + rows.to(tl.int64) * (Q * K * REPEATS) * split
        m_prompt = tl.load(M + partial + at, mask=ok, other=-float("inf"))
        new = tl.maximum(m, m_prompt)
        alpha, beta = tl.exp2(m - new), tl.exp2(m_prompt - new)
        s = s * alpha + beta * tl.load(S + partial + at, mask=ok, other=0.0)
        partial_acc = tl.load(ACC + partial * E + place, mask=inside, other=0.0)
        acc = acc * alpha[:, None] + beta[:, None] * partial_acc
        m = new
    tl.store(OUT + origin * E + place, (acc / s[:, None]).to(OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def rotate_kernel(
    QKV, COS, SIN, POSITIONS, LENGTHS, Q_NORM, K_NORM, QUERY, KEYS, VALUES, own, eps,
    Q: tl.constexpr, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Program (token of a row, head of query, key or value): halves a and b of its E numbers."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, t = token // Q, token % Q
    cols = tl.arange(0, HALF)
    ok = cols < E // 2
    source = QKV + (token * (H + 2 * K) + head) * E + cols
    a = tl.load(source, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(source + E // 2, mask=ok, other=0.0).to(tl.float32)
    dtype = QKV.dtype.element_ty
    kept = KEYS.dtype.element_ty
    slot = ((row * K + (head - H) % K) * own + tl.load(LENGTHS + row) + t) * E + cols
    if head >= H + K:
        tl.store(VALUES + slot, a.to(kept), mask=ok)
        tl.store(VALUES + slot + E // 2, b.to(kept), mask=ok)
    else:
        if Q_NORM is not None:
            scale = tl.rsqrt(tl.sum(a * a + b * b, 0) / E + eps)
            if head < H:
                NORM = Q_NORM
            else:
                NORM = K_NORM
            weight = tl.load(NORM + cols, mask=ok, other=0.0).to(tl.float32)
            a = ((a * scale).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
            weight = tl.load(NORM + E // 2 + cols, mask=ok, other=0.0).to(tl.float32)
            b = ((b * scale).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
        at = (tl.load(POSITIONS + row) + t) * E + cols
        first = a * tl.load(COS + at, mask=ok, other=0.0)
        first += b * tl.load(SIN + at, mask=ok, other=0.0)
        second = b * tl.load(COS + at + E // 2, mask=ok, other=0.0)
        second += a * tl.load(SIN + at + E // 2, mask=ok, other=0.0)
        if head < H:
            target = QUERY + (token * H + head) * E + cols
        else:
            target = KEYS + slot
        tl.store(target, first.to(kept), mask=ok)
        tl.store(target + E // 2, second.to(kept), mask=ok)


@triton.jit(do_not_specialize=_RUNTIME)
def add_rms_norm_kernel(
    HIDDEN, DELTA, WEIGHT, TOTAL, NORMED, eps, D: tl.constexpr, BLOCK: tl.constexpr
):
    """Program: one row."""
    cols = tl.arange(0, BLOCK)
    ok = cols < D
    at = tl.program_id(0).to(tl.int64) * D + cols
    x = tl.load(HIDDEN + at, mask=ok, other=0.0)
    dtype = HIDDEN.dtype.element_ty
    if DELTA is not None:
        x = (x.to(tl.float32) + tl.load(DELTA + at, mask=ok, other=0.0).to(tl.float32)).to(dtype)
        tl.store(TOTAL + at, x, mask=ok)
    x = x.to(tl.float32)
    x = (x * tl.rsqrt(tl.sum(x * x, 0) / D + eps)).to(dtype).to(tl.float32)
    weight = tl.load(WEIGHT + cols, mask=ok, other=0.0).to(tl.float32)
    tl.store(NORMED + at, (x * weight).to(dtype), mask=ok)


@triton.jit
def silu_mul_kernel(GATE_UP, OUT, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, block)."""
    row, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = cols < SIZE
    gate = tl.load(GATE_UP + row * 2 * SIZE + cols, mask=ok, other=0.0)
    up = tl.load(GATE_UP + row * 2 * SIZE + SIZE + cols, mask=ok, other=0.0).to(tl.float32)
    x = gate.to(tl.float32)
    x = (x / (1.0 + tl.exp(-x))).to(gate.dtype).to(tl.float32)
    tl.store(OUT + row * SIZE + cols, (x * up).to(gate.dtype), mask=ok)


# ---- launches ------------------------------------------------------------------------------------


def rotate_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, keys: Tensor, values: Tensor,
    lengths: Tensor, num_heads: int, q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    (rows, kv_heads, own, size), tokens = keys.shape, qkv.shape[1]
    query = _empty((rows, tokens, num_heads, size), keys.dtype, keys.device)
    with _on(qkv.device):
        rotate_kernel[(rows * tokens, num_heads + 2 * kv_heads)](
            qkv.contiguous(), cos, sin, positions, lengths, q_norm, k_norm, query, keys, values,
            own, eps,
            Q=tokens, H=num_heads, K=kv_heads, E=size, HALF=triton.next_power_of_2(size // 2),
            num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return query


def decode_attention(
    query: Tensor, prompt_keys: Tensor, prompt_values: Tensor, prompt_lengths: Tensor,
    first_rows: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scaling: float,
    max_rows: int,
) -> Tensor:  # fmt: skip
    (rows, tokens, heads, size), (groups, kv_heads, prompt, _) = query.shape, prompt_keys.shape
    queries = tokens * heads // kv_heads
    bits = 8 * keys.element_size()
    largest = queries_block(bits, _capability(query.device))
    block, own_block = _pad(max_rows * queries, largest), _pad(queries, largest)
    tiles = triton.cdiv(max_rows * queries, block)
    splits = num_splits(prompt, groups * tiles * kv_heads, query.device)
    m, s = (_empty((splits, rows, tokens, heads), torch.float32, query.device) for _ in range(2))
    acc = _empty((splits, *query.shape), torch.float32, query.device)
    query, out = query.contiguous(), _empty(query.shape, query.dtype, query.device)
    scale = scaling * 1.4426950408889634
    sizes = {"Q": tokens, "K": kv_heads, "REPEATS": heads // kv_heads, "E": size,
             "BE": _pad(size), "BN": keys_block(bits, size), "WIDE": interpreted(),
             "num_stages": STAGES[bits], "enable_fp_fusion": True}  # fmt: skip
    with _on(query.device):
        prompt_attention_kernel[(groups * tiles, kv_heads, splits)](
            query, prompt_keys, prompt_values, prompt_lengths, first_rows, m, s, acc,
            prompt, splits, rows, scale, BM=block, TILES=tiles, **sizes,
        )  # fmt: skip
        own_attention_kernel[(rows, kv_heads, triton.cdiv(queries, own_block))](
            query, keys, values, lengths, first_rows, m, s, acc, out,
            groups, keys.shape[2], splits, rows, scale, BM=own_block, **sizes,
        )  # fmt: skip
    return out.flatten(2)


def keys_block(bits: int, size: int) -> int:
    """Keys per step of a program's loop, for caches of so many bits and heads of `size` numbers:
    half as many for larger heads, whose keys and values would fill the shared memory."""
    return KEYS_BLOCK[bits] // (2 if size > 128 else 1)


def queries_block(bits: int, capability: int) -> int:
    """The largest number of queries per program, for caches of 16 or 32 bits and a GPU's major
    compute capability."""
    return LARGE_QUERIES_BLOCK if bits == 16 and capability in LARGE_ON else QUERIES_BLOCK[bits]


def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else LARGE_ON[0]


def num_splits(prompt: int, programs: int, device: torch.device) -> int:
    """Into how many parts `programs` programs split P = `prompt` keys: enough for one program on
    each multiprocessor, of at least MIN_SPLIT keys. A captured graph has fixed sizes, so its number
    is fixed."""
    cores = 16  # for the interpreter
    if device.type == "cuda":
        cores = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(triton.cdiv(cores, programs), triton.cdiv(prompt, MIN_SPLIT)))


def add_rms_norm(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    hidden, size = hidden.contiguous(), hidden.shape[-1]
    total = hidden if delta is None else _empty(hidden.shape, hidden.dtype, hidden.device)
    normed = _empty(hidden.shape, hidden.dtype, hidden.device)
    block = triton.next_power_of_2(size)
    with _on(hidden.device):
        add_rms_norm_kernel[(hidden.numel() // size,)](
            hidden, None if delta is None else delta.contiguous(), weight, total, normed, eps,
            D=size, BLOCK=block, num_warps=norm_warps(block), enable_fp_fusion=True,
        )  # fmt: skip
    return total, normed


def norm_warps(block: int) -> int:
    return max(1, min(8, block // 512))


def silu_mul(gate_up: Tensor) -> Tensor:
    size = gate_up.shape[-1] // 2
    out = _empty((*gate_up.shape[:-1], size), gate_up.dtype, gate_up.device)
    with _on(gate_up.device):
        silu_mul_kernel[(out.numel() // size, triton.cdiv(size, ELEMENTS_BLOCK))](
            gate_up.contiguous(), out, SIZE=size, BLOCK=ELEMENTS_BLOCK, enable_fp_fusion=True
        )
    return out


def _pad(size: int, largest: int = 1 << 30) -> int:
    """A power of two, at least 16, as the operands of a product need it."""
    return min(largest, max(16, triton.next_power_of_2(size)))


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)
