"""Grounding rows from LISA's ReasonSeg: folders of images, with a .json file for each image.

IMAGE.json contains `text`, the instructions, and `shapes`, labeled polygons: "target" is the object
to find, "ignore" marks areas that may or may not be part of it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from virft_fast.batch import Json, Row
from virft_fast.data.accounts import Built
from virft_fast.data.image_files import is_hidden, is_image
from virft_fast.data.images import as_shown
from virft_fast.data.writing import ExtentFor, Plan
from virft_fast.tasks.coordinates import rescale, written
from virft_fast.tasks.prompts import grounding_problem, grounding_solution

Polygon = list[tuple[float, float]]
# Pixel values in a mask. Ignored pixels don't count.
TARGET, IGNORED = 255, 128


class Shape(NamedTuple):
    """A polygon in pixels, and the value of its pixels in the mask."""

    polygon: Polygon
    value: int


class Instruction(NamedTuple):
    """An instruction about an image, the image's number, the shapes to find, and the image's size
    if the annotations give one."""

    image: Path
    number: int
    text: str
    shapes: list[Shape]
    size: tuple[int, int] | None = None


def read_lisa(folder: Path, built: Built, *, first_only: bool = False) -> list[Instruction]:
    """Read every instruction in the folder.

    Args:
        built: records annotations that can't be used.
        first_only: use only the first instruction and the first target of each image, and no
            ignored areas, as in Visual-RFT's evaluation.
    Raises:
        FileNotFoundError: there are no annotations.
    """
    paths = [path for path in sorted(folder.iterdir()) if not is_hidden(path.name)]
    files = [path for path in paths if path.suffix == ".json"]
    images = {path.stem: path for path in reversed(paths) if is_image(path)}
    if not files:
        raise FileNotFoundError(
            f"{folder}: expected images, each with a .json file of the same name, got none"
        )
    for stem in sorted(set(images) - {file.stem for file in files}):
        built.leave_out("image without a .json file of its name", images[stem].name)
    rows = []
    for number, file in enumerate(files):
        try:
            texts, shapes = _annotation(_load(file))
        except (ValueError, RecursionError) as error:
            built.leave_out("annotation can't be used", f"{file.name}: {error}")
            continue
        image = images.get(file.stem, file.with_suffix(".jpg"))
        if first_only:
            texts = texts[:1]
            shapes = [next(shape for shape in shapes if shape.value == TARGET)]
        rows += [Instruction(image, number, text, shapes) for text in texts]
    return rows


def _load(file: Path) -> Json:
    """Parse a JSON file. As in LISA, it may be in cp1252: some files have typographic quotes."""
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252")
    return json.loads(text)


def _annotation(data: Json) -> tuple[list[str], list[Shape]]:
    """(instructions, shapes) of an image."""
    if not isinstance(data, dict) or "shapes" not in data or "text" not in data:
        raise ValueError("expected text and shapes")
    texts = data["text"] if isinstance(data["text"], list) else [data["text"]]
    texts = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if not isinstance(data["shapes"], list):
        raise ValueError(f"shapes: expected a list, got {data['shapes']!r:.60}")
    shapes = [shape for shape in map(_shape, data["shapes"]) if shape is not None]
    if not texts or not any(shape.value == TARGET for shape in shapes):
        raise ValueError("no polygon labeled target" if texts else "no instruction")
    return texts, shapes


def _shape(data: Json) -> Shape | None:
    """The shape; None if LISA doesn't paint it or it has no area."""
    if not isinstance(data, Mapping) or not isinstance(data.get("label"), str):
        raise ValueError(f"shapes: expected objects with label and points, got {data!r:.60}")
    label = data["label"].strip().lower()
    if label == "flag":  # LISA: meaningless, deprecated
        return None
    points = data.get("points")
    if not isinstance(points, list) or not all(map(_is_point, points)):
        raise ValueError(f"points: expected pairs of numbers, got {points!r:.60}")
    polygon = [(float(x), float(y)) for x, y in points]
    if len(polygon) < 3:
        return None
    return Shape(polygon, IGNORED if "ignore" in label else TARGET)


def _is_point(point: Json) -> bool:
    pair = isinstance(point, list) and len(point) == 2
    return pair and all(type(side) in (int, float) and abs(side) < 1e6 for side in point)  # no NaN


def plan_grounding(
    row: Instruction, *, compat: bool, extent_for: ExtentFor | None, masks: bool
) -> Plan:
    """A row that asks for the box around the target.

    Args:
        compat: use the original's prompt, including its misspelling.
        extent_for: see `ExtentFor`; None: boxes are in 0..1000.
        masks: add the mask, which gIoU and cIoU need.
    """
    problem = grounding_problem(row.text, "pixels" if extent_for else "thousand", compat=compat)

    def fill(width: int, height: int, orientation: int) -> Row | str:
        stored = row.size or (width, height)
        shapes = [Shape(as_shown(s.polygon, stored, orientation), s.value) for s in row.shapes]
        targets = [shape.polygon for shape in shapes if shape.value == TARGET]
        xs, ys = zip(*(point for polygon in targets for point in polygon), strict=True)
        box = (max(min(xs), 0), max(min(ys), 0), min(max(xs), width), min(max(ys), height))
        if box[0] >= box[2] or box[1] >= box[3]:
            return "target outside its image"
        extent = extent_for(width, height) if extent_for else (1000, 1000)
        sides = written(rescale(box, (width, height), extent), extent)
        filled: Row = {"solution": grounding_solution(sides)}
        if masks:
            filled["mask"] = {"bytes": _mask(shapes, width, height), "path": "mask.png"}
        return filled | ({"extent": [int(side) for side in extent]} if extent_for else {})

    columns = {"problem": problem, "image_id": row.number}
    return Plan(row.image, columns, fill, "unknown", row.size)


def _mask(shapes: Sequence[Shape], width: int, height: int) -> bytes:
    """A PNG with one byte per pixel: TARGET, IGNORED or 0. As in LISA, smaller shapes are painted
    over larger ones, and corners are whole pixels."""

    def paint(on: Image.Image, shape: Shape) -> Image.Image:
        corners = [(int(x), int(y)) for x, y in shape.polygon]
        ImageDraw.Draw(on).polygon(corners, fill=shape.value, outline=shape.value)
        return on

    def area(shape: Shape) -> int:
        return width * height - paint(Image.new("L", (width, height)), shape).histogram()[0]

    mask = Image.new("L", (width, height))
    for shape in sorted(shapes, key=area)[::-1]:
        paint(mask, shape)
    file = io.BytesIO()
    mask.save(file, "PNG")
    return file.getvalue()
