"""What this process did last, and when, for the watcher thread of `virft_fast.watch`; and progress
bars for work that may take long."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")
BAR_SECONDS = 2.0  # until a bar appears
_what, _when = "start", time.monotonic()
_collective: str | None = None
_busy = 0


def mark(what: str) -> None:
    """Record that the run has reached `what`."""
    global _what, _when
    _what, _when = what, time.monotonic()


@contextlib.contextmanager
def waiting(collective: str) -> Iterator[None]:
    """Record that this process waits for the others in a collective."""
    global _collective
    before, _collective = _collective, collective
    try:
        yield
    finally:
        _collective = before
    mark(_what)


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """Count the whole body as progress, because it may take long, like writing to a slow disk."""
    global _busy
    mark(what)
    _busy += 1
    try:
        yield
    finally:
        _busy -= 1
        mark(what)


def idle() -> float:
    """Seconds since the last mark."""
    return 0.0 if _busy else time.monotonic() - _when


def where() -> str:
    """The last mark, and the collective in which this process waits."""
    return _what if _collective is None else f"{_what}, waiting in {_collective}"


def bar(
    items: Iterable[T], what: str, unit: str, *, total: int | None = None, shown: bool = True
) -> tqdm[T]:
    """The items, with a bar on a terminal that appears if they take longer than BAR_SECONDS.

    Args:
        total: their number; None: `len(items)`. With no items the caller updates the bar.
    """
    from tqdm import tqdm

    disable = None if shown else True  # None: disabled unless stderr is a terminal
    return tqdm(items, what, total, unit=unit, delay=BAR_SECONDS, leave=False, disable=disable)
