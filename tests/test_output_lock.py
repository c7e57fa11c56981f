"""One run a folder: who has it is known, and a lock that nobody holds is no obstacle."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest

from virft_fast import output_lock
from virft_fast.output_lock import HEARTBEAT_LIMIT, LOCK_FILE, OutputLock


def leave(folder, age=0.0, **changes):
    """A lock file that another process has written."""
    owner = OutputLock(folder).owner | {"token": "other"} | changes
    path = folder / LOCK_FILE
    path.write_text(json.dumps(owner))
    os.utime(path, (time.time() - age,) * 2)
    return path


def ended_pid():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_folder_belongs_to_one_run_until_it_is_released(tmp_path):
    first, second = OutputLock(tmp_path), OutputLock(tmp_path)
    first.acquire()
    with pytest.raises(ValueError, match=rf"another run, process {os.getpid()} on "):
        second.acquire()
    second.release()  # not its own
    assert first.beat()
    first.release()
    assert not list(tmp_path.iterdir())
    second.acquire()
    assert second.beat()


@pytest.mark.parametrize(
    "gone",
    [
        lambda: {"pid": ended_pid()},
        lambda: {"started": "1"},  # the number belongs to another process now
        lambda: {"pid": "text"},
        lambda: {"pid": -1},
        lambda: {"pid": 10**30},
        lambda: {"pid": None, "started": "5"},
        lambda: {"pid": ended_pid(), "started": None},
    ],
)
def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path, caplog, gone):
    leave(tmp_path, **gone())
    lock = OutputLock(tmp_path)
    lock.acquire()
    assert lock.beat() and "is gone; taken over" in caplog.text


@pytest.mark.parametrize("place", ["host", "boot", "namespace"])
def test_another_hosts_lock_is_taken_over_after_ten_minutes_of_silence(tmp_path, caplog, place):
    lock = OutputLock(tmp_path)
    leave(tmp_path, HEARTBEAT_LIMIT - 60, **{place: "elsewhere"})
    with pytest.raises(ValueError, match="was alive 5[34]. s ago"):
        lock.acquire()
    leave(tmp_path, HEARTBEAT_LIMIT + 60, **{place: "elsewhere"})
    lock.acquire()
    assert lock.beat() and "not heard of for 66" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b"[1]", b"[" * 100_000])
def test_what_is_no_lock_is_taken_over(tmp_path, content):
    (tmp_path / LOCK_FILE).write_bytes(content)
    lock = OutputLock(tmp_path)
    lock.acquire()
    assert lock.beat()


def test_an_owner_learns_that_its_lock_was_taken_over(tmp_path):
    lock = OutputLock(tmp_path)
    assert lock.beat()  # it has none yet
    lock.acquire()
    path = leave(tmp_path)
    assert not lock.beat()
    lock.release()
    assert path.is_file()
    path.unlink()
    lock.held = True
    assert lock.beat() and path.is_file()  # deleted by hand: still nobody else's


def test_a_beat_is_a_new_time(tmp_path):
    lock = OutputLock(tmp_path)
    lock.acquire()
    os.utime(lock.path, (1, 1))
    lock.beat()
    assert time.time() - lock.path.stat().st_mtime < 60


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = OutputLock(tmp_path)
    lock.acquire()
    assert "would not be noticed" in caplog.text
    with pytest.raises(ValueError, match="another run"):
        OutputLock(tmp_path).acquire()


def test_a_mutex_that_is_never_given_back_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(output_lock, "_MUTEX_SECONDS", 0.1)
    with (tmp_path / LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process holds it"):
            OutputLock(tmp_path).acquire()


def compete(folder, barrier, results):
    lock = OutputLock(folder)
    barrier.wait()
    try:
        lock.acquire()
        results.put(os.getpid())
    except ValueError:
        results.put(None)
    barrier.wait()  # nobody is gone before everybody has tried


@pytest.mark.parametrize("left", [False, True])
def test_of_runs_that_start_together_one_gets_the_folder(tmp_path, left):
    if left:
        leave(tmp_path, pid=ended_pid())
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(12), context.Queue()
    children = [context.Process(target=compete, args=(tmp_path, barrier, results))
                for _ in range(12)]  # fmt: skip
    for process in children:
        process.start()
    winners = [pid for pid in (results.get(timeout=60) for _ in children) if pid]
    for process in children:
        process.join()
    assert len(winners) == 1
