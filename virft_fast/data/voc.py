"""Detection data in Pascal VOC's layout: Annotations/*.xml, JPEGImages and ImageSets/Main."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from os.path import isfile
from pathlib import Path
from xml.etree import ElementTree

from virft_fast.batch import Row
from virft_fast.data.accounts import Built
from virft_fast.data.image_files import IMAGE_SUFFIXES, ImageFiles, is_image
from virft_fast.data.instances import Annotations, annotations_of, finite_numbers

# Name of a set in ImageSets/Main -> split. trainval counts only if there is no train.
SETS = {"train": "train", "trainval": "train", "val": "validation", "valid": "validation",
        "validation": "validation", "test": "test"}  # fmt: skip


def read_voc(source: Path) -> dict[str, Annotations]:
    """Split -> annotations.

    VOC counts pixels from 1 and includes the last one, so a box from xmin 1 to xmax 10 becomes 0 to
    10. Objects marked as difficult are ignored, like COCO's crowds.

    Args:
        source: a folder that contains Annotations, or that contains a single such folder.
    Raises:
        FileNotFoundError, ValueError: there is no such folder, or nothing in it can be used.
    """
    root = _root(source)
    images = ImageFiles(root / "JPEGImages" if (root / "JPEGImages").is_dir() else root)
    folder = root / "Annotations"
    sets: dict[str, list[Path]] = {}
    for name, split in SETS.items():
        listed = root / "ImageSets" / "Main" / f"{name}.txt"
        if listed.is_file() and split not in sets:
            lines = listed.read_text(encoding="utf-8-sig").splitlines()
            sets[split] = [_file(folder, line.strip()) for line in lines if line.strip()]
    annotated = sorted(folder.glob("*.xml"))
    sets = sets or {"train": annotated}
    if "train" not in sets:
        raise ValueError(f"--source {root}: expected train or trainval in ImageSets/Main")
    read = {s: _annotations(f, images, f"--source {root}, {s}") for s, f in sets.items()}
    for file in sorted(set(annotated).difference(*sets.values())):
        read["train"].account.leave_out("annotation file in none of the sets", str(file))
    return read


def _file(folder: Path, line: str) -> Path:
    """The annotation file that a line of a set names. A flag -1, 0 or 1 may follow the name."""
    stems = (line, re.sub(r"\s+-?[01]$", "", line))
    return next((f for s in stems if (f := folder / f"{s}.xml").is_file()), folder / f"{line}.xml")


def _root(source: Path) -> Path:
    places = [source, *sorted(source.glob("*/")), *sorted(source.glob("*/*/"))]
    roots = [place for place in places if (place / "Annotations").is_dir()]
    if source in roots:
        return source
    if len(roots) != 1:
        raise FileNotFoundError(
            f"--source {source}: expected a folder with Annotations in it, got "
            f"{', '.join(map(str, roots)) or 'none'}; name the folder"
        )
    return roots[0]


def _annotations(files: list[Path], image_files: ImageFiles, where: str) -> Annotations:
    account = Built()
    images: list[Row] = []
    annotations: list[Row] = []
    categories: dict[str, int] = {}
    for file in files:
        tree = _tree(file, account)
        if tree is None:
            continue
        number = len(images)
        name = _image_name(tree, file, image_files, account)
        images.append({"id": number, "file_name": name, "width": tree.findtext("size/width"),
                       "height": tree.findtext("size/height")})  # fmt: skip
        for label, box, difficult in _objects(tree, file, account):
            annotations.append({"id": str(file), "image_id": number, "bbox": box,
                                "category_id": categories.setdefault(label, len(categories)),
                                "iscrowd": int(difficult)})  # fmt: skip
    listed = [{"id": number, "name": name} for name, number in categories.items()]
    data = {"images": images, "annotations": annotations, "categories": listed}
    return annotations_of(data, "coco", image_files.find, account, where)


def _image_name(tree: ElementTree.Element, file: Path, images: ImageFiles, account: Built) -> str:
    """The annotation's image, from `filename`, or else from `path`, which is from another machine.

    If that image has another name than the annotation, the image with the annotation's name is
    preferred.
    """
    given = (tree.findtext(tag, "").strip() for tag in ("filename", "path"))
    named = next(filter(None, given), file.stem)
    if not is_image(Path(named)):
        account.convert("filename without a suffix, matched to an existing image", named)
        named = _existing(named, IMAGE_SUFFIXES, images) or named + IMAGE_SUFFIXES[0]
    base = Path(re.split(r"[/\\]", named)[-1])
    own = _existing(file.stem, (base.suffix, *IMAGE_SUFFIXES), images)
    if base.stem == file.stem or own is None:
        return named
    account.convert("filename of another image, replaced by that of the annotation", named)
    return own


def _existing(stem: str, suffixes: Sequence[str], images: ImageFiles) -> str | None:
    """The first name with this stem that belongs to an existing image."""
    names = (stem + suffix for suffix in suffixes)
    return next((name for name in names if isfile(images.find(name).path or "")), None)


def _tree(file: Path, account: Built) -> ElementTree.Element | None:
    try:
        data = file.read_bytes()
        # An entity may expand to text of any size. Declaring one requires a document type.
        if b"<!DOCTYPE" in data or b"<!ENTITY" in data or b"\0" in data:
            raise ValueError("document type")
        return ElementTree.fromstring(data)
    except (OSError, ValueError, ElementTree.ParseError):
        account.leave_out("annotation file that is missing or not plain XML", str(file))
        return None


def _objects(
    tree: ElementTree.Element, file: Path, account: Built
) -> Iterator[tuple[str, list[float], bool]]:
    """Yield (name, [x, y, width, height], whether it is difficult) for each object."""
    for item in tree.iter("object"):
        label = (item.findtext("name") or "").strip()
        names = ("xmin", "ymin", "xmax", "ymax")
        sides = finite_numbers([item.findtext(f"bndbox/{name}") for name in names])
        if not label or sides is None:
            account.leave_out("object without a name or four numbers", str(file))
            continue
        left, top, right, bottom = sides
        difficult = (item.findtext("difficult") or "0").strip() == "1"
        if difficult:
            account.convert("difficult object, ignored as a crowd", str(file))
        yield label, [left - 1, top - 1, right - left + 1, bottom - top + 1], difficult
