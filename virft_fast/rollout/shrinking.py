"""Which rows of a batch are still decoded, once enough of them have finished.

Shapes: B prompts, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from virft_fast.rollout.cache import bucket

# The batch shrinks once at most this share of its rows is still needed.
SHRINK_AT = 0.75


@dataclass(frozen=True)
class Kept:
    """The rows that stay.

    Attributes:
        rows: their indices, sorted by prompt.
        sizes: how many of them each prompt has.
        prompts: the prompts that stay, if others leave; None: all keep their place.
    """

    rows: list[int]
    sizes: list[int]
    prompts: list[int] | None = None


def kept_rows(active: Sequence[bool], sizes: Sequence[int]) -> Kept | None:
    """The active rows, and finished ones up to a number that few graphs can serve; None: all stay.

    Args:
        active: (R,), sorted by prompt.
        sizes: (B,), how many rows each prompt has.
    """
    count = bucket(sum(active))
    if count > SHRINK_AT * len(active):
        return None
    spare, rows = count - sum(active), []
    owners = [prompt for prompt, size in enumerate(sizes) for _ in range(size)]
    kept = [0] * len(sizes)
    for row, (owner, is_active) in enumerate(zip(owners, active, strict=True)):
        if is_active or spare > 0:
            spare -= not is_active
            rows.append(row)
            kept[owner] += 1
    return Kept(rows, kept)


def kept_rectangle(active: Sequence[bool], sizes: Sequence[int]) -> Kept | None:
    """The same number of rows of each remaining prompt, for attention without padding; None: all
    stay. All prompts have equally many rows before, too: `sizes`, (B,)."""
    size, num_prompts = sizes[0], len(sizes)
    groups = [active[first : first + size] for first in range(0, len(active), size)]
    width = min(bucket(max(map(sum, groups))), size)
    count = min(bucket(sum(map(any, groups))), num_prompts)
    if count * width > SHRINK_AT * len(active):
        return None
    prompts = sorted(range(num_prompts), key=lambda prompt: not any(groups[prompt]))[:count]
    prompts.sort()
    rows = [
        prompt * size + row
        for prompt in prompts
        for row in sorted(range(size), key=lambda row: not groups[prompt][row])[:width]
    ]
    return Kept(rows, [width] * count, None if count == num_prompts else prompts)
