"""Read annotated boxes from COCO-like tables of images, boxes and categories.

Unusable records are left out and named. Records in an unusual form are converted and counted. A
file is an error only if it has no usable record.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from virft_fast.batch import Json, Row
from virft_fast.data.accounts import Built, printable
from virft_fast.data.image_files import Found, ImageFiles
from virft_fast.data.images import UnreadableImage, image_size
from virft_fast.data.texts import read_json
from virft_fast.tasks.coordinates import Box

Key = int | str
# Share of the longer side, 0.6 pixels in COCO's images. A larger excess is more than rounding.
CLIPPED = 1e-3


@dataclass(frozen=True)
class Annotations:
    """The contents of an instances file.

    Attributes:
        images: image id -> its record, with `width`, `height`, `file` (a path) and `sized`
            (whether the annotations give the size).
        categories: category id -> name.
        boxes: (image id, category id) -> xyxy boxes inside the image, in the unit of its width and
            height; without crowds.
        negatives: image id -> category ids known to be absent (LVIS). None: all that have no
            annotation (COCO).
        incomplete: image id -> category ids whose objects aren't all annotated (LVIS).
        marked: (image id, category id) of every annotation, including crowds and unusable boxes.
        bad_boxes: number of unusable boxes, without crowds.
        records: id, image_id, category_id, bbox, area and iscrowd of each annotation, even crowds.
        find: image path in the annotations -> where the image is.
        frame: see `Plan`.
        account: what was left out and converted.
    """

    images: dict[int, Row]
    categories: dict[int, str]
    boxes: dict[tuple[int, int], list[Box]]
    negatives: dict[int, set[int]] | None
    incomplete: dict[int, set[int]]
    marked: set[tuple[int, int]]
    bad_boxes: int
    records: list[Row]
    find: Callable[[str], Found]
    frame: str
    account: Built = field(default_factory=Built)


def read_annotations(
    path: Path, kind: str, images: Path, flag: str = "--annotations"
) -> Annotations:
    """Read an instances file of COCO or LVIS, which may be gzipped.

    Args:
        images: folder of the images.
        flag: names the file in errors.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another kind of file, or has no usable record; says why.
    """
    where, account = f"{flag} {path}", Built()
    data = read_json(path, where, account)
    _check_kind(where, kind, data)
    return annotations_of(data, kind, ImageFiles(images).find, account, where)


def annotations_of(
    data: Mapping[str, list[Json]],
    kind: str,
    find: Callable[[str], Found],
    account: Built,
    where: str,
    *,
    shares_of: str | None = None,
) -> Annotations:
    """Read annotations from tables like those in COCO's instances files.

    Args:
        data: `images`, `annotations` and `categories`.
        find: an image's `file_name` -> where the image is.
        account: records what is left out and converted.
        where: names the source in errors.
        shares_of: if boxes are shares of the image's sides, the `frame` of that image (see `Plan`);
            None: boxes are in pixels.
    Raises:
        ValueError: no image or no box is usable, or boxes are in shares instead of pixels.
    """
    images, image_ids = _images(data["images"], None if shares_of else find, account)
    _note_ids(data, account)
    used = {key_of(r.get("category_id")) for r in data["annotations"] if isinstance(r, dict)}
    categories, category_ids = _categories(data["categories"], used, account)
    boxes: dict[tuple[int, int], list[Box]] = {}
    records, marked = [], set()
    for record in data["annotations"]:
        ids = _ids_of(record, image_ids, category_ids, account)
        if ids is None:
            continue
        marked.add(ids)
        clean = _annotation(record, ids, account)
        if clean is None:
            continue
        records.append(clean)
        box = None if clean["iscrowd"] else _inside(clean, images[ids[0]], account)
        if box is not None:
            boxes.setdefault(ids, []).append(box)
    if not shares_of:
        _check_pixels([record["bbox"] for record in records], images, where)
    bad = len(account.left_out.get(NO_BOX, ())) + len(account.left_out.get(NO_AREA, ()))
    if not images or (data["annotations"] and not boxes):
        lost = "; ".join(account.lines())
        raise ValueError(f"{where}: expected images with boxes, but no box is usable; {lost}")
    negatives, incomplete, frame = None, {}, shares_of or "unknown"
    if kind == "lvis":
        negatives = _listed(images, "neg_category_ids", category_ids)
        incomplete = _listed(images, "not_exhaustive_category_ids", category_ids)
    if any(isinstance(r, dict) and r.get("keypoints") for r in data["annotations"]):
        account.notes.append("the annotations hold keypoints; only their boxes are used")
    account.notes.append(
        f"kept {len(images)} images, {sum(map(len, boxes.values()))} boxes of "
        f"{len({category for _, category in boxes})} categories"
    )
    return Annotations(
        images, categories, boxes, negatives, incomplete, marked, bad, records, find, frame, account
    )


def _check_kind(where: str, kind: str, data: Json) -> None:
    """Raise ValueError unless this is an instances file of `kind`."""
    keys = set(data) if isinstance(data, dict) else set()
    if not {"images", "annotations", "categories"} <= keys:
        looks = ", ".join(sorted(map(str, keys))[:8]) or f"a {type(data).__name__}"
        raise ValueError(
            f"{where}: expected {kind.upper()}'s instances file, with images, annotations and "
            f"categories; got {looks}"
        )
    for name in ("images", "annotations", "categories"):
        if not isinstance(data[name], list):
            raise ValueError(f"{where}: {name}: expected a list of objects, got {data[name]!r:.80}")
    records = [record for record in data["annotations"] if isinstance(record, dict)]
    if records and not any("bbox" in record or "segmentation" in record for record in records):
        what = "captions" if any("caption" in r for r in records) else "other annotations"
        raise ValueError(f"{where}: expected boxes, these are {what}; take the instances file")
    # Only LVIS says which categories were checked in an image. If LVIS is read as COCO, unchecked
    # ones count as absent. If COCO is read as LVIS, no prediction counts as a false alarm.
    marks = {"neg_category_ids", "not_exhaustive_category_ids"}
    images = [record for record in data["images"] if isinstance(record, dict)]
    federated = any(marks & set(record) for record in images)
    if images and federated != (kind == "lvis"):
        is_, other = ("LVIS's", "lvis") if federated else ("COCO's", "coco")
        raise ValueError(
            f"{where}: expected {kind.upper()}'s instances file, this is {is_} (its images have "
            f"{'' if federated else 'no '}neg_category_ids); use `build {other}` or `--task "
            f"{other}`"
        )


# --- Ids and numbers -------------------------------------------------------------------------


def key_of(value: Json) -> Key | None:
    """The id in a normal form: 1, 1.0, "1" and "1.0" are the same. None if it isn't an id."""
    if isinstance(value, str):
        text = value.strip()
        value = int(text.partition(".")[0]) if re.fullmatch(r"-?\d{1,19}(\.0*)?", text) else text
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return value if whole or (isinstance(value, str) and value) else None


