"""Grounding rows from LISA's ReasonSeg folders: an image, and beside it what is meant in it.

Each IMAGE.json holds `text`, the instructions, and `shapes`, polygons labelled "target" (what is
meant) or "ignore".
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from virft_fast.data.classification import IMAGE_SUFFIXES
from virft_fast.data.writing import Built, Plan
from virft_fast.tasks.coordinates import Extent, rescale, written
from virft_fast.tasks.prompts import grounding_problem, grounding_solution

Polygon = list[tuple[float, float]]


def read_lisa(
    folder: Path, built: Built, *, first_only: bool = False
) -> list[tuple[Path, str, list[Polygon]]]:
    """(image, instruction, target polygons) of every instruction in the folder.

    Args:
        built: told of the annotations that can't be used.
        first_only: the first instruction and the first polygon of an image alone, as Visual-RFT
            evaluates.
    Raises:
        FileNotFoundError: no annotations.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(
            f"{folder}: expected images with a .json file beside each, got none"
        )
    rows = []
    for file in files:
        try:
            texts, polygons = _annotation(
                json.loads(file.read_text(encoding="utf-8", errors="replace"))
            )
        except (ValueError, RecursionError) as error:
            built.leave_out("annotation can't be used", f"{file.name}: {error}")
            continue
        image = next(
            (file.with_suffix(s) for s in IMAGE_SUFFIXES if file.with_suffix(s).is_file()),
            file.with_suffix(".jpg"),
        )
        for text in texts[:1] if first_only else texts:
            rows.append((image, text, polygons[:1] if first_only else polygons))
    return rows


def _annotation(data: Any) -> tuple[list[str], list[Polygon]]:
    if not isinstance(data, dict) or "shapes" not in data or "text" not in data:
        raise ValueError("expected text and shapes")
    texts = data["text"] if isinstance(data["text"], list) else [data["text"]]
    texts = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    polygons = [
        [(float(x), float(y)) for x, y in shape["points"]]
        for shape in data["shapes"]
        if isinstance(shape, Mapping) and shape.get("label") == "target"
    ]
    polygons = [polygon for polygon in polygons if len(polygon) >= 3]
    if not texts or not polygons:
        raise ValueError("no instruction" if not texts else "no polygon labelled target")
    return texts, polygons


def plan_grounding(
    rows: Sequence[tuple[Path, str, list[Polygon]]],
    *,
    compat: bool = False,
    extent_for: Any = None,
) -> list[Plan]:
    """Rows that ask for the box around the target; the mask goes along for gIoU and cIoU.

    Args:
        compat: the original's prompt, misspelling included.
        extent_for: (width, height) of an image -> the space of its boxes; None: 0..1000.
    """
    return [_plan(*row, compat, extent_for) for row in rows]


def _plan(
    image: Path, instruction: str, polygons: list[Polygon], compat: bool, extent_for: Any
) -> Plan:
    space = "pixels" if extent_for else "thousand"
    row = {"problem": grounding_problem(instruction, space, compat=compat)}

    def fill(width: int, height: int) -> Mapping[str, Any] | str:
        xs, ys = zip(*(point for polygon in polygons for point in polygon), strict=True)
        box = (max(min(xs), 0), max(min(ys), 0), min(max(xs), width), min(max(ys), height))
        if box[0] >= box[2] or box[1] >= box[3]:
            return "target outside its image"
        extent: Extent = extent_for(width, height) if extent_for else (1000, 1000)
        filled = {
            "solution": grounding_solution(written(rescale(box, (width, height), extent), extent)),
            "mask": {"bytes": _mask(polygons, width, height), "path": "mask.png"},
        }
        return filled | ({"extent": [int(side) for side in extent]} if extent_for else {})

    return Plan(image, row, fill, has_boxes=True)


def _mask(polygons: Sequence[Polygon], width: int, height: int) -> bytes:
    """PNG of one bit a pixel."""
    mask = Image.new("1", (width, height))
    draw = ImageDraw.Draw(mask)
    for polygon in polygons:
        draw.polygon(polygon, fill=1)
    file = io.BytesIO()
    mask.save(file, "PNG")
    return file.getvalue()
