"""The rows of a data set as samples, made on access, or why a row can't be one.

Nothing that comes out of a data set is evaluated, unpickled or run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virft_fast.batch import Sample
from virft_fast.data.images import UnreadableImage, image_size, one_line, open_image
from virft_fast.data.layouts import (
    ANSWERS,
    IMAGE_COLUMNS,
    PIXELS,
    Reading,
    Row,
    Unusable,
    answer_column,
    check_columns,
    non_empty,
    question_column,
    read_list,
    read_row,
    spoken_text,
    turn_text,
)
from virft_fast.tasks import in_thousandths
from virft_fast.tasks.labels import ClosedSet, class_set
from virft_fast.tasks.rewards import CLASS_COLUMNS, is_class_set
from virft_fast.tasks.scoring import RESERVED

if TYPE_CHECKING:
    import datasets

    from virft_fast.data.streaming import ParquetRows


@dataclass(frozen=True)
class BadRow:
    """A row that can't be used, and why."""

    index: int
    reason: str


class SampleDataset:
    """The rows of a data set as samples, made on access.

    Args:
        rows: what `load_rows` returns, or any sequence of mappings.
        check_solution: solution (and the row's `extent` and `choices`, by name, where it has some)
            -> what is wrong with it, or None.
        compat_prompt: LISA's conversations ask for a box as the original does, to the letter.
        first_exchange: of a conversation, take the first question and its answer alone.
        box_space: what boxes of rows without `extent` are counted in: thousandths, pixels (of the
            row's first image) or unit (0..1). Solutions are converted to thousandths.
    Raises:
        ValueError: no column holds the problem, or none the solution; or `compat_prompt` and no
            conversations.
    """

    def __init__(
        self,
        rows: datasets.Dataset | ParquetRows | Sequence[Row],
        *,
        check_solution: Callable[..., str | None] | None = None,
        compat_prompt: bool = False,
        first_exchange: bool = False,
        box_space: str = "thousandths",
    ) -> None:
        self.streamed = not hasattr(rows, "with_format") and hasattr(rows, "permutation")
        self._box_space = box_space
        self.rules = () if box_space == "thousandths" else (f"boxes in {box_space} to thousandths",)
        self.names = _column_names(rows)
        check_columns(self.names, "data set")
        # In arrow format images (and sound, and video) come as they are stored: nothing is decoded
        # that is not asked for, and a corrupt image raises where it can be caught.
        self._rows = rows.with_format("arrow") if hasattr(rows, "with_format") else rows
        self._image_columns = _image_columns(rows)
        self.unread_images = sorted(self._image_columns - {*IMAGE_COLUMNS, "mask"})
        self._json_columns = _json_columns(rows)
        self.class_names = _class_names(rows)
        self._check_solution = check_solution
        self.account = getattr(rows, "account", None)  # of how the file was read
        self.image_folder: Path | None = getattr(rows, "image_folder", None)
        column = question_column({}, self.names)
        if compat_prompt and column != "conversations":
            raise ValueError(
                f"--compat_prompt: expected LISA's conversations, got the column {column}, which "
                "is asked as it stands; leave it out (`build grounding` has a flag of that name)"
            )
        self._compat_prompt, self._first = compat_prompt, first_exchange

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, index: int) -> Sample | BadRow:
        """Row `index` as a sample, or why it can't be one; no content of a row raises."""
        index = int(index)
        try:
            row, reading = self.read(index)
            sample = self._sample(index, row, reading)
            images = tuple(open_image(source, self.image_folder) for source in reading.sources)
            return replace(sample, images=images)
        except (Unusable, UnreadableImage) as error:
            return BadRow(index, str(error))

    def read(self, index: int) -> tuple[dict[str, Any], Reading]:
        """Row `index` as it is stored, and what it says; no image is opened.

        Raises:
            Unusable: it can't be read.
        """
        try:
            row = self._row(index)
        # What is stored needs be neither text in UTF-8 nor a time that Python can hold.
        except Exception as error:
            raise Unusable(f"the row can't be read: {one_line(error)}") from error
        return row, read_row(row, self.names, compat=self._compat_prompt, first=self._first)

    def outline(self, index: int) -> tuple[Reading, Sample]:
        """What row `index` says, and the sample that `get` gives but for its images, which are only
        looked at.

        Raises:
            Unusable, UnreadableImage: it can't be used, or an image is missing.
        """
        row, reading = self.read(index)
        sizes = [image_size(source, self.image_folder) for source in reading.sources]
        return reading, self._sample(index, row, reading, sizes)

    def _converted(self, text: Any, row: Row, reading: Reading, sizes: Any) -> Any:
        """A text to learn, in thousandths where the row's boxes are in pixels or shares."""
        if not self.rules or row.get("extent") is not None or not isinstance(text, str):
            return text
        first = (1, 1)
        if self._box_space == "pixels":
            if not reading.sources:
                raise Unusable("--box_space pixels: expected an image, whose pixels count")
            if PIXELS.search(reading.problem):
                raise Unusable(
                    "--box_space pixels: expected a question that names no unit, because answers "
                    "are in thousandths, got one that speaks of pixels; reword it"
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
        """The class set of all rows: the names that the column of the answers lists, else what the
        answers name; None where they are too many to be classes, or the set is a stream.

        Raises:
            ValueError: two of them have the same key.
        """
        if self.streamed:
            return None
        answers = [answer_column(row, self.names) for row in self._texts()]
        columns = {column for column, _ in answers}
        if len(columns) == 1 and (listed := self.class_names.get(*columns)):
            return ClosedSet(listed)
        return class_set([answer for _, answer in answers if isinstance(answer, str)])

    def _texts(self) -> Iterator[dict[str, Any]]:
        """All rows without their images; one that can't be read is empty."""
        if not hasattr(self._rows, "iter"):
            yield from map(dict, self._rows)
            return
        images = [name for name in self.names if name in self._image_columns]
        for part in self._rows.remove_columns(images).iter(1000):
            yield from map(self._plain, plain_rows(part))

    def _row(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        return self._plain(row.to_pylist()[0] if hasattr(row, "to_pylist") else dict(row))

    def _plain(self, row: dict[str, Any]) -> dict[str, Any]:
        """What is stored in another form: JSON texts, lists in CSV, numbers of class names."""
        for name in self._json_columns:
            row[name] = None if row.get(name) is None else json.loads(row[name])
        for name, listed in self.class_names.items():
            number = row.get(name)
            row[name] = listed[number] if number is not None and 0 <= number < len(listed) else None
        return {name: read_list(name, value) for name, value in row.items()}

    def _sample(
        self,
        index: int,
        row: dict[str, Any],
        reading: Reading,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> Sample:
        """The sample but for its images."""
        left = self._image_columns | RESERVED
        columns = {k: v for k, v in row.items() if k not in left}
        if "chosen" in row:  # a preference pair, of texts or chats
            columns |= {name: spoken_text(row.get(name)) for name in ("chosen", "rejected")}
            if columns["chosen"] is None:
                raise Unusable("chosen: expected an answer, a text or a chat that ends with one")
        solution = self.checked(self._converted(reading.solution, row, reading, sizes), row)
        said = None if "chosen" in row else spoken_text(row.get("completion")) or reading.said
        taught = self._converted(said, row, reading, sizes)
        if taught == solution and solution != reading.solution:
            columns.pop("completion", None)
        elif said and taught != solution and (taught != said or row.get("completion") is None):
            columns["completion"] = taught  # what is learned, beside what scores
        return Sample(
            index=index,
            messages=tuple(reading.messages),
            images=(),
            solution=solution,
            columns=columns | {"problem": reading.problem, "solution": solution},
        )

    def checked(self, solution: Any, row: Row) -> str:
        """The row's solution, if it is a text that `check_solution` lets pass.

        Raises:
            Unusable: it isn't.
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


def plain_rows(part: Any) -> list[dict[str, Any]]:
    """The rows of an arrow table; one that can't be read, such as of text that is not in UTF-8, is
    empty, and a bad one when it is asked about."""
    try:
        return part.to_pylist()
    except (ValueError, OverflowError):
        if len(part) == 1:
            return [{}]
        return [row for at in range(len(part)) for row in plain_rows(part.slice(at, 1))]


def first_solutions(samples: SampleDataset, most: int = 50) -> list[str]:
    """Of the usable ones among the first rows, to read the task off them.

    Raises:
        ValueError: none is; says what is wrong with the first.
    """
    loaded = [samples.get(index) for index in range(min(len(samples), most))]
    found = [sample.solution for sample in loaded if isinstance(sample, Sample)]
    if loaded and not found:
        raise ValueError(
            f"expected a row that can be used among the first {len(loaded)}, got none; row 0: "
            f"{loaded[0].reason}"
        )
    return found


def _column_names(rows: Any) -> list[str]:
    if hasattr(rows, "column_names"):
        return list(rows.column_names)
    return list(dict.fromkeys(name for row in rows for name in row))


def _image_columns(rows: Any) -> set[str]:
    """Columns that hold images, whether or not they go into the prompt (a mask does not)."""
    features = getattr(rows, "features", None) or {}
    return {*IMAGE_COLUMNS, *(name for name, feature in features.items() if _has_image(feature))}


def _class_names(rows: Any) -> dict[str, list[str]]:
    """Column -> its class names, of those that may hold answers; reward functions get the others as
    they are."""
    features = getattr(rows, "features", None) or {}
    names = {n: getattr(f, "names", None) for n, f in features.items() if n in ANSWERS}
    return {name: listed for name, listed in names.items() if listed}


def _json_columns(rows: Any) -> list[str]:
    """Columns that `datasets` stores as JSON texts because the kinds of value differ in them."""
    features = getattr(rows, "features", None) or {}
    return [name for name, feature in features.items() if type(feature).__name__ == "Json"]


def _has_image(feature: Any) -> bool:
    import datasets

    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return isinstance(feature, datasets.Image) or (inner is not None and _has_image(inner))


def taught_answer(sample: Sample) -> str:
    """What a model is to learn to say: the column `completion` where the row has one, else its
    solution."""
    return spoken_text(sample.columns.get("completion")) or sample.solution
