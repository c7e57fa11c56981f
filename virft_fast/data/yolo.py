"""Detection data in Ultralytics' layout: data.yaml, image folders, and a label file per image.

A label file has lines of `class x y width height`, or of `class` and a polygon, in shares of the
image's sides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from virft_fast.batch import Json, Row
from virft_fast.data.accounts import Built
from virft_fast.data.image_files import Found, is_image, walk
from virft_fast.data.instances import Annotations, annotations_of, box_around, key_of
from virft_fast.data.texts import only_file

# Key of data.yaml -> split.
SPLIT_KEYS = {"train": "train", "val": "validation", "valid": "validation",
              "validation": "validation", "test": "test"}  # fmt: skip


def read_yolo(source: Path) -> dict[str, Annotations]:
    """Split -> annotations, in shares of the image's sides.

    They refer to the images as displayed (EXIF data applied), as in Ultralytics. An image without a
    label file has no objects.

    Args:
        source: data.yaml, or the folder that contains it.
    Raises:
        FileNotFoundError, ValueError: a file is missing or can't be used; says why.
    """
    file = _yaml_file(source)
    settings = _settings(file)
    names = settings.get("names")
    if not names or not isinstance(names, (list, dict)):
        raise ValueError(f"--source {file}: expected names of the classes, got {names!r:.80}")
    pairs = names.items() if isinstance(names, dict) else enumerate(names)
    categories = [{"id": key_of(number), "name": str(name)} for number, name in pairs]
    splits = {}
    for key, split in SPLIT_KEYS.items():
        paths = list(_images(file.parent, settings.get("path"), settings.get(key)))
        if paths:
            splits[split] = _annotations(
                paths, categories, f"--source {file}, {key}", bool(settings.get("kpt_shape"))
            )
    if "train" not in splits:
        raise ValueError(
            f"--source {file}: train: expected a folder with images, got {settings.get('train')!r}"
        )
    return splits


def _yaml_file(source: Path) -> Path:
    if source.is_file():
        return source
    files = sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
    named = [file for file in files if file.stem in ("data", "dataset")] or files
    return only_file(named, source, "one data.yaml in it", "; name the file")


def _settings(file: Path) -> Row:
    import yaml

    try:
        # BaseLoader keeps scalars as text: yes, on, null and 1.0 may be names.
        settings = yaml.load(file.read_text(encoding="utf-8"), yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--source {file}: expected YAML, got {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--source {file}: expected a mapping with train and names")
    return {key: v for key, v in settings.items() if v not in ("", "~", "null", "Null", "NULL")}


def _images(home: Path, root: Json, entries: Json) -> Iterator[Path]:
    """The images of a split, from folders or from text files that list them."""
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, str):
            continue
        place = _placed(home, root, entry)
        if place.suffix == ".txt" and place.is_file():
            lines = place.read_text(encoding="utf-8-sig").splitlines()
            yield from (_placed(home, root, line.strip()) for line in lines if line.strip())
        elif place.is_dir():
            yield from (path for path in walk(place) if is_image(path))


def _placed(home: Path, root: Json, entry: str) -> Path:
    """The path of an entry. It is relative to `path` or data.yaml; in Roboflow's exports, after
    removing its leading `../`."""
    bases = [home / root, home] if isinstance(root, str) else [home]
    plain = entry.replace("\\", "/")
    candidates = [base / name for name in (plain, plain.lstrip("./")) for base in bases]
    return next((path for path in candidates if path.exists()), candidates[0])


def _annotations(
    paths: list[Path], categories: list[Row], where: str, keypoints: bool
) -> Annotations:
    account = Built()
    images: list[Row] = []
    annotations: list[Row] = []
    for number, path in enumerate(dict.fromkeys(paths)):
        images.append({"id": number, "file_name": str(path)})
        for line, (category, box) in _labels(_label_file(path), account, keypoints):
            annotations.append({"id": line, "image_id": number, "category_id": category,
                                "bbox": box})  # fmt: skip
    data = {"images": images, "annotations": annotations, "categories": categories}
    return annotations_of(
        data, "coco", lambda file: Found(Path(file)), account, where, shares_of="shown"
    )


def _label_file(image: Path) -> Path:
    """The image's path with the last images/ replaced by labels/, as in Ultralytics."""
    parts = image.with_suffix(".txt").parts
    at = max((n for n, name in enumerate(parts) if name == "images"), default=None)
    return Path(*parts) if at is None else Path(*parts[:at], "labels", *parts[at + 1 :])


def _labels(
    file: Path, account: Built, keypoints: bool
) -> Iterator[tuple[str, tuple[int, list[float]]]]:
    """Yield (file and line, (class, [x, y, width, height])) for each label; (x, y) is the upper
    left corner.

    Args:
        keypoints: numbers after a box are keypoints, not corners of a polygon.
    """
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            category, *values = map(float, line.split())
        except ValueError:
            category, values = math.nan, []
        values = values[:4] if keypoints else values
        usable = len(values) == 4 or (len(values) >= 6 and len(values) % 2 == 0)
        finite = all(map(math.isfinite, (category, *values)))
        if not usable or not finite or category != int(category):
            account.leave_out("label that is not a class with a box or a polygon", where)
        elif len(values) == 4:
            x, y, width, height = values
            yield where, (int(category), [x - width / 2, y - height / 2, width, height])
        else:
            account.convert("box drawn around its polygon", where)
            yield where, (int(category), box_around(values))
