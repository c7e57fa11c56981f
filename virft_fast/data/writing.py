"""Write a data set as a folder in the hub's layout: parquet shards with the images, and a card.

    OUT/data/train-00000-of-00002.parquet   for `load_rows` and `datasets.load_dataset`
    OUT/README.md                           the card: what was built, from what, and how

Everything is written to a temporary folder, which is renamed at the end. So OUT is never half
written.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from PIL import ExifTags, Image, ImageOps

from virft_fast.batch import Row
from virft_fast.data.accounts import Built, listing, printable
from virft_fast.data.images import IMAGE_FORMATS, check_pixels
from virft_fast.tasks.coordinates import Extent

if TYPE_CHECKING:
    import datasets
    import pyarrow.parquet as pq

# (width, height) of an image as displayed -> the coordinate space of its answers' boxes.
ExtentFor = Callable[[int, int], Extent]
ROWS_A_GROUP = 64
SHARD_BYTES = 400 * 2**20
OTHER_SIZE = "image of another size than its annotations say"


class HasImage(Protocol):
    @property
    def image(self) -> Path: ...


Planned = TypeVar("Planned", bound=HasImage)


@dataclass(frozen=True)
class Plan:
    """A row to write.

    Attributes:
        image: the image file.
        row: column -> value, without the image.
        fill: makes the columns that depend on the image: (width, height of the image as displayed,
            EXIF orientation to apply to coordinates) -> columns, or why the row can't be used.
        frame: the image to which coordinates refer: "shown", with its EXIF data applied; "stored";
            "unknown", where the size decides; or "" if there are no coordinates.
        size: (width, height) of that image, if known.
    """

    image: Path
    row: Row
    fill: Callable[[int, int, int], Row | str] = lambda width, height, turn: {}
    frame: str = ""
    size: tuple[int, int] | None = None


def check_new_dataset(
    out: Path, overwrite: bool, sources: Iterable[Path | str | None] = ()
) -> None:
    """Check, before the work starts, that a data set can be written to `out`.

    Args:
        sources: the inputs; some may not be files.
    Raises:
        ValueError: `out` isn't empty. With `overwrite`: it isn't a data set that was built here, or
            it contains one of the sources.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--output {out}: expected a folder, or a name for a new one, got a file")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise ValueError(f"--output {out}: exists already; pass --overwrite or another folder")
        if not (out / "README.md").is_file() or not any(out.glob("data/*.parquet")):
            raise ValueError(
                f"--output {out}: expected a data set built by this program, because --overwrite "
                "replaces nothing else; pass another folder, or delete this one yourself"
            )
        whole = out.resolve()
        for source in sources:
            if source is not None and Path(source).resolve().is_relative_to(whole):
                raise ValueError(f"--output {out}: contains the input {source}; pass another")
    make_folder(out.parent)


def make_folder(folder: Path, flag: str = "--output", *, make: bool = True) -> None:
    """Create an output folder.

    Args:
        make: False: only check that it could be created.
    Raises:
        ValueError: it can't be created or written to.
    """
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except (OSError, ValueError) as error:  # such as a file where a folder should be
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{flag}: the folder {folder} can't be created: {why}; pass another one"
        ) from error
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(
            f"{flag} {folder}: expected a folder that can be written, got {place}; pass another one"
        )


