"""From text to boxes or a label; one parser for what a model wrote and for the ground truth.

Nothing here raises on any text, evaluates it, or takes more than linear time. What can't be read is
`None`; a reward makes 0 of that.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from virft_fast.tasks.brackets import Group, Items, read_groups
from virft_fast.tasks.coordinates import Box, to_thousand
from virft_fast.tasks.labels import (  # noqa: F401  (all of them importable from here)
    ClosedSet,
    answer_text,
    marked_answer,
    mentioned,
    parse_label,
    words,
)

NOT_A_BOX: Box = (math.nan,) * 4

# Letters and digits of the keys that name a box, the first of them that is there; or its sides.
_BOX_KEYS = (
    "position", "bbox2d", "bbox", "box2d", "box", "boundingbox", "bboxes", "boxes", "boundingboxes",
    "coordinates", "coords",
)  # fmt: skip
_SIDE_KEYS = (
    ("x1", "y1", "x2", "y2"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("left", "top", "right", "bottom"),
    ("topleft", "bottomright"),
)
_CONFIDENCE_KEYS = ("confidence", "score", "conf", "scores", "confidences")
_ABOUT_KEYS = {*_CONFIDENCE_KEYS, "label", "class", "category", "name"}
_KEYS = {*_BOX_KEYS, *itertools.chain.from_iterable(_SIDE_KEYS)}
_NUMBER = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?:\s*(%))?")
_BETWEEN = re.compile(r"[\s,;()\[\]]+(?!%)")  # numbers in one quoted text
_NOTHING = re.compile(r"[\W_]*no[\W_]+objects?[\W_]*", re.IGNORECASE)
MAX_OBJECTS = 500  # in one answer; the rest is not read


@dataclass(frozen=True)
class Detection:
    """Boxes read from an answer.

    Attributes:
        boxes: xyxy in the 0..1000 space, in the order written; four NaN where a box was announced
            but can't be read. None at all for 'No Objects' or an empty list.
        confidences: one a box; None where it is missing or no number.
    """

    boxes: tuple[Box, ...]
    confidences: tuple[float | None, ...]


def parse_detection(text: str, extent: Sequence[float] | None = None) -> Detection | None:
    """Boxes and confidences of an answer, or None if it holds none and does not say so either.

    Objects are read one by one, so that what is wrong with one changes nothing about the others.
    An object is Visual-RFT's {'Position': [x1, y1, x2, y2], 'Confidence': c}, Qwen's
    {"bbox_2d": ..., "label": ...} and the like, in any state of quotes, commas and brackets; a bare
    list of four numbers; or (x1,y1),(x2,y2), between box marks or not. Four NaN stand for one that
    announces a box, or only has a label or a confidence, and for a list of numbers among boxes.
    An object that the end of the text cuts off counts if its box is whole. A confidence may be a
    percentage. After MAX_OBJECTS the rest is not read.

    Args:
        extent: (width, height) of the space the answer counts in; None: 0..1000.
    """
    return in_thousand(_parse_detection(text), extent)


def in_thousand(read: Detection | None, extent: Sequence[float] | None) -> Detection | None:
    """Boxes of a space `extent` (see `parse_detection`) in 0..1000."""
    if read is None or extent is None:
        return read
    return Detection(tuple(to_thousand(box, extent) for box in read.boxes), read.confidences)


def _parse_detection(text: str) -> Detection | None:
    body = marked_answer(text)
    if _NOTHING.fullmatch(body):
        return Detection((), ())
    found = _in_row(read_groups(body).items)[:MAX_OBJECTS]
    if found:
        return Detection(tuple(p.box for p in found), tuple(p.confidence for p in found))
    empty = body.replace("```json", "").replace("```", "").strip()
    if empty.startswith("[") and empty.endswith("]") and not empty[1:-1].strip():
        return Detection((), ())
    return None


def valid_box(box: Box) -> bool:
    """Inside 0..1000 on both axes, with an area; false for anything not finite."""
    x1, y1, x2, y2 = box
    return 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000


def unreadable(box: Box) -> bool:
    """Whether it stands for an object that announces a box which can't be read."""
    return any(map(math.isnan, box))


class _Prediction(NamedTuple):
    """`bare`: a list of numbers that no key names."""

    box: Box = NOT_A_BOX
    confidence: float | None = None
    bare: bool = False


