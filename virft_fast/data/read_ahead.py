"""Loads the rows of the next step in a thread, while the current step computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")
CLOSE_SECONDS = 5.0  # for the row that is being loaded when a run ends


class ReadAhead(Generic[T]):
    """Returns rows as `load` does, and loads some before they are asked for.

    It holds only the rows of the last `start`. It decides nothing about the order of rows, so a
    resumed run sees the same rows.

    Args:
        load: row -> what to return. No two threads are in it at the same time.
    """

    def __init__(self, load: Callable[[int], T]) -> None:
        self._load, self._lock = load, threading.Lock()
        self._rows: dict[int, Future[T]] = {}
        self._thread: threading.Thread | None = None

    def start(self, indices: Sequence[int]) -> None:
        """Start to load rows; drop those of the last call that nobody has asked for."""
        self._drop()
        self._rows = {index: Future() for index in indices}
        # A daemon, because a disk that doesn't answer must not keep the process from ending.
        self._thread = threading.Thread(
            target=self._run, args=(dict(self._rows),), name="virft_fast reader", daemon=True
        )
        self._thread.start()

    def __call__(self, index: int) -> T:
        """Row `index`, as loaded ahead or else loaded now. Raises what loading it raised."""
        row = self._rows.pop(index, None)
        if row is not None:
            return row.result()
        with self._lock:
            return self._load(index)

    def _run(self, rows: dict[int, Future[T]]) -> None:
        for index, row in rows.items():
            if not row.set_running_or_notify_cancel():
                continue
            try:
                with self._lock:
                    loaded = self._load(index)
            except BaseException as error:  # raised again where the row is asked for
                row.set_exception(error)
            else:
                row.set_result(loaded)

    def _drop(self) -> None:
        for row in self._rows.values():
            row.cancel()
        self._rows = {}

    def close(self) -> None:
        """Drop all rows, and wait up to CLOSE_SECONDS for the thread."""
        self._drop()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
