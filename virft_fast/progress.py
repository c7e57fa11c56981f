"""What this process did last, and when, for a watcher in another thread (`virft_fast.watch`)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

_what, _when = "start", time.monotonic()
_collective: str | None = None
_busy = 0


def mark(what: str) -> None:
    """Note that the run has moved on, to `what`."""
    global _what, _when
    _what, _when = what, time.monotonic()


@contextlib.contextmanager
def waiting(collective: str) -> Iterator[None]:
    """Note that this process waits for the others in a collective."""
    global _collective
    before, _collective = _collective, collective
    try:
        yield
    finally:
        _collective = before
    mark(_what)


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """A part that takes its time, such as writing to a slow disk: all of it is progress."""
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
    """What was marked last, and the collective that is waited in."""
    return _what if _collective is None else f"{_what}, waiting in {_collective}"
