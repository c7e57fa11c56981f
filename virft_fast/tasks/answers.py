"""From text to boxes or a label; one parser for what a model wrote and for the ground truth.

Nothing here raises on any text, evaluates it, or takes more than linear time. What can't be read is
`None`; a reward makes 0 of that.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from virft_fast.tasks.brackets import Group, Items, read_groups
from virft_fast.tasks.coordinates import Box, to_thousand

NOT_A_BOX: Box = (math.nan,) * 4
MAX_EXTRA_WORDS = 3  # around the class name, as in "this is a petunia"
MAX_SPLITS = 2  # more words than a class name has that its letters may be written as

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
_MARK = re.compile(r"<\|\w+\|>")  # the family's text markers
_NOTHING = re.compile(r"[\W_]*no[\W_]+objects?[\W_]*", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+")
_MAX_OBJECTS = 1000  # in one answer; the rest is not read


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


def answer_text(text: str) -> str:
    """What stands in the last <answer>, up to its end or the text's; without the tag, what follows
    the thinking, or everything. The family's text markers, as <|box_start|>, are left out."""
    return _MARK.sub("", _answer(text)).strip()


def _answer(text: str) -> str:
    start = text.rfind("<answer>")
    if start < 0:
        end_of_thought = text.rfind("</think>")
        return text[end_of_thought + len("</think>") :] if end_of_thought >= 0 else text
    body = text[start + len("<answer>") :]
    end = body.find("</answer>")
    return body if end < 0 else body[:end]


def parse_detection(text: str, extent: Sequence[float] | None = None) -> Detection | None:
    """Boxes and confidences of an answer, or None if it holds none and does not say so either.

    Objects are read one by one, so that what is wrong with one changes nothing about the others.
    An object is Visual-RFT's {'Position': [x1, y1, x2, y2], 'Confidence': c}, Qwen's
    {"bbox_2d": ..., "label": ...} and the like, in any state of quotes, commas and brackets; a bare
    list of four numbers; or (x1,y1),(x2,y2), between box marks or not. Four NaN stand for one that
    announces a box, or only has a label or a confidence, and for a list of numbers among boxes.
    An object that the end of the text cuts off counts if its box is whole. A confidence may be a
    percentage.

    Args:
        extent: (width, height) of the space the answer counts in; None: 0..1000.
    """
    read = _parse_detection(text)
    if read is None or extent is None:
        return read
    return Detection(tuple(to_thousand(box, extent) for box in read.boxes), read.confidences)


def _parse_detection(text: str) -> Detection | None:
    body = _answer(text)
    if _NOTHING.fullmatch(body):
        return Detection((), ())
    found = _in_row(read_groups(body).items)[:_MAX_OBJECTS]
    if found:
        return Detection(tuple(p.box for p in found), tuple(p.confidence for p in found))
    empty = body.replace("```json", "").replace("```", "").strip()
    if empty.startswith("[") and empty.endswith("]") and not empty[1:-1].strip():
        return Detection((), ())
    return None


def parse_label(text: str) -> list[str]:
    """Words of the answer, lower case, without punctuation; empty if there are none."""
    return words(answer_text(text))


def words(text: str) -> list[str]:
    """Lower-case words; spaces, _, - and punctuation only separate them."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def mentioned(text: str, names: Sequence[str]) -> list[str]:
    """Which of `names` an answer mentions, in the order of `names`.

    A name counts where its words stand in a row; of two that start at the same word the longer one
    does, so that 'hot dog' is no dog.
    """
    found = _Names(names).in_words(parse_label(text))
    return [name for name in names if name in found]


class _Names:
    """Names to be found in a row of words.

    Args:
        joined: also where the words are joined differently: 'saintbernard' is 'saint bernard' and
            'a300-b4' is 'A300B4'. Both ends are those of words, so '737-2000' is no '737-200'. A
            name's word may be in parts where a letter and a digit meet, and between parts of two
            letters or more: 'wall flower', but 'an T' is no ant and '1 1' no 11.
    """

    def __init__(self, names: Sequence[str], *, joined: bool = False) -> None:
        self._by_words = {tuple(words(name)): name for name in names}
        self._by_letters: dict[str, tuple[str, set[int]]] = {}
        self._longest = max(map(len, self._by_words), default=0)
        if joined:
            for parts, name in self._by_words.items():
                self._by_letters.setdefault("".join(parts), (name, _borders(parts)))
            self._longest += MAX_SPLITS

    def in_words(self, written: list[str]) -> dict[str, int]:
        """Each name that is found, and how many words it has there."""
        found: dict[str, int] = {}
        at = 0
        while at < len(written):
            run: tuple[str, ...] = ()
            for size in range(min(self._longest, len(written) - at), 0, -1):
                run = tuple(written[at : at + size])
                name = self._by_words.get(run) or self._joined(run)
                if name is not None:
                    found.setdefault(name, size)
                    break
            else:
                run = run[:1]
            at += len(run)
        return found

    def _joined(self, run: tuple[str, ...]) -> str | None:
        name, borders = self._by_letters.get("".join(run), (None, set()))
        place = 0
        for left, right in itertools.pairwise(run) if name is not None else ():
            place += len(left)
            digits = left[-1].isdecimal(), right[0].isdecimal()
            apart = digits[0] != digits[1] or (not any(digits) and min(len(left), len(right)) > 1)
            if place not in borders and not apart:
                return None
        return name


def _borders(parts: Sequence[str]) -> set[int]:
    """Where words end, counted in the letters of all."""
    return set(itertools.accumulate(map(len, parts)))


class ClosedSet:
    """The label out of a fixed set that an answer gives.

    Case, spaces, _, - and punctuation don't count. It is the label the answer equals, or else the
    only one it mentions among at most MAX_EXTRA_WORDS further words, be its words joined or not.

    Args:
        labels: as they are to be named; of several that differ in spelling only, the first.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels: list[str] = []
        self._by_letters: dict[str, str] = {}
        for label in labels:
            letters = "".join(words(label))
            if letters and letters not in self._by_letters:
                self._by_letters[letters] = label
                self.labels.append(label)
        self._names = _Names(self.labels, joined=True)

    def __call__(self, text: str) -> str | None:
        """None if the answer gives none of the labels, or several."""
        written = parse_label(text)
        same = self._by_letters.get("".join(written))
        if same is not None:
            return same
        found = self._names.in_words(written)
        if len(found) != 1:
            return None
        ((label, size),) = found.items()
        return label if len(written) - size <= MAX_EXTRA_WORDS else None


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
