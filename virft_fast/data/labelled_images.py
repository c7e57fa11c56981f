"""Classification rows from image folders, CSV files and the archives of four well-known data sets.

A reader returns (image, class name, split) triples, which `plan_classification` turns into rows.
Archives are read in their published layout.
"""

from __future__ import annotations

import os
import random
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from virft_fast.arguments import expecting
from virft_fast.data.accounts import Built
from virft_fast.data.image_files import ImageFiles, is_hidden, is_image, walk
from virft_fast.data.images import NOT_DOWNLOADED, is_address, placed
from virft_fast.data.texts import read_table, read_text
from virft_fast.data.writing import Plan
from virft_fast.tasks.prompts import classification_problem

# Names of folders and values in the column split, in any case -> split.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "val", "valid", "validation"), "test"),
}
# Column names in a CSV file.
IMAGE_NAMES = ("image", "image_path", "path", "file", "filename")
LABEL_NAMES = ("label", "class", "species", "name")
# Classes 1 to 102 of Flowers102, whose archive has only their numbers.
FLOWERS = tuple(Path(__file__).with_name("flowers102.txt").read_text("utf-8").splitlines())


class Labelled(NamedTuple):
    """An image, its class, and its split: "train", "test", or None if the source has no splits."""

    image: Path
    label: str
    split: str | None


def read_folder(root: Path, built: Built) -> list[Labelled]:
    """Read CLASS/image, or train/CLASS/image and test/CLASS/image (val, valid and validation count
    as test). Hidden files and folders are ignored.

    Args:
        built: records the files that are left out.
    """
    folders = _visible_folders(root, built)
    splits = [f for f in folders if f.name.lower() in SPLIT_NAMES and _visible_folders(f, Built())]
    if splits:
        for folder in folders:
            if folder not in splits:
                built.leave_out("folder that is not a split", folder.name)
        rows = [
            row._replace(split=SPLIT_NAMES[folder.name.lower()])
            for folder in splits
            for row in _classes(_visible_folders(folder, built), built)
        ]
    else:
        rows = _classes(folders, built)
    if not rows:
        raise ValueError(
            f"{root}: expected a folder for each class with images in it, or train/ and test/ with "
            f"such folders; {'; '.join(built.lines())}"
        )
    built.note_alike((row.label for row in rows), "classes")
    return rows


def _visible_folders(root: Path, built: Built) -> list[Path]:
    folders = []
    for path in sorted(root.iterdir()):
        if is_hidden(path.name):
            built.leave_out("hidden file or folder", str(path))
        elif path.is_dir():
            folders.append(path)
        else:
            built.leave_out(f"{path.suffix} file outside a class folder", str(path))
    return folders


def _classes(folders: Sequence[Path], built: Built) -> list[Labelled]:
    rows = []
    for folder in folders:
        files = sorted(walk(folder, built))
        images = [file for file in files if is_image(file)]
        for file in files:
            if not is_image(file):
                built.leave_out(f"not an image by its suffix {file.suffix!r}", str(file))
            elif file.parent != folder:
                built.convert("image in a folder below its class", str(file))
        if not images:
            built.leave_out("class folder without an image", folder.name)
        # macOS stores accents as separate characters.
        label = unicodedata.normalize("NFC", folder.name)
        rows += [Labelled(image, label, None) for image in images]
    return rows


def read_csv(path: Path, built: Built, images: Path | None = None) -> list[Labelled]:
    """Read the columns image, label and optionally split. Paths start at `images`, or at the CSV
    file's folder.

    Args:
        built: records a guessed encoding, and paths that differ from those in the file.
    """
    header, rows = read_table(path, (IMAGE_NAMES, LABEL_NAMES), built)
    image, label = (
        next((name for name in names if name in header), None)
        for names in (IMAGE_NAMES, LABEL_NAMES)
    )
    if image is None or label is None:
        raise ValueError(
            f"{path}: expected the columns image and label (and maybe split), got "
            f"{', '.join(header) or 'none'}"
        )
    files = ImageFiles(images or path.parent)
    lines: dict[Path, int] = {}
    records = []
    for number, row in rows:
        where = f"{path}: line {number}"
        file, name, split = _cells(row, image, label, where)
        place = _placed_image(files, file, built, where)
        if place in lines:
            raise ValueError(
                f"{where}: image {place} is in line {lines[place]} already; give each one once"
            )
        lines[place] = number
        records.append(Labelled(place, name, split))
    if not records:
        raise ValueError(f"{path}: expected rows, got a header only")
    return records


