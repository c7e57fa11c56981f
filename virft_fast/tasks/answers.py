"""Read boxes or a label from text. Model answers and the ground truth share one parser.

No function here raises because of a text, evaluates it, or takes more than linear time. Text that
can't be read gives `None`, which rewards turn into 0.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from virft_fast.tasks.brackets import BracketGroup, Items, read_groups
from virft_fast.tasks.coordinates import Box, to_thousand
from virft_fast.tasks.labels import (  # noqa: F401  (re-exported)
    MAX_EXTRA_CHARS,
    ClosedSet,
    answer_text,
    marked_answer,
    mentioned,
    parse_label,
    words,
)

NOT_A_BOX: Box = (math.nan,) * 4

# Keys that hold a box, reduced to letters and digits. The first one present wins; without any, the
# four sides may have keys of their own.
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
_LABEL_KEYS = ("label", "class", "category", "name")
_ABOUT_KEYS = {*_CONFIDENCE_KEYS, *_LABEL_KEYS}
_POINT_KEYS = ("point2d", "point", "points")
_KEYS = {*_BOX_KEYS, *itertools.chain.from_iterable(_SIDE_KEYS)}
_NUMBER = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?:\s*(%))?")
_BETWEEN = re.compile(r"[\s,;()\[\]]+(?!%)")  # between the numbers of one quoted text
_ESCAPED = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)  # in a quoted text
_NOTHING = re.compile(r"[\W_]*no[\W_]+objects?[\W_]*", re.IGNORECASE)
MAX_OBJECTS = 500  # in one answer; later objects are not read


@dataclass(frozen=True)
class Detection:
    """Boxes read from an answer.

    Attributes:
        boxes: xyxy in the 0..1000 space, in the order written. Four NaN stand for an object whose
            box can't be read. Empty for 'No Objects' or an empty list.
        confidences: one per box; None if it is missing or not a number.
        labels: one per box, from its object's "label", "class", "category" or "name"; "" if it has
            none. Visual-RFT's own readers leave this empty.
    """

    boxes: tuple[Box, ...]
    confidences: tuple[float | None, ...]
    labels: tuple[str, ...] = ()

    def take(self, places: Sequence[int]) -> Detection:
        """Only the boxes at these places, in this order."""
        return Detection(
            tuple(self.boxes[at] for at in places),
            tuple(self.confidences[at] for at in places),
            tuple(self.labels[at] for at in places),
        )


def parse_detection(text: str, extent: Sequence[float] | None = None) -> Detection | None:
    """Read the boxes, confidences and labels of an answer.

    Returns None if the answer neither has a box nor says that there are none.

    Objects are read one by one, so a mistake in one doesn't affect the others. An object can be
    Visual-RFT's {'Position': [x1, y1, x2, y2], 'Confidence': c}; Qwen's {"bbox_2d": ...,
    "label": ...} and similar, even with wrong quotes, commas or brackets; a bare list of four
    numbers; or (x1,y1),(x2,y2), with or without box markers. These become four NaN: an object whose
    box can't be read, an object with only a label or a confidence, and any other list of numbers
    among boxes. If the text ends inside an object, that object counts if its box is complete. A
    confidence may be a percentage. The text after MAX_OBJECTS objects is not read.

    Args:
        extent: (width, height) of the coordinate space of the answer's boxes; None: 0..1000.
    """
    return in_thousand(_parse_detection(text), extent)


def in_thousand(read: Detection | None, extent: Sequence[float] | None) -> Detection | None:
    """Convert boxes from the coordinate space `extent` (see `parse_detection`) to 0..1000."""
    if read is None or extent is None:
        return read
    return replace(read, boxes=tuple(to_thousand(box, extent) for box in read.boxes))


def _parse_detection(text: str) -> Detection | None:
    body = marked_answer(text)
    if _NOTHING.fullmatch(body):
        return Detection((), ())
    objects = _in_row(read_groups(body).items)[:MAX_OBJECTS]
    if objects:
        boxes, confidences, _, labels = zip(*objects, strict=True)
        return Detection(boxes, confidences, labels)
    empty = body.replace("```json", "").replace("```", "").strip()
    if empty.startswith("[") and empty.endswith("]") and not empty[1:-1].strip():
        return Detection((), ())
    return None


def parse_points(text: str, extent: Sequence[float] | None = None) -> Detection | None:
    """Read the points of an answer, as boxes (x, y, x, y); or its boxes, if it has no points.

    Points in objects come first, such as Qwen's {"point_2d": [x, y], "label": ...}. Otherwise,
    (x, y) and [x, y] are points, unless `parse_detection` can read everything as boxes: two bare
    points in a row are a box.

    Args:
        extent: as in `parse_detection`.
    """
    items = read_groups(marked_answer(text)).items
    read, points = _parse_detection(text), list(_points(items, keyed=True))
    if not points and (read is None or any(map(unreadable, read.boxes))):
        points = list(_points(items, keyed=False))
    if points:
        boxes = tuple((x, y, x, y) for x, y in points[:MAX_OBJECTS])
        read = Detection(boxes, (None,) * len(boxes))
    return in_thousand(read, extent)


def _points(items: Items, *, keyed: bool) -> Iterator[tuple[float, float]]:
    """Yield the pairs of numbers in brackets; `keyed`: only those that an object calls points."""
    for group in items:
        if isinstance(group, BracketGroup):
            x, y = group.items if not keyed and _is_point(group) else (None, None)
            if isinstance(x, float) and isinstance(y, float):
                yield x, y
            elif group.opening == "{":
                for name, value in group.fields:
                    yield from _points(value, keyed=keyed and _letters(name) not in _POINT_KEYS)
            else:
                yield from _points(group.items, keyed=keyed)


def valid_box(box: Box) -> bool:
    """Whether the box has an area and lies in 0..1000 on both axes. Sides must be finite."""
    x1, y1, x2, y2 = box
    return 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000


def unreadable(box: Box) -> bool:
    """Whether the box stands for an object whose box can't be read."""
    return any(map(math.isnan, box))


