"""Visual-RFT's rewards with the original's values, to reproduce its results.

One step is left out: the original first ran a symbolic checker, which gave the full reward for a
single equal coordinate. Its other quirks are kept: an empty answer scores 1 in
`visual_rft_accuracy`, junk boxes with confidence 0 earn a reward, a correct 'No Objects' scores 0,
and `visual_rft_grounding` is unbounded. New runs should use `virft_fast.tasks.rewards`.

Where the original returns NaN (for a confidence of NaN), these return 0, so that NaN can't reach
the loss.
"""

from __future__ import annotations

import json
import math
import re
from typing import TypeAlias, TypeGuard

from virft_fast.batch import Json, Row
from virft_fast.tasks.answers import NOT_A_BOX, Detection
from virft_fast.tasks.coordinates import Box
from virft_fast.tasks.rewards import scored

_OPEN, _CLOSE = "<answer>", "</answer>"
_CORNERS = re.compile(
    r"\(\s*(\d{1,9})\s*,\s*(\d{1,9})\s*\)\s*,\s*\(\s*(\d{1,9})\s*,\s*(\d{1,9})\s*\)"
)


@scored
def visual_rft_accuracy_iou(texts: list[str], truths: list[str], /, **_: object) -> list[float]:
    """Summed IoU of greedy matches / max(#predicted, #true), in [0, 1] (original, version 2)."""
    return [_mean_iou(*pair) for pair in _results(texts, truths)]


@scored
def visual_rft_accuracy_iou_v1(texts: list[str], truths: list[str], /, **_: object) -> list[float]:
    """Mean IoU of greedy matches over all predictions, in [0, 1] (the paper's equation 6)."""
    return [_mean_iou(results) for results, _ in _results(texts, truths)]


@scored
def visual_rft_accuracy_confidence(
    texts: list[str], truths: list[str], /, **_: object
) -> list[float]:
    """Mean over predictions of the confidence, or of 1 - confidence if unmatched; the mean is
    clipped to [0, 1]."""
    return [_confidence(results) for results, _ in _results(texts, truths)]


@scored
def visual_rft_accuracy(texts: list[str], truths: list[str], /, **_: object) -> list[float]:
    """1 if the answer contains the class name or the class name contains the answer, else 0."""
    return [float(names_label(text, truth)) for text, truth in zip(texts, truths, strict=True)]


@scored
def visual_rft_grounding(texts: list[str], truths: list[str], /, **_: object) -> list[float]:
    """GIoU + 1, nominally in [0, 2]; an inverted box can score far more, as in the original."""
    rewards = []
    for text, truth in zip(texts, truths, strict=True):
        answer, target = _any_answer(text), _any_answer(truth)
        box, true = _corner_box(answer), _corner_box(target)
        different = _giou_plus_one(box, true) if box and true else 0.0
        rewards.append(2.0 if answer == target else different)
    return rewards


def names_label(text: str, truth: str) -> bool:
    """Whether one of the answer and the class name contains the other; true for an empty answer."""
    answer, label = (_squeeze(_one_line_answer(string)) for string in (text, truth))
    return label in answer or answer in label


def read_detection(text: str) -> Detection | None:
    """The boxes that the original's evaluation reads; None if it reads none.

    It drops the whole answer if its list, with single quotes replaced, isn't JSON, or if an object
    has no 'Position'. It stops at the first object whose position isn't four numbers or that has no
    'Confidence'.
    """
    for old, new in (("[[", "["), ("]]", "]"), ("\n", ""), (", ...", "")):
        text = text.replace(old, new)
    items = _items(_between_tags(f"{_OPEN}{_one_line_answer(text)}{_CLOSE}"))
    boxes: list[Box] = []
    confidences: list[float | None] = []
    for item in (_unique(items) if items else None) or ():
        box = item["Position"]
        if len(box) != 4 or not all(_is_number(v) for v in box) or "Confidence" not in item:
            break
        x1, y1, x2, y2 = map(_as_float, box)
        finite = all(map(math.isfinite, (x1, y1, x2, y2)))
        boxes.append((x1, y1, x2, y2) if finite else NOT_A_BOX)
        score = item["Confidence"]
        confidences.append(_as_float(score) if _is_number(score) else None)
    return Detection(tuple(boxes), tuple(confidences)) if boxes else None


def read_grounding(text: str) -> Detection | None:
    """The first (x1,y1),(x2,y2) of whole numbers in the whole text, including the thinking."""
    match = _CORNERS.search(text)
    if match is None:
        return None
    x1, y1, x2, y2 = map(float, match.groups())
    return Detection(((x1, y1, x2, y2),), (None,))


Result: TypeAlias = tuple[float, Json]  # IoU of the match, 0 if unmatched; confidence as written


def _results(texts: list[str], truths: list[str]) -> list[tuple[list[Result] | None, int]]:
    """For each completion, the results of its predictions, and the number of true boxes.

    None instead of results scores 0.
    """
    pairs = []
    for text, truth in zip(texts, truths, strict=True):
        true, predicted = _boxes(_between_tags(truth.strip())), _predictions(text)
        results = None if predicted is None or true is None else _greedy(predicted, true)
        pairs.append((results, len(true or ())))
    return pairs


def _mean_iou(results: list[Result] | None, num_true: int = 0) -> float:
    if not results:
        return 0.0
    return _bounded(sum(iou for iou, _ in results) / max(num_true, len(results)))


