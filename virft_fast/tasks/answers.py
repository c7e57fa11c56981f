"""From text to boxes or a label; one parser for what a model wrote and for the ground truth.

Nothing here raises on any text, evaluates it, or takes more than linear time. What can't be read is
`None`; a reward makes 0 of that.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from virft_fast.tasks.coordinates import Box, to_thousand

NOT_A_BOX: Box = (math.nan,) * 4
MAX_EXTRA_WORDS = 3  # around the class name, as in "this is a petunia"
MAX_SPLITS = 2  # more words than a class name has that its letters may be written as

_POSITION_KEYS = ("position", "bbox_2d", "bbox", "box_2d", "box")
_CONFIDENCE_KEYS = ("confidence", "score")
_NUMBER = r"[-+]?\d{1,9}(?:\.\d{0,9})?"
# Each of these starts at a bracket and can't run past the next one, so a search is linear.
_OBJECT = re.compile(r"\{[^{}]*\}")
_QUAD = re.compile(rf"\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]")
_CORNERS = re.compile(
    rf"\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)\s*,\s*\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)"
)
_WORD = re.compile(r"[^\W_]+")
_MAX_OBJECT = 2000  # characters; no box takes more
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
    the thinking, or everything."""
    start = text.rfind("<answer>")
    if start < 0:
        end_of_thought = text.rfind("</think>")
        body = text[end_of_thought + len("</think>") :] if end_of_thought >= 0 else text
        return body.strip()
    body = text[start + len("<answer>") :]
    end = body.find("</answer>")
    return (body if end < 0 else body[:end]).strip()


def parse_detection(text: str, extent: Sequence[float] | None = None) -> Detection | None:
    """Boxes and confidences of an answer, or None if it holds none and does not say so either.

    Reads Visual-RFT's list of {'Position': [x1, y1, x2, y2], 'Confidence': c}, with any quotes, key
    case, code fence or missing end; 'bbox_2d' and the like for the key; bare lists of four numbers;
    and (x1,y1),(x2,y2).

    Args:
        extent: (width, height) of the space the answer counts in; None: 0..1000.
    """
    read = _parse_detection(text)
    if read is None or extent is None:
        return read
    return Detection(tuple(to_thousand(box, extent) for box in read.boxes), read.confidences)


def _parse_detection(text: str) -> Detection | None:
    body = answer_text(text)
    if words(body) in (["no", "objects"], ["no", "object"]):
        return Detection((), ())
    written = (text for text in _OBJECT.findall(body) if ":" in text)
    objects = [_read_object(text) for text in itertools.islice(written, _MAX_OBJECTS)]
    read = [item for item in objects if item is not None]
    if read:
        return Detection(tuple(box for box, _ in read), tuple(c for _, c in read))
    found = _QUAD.findall(body) or _CORNERS.findall(body)
    if found:
        boxes = tuple(tuple(float(v) for v in quad) for quad in found)
        return Detection(boxes, (None,) * len(boxes))
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


def _read_object(text: str) -> tuple[Box, float | None] | None:
    """Box and confidence of one {...}; None if it is no object about a box."""
    if len(text) > _MAX_OBJECT:
        return None
    fields = _load(text)
    if not isinstance(fields, dict):
        return None
    by_key = {key.casefold(): value for key, value in fields.items()}
    key = next((key for key in _POSITION_KEYS if key in by_key), None)
    if key is None:
        return None
    score = next((by_key[k] for k in _CONFIDENCE_KEYS if k in by_key), None)
    return _read_box(by_key[key]), _number(score)


def _load(text: str) -> object:
    """JSON, or JSON in Python's quotes; None if neither."""
    for candidate in (text, text.replace("'", '"')):
        try:
            return json.loads(candidate)
        # A number of thousands of digits is a plain ValueError, deep nesting a RecursionError.
        except (ValueError, RecursionError):
            continue
    return None


def _read_box(value: object) -> Box:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    if not isinstance(value, list) or len(value) != 4:
        return NOT_A_BOX
    numbers = [_number(v) for v in value]
    if any(v is None for v in numbers):
        return NOT_A_BOX
    return tuple(numbers)


def _number(value: object) -> float | None:
    """A finite float; strings and booleans are no numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