class _Prediction(NamedTuple):
    """A box. `bare` means that it is a list of numbers without a key."""

    box: Box = NOT_A_BOX
    confidence: float | None = None
    bare: bool = False
    label: str = ""


def _in_row(items: Items, *, listed: bool = False) -> list[_Prediction]:
    """The predictions in a series of groups.

    Args:
        listed: the groups are items of one list. Otherwise, only commas between them join them.
    """
    groups = [
        item for item in items if isinstance(item, BracketGroup) and (item.items or item.fields[1:])
    ]
    read: list[tuple[list[_Prediction], bool]] = []  # with: is a box unreadable if there are none?
    corner: BracketGroup | None = None
    for group, after in itertools.zip_longest(groups, groups[1:]):
        if group is corner:
            continue
        joined = after is not None and after.joined
        points = _box([group, after]) if joined and _is_point(group) and _is_point(after) else None
        if points is not None:
            read.append(([_Prediction(points, None, True)], False))
            corner = after
        else:
            in_series = listed or joined or group.joined
            read.append((_in_group(group), in_series and _announces(group)))
    if not any(predictions for predictions, _ in read):
        return []
    return [p for predictions, unread in read for p in (predictions or [_Prediction()] * unread)]


def _in_group(group: BracketGroup) -> list[_Prediction]:
    if group.opening == "{":
        return _in_object(group)
    box = _box([group])
    if box is not None:
        return [_Prediction(box, None, True)]
    predictions = _in_row(group.items, listed=True)
    return predictions or [_Prediction()] * (group.opening == "<" and group.ended)


def _in_object(group: BracketGroup) -> list[_Prediction]:
    objects: list[dict[str, Items]] = [{}]
    for name, items in group.fields:
        key = _letters(name)
        if key in objects[-1] and key in _BOX_KEYS:  # no braces between two objects
            objects.append({})
        objects[-1][key] = items
    return [p for named in objects for p in _in_fields(named, group.ended)]


def _in_fields(named: Mapping[str, Items], ended: bool) -> list[_Prediction]:
    """An object's own boxes, then those of objects inside it. If it has neither, its bare boxes."""
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
    return [*_described(own, named, bare=not keys), *objects]


def _box_keys(named: Mapping[str, Items]) -> tuple[str, ...]:
    if not _KEYS.isdisjoint(named):
        for keys in (*((key,) for key in _BOX_KEYS), *_SIDE_KEYS):
            if all(key in named for key in keys):
                return keys
    return ()


def _described(
    boxes: list[_Prediction], named: Mapping[str, Items], *, bare: bool
) -> list[_Prediction]:
    """Add an object's label and confidences to its boxes: one for all of them, or one for each."""
    if not boxes:
        return []
    score = next((named[key] for key in _CONFIDENCE_KEYS if key in named), ())
    numbers = [_number(value) for value in itertools.islice(_values(score), len(boxes) + 1)]
    if len(numbers) != len(boxes):
        numbers = (numbers or [None])[:1] * len(boxes)
    label = _label(next((named[key] for key in _LABEL_KEYS if key in named), ()))
    return [
        _Prediction(
            p.box, n if p.confidence is None else p.confidence, p.bare and bare, p.label or label
        )
        for p, n in zip(boxes, numbers, strict=True)
    ]


def _label(items: Items) -> str:
    texts = (f"{value:g}" if isinstance(value, float) else value for value in _values(items))
    text = " ".join(itertools.islice(texts, MAX_EXTRA_CHARS))[:MAX_EXTRA_CHARS]
    return _ESCAPED.sub(lambda m: chr(int(m[1], 16)) if m[1] else m[2], text)


def _box(items: Items) -> Box | None:
    """The box that exactly four numbers form, however they are grouped; else None."""
    values = list(itertools.islice(_values(items), 5))
    if len(values) != 4 or any(isinstance(v, str) and v.endswith("%") for v in values):
        return None
    x1, y1, x2, y2 = map(_number, values)
    if x1 is None or y1 is None or x2 is None or y2 is None:
        return None
    return (x1, y1, x2, y2)


def _values(items: Items) -> Iterator[float | str]:
    """The words and numbers in nested lists; of objects and unclosed groups, only the bracket."""
    for item in items:
        if isinstance(item, float):
            yield item
        elif isinstance(item, str):
            yield from filter(None, _BETWEEN.split(item))
        elif item.opening == "{" or not item.ended:
            yield item.opening
        else:
            yield from _values(item.items)


def _is_point(group: BracketGroup) -> bool:
    two = group.opening in "[(" and group.ended and len(group.items) == 2
    return two and all(isinstance(v, float) and math.isfinite(v) for v in group.items)


def _announces(group: BracketGroup) -> bool:
    """Whether the group is meant as an object or a box. Words in parentheses are not."""
    if group.opening != "(":
        return group.ended
    return group.ended and all(_number(value) is not None for value in _values(group.items))


@functools.lru_cache(maxsize=256)
def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))


def _number(value: float | str) -> float | None:
    """The value as a finite float, percentages divided by 100; None if it isn't one."""
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value)
        value = float(match[1]) / (100 if match[2] else 1) if match else math.nan
    return value if math.isfinite(value) else None
