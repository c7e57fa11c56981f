"""Detection by COCO's protocol: true objects, predictions, and average precision (AP).

The protocol is Visual-RFT's. Each (image, category) is one question. Boxes are converted to pixels
of the original image, the confidence is the score, and duplicates of a box are dropped. AP at IoU
0.5 to 0.95 is over all images, even those without a question; mAP is the mean over categories.
faster-coco-eval computes the reported numbers. The matching in this file gives the same values, but
keeps them by image, which the bootstrap needs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from virft_fast.batch import Row
from virft_fast.data.instances import box_of, finite_number
from virft_fast.evaluation.bootstrap import Array
from virft_fast.evaluation.journal import Record
from virft_fast.evaluation.reading import predicted_boxes, scores_of, true_boxes
from virft_fast.tasks.answers import Box
from virft_fast.tasks.coordinates import THOUSAND, rescale

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MAX_BOXES = 100  # per image and category, those with the highest scores
MAX_AREA = 1e10  # pixels; COCO's protocol ignores larger predictions instead of counting them


BoolArray = NDArray[np.bool_]


class Precisions(TypedDict):
    """The average precision of a category, in [0, 1]; NaN for one without an object."""

    AP: float
    AP50: float
    AP75: float


@dataclass(frozen=True)
class Truth:
    """The objects that a detector should find.

    Attributes:
        images: image id -> its record, with `id`, `width` and `height`.
        categories: category id -> name.
        annotations: as in COCO's files: `id` (from 1), `image_id`, `category_id`, `bbox` (xywh in
            pixels), `area`, `iscrowd`.
    """

    images: dict[int, Row]
    categories: dict[int, str]
    annotations: list[Row]

    def as_coco(self) -> Row:
        """The content of an instances file."""
        images = list(self.images.values())
        categories = [{"id": number, "name": name} for number, name in self.categories.items()]
        tables = {"images": images, "annotations": self.annotations, "categories": categories}
        return {"info": {}, **tables}


def make_truth(
    images: Mapping[int, Row], categories: Mapping[int, str], annotations: Iterable[Row]
) -> Truth:
    """The annotations of these images and categories, without boxes that have no area inside their
    image."""
    kept: list[Row] = []
    for record in annotations:
        box, area = box_of(record.get("bbox")), finite_number(record.get("area"))
        image = images.get(record["image_id"])
        if image and record["category_id"] in categories and box and _has_area(box, image):
            about = {name: record[name] for name in ("image_id", "category_id")}
            shape = {"bbox": box, "area": area or box[2] * box[3]}
            crowd = int(bool(record.get("iscrowd")))
            # `id` starts at 1, because pycocotools treats 0 as "no annotation".
            kept.append({"id": len(kept) + 1, **about, **shape, "iscrowd": crowd})
    names = ("width", "height", "neg_category_ids", "not_exhaustive_category_ids")
    slim = {
        number: {"id": number, **{name: image[name] for name in names if name in image}}
        for number, image in images.items()
    }
    return Truth(slim, dict(categories), kept)


def _has_area(box: Sequence[float], image: Row) -> bool:
    """Whether a box, xywh in pixels, has any area inside its image."""
    x, y, width, height = box
    inside = x < image["width"] and y < image["height"] and x + width > 0 and y + height > 0
    return inside and width > 0 and height > 0


def truth_of_records(records: Sequence[Record]) -> Truth:
    """The truth from the solutions of a built data set, whose rows name their category and image.

    Raises:
        ValueError: a row has no image.
    """
    bare = [record["index"] for record in records if "size" not in record]
    if bare:
        raise ValueError(
            f"--task coco and lvis: expected an image in every row, row {bare[0]} has none"
        )
    names = sorted({str(record["category"]) for record in records})
    numbers = {name: number for number, name in enumerate(names, start=1)}
    images, annotations = {}, []
    for record in records:
        width, height = record["size"]
        images[record["image_id"]] = {"id": record["image_id"], "width": width, "height": height}
        true = true_boxes(record)
        about = {"image_id": record["image_id"], "category_id": numbers[str(record["category"])]}
        boxes = true.boxes if true else ()
        annotations += [{**about, "bbox": xywh(box, width, height)} for box in boxes]
    return make_truth(images, {number: name for name, number in numbers.items()}, annotations)


def xywh(box: Box, width: int, height: int) -> list[float]:
    """A box in 0..1000 as xywh in pixels of the image. A box that is inverted, not finite or too
    large becomes one without area, which matches nothing and counts as a false positive."""
    x1, y1, x2, y2 = rescale(box, (THOUSAND, THOUSAND), (width, height))
    usable = all(map(math.isfinite, (x1, y1, x2, y2))) and x1 < x2 and y1 < y2
    usable = usable and (x2 - x1) * (y2 - y1) <= MAX_AREA
    return [x1, y1, x2 - x1, y2 - y1] if usable else [0.0, 0.0, 0.0, 0.0]


def results_of_records(records: Iterable[Record], truth: Truth) -> list[Row]:
    """The answers in COCO's results format; an answer that can't be parsed predicts nothing."""
    numbers = {name: number for number, name in truth.categories.items()}
    results = []
    for record in records:
        read = predicted_boxes(record)
        if read is None:
            continue
        image = truth.images[record["image_id"]]
        once: dict[str, tuple[Box, float]] = {}
        for box, score in zip(read.boxes, scores_of(read), strict=True):
            once.setdefault(repr(box), (box, score))
        about = {"image_id": record["image_id"], "category_id": numbers[str(record["category"])]}
        results += [
            {**about, "bbox": xywh(box, image["width"], image["height"]), "score": score}
            for box, score in once.values()
        ]
    return results


# --- Average precision -----------------------------------------------------------------------


def average_precisions(
    truth: Truth, results: Sequence[Row], *, federated: bool = False
) -> dict[int, Precisions]:
    """The average precision of each category, from faster-coco-eval.

    Args:
        results: in COCO's results format.
        federated: use LVIS's protocol. A category counts only on images that are known to have it
            or not to have it. Where it was not annotated exhaustively, nothing is a false positive.
    """
    from faster_coco_eval import COCO
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster

    class _COCOeval(COCOeval_faster):
        def _prepare_freq_group(self) -> list[list[int]]:
            return []  # AP by frequency isn't used, and not every file has the frequencies

    data = truth.as_coco()
    true, predicted = COCO(data), COCO({**data, "annotations": _as_annotations(results)})
    run = _COCOeval(true, predicted, "bbox", print_function=lambda *_: None, lvis_style=federated)
    run.params.maxDets = [1, 10, MAX_BOXES] if not federated else [300]
    run.evaluate()
    run.accumulate()
    precision = np.asarray(run.eval["precision"])  # (T, recalls, categories, areas, limits)
    categories: dict[int, Precisions] = {}
    for column, number in enumerate(run.params.catIds):
        curves = precision[:, :, column, 0, -1]
        aps = np.where(curves > -1, curves, np.nan).mean(1)  # (T,)
        ap, ap50, ap75 = float(aps.mean()), float(aps[0]), float(aps[5])
        categories[int(number)] = {"AP": ap, "AP50": ap50, "AP75": ap75}
    return categories


def _as_annotations(results: Sequence[Row]) -> list[Row]:
    """The predictions in the form that `loadRes` makes; `loadRes` itself fails on an empty list."""
    return [
        {**result, "id": number, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
        for number, result in enumerate(results, start=1)
    ]


@dataclass(frozen=True)
class Curve:
    """One category's predictions over all images, by descending score, and whether each is a hit.

    Attributes:
        image: (D,) int64, number of the image. hit, ignored: (T, D) bool, at each IoU threshold.
        num_true: (U,) true boxes in each image, without crowds.
    """

    image: NDArray[np.int64]
    hit: BoolArray
    ignored: BoolArray
    num_true: Array

    def __call__(self, counts: Array) -> Array:
        """(R, U) counts of the images -> (R, T) average precision, NaN without a true box."""
        precisions = np.full((len(counts), len(self.hit)), np.nan)
        true, false = self.hit & ~self.ignored, ~self.hit & ~self.ignored
        for row, count in enumerate(counts):
            total = count @ self.num_true
            if total <= 0:
                continue
            weight = count[self.image]  # (D,)
            hits, misses = (true * weight).cumsum(1), (false * weight).cumsum(1)  # (T, D)
            precision = hits / np.maximum(hits + misses, 1)
            best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            best = np.concatenate([best, np.zeros((len(best), 1))], axis=1)
            for threshold, recall in enumerate(hits / total):
                at = np.searchsorted(recall, RECALLS, side="left")
                precisions[row, threshold] = best[threshold, at].mean()
        return precisions


class AveragePrecision:
    """mAP, mAP50, mAP75 and `AP/category` as functions of the images' counts, for the bootstrap."""

    def __init__(self, truth: Truth, results: Sequence[Row], units: Mapping[Hashable, int]) -> None:
        true, predicted = _by_pair(truth.annotations), _by_pair(results)
        self.curves = {
            name: _curve(number, truth, true, predicted, units)
            for number, name in truth.categories.items()
        }

    def __call__(self, counts: Array) -> dict[str, Array]:
        by_name = {name: curve(counts) for name, curve in self.curves.items()}
        precisions = np.stack(list(by_name.values()))  # (categories, R, T)
        drawn = ~np.isnan(precisions)
        sums, nan = np.where(drawn, precisions, 0).sum(0), np.full(precisions.shape[1:], np.nan)
        mean = np.divide(sums, drawn.sum(0), out=nan, where=drawn.any(0))
        whole = {"mAP": mean.mean(1), "mAP50": mean[:, 0], "mAP75": mean[:, 5]}
        return whole | {f"AP/{name}": values.mean(1) for name, values in by_name.items()}


