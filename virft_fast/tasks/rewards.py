"""Verifiable rewards. Each has TRL's signature and scores a batch of N completions:

    reward(prompts, completions, solution, **columns) -> list[float]

`completions` are strings, or message lists such as [{"role": "assistant", "content": text}], whose
content may be a list of parts. `solution` is required: N ground truths in the form of Visual-RFT's
data sets. `extent` is optional: for each completion the (width, height) of the coordinate space of
its boxes; the default is 0..1000. A model's text is data: whatever it contains, the reward is a
number in the documented range.

The functions below take N texts and N true answers; `scored` gives them the signature above.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeGuard

import numpy as np
import torch
from torch import Tensor

from virft_fast.batch import Json
from virft_fast.matching import assign, match_boxes, pad_boxes, pairwise_iou
from virft_fast.tasks.answers import NOT_A_BOX, Detection, parse_detection, parse_points, valid_box
from virft_fast.tasks.coordinates import Box
from virft_fast.tasks.labels import ClosedSet, answer_text, key, same_label
from virft_fast.tasks.scoring import Conversation, RewardFunction
from virft_fast.tasks.values import number_of, option_of, same_formula, same_number

CHOICE_COLUMNS = ("choices", "options")
CLASS_COLUMNS = ("class_names", *CHOICE_COLUMNS)  # columns that may list a row's classes

Extents: TypeAlias = Sequence[Sequence[float] | None] | None
_NO_BOX: Box = (0.0, 0.0, 0.0, 0.0)  # matches nothing
_MAP_IOUS = [percent / 100 - 1e-9 for percent in range(50, 100, 5)]  # equality counts in COCO
_RECALLS = torch.from_numpy(np.linspace(0, 1, 101))  # torch's own differ in the last digit
_NEAR = 200.0  # thousandths
_THOUGHT_TO_ANSWER = re.compile(r"</think>\s*<answer>")


def completion_texts(completions: Sequence[Conversation]) -> list[str]:
    """The text of each completion. If the content has parts, the text parts are joined.

    Raises:
        TypeError: a completion is neither a string nor a list of messages.
    """
    return [_spoken(completion) for completion in completions]


def _spoken(completion: Conversation) -> str:
    last = completion[-1] if isinstance(completion, (list, tuple)) and completion else None
    said: object = last.get("content", last) if isinstance(last, Mapping) else completion
    if isinstance(said, (list, tuple)) and all(isinstance(item, Mapping) for item in said):
        texts = [item.get("text") for item in said if item.get("type", "text") == "text"]
        said = "".join(text for text in texts if isinstance(text, str))
    if said is None:  # a turn with only tool calls
        return ""
    if not isinstance(said, str):
        raise TypeError(
            f"completions: expected strings or lists of messages, got {completion!r:.200}"
        )
    return said


def scored(reward: Callable[..., list[float]]) -> Callable[..., list[float]]:
    """Give a function of N texts, N true answers and the columns TRL's reward signature.

    Raises:
        TypeError: see `completion_texts`.
        ValueError: `solution` is missing, isn't a list, differs in length from `completions`, or
            contains None. If it is missing, the message names the columns received.
    """

    @functools.wraps(reward)
    def checked(
        prompts: Sequence[Conversation] | None = None,
        completions: Sequence[Conversation] = (),
        solution: Sequence[str | None] | None = None,
        **columns: Json,
    ) -> list[float]:
        if solution is None:
            names = ", ".join(columns) or "none"
            raise ValueError(
                f"{reward.__name__}: expected the column solution, got the columns {names}; name "
                f"the one that holds the truth with --columns solution=NAME, as in --columns "
                f"solution=answer"
            )
        if isinstance(solution, str) or len(solution) != len(completions):
            got = repr(solution)[:80] if isinstance(solution, str) else len(solution)
            raise ValueError(
                f"{reward.__name__}: expected {len(completions)} solutions, one each, got {got}"
            )
        truths = [None if truth is None else str(truth) for truth in solution]
        if None in truths:
            raise ValueError(
                f"{reward.__name__}: expected a solution for completion {truths.index(None)}, got "
                f"None; leave such rows out"
            )
        return reward(completion_texts(completions), truths, **columns)

    vars(checked).pop("__wrapped__")  # so `inspect.signature` shows this signature, not `reward`'s
    return checked


@scored
def accuracy_iou(
    texts: list[str], truths: list[str], /, extent: Extents = None, **_: object
) -> list[float]:
    """Summed IoU of matched boxes / max(#predicted, #true), in [0, 1].

    Boxes with IoU > 0.5 are matched one to one, with the largest possible sum. An inverted or empty
    box, or one outside 0..1000, is a prediction that matches nothing. If there is nothing to find,
    'No Objects' or an empty list scores 1 and anything else 0.
    """
    return _iou_rewards(texts, truths, extent, min_iou=0.5)


@scored
def hungarian_iou(
    texts: list[str], truths: list[str], /, extent: Extents = None, **_: object
) -> list[float]:
    """Like `accuracy_iou`, but boxes match with any overlap: a smoother signal for a model whose
    boxes aren't good yet. In [0, 1]."""
    return _iou_rewards(texts, truths, extent, min_iou=0.0)


@scored
def accuracy_confidence(
    texts: list[str], truths: list[str], /, extent: Extents = None, **_: object
) -> list[float]:
    """Whether the model is confident about the boxes it found, and only about those. In [0, 1].

    With n true boxes, confidences c of matched predictions and u of unmatched ones:
    sum(c) / (n + sum(u)), or 1 / (1 + sum(u)) if there is nothing to find. A confidence that is not
    a number in [0, 1] counts as 0 if matched and as 1 if not. An unreadable answer scores 0.
    """
    # Of several equal boxes, match the one with the highest confidence, whatever their order.
    pairs = [
        (None if predicted is None else _surest_first(predicted), true)
        for predicted, true in _parse_pairs(texts, truths, extent)
    ]
    matched = _match(pairs, min_iou=0.5)[0] >= 0  # (N, K)
    rewards = []
    for (predicted, true), row in zip(pairs, matched.tolist(), strict=True):
        if predicted is None or true is None:
            rewards.append(0.0)
            continue
        earned = wasted = 0.0
        for hit, confidence in zip(row, predicted.confidences, strict=False):
            if hit:
                earned += confidence if _usable(confidence) else 0.0
            else:
                wasted += confidence if _usable(confidence) else 1.0
        count = len(true.boxes)
        rewards.append(earned / (count + wasted) if count else 1.0 / (1.0 + wasted))
    return rewards


@scored
def detection_map(
    texts: list[str], truths: list[str], /, extent: Extents = None, **_: object
) -> list[float]:
    """COCO's mean average precision of one answer with labels and boxes, in [0, 1].

    The mean over IoU thresholds .50:.05:.95, and over the classes that occur in the answer or in
    the truth, of AP * min(1, #true / #predicted). AP is COCO's: predictions in order of confidence
    take the free true box of their class with the best IoU, and precision is averaged at 101
    recalls. COCO charges nothing for boxes after the last match, and nothing for classes without a
    true box; the second factor and the choice of classes do. Equal confidences are one step of the
    curve; a confidence that is not a number in [0, 1] comes last. If no true box has a label,
    labels don't count. If there is nothing to find, 'No Objects' or an empty list scores 1.
    """
    split = [_by_class(p, t) if p and t else None for p, t in _parse_pairs(texts, truths, extent)]
    flat = [pair for classes in split for pair in classes or ()]
    values = iter(_answer_precision(flat).tolist() if flat else ())
    return [
        sum(itertools.islice(values, len(classes))) / len(classes)
        if classes
        else float(classes is not None)
        for classes in split
    ]


def _by_class(predicted: Detection, true: Detection) -> list[tuple[Detection, Detection]]:
    """The boxes of each class that occurs in either; of one class if the truth has no labels."""
    places: dict[str, tuple[list[int], list[int]]] = {}
    labeled, predicted = any(true.labels), _surest_first(predicted)
    for side, detection in enumerate((predicted, true)):
        for at, label in enumerate(detection.labels):
            places.setdefault(key(label) if labeled else "", ([], []))[side].append(at)
    return [(predicted.take(p), true.take(t)) for p, t in places.values()]


def _answer_precision(pairs: Sequence[tuple[Detection, Detection]]) -> Tensor:
    """(P,) AP * min(1, #true / #predicted) of pairs of one class each, surest predictions first."""
    hits = torch.stack([_match(pairs, min_iou=iou, method="greedy")[0] >= 0 for iou in _MAP_IOUS])
    size = hits.shape[-1]
    rank = torch.arange(1, size + 1)
    sure = torch.full((len(pairs), size + 1), -2.0).double()  # the last one ends the others
    for row, (predicted, _) in zip(sure, pairs, strict=True):
        values = [c if _usable(c) else -1.0 for c in predicted.confidences]
        row[: len(values)] = torch.tensor(values, dtype=torch.float64)
    # Where the step of the curve ends that a prediction is part of: (P, K)
    ends = torch.where(sure[:, :-1] != sure[:, 1:], rank, size).flip(1).cummin(1).values.flip(1)
    counts = [[len(predicted.boxes), len(true.boxes)] for predicted, true in pairs]
    num_pred, num_true = torch.tensor(counts, dtype=torch.float64).T
    found = hits.cumsum(-1).gather(-1, (ends - 1).expand_as(hits))  # (10, P, K)
    recall = found / num_true.clamp(min=1)[:, None]
    best = (found / ends.double()).flip(-1).cummax(-1).values.flip(-1)
    at = torch.searchsorted(recall, _RECALLS.expand(*recall.shape[:-1], -1).contiguous())
    precision = torch.nn.functional.pad(best, (0, 1)).gather(-1, at).mean((0, 2))  # (P,)
    return precision * (num_true / num_pred.clamp(min=1)).clamp(max=1)


def format_reward(
    prompts: Sequence[Conversation] | None = None,
    completions: Sequence[Conversation] = (),
    **_: object,
) -> list[float]:
    """1 if the whole completion is `<think>...</think> <answer>...</answer>`, else 0."""
    return [float(_well_formed(text)) for text in completion_texts(completions)]


@scored
def accuracy(
    texts: list[str],
    truths: list[str],
    /,
    classes: ClosedSet | Sequence[str] | Sequence[Sequence[str] | None] | None = None,
    **columns: Json,
) -> list[float]:
    """1 if the answer is the class of the solution, else 0. `tasks.labels` defines equality.

    Args:
        classes: the class set, or one set per completion (None if unknown). Without it, the columns
            `class_names`, `choices` and `options` are used if they contain lists. An answer must
            match exactly one class of the set. If no set is known, or the solution isn't in it,
            the answer must equal the solution.
    Raises:
        ValueError: two classes of a set have the same key.
    """
    sets = _class_sets(len(texts), classes, columns)
    return [float(_is_class(*row)) for row in zip(texts, truths, sets, strict=True)]


def knowing_classes(reward: RewardFunction, classes: ClosedSet | None) -> RewardFunction:
    """The class reward, made to use a split's class set for rows that list no classes."""
    return knowing(reward, classes, "classes", *CLASS_COLUMNS)


def knowing(reward: RewardFunction, value: object, *names: str) -> RewardFunction:
    """The reward, given `value` as the first of these columns if the rows have none of them."""

    @functools.wraps(reward)
    def with_value(*arguments: Json, **columns: Json) -> Sequence[float | None]:
        if all(columns.get(name) is None for name in names):
            columns[names[0]] = value
        return reward(*arguments, **columns)

    return with_value if value is not None else reward


def _is_class(text: str, truth: str, classes: ClosedSet | None) -> bool:
    true_label = classes(truth) if classes else None
    if classes is None or true_label is None:
        return same_label(answer_text(text), answer_text(truth))
    return classes(text) == true_label


def _class_sets(
    count: int, classes: Json, columns: Mapping[str, Json]
) -> Sequence[ClosedSet | None]:
    """The class set for each completion, None if unknown."""
    listed = (classes, *map(columns.get, CLASS_COLUMNS))
    given = next((value for value in listed if value is not None), None)
    if isinstance(given, ClosedSet):
        return [given] * count
    if given and all(isinstance(name, str) for name in given) and classes is not None:
        return [_closed_set(tuple(given))] * count
    rows = given if isinstance(given, (list, tuple)) else [None] * count
    return [_closed_set(tuple(row)) if is_class_set(row) else None for row in rows]


_closed_set = functools.lru_cache(maxsize=4096)(ClosedSet)


def is_class_set(value: object) -> TypeGuard[Sequence[str]]:
    """Whether a row's value lists the classes to choose from: at least two strings."""
    if not isinstance(value, (list, tuple)) or len(value) < 2:
        return False
    return all(isinstance(name, str) for name in value)


@scored
def accuracy_choice(texts: list[str], truths: list[str], /, **columns: Json) -> list[float]:
    """1 if the answer picks the solution's option by letter or number, else 0: "B", "(b)",
    "option B" and "B. a cat" are B. An answer that names two options picks none.

    Args:
        columns: the first of CHOICE_COLUMNS that is given lists the options of each row.
    """
    listed = next((columns[n] for n in CHOICE_COLUMNS if columns.get(n) is not None), None)
    rows = [row if is_class_set(row) else None for row in listed or [None] * len(truths)]
    return [
        float((picked := option_of(text, row)) is not None and picked == option_of(truth, row))
        for text, truth, row in zip(texts, truths, rows, strict=True)
    ]


@scored
def accuracy_number(texts: list[str], truths: list[str], /, **_: object) -> list[float]:
    """1 if the answer is the same number as the solution, else 0.

    Numbers are compared exactly, so 5, 5.0 and 5e0 are equal. Both need the same unit or currency,
    or none. A fraction counts only if the solution is a fraction or not a whole number.
    """
    return [float(same_number(*pair)) for pair in zip(texts, truths, strict=True)]


@scored
def accuracy_math(texts: list[str], truths: list[str], /, **_: object) -> list[float]:
    """1 if the answer equals the solution's formula according to math-verify, else 0.

    Raises:
        ValueError: math-verify is not installed.
    """
    return [float(same_formula(*pair)) for pair in zip(texts, truths, strict=True)]


@scored
def grounding_giou(
    texts: list[str], truths: list[str], /, extent: Extents = None, **_: object
) -> list[float]:
    """(GIoU + 1) / 2 of the one requested box, in [0, 1]; 0 if the answer has no box or several, or
    if its box is inverted, empty or outside 0..1000."""
    pairs = _parse_pairs(texts, truths, extent)
    pred, num_pred = _one_box([predicted for predicted, _ in pairs])
    gt, num_gt = _one_box([true for _, true in pairs])
    giou = pairwise_iou(pred, gt, num_pred, num_gt, kind="giou")[:, 0, 0]  # (N,)
    usable = (num_pred > 0) & (num_gt > 0)
    return torch.where(usable, (giou + 1) / 2, 0.0).tolist()


@scored
def point_in_box(
    texts: list[str], truths: list[str], /, extent: Extents = None, **_: object
) -> list[float]:
    """Points inside true boxes / max(#points, #true boxes), in [0, 1].

    Each point is matched to one box at most, and each box to one point, for the largest number of
    matches; the edge is inside. A box in the answer counts as its center. If there is nothing to
    find, 'No Objects' or an empty list scores 1 and anything else 0.
    """
    pairs = _parse_pairs(texts, truths, extent, parse_points)
    return _point_rewards(pairs, [_boxes(true) for _, true in pairs], _inside)


@scored
def point_distance(
    texts: list[str], truths: list[str], /, extent: Extents = None, **_: object
) -> list[float]:
    """Nearness of points to true points, summed over matches / max(#points, #true), in [0, 1].

    Nearness is 1 - distance / 200, at least 0, where distance is Euclidean in thousandths of the
    image: 0 from a fifth of the image on, so that its center earns nothing for most targets. Points
    are matched one to one, with the largest possible sum. A box, also in the truth, counts as its
    center. 'No Objects' as in `point_in_box`.
    """
    pairs = _parse_pairs(texts, truths, extent, parse_points, parse_points)
    return _point_rewards(pairs, [_centers(true) for _, true in pairs], _nearness)


def _point_rewards(
    pairs: list[_Pair], truths: list[list[Box]], worth: Callable[[Tensor, Tensor], Tensor]
) -> list[float]:
    """`_per_object` of the best assignment of centers to truths, by `worth`."""
    points, num_points = pad_boxes([_centers(p) for p, _ in pairs], dtype=torch.float64)
    boxes, num_boxes = pad_boxes(truths, dtype=torch.float64)
    worths = worth(points[:, :, None], boxes[:, None])  # (N, K, M)
    return _per_object(pairs, assign(worths, num_points, num_boxes, maximize=True)[1])


def _inside(points: Tensor, boxes: Tensor) -> Tensor:
    within = (points[..., :2] >= boxes[..., :2]) & (points[..., 2:] <= boxes[..., 2:])
    return within.all(-1).double()


def _nearness(points: Tensor, centers: Tensor) -> Tensor:
    distance = (points - centers)[..., :2].norm(dim=-1)
    return (1 - distance / _NEAR).clamp(min=0).nan_to_num(0.0)


def _centers(detection: Detection | None) -> list[Box]:
    """The centers of boxes and points, as (x, y, x, y); NaN for one outside 0..1000."""
    centers = []
    for x1, y1, x2, y2 in detection.boxes if detection else ():
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        ok = 0 <= x1 <= x2 <= 1000 and 0 <= y1 <= y2 <= 1000
        centers.append((x, y, x, y) if ok else NOT_A_BOX)
    return centers


@scored
def accuracy_count(texts: list[str], truths: list[str], /, **_: object) -> list[float]:
    """1 - |counted - true| / max(true, 1), at least 0: in [0, 1], and 1 for the right count only.

    Answer and solution are a whole number without a unit, or boxes or points, which are counted;
    'No Objects' is 0. So the solution of a detection row will do.
    """
    counts = zip(map(_count, texts), map(_count, truths), strict=True)
    return [
        0.0 if n is None or m is None else max(0.0, 1 - abs(n - m) / max(m, 1)) for n, m in counts
    ]


def _count(text: str) -> int | None:
    """The count that an answer gives; None if it gives none."""
    number = number_of(text)
    if number is None:
        objects = parse_points(text)
        return None if objects is None else len(objects.boxes)
    is_count = number.value.denominator == 1 and number.value >= 0 and not number.is_fraction
    return int(number.value) if is_count and not number.unit else None


@scored
def accuracy_presence(
    texts: list[str],
    truths: list[str],
    /,
    extent: Extents = None,
    negative_share: float | Sequence[float | None] | None = None,
    **_: object,
) -> list[float]:
    """Whether the answer says rightly if there is anything to find, whatever the boxes. In [0, 1].

    An answer says so by at least one valid box, and denies it by 'No Objects' or an empty list;
    anything else scores 0. With q the share of rows where there is nothing, a right denial scores
    min(1, (1 - q) / q), and a right box min(1, q / (1 - q)): over the data set, always denying and
    never denying both earn min(q, 1 - q), half as much as being right.

    Args:
        negative_share: q, or a column with it in each row; None: 0.5, where both score 1. A run
            counts it in its rows, see `negative_share` in `virft_fast.tasks`.
    Raises:
        ValueError: q is outside [0, 1].
    """
    rewards, pairs = [], _parse_pairs(texts, truths, extent)
    if not isinstance(negative_share, Sequence):
        negative_share = [negative_share] * len(texts)
    for (said, true), share in zip(pairs, negative_share, strict=True):
        q = 0.5 if share is None else float(share)
        if not 0 <= q <= 1:
            raise ValueError(f"negative_share: expected a share in [0, 1], got {share!r}")
        denies, nothing = said is not None and not said.boxes, true is not None and not true.boxes
        finds = said is not None and any(map(valid_box, said.boxes))
        right = true is not None and (denies if nothing else finds)
        rarer, other = (q, 1 - q) if nothing else (1 - q, q)
        rewards.append(min(1.0, other / rarer) if right and rarer > 0 else float(right))
    return rewards


def _usable(confidence: float | None) -> TypeGuard[float]:
    return confidence is not None and 0.0 <= confidence <= 1.0


def _surest_first(detection: Detection) -> Detection:
    """The same predictions, in an order that doesn't depend on how the text orders them."""

    def rank(at: int) -> tuple[float, tuple[float, ...]]:
        box, confidence = detection.boxes[at], detection.confidences[at]
        sureness = confidence if _usable(confidence) else -1.0
        return -sureness, box if valid_box(box) else ()

    return detection.take(sorted(range(len(detection.boxes)), key=rank))


def _iou_rewards(
    texts: list[str], truths: list[str], extent: Extents, *, min_iou: float
) -> list[float]:
    pairs = _parse_pairs(texts, truths, extent)
    return _per_object(pairs, _match(pairs, min_iou=min_iou)[1].sum(1))


def _per_object(pairs: list[_Pair], totals: Tensor) -> list[float]:
    """(N,) totals / max(#predicted, #true), at most 1; 1 if both are 0, and 0 if unreadable."""
    rewards = []
    for (predicted, true), total in zip(pairs, totals.tolist(), strict=True):
        if predicted is None or true is None:
            rewards.append(0.0)
            continue
        count = max(len(predicted.boxes), len(true.boxes))
        rewards.append(min(total / count, 1.0) if count else 1.0)
    return rewards


_Pair: TypeAlias = tuple[Detection | None, Detection | None]  # predicted, true; None: unreadable


def _parse_pairs(
    texts: list[str],
    truths: list[str],
    extent: Extents,
    read: Callable[..., Detection | None] = parse_detection,
    read_truth: Callable[..., Detection | None] = parse_detection,
) -> list[_Pair]:
    return [
        (read(text, space), read_truth(truth, space))
        for text, truth, space in zip(texts, truths, extent or [None] * len(texts), strict=True)
    ]


def _match(
    pairs: Sequence[_Pair], *, min_iou: float, method: str = "hungarian"
) -> tuple[Tensor, Tensor]:
    """Match all completions at once. Returns (N, K) int64 matches, -1 for none, and their IoU."""
    pred, num_pred = pad_boxes([_boxes(p) for p, _ in pairs], dtype=torch.float64)
    gt, num_gt = pad_boxes([_boxes(t) for _, t in pairs], dtype=torch.float64)
    return match_boxes(pred, gt, num_pred, num_gt, method=method, min_iou=min_iou)


def _boxes(detection: Detection | None) -> list[Box]:
    """The boxes; each unusable box is replaced by an empty one."""
    boxes = detection.boxes if detection else ()
    return [box if valid_box(box) else _NO_BOX for box in boxes]


def _one_box(detections: list[Detection | None]) -> tuple[Tensor, Tensor]:
    """(N, 1, 4) float64 boxes and counts (N,): 1 if there is exactly one box and it is valid."""
    boxes = [d.boxes[0] if d and len(d.boxes) == 1 else NOT_A_BOX for d in detections]
    usable = [valid_box(box) for box in boxes]
    rows = [box if ok else _NO_BOX for box, ok in zip(boxes, usable, strict=True)]
    stacked = torch.tensor(rows, dtype=torch.float64).view(-1, 1, 4)
    return stacked, torch.tensor(usable, dtype=torch.int64)


def _well_formed(text: str) -> bool:
    """`fullmatch` of <think>.*?</think>\\s*<answer>.*?</answer>, in linear time."""
    opening, closing = "<think>", "</answer>"
    if not (text.startswith(opening) and text.endswith(closing)):
        return False
    return bool(_THOUGHT_TO_ANSWER.search(text, len(opening), len(text) - len(closing)))