def drop_missing(
    splits: Mapping[str, Sequence[Planned]], built: Built, *, allow_missing: bool
) -> dict[str, list[Planned]]:
    """The plans, or other items with an `image`, whose image exists.

    Raises:
        FileNotFoundError: images are missing and `allow_missing` is false; names them.
    """
    files = dict.fromkeys(plan.image for plans in splits.values() for plan in plans)
    missing = {file for file in files if not os.path.isfile(file)}  # or the name is invalid
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
    columns: Mapping[str, object],
    built: Built,
    *,
    card: Callable[[Built], str],
    check: Callable[[Row], str | None] = lambda row: None,
    progress: Callable[[Iterable[Plan], int], Iterable[Plan]] = lambda plans, total: plans,
) -> Built:
    """Write the plans of every split.

    Args:
        columns: name -> `datasets` feature, without the image.
        built: the account so far; completed here.
        card: the finished account -> the text of README.md.
        check: row -> why it could never be used, or None.
        progress: wraps the plans of all splits to show progress.
    Raises:
        ValueError: a split has no rows, or none of its rows could be written.
    """
    import datasets

    _need_rows({name: len(plans) for name, plans in splits.items()}, built)
    features = datasets.Features({"image": datasets.Image(), **columns})
    with written_aside(out, splits, features) as (folder, writers):
        names = [name for name, plans in splits.items() for _ in plans]
        plans = [plan for plans in splits.values() for plan in plans]
        for name, plan in zip(names, progress(plans, len(plans)), strict=True):
            row = _row(plan, built, check)
            if row is not None:
                writers[name].add(row, len(row["image"]["bytes"]))
        for name, writer in writers.items():
            built.rows[name] = writer.close()
        _need_rows(built.rows, built)
        (folder / "README.md").write_text(card(built), encoding="utf-8")
    return built


def _need_rows(counts: Mapping[str, int], built: Built) -> None:
    empty = [name for name, count in counts.items() if not count]
    if empty or not counts:
        where = f" to split {' or '.join(empty)}" if empty else ""
        lines = "; ".join(built.lines()) or "choose another share, or more images"
        raise ValueError(f"no row could be written{where}; {lines}")


@contextlib.contextmanager
def written_aside(
    out: Path, splits: Iterable[str], features: datasets.Features
) -> Iterator[tuple[Path, dict[str, SplitWriter]]]:
    """Yield a temporary folder, which becomes `out` if the block raises no exception, and a writer
    for each split."""
    aside = out.with_name(f".{out.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "data").mkdir(parents=True)
    try:
        yield aside, {name: SplitWriter(aside / "data", name, features) for name in splits}
        old = out.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            os.replace(out, old)
        os.replace(aside, out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _row(plan: Plan, built: Built, check: Callable[[Row], str | None]) -> Row | None:
    """The row with its image's bytes; None if it can't be used, with the reason in `built`."""
    try:
        data = plan.image.read_bytes()
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            check_pixels(image)
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            stored = image.size
            # The size that `SampleDataset` will see.
            shown = ImageOps.exif_transpose(image).size
    except Exception as error:  # PIL's decoders raise almost anything on damaged input
        built.leave_out("image can't be read", f"{plan.image}: {type(error).__name__}")
        return None
    if plan.size not in (None, shown, stored):
        built.leave_out(OTHER_SIZE, str(plan.image))
        return None
    frame, turn = plan.frame, orientation if orientation in range(2, 9) else 1
    if frame == "unknown" and turn != 1:
        # The size reveals whether an image was turned sideways, but not upside down or mirrored.
        if not plan.size or shown == stored:
            built.leave_out("image rotated by EXIF data, its boxes may not be", str(plan.image))
            return None
        frame = "shown" if plan.size == shown else "stored"
    if frame == "stored" and turn != 1:
        built.convert("boxes rotated with their image, by its EXIF data", str(plan.image))
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
    """Writes the rows of one split in shards of about SHARD_BYTES."""

    def __init__(self, folder: Path, split: str, features: datasets.Features) -> None:
        self.folder, self.split, self.features = folder, split, features
        self.rows: list[Row] = []
        self.count = self.size = self.shards = 0
        self.writer: pq.ParquetWriter | None = None

    def add(self, row: Row, size: int) -> None:
        """Add a row of about `size` bytes, counting only its images."""
        self.rows.append(row)
        self.size += size
        if len(self.rows) == ROWS_A_GROUP:
            self._flush()
        if self.size >= SHARD_BYTES:
            self._finish_shard()

    def close(self) -> int:
        """Finish the shards and give them their final names. Returns the number of rows."""
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
