"""Detection rows from the annotation files of COCO and LVIS."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
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
        marked: (image id, category id) of everything annotated, crowds and boxes left out as well.
        bad_boxes: boxes left out because they have no area inside the image.
        records: the annotations as the file has them, crowds included.
    """

    images: dict[int, dict[str, Any]]
    categories: dict[int, str]
    boxes: dict[tuple[int, int], list[tuple[float, float, float, float]]]
    negatives: dict[int, set[int]] | None
    incomplete: dict[int, set[int]]
    marked: set[tuple[int, int]]
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
        file = _file(record)
        sides = all(_positive(record.get(side)) for side in ("width", "height"))
        if not (file and sides and _whole(record.get("id"))):
            raise ValueError(
                f"--annotations {path}: expected images with id (a whole number), width, height "
                f"and file_name or coco_url, got {record!r:.200}"
            )
        if record["id"] in images:
            raise ValueError(
                f"--annotations {path}: expected one image of each id, got two of {record['id']}"
            )
        images[record["id"]] = {**record, "file": file}
    categories = _categories(path, data["categories"])
    boxes: dict[tuple[int, int], list[Any]] = defaultdict(list)
    marked, bad = set(), 0
    for record in data["annotations"]:
        image, category = record.get("image_id"), record.get("category_id")
        known = _whole(image) and image in images and _whole(category) and category in categories
        if not known:
            raise ValueError(
                f"--annotations {path}: annotation {record.get('id')!r} names image {image!r} and "
                f"category {category!r}, expected some that the file lists"
            )
        marked.add((image, category))
        if record.get("iscrowd"):
            continue
        box = _xyxy(record.get("bbox"), images[image])
        if box is None:
            bad += 1
        else:
            boxes[image, category].append(box)
    negatives = incomplete = None
    if kind == "lvis":
        negatives = {i: set(r.get("neg_category_ids") or ()) for i, r in images.items()}
        incomplete = {i: set(r.get("not_exhaustive_category_ids") or ()) for i, r in images.items()}
    return Annotations(
        images,
        categories,
        dict(boxes),
        negatives,
        incomplete or {},
        marked,
        bad,
        data["annotations"],
    )


def _read(path: Path, kind: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"--annotations {path}: no such file") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"--annotations {path}: expected JSON, got {error}") from error
    _check_kind(path, kind, data)
    return data


