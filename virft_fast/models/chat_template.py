"""Renders chat templates, which are programs in a model's folder.

transformers runs them in Jinja's sandbox, without access to files or imports. This module also
limits their time and memory.
"""

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
from types import FrameType
from typing import TYPE_CHECKING

from virft_fast.batch import Row
from virft_fast.models.families import Processor, family_of

if TYPE_CHECKING:
    from _typeshed import TraceFunction

LIMIT_S = 5.0  # CPU time; a normal template takes milliseconds
LIMIT_BYTES = 512 * 2**20
LIMIT_CHARACTERS = 100_000
_PROBE: list[Row] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
]


class _TooLong(BaseException):
    """Not an Exception, so that no code that a template calls catches it."""


def check_chat_template(processor: Processor, name: str) -> None:
    """Check a chat template before its first use: render a short question in a child process.

    Args:
        name: the model's name, for the error message.
    Raises:
        ValueError: the template fails, doesn't finish, or needs too much memory.
    """

    def probe() -> str:
        text = processor.apply_chat_template(_PROBE, tokenize=False, add_generation_prompt=True)
        if len(text) > LIMIT_CHARACTERS:
            return f"{len(text):,} characters for a question of one"
        return "ok"

    outcome = _in_child(probe)
    if outcome != "ok":
        raise ValueError(
            f"--model_name_or_path {name!r}: expected a chat template that renders a question with "
            f"an image, got {outcome}; copy chat_template.jinja or .json of the original model"
        )


def render(processor: Processor, messages: Sequence[Row]) -> str:
    """The prompt as the model reads it, up to the start of its answer.

    Raises:
        ValueError: the template fails, or takes longer than `LIMIT_S` between two operations.
    """
    ends = time.thread_time() + LIMIT_S
    in_parts = not family_of(getattr(processor, "model_type", "qwen2_vl")).is_qwen

    def trace(frame: FrameType, event: str, arg: object) -> TraceFunction | None:
        if time.thread_time() > ends:
            raise _TooLong
        # "<template>" is Jinja's name for a compiled template. Trace each of its lines, because a
        # loop might call nothing; elsewhere, trace only calls.
        return trace if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    try:
        sys.settrace(trace)  # works in every thread, unlike a signal
        try:
            chat = [_in_parts(message) for message in messages] if in_parts else list(messages)
            return processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        finally:
            sys.settrace(before)
    except _TooLong:
        raise ValueError(f"the chat template fails: no end after {LIMIT_S:g} s") from None
    except Exception as error:  # a template can raise anything
        raise ValueError(f"the chat template fails: {_describe(error)}") from error


def _in_parts(message: Row) -> Row:
    """A message whose text is a list of parts: many templates read nothing else."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {**message, "content": parts}


def _in_child(function: Callable[[], str]) -> str:
    """Run a function with limited time and memory; returns its result or how it failed."""
    read, write = os.pipe()
    with warnings.catch_warnings():  # about threads; the child needs none of their locks
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            _limit()
            try:
                text = function()
            except BaseException as error:
                text = _describe(error)
            os.write(write, text.encode("utf-8", "replace")[:2000])
        finally:
            os.kill(os.getpid(), signal.SIGKILL)  # skip Python's shutdown: it is the parent's
    try:
        os.close(write)
        poll = select.poll()
        poll.register(read, select.POLLIN)
        # Twice the limit of CPU time, because the machine may be busy.
        ready = poll.poll(2000 * LIMIT_S)
        text = os.read(read, 2000).decode("utf-8", "replace") if ready else ""
        return text or f"one that does not end within {LIMIT_S:g} s"
    finally:
        os.close(read)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _limit() -> None:
    """Limit this process's CPU time and memory."""
    seconds = math.ceil(LIMIT_S)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # without Linux's /proc, only time is limited
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + LIMIT_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]
