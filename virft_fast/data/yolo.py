"""Detection data in Ultralytics' layout: data.yaml, folders of images, and for each image a text
file of labels: lines of `class x y width height`, or of `class` and a polygon, in shares of the
image's sides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from virft_fast.data.accounts import Built
from virft_fast.data.image_files import Found, is_image, walk
from virft_fast.data.instances import Annotations, annotations_of, key_of

SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation",
          "test": "test"}  # fmt: skip


def read_yolo(source: Path) -> dict[str, Annotations]:
    """Split -> annotations, in shares of the sides of images as they are shown: so Ultralytics
    reads them, whatever their EXIF data say. An image without a label file has no objects.

    Args:
        source: data.yaml, or the folder that holds it.
    Raises:
        FileNotFoundError, ValueError: there is no such file, or it can't be used; says why.
    """
    file = _yaml_file(source)
    settings = _settings(file)
    names = settings.get("names")
    if not names or not isinstance(names, (list, dict)):
        raise ValueError(f"--source {file}: expected names of the classes, got {names!r:.80}")
    pairs = names.items() if isinstance(names, dict) else enumerate(names)
    categories = [{"id": key_of(number), "name": str(name)} for number, name in pairs]
    splits = {}
    for key, split in SPLITS.items():
        paths = list(_images(file.parent, settings.get("path"), settings.get(key)))
        if paths:
            splits[split] = _annotations(
                paths, categories, f"--source {file}, {key}", bool(settings.get("kpt_shape"))
            )
    if "train" not in splits:
        raise ValueError(
            f"--source {file}: expected images where train: says, got {settings.get('train')!r}"
        )
    return splits


def _yaml_file(source: Path) -> Path:
    if source.is_file():
        return source
    files = sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
    named = [file for file in files if file.stem in ("data", "dataset")] or files
    if len(named) != 1:
        raise FileNotFoundError(
            f"--source {source}: expected one data.yaml in it, got "
            f"{', '.join(file.name for file in named) or 'none'}; name the file"
        )
    return named[0]


def _settings(file: Path) -> dict[str, Any]:
    import yaml

    try:
        # All scalars are texts: yes, on, null and 1.0 may be names.
        settings = yaml.load(file.read_text(encoding="utf-8"), yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--source {file}: expected YAML, got {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--source {file}: expected a mapping with train and names")
    return {key: v for key, v in settings.items() if v not in ("", "~", "null", "Null", "NULL")}


def _images(home: Path, root: Any, entries: Any) -> Iterator[Path]:
    """Images of a split: of folders, or of text files that list them."""
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, str):
            continue
        place = _placed(home, root, entry)
        if place.suffix == ".txt" and place.is_file():
            lines = place.read_text(encoding="utf-8-sig").splitlines()
            yield from (_placed(home, root, line.strip()) for line in lines if line.strip())
        elif place.is_dir():
            yield from (path for path in walk(place) if is_image(path))


def _placed(home: Path, root: Any, entry: str) -> Path:
    """Where an entry is: below `path`, beside data.yaml, or, as Roboflow's exports have it, there
    without the `../` it begins with."""
    bases = [home / root, home] if isinstance(root, str) else [home]
    plain = entry.replace("\\", "/")
    tried = [base / name for name in (plain, plain.lstrip("./")) for base in bases]
    return next((path for path in tried if path.exists()), tried[0])


def _annotations(
    paths: list[Path], categories: list[Any], where: str, keypoints: bool
) -> Annotations:
    account = Built()
    images, annotations = [], []
    for number, path in enumerate(dict.fromkeys(paths)):
        images.append({"id": number, "file_name": str(path)})
        for line, (category, box) in _labels(_label_file(path), account, keypoints):
            annotations.append({"id": line, "image_id": number, "category_id": category,
                                "bbox": list(box)})  # fmt: skip
    data = {"images": images, "annotations": annotations, "categories": categories}
    return annotations_of(
        data, "coco", lambda file: Found(Path(file)), account, where, shares_of="shown"
    )


def _label_file(image: Path) -> Path:
    """labels/ in the place of the last images/ in the path, as Ultralytics has it."""
    parts = image.with_suffix(".txt").parts
    at = max((at for at, part in enumerate(parts) if part == "images"), default=None)
    return Path(*parts) if at is None else Path(*parts[:at], "labels", *parts[at + 1 :])


def _labels(
    file: Path, account: Built, keypoints: bool
) -> Iterator[tuple[str, tuple[int, tuple[float, float, float, float]]]]:
    """(where, (class, x, y, width, height of the box's corner and size in shares)).

    Args:
        keypoints: the numbers behind a box are no corners of a polygon.
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
            account.leave_out("label that is no class with a box or a polygon", where)
        elif len(values) == 4:
            x, y, width, height = values
            yield where, (int(category), (x - width / 2, y - height / 2, width, height))
        else:
            xs, ys = values[0::2], values[1::2]
            account.convert("box drawn around its polygon", where)
            size = (max(xs) - min(xs), max(ys) - min(ys))
            yield where, (int(category), (min(xs), min(ys), *size))
