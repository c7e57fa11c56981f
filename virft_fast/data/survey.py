"""Count what a run will keep, leave out and convert, before it starts.

Rows are read without decoding images; sizes come from image headers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from virft_fast import dist, progress
from virft_fast.batch import Sample
from virft_fast.config import UsageError
from virft_fast.data.accounts import Built, listing
from virft_fast.data.images import UnreadableImage, image_size, is_turned
from virft_fast.data.layouts import ANSWERS, IMAGE_COLUMNS, PIXELS, QUESTIONS
from virft_fast.data.samples import SampleDataset
from virft_fast.data.turns import Unusable
from virft_fast.tasks import BOX_TASKS, DEFAULT_REWARDS, default_rewards
from virft_fast.tasks.answers import parse_detection
from virft_fast.tasks.coordinates import THOUSAND
from virft_fast.tasks.scoring import RESERVED

MAX_ROWS = 20_000
MAX_STREAMED_ROWS = 200
# The question, the ground truth and the images are each read from one of these columns.
CHOSEN_AMONG = {*QUESTIONS, *ANSWERS, *IMAGE_COLUMNS} - {"completion", "chosen"}
SPEAKS_OF_PIXELS = "the question mentions pixels"


@dataclass
class Survey:
    """Statistics of the first rows of a split.

    Attributes:
        rows: number of rows in the split. read: number of rows read.
        kept: number of usable rows among those read.
        account: what was left out, and what was converted by which rule.
        solutions: solutions of the kept rows.
        in_pixels, in_unit: signs that boxes are in pixels or in 0..1, at most one per row.
        large: number of rows whose image has a side of more than 1000 pixels.
    """

    rows: int
    read: int = 0
    kept: int = 0
    account: Built = field(default_factory=Built)
    solutions: list[str] = field(default_factory=list)
    in_pixels: list[str] = field(default_factory=list)
    in_unit: list[str] = field(default_factory=list)
    large: int = 0

    def lines(self, split: str) -> list[str]:
        """The table of a split that a run prints at its start."""
        rest = "" if self.read == self.rows else f"; only the first {self.read} were looked at"
        first = f"{split}: kept {self.kept} of {self.read} rows{rest}"
        return [first, *(f"  {line}" for line in self.account.lines())]

    def check_left_out(self, limit: int) -> None:
        """Raise UsageError if the number of unusable rows exceeds the limit, --max_bad_rows."""
        unusable = self.read - self.kept
        if unusable > limit:
            reasons = [f"{reason}: {len(rows)}" for reason, rows in self.account.left_out.items()]
            raise UsageError(
                f"--max_bad_rows {limit}: expected at most this many rows that can't be used, got "
                f"{unusable} of {self.read} ({'; '.join(reasons[:5])}); fix them or raise it"
            )

    def table(self, split: str, task: str) -> list[str]:
        """`lines`, and the task's default rewards that no solution can earn."""
        usual = DEFAULT_REWARDS.get(task, ())
        dropped = set(usual) - set(default_rewards(task, self.solutions) if usual else ())
        without = "  without the reward {}: no solution has a confidence"
        return [*self.lines(split), *map(without.format, dropped)]

    def settle_boxes(self) -> str | None:
        """A warning if --box_space auto can't be sure that boxes are in thousandths, or None. It
        also becomes one of the account's notes.

        Raises:
            ValueError: there are signs that boxes are in another unit.
        """
        for signs, space in ((self.in_pixels, "pixels"), (self.in_unit, "unit")):
            if signs:
                worded = SPEAKS_OF_PIXELS in "".join(signs)
                reword = "reword these questions, and " if worded else ""
                raise ValueError(
                    f"--box_space auto: expected boxes in thousandths of the image's sides, got "
                    f"signs of {space} in {len(signs)} rows: {'; '.join(signs[:3])}; {reword}pass "
                    f"--box_space {space}; or pass --box_space thousandths if they are "
                    "thousandths anyway"
                )
        if not self.large:
            return None
        warning = (
            f"boxes are taken for thousandths of the image's sides; {self.large} images have sides "
            "over 1000 pixels, where nothing tells thousandths from pixels: pass --box_space "
            "pixels if they are pixels, --box_space thousandths to say that they are not"
        )
        self.account.notes.append(f"warning: {warning}")
        return warning


