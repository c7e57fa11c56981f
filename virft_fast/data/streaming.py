"""Rows of parquet files, read on access: nothing is copied or converted.

Files are read one row group at a time. A random order over the whole set would read a group for
almost every row. So `ParquetRows.permutation` shuffles in two steps: first the groups, then the
rows within each window. A window is as many consecutive groups as fit into WINDOW_BYTES.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np

from virft_fast.data.accounts import Built

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

WINDOW_BYTES = 256 * 2**20
FOOTER_READERS = 16


class RowGroup(NamedTuple):
    """A row group: its file, its number in the file, its first row in the set, and its size."""

    file: int
    number: int
    start: int
    num_rows: int
    num_bytes: int


class ParquetRows:
    """The rows of parquet files in sequence, with at most about two windows in memory.

    Initially, only the files' footers are read. `rows[i]` reads the row group that contains row i
    and keeps it until its memory is needed for others. A row is an arrow table with one row and
    with images as stored, as `SampleDataset` expects.

    Args:
        files: paths or addresses, in the order of their rows.
        open_file: file -> an input for `pyarrow.parquet.ParquetFile`; None: files are local.
        window_bytes: uncompressed size of a window; a window has at least one row group.
    Raises:
        ValueError: a file isn't parquet, or its columns differ from the first file's; names it.
    """

    image_folder: Path | None = None  # where relative image paths start
    account: Built | None = None

    def __init__(
        self,
        files: Sequence[str],
        *,
        open_file: Callable[[str], str | IO[bytes]] | None = None,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        import datasets

        self._files, self._open = list(files), open_file or str
        with ThreadPoolExecutor(FOOTER_READERS) as pool:
            self._footers = list(pool.map(self._footer, self._files))
        schema = self._footers[0].schema.to_arrow_schema()
        self.column_names: list[str] = schema.names
        for file, footer in zip(self._files, self._footers, strict=True):
            names = footer.schema.to_arrow_schema().names
            if set(names) != set(self.column_names):
                raise ValueError(
                    f"{file}: expected the columns {', '.join(self.column_names)}, as in "
                    f"{self._files[0]}, got {', '.join(names)}"
                )
        self.features: datasets.Features = datasets.Features.from_arrow_schema(schema)
        self._sources: dict[str, str] = {}  # our name of a column -> the file's, after `rename`
        self.groups = self._row_groups()
        self._starts = np.array([group.start for group in self.groups], dtype=np.int64)
        self._window_bytes = window_bytes
        self._kept: OrderedDict[int, pa.Table] = OrderedDict()
        self.num_reads = 0

    def _footer(self, file: str) -> pq.FileMetaData:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.read_metadata(self._open(file))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(f"{file}: expected a parquet file: {error}") from error

    def _row_groups(self) -> list[RowGroup]:
        groups: list[RowGroup] = []
        start = 0
        for file, footer in enumerate(self._footers):
            for number in range(footer.num_row_groups):
                group = footer.row_group(number)
                if group.num_rows:
                    size = group.total_byte_size
                    groups.append(RowGroup(file, number, start, group.num_rows, size))
                    start += group.num_rows
        return groups

    def __len__(self) -> int:
        last = self.groups[-1] if self.groups else None
        return last.start + last.num_rows if last else 0

    def __getitem__(self, index: int) -> pa.Table:
        """Row `index` as a table with one row.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"expected a row in [0, {len(self)}), got {index}")
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = self._table(group).slice(index - self.groups[group].start, 1)
        if not self._sources:
            return row
        return row.select(list(self._sources.values())).rename_columns(list(self._sources))

    def rename(self, columns: Mapping[str, str], *, without: Collection[str] = ()) -> None:
        """Rename columns (old name -> new), and remove some."""
        kept = [name for name in self.column_names if name not in without]
        self._sources = {columns.get(name, name): name for name in kept}
        self.column_names = list(self._sources)
        features = {name: self.features[source] for name, source in self._sources.items()}
        self.features = type(self.features)(features)

    def _table(self, group: int) -> pa.Table:
        """The rows of a group, from memory or read from the file."""
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        import pyarrow.parquet as pq

        at = self.groups[group]
        source = self._open(self._files[at.file])
        with pq.ParquetFile(source, metadata=self._footers[at.file], pre_buffer=True) as file:
            table = file.read_row_group(at.number)
        self.num_reads += 1
        # Evict before adding. The limit is two windows, because one ends while the next begins.
        while self._kept and self._bytes_kept() + table.nbytes > 2 * self._window_bytes:
            self._kept.popitem(last=False)
        self._kept[group] = table
        return table

    def _bytes_kept(self) -> int:
        return sum(table.nbytes for table in self._kept.values())

    def permutation(self, generator: np.random.Generator) -> np.ndarray:
        """All rows, (N,) int64, in an order that reads each row group once.

        Shuffles the groups, joins consecutive groups into windows, and shuffles the rows of each
        window. So rows of the same group are at most one window apart.
        """
        windows: list[list[np.ndarray]] = []
        size = 0
        for group in (self.groups[n] for n in generator.permutation(len(self.groups)).tolist()):
            num_bytes = int(group.num_bytes * self._expansion)
            if not windows or size + num_bytes > self._window_bytes:
                windows.append([])
                size = 0
            windows[-1].append(np.arange(group.start, group.start + group.num_rows))
            size += num_bytes
        shuffled = [generator.permutation(np.concatenate(window)) for window in windows]
        return np.concatenate(shuffled) if shuffled else np.arange(0)

    @cached_property
    def _expansion(self) -> float:
        """How much larger a group is in memory than its footer says. The file stores repeated
        values, such as a prompt that all rows share, only once."""
        return max(1.0, self._table(0).nbytes / max(1, self.groups[0].num_bytes))
