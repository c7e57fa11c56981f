"""Detection by COCO's protocol: what is to be found, what was, and the average precision of it.

As Visual-RFT evaluates: one question for an (image, category), boxes brought to pixels of the
original image, the confidence as score, a box that was written twice counted once; AP at IoU 0.5 to
0.95 over every image, also those about which nothing was asked; mAP is the mean over the
categories. The numbers are faster-coco-eval's. The matching here is the same once more, kept by
image, for the bootstrap alone.
"""

from __future__ import annotations

import importlib.util
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from virft_fast.data.instances import box_of, finite_number
from virft_fast.evaluation.bootstrap import Array
from virft_fast.evaluation.journal import Record
from virft_fast.evaluation.reading import predicted_boxes, true_boxes
from virft_fast.tasks.answers import Box
from virft_fast.tasks.coordinates import THOUSAND, rescale

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MOST_BOXES = 100  # of an image and category, the surest ones
MOST_AREA = 1e10  # COCO's protocol ignores larger predictions instead of counting them
NOTHING = [0.0, 0.0, 0.0, 0.0]


@dataclass(frozen=True)
class Truth:
    """What is to be found.

    Attributes:
        images: image id -> its record, with `id`, `width` and `height`.
        categories: category id -> name.
        annotations: as in COCO's files: `id` (from 1), `image_id`, `category_id`, `bbox` (xywh in
            pixels), `area`, `iscrowd`.
    """

    images: dict[int, dict[str, Any]]
    categories: dict[int, str]
    annotations: list[dict[str, Any]]

    def as_coco(self) -> dict[str, Any]:
        """As an instances file."""
        categories = [{"id": number, "name": name} for number, name in self.categories.items()]
        return {
            "info": {},
            "images": list(self.images.values()),
            "annotations": self.annotations,
            "categories": categories,
        }


def make_truth(
    images: Mapping[int, Mapping[str, Any]],
    categories: Mapping[int, str],
    annotations: Iterable[Mapping[str, Any]],
) -> Truth:
    """Of these images and categories; annotations about others are left out, and boxes without area
    inside their image."""
    kept = []
    for record in annotations:
        box, area = box_of(record.get("bbox")), finite_number(record.get("area"))
        image = images.get(record["image_id"])
        if image and record["category_id"] in categories and _has_area(box, image):
            kept.append(
                {
                    "id": len(kept) + 1,  # to pycocotools 0 means none
                    "image_id": record["image_id"],
                    "category_id": record["category_id"],
                    "bbox": box,
                    "area": area or box[2] * box[3],
                    "iscrowd": int(bool(record.get("iscrowd"))),
                }
            )
    names = ("width", "height", "neg_category_ids", "not_exhaustive_category_ids")
    slim = {
        number: {"id": number, **{name: image[name] for name in names if name in image}}
        for number, image in images.items()
    }
    return Truth(slim, dict(categories), kept)


def _has_area(box: Sequence[float] | None, image: Mapping[str, Any]) -> bool:
    if box is None or not (box[2] > 0 and box[3] > 0):
        return False
    inside = box[0] < image["width"] and box[1] < image["height"]
    return inside and box[0] + box[2] > 0 and box[1] + box[3] > 0


