"""The spaces in which model families count boxes, and the one conversion between them.

Every box in this package is xyxy in 0..1000 of its image, whatever its size. A family that was
taught another space is asked and answered in that one; its answers are brought to 0..1000 before
anything looks at them. IoU and the like don't change with it, because each axis only gets another
unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

THOUSAND = 1000.0
# transformers' model_type -> what its boxes count: thousandths of the image or pixels of the image
# as the processor resizes it.
FAMILY_SPACE: dict[str, str] = {
    "qwen2_vl": "thousand",
    "qwen2_5_vl": "pixels",
    "qwen3_vl": "thousand",
}

Extent = tuple[float, float]  # what the right and the lower edge of the image are called
Box = tuple[float, float, float, float]


def rescale(box: Sequence[float], source: Extent, target: Extent) -> Box:
    """The same box where the image spans `target` instead of `source`, (width, height) each."""
    x, y = target[0] / source[0], target[1] / source[1]
    x1, y1, x2, y2 = box
    return (x1 * x, y1 * y, x2 * x, y2 * y)


def to_thousand(box: Sequence[float], extent: Extent) -> Box:
    return rescale(box, extent, (THOUSAND, THOUSAND))


def written(box: Sequence[float], extent: Extent) -> list[int]:
    """A box as a solution has it: whole numbers, rounded down as Visual-RFT does, inside `extent`,
    at least 1 wide and high."""
    right, lower = int(extent[0]), int(extent[1])
    x1, y1, x2, y2 = (math.floor(side) for side in box)
    x1, y1 = min(max(x1, 0), right - 1), min(max(y1, 0), lower - 1)
    return [x1, y1, max(min(x2, right), x1 + 1), max(min(y2, lower), y1 + 1)]


def extent_of(value: Any) -> Extent:
    """A row's `extent`: (width, height) of its boxes' space, thousandths if it says nothing.

    Raises:
        ValueError: it is something else than two positive numbers.
    """
    if value is None:
        return (THOUSAND, THOUSAND)
    try:
        width, height = (float(part) for part in value)
    except (TypeError, ValueError):
        width = height = 0.0
    if not (0 < width < math.inf and 0 < height < math.inf):
        raise ValueError(f"extent: expected [width, height] of the boxes' space, got {value!r:.80}")
    return (width, height)
