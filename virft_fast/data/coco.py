"""Detection rows from the annotation files of COCO and LVIS."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from virft_fast.data.writing import Built, Plan, listing
from virft_fast.tasks.coordinates import Extent, rescale, written
from virft_fast.tasks.prompts import CATEGORY_SETS, NOVEL_15, detection_problem, detection_solution

KINDS = ("coco", "lvis")


@dataclass(frozen=True)
class Annotations:
    """What an instances file says.

    Attributes:
        images: image id -> its record, with `width`, `height` and `file` (relative path).
        categories: category id -> name.
        boxes: (image id, category id) -> xyxy boxes in pixels of the original image, crowds left
            out.
        negatives: image id -> category ids known to be absent (LVIS); None: every other one (COCO).
        incomplete: image id -> category ids of which not every object is annotated (LVIS).
        bad_boxes: boxes left out because they have no area inside the image.
        records: the annotations as the file has them, crowds included.
    """

    images: dict[int, dict[str, Any]]
    categories: dict[int, str]
    boxes: dict[tuple[int, int], list[tuple[float, float, float, float]]]
    negatives: dict[int, set[int]] | None
    incomplete: dict[int, set[int]]
    bad_boxes: int
    records: list[dict[str, Any]]


def read_annotations(path: Path, kind: str) -> Annotations:
    """An instances file of COCO or LVIS.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is another kind of file; says what it looks like.
    """
    data = _read(path, kind)
    images = {}
    for record in data["images"]:
        file = record.get("file_name") or urlsplit(record.get("coco_url", "")).path.lstrip("/")
        if not file or not all(_positive(record.get(side)) for side in ("width", "height")):
            raise ValueError(
                f"{path}: expected images with id, width, height and file_name or coco_url, got "
                f"{record!r:.200}"
            )
        images[record["id"]] = {**record, "file": file}
    categories = {record["id"]: str(record["name"]) for record in data["categories"]}
    boxes: dict[tuple[int, int], list[Any]] = defaultdict(list)
    bad = 0
    for record in data["annotations"]:
        image, category = record.get("image_id"), record.get("category_id")
        if image not in images or category not in categories:
            raise ValueError(
                f"{path}: annotation {record.get('id')} names image {image!r} and category "
                f"{category!r}, expected some that the file lists"
            )
        if record.get("iscrowd"):
            continue
        box = _xyxy(record.get("bbox"), images[image])
        if box is None:
            bad += 1
        else:
            boxes[image, category].append(box)
    negatives = incomplete = None
    if kind == "lvis":
        negatives = {i: set(r.get("neg_category_ids", ())) for i, r in images.items()}
        incomplete = {i: set(r.get("not_exhaustive_category_ids", ())) for i, r in images.items()}
    return Annotations(
        images, categories, dict(boxes), negatives, incomplete or {}, bad, data["annotations"]
    )


def _read(path: Path, kind: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"--annotations {path}: no such file") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"--annotations {path}: expected JSON, got {error}") from error
    keys = set(data) if isinstance(data, dict) else set()
    if not {"images", "annotations", "categories"} <= keys:
        looks = ", ".join(sorted(map(str, keys))[:8]) or f"a {type(data).__name__}"
        raise ValueError(
            f"--annotations {path}: expected {kind.upper()}'s instances file, with images, "
            f"annotations and categories; got {looks}"
        )
    first = next(iter(data["annotations"]), {})
    if data["annotations"] and "bbox" not in first:
        what = "captions" if "caption" in first else "other annotations"
        raise ValueError(
            f"--annotations {path}: expected boxes, these are {what}; take the instances file"
        )
    if "keypoints" in first:
        raise ValueError(
            f"--annotations {path}: expected the instances file, these are person keypoints"
        )
    return data


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e6


def _xyxy(bbox: Any, image: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    """Inside the image; None if nothing of it is."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        return None
    try:
        x, y, width, height = map(float, bbox)
    except (TypeError, ValueError):
        return None
    x1, y1 = max(x, 0.0), max(y, 0.0)
    x2, y2 = min(x + width, float(image["width"])), min(y + height, float(image["height"]))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def pick_categories(annotations: Annotations, kind: str, wanted: str) -> list[int]:
    """Category ids for `all`, a named set (base65, novel15, few8, lvis13, lvis6) or names.

    Args:
        wanted: as on the command line; names are separated by commas.
    Raises:
        ValueError: an unknown name (says which are close), or a category without a single box.
    """
    by_name = {name: number for number, name in annotations.categories.items()}
    seen = {category for _, category in annotations.boxes}
    with_boxes = {name for name, number in by_name.items() if number in seen}
    return [by_name[name] for name in pick_names(by_name, with_boxes, kind, wanted)]


