"""Verifiable rewards. Each has TRL's signature and scores a whole batch:

    reward(prompts, completions, solution, **columns) -> list[float]

`completions` are strings or [{"role": "assistant", "content": text}] lists, whose content may be a
list of parts; `solution` has one ground truth a completion, as Visual-RFT's data sets write it, and
is required; `extent`, where a data set has that column, the (width, height) of the space its boxes
are counted in, otherwise 0..1000. A model's text is data: whatever it holds, a reward is a number
in its documented range.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from virft_fast.matching import match_boxes, pad_boxes, pairwise_iou
from virft_fast.tasks.answers import NOT_A_BOX, Detection, parse_detection, valid_box
from virft_fast.tasks.labels import ClosedSet, answer_text, same_label
from virft_fast.tasks.values import option_of, same_formula, same_number

CHOICE_COLUMNS = ("choices", "options")
CLASS_COLUMNS = ("class_names", *CHOICE_COLUMNS)  # of a row, beside `classes`

_THOUGHT_TO_ANSWER = re.compile(r"</think>\s*<answer>")


def completion_texts(completions: Sequence[Any]) -> list[str]:
    """The text of each completion; of content parts, that of the text parts.

    Raises:
        TypeError: a completion is neither a string nor a list of messages.
    """
    return [_spoken(completion) for completion in completions]


def _spoken(completion: Any) -> str:
    last = completion[-1] if isinstance(completion, (list, tuple)) and completion else None
    said = last.get("content", last) if isinstance(last, Mapping) else completion
    if isinstance(said, (list, tuple)) and all(isinstance(part, Mapping) for part in said):
        parts = [part.get("text") for part in said if part.get("type", "text") == "text"]
        said = "".join(part for part in parts if isinstance(part, str))
    if said is None:  # a turn that only calls tools
        return ""
    if not isinstance(said, str):
        raise TypeError(
            f"completions: expected strings or lists of messages, got {completion!r:.200}"
        )
    return said


def scored(reward: Callable[..., list[float]]) -> Callable[..., list[float]]:
    """A reward that checks its `solution` first.

    Raises:
        ValueError: `solution` is missing, no list, of another length than the completions, or None
            for one of them; names the columns there are.
    """

    @functools.wraps(reward)
    def checked(
        prompts: Any = None,
        completions: Sequence[Any] = (),
        solution: Sequence[str] | None = None,
        **columns: Any,
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
                f"{reward.__name__}: expected {len(completions)} solutions, one a completion, got "
                f"{got}"
            )
        if None in (missing := list(solution)):
            raise ValueError(
                f"{reward.__name__}: expected a solution for completion {missing.index(None)}, got "
                f"None; leave such rows out"
            )
        return reward(prompts, completions, solution, **columns)

    return checked


@scored
def accuracy_iou(
    prompts: Any = None,
    completions: Sequence[Any] = (),
    solution: Sequence[str] = (),
    extent: Sequence[Any] | None = None,
    **_: Any,
) -> list[float]:
    """Summed IoU of matched boxes / max(#predicted, #true), in [0, 1].

    Matches are one to one with IoU > 0.5, chosen so that the sum is largest. A box that is
    inverted, empty or outside 0..1000 is a prediction that matches nothing. With nothing to find,
    'No Objects' or an empty list scores 1 and anything else 0.
    """
    return _iou_rewards(completions, solution, extent, min_iou=0.5)


@scored
def hungarian_iou(
    prompts: Any = None,
    completions: Sequence[Any] = (),
    solution: Sequence[str] = (),
    extent: Sequence[Any] | None = None,
    **_: Any,
) -> list[float]:
    """As `accuracy_iou`, but a match needs no more than some overlap: a smoother signal for a model
    whose boxes are not good yet. In [0, 1]."""
    return _iou_rewards(completions, solution, extent, min_iou=0.0)


@scored
def accuracy_confidence(
    prompts: Any = None,
    completions: Sequence[Any] = (),
    solution: Sequence[str] = (),
    extent: Sequence[Any] | None = None,
    **_: Any,
) -> list[float]:
    """Is the model sure of the boxes it found, and only of those? In [0, 1].

    With n true boxes, c the confidences of matched predictions and u those of the others:
    sum(c) / (n + sum(u)); with nothing to find 1 / (1 + sum(u)). A confidence that is no number in
    [0, 1] counts as 0 on a match and as 1 otherwise. An answer that can't be read scores 0.
    """
    # Of equal boxes the surest is the one that is matched, whatever the order they came in.
    pairs = [
        (None if predicted is None else _surest_first(predicted), true)
        for predicted, true in _parse_pairs(completions, solution, extent)
    ]
    matched = _match(pairs, min_iou=0.5)[0] >= 0  # (N, K)
    rewards = []
    for (predicted, true), row in zip(pairs, matched.tolist(), strict=True):
        if predicted is None or true is None:
            rewards.append(0.0)
            continue
        found = wasted = 0.0
        for hit, confidence in zip(row, predicted.confidences, strict=False):
            usable = _usable(confidence)
            if hit:
                found += confidence if usable else 0.0
            else:
                wasted += confidence if usable else 1.0
        count = len(true.boxes)
        rewards.append(found / (count + wasted) if count else 1.0 / (1.0 + wasted))
    return rewards


def format_reward(prompts: Any = None, completions: Sequence[Any] = (), **_: Any) -> list[float]:
    """1 if the whole completion is <think>...</think> <answer>...</answer>, else 0."""
    return [float(_well_formed(text)) for text in completion_texts(completions)]


@scored
def accuracy(
    prompts: Any = None,
    completions: Sequence[Any] = (),
    solution: Sequence[str] = (),
    classes: ClosedSet | Sequence[str] | Sequence[Sequence[str] | None] | None = None,
    **columns: Any,
) -> list[float]:
    """1 if the answer is the class of the solution, else 0. See `tasks.labels` for what is equal.

    Args:
        classes: the class set, or one for each completion (None: not known). Without it the columns
            `class_names`, `choices` and `options` are looked at, where they hold lists. An answer
            must single out one class of the set. Where no set is known, or the solution is not in
            it, the answer must equal the solution.
    Raises:
        ValueError: two classes of a set differ in nothing that counts.
    """
    texts = completion_texts(completions)
    sets = _class_sets(len(texts), classes, columns)
    return [
        float(_is_class(text, str(truth), known))
        for text, truth, known in zip(texts, solution, sets, strict=True)
    ]


def knowing_classes(reward: Callable[..., list[float]], known: ClosedSet | None) -> Any:
    """A class reward told the class set of a split, for rows that name none themselves."""

    @functools.wraps(reward)
    def asked(*arguments: Any, **columns: Any) -> list[float]:
        if all(columns.get(name) is None for name in ("classes", *CLASS_COLUMNS)):
            columns["classes"] = known
        return reward(*arguments, **columns)

    return asked if known is not None else reward


def _is_class(text: str, truth: str, known: ClosedSet | None) -> bool:
    true_label = known(truth) if known else None
    if known is None or true_label is None:
        return same_label(answer_text(text), answer_text(truth))
    return known(text) == true_label


def _class_sets(count: int, classes: Any, columns: Mapping[str, Any]) -> list[ClosedSet | None]:
    """The class set of each completion."""
    named = (columns.get(name) for name in CLASS_COLUMNS)
    given = classes if classes is not None else next((c for c in named if c is not None), None)
    if isinstance(given, ClosedSet):
        return [given] * count
    if given and all(isinstance(name, str) for name in given) and classes is not None:
        return [_closed_set(tuple(given))] * count
    rows = given if isinstance(given, (list, tuple)) else [None] * count
    return [_closed_set(tuple(row)) if is_class_set(row) else None for row in rows]


_closed_set = functools.lru_cache(maxsize=4096)(ClosedSet)


def is_class_set(value: Any) -> bool:
    """Whether a row's column names the classes to choose from: a list of two texts or more."""
    listed = isinstance(value, (list, tuple)) and len(value) > 1
    return listed and all(isinstance(name, str) for name in value)


@scored
def accuracy_choice(
    prompts: Any = None,
    completions: Sequence[Any] = (),
    solution: Sequence[str] = (),
    **columns: Any,
) -> list[float]:
    """1 if the answer picks the option of the solution by its letter or number, else 0: "B", "(b)",
    "option B" and "B. a cat" are B. An answer that names two options picks none.

    Args:
        columns: the first of CHOICE_COLUMNS that there is lists the options of each row.
    """
    listed = next((columns[n] for n in CHOICE_COLUMNS if columns.get(n) is not None), None)
    rows = [row if is_class_set(row) else None for row in listed or [None] * len(solution)]
    return [
        float((picked := option_of(text, row)) is not None and picked == option_of(str(truth), row))
        for text, truth, row in zip(completion_texts(completions), solution, rows, strict=True)
    ]


@scored
def accuracy_number(
    prompts: Any = None, completions: Sequence[Any] = (), solution: Sequence[str] = (), **_: Any
) -> list[float]:
    """1 if the answer is the number of the solution, else 0. Numbers are compared exactly, so that
    5, 5.0 and 5e0 are equal; both need the same unit or currency, or none. A fraction counts where
    the solution is one, or no whole number."""
    return _each(same_number, completions, solution)


@scored
def accuracy_math(
    prompts: Any = None, completions: Sequence[Any] = (), solution: Sequence[str] = (), **_: Any
) -> list[float]:
    """1 if the answer equals the formula of the solution by math-verify, else 0.

    Raises:
        ValueError: math-verify is not installed.
    """
    return _each(same_formula, completions, solution)


def _each(
    same: Callable[[str, str], bool], completions: Sequence[Any], solution: Sequence[str]
) -> list[float]:
    pairs = zip(completion_texts(completions), solution, strict=True)
    return [float(same(text, str(truth))) for text, truth in pairs]


@scored
def grounding_giou(
    prompts: Any = None,
    completions: Sequence[Any] = (),
    solution: Sequence[str] = (),
    extent: Sequence[Any] | None = None,
    **_: Any,
) -> list[float]:
    """(GIoU + 1) / 2 of the one box asked for, in [0, 1]; 0 for a missing, inverted or empty box,
    one outside 0..1000, or more than one."""
    pairs = _parse_pairs(completions, solution, extent)
    pred, num_pred = _one_box([predicted for predicted, _ in pairs])
    gt, num_gt = _one_box([true for _, true in pairs])
    giou = pairwise_iou(pred, gt, num_pred, num_gt, kind="giou")[:, 0, 0]  # (N,)
    usable = (num_pred > 0) & (num_gt > 0)
    return torch.where(usable, (giou + 1) / 2, 0.0).tolist()


def _usable(confidence: float | None) -> bool:
    return confidence is not None and 0.0 <= confidence <= 1.0


def _surest_first(detection: Detection) -> Detection:
    """The same predictions in an order of their own, not of the text's."""

    def rank(pair: tuple[Any, float | None]) -> tuple[Any, ...]:
        box, confidence = pair
        sureness = confidence if _usable(confidence) else -1.0
        return -sureness, box if valid_box(box) else ()

    pairs = sorted(zip(detection.boxes, detection.confidences, strict=True), key=rank)
    return Detection(tuple(box for box, _ in pairs), tuple(c for _, c in pairs))


def _iou_rewards(
    completions: Sequence[Any],
    solution: Sequence[str],
    extent: Sequence[Any] | None,
    *,
    min_iou: float,
) -> list[float]:
    pairs = _parse_pairs(completions, solution, extent)
    total = _match(pairs, min_iou=min_iou)[1].sum(1).tolist()
    rewards = []
    for (predicted, true), iou in zip(pairs, total, strict=True):
        if predicted is None or true is None:
            rewards.append(0.0)
            continue
        most = max(len(predicted.boxes), len(true.boxes))
        rewards.append(min(iou / most, 1.0) if most else 1.0)
    return rewards


def _parse_pairs(
    completions: Sequence[Any], solution: Sequence[str], extent: Sequence[Any] | None
) -> list[tuple[Detection | None, Detection | None]]:
    texts = completion_texts(completions)
    extents = extent or [None] * len(texts)
    return [
        (parse_detection(text, space), parse_detection(str(truth), space))
        for text, truth, space in zip(texts, solution, extents, strict=True)
    ]


def _match(
    pairs: list[tuple[Detection | None, Detection | None]], *, min_iou: float
) -> tuple[Tensor, Tensor]:
    """All completions in one call: matches (N, K) int64, -1 where none, and their IoU (N, K)."""
    pred, num_pred = pad_boxes([_boxes(p) for p, _ in pairs], dtype=torch.float64)
    gt, num_gt = pad_boxes([_boxes(t) for _, t in pairs], dtype=torch.float64)
    return match_boxes(pred, gt, num_pred, num_gt, min_iou=min_iou)


def _boxes(detection: Detection | None) -> list[Any]:
    """Boxes with the unusable ones in their places as empty boxes, which match nothing."""
    boxes = detection.boxes if detection else ()
    return [box if valid_box(box) else (0.0, 0.0, 0.0, 0.0) for box in boxes]


def _one_box(detections: list[Detection | None]) -> tuple[Tensor, Tensor]:
    """(N, 1, 4) float64 boxes and counts (N,): 1 where there is exactly one and it is valid."""
    boxes = [d.boxes[0] if d and len(d.boxes) == 1 else NOT_A_BOX for d in detections]
    usable = [valid_box(box) for box in boxes]
    rows = [b if ok else (0.0, 0.0, 0.0, 0.0) for b, ok in zip(boxes, usable, strict=True)]
    stacked = torch.tensor(rows, dtype=torch.float64).view(-1, 1, 4)
    return stacked, torch.tensor(usable, dtype=torch.int64)


def _well_formed(text: str) -> bool:
    """`fullmatch` of <think>.*?</think>\\s*<answer>.*?</answer>, in linear time."""
    opening, closing = "<think>", "</answer>"
    if not (text.startswith(opening) and text.endswith(closing)):
        return False
    return bool(_THOUGHT_TO_ANSWER.search(text, len(opening), len(text) - len(closing)))
