"""What the answers of one model come to: measures, their spread, and what is behind them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from virft_fast.evaluation import bootstrap, classification, detection, grounding
from virft_fast.evaluation.bootstrap import Array, Interval, Measures, Ratios
from virft_fast.evaluation.detection import Truth
from virft_fast.evaluation.journal import Record
from virft_fast.evaluation.scoring import match_answers, task_measures
from virft_fast.tasks import BOX_TASKS
from virft_fast.tasks.labels import ClosedSet


@dataclass
class Result:
    """One model's evaluation.

    Attributes:
        model: its name.
        task: detection, classification or grounding.
        means: measure -> value, in the order in which they are shown.
        draws: measure -> (R,) values over resampled images; without those that have no spread.
        units: the images, in the order in which they are drawn.
        records: one an answer, in the order of the rows.
        counts: what was left out and the like, by name.
        categories: detection by COCO's protocol: `category`, `objects`, `predictions`, `AP`,
            `AP50`, `AP75`.
        confusions: classification: see `classification.confusions`.
        predictions: in COCO's results format, with the `truth` they are measured against.
        missing: files of the images that were left out.
    """

    model: str
    task: str
    means: dict[str, float]
    draws: dict[str, Array]
    units: list[Any]
    records: list[Record]
    counts: dict[str, int]
    categories: list[dict[str, Any]] = field(default_factory=list)
    confusions: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[dict[str, Any]] | None = None
    truth: Truth | None = None
    missing: list[str] = field(default_factory=list)

    def interval(self, name: str) -> Interval | None:
        """95 % of the draws of a measure."""
        return bootstrap.interval(self.draws[name]) if name in self.draws else None


def measure(
    model: str,
    task: str,
    records: list[Record],
    reward_names: Sequence[str],
    *,
    truth: Truth | None = None,
    federated: bool = False,
    labels: ClosedSet | None = None,
    counts: dict[str, int],
    num_draws: int,
    seed: int,
) -> Result:
    """All measures of a task.

    Args:
        truth: what COCO's protocol measures against; None leaves it out.
        federated: LVIS's own AP besides.
        labels: the closed set of a classification.
        num_draws: of the bootstrap; 0 leaves it out.
    """
    images = [record.get("image_id", record["index"]) for record in records]
    units = list(dict.fromkeys([*(truth.images if truth else ()), *images]))
    numbers = {image: number for number, image in enumerate(units)}
    ratios = Ratios(numbers)
    for name in reward_names:
        given = [(u, r["rewards"][name]) for u, r in zip(images, records, strict=True)]
        ratios.add(name, [(unit, value, 1.0) for unit, value in given if value is not None])
    measures: list[Measures] = [ratios]
    result = Result(model, task, {}, {}, units, records, counts, truth=truth)
    exact: dict[str, float] = {}  # what has a value of its own, measured by others
    if task == "classification" and labels is not None:
        result.records = records = classification.name_labels(records, labels)
        classification.add_measures(ratios, records, images)
        measures.append(classification.ClassMean(records, images, numbers))
        result.confusions = classification.confusions(records)
    elif records and task in BOX_TASKS:
        exact |= task_measures(task, records)
        measures.append(_Matched(task, records, images, ratios))
    if task == "grounding":
        grounding.add_measures(ratios, records, images)
    if truth is not None:
        result.predictions = detection.results_of_records(records, truth)
        measures.append(detection.AveragePrecision(truth, result.predictions, numbers))
        result.categories, of_coco = _by_category(truth, result.predictions, federated)
        exact |= of_coco
    result.means = bootstrap.values(measures, len(numbers)) | exact
    if truth is not None:
        result.means = {
            name: value for name, value in result.means.items() if not name.startswith("AP/")
        }
    if num_draws:
        result.draws = bootstrap.draws(measures, len(numbers), num_draws, seed)
    return result


class _Matched:
    """The spread of `task_measures`."""

    def __init__(
        self, task: str, records: list[Record], images: Sequence[Any], ratios: Ratios
    ) -> None:
        matched = match_answers(records)
        sums = zip(matched.iou_sum.tolist(), matched.num_true.tolist(), strict=True)
        ratios.add("mean_iou", [(u, *both) for u, both in zip(images, sums, strict=True)])
        order = matched.scores.argsort(descending=True, stable=True)
        places = np.array([ratios.units[image] for image in images])
        num_true = np.zeros(len(ratios.units))
        np.add.at(num_true, places, matched.num_true.numpy())
        hit = matched.hit[order].numpy()[None]
        image = places[matched.answer[order].numpy()]
        self.curve = detection.Curve(image, hit, np.zeros_like(hit), num_true)
        self.pooled = task == "detection"

    def __call__(self, counts: Array) -> dict[str, Array]:
        return {"ap50": self.curve(counts)[:, 0]} if self.pooled else {}


def _by_category(
    truth: Truth, predictions: list[dict[str, Any]], federated: bool
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for each category, and mAP, mAP50, mAP75 (and `mAP_lvis`)."""
    found = detection.average_precisions(truth, predictions)
    objects = Counter(a["category_id"] for a in truth.annotations if not a["iscrowd"])
    boxes = Counter(p["category_id"] for p in predictions)
    rows = [
        {
            "category": name,
            "objects": objects[number],
            "predictions": boxes[number],
            **found[number],
        }
        for number, name in truth.categories.items()
    ]
    exact = {f"m{name}": _mean(row[name] for row in rows) for name in ("AP", "AP50", "AP75")}
    if federated:
        own = detection.average_precisions(truth, predictions, federated=True)
        exact["mAP_lvis"] = _mean(ap["AP"] for ap in own.values())
    return rows, exact


def _mean(values: Any) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
