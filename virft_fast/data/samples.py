"""The rows of a data set as samples, made on access, or the reason why a row can't be one.

Nothing from a data set is evaluated, unpickled or run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import virft_fast.data.layouts as layouts
from virft_fast.batch import Json, Row, Sample
from virft_fast.data.accounts import Built
from virft_fast.data.images import UnreadableImage, image_size, one_line, open_image
from virft_fast.data.layouts import IMAGE_COLUMNS, Reading, spoken_text
from virft_fast.data.streaming import ParquetRows
from virft_fast.data.turns import Unusable, non_empty, turn_text
from virft_fast.tasks import check_solution, detect_task, in_thousandths
from virft_fast.tasks.labels import ClosedSet, class_set
from virft_fast.tasks.rewards import CLASS_COLUMNS, is_class_set
from virft_fast.tasks.scoring import RESERVED

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa


@dataclass(frozen=True)
class BadRow:
    """A row that can't be used, and why."""

    index: int
    reason: str


class SampleDataset:
    """The rows of a data set as samples, made on access.

    Args:
        rows: the result of `load_rows`, or any sequence of mappings.
        check_solution: solution -> what is wrong with it, or None. If the row has `extent` or
            `choices`, they are passed by name.
        compat_prompt: prompt for a box in LISA's conversations exactly as the original does.
        first_exchange: use only the first question of a conversation and its answer.
        box_space: unit of boxes in rows without `extent`: thousandths, pixels (of the row's first
            image) or unit (0..1). Solutions are converted to thousandths.
    Raises:
        ValueError: no column holds the problem or the solution, or `compat_prompt` is set for data
            without conversations.
    """

    def __init__(
        self,
        rows: datasets.Dataset | ParquetRows | Sequence[Mapping[str, Json]],
        *,
        check_solution: Callable[..., str | None] | None = None,
        compat_prompt: bool = False,
        first_exchange: bool = False,
        box_space: str = "thousandths",
    ) -> None:
        self.streamed = isinstance(rows, ParquetRows)
        self._box_space = box_space
        self.rules = () if box_space == "thousandths" else (f"boxes in {box_space} to thousandths",)
        self.names: list[str] = list(
            rows.column_names
            if hasattr(rows, "column_names")
            else dict.fromkeys(name for row in rows for name in row)
        )
        layouts.check_columns(self.names, "data set")
        # The arrow format leaves images, audio and video as stored. Nothing is decoded needlessly,
        # and a corrupt image raises where it can be caught.
        self._rows = rows.with_format("arrow") if hasattr(rows, "with_format") else rows
        features: Mapping[str, object] = getattr(rows, "features", None) or {}
        with_images = {name for name, feature in features.items() if _has_image(feature)}
        self._image_columns = {*IMAGE_COLUMNS, *with_images}  # masks, too
        self.unread_images = sorted(with_images - {*IMAGE_COLUMNS, "mask"})
        # Columns that `datasets` stores as JSON text because their values differ in type.
        self._json_columns = [n for n, f in features.items() if type(f).__name__ == "Json"]
        # Answer column -> its class names. Rewards get other columns unchanged.
        answers = {name: feature for name, feature in features.items() if name in layouts.ANSWERS}
        self.class_names: dict[str, list[str]] = {
            name: listed for name, f in answers.items() if (listed := getattr(f, "names", None))
        }
        self._check_solution = check_solution
        self.account: Built | None = getattr(rows, "account", None)  # of reading the file
        self.image_folder: Path | None = getattr(rows, "image_folder", None)
        column = layouts.question_column({}, self.names)
        if compat_prompt and column != "conversations":
            raise ValueError(
                f"--compat_prompt: expected LISA's conversations, got the column {column}, whose "
                "text is never changed; leave it out (`build grounding` has a flag of that name)"
            )
        self._compat_prompt, self._first = compat_prompt, first_exchange

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, index: int) -> Sample | BadRow:
        """Row `index` as a sample, or a `BadRow` with the reason. A row's content never raises."""
        index = int(index)
        try:
            row, reading = self.read(index)
            sample = self._sample(index, row, reading)
            images = tuple(open_image(source, self.image_folder) for source in reading.sources)
            return replace(sample, images=images)
        except (Unusable, UnreadableImage) as error:
            return BadRow(index, str(error))

    def read(self, index: int) -> tuple[Row, Reading]:
        """Row `index` as stored, and as read. Opens no image.

        Raises:
            Unusable: it can't be read.
        """
        try:
            stored = self._rows[index]
            row = self._plain(
                stored.to_pylist()[0] if hasattr(stored, "to_pylist") else dict(stored)
            )
        # Stored text may not be UTF-8, and a stored time may be out of Python's range.
        except Exception as error:
            raise Unusable(f"the row can't be read: {one_line(error)}") from error
        return row, layouts.read_row(row, self.names, compat=self._compat_prompt, first=self._first)

    def outline(self, index: int) -> tuple[Reading, Sample]:
        """Row `index` as read, and the sample that `get` returns, but with only the images' sizes
        read.

        Raises:
            Unusable, UnreadableImage: it can't be used, or an image is missing.
        """
        row, reading = self.read(index)
        sizes = [image_size(source, self.image_folder) for source in reading.sources]
        return reading, self._sample(index, row, reading, sizes)

    def _converted(
        self, text: Json, row: Row, reading: Reading, sizes: Sequence[tuple[int, int]] | None
    ) -> Json:
        """A solution or an answer to learn, with its boxes converted to thousandths."""
        if not self.rules or row.get("extent") is not None or not isinstance(text, str):
            return text
        first = (1, 1)
        if self._box_space == "pixels":
            if not reading.sources:
                raise Unusable("--box_space pixels: expected an image, got none")
            if layouts.PIXELS.search(reading.problem):
                raise Unusable(
                    "--box_space pixels: expected a question without a unit, because answers are "
                    "in thousandths, got one that mentions pixels; reword it"
                )
            first = sizes[0] if sizes else image_size(reading.sources[0], self.image_folder)
        try:
            turns = map(turn_text, reading.messages)
            if boxed := next((t for t in turns if in_thousandths(t, first) != t), None):
                raise Unusable(
                    f"--box_space {self._box_space}: expected a prompt without boxes, because only "
                    f"answers are converted, got {boxed!r:.80}; write thousandths in both"
                )
            return in_thousandths(text, first)
        except ValueError as error:
            raise Unusable(f"--box_space {self._box_space}: {error}") from error

    def classes(self) -> ClosedSet | None:
        """The class set of all rows: the class names of the answer column, or else the answers.

        None if there are too many to be classes, or if the rows are streamed.

        Raises:
            ValueError: two classes have the same key.
        """
        if isinstance(self._rows, ParquetRows):
            return None
        answers = [layouts.answer_column(row, self.names) for row in self._texts(self._rows)]
        columns = {column for column, _ in answers}
        if len(columns) == 1 and (listed := self.class_names.get(*columns)):
            return ClosedSet(listed)
        return class_set([answer for _, answer in answers if isinstance(answer, str)])

    def _texts(self, rows: datasets.Dataset | Sequence[Mapping[str, Json]]) -> Iterator[Row]:
        """Yield all rows without their images. A row that can't be read is empty."""
        if not hasattr(rows, "remove_columns"):
            yield from map(dict, rows)
            return
        images = [name for name in self.names if name in self._image_columns]
        for table in rows.remove_columns(images).iter(1000):
            yield from map(self._plain, plain_rows(table))

    def _plain(self, row: Row) -> Row:
        """The row with JSON and CSV lists parsed, and class numbers replaced by names."""
        for name in self._json_columns:
            row[name] = None if row.get(name) is None else json.loads(row[name])
        for name, listed in self.class_names.items():
            number = row.get(name)
            row[name] = listed[number] if number is not None and 0 <= number < len(listed) else None
        return {name: layouts.read_list(name, value) for name, value in row.items()}

    def _sample(
        self, index: int, row: Row, reading: Reading, sizes: Sequence[tuple[int, int]] | None = None
    ) -> Sample:
        """The sample, without its images."""
        left = self._image_columns | RESERVED
        columns = {k: v for k, v in row.items() if k not in left}
        if "chosen" in row:  # a preference pair of texts or chats
            columns |= {name: spoken_text(row.get(name)) for name in ("chosen", "rejected")}
            if columns["chosen"] is None:
                raise Unusable("chosen: expected an answer, a text or a chat that ends with one")
        solution = self.checked(self._converted(reading.solution, row, reading, sizes), row)
        said = None if "chosen" in row else spoken_text(row.get("completion")) or reading.said
        taught = self._converted(said, row, reading, sizes)
        if taught == solution and solution != reading.solution:
            columns.pop("completion", None)
        elif said and taught != solution and (taught != said or row.get("completion") is None):
            columns["completion"] = taught  # what to learn, if it isn't the solution
        columns |= {"problem": reading.problem, "solution": solution}
        return Sample(index, tuple(reading.messages), (), solution, columns)

    def checked(self, solution: Json, row: Row) -> str:
        """The row's solution, if it is text that passes `check_solution`.

        Raises:
            Unusable: it isn't, or doesn't.
        """
        solution = non_empty(solution, "solution")
        listed = (row.get(name) for name in CLASS_COLUMNS)
        choices = next((v for v in listed if is_class_set(v) or (isinstance(v, str) and v)), None)
        more = {"extent": row.get("extent"), "choices": choices}
        more = {name: value for name, value in more.items() if value is not None}
        wrong = self._check_solution(solution, **more) if self._check_solution else None
        if wrong:
            raise Unusable(f"solution: {wrong}")
        return solution


