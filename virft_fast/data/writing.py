"""A data set as a folder in the hub's layout: parquet shards, images inside, and a card.

    OUT/data/train-00000-of-00002.parquet   what `load_rows` and `datasets.load_dataset` read
    OUT/README.md                           the card: what was built from what, and how

Everything is written aside and renamed at the end: a folder that exists is whole.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import ExifTags, Image, ImageOps

from virft_fast.data.accounts import Built, listing, printable
from virft_fast.data.images import IMAGE_FORMATS, check_pixels

Pictured = TypeVar("Pictured", bound=Any)  # has an `image`
ROWS_A_GROUP = 64
SHARD_BYTES = 400 * 2**20
OTHER_SIZE = "image of another size than its annotations say"


@dataclass(frozen=True)
class Plan:
    """A row that is going to be written.

    Attributes:
        image: its file.
        row: column -> value, without the image.
        fill: (width, height) of the image as it is shown, and the EXIF orientation to turn places
            by -> further columns, or why the row can't be used; for what can only be said once the
            image is open.
        frame: whether places given in the image are those of the image "shown" as its EXIF data
            say, or of the one "stored"; "unknown": as its size tells; "": there are none.
        size: (width, height) that they are meant for, where that is known.
    """

    image: Path
    row: Mapping[str, Any]
    fill: Callable[[int, int, int], Mapping[str, Any] | str] = lambda width, height, turn: {}
    frame: str = ""
    size: tuple[int, int] | None = None


def check_new_dataset(
    out: Path, overwrite: bool, sources: Iterable[Path | str | None] = ()
) -> None:
    """Better before the work than after it.

    Args:
        sources: what is going to be read, some of which may be no files at all.
    Raises:
        ValueError: there is something already; with `overwrite`, if it is no data set of ours, or
            holds what is going to be read.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--output {out}: expected a folder, or a name for a new one, got a file")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise ValueError(f"--output {out}: exists already; pass --overwrite or another folder")
        if not (out / "README.md").is_file() or not any(out.glob("data/*.parquet")):
            raise ValueError(
                f"--output {out}: expected a data set that was built here, for that alone is "
                "replaced by --overwrite; take another folder, or delete this one yourself"
            )
        whole = out.resolve()
        for source in sources:
            if source is not None and whole in (
                Path(source).resolve(),
                *Path(source).resolve().parents,
            ):
                raise ValueError(f"--output {out}: holds {source}, which is read; take another")
    make_folder(out.parent)


def make_folder(folder: Path, flag: str = "--output", *, make: bool = True) -> None:
    """The folder of an output.

    Args:
        make: False only checks that it could be made.
    Raises:
        ValueError: it can't be, or can't be written to.
    """
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except (OSError, ValueError) as error:  # such as a file where a folder should be
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{flag}: expected a folder {folder}, it can't be made: {why}; pass another place"
        ) from error
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(
            f"{flag} {folder}: expected a folder that can be written, got {there}; pass another "
            "place"
        )


def drop_missing(
    splits: Mapping[str, Sequence[Pictured]], built: Built, *, allow_missing: bool
) -> dict[str, list[Pictured]]:
    """The plans, or other things with an `image`, whose image is there.

    Raises:
        FileNotFoundError: some are not and `allow_missing` is false; names them.
    """
    files = dict.fromkeys(plan.image for plans in splits.values() for plan in plans)
    missing = {file for file in files if not os.path.isfile(file)}  # also one no file can have
    if missing and not allow_missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} images are missing: {listing(sorted(missing))}; check "
            "the image folder, or pass --allow_missing to leave their rows out"
        )
    for file in sorted(missing):
        built.leave_out("image missing", str(file))
    return {name: [p for p in plans if p.image not in missing] for name, plans in splits.items()}


def write_dataset(
    out: Path,
    splits: Mapping[str, Sequence[Plan]],
    columns: Mapping[str, Any],
    built: Built,
    *,
    card: Callable[[Built], str],
    check: Callable[[Mapping[str, Any]], str | None] = lambda row: None,
    progress: Callable[[Iterable[Plan], int], Iterable[Plan]] = lambda plans, total: plans,
) -> Built:
    """Write the plans of every split.

    Args:
        columns: name -> `datasets` feature, without the image.
        built: what was left out so far; completed here.
        card: the text of README.md, once everything is known.
        check: row -> why it could never be used, or None.
        progress: wraps the plans of all splits, to show how far it is.
    Raises:
        ValueError: a split has no row, or none could be written.
    """
    import datasets

    _need_rows({name: len(plans) for name, plans in splits.items()}, built)
    features = datasets.Features({"image": datasets.Image(), **columns})
    with written_aside(out, splits, features) as writers:
        together = [(name, plan) for name, plans in splits.items() for plan in plans]
        names = iter([name for name, _ in together])
        for plan in progress([plan for _, plan in together], len(together)):
            row = _row(plan, built, check)
            name = next(names)
            if row is not None:
                writers[name].add(row, len(row["image"]["bytes"]))
        for name, writer in writers.items():
            built.rows[name] = writer.close()
        _need_rows(built.rows, built)
        writers.folder.parent.joinpath("README.md").write_text(card(built), encoding="utf-8")
    return built


