"""Grounding by Visual-RFT's evaluation on LISA: IoU of the first box, and of SAM's mask for it.

As in the original, 1e-6 is added to every denominator. Areas are in the unit square, so a perfect
small box scores a little below 1. An inverted or unreadable box scores 0 here; in the original it
can give any number.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from virft_fast.arguments import expecting
from virft_fast.batch import Row, Sample
from virft_fast.data.images import UnreadableImage, read_image
from virft_fast.data.lisa import IGNORED
from virft_fast.data.loading import BadRow
from virft_fast.evaluation.bootstrap import Ratios
from virft_fast.evaluation.journal import Record
from virft_fast.evaluation.reading import predicted_boxes, true_boxes
from virft_fast.models.trust import refuse_code
from virft_fast.tasks.answers import Box, Detection
from virft_fast.tasks.coordinates import THOUSAND

if TYPE_CHECKING:
    import datasets

EPSILON = 1e-6
BATCH_SIZE = 8  # images per call of SAM, which sees each at 1024x1024
Mask = NDArray[np.bool_]


def first_box(read: Detection | None) -> Box | None:
    """The first box of an answer in 0..1000; None if there is none or it has no area."""
    if read is None or not read.boxes or not all(map(math.isfinite, read.boxes[0])):
        return None
    x1, y1, x2, y2 = read.boxes[0]
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def box_iou(record: Record) -> float:
    """IoU of the answer's first box with the solution's, in [0, 1)."""
    predicted, true = first_box(predicted_boxes(record)), first_box(true_boxes(record))
    if predicted is None or true is None:
        return 0.0
    wide = min(predicted[2], true[2]) - max(predicted[0], true[0])
    high = min(predicted[3], true[3]) - max(predicted[1], true[1])
    shared = max(wide, 0.0) * max(high, 0.0) / THOUSAND**2
    return shared / (_area(predicted) + _area(true) - shared + EPSILON)


def _area(box: Box) -> float:
    """Area in the unit square."""
    return (box[2] - box[0]) * (box[3] - box[1]) / THOUSAND**2


def add_measures(ratios: Ratios, records: Iterable[Record], units: Iterable[Hashable]) -> None:
    """Add `box_iou` (the mean) and `box_acc50` (the share above 0.5); if records have masks, also
    `gIoU` (the mean of their IoU) and `cIoU` (all intersections over all unions)."""
    pairs = list(zip(records, units, strict=True))
    ious = [(unit, box_iou(record)) for record, unit in pairs]
    ratios.add("box_iou", [(unit, iou, 1.0) for unit, iou in ious])
    ratios.add("box_acc50", [(unit, float(iou > 0.5), 1.0) for unit, iou in ious])
    if any("mask" in record for record, _ in pairs):  # NaN if none can be compared
        masks = [(unit, r["mask"]) for r, unit in pairs if "union" in r.get("mask", {})]
        areas = [(u, float(m["intersection"]), float(m["union"])) for u, m in masks]
        ratios.add("gIoU", [(u, shared / (whole + EPSILON), 1.0) for u, shared, whole in areas])
        ratios.add("cIoU", areas)


# --- Masks -----------------------------------------------------------------------------------


class MaskModel:
    """SAM from transformers, prompted with a box.

    Args:
        path: a folder or hub id of a SamModel, with its preprocessor.
    Raises:
        ValueError: no such model exists, or it can't be loaded.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        from transformers import SamModel, SamProcessor
        from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

        refuse_code(path, "--sam_path")
        expected = (
            f"--sam_path {path}: expected a SamModel of transformers with its "
            "preprocessor_config.json, such as facebook/sam-vit-huge"
        )
        with expecting(expected):
            # PIL's image processor needs no torchvision.
            images = SamImageProcessorPil.from_pretrained(path, trust_remote_code=False)
            self.processor = SamProcessor(images)
            model: torch.nn.Module = SamModel.from_pretrained(
                path, trust_remote_code=False, use_safetensors=True
            )
            self.model = model.to(device).eval()
        self.path, self.device = path, device

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], boxes: Sequence[Box]) -> list[Mask]:
        """A mask of each image, (H, W) bool, for its box in 0..1000; one call for all images."""
        pixels = [
            # Rounded as in the original.
            [[int(at / THOUSAND * size) for at, size in zip(box, 2 * image.size, strict=True)]]
            for image, box in zip(images, boxes, strict=True)
        ]
        inputs = self.processor(list(images), input_boxes=pixels, return_tensors="pt")
        sizes = (inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes"))
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        inputs["input_boxes"] = inputs["input_boxes"].float()
        low = self.model(**inputs, multimask_output=False).pred_masks.float().cpu()
        masks = self.processor.image_processor.post_process_masks(low, *sizes)
        return [mask[0, 0].numpy() for mask in masks]  # of (1, 1, H, W)


def mask_areas(
    model: MaskModel,
    records: Sequence[Record],
    samples: Sequence[Sample | BadRow],
    true_masks: Sequence[NDArray[np.uint8] | None],
) -> list[dict[str, int]]:
    """`intersection` and `union`, in pixels, of the true masks and SAM's for the answers' boxes.

    An answer without a box has an empty mask. Pixels that the true mask ignores count in neither.
    A row's record is empty if its true mask is missing or differs in size from its image.
    """
    usable: dict[int, NDArray[np.uint8]] = {}
    boxed: dict[int, tuple[Image.Image, Box]] = {}
    for number, (record, sample, true) in enumerate(zip(records, samples, true_masks, strict=True)):
        image = None if isinstance(sample, BadRow) or not sample.images else sample.images[0]
        if true is None or image is None or true.shape != image.size[::-1]:
            continue
        usable[number] = true
        if box := first_box(predicted_boxes(record)):
            boxed[number] = (image, box)
    masks: dict[int, Mask] = {}
    if boxed:
        images, boxes = zip(*boxed.values(), strict=True)
        masks = dict(zip(boxed, model(images, boxes), strict=True))
    areas: list[dict[str, int]] = [{} for _ in records]
    for number, true in usable.items():
        target = true > IGNORED
        mask = masks.get(number, np.zeros_like(target)) & (true != IGNORED)
        shared, whole = int((mask & target).sum()), int((mask | target).sum())
        areas[number] = {"intersection": shared, "union": whole}
    return areas


def true_masks(rows: datasets.Dataset, indices: Iterable[int]) -> list[NDArray[np.uint8] | None]:
    """`true_mask` of these rows."""
    table = rows.with_format("arrow")
    return [true_mask(table[index].to_pylist()[0]) for index in indices]


def true_mask(row: Row) -> NDArray[np.uint8] | None:
    """A row's `mask` column, as `data build grounding` writes it: (H, W) uint8, 255 for the object,
    IGNORED or 0; one bit per pixel reads as 255 and 0. None if it is missing or can't be read.
    """
    try:
        return read_image(row.get("mask"), None, lambda image, _: np.asarray(image.convert("L")))
    except UnreadableImage:
        return None