def _id_in(ids: Mapping[Key, int], value: Json) -> int | None:
    key = key_of(value)
    return None if key is None else ids.get(key)


def _note_ids(data: Mapping[str, list[Json]], account: Built) -> None:
    columns = (("images", "id"), ("categories", "id"), ("annotations", "image_id"),
               ("annotations", "category_id"))  # fmt: skip
    ids = (r.get(name) for table, name in columns for r in data[table] if isinstance(r, dict))
    odd = sum(isinstance(i, (str, float)) and isinstance(key_of(i), int) for i in ids)
    if odd:
        account.notes.append(f"converted, id that is a text or has a decimal point: {odd}")


def _numbered(keys: Iterable[Key], account: Built, what: str) -> dict[Key, int]:
    """A number for each id. Text ids get numbers that aren't used otherwise."""
    keys = list(keys)
    free = count(1 + max((key for key in keys if isinstance(key, int)), default=0))
    numbers = {key: key if isinstance(key, int) else next(free) for key in keys}
    for key in keys:
        if isinstance(key, str):
            account.convert(f"{what} id that is a text, numbered", f"{key} {numbers[key]}")
    return numbers


def finite_number(value: Json) -> float | None:
    """The value, which may be text, as a coordinate or area in an image; None if it isn't one."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e12
    return float(value) if usable else None


def finite_numbers(values: Sequence[Json]) -> list[float] | None:
    """`finite_number` of each value; None if any value isn't a number."""
    numbers = [number for value in values if (number := finite_number(value)) is not None]
    return numbers if len(numbers) == len(values) else None


def _side(value: Json) -> int | None:
    """The width or height of an image; None if the value can't be one."""
    side = finite_number(value)
    return int(side) if side is not None and 0 < side < 1e6 and side.is_integer() else None


def _flag(value: Json) -> bool | None:
    """The value as true or false; None if it is neither."""
    text = str(value).strip().lower()
    if text in ("", "0", "0.0", "false", "no", "none"):
        return False
    return True if text in ("1", "1.0", "true", "yes") else None


# --- Images ----------------------------------------------------------------------------------