ByPair = Mapping[tuple[int, int], list[Row]]


def _by_pair(records: Iterable[Row]) -> ByPair:
    """(image id, category id) -> its records."""
    pairs = defaultdict(list)
    for record in records:
        pairs[record["image_id"], record["category_id"]].append(record)
    return pairs


def _curve(
    category: int, truth: Truth, true: ByPair, predicted: ByPair, units: Mapping[Hashable, int]
) -> Curve:
    num_true = np.zeros(len(units))
    scores, images = [np.zeros(0)], [np.zeros(0, np.int64)]
    hits, ignored = [np.zeros((len(IOUS), 0), bool)], [np.zeros((len(IOUS), 0), bool)]
    for image in sorted(truth.images):
        boxes = true.get((image, category), [])
        num_true[units[image]] = sum(not box["iscrowd"] for box in boxes)
        # A stable sort, as in COCO's evaluation.
        ranked = sorted(predicted.get((image, category), []), key=lambda box: -box["score"])
        if ranked := ranked[:MAX_BOXES]:
            hit, ignore = _judge(boxes, ranked)
            hits.append(hit)
            ignored.append(ignore)
            scores.append(np.array([box["score"] for box in ranked]))
            images.append(np.full(len(ranked), units[image]))
    order = np.argsort(-np.concatenate(scores), kind="mergesort")
    return Curve(
        np.concatenate(images)[order],
        np.concatenate(hits, axis=1)[:, order],
        np.concatenate(ignored, axis=1)[:, order],
        num_true,
    )


