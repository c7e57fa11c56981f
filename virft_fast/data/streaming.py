"""Rows of parquet files that are read when they are asked for: nothing is copied or converted.

The unit of reading is a parquet row group. Taking rows in an order that is random over the whole
set would read a group for every row, so `ParquetRows.permutation` shuffles in two steps: the
groups, and then the rows of a window, as many neighbouring groups as fit into memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

WINDOW_BYTES = 256 * 2**20
FOOTER_READERS = 16


class RowGroup(NamedTuple):
    """A row group: its file, its number there, its first row in the set, and its size."""

    file: int
    number: int
    start: int
    num_rows: int
    num_bytes: int


class ParquetRows:
    """The rows of parquet files one after another, at most about two windows of them in memory.

    Only the files' footers are read at first. `rows[i]` reads the row group that holds row i, and
    keeps it until others need its room; a row comes as an arrow table of one row, images as they
    are stored, which is what `SampleDataset` takes.

    Args:
        files: paths or addresses, in the order of their rows.
        open_file: file -> what `pyarrow.parquet.ParquetFile` reads; None: files of this machine.
        window_bytes: of a window, uncompressed; one row group at least, however large.
    Raises:
        ValueError: a file is no parquet file, or has other columns than the first; names it.
    """

    def __init__(
        self,
        files: Sequence[str],
        *,
        open_file: Callable[[str], Any] | None = None,
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
        self._sources: dict[str, str] = {}  # our name of a column -> the file's, if any differs
        self.groups = self._row_groups()
        self._starts = np.array([group.start for group in self.groups], dtype=np.int64)
        self._window_bytes = window_bytes
        self._kept: OrderedDict[int, pa.Table] = OrderedDict()
        self.num_reads = 0

    def _footer(self, file: str) -> Any:
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
        """Row `index` as a table of one row.

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
        """Give columns (old name -> new) other names, and leave some out."""
        kept = [name for name in self.column_names if name not in without]
        self._sources = {columns.get(name, name): name for name in kept}
        self.column_names = list(self._sources)
        datasets_of = {name: self.features[source] for name, source in self._sources.items()}
        self.features = type(self.features)(datasets_of)

    def _table(self, group: int) -> pa.Table:
        """The rows of a group, read unless they are kept."""
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        import pyarrow.parquet as pq

        at = self.groups[group]
        source = self._open(self._files[at.file])
        with pq.ParquetFile(source, metadata=self._footers[at.file], pre_buffer=True) as file:
            table = file.read_row_group(at.number)
        self.num_reads += 1
        # Room is made before the new one is kept: a window ends while the next begins.
        while self._kept and self._bytes_kept() + table.nbytes > 2 * self._window_bytes:
            self._kept.popitem(last=False)
        self._kept[group] = table
        return table

    def _bytes_kept(self) -> int:
        return sum(table.nbytes for table in self._kept.values())

    def permutation(self, generator: np.random.Generator) -> np.ndarray:
        """All rows (N,) int64 in an order that reads each row group once.

        Groups are shuffled, neighbours are joined to windows, and the rows of a window are
        shuffled: rows that are stored in the same group are at most a window apart.
        """
        order = generator.permutation(len(self.groups)).tolist()
        parts: list[np.ndarray] = []
        window: list[np.ndarray] = []
        size = 0
        for group in (self.groups[number] for number in order):
            num_bytes = int(group.num_bytes * self._expansion)
            if window and size + num_bytes > self._window_bytes:
                parts.append(generator.permutation(np.concatenate(window)))
                window, size = [], 0
            window.append(np.arange(group.start, group.start + group.num_rows))
            size += num_bytes
        if window:
            parts.append(generator.permutation(np.concatenate(window)))
        return np.concatenate(parts) if parts else np.arange(0)

    @cached_property
    def _expansion(self) -> float:
        """How much larger a group is in memory than its footer says: encodings save on repetition,
        so a prompt that all rows share is stored once."""
        return max(1.0, self._table(0).nbytes / max(1, self.groups[0].num_bytes))
