"""The questions of an evaluation, from an annotation file or a data set, and their digest.

Earlier answers stay valid as long as the questions and their images have the same digest.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from virft_fast import dist, tasks
from virft_fast.batch import Json, Row, Sample
from virft_fast.config import EvalConfig, column_names
from virft_fast.data import SampleDataset, load_rows
from virft_fast.data.accounts import Built
from virft_fast.data.coco import pick_categories, pick_names
from virft_fast.data.instances import NO_AREA, NO_BOX, read_annotations
from virft_fast.data.layouts import IMAGE_COLUMNS, IMAGE_TAG
from virft_fast.data.samples import open_samples, plain_rows
from virft_fast.data.survey import open_space, survey
from virft_fast.digests import digest_of, file_stamp, image_stamp, json_digest
from virft_fast.evaluation import questions
from virft_fast.evaluation.detection import Truth, make_truth
from virft_fast.evaluation.questions import ExistsMap, ExtentFor, Images, Rows, find_images
from virft_fast.tasks.labels import ClosedSet
from virft_fast.tasks.prompts import category_in

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)
_TEXT_COLUMNS = (
    "problem", "prompt", "conversations", "solution", "extent", "category", "image_id", "messages",
    "query", "history", "system", "answer", "response", "reward_model", "completion",
)  # fmt: skip


@dataclass
class Questions:
    """The questions, and what measuring the answers needs.

    Attributes:
        rows: from `load_rows`, or made from annotations.
        task: detection, classification, grounding, choice or number.
        indices: the rows to ask about.
        digest: changes with the questions and their images; valid on the main process only.
        check: sample -> what is wrong with it, or None.
        truth: for COCO's protocol, if there are annotations.
        labels: the closed set of a classification.
        image_ids: integers, one for each row of a data set.
        counts: what was left out, by name. missing: files of the missing images.
        compat_prompt, box_space: see `SampleDataset`.
    """

    rows: datasets.Dataset | Rows
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


def images_of(config: EvalConfig) -> Images | None:
    """The images of an annotation file; None without --annotations.

    Raises:
        ValueError, FileNotFoundError: annotations, images or --exists_map can't be used.
    """
    if config.annotations is None or config.images is None:  # both are given or neither
        return None
    annotations = read_annotations(Path(config.annotations), config.task, Path(config.images))
    categories = pick_categories(annotations, config.task, config.categories)
    files = {number: record["file"] for number, record in annotations.images.items()}
    names = annotations.categories.values()
    exists, unknown = questions.read_exists_map(config.exists_map, files, names)
    images = find_images(annotations, categories, only=exists, allow_missing=config.allow_missing)
    if dist.is_main():
        for line in annotations.account.lines():
            logger.warning("--annotations %s: %s", config.annotations, line)
    digest = digest_of([Path(config.annotations).read_bytes()])
    return replace(images, exists=exists, counts=unknown, digest=digest)


def of_annotations(
    config: EvalConfig, images: Images, exists: ExistsMap | None, extent_for: ExtentFor | None
) -> Questions:
    """Questions about the images of an annotation file. The truth covers all images with a file,
    including those without a question.

    Raises:
        ValueError: there is nothing to ask.
    """
    annotations = images.annotations
    rows = questions.detection_rows(images, exists=exists, extent_for=extent_for)
    if not len(rows) and config.exists_map:
        raise ValueError(
            f"--exists_map {config.exists_map}: expected some of the chosen categories in it "
            f"({', '.join(images.names[:5])}, ...), got none; without a question there is no answer"
        )
    chosen = {number: annotations.categories[number] for number in images.categories}
    present = {
        number: {**record, "id": number}
        for number, record in annotations.images.items()
        if number not in images.missing and number not in images.unclear
    }
    indices = range(len(rows))
    if 0 < config.max_samples < len(rows):
        # Objects must not count as missed in images whose questions aren't all asked.
        indices = range(_whole_images(rows, config.max_samples))
        covered = {rows[index]["image_id"] for index in indices}
        present = {number: record for number, record in present.items() if number in covered}
    listed = None if exists is None else sorted((key, list(value)) for key, value in exists.items())
    return Questions(
        rows,
        "detection",
        indices,
        json_digest([*images_stamp(images), listed]),
        check=partial(questions.other_size, annotations),
        truth=make_truth(present, chosen, annotations.records),
        counts={
            "images": len(present),
            "images missing": len(images.missing),
            "boxes that can't be used": annotations.bad_boxes,
            **_account(annotations.account),
            **images.counts,
        },
        missing=[str(path) for path in images.missing.values()],
    )


def _account(account: Built) -> dict[str, int]:
    """How many items were left out or converted, by name; boxes are counted separately."""
    items = account.left_out.items()
    left_out = {f"left out, {w}": len(i) for w, i in items if w not in (NO_BOX, NO_AREA)}
    return left_out | {f"converted, {how}": len(i) for how, i in account.converted.items()}


def _whole_images(rows: Rows, limit: int) -> int:
    """How many of the first rows to ask, so that every image has all of its questions or none. At
    most `limit`, but always all questions of the first image."""
    count = limit
    while count and rows[count]["image_id"] == rows[count - 1]["image_id"]:
        count -= 1
    while not count or (count < len(rows) and rows[count]["image_id"] == rows[0]["image_id"]):
        count += 1
    return count


def of_presence(images: Images) -> Questions:
    """One question per image: which of the categories are in it."""
    rows = questions.presence_rows(images)
    digest = json_digest([*images_stamp(images), images.names])
    check = partial(questions.other_size, images.annotations)
    return Questions(rows, "presence", range(len(rows)), digest, check=check)


def of_dataset(config: EvalConfig) -> Questions:
    """Questions about the rows of a data set.

    Raises:
        ValueError, FileNotFoundError: the data set or --exists_map can't be used.
    """
    columns = column_names(config.columns)
    rows: datasets.Dataset = load_rows(
        config.source, config.split, dataset_config=config.dataset_config, columns=columns
    )
    task = "detection" if config.task in ("coco", "lvis") else config.task
    samples, task = open_samples(rows, task, "auto", compat_prompt=config.compat_prompt)
    chunks = list(_chunks(rows, _TEXT_COLUMNS, 1000))
    records = [record for chunk in chunks for record in chunk]
    texts = (json.dumps(chunk, default=str) for chunk in chunks)
    others: list[str] = []
    if dist.is_main():
        tagged = [file_stamp(path) for record in records for path in _tagged_images(record)]
        others.append(json.dumps([tagged, content_stamp(rows, IMAGE_COLUMNS)]))
    if config.box_space not in ("auto", "thousandths"):
        others.append(config.box_space)
    labels = samples.classes() if task == "classification" else None
    indices: Sequence[int] = range(len(rows))
    unknown: dict[str, int] = {}
    if config.categories != "all" or config.exists_map:
        indices, unknown = _chosen(config, records)
    built = Questions(
        rows,
        task,
        indices[: config.max_samples or len(indices)],
        digest_of(chain(texts, others))[:16],
        labels=labels,
        compat_prompt=config.compat_prompt,
        box_space="thousandths" if config.box_space == "auto" else config.box_space,
        image_ids=_image_ids(records),
        counts=unknown,
    )
    _warn_of_changes(config, task, built.samples())
    return built


def _warn_of_changes(config: EvalConfig, task: str, samples: SampleDataset) -> None:
    """Log what was left out and converted, if anything was.

    Raises:
        ValueError: --box_space auto, and boxes look like pixels or shares.
    """
    rows = survey(samples, boxes=open_space(task, config.box_space))
    warning = rows.settle_boxes()
    changed = rows.account.left_out or rows.account.converted or warning
    if dist.is_main() and changed:
        for line in rows.lines(config.split):
            logger.warning(line)


def _tagged_images(record: Row) -> list[str]:
    """Image paths in the texts of a conversation."""
    turns = record.get("conversations")
    turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return [path.strip() for turn in turns for path in IMAGE_TAG.findall(str(turn.get("value")))]


def _image_ids(records: Sequence[Row]) -> list[int]:
    """The rows' `image_id` if all are integers, as in COCO. Otherwise new numbers: equal ids share
    one, and each row without an id gets its own."""
    given = [record.get("image_id") for record in records]
    whole = [image for image in given if type(image) is int]
    if len(whole) == len(given):
        return whole
    numbers: dict[object, int] = {}
    keys = [(n,) if image is None else repr(image) for n, image in enumerate(given)]
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _chosen(config: EvalConfig, records: Sequence[Row]) -> tuple[list[int], dict[str, int]]:
    """The rows about the chosen categories (with --exists_map, only those in the map), and the
    numbers of unknown images and categories in the map."""
    names = [category_of(record) if record else None for record in records]
    categories = sorted({name for name in names if name is not None})
    chosen = pick_names(categories, categories, config.task, config.categories)
    exists: dict[int | str, list[str]] | None = None
    unknown: dict[str, int] = {}
    ids = [record.get("image_id") for record in records]
    images = [image if isinstance(image, (int, str)) else None for image in ids]
    if config.exists_map:
        given = [image for image, record in zip(images, records, strict=True) if record]
        files = {image: str(image) for image in given if image is not None}
        if not files or None in given:
            raise ValueError(
                f"--exists_map: expected an image_id in every row of {config.dataset_name}; "
                "build it with python -m virft_fast.data build, or pass --annotations"
            )
        exists, unknown = questions.read_exists_map(config.exists_map, files, categories)
    indices = [
        index
        for index, (name, image) in enumerate(zip(names, images, strict=True))
        if name is None  # an unreadable row, which then counts as a bad one
        or (exists is None and name in chosen)
        or (exists and image is not None and name in chosen and name in exists.get(image, ()))
    ]
    if not indices:
        raise ValueError(
            f"--exists_map {config.exists_map}: expected some of what the rows ask about in it "
            f"({', '.join(chosen[:5])}, ...), got none; without a question there is no answer"
        )
    return indices, unknown


def category_of(record: Row) -> str:
    """The category that a row or record is about: its own field, or parsed from its question."""
    problem = str(record.get("problem") or record.get("prompt"))
    return str(record.get("category") or category_in(problem) or "object")


def _chunks(rows: datasets.Dataset, names: Iterable[str], size: int) -> Iterator[list[Row]]:
    """Up to `size` rows at a time, with only those of the columns `names` that are present."""
    names = [name for name in names if name in rows.column_names]
    table = rows.select_columns(names).with_format("arrow")
    return (plain_rows(chunk) for chunk in table.iter(size)) if names else iter(())


def content_stamp(rows: datasets.Dataset, names: Iterable[str]) -> str:
    """A stamp that changes with the images in these columns, stored or in files."""
    # Only a few rows at a time, because images may be large.
    few = (row for chunk in _chunks(rows, names, 100) for row in chunk)
    return digest_of(json.dumps([image_stamp(image) for image in row.values()]) for row in few)


def images_stamp(images: Images) -> list[Json]:
    """A stamp that changes with the annotation file, and the images and categories to ask about."""
    stamps = [[number, *file_stamp(path)] for number, path in images.paths.items()]
    return [images.digest, stamps, list(images.categories)]
