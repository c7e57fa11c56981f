"""What a detector is asked about the images of an annotation file: a row for each question.

One question for each image and chosen category is the honest protocol. Visual-RFT asks less: only
about what the base model says is in the image (its `exist_map_*.json`), which also spares every
false alarm elsewhere. Such a map can be given, or made by asking.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from virft_fast.batch import Sample
from virft_fast.data.accounts import listing
from virft_fast.data.coco import image_paths
from virft_fast.data.instances import Annotations
from virft_fast.evaluation.journal import Record
from virft_fast.tasks.coordinates import Extent, rescale, written
from virft_fast.tasks.labels import mentioned
from virft_fast.tasks.prompts import (
    NO_OBJECTS,
    detection_problem,
    detection_solution,
    presence_problem,
)

ExtentFor = Callable[[int, int], Extent]
# Image id -> names of the categories that are said to be in it.
ExistsMap = Mapping[int, Sequence[str]]


class Rows(Sequence[dict[str, Any]]):
    """Rows made on access, as `SampleDataset` takes them."""

    column_names = ["image", "problem", "solution", "category", "image_id", "extent"]

    def __init__(self, count: int, make: Callable[[int], dict[str, Any]]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return self._make(index)


def files_of(annotations: Annotations) -> dict[int, str]:
    """Image id -> its file."""
    return {number: record["file"] for number, record in annotations.images.items()}


@dataclass(frozen=True)
class Images:
    """The images that are asked about.

    Attributes:
        annotations: of all images of the file.
        categories: ids of the chosen ones, in the order of the questions.
        paths: image id -> its file, for those that are there.
        missing: image id -> its file, for those that are not.
        unclear: ids of those whose file could be one of several.
        exists: which of the categories to ask about; None: all of them.
        counts: what was left out, by name.
    """

    annotations: Annotations
    categories: Sequence[int]
    paths: Mapping[int, Path]
    missing: Mapping[int, Path]
    unclear: Collection[int] = ()
    exists: ExistsMap | None = None
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [self.annotations.categories[number] for number in self.categories]


def find_images(
    annotations: Annotations,
    categories: Sequence[int],
    *,
    only: Iterable[int] | None = None,
    allow_missing: bool = False,
) -> Images:
    """Where the images are.

    Args:
        only: ids of the images that will be asked about; None: all.
    Raises:
        FileNotFoundError: some are missing and `allow_missing` is false; names them.
    """
    wanted = annotations.images if only is None else set(only)
    numbers = [number for number in sorted(annotations.images) if number in wanted]
    paths = image_paths(annotations, numbers)
    missing = {number: path for number, path in paths.items() if not os.path.isfile(path)}
    if missing and (not allow_missing or len(missing) == len(paths)):
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} images are missing: "
            f"{listing(list(missing.values()))}; check --images, or pass --allow_missing to "
            "evaluate without them"
        )
    there = {number: path for number, path in paths.items() if number not in missing}
    return Images(annotations, categories, there, missing, unclear=set(numbers) - set(paths))


def detection_rows(
    images: Images, *, exists: ExistsMap | None = None, extent_for: ExtentFor | None = None
) -> Rows:
    """A row for each image and category, or for those that `exists` names.

    Args:
        extent_for: (width, height) of an image -> the space of its boxes; None: 0..1000.
    """
    annotations, known = images.annotations, annotations_names(images.annotations)
    chosen = {known[number]: number for number in images.categories}
    pairs = [
        (image, number)
        for image in images.paths
        for name, number in chosen.items()
        if exists is None or name in exists.get(image, ())
    ]

    def make(index: int) -> dict[str, Any]:
        image, category = pairs[index]
        record = annotations.images[image]
        size = (record["width"], record["height"])
        extent = extent_for(*size) if extent_for else (1000, 1000)
        boxes = [
            written(rescale(box, size, extent), extent)
            for box in annotations.boxes.get((image, category), [])
        ]
        return {
            "image": str(images.paths[image]),
            "problem": detection_problem(known[category], "pixels" if extent_for else "thousand"),
            "solution": detection_solution(boxes),
            "category": known[category],
            "image_id": image,
            "extent": [int(side) for side in extent] if extent_for else None,
        }

    return Rows(len(pairs), make)


def annotations_names(annotations: Annotations) -> dict[int, str]:
    """Category id -> name, by which answers and maps go.

    Raises:
        ValueError: two categories have the same name.
    """
    names = annotations.categories
    if len(set(names.values())) < len(names):
        raise ValueError("--annotations: expected categories with different names")
    return names


def other_size(annotations: Annotations, sample: Sample) -> str | None:
    """What is wrong with an image that is not of the size its annotations are about."""
    record = annotations.images[sample.columns["image_id"]]
    size = (record["width"], record["height"])
    if not sample.images or sample.images[0].size == size:
        return None
    got = sample.images[0].size
    return f"image of {got[0]}x{got[1]}, its annotations say {size[0]}x{size[1]}"


# --- What is there ---------------------------------------------------------------------------


def presence_rows(images: Images) -> Rows:
    """A row for each image: which of the categories are in it?"""
    numbers, names = list(images.paths), images.names

    def make(index: int) -> dict[str, Any]:
        image = numbers[index]
        true = [
            name
            for number, name in zip(images.categories, names, strict=True)
            if (image, number) in images.annotations.boxes
        ]
        return {
            "image": str(images.paths[image]),
            "problem": presence_problem(names),
            "solution": f"<answer>{', '.join(true)}</answer>" if true else NO_OBJECTS,
            "category": None,
            "image_id": image,
            "extent": None,
        }

    return Rows(len(numbers), make)


def exists_of_answers(records: Iterable[Record], names: Sequence[str]) -> dict[int, list[str]]:
    """The map that a model's answers to `presence_rows` make."""
    return {record["image_id"]: mentioned(record["completion"], names) for record in records}


def read_exists_map(
    path: Path, images: Mapping[int, str], names: Collection[str]
) -> tuple[dict[int, list[str]], dict[str, int]]:
    """Visual-RFT's form, {image: [category, ...]}: an image by its id or its file's name.

    Args:
        images: image id -> its file. names: of all categories.
    Returns:
        Image id -> categories, and how many images and categories of the map nobody knows.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else, or about other images.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"--exists_map {path}: no such file") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"--exists_map {path}: expected JSON, got {error}") from error
    if not isinstance(data, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names)
        for names in data.values()
    ):
        raise ValueError(
            f'--exists_map {path}: expected {{"image": ["category", ...], ...}}, got '
            f"{json.dumps(data):.120}"
        )
    by_key: dict[str, int] = {}
    for number, file in images.items():
        by_key |= {key: number for key in (file, Path(file).name, Path(file).stem)}
    by_key |= {str(number): number for number in images}
    found = {by_key[key]: names for key, names in data.items() if key in by_key}
    if not found:
        raise ValueError(
            f"--exists_map {path}: none of its images ({listing(list(data), 3)}) is "
            f"known; expected ids or file names such as {listing(list(by_key), 2)}"
        )
    unknown = {name for said in data.values() for name in said} - set(names)
    return found, {
        "images of the map that are unknown": sum(key not in by_key for key in data),
        "categories of the map that are unknown": len(unknown),
    }