def _images(
    records: Iterable[Json], find: Callable[[str], Found] | None, account: Built
) -> tuple[dict[int, Row], dict[Key, int]]:
    """Image id -> record; and each id that annotations use -> image id.

    Args:
        find: locates files, to read missing sizes from them. None: boxes are in shares of the
            image's sides, so no size is needed.
    """
    listed: dict[Key, Row] = {}
    repeated: dict[Key, list[str]] = {}
    for record in records:
        file = _file(record) if isinstance(record, dict) else ""
        key = key_of(record.get("id")) if file else None
        if key is None:
            account.leave_out("image without an id or file name", f"{record!r:.80}")
        elif key in listed and listed[key]["file"] != file:
            repeated.setdefault(key, [listed[key]["file"]]).append(file)
        elif key in listed:
            account.convert("image listed twice, used once", file)
        else:
            listed[key] = record | {"file": file}
    for key, files in repeated.items():
        del listed[key]
        account.leave_out("image id of several images", f"{key}: {', '.join(files)}")
    sized = {key: image for key, r in listed.items() if (image := _sized(r, find, account))}
    same = _same_file(sized, account)
    numbers = _numbered((key for key in sized if key not in same), account, "image")
    images = {number: sized[key] | {"id": number} for key, number in numbers.items()}
    return images, numbers | {key: numbers[one] for key, one in same.items() if one in numbers}


def _file(record: Row) -> str:
    """The image's path; empty if the record has none."""
    for name in ("file_name", "coco_url"):
        text = record.get(name)
        if isinstance(text, str) and text.strip("./\\ "):
            return text
    return ""


def _sized(record: Row, find: Callable[[str], Found] | None, account: Built) -> Row | None:
    """The record with its size, read from the file if missing; None if that fails, too."""
    if find is None:
        return record | {"width": 1, "height": 1, "sized": False}
    width, height = _side(record.get("width")), _side(record.get("height"))
    if width and height:
        return record | {"width": width, "height": height, "sized": True}
    try:
        size = image_size(find(record["file"]).path)
    except UnreadableImage:
        account.leave_out("image without a size, in the annotations and on disk", record["file"])
        return None
    account.convert("image whose size is read from its file", record["file"])
    return record | {"width": size[0], "height": size[1], "sized": False}


def _same_file(images: dict[Key, Row], account: Built) -> dict[Key, Key]:
    """Additional ids of an image -> its first id. Images listed with different sizes are removed
    from `images`."""
    by_file: dict[str, list[Key]] = defaultdict(list)
    for key, record in images.items():
        by_file[record["file"]].append(key)
    same: dict[Key, Key] = {}
    for file, keys in by_file.items():
        if len({(images[key]["width"], images[key]["height"]) for key in keys}) > 1:
            account.leave_out("file of several images of different sizes", file)
            for key in keys:
                del images[key]
        elif len(keys) > 1:
            account.convert("image listed under several ids, merged", file)
            same |= dict.fromkeys(keys[1:], keys[0])
    return same


def _listed(images: Mapping[int, Row], name: str, ids: Mapping[Key, int]) -> dict[int, set[int]]:
    """Image id -> the category ids that its record lists under `name`."""
    return {
        number: {i for key in keys if (i := _id_in(ids, key)) is not None}
        for number, record in images.items()
        for keys in [record[name] if isinstance(record.get(name), list) else []]
    }


# --- Categories ------------------------------------------------------------------------------


def _categories(
    records: Iterable[Json], used: set[Key | None], account: Built
) -> tuple[dict[int, str], dict[Key, int]]:
    """Category id -> name; and each id that annotations use -> category id.

    Args:
        used: ids with annotations. If several categories have the same name, those without
            annotations are left out, such as the parent categories in Roboflow's exports.
    """
    names: dict[Key, str] = {}
    clashing = set()
    for record in records:
        given = record if isinstance(record, dict) else {}
        name, key = given.get("name"), key_of(given.get("id"))
        # JSON allows lone surrogates in a name, but tokenizers reject them.
        if key is None or not (isinstance(name, str) and name.strip() and name == printable(name)):
            account.leave_out("category without an id or name", f"{record!a:.80}")
        elif names.setdefault(key, name) != name:
            clashing.add(key)
            account.leave_out("category id of several categories", f"{key}: {names[key]}, {name}")
    by_name: dict[str, list[Key]] = defaultdict(list)
    for key, name in names.items():
        if key not in clashing:
            by_name[name].append(key)
    first = {name: next((k for k in keys if k in used), keys[0]) for name, keys in by_name.items()}
    for name, keys in by_name.items():
        for key in keys:
            if key not in used and key != first[name]:
                account.leave_out("category without boxes, named like another", f"{name} {key}")
            elif key != first[name]:
                account.convert("categories with one name, merged", f"{name} {key}")
    account.note_alike(by_name, "categories")
    numbers = _numbered(first.values(), account, "category")
    ids = {key: numbers[first[name]] for name, keys in by_name.items() for key in keys}
    return {numbers[key]: name for name, key in first.items()}, ids


