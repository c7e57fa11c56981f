"""Attention over packed rows: the torch reference here, the Triton kernels in a process; and the
division of the work."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prefix_cases import *  # noqa: F403
from prefix_cases import KERNELS, few, layouts
from test_decode import run_cases

from virft_fast.kernels import PrefixLayout

CASES = Path(__file__).parent / "prefix_cases.py"


def test_kernels_interpreted():
    run_cases(CASES, TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_the_gpu():
    run_cases(CASES, TRITON_INTERPRET="0", VIRFT_CASES="gpu")


# ---- the division of the work --------------------------------------------------------------------


@few
@given(lengths=layouts(), keys=st.sampled_from([16, 64]), repeats=st.integers(1, 8))
def test_blocks_against_a_loop(lengths, keys, repeats):
    """Each block of queries or keys once, with the rows that see it or that it sees."""
    layout, queries, blocks = PrefixLayout.from_lengths(*lengths), set(), set()
    for g in layout.groups:
        ends = [g.start, g.first]
        ends += [g.first + sum(g.lengths[: i + 1]) for i in range(len(g.lengths))]
        for low, high in ((g.start, g.first), (g.first, g.end)):
            for first in range(low, high, keys):
                end = min(first + keys, high)
                own = max(e for e in ends if e <= first)
                queries.add((first, end, own, g.start, g.first if low == g.first else g.start))
                last = g.end if high == g.first else min(e for e in ends if e >= end)
                blocks.add((first, end, last, int(low == g.first)))
    rows = [tuple(row) for row in layout.query_blocks(keys).tolist()]
    # A prompt of length 0 has the same bounds as none.
    assert set(rows) == queries and len(rows) == len(queries)
    items, split, count = layout.key_blocks(32, keys, 2 * repeats, repeats)
    work, places = {}, []
    for *block, start, stop, place in items.tolist():
        work.setdefault(tuple(block), []).append((start, stop, place))
    assert work.keys() == blocks
    total = sum(repeats * -(-(last - first) // 32) for first, _, last, _ in blocks)
    most = max(KERNELS.MIN_STEPS, 2 * total / KERNELS.MAX_ITEMS)
    for (first, end, last, _), parts in work.items():
        parts.sort()
        steps = repeats * -(-(last - first) // 32)
        assert parts[0][0] == 0 and parts[-1][1] == steps
        assert all(a[1] == b[0] for a, b in zip(parts, parts[1:], strict=False))
        sizes = [stop - start for start, stop, _ in parts]
        assert max(sizes) <= math.ceil(most) and max(sizes) - min(sizes) <= 1
        if len(parts) == 1:
            assert parts[0][2] == -1
        else:
            place = parts[0][2]
            assert [p for *_, p in parts] == list(range(place, place + len(parts)))
            assert [first, end, place, len(parts)] in split.tolist()
            places += [p for *_, p in parts]
    assert sorted(places) == list(range(count))


def test_a_prompt_with_many_completions_is_split():
    """The first block would take longer than 5 times an even share of 132 multiprocessors."""
    layout = PrefixLayout.from_lengths([650], [[200] * 8])
    items, split, _ = layout.key_blocks(32, 64, 12, 6)
    steps = items[:, 5] - items[:, 4]
    unsplit = 6 * -(-2250 // 32)
    even = 2 * int(steps.sum()) / 132
    assert unsplit > 5 * even and int(steps.max()) <= KERNELS.MIN_STEPS < even
    # The prompt's blocks, and those of completions that more than 8 * 32 rows see.
    assert split[:, 0].tolist()[:11] == list(range(0, 650, 64)) and len(split) <= 11 + 8
    short = PrefixLayout.from_lengths([64, 64], [[30] * 2] * 2)
    assert len(short.key_blocks(32, 64, 2, 1)[1]) == 0


def test_tables_are_made_once_and_fast():
    """Once a row, whatever the number of layers; a long row without a loop over its blocks."""
    layout = PrefixLayout.from_lengths([1000] * 100, [[100] * 8] * 100)
    with torch.autograd.profiler.profile() as profiler:
        first = layout.query_blocks(64), layout.key_blocks(32, 64, 28, 7)[0], layout.segment_starts
    assert len(profiler.function_events) < 600  # operations; the row has 2,800 blocks
    again = layout.query_blocks(64), layout.key_blocks(32, 64, 28, 7)[0], layout.segment_starts
    assert all(a is b for a, b in zip(first, again, strict=True))