def _need_rows(counts: Mapping[str, int], built: Built) -> None:
    empty = [name for name, count in counts.items() if not count]
    if empty or not counts:
        where = f" to split {' or '.join(empty)}" if empty else ""
        lines = "; ".join(built.lines()) or "choose another share, or more images"
        raise ValueError(f"no row could be written{where}; {lines}")


class _Writers(dict[str, "SplitWriter"]):
    """A writer a split; `folder` is where their shards are, aside."""

    folder: Path


@contextlib.contextmanager
def written_aside(out: Path, splits: Iterable[str], features: Any) -> Iterator[_Writers]:
    """Writers into a folder that becomes `out` if the block ends without an exception."""
    aside = out.with_name(f".{out.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "data").mkdir(parents=True)
    try:
        writers = _Writers({name: SplitWriter(aside / "data", name, features) for name in splits})
        writers.folder = aside / "data"
        yield writers
        _put_in_place(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _put_in_place(aside: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(aside, out)
    shutil.rmtree(old, ignore_errors=True)


def _row(
    plan: Plan, built: Built, check: Callable[[Mapping[str, Any]], str | None]
) -> dict[str, Any] | None:
    """The row with its image's bytes, or None and a note in `built`."""
    try:
        data = plan.image.read_bytes()
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            check_pixels(image)
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            stored = image.size
            # As `SampleDataset` will show it.
            shown = ImageOps.exif_transpose(image).size
    except Exception as error:  # PIL's decoders raise nearly anything on damaged input
        built.leave_out("image can't be read", f"{plan.image}: {type(error).__name__}")
        return None
    if plan.size not in (None, shown, stored):
        built.leave_out(OTHER_SIZE, str(plan.image))
        return None
    frame, turn = plan.frame, orientation if orientation in range(2, 9) else 1
    if frame == "unknown" and turn != 1:
        # Sideways, a size tells; upside down and mirrored, nothing does.
        if not plan.size or shown == stored:
            built.leave_out("image turned by its EXIF data, its boxes may not be", str(plan.image))
            return None
        frame = "shown" if plan.size == shown else "stored"
    if frame == "stored" and turn != 1:
        built.convert("boxes turned with their image, as its EXIF data say", str(plan.image))
    try:
        filled = plan.fill(*shown, turn if frame == "stored" else 1)
    except ValueError as error:  # such as an image too narrow for the processor
        filled = str(error)
    if isinstance(filled, str):
        built.leave_out(filled, str(plan.image))
        return None
    row = {"image": {"bytes": data, "path": printable(plan.image.name)}, **plan.row, **filled}
    wrong = check(row)
    if wrong:
        built.leave_out("solution can't be scored", f"{plan.image}: {wrong}")
        return None
    return row


class SplitWriter:
    """Rows of one split into as many shards as it takes."""

    def __init__(self, folder: Path, split: str, features: Any) -> None:
        self.folder, self.split, self.features = folder, split, features
        self.rows: list[dict[str, Any]] = []
        self.count = self.size = self.shards = 0
        self.writer: Any = None

    def add(self, row: dict[str, Any], size: int) -> None:
        """`size`: bytes of its images, roughly the row's."""
        self.rows.append(row)
        self.size += size
        if len(self.rows) == ROWS_A_GROUP:
            self._flush()
        if self.size >= SHARD_BYTES:
            self._finish_shard()

    def close(self) -> int:
        """Number of rows; the shards get the names they keep."""
        self._flush()
        self._finish_shard()
        for number in range(self.shards):
            name = f"{self.split}-{number:05d}-of-{self.shards:05d}.parquet"
            os.replace(self._path(number), self.folder / name)
        return self.count

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.split}-{number}.part"

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self.rows:
            return
        schema = self.features.arrow_schema
        encoded = [self.features.encode_example(row) for row in self.rows]
        if self.writer is None:
            self.writer = pq.ParquetWriter(self._path(self.shards), schema)
        self.writer.write_table(pa.Table.from_pylist(encoded, schema=schema))
        self.count += len(self.rows)
        self.rows = []

    def _finish_shard(self) -> None:
        self._flush()
        if self.writer is not None:
            self.writer.close()
            self.writer, self.size = None, 0
            self.shards += 1