# --- Boxes -----------------------------------------------------------------------------------

NO_BOX = "annotation without four finite numbers as bbox"
NO_AREA = "box without area inside its image"


def _ids_of(
    record: Json, image_ids: Mapping[Key, int], category_ids: Mapping[Key, int], account: Built
) -> tuple[int, int] | None:
    """(image id, category id) of an annotation; None if either is unknown."""
    if not isinstance(record, dict):
        account.leave_out("annotation that is not an object", f"{record!r:.80}")
        return None
    image = _id_in(image_ids, record.get("image_id"))
    category = _id_in(category_ids, record.get("category_id"))
    if image is None:
        account.leave_out("annotation of an image that isn't listed or used", _name(record))
    elif category is None:
        account.leave_out("annotation of a category that isn't listed or used", _name(record))
    else:
        return image, category
    return None


def _name(record: Row) -> str:
    ids = (f"{record.get(name)!r:.40}" for name in ("id", "image_id", "category_id"))
    return "annotation {} (image {}, category {})".format(*ids)


def _annotation(record: Row, ids: tuple[int, int], account: Built) -> Row | None:
    """The annotation in COCO's form; None if it has no box."""
    crowd = _flag(record.get("iscrowd"))
    if crowd is None:
        account.leave_out("annotation whose iscrowd is neither 0 nor 1", _name(record))
        return None
    box = box_of(record.get("bbox"))
    if box is None and not record.get("bbox"):
        box = _around(record.get("segmentation"))
        if box is not None:
            account.convert("box drawn around its segmentation", _name(record))
    if box is None:
        if not crowd:
            account.leave_out(NO_BOX, _name(record))
        return None
    if any(isinstance(side, str) for side in record.get("bbox") or ()):
        account.convert("box whose numbers are texts", _name(record))
    area = finite_number(record.get("area"))
    return {"id": key_of(record.get("id")), "image_id": ids[0], "category_id": ids[1],
            "bbox": box, "iscrowd": int(crowd), "area": area}  # fmt: skip


def box_of(bbox: Json) -> list[float] | None:
    """The four numbers of a bbox, even if they are text; None if it has anything else."""
    return finite_numbers(bbox) if isinstance(bbox, list) and len(bbox) == 4 else None


def _around(segmentation: Json) -> list[float] | None:
    """The box around a segmentation's polygons; None if it has none."""
    numbers: list[float] = []
    for polygon in segmentation if isinstance(segmentation, list) else ():
        sides = finite_numbers(polygon) if isinstance(polygon, list) else None
        if sides is None or len(sides) < 6 or len(sides) % 2:
            return None
        numbers += sides
    return box_around(numbers) if numbers else None


def box_around(numbers: Sequence[float]) -> list[float]:
    """(x, y, width, height) of the box around the points x1, y1, x2, y2, ..."""
    xs, ys = numbers[0::2], numbers[1::2]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _check_pixels(boxes: Sequence[Json], images: Mapping[int, Row], where: str) -> None:
    """Raise ValueError if at least half of the boxes are within the first pixel of larger images.

    Such boxes are in shares. A few of them may extend past the edge.
    """
    ends = [max(x + width, y + height) for x, y, width, height in boxes if min(width, height) > 0]
    shares = sum(end <= 1 + CLIPPED for end in ends)
    sides = max((max(i["width"], i["height"]) for i in images.values()), default=0)
    if shares and 2 * shares >= len(ends) and sides > 10:
        raise ValueError(
            f"{where}: expected boxes in pixels, got {shares} of {len(ends)} within 0..1, which "
            "look like fractions; multiply them by the width and height of their image"
        )


def _inside(record: Row, image: Row, account: Built) -> Box | None:
    """The box as xyxy, clipped to its image; None if it is outside."""
    x, y, width, height = record["bbox"]
    right, lower = float(image["width"]), float(image["height"])
    box = (max(x, 0.0), max(y, 0.0), min(x + width, right), min(y + height, lower))
    if not (box[0] < box[2] and box[1] < box[3]):
        account.leave_out(NO_AREA, f"{image['file']}: {record['bbox']}")
        return None
    beyond = max(-x, -y, x + width - right, y + height - lower)
    if beyond > CLIPPED * max(right, lower):
        account.convert("box clipped to its image", f"{image['file']}: {record['bbox']}")
    return box