def _confidence(results: list[Result] | None) -> float:
    if not results or not all(_is_number(c) for _, c in results):
        return 0.0
    sure = [(iou, _as_float(c)) for iou, c in results]
    return _bounded(sum(c if iou > 0 else 1 - c for iou, c in sure) / len(sure))


def _bounded(value: float) -> float:
    return 0.0 if math.isnan(value) else min(max(value, 0.0), 1.0)


def _predictions(text: str) -> list[Row] | None:
    wrapped = f"{_OPEN}{_one_line_answer(text)}{_CLOSE}"
    wrapped = wrapped.replace("[[", "[").replace("]]", "]").replace("\n", "")
    items = _items(_between_tags(wrapped))
    return _unique(items) if items else None


def _one_line_answer(text: str) -> str:
    """The first <answer>...</answer> on a single line, else the whole text; stripped."""
    for line in text.split("\n"):
        start = line.find(_OPEN)
        end = line.find(_CLOSE, start + len(_OPEN)) if start >= 0 else -1
        if end >= 0:
            return line[start + len(_OPEN) : end].strip()
    return text.strip()


def _any_answer(text: str) -> str:
    """The first <answer>...</answer>, which may span lines, else the whole text; stripped."""
    start = text.find(_OPEN)
    end = text.find(_CLOSE, start + len(_OPEN)) if start >= 0 else -1
    return (text[start + len(_OPEN) : end] if end >= 0 else text).strip()


def _between_tags(text: str) -> str | None:
    """The text between the first opening and closing tags; a truncated list is closed."""
    if _OPEN not in text:
        return None
    start, end = text.find(_OPEN) + len(_OPEN), text.find(_CLOSE)
    body = text[start : len(text) if end < 0 else end]
    return body if body.endswith("]") else body.rsplit("},", 1)[0] + "}]"


def _items(body: str | None) -> list[Json] | None:
    """The list in a text, or None."""
    if body is None:
        return None
    try:
        items = json.loads(body.replace("'", '"'))
    except (ValueError, RecursionError):
        return None
    return items if isinstance(items, list) else None


def _boxes(body: str | None) -> list[Json] | None:
    """The list in a text, if every item has a position and a numeric confidence; else None."""
    items = _items(body)
    for item in items or ():
        if not isinstance(item, dict) or not _is_number(item.get("Confidence")):
            return None
        if not isinstance(item.get("Position"), list):
            return None
        if not all(isinstance(v, (int, float, str, type(None))) for v in item["Position"]):
            return None
    return items


def _unique(items: list[Json]) -> list[Row] | None:
    """The items without those that repeat a position; None if an item has no position."""
    first: dict[tuple[Json, ...], Row] = {}
    for item in items:
        try:
            first.setdefault(tuple(item["Position"]), item)
        # Not a dict, key missing, not a sequence, or a nested list: the original gives up, too.
        except (TypeError, KeyError, IndexError):
            return None
    return list(first.values())


def _greedy(predicted: list[Row], true: list[Row]) -> list[Result] | None:
    """In order of descending confidence, match each prediction to the free true box with the best
    IoU, if that is above 0.5. None if confidences can't be sorted or a position isn't a box."""
    free = list(range(len(true)))
    results = []
    try:
        falling = sorted(predicted, key=lambda item: item["Confidence"], reverse=True)
    except (KeyError, TypeError):
        return None
    for item in falling:
        positions = (true[i]["Position"] for i in free)
        ious = [iou for p in positions if (iou := _iou(p, item["Position"])) is not None]
        if len(ious) < len(free):
            return None
        best = max(range(len(free)), key=ious.__getitem__, default=-1)
        if best >= 0 and ious[best] > 0.5:
            results.append((ious[best], item["Confidence"]))
            free.pop(best)
        else:
            results.append((0.0, item["Confidence"]))
    return results


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float))


def _as_float(number: float) -> float:
    """As a float; infinite if the integer is too large for a float."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _iou(a: list[Json], b: list[Json]) -> float | None:
    if len(a) != 4 or len(b) != 4 or not all(map(_is_number, (*a, *b))):
        return None
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = map(_as_float, a), map(_as_float, b)
    width, height = min(ax2, bx2) - max(ax1, bx1), min(ay2, by2) - max(ay1, by1)
    if not (width > 0 and height > 0):
        return 0.0
    both = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - both
    # Products of tiny sides underflow to 0; those of infinite sides may be NaN.
    return both / union if union > 0 and math.isfinite(both / union) else 0.0


def _squeeze(text: str) -> str:
    return text.replace(" ", "").replace("_", "").lower()


def _corner_box(text: str) -> list[float] | None:
    """The box in a text, in 0..1; from several boxes, the first corners of the first two."""
    boxes = _CORNERS.findall(text)
    if not boxes:
        return None
    corners = boxes[0] if len(boxes) == 1 else (*boxes[0][:2], *boxes[1][:2])
    return [int(v) / 1000 for v in corners]


def _giou_plus_one(a: list[float], b: list[float]) -> float:
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a, b
    both = max(0.0, min(ax2, bx2) - max(ax1, bx1)) * max(0.0, min(ay2, by2) - max(ay1, by1))
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - both
    hull = (max(ax2, bx2) - min(ax1, bx1)) * (max(ay2, by2) - min(ay1, by1))
    if union == 0 or hull == 0:
        return 0.0
    return both / union - (hull - union) / hull + 1