def _cells(
    row: Mapping[str, str | None], image: str, label: str, where: str
) -> tuple[str, str, str | None]:
    """(image, label, split) of a row."""
    file, name, split = ((row.get(column) or "").strip() for column in (image, label, "split"))
    if not file or not name:
        raise ValueError(f"{where}: expected an image and a label")
    if not name.isprintable() or "answer>" in name:
        raise ValueError(f"{where}: expected a label of one line, got {name!r:.80}")
    if split and split.lower() not in SPLIT_NAMES:
        raise ValueError(f"{where}: split: expected train or test, got {split!r}")
    return file, name, SPLIT_NAMES.get(split.lower())


def _placed_image(files: ImageFiles, file: str, built: Built, where: str) -> Path:
    """The path of an image in a CSV file. Relative paths start at the folder of `files`."""
    place = Path(placed(files.folder, file))
    if is_address(file) and not PureWindowsPath(file).drive:
        raise ValueError(f"{where}: image {file:.200}: {NOT_DOWNLOADED}")
    if os.path.isfile(place):
        return place
    path, rule = files.find(file)
    if path is None:
        raise ValueError(f"{where}: image {file:.200}: expected one file, several match")
    if not rule:
        return place
    built.convert(rule, file)
    return path


def read_flowers102(root: Path, built: Built) -> list[Labelled]:
    """Read jpg/image_00001.jpg, imagelabels.mat and setid.mat. Train and valid become "train"."""
    (labels,) = _matlab(root, "imagelabels.mat", "labels")
    sets = _matlab(root, "setid.mat", "trnid", "valid", "tstid")
    rows = []
    where = f"{root / 'setid.mat'}: image"
    for split, numbers in (("train", [*sets[0], *sets[1]]), ("test", sets[2])):
        for number in sorted(_number_up_to(len(labels), n, where) for n in numbers):
            about = f"{root / 'imagelabels.mat'}: label of image {number}"
            label = FLOWERS[_number_up_to(len(FLOWERS), labels[number - 1], about) - 1]
            rows.append(Labelled(root / "jpg" / f"image_{number:05d}.jpg", label, split))
    return rows


def read_aircraft(root: Path, built: Built) -> list[Labelled]:
    """Read FGVC-Aircraft: data/images/*.jpg, data/images_variant_trainval.txt and ..._test.txt."""
    folder = root / "data" if (root / "data").is_dir() else root
    rows = []
    for split, name in (("train", "trainval"), ("test", "test")):
        for line in _lines(folder / f"images_variant_{name}.txt", "FGVC-Aircraft"):
            number, _, label = line.partition(" ")
            rows.append(Labelled(folder / "images" / f"{number}.jpg", label.strip(), split))
    return rows


