"""The order in which training uses rows, and the count of unusable rows."""

from __future__ import annotations

import contextlib
import copy
import logging
import zlib
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from virft_fast.batch import Row
from virft_fast.data.accounts import MAX_LISTED
from virft_fast.data.samples import BadRow

logger = logging.getLogger(__name__)

T = TypeVar("T")
Reasons = list[tuple[int, str]]  # (row, why it can't be used)


class NoUsableRows(ValueError):
    """No row of the data set can be used. The message gives one reason."""


class TooManyBadRows(RuntimeError):
    """There are more unusable rows than allowed. The message lists some of them."""


class BadRows:
    """Counts the distinct unusable rows and stops the run if there are too many.

    Args:
        max_bad_rows: `add` raises above this limit.
    """

    def __init__(self, max_bad_rows: int) -> None:
        self.max_bad_rows = max_bad_rows
        self._reasons: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, index: int, reason: str) -> None:
        """Count and log row `index`, unless that was done already.

        Raises:
            TooManyBadRows: the limit is exceeded.
        """
        if index in self._reasons:
            return
        self._reasons[index] = reason
        logger.warning("skipped row %d: %s", index, reason)
        if len(self) > self.max_bad_rows:
            raise TooManyBadRows(
                f"{len(self)} rows can't be used, more than --max_bad_rows {self.max_bad_rows}; "
                f"fix the data or raise the limit:\n{self._listing()}"
            )

    def _listing(self) -> str:
        lines = [f"  row {i}: {reason}" for i, reason in list(self._reasons.items())[:MAX_LISTED]]
        left = len(self) - len(lines)
        return "\n".join([*lines, f"  and {left} more"] if left else lines)

    def state_dict(self) -> Row:
        """The bad rows so far, as JSON values."""
        return {"rows": [[index, reason] for index, reason in self._reasons.items()]}

    def load_state_dict(self, state: Row) -> None:
        """Resume from a `state_dict`."""
        self._reasons = dict(state["rows"])


