"""Visual-RFT's rewards with the original's numbers, for reproduction.

All but one step: the original first asked a symbolic checker, which paid full reward for one equal
coordinate. What else is odd about them is kept: an empty answer scores 1 in `visual_rft_accuracy`,
junk boxes of confidence 0 pay, a correct 'No Objects' scores 0, and `visual_rft_grounding` has no
bound. Use the rewards in `virft_fast.tasks.rewards` for new runs.

Where the original gave NaN (a confidence of NaN), these give 0, so that it can't reach a loss.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from virft_fast.tasks.answers import NOT_A_BOX, Detection
from virft_fast.tasks.rewards import completion_texts, scored

_OPEN, _CLOSE = "<answer>", "</answer>"
_CORNERS = re.compile(
    r"\(\s*(\d{1,9})\s*,\s*(\d{1,9})\s*\)\s*,\s*\(\s*(\d{1,9})\s*,\s*(\d{1,9})\s*\)"
)


@scored
def visual_rft_accuracy_iou(
    prompts: Any = None, completions: Sequence[Any] = (), solution: Sequence[str] = (), **_: Any
) -> list[float]:
    """Summed IoU of greedy matches / max(#predicted, #true), in [0, 1] (their version 2)."""
    return [_iou_v2(*pair) for pair in _results(completions, solution)]


@scored
def visual_rft_accuracy_iou_v1(
    prompts: Any = None, completions: Sequence[Any] = (), solution: Sequence[str] = (), **_: Any
) -> list[float]:
    """Mean over predictions of the IoU of greedy matches, in [0, 1] (the paper's equation 6)."""
    return [_iou_v1(*pair) for pair in _results(completions, solution)]


@scored
def visual_rft_accuracy_confidence(
    prompts: Any = None, completions: Sequence[Any] = (), solution: Sequence[str] = (), **_: Any
) -> list[float]:
    """Mean over predictions of the confidence, or 1 - confidence without a match; clipped to
    [0, 1] after the mean."""
    return [_confidence(*pair) for pair in _results(completions, solution)]


@scored
def visual_rft_accuracy(
    prompts: Any = None, completions: Sequence[Any] = (), solution: Sequence[str] = (), **_: Any
) -> list[float]:
    """1 if the answer is a part of the class name or the other way round, else 0."""
    rewards = []
    for text, truth in zip(completion_texts(completions), solution, strict=True):
        rewards.append(float(names_label(text, str(truth))))
    return rewards


@scored
def visual_rft_grounding(
    prompts: Any = None, completions: Sequence[Any] = (), solution: Sequence[str] = (), **_: Any
) -> list[float]:
    """GIoU + 1, nominally in [0, 2]; an inverted box can score far more, as in the original."""
    rewards = []
    for text, truth in zip(completion_texts(completions), solution, strict=True):
        answer, target = _any_answer(text), _any_answer(str(truth))
        if answer == target:
            rewards.append(2.0)
            continue
        box, true = _corner_box(answer), _corner_box(target)
        rewards.append(_giou_plus_one(box, true) if box and true else 0.0)
    return rewards


def names_label(text: str, truth: str) -> bool:
    """Whether the answer is a part of the class name or the other way round; an empty one is."""
    answer, label = (_squeeze(_one_line_answer(part)) for part in (text, truth))
    return label in answer or answer in label


def read_detection(text: str) -> Detection | None:
    """The boxes that the original's evaluation reads; None if it reads none.

    It drops the whole answer where its list, with single quotes replaced, is not JSON or an object
    has no 'Position'. It stops at the first object whose position is not four numbers, or that has
    no 'Confidence'.
    """
    for old, new in (("[[", "["), ("]]", "]"), ("\n", ""), (", ...", "")):
        text = text.replace(old, new)
    items = _items(_between_tags(f"{_OPEN}{_one_line_answer(text)}{_CLOSE}"))
    boxes, confidences = [], []
    for item in (_unique(items) if items else None) or ():
        box = item["Position"]
        if len(box) != 4 or not all(_is_number(v) for v in box) or "Confidence" not in item:
            break
        sides = tuple(map(_as_float, box))
        boxes.append(sides if all(map(math.isfinite, sides)) else NOT_A_BOX)
        score = item["Confidence"]
        confidences.append(_as_float(score) if _is_number(score) else None)
    return Detection(tuple(boxes), tuple(confidences)) if boxes else None


def read_grounding(text: str) -> Detection | None:
    """The first (x1,y1),(x2,y2) of whole numbers in all of the text, the thinking included."""
    found = _CORNERS.search(text)
    return Detection((tuple(map(float, found.groups())),), (None,)) if found else None


Result = tuple[float, Any]  # IoU of the match (0 without one), confidence as written


def _results(
    completions: Sequence[Any], solution: Sequence[str]
) -> list[tuple[list[Result] | None, int]]:
    """For each completion its predictions' results, None if it scores 0, and the true count."""
    pairs = []
    for text, truth in zip(completion_texts(completions), solution, strict=True):
        true = _boxes(_between_tags(str(truth).strip()))
        predicted = _predictions(text)
        usable = predicted is not None and true is not None
        pairs.append((_greedy(predicted, true) if usable else None, len(true or ())))
    return pairs


def _iou_v2(results: list[Result] | None, num_true: int) -> float:
    if not results:
        return 0.0
    return _bounded(sum(iou for iou, _ in results) / max(num_true, len(results)))


def _iou_v1(results: list[Result] | None, num_true: int) -> float:
    if not results:
        return 0.0
    return _bounded(sum(iou for iou, _ in results) / len(results))


def _confidence(results: list[Result] | None, num_true: int) -> float:
    if not results or not all(isinstance(c, (int, float)) for _, c in results):
        return 0.0
    sure = [(iou, _as_float(c)) for iou, c in results]
    return _bounded(sum(c if iou > 0 else 1 - c for iou, c in sure) / len(sure))


def _bounded(value: float) -> float:
    return 0.0 if math.isnan(value) else min(max(value, 0.0), 1.0)


def _predictions(text: str) -> list[dict[str, Any]] | None:
    wrapped = f"{_OPEN}{_one_line_answer(text)}{_CLOSE}"
    wrapped = wrapped.replace("[[", "[").replace("]]", "]").replace("\n", "")
    items = _items(_between_tags(wrapped))
    return _unique(items) if items else None


def _one_line_answer(text: str) -> str:
    """The first <answer>...</answer> that stands on one line, else the whole text; stripped."""
    for line in text.split("\n"):
        start = line.find(_OPEN)
        end = line.find(_CLOSE, start + len(_OPEN)) if start >= 0 else -1
        if end >= 0:
            return line[start + len(_OPEN) : end].strip()
    return text.strip()


def _any_answer(text: str) -> str:
    """The first <answer>...</answer>, over lines too, else the whole text; stripped."""
    start = text.find(_OPEN)
    end = text.find(_CLOSE, start + len(_OPEN)) if start >= 0 else -1
    return (text[start + len(_OPEN) : end] if end >= 0 else text).strip()


def _between_tags(text: str) -> str | None:
    """From the first opening to the first closing tag; the list's cut-off end is mended."""
    if _OPEN not in text:
        return None
    start, end = text.find(_OPEN) + len(_OPEN), text.find(_CLOSE)
    body = text[start : len(text) if end < 0 else end]
    return body if body.endswith("]") else body.rsplit("},", 1)[0] + "}]"


def _items(body: str | None) -> list[Any] | None:
    """The list in a body, or None."""
    if body is None:
        return None
    try:
        items = json.loads(body.replace("'", '"'))
    except (ValueError, RecursionError):
        return None
    return items if isinstance(items, list) else None


def _boxes(body: str | None) -> list[Any] | None:
    """The list in a body, every item with a position and a numeric confidence; else None."""
    items = _items(body)
    for item in items or ():
        if not isinstance(item, dict) or not isinstance(item.get("Confidence"), (int, float)):
            return None
        if not isinstance(item.get("Position"), list):
            return None
        if not all(isinstance(v, (int, float, str, type(None))) for v in item["Position"]):
            return None
    return items


def _unique(items: list[Any]) -> list[dict[str, Any]] | None:
    """Without later items at a position that was there before; None if an item has none."""
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    for item in items:
        try:
            first.setdefault(tuple(item["Position"]), item)
        # No dict, no such key, no sequence, or a list within: the original gives up as well.
        except (TypeError, KeyError, IndexError):
            return None
    return list(first.values())


def _greedy(predicted: list[dict[str, Any]], true: list[dict[str, Any]]) -> list[Result] | None:
    """By falling confidence each prediction takes the free true box with the best IoU, if that is
    above 0.5. None if the confidences have no order or a position to be compared is no box."""
    free = list(range(len(true)))
    results = []
    try:
        falling = sorted(predicted, key=lambda item: item["Confidence"], reverse=True)
    except (KeyError, TypeError):
        return None
    for item in falling:
        ious = [_iou(true[i]["Position"], item["Position"]) for i in free]
        if any(iou is None for iou in ious):
            return None
        best = max(range(len(free)), key=ious.__getitem__, default=-1)
        if best >= 0 and ious[best] > 0.5:
            results.append((ious[best], item["Confidence"]))
            free.pop(best)
        else:
            results.append((0.0, item["Confidence"]))
    return results


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _as_float(number: float) -> float:
    """Integers of any size become a float; the largest ones an infinity."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _iou(a: list[Any], b: list[Any]) -> float | None:
    numeric = all(isinstance(v, (int, float)) for v in (*a, *b))
    if len(a) != 4 or len(b) != 4 or not numeric:
        return None
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = map(_as_float, a), map(_as_float, b)
    width, height = min(ax2, bx2) - max(ax1, bx1), min(ay2, by2) - max(ay1, by1)
    if not (width > 0 and height > 0):
        return 0.0
    both = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - both
    # Sides too small for a float multiply to 0, infinite ones to no number.
    return both / union if union > 0 and math.isfinite(both / union) else 0.0


def _squeeze(text: str) -> str:
    return text.replace(" ", "").replace("_", "").lower()


def _corner_box(text: str) -> list[float] | None:
    """The box of a text in 0..1. Of several boxes the first corners of the first two are taken."""
    found = _CORNERS.findall(text)
    if not found:
        return None
    corners = found[0] if len(found) == 1 else (*found[0][:2], *found[1][:2])
    return [int(v) / 1000 for v in corners]


def _giou_plus_one(a: list[float], b: list[float]) -> float:
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a, b
    both = max(0.0, min(ax2, bx2) - max(ax1, bx1)) * max(0.0, min(ay2, by2) - max(ay1, by1))
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - both
    hull = (max(ax2, bx2) - min(ax1, bx1)) * (max(ay2, by2) - min(ay1, by1))
    if union == 0 or hull == 0:
        return 0.0
    return both / union - (hull - union) / hull + 1