def read_cars196(root: Path, built: Built) -> list[Labelled]:
    """Read Stanford Cars: cars_train/, cars_test/, devkit/cars_meta.mat and cars_train_annos.mat,
    and cars_test_annos_withlabels.mat, in the root or in devkit/."""
    (names,) = _matlab(root, "cars_meta.mat", "class_names")
    rows = []
    files = {"train": "cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    for split, file in files.items():
        (records,) = _matlab(root, file, "annotations")
        fields = records.dtype.names or ()
        if not {"class", "fname"} <= set(fields):
            raise ValueError(
                f"{root}: {file}: expected annotations with class and fname, got "
                f"{', '.join(fields) or 'none'}; take the file with labels"
            )
        for number, record in enumerate(records, start=1):
            where = f"{root}: {file}: annotation {number}"
            kind = _number_up_to(len(names), _only(record["class"], where), f"{where}: class")
            image = root / f"cars_{split}" / str(_only(record["fname"], where))
            rows.append(Labelled(image, str(_only(names[kind - 1], where)), split))
    return rows


def read_pets37(root: Path, built: Built) -> list[Labelled]:
    """Read Oxford-IIIT Pet: images/*.jpg, annotations/trainval.txt and test.txt."""
    rows = []
    for split, file in (("train", "trainval.txt"), ("test", "test.txt")):
        for line in _lines(root / "annotations" / file, "Oxford-IIIT Pet"):
            if line.startswith("#"):
                continue
            name = line.split()[0]
            label = name.rpartition("_")[0].replace("_", " ")
            rows.append(Labelled(root / "images" / f"{name}.jpg", label, split))
    return rows


READERS: dict[str, Callable[[Path, Built], list[Labelled]]] = {
    "folder": read_folder, "csv": read_csv, "flowers102": read_flowers102,
    "aircraft": read_aircraft, "cars196": read_cars196, "pets37": read_pets37,
}  # fmt: skip


def _matlab(root: Path, name: str, *fields: str) -> list[np.ndarray]:
    """The fields of a MATLAB file, each as a flat array."""
    from scipy.io import loadmat

    path = next((p for p in (root / name, root / "devkit" / name) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{root}: expected {name} in it or in its devkit/")
    with expecting(f"{path}: expected a MATLAB file"):
        data = loadmat(path)
    missing = [field for field in fields if field not in data]
    if missing:
        got = ", ".join(name for name in data if not name.startswith("__")) or "none"
        raise ValueError(f"{path}: expected the field {missing[0]}, got {got}")
    return [np.asarray(data[field]).ravel() for field in fields]


def _number_up_to(limit: int, value: Any, where: str) -> int:
    """The value as an integer from 1 to `limit`.

    Raises:
        ValueError: it isn't one.
    """
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if not 1 <= number <= limit:
        raise ValueError(f"{where}: expected a number from 1 to {limit}, got {value!s:.60}")
    return number


def _only(cell: object, where: str) -> Any:
    """The single value in a MATLAB cell."""
    values = np.asarray(cell).ravel()
    if len(values) != 1:
        raise ValueError(f"{where}: expected one value, got {cell!r:.60}")
    return values.item()


def _lines(path: Path, what: str) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the layout of {what}'s archive")
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def plan_classification(
    rows: Sequence[Labelled],
    *,
    thing: str,
    kind: str,
    seed: int,
    shots: int | None = None,
    test_share: float = 0.0,
    built: Built | None = None,
) -> dict[str, list[Plan]]:
    """Split -> rows that ask for the class.

    Args:
        thing, kind: words in the question, e.g. "plant" and "species".
        shots: sample at most this many images per class for "train"; None: use all.
        test_share: share of each class that goes to "test" if the source has no splits.
        built: records classes with fewer than `shots` images.
    Raises:
        ValueError: the source has splits and `test_share` isn't 0.
    """
    if test_share and rows and all(row.split for row in rows):
        raise ValueError("--test_share: the source has splits of its own; leave it out")
    rng = random.Random(seed)
    splits = {name: [row for row in rows if row.split == name] for name in ("train", "test")}
    for unsplit in _by_label([row for row in rows if row.split is None]).values():
        of_class = rng.sample(unsplit, len(unsplit))
        held_out = round(test_share * len(of_class))
        splits["test"] += of_class[:held_out]
        splits["train"] += of_class[held_out:]
    if shots is not None:
        by_label = _by_label(splits["train"])
        few = {
            label: len(of_class) for label, of_class in by_label.items() if len(of_class) < shots
        }
        if built is not None:
            built.note_few(few, shots)
        sampled = (rng.sample(rows, min(shots, len(rows))) for rows in by_label.values())
        splits["train"] = [row for of_class in sampled for row in of_class]
    rng.shuffle(splits["train"])
    problem = classification_problem(thing, kind)
    return {
        name: [
            Plan(r.image, {"problem": problem, "solution": f"<answer>{r.label}</answer>",
                           "label": r.label})
            for r in rows
        ]
        for name, rows in splits.items()
        if rows or test_share  # writing raises if a requested split is empty
    }  # fmt: skip


def _by_label(rows: Iterable[Labelled]) -> dict[str, list[Labelled]]:
    """Label -> its rows, sorted by label."""
    by_label: dict[str, list[Labelled]] = defaultdict(list)
    for row in rows:
        by_label[row.label].append(row)
    return dict(sorted(by_label.items()))