class PromptSampler:
    """Distributes the rows of a data set over ranks, epoch by epoch.

    A global batch is the next `world_size * batch_size` usable rows in the epoch's permutation.
    Rank r gets the r-th slice. For a given global batch size, the number of ranks changes neither
    the rows in a global batch nor which bad rows are skipped.

    Args:
        num_rows: number of rows in the data set.
        batch_size: number of rows per batch on this rank.
        seed: of the permutations; each epoch has its own permutation.
        shuffle: False: use the rows in their original order.
        permutation: generator -> an epoch's rows in order, the same on all ranks. None: all orders
            are equally likely. `ParquetRows.permutation` reads each file once.
        curriculum: a row that `note_equal` reported this many times in a row is used in every
            second epoch only, then in every third, and so on; 0: off.
    Raises:
        ValueError: there are no rows, the batch is empty, or the rank is out of range.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        permutation: Callable[[np.random.Generator], np.ndarray] | None = None,
        curriculum: int = 0,
    ) -> None:
        if num_rows < 1 or batch_size < 1:
            raise ValueError(f"expected rows and a batch, got {num_rows=}, {batch_size=}")
        if not 0 <= rank < world_size:
            raise ValueError(f"expected 0 <= rank < world_size, got {rank=}, {world_size=}")
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.rank, self.world_size, self.shuffle = rank, world_size, shuffle
        self._permute = permutation or (lambda generator: generator.permutation(num_rows))
        self._epoch = self._position = 0
        self._summed: tuple[np.ndarray, int] | None = None
        self._order = self._epoch_order()
        self._bad: dict[int, str] = {}
        self.curriculum = curriculum
        self._streaks = np.zeros(num_rows if curriculum else 0, dtype=np.int64)

    def next_batch(
        self,
        load: Callable[[int], T | BadRow],
        gather: Callable[[Reasons], list[Reasons]],
        add_bad: Callable[[int, str], None],
    ) -> list[T]:
        """Load this rank's next `batch_size` usable rows.

        Every rank must call it with the same data. All ranks call `gather` equally often.

        Args:
            load: row -> what to return for it, or a `BadRow`. A bad row is not loaded again.
            gather: value -> the values of all ranks, in rank order.
            add_bad: called with each bad row (index, reason), in the same order on all ranks.
        Raises:
            NoUsableRows: no row of the data set can be used.
        """
        batch: list[int] = []
        loaded: dict[int, T] = {}
        while True:
            self._fill(batch)
            mine = batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
            new = {index: load(index) for index in dict.fromkeys(mine) if index not in loaded}
            loaded |= {n: item for n, item in new.items() if not isinstance(item, BadRow)}
            bad = [(n, item.reason) for n, item in new.items() if isinstance(item, BadRow)]
            # A bad row shifts later rows to other ranks, which load them in the next round. So the
            # rounds end only when all ranks agree that no row is bad.
            reasons = dict(reason for of_rank in gather(bad) for reason in of_rank)
            if not reasons:
                return [loaded[index] for index in mine]
            self._bad.update(reasons)
            for index, reason in reasons.items():
                add_bad(index, reason)
            batch = [index for index in batch if index not in reasons]

    def upcoming(self) -> list[int]:
        """This rank's rows in the next batch, if none of the batch is bad. Changes nothing."""
        ahead, batch = copy.copy(self), list[int]()
        with contextlib.suppress(NoUsableRows):
            ahead._fill(batch)
        return batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]

    def _fill(self, batch: list[int]) -> None:
        """Append the next rows that aren't known to be bad, until the global batch is full."""
        while len(batch) < self.world_size * self.batch_size:
            if len(self._bad) == self.num_rows:
                raise NoUsableRows(
                    f"expected at least one usable row, but none of the {self.num_rows} rows is; "
                    f"the last: {list(self._bad.items())[-1][1]}"
                )
            if self._position == self.num_rows:
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._epoch_order()
            index = int(self._order[self._position])
            self._position += 1
            if index not in self._bad and not self._rests(index):
                batch.append(index)

    def _rests(self, index: int) -> bool:
        """Whether the curriculum leaves the row out of this epoch. Rows take turns, so that those
        with the same count don't return together."""
        period = self._streaks[index] - self.curriculum + 2 if self.curriculum else 1
        return bool(period > 1 and (self._epoch + index) % period)

    def note_equal(self, rows: Mapping[int, bool]) -> None:
        """Count, for the curriculum, how often in a row a row's completions got equal rewards.

        Args:
            rows: row -> whether they did; the same on all ranks.
        """
        for index, equal in rows.items():
            self._streaks[index] = self._streaks[index] + 1 if equal else 0

    @property
    def num_rarer(self) -> int:
        """The number of rows that the curriculum uses less often at present."""
        return int((self._streaks >= self.curriculum).sum()) if self.curriculum else 0

    def streaks(self) -> list[list[int]]:
        """The curriculum's state, as JSON values: [row, count], without rows whose count is 0."""
        rows = np.flatnonzero(self._streaks)
        return np.stack([rows, self._streaks[rows]], axis=1).tolist()

    def load_streaks(self, streaks: list[list[int]]) -> None:
        """Resume from `streaks`; without a curriculum, they are dropped.

        Raises:
            ValueError: they belong to another data set.
        """
        last = max((row for row, _ in streaks), default=0)
        if last >= self.num_rows:
            raise ValueError(f"curriculum: expected rows below {self.num_rows}, got {last}")
        for row, count in streaks if self.curriculum else ():
            self._streaks[row] = count

    def _epoch_order(self) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_rows)
        return self._permute(np.random.default_rng((self.seed, self._epoch)))

    def _checksum(self) -> int:
        """A checksum of the epoch's order, which depends on the row groups if the set is streamed.
        Computed once per epoch, because each step saves it."""
        if self._summed is None or self._summed[0] is not self._order:
            self._summed = self._order, zlib.crc32(self._order.astype("<i8").tobytes())
        return self._summed[1]

    def state_dict(self) -> Row:
        """The position of the next batch, as JSON values; the same on all ranks."""
        bad = [[index, reason] for index, reason in self._bad.items()]
        return {"num_rows": self.num_rows, "seed": self.seed, "epoch": self._epoch,
                "position": self._position, "order": self._checksum(), "bad": bad}  # fmt: skip

    def load_state_dict(self, state: Row) -> None:
        """Resume from a `state_dict`, on any number of ranks.

        Raises:
            ValueError: it belongs to another data set or seed.
        """
        for key in ("num_rows", "seed"):
            if state[key] != getattr(self, key):
                raise ValueError(
                    f"{key}: expected {state[key]}, as saved, got {getattr(self, key)}; resume "
                    "with the same data set and seed"
                )
        last = max([state["position"] - 1, *(index for index, _ in state["bad"])])
        if last >= self.num_rows:
            raise ValueError(f"position, bad: expected rows below {self.num_rows}, got {last}")
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._epoch_order()
        if self._checksum() != state["order"]:
            raise ValueError(
                "order: expected the rows in the order that was saved; resume with the same "
                "files, streamed or not as before"
            )
        self._bad = dict(state["bad"])
