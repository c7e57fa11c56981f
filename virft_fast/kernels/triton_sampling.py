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

BLOCK, WARPS, SEARCH_WARPS = 2048, 4, 8
_GAMMA, _MIX_1, _MIX_2 = (tl.constexpr(x) for x in (GOLDEN_GAMMA, MIX[0][1], MIX[1][1]))
_LOG2_E, _LN2_HIGH = tl.constexpr(1.4426950408889634), tl.constexpr(0.693145751953125)
_LN2_LOW = tl.constexpr(math.log(2) - 0.693145751953125)
_INF = tl.constexpr(float("inf"))
_RUNTIME = ("temperature", "penalty", "top_k", "log_min_p")


@triton.jit
def _scores(inputs, row, start, BLOCK: tl.constexpr):
    """A block of a row's scores before the filters, rounded as torch rounds them; -inf outside the
    vocabulary."""
    LOGITS, BIAS, SEEN, vocab, temperature, penalty = inputs
    cols = start + tl.arange(0, BLOCK)
    ok = cols < vocab
    z = tl.load(LOGITS + row * vocab + cols, mask=ok, other=-_INF)
    if BIAS is not None:
        z += tl.load(BIAS + cols, mask=ok, other=0.0)
    if SEEN is not None:
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
def _search(inputs, row, highest, low, need, SHARE: tl.constexpr, BLOCK: tl.constexpr):
    """The highest score x such that at least `need` scores are >= x, or with a SHARE, such that
    scores >= x have this share of the probability of all scores >= `low`.

    Finds the 32 bits of x, two per round, in an order of bits that is the order of numbers.
    """
    x = tl.full((), 0, tl.uint32)
    unit = tl.full((), 1 << 30, tl.uint32)
    for _ in range(0, 16):
        n0 = tl.zeros((BLOCK,), tl.float64)
        n1, n2, n3 = n0, n0, n0
        for start in range(0, inputs[3], BLOCK):
            z = _scores(inputs, row, start, BLOCK)
            bits = z.to(tl.int32, bitcast=True)
            key = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
            weight = tl.where(z >= low, _exp(z - highest) if SHARE < 1.0 else 1.0, 0.0)
            weight = weight.to(tl.float64)
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
def highest_kernel(LOGITS, BIAS, SEEN, HIGHEST, vocab, temperature, penalty, BLOCK: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    inputs = (LOGITS, BIAS, SEEN, vocab, temperature, penalty)
    z = _scores(inputs, row, block * BLOCK, BLOCK)
    tl.store(HIGHEST + row * tl.num_programs(1) + block, tl.max(z, 0))


@triton.jit(do_not_specialize=_RUNTIME)
def filter_kernel(
    LOGITS, BIAS, SEEN, HIGHEST, LOW, vocab, temperature, penalty, top_k, log_min_p,
    HAS_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`sampling._threshold` of one row, and its highest score."""
    row = tl.program_id(0).to(tl.int64)
    inputs = (LOGITS, BIAS, SEEN, vocab, temperature, penalty)
    highest = tl.full((BLOCK,), -_INF, tl.float32)
    for start in range(0, vocab, BLOCK):
        highest = tl.maximum(highest, _scores(inputs, row, start, BLOCK))
    top, low = tl.max(highest, 0), -_INF
    if HAS_K:
        low = _search(inputs, row, top, low, top_k.to(tl.float64), 1.0, BLOCK)
    if TOP_P < 1.0:
        low = _search(inputs, row, top, low, tl.full((), 0.0, tl.float64), TOP_P, BLOCK)
    tl.store(HIGHEST + row, top)
    tl.store(LOW + row, tl.maximum(low, top + log_min_p))


@triton.jit
def _block_exp(
    inputs, HIGHEST, LOW, row, block, num_highest, HIGHEST_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):
    """Scores z of a block, exp(z - highest) or 0 if filtered, and the row's highest score."""
    cols = tl.arange(0, HIGHEST_BLOCK)
    highest = tl.load(HIGHEST + row * num_highest + cols, mask=cols < num_highest, other=-_INF)
    highest = tl.max(highest, 0)
    z = _scores(inputs, row, block * BLOCK, BLOCK)
    e = _exp(z - highest)
    if LOW is not None:
        e = tl.where(z >= tl.load(LOW + row), e, 0.0)
    return z, tl.where(z == -_INF, 0.0, e).to(tl.float64), highest


@triton.jit(do_not_specialize=_RUNTIME)
def sum_kernel(
    LOGITS, BIAS, SEEN, HIGHEST, LOW, SUMS, vocab, temperature, penalty, num_highest,
    HIGHEST_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    inputs = (LOGITS, BIAS, SEEN, vocab, temperature, penalty)
    z, e, highest = _block_exp(inputs, HIGHEST, LOW, row, block, num_highest, HIGHEST_BLOCK, BLOCK)
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
    vocab, temperature, penalty, num_highest, blocks, Q: tl.constexpr,
    GREEDY: tl.constexpr, HIGHEST_BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCKS)
    sums = tl.load(SUMS + row * blocks + index, mask=index < blocks, other=0.0)
    total = tl.sum(sums, 0)
    if GREEDY:
        at = 0.0
        tops = tl.load(HIGHEST + row * num_highest + index, mask=index < blocks, other=-_INF)
        block = tl.argmax(tops, 0)  # the first of equal ones
    else:
        position = tl.load(POSITIONS + row // Q) + row % Q
        at = total * _uniform(tl.load(SEEDS + row // Q), position)
        block = _pick(sums, at, BLOCKS)
        at -= tl.sum(tl.where(index < block, sums, 0.0), 0)
    inputs = (LOGITS, BIAS, SEEN, vocab, temperature, penalty)
    z, e, highest = _block_exp(inputs, HIGHEST, LOW, row, block, num_highest, HIGHEST_BLOCK, BLOCK)
    place = tl.argmax(z, 0) if GREEDY else _pick(e, at, BLOCK)
    token = tl.minimum(block * BLOCK + place, vocab - 1)
    score = tl.max(tl.where(tl.arange(0, BLOCK) == place, z, -_INF), 0)
    tl.store(TOKENS + row, token)
    tl.store(LOGPS + row, score - (highest + tl.log(total).to(tl.float32)))
    if SEEN is not None:
        tl.store(SEEN + row * vocab + token, 1)


def sample_tokens(
    logits: Tensor, seeds: Tensor, positions: Tensor, bias: Tensor | None, seen: Tensor | None,
    temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, greedy: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sampling.sample_tokens`, with filters that are off given as 0, 1 and 0."""
    (rows, vocab), device = logits.shape, logits.device
    blocks, filtered = triton.cdiv(vocab, BLOCK), bool(top_k or top_p < 1.0 or min_p)
    num_highest = 1 if filtered else blocks
    highest = _empty((rows, num_highest), torch.float32, device)
    low = _empty((rows,), torch.float32, device) if filtered else None
    sums = _empty((rows, blocks), torch.float64, device)
    tokens, logps = (_empty((rows,), dtype, device) for dtype in (torch.int64, torch.float32))
    inputs = (logits, bias, None if seen is None else seen.view(torch.uint8))
    sizes = (vocab, float(temperature), float(penalty))
    options = {"BLOCK": BLOCK, "num_warps": WARPS, "enable_fp_fusion": True}
    with _on(device):
        if filtered:
            filter_kernel[(rows,)](
                *inputs, highest, low, *sizes, top_k, math.log(min_p) if min_p else -math.inf,
                HAS_K=top_k > 0, TOP_P=top_p, **options | {"num_warps": SEARCH_WARPS},
            )  # fmt: skip
        else:
            highest_kernel[(rows, blocks)](*inputs, highest, *sizes, **options)
        options["HIGHEST_BLOCK"] = triton.next_power_of_2(num_highest)
        sum_kernel[(rows, blocks)](*inputs, highest, low, sums, *sizes, num_highest, **options)
        draw_kernel[(rows,)](
            *inputs, highest, low, sums, seeds, positions, tokens, logps, *sizes, num_highest,
            blocks, Q=rows // max(len(seeds), 1), GREEDY=greedy,
            BLOCKS=triton.next_power_of_2(blocks),
            **options,
        )  # fmt: skip
    return tokens, logps
