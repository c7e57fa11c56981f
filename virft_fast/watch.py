"""Keeps a run from hanging unnoticed: stop signals, time limits for calls that may never return,
launchers that have exited, ranks that wait for each other.

A thread checks twice a second. It can't raise in the main thread, so it sends the main thread a
signal, whose handler raises. If native code keeps the handler from running, it ends the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import virft_fast
from virft_fast import progress

logger = logging.getLogger("virft_fast")

# Asks the main thread to leave a section; no launcher or library sends it.
WAKE = getattr(signal, "SIGRTMIN", signal.SIGUSR2) + (5 if hasattr(signal, "SIGRTMIN") else 0)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
EXIT_STATUS: dict[int, int] = {signal.SIGINT: 130, signal.SIGHUP: 129}
TICK = 0.5
STOP_SECONDS = 10.0  # from a signal until a section is given up; the run ends within 20 s
DEAF_SECONDS = 5.0  # from then until the process is ended
TIMER = getattr(signal, "SIGVTALRM", None)  # from the kernel, after CPU time
NATIVE_SECONDS = 30.0  # from a limit until a process that runs no Python is ended
STALL_SECONDS = 600.0  # without progress until every rank writes where it stands
WRITE_SECONDS = 2.0  # for a process to write its last message
ORPHAN_SECONDS = 60.0  # without progress until a process without launcher is ended


_handled: dict[int, Any] = {}  # signals that a watch handles -> their previous handlers


def _after_fork() -> None:
    """In a forked child, such as a reward function's: restore the signal handlers from before the
    watch, and treat this process's parent as the launcher."""
    virft_fast.PARENT_PROCESS = os.getppid()
    for number, handler in _handled.items():
        with contextlib.suppress(ValueError, TypeError):
            signal.signal(number, handler)


os.register_at_fork(after_in_child=_after_fork)


class SectionTimeout(BaseException):
    """A section took longer than its limit. A BaseException, so that `except Exception` in a reward
    function doesn't swallow it."""


class SectionStopped(BaseException):
    """A section was abandoned because the run was asked to stop."""


class Section(NamedTuple):
    """What the main thread is doing, and its deadline on `time.monotonic`'s clock."""

    what: str
    limit: float | None
    deadline: float
    patience: float  # seconds from a stop signal until it is given up


