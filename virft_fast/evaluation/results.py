"""The result of one model's evaluation: measures, their intervals and the details behind them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from virft_fast.batch import Row
from virft_fast.evaluation import bootstrap, classification, detection, grounding
from virft_fast.evaluation.bootstrap import Array, Interval, Measures, Ratios
from virft_fast.evaluation.classification import Confusion
from virft_fast.evaluation.detection import Precisions, Truth
from virft_fast.evaluation.journal import Record
from virft_fast.evaluation.scoring import match_answers, pooled_curve, task_measures
from virft_fast.tasks import BOX_TASKS
from virft_fast.tasks.labels import ClosedSet


class CategoryResult(Precisions):
    """A category under COCO's protocol: its name, the numbers of boxes, and its AP."""

    category: str
    objects: int
    predictions: int


@dataclass
class Result:
    """One model's evaluation.

    Attributes:
        model: its name.
        task: detection, classification, grounding, choice or number.
        means: measure -> value, in the order of the report.
        draws: measure -> (R,) values over resampled images, for measures with an interval.
        units: the images, in the order of the bootstrap's counts.
        records: one per answer, in the order of the rows.
        counts: numbers of images, answers, rows left out and so on, by name.
        categories: detection by COCO's protocol.
        confusions: classification.
        predictions: in COCO's results format, measured against `truth`.
        missing: files of the images that were left out.
    """

    model: str
    task: str
    means: dict[str, float]
    draws: dict[str, Array]
    units: list[Hashable]
    records: list[Record]
    counts: dict[str, int]
    categories: list[CategoryResult] = field(default_factory=list)
    confusions: list[Confusion] = field(default_factory=list)
    predictions: list[Row] | None = None
    truth: Truth | None = None
    missing: list[str] = field(default_factory=list)

    def interval(self, name: str) -> Interval | None:
        """The 95% interval of a measure; None without one."""
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
        truth: for COCO's protocol; None: without it.
        federated: also measure LVIS's own AP.
        labels: the closed set of a classification.
        num_draws: of the bootstrap; 0: no intervals.
    """
    images: list[Hashable] = [record.get("image_id", record["index"]) for record in records]
    units = list(dict.fromkeys([*(truth.images if truth else ()), *images]))
    numbers = {image: number for number, image in enumerate(units)}
    ratios = Ratios(numbers)
    for name in reward_names:
        given = [(u, r["rewards"][name]) for u, r in zip(images, records, strict=True)]
        ratios.add(name, [(unit, value, 1.0) for unit, value in given if value is not None])
    measures: list[Measures] = [ratios]
    result = Result(model, task, {}, {}, units, records, counts, truth=truth)
    exact: dict[str, float] = {}  # values that replace those of the bootstrap's functions
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
    means = bootstrap.values(measures, len(numbers)) | exact
    result.means = {name: value for name, value in means.items() if not name.startswith("AP/")}
    if num_draws:
        result.draws = bootstrap.draws(measures, len(numbers), num_draws, seed)
    return result


class _Matched:
    """`task_measures` as functions of the images' counts, for the bootstrap."""

    def __init__(
        self, task: str, records: list[Record], images: Sequence[Hashable], ratios: Ratios
    ) -> None:
        matched = match_answers(records)
        sums = zip(matched.iou_sum.tolist(), matched.num_true.tolist(), strict=True)
        ratios.add("mean_iou", [(u, *both) for u, both in zip(images, sums, strict=True)])
        numbers = np.array([ratios.units[image] for image in images])
        self.curve = pooled_curve(matched, numbers, len(ratios.units))
        self.pooled = task == "detection"

    def __call__(self, counts: Array) -> dict[str, Array]:
        return {"ap50": self.curve(counts)[:, 0]} if self.pooled else {}


def _by_category(
    truth: Truth, predictions: list[Row], federated: bool
) -> tuple[list[CategoryResult], dict[str, float]]:
    """A row for each category, and mAP, mAP50, mAP75 (and `mAP_lvis`)."""
    precisions = detection.average_precisions(truth, predictions)
    objects = Counter(a["category_id"] for a in truth.annotations if not a["iscrowd"])
    boxes = Counter(p["category_id"] for p in predictions)
    rows: list[CategoryResult] = [
        {"category": name, "objects": objects[n], "predictions": boxes[n], **precisions[n]}
        for n, name in truth.categories.items()
    ]
    exact = {
        "mAP": _mean(row["AP"] for row in rows),
        "mAP50": _mean(row["AP50"] for row in rows),
        "mAP75": _mean(row["AP75"] for row in rows),
    }
    if federated:
        lvis = detection.average_precisions(truth, predictions, federated=True)
        exact["mAP_lvis"] = _mean(precision["AP"] for precision in lvis.values())
    return rows, exact


def _mean(values: Iterable[float]) -> float:
    """The mean of the values that aren't NaN; NaN if there are none."""
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else float("nan")
