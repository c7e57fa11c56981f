"""Grounding as Visual-RFT evaluates LISA's: the IoU of the first box, and of SAM's mask for it.

The protocol is the original's, its 1e-6 in every denominator included (on boxes in the unit
square, so that a perfect small box stays a little below 1). What it isn't: an inverted or
unreadable box is worth 0, where the original can be led to any number.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from virft_fast.data.images import IMAGE_FORMATS
from virft_fast.data.lisa import IGNORED
from virft_fast.data.loading import BadRow
from virft_fast.evaluation.bootstrap import Ratios
from virft_fast.evaluation.journal import Record
from virft_fast.evaluation.reading import predicted_boxes, true_boxes
from virft_fast.models.trust import refuse_code
from virft_fast.tasks.answers import Box, Detection
from virft_fast.tasks.coordinates import THOUSAND

EPSILON = 1e-6
# SAM sees each at 1024x1024.
IMAGES_TOGETHER = 8


def first_box(read: Detection | None) -> Box | None:
    """The first box of an answer in 0..1000; None without one, or if it has no area."""
    if read is None or not read.boxes or not all(map(math.isfinite, read.boxes[0])):
        return None
    x1, y1, x2, y2 = read.boxes[0]
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def box_iou(record: Record) -> float:
    """Of the answer's first box with the solution's, in [0, 1)."""
    predicted = first_box(predicted_boxes(record))
    true = first_box(true_boxes(record))
    if predicted is None or true is None:
        return 0.0
    wide = min(predicted[2], true[2]) - max(predicted[0], true[0])
    high = min(predicted[3], true[3]) - max(predicted[1], true[1])
    shared = max(wide, 0.0) * max(high, 0.0) / THOUSAND**2
    return shared / (_area(predicted) + _area(true) - shared + EPSILON)


def _area(box: Box) -> float:
    """In the unit square."""
    return (box[2] - box[0]) * (box[3] - box[1]) / THOUSAND**2


def add_measures(ratios: Ratios, records: Iterable[Record], units: Iterable[Any]) -> None:
    """`box_iou` (the mean), `box_acc50` (the share above 0.5), and where the records have masks
    `gIoU` (the mean of their IoU) and `cIoU` (all intersections over all unions)."""
    pairs = list(zip(records, units, strict=True))
    ious = [(unit, box_iou(record)) for record, unit in pairs]
    ratios.add("box_iou", [(unit, iou, 1.0) for unit, iou in ious])
    ratios.add("box_acc50", [(unit, float(iou > 0.5), 1.0) for unit, iou in ious])
    if any("mask" in record for record, _ in pairs):  # also if there is none: then they are NaN
        masks = [(unit, r["mask"]) for r, unit in pairs if "union" in r.get("mask", {})]
        areas = [(u, float(m["intersection"]), float(m["union"])) for u, m in masks]
        ratios.add("gIoU", [(u, shared / (whole + EPSILON), 1.0) for u, shared, whole in areas])
        ratios.add("cIoU", areas)


# --- Masks -----------------------------------------------------------------------------------


class MaskModel:
    """SAM from transformers, asked with a box.

    Args:
        path: a folder or hub id of a SamModel, with its preprocessor.
    Raises:
        ValueError: there is none.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        from transformers import SamModel, SamProcessor
        from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

        refuse_code(path, "--sam_path")
        try:
            # PIL's image processor needs no torchvision.
            self.processor = SamProcessor(
                SamImageProcessorPil.from_pretrained(path, trust_remote_code=False)
            )
            model = SamModel.from_pretrained(path, trust_remote_code=False, use_safetensors=True)
            self.model = model.to(device).eval()
        except Exception as error:  # files that are missing, damaged or of another model
            line = " ".join(str(error).split())[:300]
            raise ValueError(
                f"--sam_path {path}: expected a SamModel of transformers with its "
                f"preprocessor_config.json, such as facebook/sam-vit-huge; got "
                f"{type(error).__name__}: {line}"
            ) from error
        self.device = device

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], boxes: Sequence[Box]) -> list[np.ndarray]:
        """(H, W) bool mask of what is in each image's box of 0..1000, all images together."""
        pixels = [
            # As the original rounds.
            [[int(at / THOUSAND * size) for at, size in zip(box, 2 * image.size, strict=True)]]
            for image, box in zip(images, boxes, strict=True)
        ]
        inputs = self.processor(list(images), input_boxes=pixels, return_tensors="pt")
        sizes = (inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes"))
        inputs = {name: part.to(self.device) for name, part in inputs.items()}
        inputs["input_boxes"] = inputs["input_boxes"].float()
        low = self.model(**inputs, multimask_output=False).pred_masks.float().cpu()
        masks = self.processor.image_processor.post_process_masks(low, *sizes)
        return [mask[0, 0].numpy() for mask in masks]  # of (1, 1, H, W)


def mask_areas(
    model: MaskModel,
    records: Sequence[Record],
    samples: Sequence[Any],
    trues: Sequence[np.ndarray | None],
) -> list[dict[str, int]]:
    """`intersection` and `union`, in pixels, of SAM's masks for the answers' boxes with the true
    ones.

    An answer without a box has an empty mask. What the true mask ignores counts in neither. Nothing
    is said where the true mask is missing, or not of the image's size.
    """
    boxes = [first_box(predicted_boxes(record)) for record in records]
    images = [None if isinstance(s, BadRow) or not s.images else s.images[0] for s in samples]
    usable = [
        true is not None and image is not None and true.shape == image.size[::-1]
        for true, image in zip(trues, images, strict=True)
    ]
    asked = [n for n, box in enumerate(boxes) if usable[n] and box is not None]
    found: dict[int, np.ndarray] = {}
    if asked:
        masks = model([images[n] for n in asked], [boxes[n] for n in asked])
        found = dict(zip(asked, masks, strict=True))
    areas: list[dict[str, int]] = []
    for number, true in enumerate(trues):
        if not usable[number]:
            areas.append({})
            continue
        meant, counted = true > IGNORED, true != IGNORED
        mask = found.get(number, np.zeros_like(meant)) & counted
        areas.append(
            {"intersection": int((mask & meant).sum()), "union": int((mask | meant).sum())}
        )
    return areas


def true_mask(row: Mapping[str, Any]) -> np.ndarray | None:
    """(H, W) uint8 of a row's column `mask`, as `data build grounding` writes it: 255 what is
    meant, IGNORED, or 0; one of a bit a pixel is 255 and 0. None without, or if it can't be read.
    """
    stored = row.get("mask")
    data = stored.get("bytes") if isinstance(stored, Mapping) else stored
    try:
        if not data and isinstance(stored, Mapping) and stored.get("path"):
            path = Path(stored["path"])
            data = path.read_bytes() if path.is_file() else None
        if not isinstance(data, bytes):
            return None
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            return np.asarray(image.convert("L"))
    except Exception:  # PIL's decoders raise nearly anything on damaged input
        return None
