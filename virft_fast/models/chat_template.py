"""Chat templates are programs that a model's folder brings. transformers runs them in Jinja's
sandbox, without files and imports; here they are also bounded in time and memory."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LIMIT_S = 5.0  # of CPU time; an honest template takes milliseconds
LIMIT_BYTES = 512 * 2**20
LIMIT_CHARACTERS = 100_000
_PROBE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]


class _TooLong(BaseException):
    """Not an Exception: nothing that a template runs may catch it."""


def check_chat_template(processor: Any, name: str) -> None:
    """Render one short question in a child process, before anything else is rendered.

    Args:
        name: of the model, for the message.
    Raises:
        ValueError: the template fails, does not end, or needs too much memory.
    """

    def probe() -> str:
        text = processor.apply_chat_template(_PROBE, tokenize=False, add_generation_prompt=True)
        if len(text) > LIMIT_CHARACTERS:
            return f"{len(text):,} characters for a question of one"
        return "ok"

    found = _in_child(probe)
    if found != "ok":
        raise ValueError(
            f"--model_name_or_path {name!r}: expected a chat template that renders a question with "
            f"an image, got {found}; copy chat_template.jinja or .json of the original model"
        )


def render(processor: Any, messages: Sequence[dict[str, Any]]) -> str:
    """The messages as the model reads them, up to where its answer begins.

    Raises:
        ValueError: the template fails, or takes longer than `LIMIT_S` between two operations.
    """
    ends = time.thread_time() + LIMIT_S

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if time.thread_time() > ends:
            raise _TooLong
        # Jinja's name for compiled templates: their lines count, elsewhere calls are enough.
        return trace if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    try:
        sys.settrace(trace)  # works in every thread, unlike a signal
        try:
            return processor.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        finally:
            sys.settrace(before)
    except _TooLong:
        raise ValueError(f"the chat template fails: no end after {LIMIT_S:g} s") from None
    except Exception as error:  # whatever a template's program can raise
        raise ValueError(f"the chat template fails: {_said(error)}") from error


def _in_child(function: Callable[[], str]) -> str:
    """What a function returns, or how it fails, in a process with bounded time and memory."""
    read, write = os.pipe()
    with warnings.catch_warnings():  # the child does nothing that a thread of ours could block
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            _limit()
            try:
                said = function()
            except BaseException as error:
                said = _said(error)
            os.write(write, said.encode("utf-8", "replace")[:2000])
        finally:
            os.kill(os.getpid(), signal.SIGKILL)  # Python's own shutdown is the parent's
    try:
        os.close(write)
        poll = select.poll()
        poll.register(read, select.POLLIN)
        # Twice the CPU time: the machine may be busy.
        ready = poll.poll(2000 * LIMIT_S)
        said = os.read(read, 2000).decode("utf-8", "replace") if ready else ""
        return said or f"one that does not end within {LIMIT_S:g} s"
    finally:
        os.close(read)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _limit() -> None:
    """Bound this process."""
    seconds = math.ceil(LIMIT_S)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # elsewhere than on Linux: time alone
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + LIMIT_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]
