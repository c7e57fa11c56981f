"""Detection data in Open Images' layout: boxes, class names and verified labels in CSV files."""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path

from virft_fast.batch import Row
from virft_fast.data.accounts import Built
from virft_fast.data.image_files import AMBIGUOUS, Found, is_image, walk
from virft_fast.data.instances import Annotations, annotations_of, finite_number, finite_numbers
from virft_fast.data.texts import only_file, read_text

BOXES, LABELS = "annotations-bbox", "annotations-human-imagelabels"
BOX_COLUMNS = ("ImageID", "LabelName", "IsGroupOf", "XMin", "YMin", "XMax", "YMax")


def read_openimages(
    source: Path, images: Path, *, negatives: bool = False
) -> dict[str, Annotations]:
    """Split -> annotations of the images in `images`, in shares of the images' sides.

    Boxes refer to the images as stored, ignoring EXIF data. A class counts as absent only if a
    person has verified that. Boxes of groups are ignored, like COCO's crowds. Files are read line
    by line, and lines about other images are dropped.

    Args:
        source: folder of the CSV files, or of folders with them.
        images: folder of the images, ImageID.jpg; subfolders are searched.
        negatives: also read which classes are absent.
    Raises:
        FileNotFoundError, ValueError: a file is missing or can't be used; says why.
    """
    files = sorted(path for pattern in ("*.csv", "*/*.csv") for path in source.glob(pattern))
    account = Built()
    names = _names(source, files, account)
    places: dict[str, list[Path]] = defaultdict(list)
    for path in walk(images):
        if is_image(path):
            places[path.stem].append(path)
    boxes = {split: _of_split(files, BOXES, split) for split in ("train", "validation", "test")}
    if not any(boxes.values()):
        raise FileNotFoundError(f"--source {source}: expected a file ...-{BOXES}.csv, got none")
    annotations = {}
    for split, given in boxes.items():
        if len(given) > 1:
            listed = ", ".join(path.name for path in given)
            raise ValueError(
                f"--source {source}: expected one file of boxes of {split}, got {listed}; keep one"
            )
        labels = _of_split(files, LABELS, split) if negatives else []
        read = _annotations(given[0], labels, names, places, account) if given else None
        if read is not None:
            annotations[split], account = read, Built()
        elif given:
            account.notes.append(f"{given[0].name}: none of its images is in {images}")
    if not annotations:
        raise ValueError(
            f"--images {images}: expected images such as 000002b66c9c498e.jpg, named by their "
            f"ImageID; {'; '.join(account.lines())}"
        )
    return annotations


def _of_split(files: Sequence[Path], kind: str, split: str) -> list[Path]:
    """A split's files, such as oidv6-train-annotations-bbox.csv. Files without a split: train."""
    named = {"validation": "val"}.get(split, split)
    return [
        path
        for path in files
        if kind in path.name
        and (re.findall("train|val|test", path.name.partition(kind)[0]) or ["train"])[-1] == named
    ]


def _names(source: Path, files: Sequence[Path], account: Built) -> list[tuple[str, str]]:
    """(MID, name) of each class. A line without a MID is a header."""
    named = [path for path in files if "class-descriptions" in path.name]
    named = [path for path in named if "boxable" in path.name] or named
    file = only_file(named, source, "one file ...class-descriptions-boxable.csv")
    rows = csv.reader(io.StringIO(read_text(file, account), newline=""))
    return [(row[0], row[1].strip()) for row in rows if len(row) > 1 and row[0].startswith("/")]


def _annotations(
    file: Path,
    labels: Sequence[Path],
    names: Sequence[tuple[str, str]],
    places: Mapping[str, list[Path]],
    account: Built,
) -> Annotations | None:
    """The annotations in `file`; None if none of the images has a box in it."""
    ids: dict[str, int] = {}
    numbers = {mid: number for number, (mid, _) in enumerate(names)}
    records: list[Row] = []
    elsewhere = 0
    for line, (image, label, group, *sides) in _rows(file, BOX_COLUMNS, account):
        if image not in places:
            elsewhere += 1
            continue
        box = None
        if corners := finite_numbers(sides):
            left, top, right, bottom = corners
            box = [left, top, right - left, bottom - top]
        crowd = group.strip() == "1"  # -1: unknown
        if crowd:
            account.convert("group of objects, ignored as a crowd", f"{image} {label}")
        number = ids.setdefault(image, len(ids))
        records.append({"id": line, "image_id": number, "category_id": numbers.get(label, label),
                        "bbox": box, "iscrowd": int(crowd)})  # fmt: skip
    if not records:
        return None
    if elsewhere:
        account.notes.append(f"{file.name}: {elsewhere} boxes are of images that aren't there")
    absent: dict[str, list[int]] = defaultdict(list)
    for path in labels:
        for _, (image, label, sure) in _rows(path, ("ImageID", "LabelName", "Confidence"), account):
            if image in ids and label in numbers and finite_number(sure) == 0:
                absent[image].append(numbers[label])
    listed: list[Row] = [
        {"id": number, "file_name": image, "neg_category_ids": absent.get(image, [])}
        for image, number in ids.items()
    ]
    categories: list[Row] = [{"id": n, "name": name} for n, (_, name) in enumerate(names)]
    data = {"images": listed, "annotations": records, "categories": categories}

    def find(image: str) -> Found:
        paths = places[image]
        return Found(paths[0]) if len(paths) == 1 else Found(None, AMBIGUOUS)

    return annotations_of(data, "lvis", find, account, f"--source {file}", shares_of="stored")


def _rows(
    file: Path, columns: Sequence[str], account: Built
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield (line number, cells of these columns) one by one: a file may have 14 million."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines)
            header = [name.strip() for name in next(reader, [])]
            missing = [name for name in columns if name not in header]
            if missing:
                raise ValueError(f"the columns {', '.join(columns)}, {missing[0]} isn't there")
            pick = itemgetter(*map(header.index, columns))
            for row in reader:
                if len(row) == len(header):
                    yield reader.line_num, pick(row)
                elif row:
                    account.leave_out(
                        "line with more or fewer cells than the header",
                        f"{file.name}, line {reader.line_num}",
                    )
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"--source {file}: expected CSV with {error}") from error