def _check_kind(path: Path, kind: str, data: Any) -> None:
    """Raise ValueError if this is something else than an instances file of `kind`."""
    keys = set(data) if isinstance(data, dict) else set()
    if not {"images", "annotations", "categories"} <= keys:
        looks = ", ".join(sorted(map(str, keys))[:8]) or f"a {type(data).__name__}"
        raise ValueError(
            f"--annotations {path}: expected {kind.upper()}'s instances file, with images, "
            f"annotations and categories; got {looks}"
        )
    for name in ("images", "annotations", "categories"):
        items = data[name]
        odd = [x for x in items if not isinstance(x, dict)] if isinstance(items, list) else [items]
        if odd:
            raise ValueError(
                f"--annotations {path}: {name}: expected a list of objects, got {odd[0]!r:.80}"
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
    # Only LVIS says which categories it has looked for in an image. Taken for COCO's, what it has
    # not looked for would be absent; taken for LVIS's, no false alarm of COCO's would be one.
    marks = {"neg_category_ids", "not_exhaustive_category_ids"}
    federated = any(marks & set(record) for record in data["images"])
    if data["images"] and federated != (kind == "lvis"):
        is_, other = ("LVIS's", "lvis") if federated else ("COCO's", "coco")
        raise ValueError(
            f"--annotations {path}: expected {kind.upper()}'s instances file, this is {is_} (its "
            f"images have {'' if federated else 'no '}neg_category_ids); use `build {other}` or "
            f"`--task {other}`"
        )


def _categories(path: Path, records: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    found: dict[int, str] = {}
    for record in records:
        name, number = record.get("name"), record.get("id")
        if not (isinstance(name, str) and name.strip() and _whole(number)):
            raise ValueError(
                f"--annotations {path}: expected categories with id (a whole number) and name, got "
                f"{record!r:.200}"
            )
        if name in found.values() or number in found:
            raise ValueError(
                f"--annotations {path}: expected categories with ids and names of their own, got "
                f"{name!r} with id {number} twice or beside another; rename or merge them"
            )
        found[number] = name
    return found


def _file(record: Mapping[str, Any]) -> str:
    """Relative path of an image; empty without one."""
    name, address = record.get("file_name"), record.get("coco_url")
    if not (isinstance(name, str) and name):
        name = urlsplit(address).path.lstrip("/") if isinstance(address, str) else ""
    return name if _parts(name) else ""


def _parts(file: str) -> list[str]:
    """Of a path, so that it leads nowhere else than into the folder it is joined to."""
    return [part for part in Path(file).parts if part not in ("/", "..")]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e6


def is_box(bbox: Any) -> bool:
    """Whether it is four finite numbers."""
    return isinstance(bbox, list) and len(bbox) == 4 and all(map(is_number, bbox))


def is_number(value: Any) -> bool:
    """Whether it is one that can be a place in an image, or an area."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e12


def _xyxy(bbox: Any, image: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    """Inside the image; None if nothing of it is."""
    if not is_box(bbox):
        return None
    x, y, width, height = map(float, bbox)
    x1, y1 = max(x, 0.0), max(y, 0.0)
    x2, y2 = min(x + width, float(image["width"])), min(y + height, float(image["height"]))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def pick_categories(annotations: Annotations, kind: str, wanted: str) -> list[int]:
    """Category ids for `all`, a named set (base65, novel15, few8, lvis13, lvis6) or names.

    Args:
        wanted: as on the command line; names are separated by commas, unless it is a name itself.
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
        if not names:
            raise ValueError("--categories all: there is not a single box in these data")
    elif wanted == "base65" and kind == "coco":
        names = [name for name in known if name not in NOVEL_15]
    elif wanted in known:
        names = [wanted]
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
    """Where the image is: under its whole path, the end of it, or its name alone; in the folder,
    whatever the path says."""
    parts = _parts(file)
    candidates = [folder.joinpath(*parts[start:]) for start in range(len(parts))]
    return next((path for path in candidates if path.is_file()), folder / parts[-1])


def image_paths(annotations: Annotations, folder: Path, images: Iterable[int]) -> dict[int, Path]:
    """Image id -> where it is, or would be.

    Raises:
        ValueError: two of them are one file, because the folder lacks those of the annotations.
    """
    paths = {image: find_image(folder, annotations.images[image]["file"]) for image in images}
    owners: dict[Path, int] = {}
    for image, path in paths.items():
        other = owners.setdefault(path, image)
        one, two = (annotations.images[number]["file"] for number in (other, image))
        if one != two and path.is_file():
            raise ValueError(
                f"{path}: expected an image of its own for each of {one} and {two}; give the "
                "folder where the annotations' paths start"
            )
    return paths


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
    built: Built | None = None,
) -> list[Plan]:
    """One row for each image and category that is in it, as Visual-RFT's sets have them.

    Args:
        shots: at most so many images of each category, chosen by the seed; None: all.
        max_rows: so many rows, chosen by the seed; None: all.
        negatives: rows about a category that is absent, as a share of the others.
        keep_image: which images to use.
        extent_for: (width, height) of an image -> the space of its boxes; None: 0..1000.
        built: told of the categories with fewer images than `shots`; LVIS's rare ones have that.
    """

    rng = random.Random(seed)
    chosen = set(categories)
    by_category: dict[int, list[int]] = {category: [] for category in categories}
    for image, category in sorted(annotations.boxes):
        complete = category not in annotations.incomplete.get(image, ())
        if category in chosen and keep_image(image) and complete:
            by_category[category].append(image)
    if shots is not None:
        names = annotations.categories
        few = {names[c]: len(i) for c, i in by_category.items() if len(i) < shots}
        if built is not None:
            built.note_few(few, shots)
        by_category = {c: sorted(rng.sample(i, min(shots, len(i)))) for c, i in by_category.items()}
    pairs = [(image, category) for category, found in by_category.items() for image in found]
    rng.shuffle(pairs)
    if max_rows is not None:
        pairs = pairs[: max(1, round(max_rows / (1 + negatives)))]
    wanted = round(negatives * len(pairs))
    absent = _absent_pairs(annotations, pairs, categories, wanted, rng)
    if len(absent) < wanted and built is not None:
        built.notes.append(
            f"{len(absent)} rows without objects, not {wanted}: no more are known to have none"
        )
    pairs = [*pairs, *absent][:max_rows]
    rng.shuffle(pairs)
    paths = image_paths(annotations, images, dict.fromkeys(image for image, _ in pairs))
    return [
        _plan(annotations, paths[image], image, category, extent_for) for image, category in pairs
    ]


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
            if (image, category) in annotations.marked:
                continue
            if annotations.negatives is None or category in annotations.negatives[image]:
                candidates.append((image, category))
    return rng.sample(candidates, min(count, len(candidates)))


def _plan(
    annotations: Annotations,
    path: Path,
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

    return Plan(path, row, fill, has_boxes=True, sized=True)


def describe(annotations: Annotations, built: Built) -> None:
    if annotations.bad_boxes:
        built.leave_out("box without area inside its image", f"{annotations.bad_boxes} boxes")


def missing_images(
    annotations: Annotations, folder: Path, categories: Collection[int], built: Built
) -> set[int]:
    """Ids of the images with such objects that are not in the folder; `built` is told of them."""
    chosen, told = set(categories), set(built.left_out.get("image missing", ()))
    missing = set()
    images = sorted({i for i, category in annotations.boxes if category in chosen})
    for image, path in image_paths(annotations, folder, images).items():
        if not path.is_file():
            missing.add(image)
            if str(path) not in told:
                built.leave_out("image missing", str(path))
    return missing
