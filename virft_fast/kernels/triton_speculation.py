"""Triton kernels of speculation, and their launches. Only `backend` imports this module.

Program: one row, in one warp, so that what it has read may be written. Other rows see what a row
has drawn in the next launch. Shapes and letters: see `speculation`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from virft_fast.kernels import speculation
from virft_fast.kernels.speculation import FACTORS, MAX_READ, Pool
from virft_fast.kernels.triton_decode import _empty
from virft_fast.kernels.triton_rows import _on

_F1, _F2, _F3, _F4 = (tl.constexpr(factor) for factor in FACTORS)
_CONTEXT, _NOWHERE = tl.constexpr(speculation.CONTEXT), tl.constexpr(speculation.NOWHERE)
_AHEAD = tl.constexpr(MAX_READ)
_DRAWN_AT, _PLACE = tl.constexpr(speculation.DRAWN_AT), tl.constexpr(speculation.PLACE)
_RIGHT, _GUESSED = tl.constexpr(speculation.RIGHT), tl.constexpr(speculation.GUESSED)
_ACCEPTED = tl.constexpr(speculation.ACCEPTED)
_RUNTIME = ("first", "width", "size", "stride", "length", "logps_width", "vocab")


@triton.jit
def _add(COUNTERS, index: tl.constexpr, stride, number):
    at = COUNTERS + index * stride
    tl.store(at, tl.load(at) + number)


@triton.jit
def _before(POOL, DRAWN, base, t, k: tl.constexpr):
    """The token k before each of the drawn ones."""
    own = tl.load(DRAWN + t - k, mask=t >= k, other=-1)
    return tl.where(t >= k, own, tl.load(POOL + base + t - k, mask=t < k, other=-1))


@triton.jit(do_not_specialize=_RUNTIME)
def keep_kernel(
    POOL, TABLE, DRAWN, LOGPS, TOKENS, COUNTERS, ACTIVE, SLOTS, GOES_ON, ALL_LOGPS, SEEN, KEPT,
    first, width, size, stride, length, logps_width, vocab, Q: tl.constexpr,
):  # fmt: skip
    row, t = tl.program_id(0).to(tl.int64), tl.arange(0, Q)
    DRAWN += row * Q
    TOKENS += row * (1 + _AHEAD)
    COUNTERS += row
    drawn = tl.load(DRAWN + t)
    going = tl.load(GOES_ON + drawn)
    right = tl.min(tl.where(drawn == tl.load(TOKENS + 1 + t), Q, t), 0).to(tl.int64)
    end = tl.min(tl.where(going != 0, Q, t), 0).to(tl.int64)
    active, slot = tl.load(ACTIVE + row), tl.load(SLOTS + row)
    drawn_at = tl.load(COUNTERS + _DRAWN_AT * stride)
    kept = tl.minimum(tl.minimum(right, end) + 1, tl.minimum(length - drawn_at, Q)) * active
    keep = t < kept

    # Enter the n-grams before each kept token into the table.
    base = first + slot * width + _CONTEXT + drawn_at
    before = _before(POOL, DRAWN, base, t, 1)
    known, hashes = keep & (before >= 0), before * _F1
    before = _before(POOL, DRAWN, base, t, 2)
    known, hashes = known & (before >= 0), hashes + before * _F2
    tl.atomic_max(TABLE + ((hashes >> 33) & (size - 1)), base + t, mask=known)
    before = _before(POOL, DRAWN, base, t, 3)
    known, hashes = known & (before >= 0), hashes + before * _F3
    tl.atomic_max(TABLE + size + ((hashes >> 33) & (size - 1)), base + t, mask=known)
    before = _before(POOL, DRAWN, base, t, 4)
    known, hashes = known & (before >= 0), hashes + before * _F4
    tl.atomic_max(TABLE + 2 * size + ((hashes >> 33) & (size - 1)), base + t, mask=known)

    tl.store(POOL + base + t, drawn, mask=keep)
    logps = tl.load(LOGPS + row * Q + t)
    tl.store(ALL_LOGPS + slot * logps_width + drawn_at + t, logps, mask=keep)
    if SEEN is not None:
        tl.store(SEEN + row * vocab + drawn, 1, mask=keep)
    is_last = t == tl.maximum(kept - 1, 0)
    tl.store(TOKENS, tl.sum(tl.where(is_last, drawn, 0), 0))
    going = tl.sum(tl.where(is_last, going, 0), 0)
    accepted = kept - active
    active = active * going * (drawn_at + kept < length).to(tl.int64)
    tl.store(ACTIVE + row, active)
    tl.store(KEPT + row, kept)
    for index in tl.static_range(_DRAWN_AT + 1):
        _add(COUNTERS, index, stride, kept)
    _add(COUNTERS, _RIGHT, stride, tl.minimum(right, kept))
    _add(COUNTERS, _GUESSED, stride, tl.where(active != 0, Q - 1, accepted))
    _add(COUNTERS, _ACCEPTED, stride, accepted)
    place = tl.load(COUNTERS + _PLACE * stride) + kept
    tl.store(COUNTERS + _PLACE * stride, tl.where(right >= kept, place, _NOWHERE))


@triton.jit(do_not_specialize=_RUNTIME)
def guess_kernel(POOL, TABLE, TOKENS, COUNTERS, SLOTS, first, width, size, stride):
    row = tl.program_id(0).to(tl.int64)
    COUNTERS += row
    end = first + tl.load(SLOTS + row) * width + _CONTEXT
    end += tl.load(COUNTERS + _DRAWN_AT * stride)
    b1, b2 = tl.load(POOL + end - 1), tl.load(POOL + end - 2)
    b3, b4 = tl.load(POOL + end - 3), tl.load(POOL + end - 4)
    place = tl.full((), _NOWHERE, tl.int64)
    hashes = b1 * _F1 + b2 * _F2
    found = tl.load(TABLE + ((hashes >> 33) & (size - 1)))
    equal = (tl.load(POOL + found - 1) == b1) & (tl.load(POOL + found - 2) == b2)
    place = tl.where(equal, found, place)
    hashes += b3 * _F3
    found = tl.load(TABLE + size + ((hashes >> 33) & (size - 1)))
    equal = (tl.load(POOL + found - 1) == b1) & (tl.load(POOL + found - 2) == b2)
    equal = equal & (tl.load(POOL + found - 3) == b3)
    place = tl.where(equal & (found > _NOWHERE), found, place)
    hashes += b4 * _F4
    found = tl.load(TABLE + 2 * size + ((hashes >> 33) & (size - 1)))
    equal = (tl.load(POOL + found - 1) == b1) & (tl.load(POOL + found - 2) == b2)
    equal = equal & (tl.load(POOL + found - 3) == b3) & (tl.load(POOL + found - 4) == b4)
    place = tl.where(equal & (found > _NOWHERE), found, place)
    at = tl.load(COUNTERS + _PLACE * stride)
    place = tl.where(tl.load(POOL + at) >= 0, at, place)
    ahead = tl.arange(0, _AHEAD)
    guesses = tl.load(POOL + place + ahead)
    known = tl.min(tl.where(guesses >= 0, _AHEAD, ahead), 0)
    tl.store(TOKENS + row * (1 + _AHEAD) + 1 + ahead, tl.where(ahead < known, guesses, 0))
    tl.store(COUNTERS + _PLACE * stride, place)


def keep_drawn(
    pool: Pool, drawn: Tensor, logps: Tensor, tokens: Tensor, counters: Tensor, active: Tensor,
    slots: Tensor, goes_on: Tensor, all_logps: Tensor, length: int, seen: Tensor | None,
) -> Tensor:  # fmt: skip
    rows, read = drawn.shape
    kept = _empty((rows,), torch.int64, drawn.device)
    with _on(drawn.device):
        keep_kernel[(rows,)](
            pool.tokens, pool.table, drawn, logps, tokens, counters, active, slots, goes_on,
            all_logps, None if seen is None else seen.view(torch.uint8), kept, pool.first,
            pool.width, pool.table.shape[1], counters.stride(0), length, all_logps.shape[1],
            len(goes_on), Q=read, num_warps=1,
        )  # fmt: skip
    return kept


def look_up(pool: Pool, tokens: Tensor, counters: Tensor, slots: Tensor) -> None:
    with _on(tokens.device):
        guess_kernel[(len(tokens),)](
            pool.tokens, pool.table, tokens, counters, slots, pool.first, pool.width,
            pool.table.shape[1], counters.stride(0), num_warps=1,
        )  # fmt: skip
