"""Standard streams that may break without ending the run."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from typing import TextIO


class _Unbreakable:
    """A text stream that drops text it can't write, instead of raising an error, for example
    because `| head` has exited or the log's disk is full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):  # escape characters that its encoding lacks
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextlib.contextmanager
def unbreakable() -> Iterator[None]:
    """Context and decorator in which writing to a standard stream raises no error.

    On exit, text still buffered for a broken stream is dropped; otherwise Python would exit with
    status 120.
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


def _settle(stream: TextIO | None) -> None:
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


def log_warnings() -> None:
    """Print the warnings of all loggers, but for one that asks the user for nothing."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    # On import, which transformers and peft do if it is installed, bitsandbytes says that a kernel
    # for 4-bit rollouts on CPUs is missing.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def say(text: str) -> None:
    """Print to standard error on the main process."""
    from virft_fast import dist  # imports torch

    if dist.is_main():
        print(text, file=sys.stderr)