def open_space(task: str, box_space: str) -> bool:
    """Whether solutions are boxes in a space that still has to be determined.

    Raises:
        ValueError: a space is given, but solutions have no boxes.
    """
    if task not in BOX_TASKS and box_space in ("pixels", "unit"):
        raise ValueError(
            f"--box_space {box_space}: expected solutions with boxes, got the task {task}; leave "
            "it out, or pass --task detection or grounding"
        )
    return task in BOX_TASKS and box_space == "auto"


def survey(
    samples: SampleDataset,
    *,
    boxes: bool,
    limit: int | None = None,
    check: Callable[[Sample], str | None] | None = None,
) -> Survey:
    """Read the first rows: up to MAX_ROWS, or MAX_STREAMED_ROWS of a streamed data set.

    Args:
        boxes: solutions are boxes in a space that still has to be determined.
        limit: number of rows that will be used; None: all.
        check: sample without its images -> why the algorithm can't use it, or None.
    """
    result = Survey(len(samples) if limit is None else min(limit, len(samples)))
    result.read = min(result.rows, MAX_STREAMED_ROWS if samples.streamed else MAX_ROWS)
    if samples.account is not None:
        result.account.add(samples.account)
    layouts: dict[str, int] = {}
    without, images = [], set()
    rows = progress.bar(range(result.read), "reading rows", "row", shown=dist.is_main())
    for index in rows:
        try:
            if boxes:
                _find_space_signs(result, index, samples)
            reading, sample = samples.outline(index)
            if wrong := check(sample) if check else None:
                raise Unusable(wrong)
        except (Unusable, UnreadableImage) as error:
            result.account.leave_out(_kind(str(error)), f"row {index}")
            continue
        result.kept += 1
        result.solutions.append(sample.solution)
        layouts[reading.layout] = layouts.get(reading.layout, 0) + 1
        without += [] if reading.sources else [f"row {index}"]
        images.add(reading.image_column)
        changed: tuple[str, ...] = samples.rules if sample.solution != reading.solution else ()
        if changed and reading.sources and is_turned(reading.sources[0], samples.image_folder):
            changed = (*changed, "boxes counted in the image as its EXIF data turn it")
        answered = reading.layout.split(" + ")[1]
        if samples.class_names.get(answered):
            changed = (f"numbers of the column {answered} to the names of its classes", *changed)
        for rule in (*reading.converted, *changed):
            result.account.convert(rule, f"row {index}")
    named = ", ".join(f"{name} ({count})" for name, count in layouts.items())
    notes = [f"read from the columns {named or 'none'}"]
    if without:
        notes.append(f"without an image: {len(without)} ({listing(without)})")
    read = {*images, *(column for layout in layouts for column in layout.split(" + "))}
    others = [name for name in samples.names if name in CHOSEN_AMONG and name not in read]
    if result.kept and (unread := [*others, *([] if images - {None} else samples.unread_images)]):
        notes.append(f"not read: {', '.join(unread)}; --columns says which columns are")
    if taken := sorted(RESERVED & set(samples.names)):
        notes.append(f"rewards get the run's own {', '.join(taken)}, not the columns of that name")
    result.account.notes += notes
    return result


def _find_space_signs(result: Survey, index: int, samples: SampleDataset) -> None:
    """Record the signs of a coordinate space in a row's boxes and question."""
    row, reading = samples.read(index)
    solution, problem = reading.solution, reading.problem
    if row.get("extent") is not None or not isinstance(solution, str):
        return
    sizes = [image_size(source, samples.image_folder) for source in reading.sources]
    read = parse_detection(solution)
    numbers = [box for box in (read.boxes if read else ()) if all(map(math.isfinite, box))]
    if not numbers:
        return
    size = sizes[0] if sizes else (0, 0)
    result.large += max(size) > THOUSAND
    for box in numbers:
        inside = 0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]
        if max(box) > THOUSAND and inside:
            result.in_pixels.append(f"row {index}: a box {list(box)} in {size[0]}x{size[1]} pixels")
            return
    if PIXELS.search(problem):
        result.in_pixels.append(f"row {index}: {SPEAKS_OF_PIXELS}")
    elif all(0 <= v <= 1 for box in numbers for v in box) and set().union(*numbers) - {0, 1}:
        result.in_unit.append(f"row {index}: a box {list(numbers[0])}")


def _kind(reason: str) -> str:
    """The reason without quoted text, numbers and paths, which differ from row to row."""
    short = re.sub(r"'[^']*'|\"[^\"]*\"|<answer>.*", "...", reason, flags=re.DOTALL)
    return re.sub(r"\d+(\.\d+)?", "N", re.sub(r"(/[^/\s:]+)+", "PATH", short))[:120]
