"""What is asked, from an annotation file or a data set, and a digest of it: answers that are there
hold as long as the questions and the images they are about are the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from virft_fast import dist, tasks
from virft_fast.batch import Sample
from virft_fast.config import EvalConfig, column_names
from virft_fast.data import SampleDataset, first_solutions, load_rows
from virft_fast.data.accounts import Built
from virft_fast.data.coco import pick_categories, pick_names
from virft_fast.data.instances import NO_AREA, NO_BOX, read_annotations
from virft_fast.data.layouts import IMAGE_COLUMNS, IMAGE_TAG
from virft_fast.data.samples import plain_rows
from virft_fast.data.survey import open_space, survey
from virft_fast.evaluation.detection import Truth, make_truth
from virft_fast.evaluation.journal import Record
from virft_fast.evaluation.questions import (
    ExistsMap,
    Images,
    detection_rows,
    files_of,
    find_images,
    other_size,
    read_exists_map,
)
from virft_fast.tasks.labels import ClosedSet
from virft_fast.tasks.prompts import category_in

logger = logging.getLogger(__name__)
_TEXT_COLUMNS = (
    "problem", "prompt", "conversations", "solution", "extent", "category", "image_id", "messages",
    "query", "history", "system", "answer", "response", "reward_model", "completion",
)  # fmt: skip


@dataclass
class Questions:
    """What is asked, and what is known of the answers.

    Attributes:
        rows: of `load_rows`, or made from annotations.
        task: detection, classification or grounding.
        indices: the rows that are asked about.
        digest: changes with the questions and their images; on the main process.
        check: sample -> what is wrong with it, or None.
        truth: what COCO's protocol measures against, where the annotations say it.
        labels: the closed set of a classification.
        image_ids: of each row of a data set, as whole numbers.
        counts: what was left out, by name. missing: files of images that are not there.
        compat_prompt: see `SampleDataset`.
    """

    rows: Any
    task: str
    indices: Sequence[int]
    digest: str
    check: Callable[[Sample], str | None] | None = None
    truth: Truth | None = None
    labels: ClosedSet | None = None
    image_ids: Sequence[int] | None = None
    counts: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    compat_prompt: bool = False
    box_space: str = "thousandths"

    def samples(self) -> SampleDataset:
        return SampleDataset(
            self.rows,
            check_solution=partial(tasks.check_solution, self.task),
            compat_prompt=self.compat_prompt,
            box_space=self.box_space,
        )


def images_of(config: EvalConfig) -> Images:
    """The images that an annotation file names."""
    annotations = read_annotations(Path(config.annotations), config.task, Path(config.images))
    categories = pick_categories(annotations, config.task, config.categories)
    exists, unknown = None, {}
    if config.exists_map:
        exists, unknown = read_exists_map(
            Path(config.exists_map), files_of(annotations), annotations.categories.values()
        )
    found = find_images(
        annotations,
        categories,
        only=exists,
        allow_missing=config.allow_missing,
    )
    if dist.is_main():
        for line in annotations.account.lines():
            logger.warning("--annotations %s: %s", config.annotations, line)
    return replace(found, exists=exists, counts=unknown)


def of_annotations(
    config: EvalConfig, images: Images, exists: ExistsMap | None, extent_for: Any
) -> Questions:
    """About the images of an annotation file. The truth is all of its images but the missing."""
    annotations = images.annotations
    rows = detection_rows(images, exists=exists, extent_for=extent_for)
    if not len(rows) and config.exists_map:
        raise ValueError(
            f"--exists_map {config.exists_map}: expected some of the chosen categories in it "
            f"({', '.join(images.names[:5])}, ...), got none; without a question there is no answer"
        )
    chosen = {number: annotations.categories[number] for number in images.categories}
    there = {
        number: {**record, "id": number}
        for number, record in annotations.images.items()
        if number not in images.missing and number not in images.unclear
    }
    indices = range(len(rows))
    if 0 < config.max_samples < len(rows):
        # Nothing is missed in images that were not asked about, or about half of them.
        indices = range(_whole_images(rows, config.max_samples))
        asked = {rows[index]["image_id"] for index in indices}
        there = {number: record for number, record in there.items() if number in asked}
    said = None if exists is None else sorted((key, list(value)) for key, value in exists.items())
    return Questions(
        rows,
        "detection",
        indices,
        digest_of([*images_stamp(config, images), said]),
        check=partial(other_size, annotations),
        truth=make_truth(there, chosen, annotations.records),
        counts={
            "images": len(there),
            "images missing": len(images.missing),
            "boxes that can't be used": annotations.bad_boxes,
            **_account(annotations.account),
            **images.counts,
        },
        missing=[str(path) for path in images.missing.values()],
    )


def _account(account: Built) -> dict[str, int]:
    """What was left out and converted, by name; boxes are counted on their own."""
    left_out = {f"left out, {why}": len(items) for why, items in account.left_out.items()
                if why not in (NO_BOX, NO_AREA)}  # fmt: skip
    return left_out | {f"converted, {how}": len(i) for how, i in account.converted.items()}


def _whole_images(rows: Any, most: int) -> int:
    """How many of the first rows to ask so that every image is asked about as a whole: at most so
    many, but for the first image."""
    count = most
    while count and rows[count]["image_id"] == rows[count - 1]["image_id"]:
        count -= 1
    while not count or (count < len(rows) and rows[count]["image_id"] == rows[0]["image_id"]):
        count += 1
    return count


def of_dataset(config: EvalConfig) -> Questions:
    """About the rows of a data set."""
    rows = load_rows(
        config.dataset_name,
        config.split,
        dataset_config=config.dataset_config,
        columns=column_names(config.columns),
    )
    task = "detection" if config.task in ("coco", "lvis") else config.task
    samples = SampleDataset(rows, compat_prompt=config.compat_prompt)  # refuses other columns
    if task == "auto":
        task = tasks.detect_task(first_solutions(samples))
    texts = [name for name in _TEXT_COLUMNS if name in rows.column_names]
    table = rows.select_columns(texts).with_format("arrow")
    digest, records = hashlib.sha256(), []
    for part in table.iter(1000):
        plain = plain_rows(part)
        records += plain
        digest.update(json.dumps(plain, default=str).encode())
    if dist.is_main():
        tagged = [_file_stamp(path) for record in records for path in _tagged_images(record)]
        digest.update(json.dumps([tagged, content_stamp(rows, IMAGE_COLUMNS)]).encode())
    if config.box_space not in ("auto", "thousandths"):
        digest.update(config.box_space.encode())
    labels = samples.classes() if task == "classification" else None
    indices, unknown = range(len(rows)), {}
    if config.categories != "all" or config.exists_map:
        indices, unknown = _chosen(config, records)
    questions = Questions(
        rows,
        task,
        _first(indices, config),
        digest.hexdigest()[:16],
        labels=labels,
        compat_prompt=config.compat_prompt,
        box_space="thousandths" if config.box_space == "auto" else config.box_space,
        image_ids=_image_ids(records),
        counts=unknown,
    )
    _tell(config, questions)
    return questions


def _tell(config: EvalConfig, questions: Questions) -> None:
    """The table of what is asked, left out and converted.

    Raises:
        ValueError: --box_space auto, and boxes look like pixels or shares.
    """
    boxes = open_space(questions.task, config.box_space)
    found = survey(questions.samples(), boxes=boxes)
    warned = found.settle_boxes()
    changed = found.account.left_out or found.account.converted or warned
    if dist.is_main() and changed:
        for line in [*found.lines(config.split), *([warned] if warned else [])]:
            logger.warning(line)


def _tagged_images(record: Record) -> list[str]:
    turns = record.get("conversations")
    turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return [path.strip() for turn in turns for path in IMAGE_TAG.findall(str(turn.get("value")))]


def _image_ids(records: Sequence[Record]) -> list[int]:
    """The rows' own where all are whole numbers, as in COCO; else new ones, and for a row without
    one that of no other."""
    given = [record.get("image_id") for record in records]
    if all(type(image) is int for image in given):
        return given
    known: dict[Any, int] = {}
    keys = [(n,) if image is None else repr(image) for n, image in enumerate(given)]
    return [known.setdefault(key, len(known)) for key in keys]


def _chosen(config: EvalConfig, records: Sequence[Record]) -> tuple[list[int], dict[str, int]]:
    """The rows about the chosen categories, or what is said to exist of them; and what the map has
    beside."""
    names = [category_of(record) if record else None for record in records]
    known = sorted({name for name in names if name is not None})
    wanted = pick_names(known, known, config.task, config.categories)
    exists, unknown = None, {}
    ids = [record.get("image_id") for record in records]
    images = [image if isinstance(image, (int, str)) else None for image in ids]
    if config.exists_map:
        numbers = {image for image, record in zip(images, records, strict=True) if record}
        if not numbers or None in numbers:
            raise ValueError(
                f"--exists_map: expected an image_id in every row of {config.dataset_name}; "
                "build it with python -m virft_fast.data build, or pass --annotations"
            )
        files = {number: str(number) for number in numbers}
        exists, unknown = read_exists_map(Path(config.exists_map), files, known)
    chosen = [
        index
        for index, (name, image) in enumerate(zip(names, images, strict=True))
        if name is None  # unreadable: asked about, and so counted
        or (name in wanted and (exists is None or name in exists.get(image, ())))
    ]
    if not chosen:
        raise ValueError(
            f"--exists_map {config.exists_map}: expected some of what the rows ask about in it "
            f"({', '.join(wanted[:5])}, ...), got none; without a question there is no answer"
        )
    return chosen, unknown


def _first(indices: Sequence[int], config: EvalConfig) -> Sequence[int]:
    return indices[: config.max_samples or len(indices)]


def category_of(record: Record) -> str:
    """Also where the rows don't name it."""
    asked = str(record.get("problem") or record.get("prompt"))
    return str(record.get("category") or category_in(asked) or "object")