def truth_of_records(records: Sequence[Record]) -> Truth:
    """From the solutions of a built data set, whose rows name category and image.

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
        images[record["image_id"]] = {
            "id": record["image_id"], "width": width, "height": height
        }  # fmt: skip
        true = true_boxes(record)
        annotations += [
            {
                "image_id": record["image_id"],
                "category_id": numbers[str(record["category"])],
                "bbox": xywh(box, width, height),
            }
            for box in (true.boxes if true else ())
        ]
    return make_truth(images, {number: name for name, number in numbers.items()}, annotations)


def xywh(box: Box, width: int, height: int) -> list[float]:
    """A box in 0..1000 in pixels of the image; a box that is none, or is beyond measure, has no
    area and finds nothing, but counts as the false alarm it is."""
    x1, y1, x2, y2 = rescale(box, (THOUSAND, THOUSAND), (width, height))
    usable = all(map(math.isfinite, (x1, y1, x2, y2))) and x1 < x2 and y1 < y2
    usable = usable and (x2 - x1) * (y2 - y1) <= MOST_AREA
    return [x1, y1, x2 - x1, y2 - y1] if usable else list(NOTHING)


def results_of_records(records: Iterable[Record], truth: Truth) -> list[dict[str, Any]]:
    """The answers in COCO's results format; an answer that can't be read predicts nothing."""
    numbers = {name: number for number, name in truth.categories.items()}
    results = []
    for record in records:
        read = predicted_boxes(record)
        if read is None:
            continue
        image = truth.images[record["image_id"]]
        once: dict[str, tuple[Box, float]] = {}
        for box, score in _pairs(read):
            once.setdefault(repr(box), (box, score))
        for box, score in once.values():
            results.append(
                {
                    "image_id": record["image_id"],
                    "category_id": numbers[str(record["category"])],
                    "bbox": xywh(box, image["width"], image["height"]),
                    "score": score,
                }
            )
    return results


def _pairs(read: Any) -> Iterable[tuple[Box, float]]:
    for box, score in zip(read.boxes, read.confidences, strict=True):
        yield box, score if score is not None and 0 <= score <= 1 else 0.0


# --- Average precision -----------------------------------------------------------------------


def need_coco_eval() -> None:
    """Raise ValueError where faster-coco-eval is missing: better before the work than after."""
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise ValueError(
            "--task coco and lvis: expected the package faster-coco-eval; pip install "
            "'virft_fast[eval]'"
        )


def average_precisions(
    truth: Truth, results: Sequence[Mapping[str, Any]], *, federated: bool = False
) -> dict[int, dict[str, float]]:
    """AP, AP50 and AP75 of each category by faster-coco-eval; NaN for one without an object.

    Args:
        results: in COCO's results format.
        federated: LVIS's own protocol: a category counts on the images alone of which it is known
            whether it is there, and where it was not annotated exhaustively nothing is a false
            alarm.
    """
    from faster_coco_eval import COCO
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster

    class _COCOeval(COCOeval_faster):
        def _prepare_freq_group(self) -> list[Any]:
            return []  # categories by frequency, which not every file has and nobody asked for

    data = truth.as_coco()
    true, predicted = COCO(data), COCO({**data, "annotations": _as_annotations(results)})
    run = _COCOeval(true, predicted, "bbox", print_function=_silent, lvis_style=federated)
    run.params.maxDets = [1, 10, MOST_BOXES] if not federated else [300]
    run.evaluate()
    run.accumulate()
    precision = np.asarray(run.eval["precision"])  # (T, recalls, categories, areas, limits)
    found = {}
    for place, number in enumerate(run.params.catIds):
        of_category = precision[:, :, place, 0, -1]
        of_category = np.where(of_category > -1, of_category, np.nan).mean(1)
        found[int(number)] = {
            "AP": float(of_category.mean()),
            "AP50": float(of_category[0]),
            "AP75": float(of_category[5]),
        }
    return found


def _silent(*_: Any) -> None:
    """faster-coco-eval reports every stage."""


def _as_annotations(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What `loadRes` makes of them; it can't read none at all."""
    return [
        {**result, "id": number, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
        for number, result in enumerate(results, start=1)
    ]


@dataclass(frozen=True)
class Curve:
    """One category's predictions over all images, surest first, and how each was judged.

    Attributes:
        image: (D,) int64, number of the image. hit, ignored: (T, D) bool, at each IoU threshold.
        num_true: (U,) true boxes in each image, crowds apart.
    """

    image: np.ndarray
    hit: np.ndarray
    ignored: np.ndarray
    num_true: Array

    def __call__(self, counts: Array) -> Array:
        """(R, U) counts of the images -> (R, T) average precision, NaN without a true box."""
        found = np.full((len(counts), len(self.hit)), np.nan)
        true, false = self.hit & ~self.ignored, ~self.hit & ~self.ignored
        for row, count in enumerate(counts):
            total = count @ self.num_true
            if total <= 0:
                continue
            weight = count[self.image]  # (D,)
            hits, misses = (true * weight).cumsum(1), (false * weight).cumsum(1)  # (T, D)
            precision = hits / (hits + misses + np.spacing(1))
            best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            best = np.concatenate([best, np.zeros((len(best), 1))], axis=1)
            for threshold, recall in enumerate(hits / total):
                at = np.searchsorted(recall, RECALLS, side="left")
                found[row, threshold] = best[threshold, at].mean()
        return found


class AveragePrecision:
    """mAP, mAP50, mAP75 and `AP/category` as functions of the images' counts, for the bootstrap."""

    def __init__(
        self,
        truth: Truth,
        results: Sequence[Mapping[str, Any]],
        units: Mapping[Any, int],
    ) -> None:
        true, predicted = _by_pair(truth.annotations), _by_pair(results)
        self.curves = {
            name: _curve(number, truth, true, predicted, units)
            for number, name in truth.categories.items()
        }

    def __call__(self, counts: Array) -> dict[str, Array]:
        found = {name: curve(counts) for name, curve in self.curves.items()}
        together = np.stack(list(found.values()))  # (categories, R, T)
        known = ~np.isnan(together)
        mean = np.divide(
            np.where(known, together, 0).sum(0), known.sum(0),
            out=np.full(together.shape[1:], np.nan), where=known.any(0),
        )  # fmt: skip
        whole = {"mAP": mean.mean(1), "mAP50": mean[:, 0], "mAP75": mean[:, 5]}
        return whole | {f"AP/{name}": values.mean(1) for name, values in found.items()}


def _by_pair(records: Iterable[Mapping[str, Any]]) -> dict[tuple[Any, int], list[Any]]:
    found = defaultdict(list)
    for record in records:
        found[record["image_id"], record["category_id"]].append(record)
    return found


def _curve(
    category: int,
    truth: Truth,
    true: Mapping[tuple[Any, int], list[Any]],
    predicted: Mapping[tuple[Any, int], list[Any]],
    units: Mapping[Any, int],
) -> Curve:
    num_true = np.zeros(len(units))
    scores, images = [np.zeros(0)], [np.zeros(0, np.int64)]
    hits = [np.zeros((len(IOUS), 0), bool)]
    ignored = [np.zeros((len(IOUS), 0), bool)]
    for image in sorted(truth.images):
        boxes = true.get((image, category), [])
        num_true[units[image]] = sum(not box["iscrowd"] for box in boxes)
        found = predicted.get((image, category), [])
        if not found:
            continue
        order = np.argsort([-box["score"] for box in found], kind="mergesort")[:MOST_BOXES]
        found = [found[place] for place in order]
        judged = _judge(boxes, found)
        hits.append(judged[0])
        ignored.append(judged[1])
        scores.append(np.array([box["score"] for box in found]))
        images.append(np.full(len(found), units[image]))
    order = np.argsort(-np.concatenate(scores), kind="mergesort")
    return Curve(
        np.concatenate(images)[order],
        np.concatenate(hits, axis=1)[:, order],
        np.concatenate(ignored, axis=1)[:, order],
        num_true,
    )


def _judge(boxes: list[Any], found: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """(T, D) whether each of the D predictions, surest first, has its true box, and whether that is
    a crowd, which counts for nothing; greedy, as COCO's evaluateImg does."""
    hit = np.zeros((len(IOUS), len(found)), bool)
    ignored = np.zeros_like(hit)
    if not boxes:
        return hit, ignored
    from faster_coco_eval.core import mask

    boxes = sorted(boxes, key=lambda box: box["iscrowd"])
    crowd = [box["iscrowd"] for box in boxes]
    ious = mask.iou([box["bbox"] for box in found], [box["bbox"] for box in boxes], crowd)  # (D, M)
    for row, threshold in enumerate(IOUS):
        taken = [False] * len(boxes)
        for place in range(len(found)):
            best, match = min(threshold, 1 - 1e-10), None
            for column, iou in enumerate(ious[place]):
                if taken[column] and not crowd[column]:
                    continue
                if match is not None and not crowd[match] and crowd[column]:
                    break  # an object wins over a crowd
                if iou >= best:
                    best, match = iou, column
            if match is not None:
                taken[match] = hit[row, place] = True
                ignored[row, place] = bool(crowd[match])
    return hit, ignored