def plain_rows(table: pa.Table) -> list[Row]:
    """The rows of an arrow table. A row that can't be read, for example because its text isn't
    UTF-8, is empty here, and becomes a bad row later."""
    try:
        return table.to_pylist()
    except (ValueError, OverflowError):
        if len(table) == 1:
            return [{}]
        return [row for at in range(len(table)) for row in plain_rows(table.slice(at, 1))]


def first_solutions(samples: SampleDataset, limit: int = 50) -> list[str]:
    """The solutions of the usable rows among the first `limit`, from which to detect the task.

    Raises:
        ValueError: none is usable; says what is wrong with the first.
    """
    loaded = [samples.get(index) for index in range(min(len(samples), limit))]
    solutions = [sample.solution for sample in loaded if isinstance(sample, Sample)]
    if not solutions and loaded and isinstance(loaded[0], BadRow):
        raise ValueError(
            f"expected a row that can be used among the first {len(loaded)}, got none; row 0: "
            f"{loaded[0].reason}"
        )
    return solutions


def _has_image(feature: object) -> bool:
    import datasets

    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return isinstance(feature, datasets.Image) or (inner is not None and _has_image(inner))


def taught_answer(sample: Sample) -> str:
    """The answer for the model to learn: the column `completion`, or else the solution."""
    return spoken_text(sample.columns.get("completion")) or sample.solution


def open_samples(
    rows: datasets.Dataset | ParquetRows, task: str, box_space: str, *, compat_prompt: bool = False
) -> tuple[SampleDataset, str]:
    """The rows as samples, and their task. "auto" detects the task from the first solutions, and
    takes boxes for thousandths. Rows of the task "preference" have no solution to check."""
    space = "thousandths" if box_space == "auto" else box_space
    samples_of = partial(SampleDataset, rows, compat_prompt=compat_prompt, box_space=space)
    if task == "auto":
        task = detect_task(first_solutions(samples_of()))
    check = None if task == "preference" else partial(check_solution, task)
    return samples_of(check_solution=check), task
