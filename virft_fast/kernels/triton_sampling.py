"""Triton kernels that sample tokens, and their launches. Only `backend` imports this module.

1. The highest score of each block of a row; with filters, instead one program per row finds the
   row's highest score and the lowest one that the filters keep.
2. The sum of exp(score - highest) of each block, in float64.
3. One program per row draws a block by these sums, then a token by the block's own.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from virft_fast.kernels.sampling import GOLDEN_GAMMA, MIX
from virft_fast.kernels.triton_decode import _empty
from virft_fast.kernels.triton_rows import _on

BLOCK, WARPS = 2048, 4
SEARCH_BLOCK, SEARCH_WARPS = 2048, 8
_GAMMA, _MIX_1, _MIX_2 = (tl.constexpr(x) for x in (GOLDEN_GAMMA, MIX[0][1], MIX[1][1]))
_LOG2_E, _LN2_HIGH = tl.constexpr(1.4426950408889634), tl.constexpr(0.693145751953125)
_LN2_LOW = tl.constexpr(math.log(2) - 0.693145751953125)
_INF = tl.constexpr(float("inf"))
_RUNTIME = ("position_stride", "temperature", "penalty", "top_k", "log_min_p")


@triton.jit
def _scores(
    LOGITS, BIAS, SEEN, row, cols, stride, vocab, temperature, penalty,
    HAS_BIAS: tl.constexpr, HAS_SEEN: tl.constexpr,
):  # fmt: skip
    """Scores before the filters, rounded as torch rounds them; -inf outside the vocabulary."""
    ok = cols < vocab
    z = tl.load(LOGITS + row * stride + cols, mask=ok, other=-_INF)
    if HAS_BIAS:
        z += tl.load(BIAS + cols, mask=ok, other=0.0)
    if HAS_SEEN:
        seen = tl.load(SEEN + row * vocab + cols, mask=ok, other=0) != 0
        z = tl.where(seen, tl.where(z > 0, tl.div_rn(z, penalty), z * penalty), z)
    return tl.div_rn(z, temperature)


@triton.jit
def _exp(x):
    """exp of numbers <= 0, to about an ulp: the argument is reduced in two parts before `exp2`,
    which is exact for whole numbers."""
    x = tl.maximum(x, -110.0)  # the result is 0
    n = tl.floor(x * _LOG2_E + 0.5)
    return tl.exp2((x - n * _LN2_HIGH - n * _LN2_LOW) * _LOG2_E) * tl.exp2(n)


@triton.jit
def _search(
    LOGITS, BIAS, SEEN, row, stride, vocab, temperature, penalty, highest, low, need,
    SHARE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The highest score x such that at least `need` scores are >= x, or with a SHARE, such that
    scores >= x have this share of the probability of all scores >= `low`.

    Finds the 32 bits of x, two per round, in an order of bits that is the order of numbers.
    """
    x = tl.full((), 0, tl.uint32)
    unit = tl.full((), 1 << 30, tl.uint32)
    for _ in range(0, 16):
        n0 = tl.zeros((BLOCK,), tl.float64)
        n1, n2, n3 = n0, n0, n0
        for start in range(0, vocab, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z = _scores(LOGITS, BIAS, SEEN, row, cols, stride, vocab, temperature, penalty,
                        HAS_BIAS, HAS_SEEN)  # fmt: skip
            bits = z.to(tl.int32, bitcast=True)
            key = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
            if SHARE < 1.0:
                weight = tl.where(z >= low, _exp(z - highest), 0.0).to(tl.float64)
            else:
                weight = tl.where(cols < vocab, 1.0, 0.0).to(tl.float64)
            n0 += weight
            n1 += tl.where(key >= x + unit, weight, 0.0)
            n2 += tl.where(key >= x + 2 * unit, weight, 0.0)
            n3 += tl.where(key >= x + 3 * unit, weight, 0.0)
        if SHARE < 1.0:
            need = tl.sum(n0, 0) * tl.full((), SHARE, tl.float64)
        digit = (tl.sum(n1, 0) >= need).to(tl.uint32) + (tl.sum(n2, 0) >= need).to(tl.uint32)
        x += unit * (digit + (tl.sum(n3, 0) >= need).to(tl.uint32))
        unit = unit >> 2
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ -2147483648, ~bits).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=_RUNTIME)
def highest_kernel(
    LOGITS, BIAS, SEEN, HIGHEST, stride, vocab, temperature, penalty,
    HAS_BIAS: tl.constexpr, HAS_SEEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    z = _scores(LOGITS, BIAS, SEEN, row, block * BLOCK + tl.arange(0, BLOCK), stride, vocab,
                temperature, penalty, HAS_BIAS, HAS_SEEN)  # fmt: skip
    tl.store(HIGHEST + row * tl.num_programs(1) + block, tl.max(z, 0))


@triton.jit(do_not_specialize=_RUNTIME)
def filter_kernel(
    LOGITS, BIAS, SEEN, HIGHEST, LOW, stride, vocab, temperature, penalty, top_k, log_min_p,
    HAS_K: tl.constexpr, TOP_P: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SEEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`sampling._threshold` of one row, and its highest score."""
    row = tl.program_id(0).to(tl.int64)
    highest = tl.full((BLOCK,), -_INF, tl.float32)
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = _scores(LOGITS, BIAS, SEEN, row, cols, stride, vocab, temperature, penalty,
                    HAS_BIAS, HAS_SEEN)  # fmt: skip
        highest = tl.maximum(highest, z)
    top = tl.max(highest, 0)
    low = -_INF
    if HAS_K:
        low = _search(LOGITS, BIAS, SEEN, row, stride, vocab, temperature, penalty, top, low,
                      top_k.to(tl.float64), 1.0, HAS_BIAS, HAS_SEEN, BLOCK)  # fmt: skip
    if TOP_P < 1.0:
        need = tl.full((), 0.0, tl.float64)
        low = _search(LOGITS, BIAS, SEEN, row, stride, vocab, temperature, penalty, top, low,
                      need, TOP_P, HAS_BIAS, HAS_SEEN, BLOCK)  # fmt: skip
    tl.store(HIGHEST + row, top)
    tl.store(LOW + row, tl.maximum(low, top + log_min_p))


@triton.jit
def _block_exp(
    LOGITS, BIAS, SEEN, HIGHEST, LOW, row, block, num_highest, stride, vocab, temperature, penalty,
    FILTERED: tl.constexpr, HIGHEST_BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SEEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores z of a block, exp(z - highest) or 0 if filtered, and the row's highest score."""
    cols = tl.arange(0, HIGHEST_BLOCK)
    highest = tl.load(HIGHEST + row * num_highest + cols, mask=cols < num_highest, other=-_INF)
    highest = tl.max(highest, 0)
    z = _scores(LOGITS, BIAS, SEEN, row, block * BLOCK + tl.arange(0, BLOCK), stride, vocab,
                temperature, penalty, HAS_BIAS, HAS_SEEN)  # fmt: skip
    e = _exp(z - highest)
    if FILTERED:
        e = tl.where(z >= tl.load(LOW + row), e, 0.0)
    return z, tl.where(z == -_INF, 0.0, e).to(tl.float64), highest


@triton.jit(do_not_specialize=_RUNTIME)
def sum_kernel(
    LOGITS, BIAS, SEEN, HIGHEST, LOW, SUMS, num_highest, stride, vocab, temperature, penalty,
    FILTERED: tl.constexpr, HIGHEST_BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SEEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    z, e, highest = _block_exp(
        LOGITS, BIAS, SEEN, HIGHEST, LOW, row, block, num_highest, stride, vocab, temperature,
        penalty, FILTERED, HIGHEST_BLOCK, HAS_BIAS, HAS_SEEN, BLOCK,
    )  # fmt: skip
    tl.store(SUMS + row * tl.num_programs(1) + block, tl.sum(e, 0))


@triton.jit
def _uniform(seed, position):
    """`sampling.uniform` of one row."""
    z = seed.to(tl.uint64, bitcast=True) + (position + 1).to(tl.uint64, bitcast=True) * _GAMMA
    z = (z ^ (z >> 30)) * _MIX_1
    z = (z ^ (z >> 27)) * _MIX_2
    z = z ^ (z >> 31)
    return ((z >> 32).to(tl.float64) + 0.5) / 4294967296.0


@triton.jit
def _pick(weights, at, SIZE: tl.constexpr):
    """The first index whose cumulative weight exceeds `at`; rounding never selects a weight 0."""
    index = tl.arange(0, SIZE)
    chosen = tl.sum((tl.cumsum(weights, 0) <= at).to(tl.int32), 0)
    return tl.minimum(chosen, tl.max(tl.where(weights > 0.0, index, 0), 0))


@triton.jit(do_not_specialize=_RUNTIME)
def draw_kernel(
    LOGITS, BIAS, SEEN, HIGHEST, LOW, SUMS, SEEDS, POSITIONS, TOKENS, LOGPS,
    position_stride, blocks, num_highest, stride, vocab, temperature, penalty,
    GREEDY: tl.constexpr, FILTERED: tl.constexpr, HIGHEST_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCKS)
    sums = tl.load(SUMS + row * blocks + index, mask=index < blocks, other=0.0)
    total = tl.sum(sums, 0)
    if GREEDY:
        at = total * 0.0
        tops = tl.load(HIGHEST + row * num_highest + index, mask=index < blocks, other=-_INF)
        block = tl.argmax(tops, 0)  # the first of equal ones
    else:
        at = total * _uniform(tl.load(SEEDS + row), tl.load(POSITIONS + row * position_stride))
        block = _pick(sums, at, BLOCKS)
        at -= tl.sum(tl.where(index < block, sums, 0.0), 0)
    z, e, highest = _block_exp(
        LOGITS, BIAS, SEEN, HIGHEST, LOW, row, block, num_highest, stride, vocab, temperature,
        penalty, FILTERED, HIGHEST_BLOCK, HAS_BIAS, HAS_SEEN, BLOCK,
    )  # fmt: skip
    if GREEDY:
        place = tl.argmax(z, 0)
    else:
        place = _pick(e, at, BLOCK)
    token = tl.minimum(block * BLOCK + place, vocab - 1)
    score = tl.max(tl.where(tl.arange(0, BLOCK) == place, z, -_INF), 0)
    tl.store(TOKENS + row, token)
    tl.store(LOGPS + row, score - (highest + tl.log(total).to(tl.float32)))
    if HAS_SEEN:
        tl.store(SEEN + row * vocab + token, 1)


def sample_tokens(
    logits: Tensor, seeds: Tensor, positions: Tensor, bias: Tensor | None, seen: Tensor | None,
    temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, greedy: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sampling.sample_tokens`, with filters that are off given as 0, 1 and 0."""
    (rows, vocab), device = logits.shape, logits.device
    blocks, filtered = triton.cdiv(vocab, BLOCK), bool(top_k or top_p < 1.0 or min_p)
    num_highest = 1 if filtered else blocks
    highest, low = (_empty((rows, num_highest), torch.float32, device) for _ in range(2))
    sums = _empty((rows, blocks), torch.float64, device)
    tokens, logps = (_empty((rows,), dtype, device) for dtype in (torch.int64, torch.float32))
    mask = logits if seen is None else seen.view(torch.uint8)
    inputs = (logits, logits if bias is None else bias, mask)
    sizes = (logits.stride(0), vocab, float(temperature), float(penalty))
    flags = {"HAS_BIAS": bias is not None, "HAS_SEEN": seen is not None, "BLOCK": BLOCK,
             "num_warps": WARPS, "enable_fp_fusion": True}  # fmt: skip
    filters = {"FILTERED": filtered, "HIGHEST_BLOCK": triton.next_power_of_2(num_highest)}
    with _on(device):
        if filtered:
            log_min_p = math.log(min_p) if min_p else -math.inf
            search = {"BLOCK": SEARCH_BLOCK, "num_warps": SEARCH_WARPS}
            filter_kernel[(rows,)](
                *inputs, highest, low, *sizes, top_k, log_min_p, HAS_K=top_k > 0, TOP_P=top_p,
                **flags | search,
            )  # fmt: skip
        else:
            highest_kernel[(rows, blocks)](*inputs, highest, *sizes, **flags)
        sum_kernel[(rows, blocks)](
            *inputs, highest, low, sums, num_highest, *sizes, **filters, **flags
        )
        draw_kernel[(rows,)](
            *inputs, highest, low, sums, seeds, positions, tokens, logps, positions.stride(0),
            blocks, num_highest, *sizes, GREEDY=greedy, BLOCKS=triton.next_power_of_2(blocks),
            **filters, **flags,
        )  # fmt: skip
    return tokens, logps
