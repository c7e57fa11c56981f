"""What is in a data set: numbers for the terminal and a sheet of pictures."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from virft_fast.batch import Sample
from virft_fast.data.drawing import TRUE, contact_sheet, draw_boxes
from virft_fast.data.images import IMAGE_FORMATS
from virft_fast.data.loading import BadRow, SampleDataset, first_solutions
from virft_fast.data.survey import open_space, survey
from virft_fast.data.writing import make_folder
from virft_fast.tasks import BOX_TASKS, check_solution, detect_task, parse_detection
from virft_fast.tasks.answers import answer_text
from virft_fast.tasks.prompts import category_in

MOST_COMMON = 10


@dataclass
class Inspection:
    """Figures of a split.

    Attributes:
        task: which the solutions belong to.
        rows, usable: numbers of rows; the rest is in `bad`.
        bad: what is wrong with the others.
        sizes: (width, height) of every image.
        images_a_row: number of images -> number of rows.
        subjects: category or class -> number of rows.
        boxes_a_row: number of true boxes -> number of rows.
        pictures: some samples with their boxes drawn, and a caption each.
        table: what a run would keep, leave out and convert.
    """

    task: str
    rows: int
    usable: int = 0
    bad: list[BadRow] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    images_a_row: Counter = field(default_factory=Counter)
    subjects: Counter = field(default_factory=Counter)
    boxes_a_row: Counter = field(default_factory=Counter)
    pictures: list[tuple[Image.Image, str]] = field(default_factory=list)
    table: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For the terminal."""
        lines = [f"task {self.task}, {self.usable} usable of {self.rows} rows"]
        if self.sizes:
            widths, heights = zip(*self.sizes, strict=True)
            lines.append(
                f"images {len(self.sizes)}: width {_spread(widths)}, height {_spread(heights)}"
            )
            lines.append(f"images a row: {_counts(self.images_a_row)}")
        if self.boxes_a_row:
            lines.append(f"true boxes a row: {_counts(self.boxes_a_row)}")
        if self.subjects:
            common = ", ".join(f"{n} {c}" for n, c in self.subjects.most_common(MOST_COMMON))
            left = len(self.subjects) - MOST_COMMON
            more = f" and {left} more" if left > 0 else ""
            lines.append(f"{len(self.subjects)} categories: {common}{more}")
        lines += [f"row {row.index} can't be used: {row.reason}" for row in self.bad[:MOST_COMMON]]
        return [*lines, *self.table]

    def sheet(self) -> Image.Image:
        return contact_sheet(self.pictures)


def check_picture(path: Path) -> None:
    """Better before the work than after it.

    Raises:
        ValueError: no picture can be saved there.
    """
    kinds = Image.registered_extensions()
    if kinds.get(path.suffix.lower()) not in IMAGE_FORMATS:
        raise ValueError(f"--output {path}: expected a picture's name, such as sheet.png")
    make_folder(path.parent)
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f"--output {path}: expected a file that can be written")


def inspect(
    rows: Any,
    *,
    task: str = "auto",
    pictures: int = 20,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda indices: indices,
    box_space: str = "auto",
) -> Inspection:
    """Go through every row once.

    Args:
        rows: of `load_rows`.
        pictures: how many samples the sheet shows, evenly spread.
        box_space: as in training; what training would refuse is said in the table.
    """
    space = "thousandths" if box_space == "auto" else box_space
    if task == "auto":
        task = detect_task(first_solutions(SampleDataset(rows, box_space=space)))
    samples = SampleDataset(rows, check_solution=partial(check_solution, task), box_space=space)
    found = Inspection(task, len(samples), table=_table(samples, task, box_space))
    step = max(1, len(samples) // max(1, pictures))
    for index in progress(range(len(samples))):
        sample = samples.get(index)
        if isinstance(sample, BadRow):
            found.bad.append(sample)
            continue
        found.usable += 1
        found.sizes += [image.size for image in sample.images]
        found.images_a_row[len(sample.images)] += 1
        found.subjects[subject(sample, task)] += 1
        boxes = true_boxes(sample)
        if task in BOX_TASKS:
            found.boxes_a_row[len(boxes)] += 1
        if sample.images and index % step == 0 and len(found.pictures) < pictures:
            shown = draw_boxes(sample.images[0], boxes, TRUE)
            found.pictures.append((shown, f"{index}: {subject(sample, task)}"))
    return found


def _table(samples: SampleDataset, task: str, box_space: str) -> list[str]:
    surveyed = survey(samples, boxes=open_space(task, box_space))
    try:
        warned = surveyed.settle_boxes()
        if task == "classification":
            samples.classes()
    except ValueError as error:
        warned = str(error)
    return [*surveyed.table("a run", task), *([f"  warning: {warned}"] if warned else [])]


def subject(sample: Sample, task: str) -> str:
    """What a row asks about, in a few words."""
    if task not in BOX_TASKS:
        return answer_text(sample.solution)
    problem, columns = sample.columns["problem"], sample.columns
    return category_in(problem) or str(columns.get("category") or problem)[:80]


def true_boxes(sample: Sample) -> list[Any]:
    """The solution's boxes in 0..1000."""
    read = parse_detection(sample.solution, sample.columns.get("extent"))
    return list(read.boxes) if read else []


def _spread(values: Sequence[int]) -> str:
    return f"{min(values)} to {max(values)} (median {statistics.median(values):g})"


def _counts(counter: Counter) -> str:
    return ", ".join(f"{key}: {counter[key]}" for key in sorted(counter))
