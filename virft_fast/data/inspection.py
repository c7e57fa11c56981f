"""Inspect a data set: statistics for the terminal, and a contact sheet."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from virft_fast.batch import Sample
from virft_fast.data.drawing import TRUE, contact_sheet, draw_boxes
from virft_fast.data.images import IMAGE_FORMATS
from virft_fast.data.samples import BadRow, SampleDataset, open_samples
from virft_fast.data.streaming import ParquetRows
from virft_fast.data.survey import open_space, survey
from virft_fast.data.writing import make_folder
from virft_fast.tasks import BOX_TASKS, parse_detection
from virft_fast.tasks.answers import answer_text
from virft_fast.tasks.prompts import category_in

if TYPE_CHECKING:
    import datasets

MAX_SHOWN = 10


@dataclass
class Inspection:
    """Statistics of a split.

    Attributes:
        task: the task of the solutions.
        rows, usable: numbers of rows.
        bad: the unusable rows, with reasons.
        sizes: (width, height) of every image.
        images_a_row: number of images -> number of rows.
        subjects: category or class -> number of rows.
        boxes_a_row: number of true boxes -> number of rows.
        pictures: images of some samples, with their boxes drawn, and captions.
        table: what a run would keep, leave out and convert.
    """

    task: str
    rows: int
    usable: int = 0
    bad: list[BadRow] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    images_a_row: Counter[int] = field(default_factory=Counter)
    subjects: Counter[str] = field(default_factory=Counter)
    boxes_a_row: Counter[int] = field(default_factory=Counter)
    pictures: list[tuple[Image.Image, str]] = field(default_factory=list)
    table: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The statistics as lines for the terminal."""
        lines = [f"task {self.task}, {self.usable} usable of {self.rows} rows"]
        if self.sizes:
            widths, heights = zip(*self.sizes, strict=True)
            lines.append(f"{len(self.sizes)} images: width {_spread(widths)}, height "
                         f"{_spread(heights)}")  # fmt: skip
            lines.append(f"images per row: {_counts(self.images_a_row)}")
        if self.boxes_a_row:
            lines.append(f"true boxes per row: {_counts(self.boxes_a_row)}")
        if self.subjects:
            common = ", ".join(f"{n} {c}" for n, c in self.subjects.most_common(MAX_SHOWN))
            left = len(self.subjects) - MAX_SHOWN
            more = f" and {left} more" if left > 0 else ""
            lines.append(f"{len(self.subjects)} subjects: {common}{more}")
        lines += [f"row {row.index} can't be used: {row.reason}" for row in self.bad[:MAX_SHOWN]]
        return [*lines, *self.table]

    def sheet(self) -> Image.Image:
        return contact_sheet(self.pictures)


def check_picture(path: Path) -> None:
    """Check, before the work starts, that an image can be saved to `path`.

    Raises:
        ValueError: it can't be saved there.
    """
    kinds = Image.registered_extensions()
    if kinds.get(path.suffix.lower()) not in IMAGE_FORMATS:
        raise ValueError(f"--output {path}: expected a picture's name, such as sheet.png")
    make_folder(path.parent)
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f"--output {path}: expected a file that can be written")


def inspect(
    rows: datasets.Dataset | ParquetRows,
    *,
    task: str = "auto",
    pictures: int = 20,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda indices: indices,
    box_space: str = "auto",
) -> Inspection:
    """Read every row once and collect statistics.

    Args:
        rows: from `load_rows`.
        pictures: number of samples on the sheet, evenly spaced.
        box_space: as in training. If training would refuse it, the table has a warning.
    """
    samples, task = open_samples(rows, task, box_space)
    result = Inspection(task, len(samples), table=_table(samples, task, box_space))
    step = max(1, len(samples) // max(1, pictures))
    for index in progress(range(len(samples))):
        sample = samples.get(index)
        if isinstance(sample, BadRow):
            result.bad.append(sample)
            continue
        result.usable += 1
        result.sizes += [image.size for image in sample.images]
        result.images_a_row[len(sample.images)] += 1
        result.subjects[subject(sample, task)] += 1
        read = parse_detection(sample.solution, sample.columns.get("extent"))
        boxes = read.boxes if read else ()
        if task in BOX_TASKS:
            result.boxes_a_row[len(boxes)] += 1
        if sample.images and index % step == 0 and len(result.pictures) < pictures:
            shown = draw_boxes(sample.images[0], boxes, TRUE)
            result.pictures.append((shown, f"{index}: {subject(sample, task)}"))
    return result


def _table(samples: SampleDataset, task: str, box_space: str) -> list[str]:
    surveyed = survey(samples, boxes=open_space(task, box_space))
    try:
        surveyed.settle_boxes()
        if task == "classification":
            samples.classes()
    except ValueError as error:
        surveyed.account.notes.append(f"warning: {error}")
    return surveyed.table("training", task)


def subject(sample: Sample, task: str) -> str:
    """The subject of a row's question, in a few words."""
    if task not in BOX_TASKS:
        return answer_text(sample.solution)
    problem, columns = sample.columns["problem"], sample.columns
    return category_in(problem) or str(columns.get("category") or problem)[:80]


def _spread(values: Sequence[int]) -> str:
    return f"{min(values)} to {max(values)} (median {statistics.median(values):g})"


def _counts(counter: Counter[int]) -> str:
    return ", ".join(f"{key} in {counter[key]} rows" for key in sorted(counter))