def _judge(boxes: list[Row], predictions: list[Row]) -> tuple[BoolArray, BoolArray]:
    """Greedily match predictions to true boxes, by descending score, as COCO's evaluateImg does.

    Returns:
        Two (T, D) arrays: whether each prediction has a true box, and whether that box is a crowd,
        in which case the prediction is ignored.
    """
    hit = np.zeros((len(IOUS), len(predictions)), bool)
    ignored = np.zeros_like(hit)
    if not boxes:
        return hit, ignored
    from faster_coco_eval.core import mask

    boxes = sorted(boxes, key=lambda box: box["iscrowd"])
    crowd = [box["iscrowd"] for box in boxes]
    predicted, true = [box["bbox"] for box in predictions], [box["bbox"] for box in boxes]
    ious = mask.iou(predicted, true, crowd)  # (D, M)
    for row, threshold in enumerate(IOUS):
        taken = [False] * len(boxes)
        for number, overlaps in enumerate(ious):
            best, match = min(threshold, 1 - 1e-10), None
            for column, iou in enumerate(overlaps):
                if taken[column] and not crowd[column]:
                    continue
                if match is not None and not crowd[match] and crowd[column]:
                    break  # an object takes precedence over a crowd
                if iou >= best:
                    best, match = iou, column
            if match is not None:
                taken[match] = hit[row, number] = True
                ignored[row, number] = bool(crowd[match])
    return hit, ignored