def pick_names(known: Iterable[str], seen: Collection[str], kind: str, wanted: str) -> list[str]:
    """As `pick_categories`, of categories by name.

    Args:
        known: all names. seen: those with a box.
    """
    known = list(known)
    if wanted == "all":
        names = [name for name in known if name in seen]
    elif wanted == "base65" and kind == "coco":
        names = [name for name in known if name not in NOVEL_15]
    else:
        names = CATEGORY_SETS[kind].get(wanted) or [n.strip() for n in wanted.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        sets = ["all", *(["base65"] if kind == "coco" else []), *CATEGORY_SETS[kind]]
        hints = [
            f"{name!r}" + (f" (did you mean {' or '.join(map(repr, close))}?)" if close else "")
            for name in unknown
            for close in [get_close_matches(name, [*known, *sets], n=2, cutoff=0.6)]
        ]
        raise ValueError(
            f"--categories: the data know no {', '.join(hints)}; expected names of theirs, "
            f"separated by commas, or {', '.join(sets)}"
        )
    empty = [name for name in names if name not in seen]
    if empty:
        raise ValueError(
            f"--categories: not a single box of {listing(empty)} in these data; leave them out"
        )
    return list(dict.fromkeys(names))


def find_image(folder: Path, file: str) -> Path:
    """Where the image is: under its whole path, the end of it, or its name alone."""
    parts = Path(file).parts
    candidates = [folder.joinpath(*parts[start:]) for start in range(len(parts))]
    return next((path for path in candidates if path.is_file()), folder / parts[-1])


def plan_detection(
    annotations: Annotations,
    images: Path,
    categories: Sequence[int],
    *,
    seed: int,
    shots: int | None = None,
    max_rows: int | None = None,
    negatives: float = 0.0,
    keep_image: Callable[[int], bool] = lambda image: True,
    extent_for: Callable[[int, int], Extent] | None = None,
    skip_missing: Built | None = None,
) -> list[Plan]:
    """One row for each image and category that is in it, as Visual-RFT's sets have them.

    Args:
        shots: so many images of each category, chosen by the seed; None: all.
        max_rows: so many rows, chosen by the seed; None: all.
        negatives: rows about a category that is absent, as a share of the others.
        keep_image: which images to use.
        extent_for: (width, height) of an image -> the space of its boxes; None: 0..1000.
        skip_missing: told of the images that are not there, which are then not drawn; None: they
            are.
    Raises:
        ValueError: a category has fewer than `shots` images.
    """

    @cache
    def there(image: int) -> bool:
        file = find_image(images, annotations.images[image]["file"])
        if skip_missing is None or file.is_file():
            return True
        skip_missing.leave_out("image missing", str(file))
        return False

    rng = random.Random(seed)
    chosen = set(categories)
    by_category: dict[int, list[int]] = {category: [] for category in categories}
    for image, category in sorted(annotations.boxes):
        complete = category not in annotations.incomplete.get(image, ())
        if category in chosen and keep_image(image) and complete and there(image):
            by_category[category].append(image)
    if shots is not None:
        few = [annotations.categories[c] for c, i in by_category.items() if len(i) < shots]
        if few:
            raise ValueError(f"--shots {shots}: expected as many images, {listing(few)} has fewer")
        by_category = {c: sorted(rng.sample(i, shots)) for c, i in by_category.items()}
    pairs = [(image, category) for category, found in by_category.items() for image in found]
    rng.shuffle(pairs)
    if max_rows is not None:
        pairs = pairs[:max_rows]
    pairs += _absent_pairs(annotations, pairs, categories, round(negatives * len(pairs)), rng)
    rng.shuffle(pairs)
    return [_plan(annotations, images, image, category, extent_for) for image, category in pairs]


def _absent_pairs(
    annotations: Annotations,
    pairs: Sequence[tuple[int, int]],
    categories: Sequence[int],
    count: int,
    rng: random.Random,
) -> list[tuple[int, int]]:
    candidates = []
    for image in sorted({image for image, _ in pairs}):
        for category in categories:
            if (image, category) in annotations.boxes:
                continue
            if annotations.negatives is None or category in annotations.negatives[image]:
                candidates.append((image, category))
    return rng.sample(candidates, min(count, len(candidates)))


def _plan(
    annotations: Annotations,
    folder: Path,
    image: int,
    category: int,
    extent_for: Callable[[int, int], Extent] | None,
) -> Plan:
    record = annotations.images[image]
    size = (record["width"], record["height"])
    name = annotations.categories[category]
    row = {
        "problem": detection_problem(name, "pixels" if extent_for else "thousand"),
        "category": name,
        "image_id": image,
    }

    def fill(width: int, height: int) -> Mapping[str, Any] | str:
        if (width, height) != size:
            return "image of another size than its annotations say"
        extent = extent_for(width, height) if extent_for else (1000, 1000)
        boxes = [
            written(rescale(box, size, extent), extent)
            for box in annotations.boxes.get((image, category), [])
        ]
        filled = {"solution": detection_solution(boxes)}
        return filled | ({"extent": [int(side) for side in extent]} if extent_for else {})

    return Plan(find_image(folder, record["file"]), row, fill)


def describe(annotations: Annotations, built: Built) -> None:
    if annotations.bad_boxes:
        built.leave_out("box without area inside its image", f"{annotations.bad_boxes} boxes")
