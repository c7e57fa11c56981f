"""The order in which training takes rows, and the account of those that can't be used."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from virft_fast.data.loading import BadRow

logger = logging.getLogger(__name__)

MAX_LISTED = 10


class NoUsableRows(ValueError):
    """Not one row of the data set can be used; the text says why of some."""


class TooManyBadRows(RuntimeError):
    """More rows than allowed can't be used; the text lists some."""


class BadRows:
    """Counts the distinct rows that could not be used and stops the run when there are too many.

    Args:
        max_bad_rows: allowed before `add` raises.
    """

    def __init__(self, max_bad_rows: int) -> None:
        self.max_bad_rows = max_bad_rows
        self._reasons: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, index: int, reason: str) -> None:
        """Count row `index`, once, and log it.

        Raises:
            TooManyBadRows: this one is one too many.
        """
        if index in self._reasons:
            return
        self._reasons[index] = reason
        logger.warning("skipped row %d: %s", index, reason)
        if len(self) > self.max_bad_rows:
            raise TooManyBadRows(
                f"{len(self)} rows can't be used, allowed are {self.max_bad_rows} "
                f"(--max_bad_rows); mend the data or raise it:\n{self._listing()}"
            )

    def _listing(self) -> str:
        lines = [f"  row {i}: {reason}" for i, reason in list(self._reasons.items())[:MAX_LISTED]]
        left = len(self) - len(lines)
        return "\n".join([*lines, f"  and {left} more"] if left else lines)

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, in JSON's types."""
        return {"rows": [[index, reason] for index, reason in self._reasons.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._reasons = dict(state["rows"])


class PromptSampler:
    """Hands out the rows of a data set, epoch after epoch, to any number of ranks.

    A global batch is the next `world_size * batch_size` usable rows of the epoch's permutation;
    rank r gets its r-th part. So it does not depend on the number of ranks which rows make up a
    global batch of a given size, nor which bad ones are met on the way.

    Args:
        num_rows: rows of the data set.
        batch_size: rows this rank gets at a time.
        seed: of the permutations; each epoch has its own.
        shuffle: False takes the rows as they come.
        permutation: generator -> the rows of an epoch in their order, the same on all ranks; None:
            any order is as likely. `ParquetRows` has one that its files are read once in.
    Raises:
        ValueError: no rows, or no batch.
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

    def next_batch(
        self,
        load: Callable[[int], Any],
        gather: Callable[[Any], list[Any]],
        add_bad: Callable[[int, str], None],
    ) -> list[Any]:
        """This rank's next `batch_size` usable rows, loaded.

        Every rank has to call it, with the same data; `gather` is called equally often on all.

        Args:
            load: row -> what to return for it, or a `BadRow`. Not called again for a bad row.
            gather: value -> the values of all ranks, in their order.
            add_bad: told of each bad row (index, reason), on all ranks in the same order.
        Raises:
            NoUsableRows: none is.
        """
        batch: list[int] = []
        loaded: dict[int, Any] = {}
        while True:
            self._fill(batch)
            mine = batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
            bad = self._load_missing(mine, loaded, load)
            # A row that moves to another rank because one before it is bad is loaded there too:
            # the round after checks it, so no rank ever finds out alone.
            found = dict(row for part in gather(bad) for row in part)
            if not found:
                return [loaded[index] for index in mine]
            self._bad.update(found)
            for index, reason in found.items():
                add_bad(index, reason)
            batch = [index for index in batch if index not in found]

    def _fill(self, batch: list[int]) -> None:
        """Append the next rows not known to be bad until the global batch is full."""
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
            if index not in self._bad:
                batch.append(index)

    def _load_missing(
        self, indices: Sequence[int], loaded: dict[int, Any], load: Callable[[int], Any]
    ) -> list[tuple[int, str]]:
        """Load what is not yet in `loaded`; returns the bad ones, in the order of `indices`."""
        bad: dict[int, str] = {}
        for index in indices:
            if index in loaded or index in bad:
                continue
            item = load(index)
            if isinstance(item, BadRow):
                bad[index] = item.reason
            else:
                loaded[index] = item
        return list(bad.items())

    def _epoch_order(self) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_rows)
        return self._permute(np.random.default_rng((self.seed, self._epoch)))

    def _checksum(self) -> int:
        """Tells orders apart: that of a streamed set hangs on how its files are cut. Computed once
        an epoch, because every step asks for it."""
        if self._summed is None or self._summed[0] is not self._order:
            self._summed = self._order, zlib.crc32(self._order.astype("<i8").tobytes())
        return self._summed[1]

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch starts, in JSON's types; the same on all ranks."""
        return {
            "num_rows": self.num_rows,
            "seed": self.seed,
            "epoch": self._epoch,
            "position": self._position,
            "order": self._checksum(),
            "bad": [[index, reason] for index, reason in self._bad.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, on any number of ranks.

        Raises:
            ValueError: it is the state of another data set or seed.
        """
        for key in ("num_rows", "seed"):
            if state[key] != getattr(self, key):
                raise ValueError(
                    f"{key}: expected {state[key]}, as saved, got {getattr(self, key)}; go on "
                    f"with the same data set and seed"
                )
        last = max([state["position"] - 1, *(index for index, _ in state["bad"])])
        if last >= self.num_rows:
            raise ValueError(f"position, bad: expected rows below {self.num_rows}, got {last}")
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._epoch_order()
        if self._checksum() != state["order"]:
            raise ValueError(
                "order: expected the rows in the order that was saved; go on with the same files, "
                "streamed or not as before"
            )
        self._bad = dict(state["bad"])
