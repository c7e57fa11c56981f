"""Questions about the images of an annotation file, one row each.

The strict protocol asks about every chosen category in every image. Visual-RFT asks only about
the categories that the base model sees in an image (its `exist_map_*.json`), which also avoids all
false positives for the others. Such a map can be passed, or made by asking the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from virft_fast.batch import Row, Sample
from virft_fast.data.accounts import listing
from virft_fast.data.coco import image_paths
from virft_fast.data.instances import Annotations
from virft_fast.data.texts import read_json
from virft_fast.data.writing import ExtentFor
from virft_fast.evaluation.journal import Record
from virft_fast.tasks import prompts
from virft_fast.tasks.coordinates import rescale, written
from virft_fast.tasks.labels import mentioned

ImageId = TypeVar("ImageId", bound=int | str)
# Image id -> names of the categories said to be in it.
ExistsMap = Mapping[int, Sequence[str]]


class Rows(Sequence[Row]):
    """Rows made on access, for `SampleDataset`."""

    column_names = ["image", "problem", "solution", "category", "image_id", "extent"]

    def __init__(self, count: int, make: Callable[[int], Row]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]  # nobody slices them
        return self._make(index)


@dataclass(frozen=True)
class Images:
    """The images to ask about.

    Attributes:
        annotations: of all images of the file.
        categories: ids of the chosen ones, in the order of the questions.
        paths: image id -> its file, if the file exists.
        missing: image id -> its file, if it doesn't.
        unclear: ids of images whose path matches several files.
        exists: which of the categories to ask about; None: all of them.
        counts: what was left out, by name.
        digest: of the annotation file.
    """

    annotations: Annotations
    categories: Sequence[int]
    paths: Mapping[int, Path]
    missing: Mapping[int, Path]
    unclear: Collection[int] = ()
    exists: ExistsMap | None = None
    counts: dict[str, int] = field(default_factory=dict)
    digest: str = ""

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
    """Find the images' files.

    Args:
        only: ids of the images to ask about; None: all.
    Raises:
        FileNotFoundError: all are missing, or some are and `allow_missing` is false; names them.
    """
    chosen = annotations.images if only is None else set(only)
    numbers = [number for number in sorted(annotations.images) if number in chosen]
    paths = image_paths(annotations, numbers)
    missing = {number: path for number, path in paths.items() if not os.path.isfile(path)}
    if missing and (not allow_missing or len(missing) == len(paths)):
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} images are missing: "
            f"{listing(list(missing.values()))}; check --images, or pass --allow_missing to "
            "evaluate without them"
        )
    present = {number: path for number, path in paths.items() if number not in missing}
    return Images(annotations, categories, present, missing, unclear=set(numbers) - set(paths))


def detection_rows(
    images: Images, *, exists: ExistsMap | None = None, extent_for: ExtentFor | None = None
) -> Rows:
    """A row for each image and category, or for those that `exists` names.

    Args:
        extent_for: (width, height) of an image -> the space of its boxes; None: 0..1000.
    Raises:
        ValueError: two categories have the same name.
    """
    annotations, names = images.annotations, images.annotations.categories
    if len(set(names.values())) < len(names):  # answers and maps refer to categories by name
        raise ValueError("--annotations: expected categories with different names")
    pairs = [
        (image, number)
        for image in images.paths
        for number in images.categories
        if exists is None or names[number] in exists.get(image, ())
    ]

    def make(index: int) -> Row:
        image, category = pairs[index]
        size = _size(annotations, image)
        extent = extent_for(*size) if extent_for else (1000, 1000)
        true = annotations.boxes.get((image, category), [])
        boxes = [written(rescale(box, size, extent), extent) for box in true]
        return {
            "image": str(images.paths[image]),
            "problem": prompts.detection_problem(
                names[category], "pixels" if extent_for else "thousand"
            ),
            "solution": prompts.detection_solution(boxes),
            "category": names[category],
            "image_id": image,
            "extent": [int(side) for side in extent] if extent_for else None,
        }

    return Rows(len(pairs), make)


def _size(annotations: Annotations, image: int) -> tuple[int, int]:
    record = annotations.images[image]
    return record["width"], record["height"]


def other_size(annotations: Annotations, sample: Sample) -> str | None:
    """The error text if an image's size differs from its annotations'; None if they agree."""
    size = _size(annotations, sample.columns["image_id"])
    if not sample.images or sample.images[0].size == size:
        return None
    got = sample.images[0].size
    return f"image of {got[0]}x{got[1]}, its annotations say {size[0]}x{size[1]}"


# --- Which categories exist ------------------------------------------------------------------


def presence_rows(images: Images) -> Rows:
    """A row for each image that asks which of the categories are in it."""
    numbers, names = list(images.paths), images.names

    def make(index: int) -> Row:
        image = numbers[index]
        pairs = zip(images.categories, names, strict=True)
        true = [name for number, name in pairs if (image, number) in images.annotations.boxes]
        return {
            "image": str(images.paths[image]),
            "problem": prompts.presence_problem(names),
            "solution": f"<answer>{', '.join(true)}</answer>" if true else prompts.NO_OBJECTS,
            "category": None,
            "image_id": image,
            "extent": None,
        }

    return Rows(len(numbers), make)


def exists_of_answers(records: Iterable[Record], names: Sequence[str]) -> dict[int, list[str]]:
    """The map that follows from a model's answers to `presence_rows`."""
    return {record["image_id"]: mentioned(record["completion"], names) for record in records}


def read_exists_map(
    path: str | Path | None, images: Mapping[ImageId, str], names: Collection[str]
) -> tuple[dict[ImageId, list[str]] | None, dict[str, int]]:
    """Read a map in Visual-RFT's form, {image: [category, ...]}; `image` is an id or a file name.

    Args:
        images: image id -> its file. names: of all categories.
    Returns:
        Image id -> categories; and the numbers of unknown images and categories in the map. None
        and no numbers without a path.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it isn't such a map, or is about other images.
    """
    if not path:
        return None, {}
    data = read_json(Path(path), f"--exists_map {path}")
    if not isinstance(data, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names)
        for names in data.values()
    ):
        raise ValueError(
            f'--exists_map {path}: expected {{"image": ["category", ...], ...}}, got '
            f"{json.dumps(data):.120}"
        )
    by_key: dict[str, ImageId] = {}
    for number, file in images.items():
        by_key |= {key: number for key in (file, Path(file).name, Path(file).stem)}
    by_key |= {str(number): number for number in images}
    exists = {by_key[key]: names for key, names in data.items() if key in by_key}
    if not exists:
        raise ValueError(
            f"--exists_map {path}: none of its images ({listing(list(data), 3)}) is "
            f"known; expected ids or file names such as {listing(list(by_key), 2)}"
        )
    unknown = {name for listed in data.values() for name in listed} - set(names)
    return exists, {
        "images of the map that are unknown": sum(key not in by_key for key in data),
        "categories of the map that are unknown": len(unknown),
    }