# --- What has changed --------------------------------------------------------------------------


def digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def content_stamp(rows: Any, names: Sequence[str]) -> str:
    """Changes with the images in these columns, stored or in files."""
    names = [name for name in names if name in rows.column_names]
    digest = hashlib.sha256()
    # Few at a time: images may be large.
    for part in rows.select_columns(names).with_format("arrow").iter(100) if names else ():
        for row in plain_rows(part):
            digest.update(json.dumps([_image_stamp(image) for image in row.values()]).encode())
    return digest.hexdigest()


def _image_stamp(image: Any) -> Any:
    if isinstance(image, Mapping):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, list):
        return [_image_stamp(one) for one in image]
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    return _file_stamp(image) if isinstance(image, str) else str(image)


def _file_stamp(path: str | Path) -> list[Any]:
    try:
        stat = Path(path).stat()
    except (OSError, ValueError):  # there is no such file, or no such name
        return [str(path)]
    return [str(path), stat.st_size, stat.st_mtime_ns]


def images_stamp(config: EvalConfig, images: Images) -> list[Any]:
    """Changes with the annotations, and with the images and categories that are asked about."""
    file = hashlib.sha256(Path(config.annotations).read_bytes()).hexdigest()
    stamps = [[number, *_file_stamp(path)] for number, path in images.paths.items()]
    return [file, stamps, list(images.categories)]