def _in_row(items: Items, *, listed: bool = False) -> list[_Prediction]:
    """The predictions of groups side by side.

    Args:
        listed: they are in one list; else only those are that commas join.
    """
    groups = [item for item in items if isinstance(item, Group) and (item.items or item.fields[1:])]
    if not groups:
        return []
    found: list[tuple[list[_Prediction], bool]] = []  # and whether none would be a box unread
    corner: Group | None = None
    for group, after in itertools.zip_longest(groups, groups[1:]):
        if group is corner:
            continue
        joined = after is not None and after.joined
        if joined and _is_point(group) and _is_point(after):
            found.append(([_Prediction(_box([group, after]), None, True)], False))
            corner = after
        else:
            beside = listed or joined or group.joined
            found.append((_in_group(group), beside and _announces(group)))
    if not any(part for part, _ in found):
        return []
    return [p for part, unread in found for p in (part or [_Prediction()] * unread)]


def _in_group(group: Group) -> list[_Prediction]:
    if group.opening == "{":
        return _in_object(group)
    box = _box([group])
    if box is not None:
        return [_Prediction(box, None, True)]
    found = _in_row(group.items, listed=True)
    return found or [_Prediction()] * (group.opening == "<" and group.ended)


def _in_object(group: Group) -> list[_Prediction]:
    parts: list[dict[str, Items]] = [{}]
    for name, items in group.fields:
        key = _letters(name)
        if key in parts[-1] and key in _BOX_KEYS:  # between them the braces are missing
            parts.append({})
        parts[-1][key] = items
    return [p for part in parts for p in _in_fields(part, group.ended)]


def _in_fields(named: Mapping[str, Items], ended: bool) -> list[_Prediction]:
    """An object's own boxes, then those of the objects in it. Without either, bare boxes count."""
    keys = _box_keys(named)
    value = [item for key in keys for item in named[key]]
    box = _box(value)
    own = _in_row(value, listed=True) if box is None else [_Prediction(box)]
    rest = [p for key, items in named.items() if key not in keys for p in _in_row(items)]
    objects = [p for p in rest if not p.bare]
    if not keys and not objects:
        own = rest
    announced = keys or not objects and not _ABOUT_KEYS.isdisjoint(named)
    if not own and announced and ended:
        own = [_Prediction()]
    return [*_scored(own, named, bare=not keys), *objects]


def _box_keys(named: Mapping[str, Items]) -> tuple[str, ...]:
    if not _KEYS.isdisjoint(named):
        for keys in (*((key,) for key in _BOX_KEYS), *_SIDE_KEYS):
            if all(key in named for key in keys):
                return keys
    return ()


def _scored(
    boxes: list[_Prediction], named: Mapping[str, Items], *, bare: bool
) -> list[_Prediction]:
    """With the confidences of their object, of which there is one for all or one for each."""
    if not boxes:
        return []
    score = next((named[key] for key in _CONFIDENCE_KEYS if key in named), ())
    numbers = [_number(value) for value in itertools.islice(_values(score), len(boxes) + 1)]
    if len(numbers) != len(boxes):
        numbers = (numbers or [None])[:1] * len(boxes)
    return [
        _Prediction(p.box, n if p.confidence is None else p.confidence, p.bare and bare)
        for p, n in zip(boxes, numbers, strict=True)
    ]


def _box(items: Items) -> Box | None:
    """Four numbers, however they are grouped."""
    values = list(itertools.islice(_values(items), 5))
    if len(values) != 4 or any(isinstance(v, str) and v.endswith("%") for v in values):
        return None
    numbers = [_number(value) for value in values]
    return None if None in numbers else tuple(numbers)


def _values(items: Items) -> Iterator[float | str]:
    """The words and numbers in lists; a bracket for what is an object, or is cut off."""
    for item in items:
        if isinstance(item, float):
            yield item
        elif isinstance(item, str):
            yield from filter(None, _BETWEEN.split(item))
        elif item.opening == "{" or not item.ended:
            yield item.opening
        else:
            yield from _values(item.items)


def _is_point(group: Group) -> bool:
    two = group.opening in "[(" and group.ended and len(group.items) == 2
    return two and all(isinstance(v, float) and math.isfinite(v) for v in group.items)


def _announces(group: Group) -> bool:
    """Whether it is to be an object or a box, among others: words in parentheses are not."""
    if group.opening != "(":
        return group.ended
    return group.ended and all(_number(value) is not None for value in _values(group.items))


@functools.lru_cache(maxsize=256)
def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))


def _number(value: float | str) -> float | None:
    """A finite float, of a percentage its hundredth."""
    if isinstance(value, str):
        found = _NUMBER.fullmatch(value)
        value = float(found[1]) / (100 if found[2] else 1) if found else math.nan
    return value if math.isfinite(value) else None
