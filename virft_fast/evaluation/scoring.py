"""Held-out prompts answered greedily, their rewards and the task's own measure in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from virft_fast.batch import Rollouts, Sample
from virft_fast.data import BadRow, BadRows
from virft_fast.evaluation.answering import Load, answer
from virft_fast.evaluation.journal import Record
from virft_fast.evaluation.reading import predicted_boxes, true_boxes
from virft_fast.matching import match_boxes, pad_boxes
from virft_fast.metrics import null_for_nan
from virft_fast.rollout import Rollout
from virft_fast.rollout.records import completion_records, reward_arguments
from virft_fast.tasks import BOX_TASKS, score

Section = Callable[[str], AbstractContextManager[Any]]
# Columns of a row that its record keeps, beside the answer.
KEPT_COLUMNS = ("image_id", "category", "label")


@dataclass(frozen=True)
class Evaluation:
    """Means over samples, and one record a sample in the order of the rows."""

    means: dict[str, float]
    records: list[dict[str, Any]]


def evaluate_rewards(
    rollout: Rollout,
    load: Load,
    indices: Sequence[int],
    *,
    reward_funcs: list[tuple[str, Callable[..., Any]]],
    bad_rows: BadRows,
    task: str,
    batch_size: int,
    max_completion_length: int,
    section: Section = nullcontext,
    reward_section: Section = nullcontext,
) -> Evaluation:
    """Greedy answers to the rows `indices`, scored; see `answering.answer`, and `tasks.score` for
    `reward_section`.

    Returns:
        The mean of each reward and of the task's measures (`task_measures`), the same on all ranks.
    """
    records = answer(
        rollout,
        load,
        indices,
        lambda rollouts: scored(rollouts, reward_funcs, reward_section),
        bad_rows=bad_rows,
        batch_size=batch_size,
        max_completion_length=max_completion_length,
        section=section,
    )
    means = _means(records, [name for name, _ in reward_funcs])
    return Evaluation(means | task_measures(task, records), records)


def scored(
    rollouts: Rollouts,
    reward_funcs: list[tuple[str, Callable[..., Any]]],
    section: Section = nullcontext,
) -> list[Record]:
    """A record for each answer: prompt, completion, solution, rewards, the first image's size."""
    names = [name for name, _ in reward_funcs]
    arguments = reward_arguments(rollouts)
    rewards, _ = score(reward_funcs, [1.0] * len(names), *arguments, section=section)
    records = completion_records(rollouts, names, rewards)
    for record, prompt in zip(records, rollouts.prompts, strict=True):
        columns, images = prompt.sample.columns, prompt.sample.images
        record |= {name: columns[name] for name in KEPT_COLUMNS if columns.get(name) is not None}
        if images:
            record["size"] = list(images[0].size)
    return records


def rescored(
    records: Sequence[Record],
    samples: Sequence[Sample | BadRow],
    tokenizer: Any,
    reward_funcs: list[tuple[str, Callable[..., Any]]],
) -> list[Record]:
    """The records with these functions' rewards for their completions; none where the row can't be
    read any more. `completion_ids` are what the tokenizer makes of the text."""
    names = [name for name, _ in reward_funcs]
    found = [record | {"rewards": dict.fromkeys(names)} for record in records]
    usable = [n for n, sample in enumerate(samples) if not isinstance(sample, BadRow)]
    if not usable:
        return found
    known = [samples[n].columns for n in usable]
    columns = {
        name: [of_sample.get(name) for of_sample in known]
        for name in sorted({name for of_sample in known for name in of_sample})
    }
    texts = [records[n]["completion"] for n in usable]
    columns["completion_ids"] = [tokenizer(text)["input_ids"] for text in texts]
    messages = [list(samples[n].messages) for n in usable]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    rewards, _ = score(reward_funcs, [1.0] * len(names), messages, completions, columns)
    for n, values in zip(usable, rewards.tolist(), strict=True):
        found[n]["rewards"] = null_for_nan(dict(zip(names, values, strict=True)))
    return found


def _means(records: list[dict[str, Any]], names: list[str]) -> dict[str, float]:
    means = {}
    for name in names:
        values = [r["rewards"][name] for r in records if r["rewards"][name] is not None]
        means[name] = sum(values) / len(values) if values else math.nan
    return means


@dataclass(frozen=True)
class Matched:
    """Predicted and true boxes of N answers.

    Attributes:
        num_true: (N,) int64. iou_sum: (N,) float32, summed IoU of the best matching.
        answer: (S,) int64, the answer a prediction is from. scores: (S,) float32. hit: (S,) bool,
            whether it found a true box with IoU > 0.5, the surest first.
    """

    num_true: torch.Tensor
    iou_sum: torch.Tensor
    answer: torch.Tensor
    scores: torch.Tensor
    hit: torch.Tensor


def match_answers(records: list[Record]) -> Matched:
    """All boxes of an answer count as of one class."""
    predicted = [predicted_boxes(record) for record in records]
    true = [true_boxes(record) for record in records]
    pred, num_pred = pad_boxes([p.boxes if p else [] for p in predicted])
    gt, num_gt = pad_boxes([t.boxes if t else [] for t in true])
    _, ious = match_boxes(pred, gt, num_pred, num_gt, min_iou=0.0)
    scores = _confidences(predicted, pred.shape[1])
    matches, _ = match_boxes(pred, gt, num_pred, num_gt, method="greedy", scores=scores)
    exists = torch.arange(pred.shape[1]) < num_pred[:, None]
    return Matched(
        num_gt, ious.sum(1), exists.nonzero()[:, 0], scores[exists], matches[exists] >= 0
    )


def task_measures(task: str, records: list[Record]) -> dict[str, float]:
    """Detection: `ap50` and `mean_iou`; grounding: `mean_iou`; classification has its reward.

    `mean_iou` is the mean over true boxes of the IoU with the box matched to it, 0 if none;
    matches maximise the sum, without a threshold. `ap50` pools the boxes of all samples as one
    class: precision at IoU > 0.5, interpolated at 101 recalls as in COCO's protocol.
    """
    if task not in BOX_TASKS or not records:
        return {}
    matched = match_answers(records)
    total = max(int(matched.num_true.sum()), 1)
    measures = {"mean_iou": float(matched.iou_sum.sum()) / total}
    if task == "detection":
        measures["ap50"] = average_precision(matched.scores, matched.hit, total)
    return measures


def _confidences(predicted: list[Any], width: int) -> torch.Tensor:
    """(N, K) float32 scores; one that is no number in [0, 1] counts as 0."""
    scores = torch.zeros(len(predicted), width)
    for row, detection in enumerate(predicted):
        for column, value in enumerate(detection.confidences if detection else []):
            if value is not None and 0 <= value <= 1:
                scores[row, column] = value
    return scores


def average_precision(scores: torch.Tensor, hit: torch.Tensor, num_true: int) -> float:
    """Area under the interpolated precision-recall curve at recalls 0, 0.01, ..., 1.

    Args:
        scores: (S,) confidence of each prediction. hit: (S,) bool, whether it found a true box.
        num_true: true boxes in all.
    """
    order = scores.argsort(descending=True, stable=True)
    found = hit[order].double().cumsum(0)
    precision = found / torch.arange(1, len(order) + 1, dtype=torch.float64)
    recall = found / num_true
    best = precision.flip(0).cummax(0).values.flip(0) if len(order) else precision
    at = torch.searchsorted(recall, torch.linspace(0, 1, 101, dtype=torch.float64))
    padded = torch.cat([best, torch.zeros(1, dtype=torch.float64)])
    return float(padded[at].mean())
