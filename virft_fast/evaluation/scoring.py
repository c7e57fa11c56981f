"""Rewards and task measures of greedy answers to held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from virft_fast import dist, progress
from virft_fast.batch import Json, Rollouts, Sample
from virft_fast.data import BadRow, BadRows
from virft_fast.evaluation.answering import Load, Section, answer
from virft_fast.evaluation.detection import Curve
from virft_fast.evaluation.journal import Record
from virft_fast.evaluation.reading import predicted_boxes, scores_of, true_boxes
from virft_fast.matching import match_boxes, pad_boxes
from virft_fast.metrics import null_for_nan
from virft_fast.rollout import Rollout
from virft_fast.rollout.records import completion_records, reward_arguments
from virft_fast.tasks import BOX_TASKS, score
from virft_fast.tasks.answers import Detection
from virft_fast.tasks.scoring import RewardFunction

Rewards = Sequence[tuple[str, RewardFunction]]  # names and functions
# Columns that a row's record keeps.
KEPT_COLUMNS = ("image_id", "category", "label")


def evaluate_rewards(
    rollout: Rollout,
    load: Load,
    indices: Sequence[int],
    *,
    reward_funcs: Rewards,
    bad_rows: BadRows,
    task: str,
    batch_size: int,
    max_completion_length: int,
    section: Section = nullcontext,
    reward_section: Section = nullcontext,
) -> tuple[dict[str, float], list[Record]]:
    """Answer the rows `indices` greedily and score the answers; for the arguments see `answer`, and
    `tasks.score` for `reward_section`.

    Returns:
        The mean of each reward and the task's measures (`task_measures`), and a record of each
        sample in the order of the rows; the same on all ranks.
    """
    with progress.bar(
        range(0), "evaluating", "sample", total=len(indices), shown=dist.is_main()
    ) as bar:
        records = answer(
            rollout,
            load,
            indices,
            lambda rollouts: scored(rollouts, reward_funcs, reward_section),
            bad_rows=bad_rows,
            batch_size=batch_size,
            max_completion_length=max_completion_length,
            progress=lambda done: bar.update(done - bar.n),
            section=section,
        )
    means = _means(records, [name for name, _ in reward_funcs])
    return means | task_measures(task, records), records


def scored(
    rollouts: Rollouts, reward_funcs: Rewards, section: Section = nullcontext
) -> list[Record]:
    """A record of each answer: prompt, completion, solution, rewards, the first image's size."""
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
    tokenizer: Callable[[str], Mapping[str, Json]],
    reward_funcs: Rewards,
) -> list[Record]:
    """The records, with their completions scored again by other functions.

    A reward is None if the row can't be read anymore. `completion_ids` are tokenized from the text.
    """
    names = [name for name, _ in reward_funcs]
    new = [record | {"rewards": dict.fromkeys(names)} for record in records]
    usable = {n: sample for n, sample in enumerate(samples) if not isinstance(sample, BadRow)}
    if not usable:
        return new
    rows = [sample.columns for sample in usable.values()]
    columns = {n: [row.get(n) for row in rows] for n in sorted({n for row in rows for n in row})}
    texts = [records[n]["completion"] for n in usable]
    columns["completion_ids"] = [tokenizer(text)["input_ids"] for text in texts]
    messages = [list(sample.messages) for sample in usable.values()]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    rewards, _ = score(reward_funcs, [1.0] * len(names), messages, completions, columns)
    for n, values in zip(usable, rewards.tolist(), strict=True):
        new[n]["rewards"] = null_for_nan(dict(zip(names, values, strict=True)))
    return new


def _means(records: Sequence[Record], names: Sequence[str]) -> dict[str, float]:
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
        answer: (S,) int64, the answer that each prediction is from. scores: (S,) float32.
        hit: (S,) bool, whether it matches a true box with IoU > 0.5, by descending score.
    """

    num_true: torch.Tensor
    iou_sum: torch.Tensor
    answer: torch.Tensor
    scores: torch.Tensor
    hit: torch.Tensor


def match_answers(records: Sequence[Record]) -> Matched:
    """Match predicted and true boxes of each answer; all of them count as one class."""
    predicted = [predicted_boxes(record) for record in records]
    true = [true_boxes(record) for record in records]
    pred, num_pred = pad_boxes([p.boxes if p else [] for p in predicted])
    gt, num_gt = pad_boxes([t.boxes if t else [] for t in true])
    _, ious = match_boxes(pred, gt, num_pred, num_gt, min_iou=0.0)
    scores = _confidences(predicted, pred.shape[1])
    matches, _ = match_boxes(pred, gt, num_pred, num_gt, method="greedy", scores=scores)
    exists = torch.arange(pred.shape[1]) < num_pred[:, None]
    answer_of = exists.nonzero()[:, 0]
    return Matched(num_gt, ious.sum(1), answer_of, scores[exists], matches[exists] >= 0)


def task_measures(task: str, records: Sequence[Record]) -> dict[str, float]:
    """Detection: `ap50` and `mean_iou`; grounding: `mean_iou`; classification: none besides its
    reward.

    `mean_iou` is the mean over true boxes of the IoU with the matched box, 0 without one; matches
    maximize the sum, without a threshold. `ap50` pools the boxes of all samples as one class:
    precision at IoU > 0.5, interpolated at 101 recalls as in COCO's protocol.
    """
    if task not in BOX_TASKS or not records:
        return {}
    matched = match_answers(records)
    measures = {"mean_iou": float(matched.iou_sum.sum()) / max(int(matched.num_true.sum()), 1)}
    if task == "detection":
        curve = pooled_curve(matched, np.zeros(len(records), np.int64), 1)
        measures["ap50"] = float(np.nan_to_num(curve(np.ones((1, 1))))[0, 0])
    return measures


def pooled_curve(matched: Matched, images: NDArray[np.int64], num_images: int) -> Curve:
    """The predictions of all answers as one class, at IoU > 0.5.

    Args:
        images: (N,) number of each answer's image, below `num_images`.
    """
    order = matched.scores.argsort(descending=True, stable=True)
    hit = matched.hit[order].numpy()[None]
    num_true = np.bincount(images, matched.num_true.numpy(), num_images).astype(float)
    return Curve(images[matched.answer[order].numpy()], hit, np.zeros_like(hit), num_true)


def _confidences(predicted: Sequence[Detection | None], width: int) -> torch.Tensor:
    """(N, K) float32 scores; anything but a number in [0, 1] counts as 0."""
    scores = torch.zeros(len(predicted), width)
    for row, read in enumerate(predicted):
        if read:
            scores[row, : len(read.boxes)] = torch.tensor(scores_of(read))
    return scores
