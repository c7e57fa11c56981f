"""Greedy answers to held-out prompts, their rewards and the task's own measure.

Runs on any number of ranks: rank r takes every world-size-th sample, and all ranks call the rollout
equally often, because under ZeRO-3 each call gathers the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from virft_fast import dist
from virft_fast.batch import Prompt
from virft_fast.data import BadRow, BadRows, NoUsableRows
from virft_fast.grpo import completion_records, reward_arguments
from virft_fast.matching import match_boxes, pad_boxes
from virft_fast.rollout import Rollout, Sampling
from virft_fast.tasks import parse_detection, score


@dataclass(frozen=True)
class Evaluation:
    """Means over samples, and one record a sample in the order of the rows."""

    means: dict[str, float]
    records: list[dict[str, Any]]


def evaluate_rewards(
    rollout: Rollout,
    load: Callable[[int], Prompt | BadRow],
    indices: Sequence[int],
    *,
    reward_funcs: list[tuple[str, Callable[..., Any]]],
    bad_rows: BadRows,
    task: str,
    batch_size: int,
    max_completion_length: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Greedy answers to the rows `indices`, scored.

    Args:
        load: row -> prompt, or the reason why it can't be used; such rows are skipped and counted.
        batch_size: prompts in one call of the rollout.
        progress: told how many of this rank's rows are done.
    Returns:
        The mean of each reward and of the task's measures (`task_measures`), the same on all ranks.
    """
    mine = list(indices[dist.rank() :: dist.world_size()])
    calls = math.ceil(len(indices) / dist.world_size() / batch_size)
    sampling = Sampling(max_completion_length=max_completion_length, greedy=True)
    names = [name for name, _ in reward_funcs]
    records, bad = [], []
    spare: Prompt | None = None
    for call in range(calls):
        rows = mine[call * batch_size : (call + 1) * batch_size]
        loaded = [load(index) for index in rows]
        prompts = [prompt for prompt in loaded if not isinstance(prompt, BadRow)]
        bad += [row for row in loaded if isinstance(row, BadRow)]
        spare = prompts[0] if prompts else spare or _first_usable(load, indices)
        rollouts = rollout.generate(prompts or [spare], 1, sampling)
        if prompts:
            rewards, _ = score(reward_funcs, [1.0] * len(names), *reward_arguments(rollouts))
            records += completion_records(rollouts, names, rewards)
        progress(min((call + 1) * batch_size, len(mine)))
    for part in dist.all_gather_object(bad):
        for row in part:
            bad_rows.add(row.index, row.reason)
    parts = dist.all_gather_object(records)
    records = sorted((r for part in parts for r in part), key=lambda record: record["index"])
    means = _means(records, names)
    return Evaluation(means | task_measures(task, records), records)


def _first_usable(load: Callable[[int], Prompt | BadRow], indices: Sequence[int]) -> Prompt:
    for index in indices:
        prompt = load(index)
        if not isinstance(prompt, BadRow):
            return prompt
    raise NoUsableRows("expected at least one usable row to evaluate, got none")


def _means(records: list[dict[str, Any]], names: list[str]) -> dict[str, float]:
    means = {}
    for name in names:
        values = [r["rewards"][name] for r in records if r["rewards"][name] is not None]
        means[name] = sum(values) / len(values) if values else math.nan
    return means


def task_measures(task: str, records: list[dict[str, Any]]) -> dict[str, float]:
    """Detection: `ap50` and `mean_iou`; grounding: `mean_iou`; classification has its reward.

    `mean_iou` is the mean over true boxes of the IoU with the box matched to it, 0 if none;
    matches maximise the sum, without a threshold. `ap50` pools the boxes of all samples as one
    class: precision at IoU > 0.5, interpolated at 101 recalls as in COCO's protocol.
    """
    if task == "classification" or not records:
        return {}
    predicted = [parse_detection(r["completion"], r.get("extent")) for r in records]
    true = [parse_detection(r["solution"], r.get("extent")) for r in records]
    pred, num_pred = pad_boxes([p.boxes if p else [] for p in predicted])
    gt, num_gt = pad_boxes([t.boxes if t else [] for t in true])
    total = max(int(num_gt.sum()), 1)
    _, ious = match_boxes(pred, gt, num_pred, num_gt, min_iou=0.0)
    measures = {"mean_iou": float(ious.sum()) / total}
    if task == "detection":
        scores = _confidences(predicted, pred.shape[1])
        matches, _ = match_boxes(pred, gt, num_pred, num_gt, method="greedy", scores=scores)
        exists = torch.arange(pred.shape[1]) < num_pred[:, None]
        measures["ap50"] = average_precision(scores[exists], matches[exists] >= 0, total)
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