@dataclass(eq=False)
class Watch:
    """A context manager: inside it, the thread runs and signals are handled.

    Args:
        output_dir: where a rank writes its stacks when it makes no progress.
        rank, world_size: of this process.
        timeout: seconds without progress until a process is ended, if there are several.
        beat: called every `beat_seconds`; returns False if the run has to end.
        comfort: says what can be resumed, for the message of a run that is ended here.
    """

    output_dir: Path
    _: KW_ONLY
    rank: int = 0
    world_size: int = 1
    timeout: float = 1800.0
    beat: Callable[[], bool] = lambda: True
    beat_seconds: float = 30.0
    comfort: Callable[[], str] = lambda: ""

    def __post_init__(self) -> None:
        self.received: int | None = None
        self._received_at = 0.0
        self._section: Section | None = None
        self._woken_at: float | None = None  # when the section was first asked to end
        self._given_up: BaseException | None = None
        self._parent = virft_fast.PARENT_PROCESS if "LOCAL_RANK" in os.environ else None
        self._ended = threading.Event()
        self._handlers: dict[int, Any] = {}
        self._stalled = False

    def __enter__(self) -> Watch:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # e.g. by nohup
                    self._handlers[number] = signal.signal(number, self._stop)
            for wakes in (WAKE, TIMER):
                if wakes is not None:
                    self._handlers[wakes] = signal.signal(wakes, self._wake)
            _handled.update(self._handlers)
        progress.mark("start")
        threading.Thread(target=self._run, name="virft_fast watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        _handled.clear()
        for number, handler in self._handlers.items():
            # A WAKE that is still pending would end the process under the default handler.
            default = signal.SIG_IGN if number in (WAKE, TIMER) else signal.SIG_DFL
            signal.signal(number, default if handler in (None, signal.SIG_DFL) else handler)

    @property
    def stopped(self) -> bool:
        """Whether the run has been asked to stop."""
        return self.received is not None

    @property
    def exit_status(self) -> int:
        """The exit status of a run that was asked to stop and could save."""
        return EXIT_STATUS.get(self.received or 0, 0)

    @contextlib.contextmanager
    def section(
        self, what: str, limit: float | None = None, *, patience: float | None = None
    ) -> Iterator[None]:
        """A part of the run that can be abandoned; if it is, its results are discarded.

        Args:
            what: its name in messages.
            limit: seconds it may take; None: no limit.
            patience: seconds it may take after a stop signal; None: STOP_SECONDS.
        Raises:
            SectionTimeout, SectionStopped: in the main thread only.
        """
        before, self._given_up = self._section, None
        deadline = time.monotonic() + limit if limit is not None else float("inf")
        patience = STOP_SECONDS if patience is None else patience
        self._section = Section(what, limit, deadline, patience)
        progress.mark(what)
        if limit is not None and WAKE in self._handlers:
            # faulthandler's thread needs no interpreter, which native code may never release.
            faulthandler.dump_traceback_later(limit + NATIVE_SECONDS, exit=True, file=2)
            self._set_timer(limit / 4)
        if self.stopped:
            self._set_timer(TICK)
        try:
            yield
        finally:
            self._section, self._woken_at = before, None
            self._set_timer(0.0)
            given_up, self._given_up = self._given_up, None
            if limit is not None and WAKE in self._handlers:
                faulthandler.cancel_dump_traceback_later()
            if given_up is not None:  # even if the section caught it
                raise given_up
        progress.mark(f"after {what}")

    # In the main thread

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            if self.world_size > 1:  # an exception here would not free it from a collective
                self._end("interrupted twice", 130)
            raise KeyboardInterrupt
        first = self.received is None
        if first:
            self._received_at = time.monotonic()
            again = "; once more ends it at once, unsaved" if number == signal.SIGINT else ""
            self._say(f"{signal.Signals(number).name}: the run stops at the next step{again}")
        self.received = number
        if self._section is not None:
            self._set_timer(TICK)
        if first and self._section is not None and self._section.patience == 0:
            raise SectionStopped(f"{self._section.what} was given up")

    def _set_timer(self, seconds: float) -> None:
        """Have the kernel wake the main thread after that much CPU time, then every TICK; 0 cancels
        this. A regular expression blocks all threads, including the watch's, but it does check for
        signals."""
        if TIMER in self._handlers:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds, TICK if seconds else 0.0)

    def _wake(self, number: int, frame: FrameType | None) -> None:
        section, now = self._section, time.monotonic()
        if section is None:
            return
        if now >= section.deadline:
            limit = f"{section.limit:g} s"
            self._given_up = SectionTimeout(f"{section.what} took longer than {limit}")
        elif self.stopped and now >= self._received_at + section.patience:
            self._given_up = SectionStopped(f"{section.what} was given up")
        if self._given_up is not None:
            raise self._given_up

    # In the thread of the watch

    def _run(self) -> None:
        beaten = time.monotonic()
        while not self._ended.wait(TICK):
            now = time.monotonic()
            self._look_at_section(now)
            self._look_for_launcher()
            self._look_for_progress()
            if now - beaten >= self.beat_seconds:
                beaten = now
                if not self.beat():
                    self._end("another run has taken over this folder")

    def _look_at_section(self, now: float) -> None:
        section = self._section
        if section is None or WAKE not in self._handlers:  # the watch isn't in the main thread
            return
        stop = self._received_at + section.patience if self.stopped else float("inf")
        deadline = min(section.deadline, stop)
        if now < deadline:
            return
        with contextlib.suppress(ProcessLookupError, ValueError):
            signal.pthread_kill(threading.main_thread().ident or 0, WAKE)
        if self._woken_at is None:
            self._woken_at = now
        if now >= self._woken_at + DEAF_SECONDS and self._section is section:
            self._end(f"{section.what} does not return and can't be interrupted")

    def _look_for_launcher(self) -> None:
        if self._parent is None or os.getppid() == self._parent:
            return
        if not self.stopped:
            self._received_at, self.received = time.monotonic(), signal.SIGTERM
            logger.error("the launcher is gone; stopping after this step")
        if min(progress.idle(), time.monotonic() - self._received_at) > ORPHAN_SECONDS:
            self._end("the launcher is gone, and the other processes don't answer")

    def _look_for_progress(self) -> None:
        idle = progress.idle()
        if idle < STALL_SECONDS:
            self._stalled = False
            return
        if not self._stalled:
            self._stalled = True
            path = self._write_stacks(idle)
            logger.error(
                "rank %d: no progress for %.0f s, at %s; stacks are in %s",
                self.rank, idle, progress.where(), path,
            )  # fmt: skip
        section = self._section
        setting_up = section is not None and section.patience == 0  # a large model, a slow disk
        if self.world_size > 1 and idle >= self.timeout and not setting_up:
            self._end(f"no progress for {idle:.0f} s (--ddp_timeout), at {progress.where()}")

    def _write_stacks(self, idle: float) -> Path | None:
        """Write the stacks of this process's threads to a file, one file per rank."""
        path = self.output_dir / f"stalled-rank-{self.rank}.txt"
        try:
            with path.open("a") as file:
                file.write(
                    f"{time.strftime('%F %T')} rank {self.rank} of {self.world_size}, process "
                    f"{os.getpid()}: no progress for {idle:.0f} s\nat {progress.where()}\n"
                )
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            logger.error("could not write %s: %s", path, error)
            return None
        return path

    def _say(self, text: str) -> None:
        # Not by logging, whose lock the interrupted code may hold; straight to the descriptor.
        if self.rank == 0:
            _write(f"virft_fast: {text}\n")

    def _end(self, why: str, status: int = 1) -> None:
        """End the process, whatever the main thread does; nothing can be saved."""
        text = f"virft_fast: rank {self.rank}: {why}; this process ends. {self.comfort()}\n"
        # A pipe that nobody reads must not block the exit.
        writes = threading.Thread(target=_write, args=(text,), daemon=True)
        writes.start()
        writes.join(WRITE_SECONDS)
        os._exit(status)


def _write(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
