"""Standard output and error that may break without taking the run with them."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class _Unbreakable:
    """A text stream whose writes are lost, and not an error, where it can't be written:
    `| head` has ended, the log's disk is full."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is not lost either
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def unbreakable() -> Iterator[None]:
    """Context, and decorator, in which neither standard stream raises an error when written to.

    At its end what is still buffered for a broken stream is dropped, so that Python does not end
    with status 120 over it.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        # A stream that was closed before Python started is None.
        _Unbreakable(open(os.devnull, "w") if stream is None else stream)  # noqa: SIM115
        for stream in before
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            _settle(stream)


def _settle(stream: Any) -> None:
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
            stream.flush()


def say(text: str) -> None:
    """To standard error, by the main process."""
    from virft_fast import dist  # torch

    if dist.is_main():
        print(text, file=sys.stderr)
