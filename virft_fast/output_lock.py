"""One run per output folder: `.lock` names the process that writes there.

The owner touches the file while it lives. Another run takes over the lock in two cases. Either the
owner was a process on this host and is gone, or it runs on another host or in another container and
has not touched the file for HEARTBEAT_LIMIT seconds. Ages are measured by the file system's own
clock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from virft_fast.batch import Row
from virft_fast.json_files import json_object

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
HEARTBEAT_SECONDS, HEARTBEAT_LIMIT = 30.0, 600.0
_MUTEX_SECONDS = 10.0


class OutputLock:
    """The lock of a folder, held from `acquire` to `release`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self.owner = _this_process()
        self.held = False

    def acquire(self) -> None:
        """Take the lock of an existing folder.

        Raises:
            ValueError: another run holds it; says which.
            OSError: the folder can't be written.
        """
        with self._mutex() as content:
            other = json_object(content)
            if other is not None and other.get("token") != self.owner["token"]:
                self._refuse_if_alive(other)
            self.path.write_text(json.dumps(self.owner))
        self.held = True

    def beat(self) -> bool:
        """Show that this process is alive; False if another run has taken the lock over."""
        if not self.held:
            return True
        try:
            if not self._is_mine():
                return False
            os.utime(self.path)
        except FileNotFoundError:  # deleted, but not taken over
            return self._write_anew()
        except OSError as error:  # a temporary failure of the file system, not another run
            logger.warning("could not touch %s: %s", self.path, error)
        return True

    def release(self) -> None:
        """Delete the lock file, if it still names this process."""
        with contextlib.suppress(OSError):
            if self.held and self._is_mine():
                self.path.unlink()
        self.held = False

    def _write_anew(self) -> bool:
        try:
            with self.path.open("x") as file:
                file.write(json.dumps(self.owner))
        except FileExistsError:
            return False
        except OSError as error:
            logger.warning("could not write %s: %s", self.path, error)
        return True

    def _is_mine(self) -> bool:
        return (json_object(self.path.read_bytes()) or {}).get("token") == self.owner["token"]

    def _refuse_if_alive(self, other: Row) -> None:
        who = f"process {other.get('pid')} on {other.get('host')}"
        if all(other.get(key) == self.owner[key] for key in ("host", "boot", "namespace")):
            started = _started(other.get("pid"))
            if started is not None and started == other.get("started"):
                raise ValueError(
                    f"{self.path.parent} is being written by another run, {who}; wait for it, stop "
                    "it, or pass another folder"
                )
            logger.warning("%s was left by %s, which is gone; taken over", self.path, who)
            return
        age = self._age()
        if age < HEARTBEAT_LIMIT:
            raise ValueError(
                f"{self.path.parent} is being written by another run, {who}, which was alive "
                f"{max(age, 0):.0f} s ago; stop it or pass another folder; if it is gone, wait "
                f"until {HEARTBEAT_LIMIT:.0f} s have passed, or delete {self.path}"
            )
        logger.warning(
            "%s was left by %s, not heard of for %.0f s; taken over", self.path, who, age
        )

    def _age(self) -> float:
        """Seconds since the last touch, by the file system's clock."""
        probe = self.path.with_name(f"{LOCK_FILE}.{uuid.uuid4().hex}")
        probe.touch()
        try:
            return probe.stat().st_mtime - self.path.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _mutex(self) -> Iterator[bytes]:
        """Yield the lock file's content; in the body no other process reads or writes the file."""
        deadline = time.monotonic() + _MUTEX_SECONDS
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if self._flocked(descriptor, deadline) and self._replaced(descriptor):
                    continue  # deleted between `open` and `flock`
                yield os.pread(descriptor, 1 << 16, 0)
                return
            finally:
                os.close(descriptor)

    def _flocked(self, descriptor: int, deadline: float) -> bool:
        """Whether the file is locked; False, with a warning, if the file system has no locks."""
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"{self.path}: another process holds it for more than "
                        f"{_MUTEX_SECONDS:.0f} s; is a run starting in this folder?"
                    ) from None
                time.sleep(0.05)
            except OSError as error:
                logger.warning(
                    "%s: this file system has no locks (%s): a run that starts in this folder at "
                    "the same moment would not be noticed", self.path, error,
                )  # fmt: skip
                return False

    def _replaced(self, descriptor: int) -> bool:
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(descriptor))
        except FileNotFoundError:
            return True


def _this_process() -> Row:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": _or_none(lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip()),
        "namespace": _or_none(lambda: os.readlink("/proc/self/ns/pid")),
        "started": _started(os.getpid()),
        "token": uuid.uuid4().hex,
    }


def _started(pid: object) -> str | None:
    """When a process started, in clock ticks since boot; None if it does not run.

    Without /proc: "alive" if it runs."""
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0:
        return None
    if os.path.isdir("/proc/self"):
        stat = _or_none(Path(f"/proc/{pid}/stat").read_text)
        if stat is None:
            return None
        fields = stat.rpartition(")")[2].split()  # the name before may contain anything
        return None if fields[0] in "ZX" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except (PermissionError, OverflowError):
        pass
    return "alive"


def _or_none(read: Callable[[], str]) -> str | None:
    try:
        return read()
    except OSError:
        return None
