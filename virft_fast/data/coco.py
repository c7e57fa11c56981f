"""Detection rows from annotated boxes: selecting categories, images and questions."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from virft_fast.batch import Row
from virft_fast.data.accounts import Built, listing
from virft_fast.data.image_files import WHERE_PATHS_START
from virft_fast.data.images import SIDEWAYS, as_shown
from virft_fast.data.instances import Annotations
from virft_fast.data.writing import ExtentFor, Plan
from virft_fast.tasks.coordinates import rescale, written
from virft_fast.tasks.prompts import CATEGORY_SETS, NOVEL_15, detection_problem, detection_solution


def pick_categories(annotations: Annotations, kind: str, wanted: str) -> list[int]:
    """Category ids for `all`, a named set (base65, novel15, few8, lvis13, lvis6), or names.

    Args:
        wanted: the command-line value: one name, or names separated by commas.
    Raises:
        ValueError: a name is unknown (the message lists similar ones), or a category has no boxes.
    """
    by_name = {name: number for number, name in annotations.categories.items()}
    seen = {category for _, category in annotations.boxes}
    with_boxes = {name for name, number in by_name.items() if number in seen}
    return [by_name[name] for name in pick_names(by_name, with_boxes, kind, wanted)]


def pick_names(labels: Iterable[str], seen: Collection[str], kind: str, wanted: str) -> list[str]:
    """Like `pick_categories`, but takes and returns names.

    Args:
        labels: names of all categories. seen: names of those with boxes.
    """
    labels = list(labels)
    if wanted == "all":
        names = [name for name in labels if name in seen]
        if not names:
            raise ValueError("--categories all: expected boxes in the annotations, got none")
    elif wanted == "base65" and kind == "coco":
        names = [name for name in labels if name not in NOVEL_15]
    elif wanted in labels:
        names = [wanted]
    else:
        names = [*CATEGORY_SETS[kind].get(wanted, ())] or [n.strip() for n in wanted.split(",")]
    unknown = [name for name in names if name not in labels]
    if unknown:
        sets = ["all", *(["base65"] if kind == "coco" else []), *CATEGORY_SETS[kind]]
        hints = [
            f"{name!r}" + (f" (did you mean {' or '.join(map(repr, close))}?)" if close else "")
            for name in unknown
            for close in [get_close_matches(name, [*labels, *sets], n=2, cutoff=0.6)]
        ]
        raise ValueError(
            f"--categories: the annotations have no {', '.join(hints)}; expected their names, "
            f"separated by commas, or {', '.join(sets)}"
        )
    empty = [name for name in names if name not in seen]
    if empty:
        raise ValueError(
            f"--categories: the annotations have no boxes of {listing(empty)}; leave these out"
        )
    return list(dict.fromkeys(names))


def same_categories(
    names: Iterable[str], annotations: Annotations, built: Built, split: str
) -> list[int]:
    """The ids of these categories in another split, without those that have no boxes there.

    Raises:
        ValueError: none of them has boxes.
    """
    numbers = {name: number for number, name in annotations.categories.items()}
    seen = {number for _, number in annotations.boxes}
    chosen = []
    for name in names:
        if numbers.get(name) in seen:
            chosen.append(numbers[name])
        else:
            built.leave_out(f"category without a box in the {split} annotations", name)
    if not chosen:
        raise ValueError(f"{split} annotations: no boxes of the chosen categories")
    return chosen


def image_paths(annotations: Annotations, images: Iterable[int]) -> dict[int, Path]:
    """Image id -> its file, which may not exist.

    Leaves out images whose path fits several files, and images that share a file. Both are recorded
    in `annotations.account`.
    """
    account = annotations.account
    places = {image: annotations.find(annotations.images[image]["file"]) for image in images}
    owners = Counter(path for path, _ in places.values())
    paths = {}
    for image, (path, rule) in places.items():
        file = annotations.images[image]["file"]
        if path is None:
            account.leave_out(rule, file)
        elif owners[path] > 1 and os.path.isfile(path):
            account.leave_out(f"several images with the same file; {WHERE_PATHS_START}", file)
        else:
            paths[image] = path
            if rule:
                account.convert(rule, file)
    return paths


def usable_images(
    annotations: Annotations, categories: Collection[int], built: Built, *, allow_missing: bool
) -> dict[int, Path]:
    """Image id -> file, for images with objects of these categories.

    Args:
        built: records the annotations' account and the missing images.
        allow_missing: leave out missing images before rows are sampled.
    """
    chosen, recorded = set(categories), set(built.left_out.get("image missing", ()))
    images = sorted({image for image, category in annotations.boxes if category in chosen})
    paths = image_paths(annotations, images)
    built.add(annotations.account)
    missing = {n: p for n, p in paths.items() if not os.path.isfile(p)} if allow_missing else {}
    for path in dict.fromkeys(map(str, missing.values())):
        if path not in recorded:
            built.leave_out("image missing", path)
    return {image: path for image, path in paths.items() if image not in missing}


def plan_detection(
    annotations: Annotations,
    images: Mapping[int, Path],
    categories: Sequence[int],
    *,
    seed: int,
    shots: int | None = None,
    max_rows: int | None = None,
    negatives: float = 0.0,
    extent_for: ExtentFor | None = None,
    built: Built | None = None,
) -> list[Plan]:
    """Plan one row per image and category in it, as in Visual-RFT's data sets.

    Args:
        images: id -> file of the images to use.
        shots: sample at most this many images per category; None: use all.
        max_rows: sample at most this many rows; None: use all.
        negatives: number of rows about an absent category, as a share of the other rows.
        extent_for: see `ExtentFor`; None: boxes are in 0..1000.
        built: records categories with fewer than `shots` images, such as LVIS's rare ones.
    """
    rng = random.Random(seed)
    chosen = set(categories)
    by_category: dict[int, list[int]] = {category: [] for category in categories}
    for image, category in sorted(annotations.boxes):
        complete = category not in annotations.incomplete.get(image, ())
        if category in chosen and image in images and complete:
            by_category[category].append(image)
    if shots is not None:
        few = {annotations.categories[c]: len(i) for c, i in by_category.items() if len(i) < shots}
        if built is not None:
            built.note_few(few, shots)
        by_category = {c: sorted(rng.sample(i, min(shots, len(i)))) for c, i in by_category.items()}
    pairs = [(image, category) for category, ids in by_category.items() for image in ids]
    rng.shuffle(pairs)
    if max_rows is not None:
        pairs = pairs[: max(1, round(max_rows / (1 + negatives)))]
    wanted = round(negatives * len(pairs))
    checked = annotations.negatives
    candidates = [
        (image, category)
        for image in sorted({image for image, _ in pairs})
        for category in categories
        if (image, category) not in annotations.marked
        and (checked is None or category in checked[image])
    ]
    absent = rng.sample(candidates, min(wanted, len(candidates)))
    if len(absent) < wanted and built is not None:
        built.notes.append(
            f"{len(absent)} rows without objects, not {wanted}: no more are known to have none"
        )
    pairs = [*pairs, *absent][:max_rows]
    rng.shuffle(pairs)
    return [
        _plan(annotations, images[image], image, category, extent_for) for image, category in pairs
    ]


def _plan(
    annotations: Annotations, path: Path, image: int, category: int, extent_for: ExtentFor | None
) -> Plan:
    record = annotations.images[image]
    size = (record["width"], record["height"])
    name = annotations.categories[category]
    problem = detection_problem(name, "pixels" if extent_for else "thousand")
    row = {"problem": problem, "category": name, "image_id": image}

    def fill(width: int, height: int, orientation: int) -> Row:
        extent = extent_for(width, height) if extent_for else (1000, 1000)
        shown = size[::-1] if orientation in SIDEWAYS else size
        boxes = []
        for box in annotations.boxes.get((image, category), []):
            xs, ys = zip(*as_shown((box[:2], box[2:]), size, orientation), strict=True)
            sides = rescale((min(xs), min(ys), max(xs), max(ys)), shown, extent)
            boxes.append(written(sides, extent))
        filled = {"solution": detection_solution(boxes)}
        return filled | ({"extent": [int(side) for side in extent]} if extent_for else {})

    return Plan(path, row, fill, annotations.frame, size if record["sized"] else None)
