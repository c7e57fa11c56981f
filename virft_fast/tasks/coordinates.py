"""The coordinate spaces in which model families give boxes, and the conversion between them.

Every box in this package is xyxy in 0..1000 of its image, whatever the image's size. A model family
that was trained on another space is prompted and answers in that space. Answers are converted to
0..1000 before anything else reads them. The conversion only scales each axis, so IoU and similar
measures don't change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from virft_fast.batch import Json

THOUSAND = 1000.0
# transformers' model_type -> the unit of its boxes: thousandths of the image, or pixels of the
# image as the processor resizes it.
FAMILY_SPACE: dict[str, str] = {
    "qwen2_vl": "thousand",
    "qwen2_5_vl": "pixels",
    "qwen3_vl": "thousand",
    "qwen3_vl_moe": "thousand",
    "qwen3_5": "thousand",
    "qwen3_5_moe": "thousand",
}


def space_of(family: str) -> str:
    """The unit of a family's boxes; thousandths for one that isn't in the table."""
    return FAMILY_SPACE.get(family, "thousand")


Extent: TypeAlias = tuple[float, float]  # coordinates of the image's right and lower edge
Box: TypeAlias = tuple[float, float, float, float]


def rescale(box: Sequence[float], source: Sequence[float], target: Sequence[float]) -> Box:
    """Convert a box from a space of size `source` to one of size `target`, (width, height) each."""
    x, y = target[0] / source[0], target[1] / source[1]
    x1, y1, x2, y2 = box
    return (x1 * x, y1 * y, x2 * x, y2 * y)


def to_thousand(box: Sequence[float], extent: Sequence[float]) -> Box:
    return rescale(box, extent, (THOUSAND, THOUSAND))


def written(box: Sequence[float], extent: Extent) -> list[int]:
    """A box as solutions give it: whole numbers, rounded down as in Visual-RFT, inside `extent`, at
    least 1 wide and 1 high."""
    right, lower = int(extent[0]), int(extent[1])
    x1, y1, x2, y2 = (math.floor(side) for side in box)
    x1, y1 = min(max(x1, 0), right - 1), min(max(y1, 0), lower - 1)
    return [x1, y1, max(min(x2, right), x1 + 1), max(min(y2, lower), y1 + 1)]


def extent_of(value: Json) -> Extent:
    """A row's `extent`: the (width, height) of its boxes' coordinate space; None: 0..1000.

    Raises:
        ValueError: it is not two positive numbers.
    """
    if value is None:
        return (THOUSAND, THOUSAND)
    try:
        width, height = (float(side) for side in value)
    except (TypeError, ValueError):
        width = height = 0.0
    if not (0 < width < math.inf and 0 < height < math.inf):
        raise ValueError(f"extent: expected [width, height] of the boxes' space, got {value!r:.80}")
    return (width, height)
