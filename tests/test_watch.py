"""What never returns is given up, what hears nothing is ended, and nobody waits in silence."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from virft_fast import progress, watch
from virft_fast.watch import SectionStopped, SectionTimeout, Watch

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(watch, "TICK", 0.02)
    monkeypatch.setattr(watch, "STOP_SECONDS", 0.1)


def spin():
    while True:
        pass


def sleep():
    time.sleep(60)


def receive():
    left, right = socket.socketpair()
    with left, right:
        left.recv(1)


def swallow():
    while True:
        try:
            time.sleep(60)
        except Exception:
            pass


def wait_for_lock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def backtrack():
    re.match("(a+)+$", "a" * 50 + "b")  # keeps the interpreter, so that no other thread runs


HANGS = [spin, sleep, receive, swallow, wait_for_lock, backtrack]


@pytest.mark.parametrize("hang", HANGS)
def test_a_section_ends_at_its_limit(tmp_path, hang):
    with Watch(tmp_path) as watched:
        with pytest.raises(SectionTimeout, match=r"reward function f took longer than 0.1 s"):
            with watched.section("reward function f", 0.1):
                hang()
        time.sleep(0.1)  # nothing is raised outside


@pytest.mark.parametrize("hang", HANGS)
def test_a_section_is_given_up_some_time_after_a_signal(tmp_path, hang):
    with Watch(tmp_path) as watched, pytest.raises(SectionStopped, match="rollout was given up"):
        with watched.section("rollout"):
            os.kill(os.getpid(), signal.SIGTERM)
            hang()


def test_what_swallows_the_end_of_its_time_is_still_over(tmp_path):
    async def gathered():
        async def hang():
            while True:
                await asyncio.sleep(0)

        return await asyncio.gather(hang(), return_exceptions=True)

    def bare():
        try:
            spin()
        except BaseException:
            pass

    def another_error():
        try:
            spin()
        except BaseException:
            raise ValueError("hidden") from None

    with Watch(tmp_path) as watched:
        for swallow in (bare, another_error, lambda: asyncio.run(gathered())):
            with pytest.raises(SectionTimeout), watched.section("reward function f", 0.1):
                swallow()
        with watched.section("reward function g", 30.0):
            pass
        with pytest.raises(ValueError, match="its own"), watched.section("reward function g", 30.0):
            raise ValueError("its own")


def test_a_section_that_begins_long_after_a_signal_may_still_be_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "DEAF_SECONDS", 0.2)
    with Watch(tmp_path) as watched:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises(SectionStopped), watched.section("evaluation"):
            spin()


def test_a_section_that_ends_in_time_is_left_alone(tmp_path):
    with Watch(tmp_path) as watched:
        with watched.section("rollout", 30.0):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.02)
        assert watched.stopped
        time.sleep(0.3)


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130), (signal.SIGHUP, 129)],
)
@pytest.mark.usefixtures("heard_signals")
def test_signals_are_remembered(tmp_path, number, status):
    before = signal.getsignal(number)
    with Watch(tmp_path) as watched:
        assert not watched.stopped and watched.exit_status == 0
        os.kill(os.getpid(), number)
        assert watched.stopped and watched.exit_status == status
    assert signal.getsignal(number) == before


def test_the_set_up_stops_at_once(tmp_path):
    with Watch(tmp_path) as watched, pytest.raises(SectionStopped):
        with watched.section("the set-up", patience=0):
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("went on")


@pytest.mark.usefixtures("heard_signals")
def test_a_second_interrupt_ends_the_run_at_once(tmp_path):
    with Watch(tmp_path), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_run_under_nohup_outlives_the_terminal(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Watch(tmp_path) as watched:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not watched.stopped
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_rank_without_progress_writes_where_it_stands(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(watch, "STALL_SECONDS", 0.1)
    path = tmp_path / "stalled-rank-3.txt"
    with Watch(tmp_path, rank=3, world_size=4):
        progress.mark("step 7, training")
        with progress.waiting("all_gather"):
            deadline = time.monotonic() + 30
            while not path.is_file() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.2)
    text = path.read_text()
    assert text.count("rank 3 of 4") == 1  # once a stall
    assert "at step 7, training, waiting in all_gather" in text
    assert "test_a_rank_without_progress_writes_where_it_stands" in text
    assert "no progress" in caplog.text and str(path) in caplog.text


def child(code, **environment):
    """A Python process with a watch that is quick to act."""
    head = (
        "import os, signal, sys, time, pathlib\n"
        "from virft_fast import progress, watch\n"
        "watch.TICK, watch.STOP_SECONDS, watch.DEAF_SECONDS = 0.02, 0.1, 0.1\n"
        "watch.ORPHAN_SECONDS = watch.STALL_SECONDS = 0.3\n"
        "here = pathlib.Path(sys.argv[1])\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "LOCAL_RANK"} | environment
    return [sys.executable, "-c", head + code], {"cwd": ROOT, "env": env}


def test_what_hears_no_signal_is_ended_with_what_there_is_to_go_on_with(tmp_path):
    argv, options = child(
        "signal.pthread_sigmask(signal.SIG_BLOCK, {watch.WAKE, watch.TIMER})\n"
        "with watch.Watch(here, comfort=lambda: 'saved is checkpoint-5') as watched:\n"
        "    with watched.section('reward function f', 0.1):\n"
        "        while True: pass\n"
    )
    done = subprocess.run([*argv, str(tmp_path)], capture_output=True, timeout=60, **options)
    assert done.returncode == 1
    assert b"reward function f does not return" in done.stderr
    assert b"saved is checkpoint-5" in done.stderr


def test_what_keeps_the_interpreter_to_itself_is_ended_with_its_stack(tmp_path):
    argv, options = child(
        "watch.NATIVE_SECONDS = 0.3\n"
        "def reward(): return pow(3, 2 * 10**8)\n"
        "with watch.Watch(here) as watched:\n"
        "    with watched.section('reward function f', 0.1):\n"
        "        reward()\n"
    )
    done = subprocess.run([*argv, str(tmp_path)], capture_output=True, timeout=60, **options)
    assert done.returncode == 1 and b"in reward" in done.stderr


def test_a_process_of_several_ends_where_nothing_moves(tmp_path):
    argv, options = child(
        "with watch.Watch(here, rank=1, world_size=2, timeout=0.6):\n"
        "    with progress.waiting('all_reduce'):\n"
        "        time.sleep(60)\n"
    )
    done = subprocess.run([*argv, str(tmp_path)], capture_output=True, timeout=60, **options)
    assert done.returncode == 1
    assert b"--ddp_timeout" in done.stderr and b"waiting in all_reduce" in done.stderr
    assert "waiting in all_reduce" in (tmp_path / "stalled-rank-1.txt").read_text()


def test_one_process_alone_may_take_its_time(tmp_path):
    argv, options = child(
        "with watch.Watch(here, timeout=0.4):\n    time.sleep(1.5)\nprint('done')\n"
    )
    done = subprocess.run([*argv, str(tmp_path)], capture_output=True, timeout=60, **options)
    assert done.returncode == 0 and done.stdout == b"done\n"
    assert (tmp_path / "stalled-rank-0.txt").is_file()


def test_a_run_whose_folder_another_one_has_taken_ends(tmp_path):
    argv, options = child(
        "with watch.Watch(here, beat=lambda: False, beat_seconds=0.1):\n    time.sleep(60)\n"
    )
    done = subprocess.run([*argv, str(tmp_path)], capture_output=True, timeout=60, **options)
    assert done.returncode == 1 and b"taken over" in done.stderr


@pytest.mark.parametrize("launched", [True, False])
def test_ranks_end_with_their_launcher_and_a_single_process_outlives_its_shell(tmp_path, launched):
    started = tmp_path / "started"
    argv, options = child(
        "with watch.Watch(here) as watched:\n"
        "    (here / 'started').write_text(str(os.getpid()))\n"
        "    for _ in range(100):\n"
        "        time.sleep(0.05)\n"
        "        (here / 'stopped').touch() if watched.stopped else None\n",
        **({"LOCAL_RANK": "0"} if launched else {"WORLD_SIZE": "1"}),
    )
    shell = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"
    parent = subprocess.Popen([sys.executable, "-c", shell, *argv, str(tmp_path)], **options)
    deadline = time.monotonic() + 30
    while not (started.is_file() and started.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    orphan = psutil.Process(int(started.read_text()))
    parent.kill()
    parent.wait()
    begun = time.monotonic()
    orphan.wait(timeout=30)
    assert (tmp_path / "stopped").exists() == launched
    if not launched:
        assert time.monotonic() - begun > 2


def test_the_launcher_of_a_forked_process_is_the_one_that_forked_it(tmp_path):
    argv, options = child(
        "if os.fork() == 0:\n"
        "    with watch.Watch(here) as watched:\n"
        "        time.sleep(1.5)\n"
        "    os._exit(int(watched.stopped))\n"
        "sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))\n",
        LOCAL_RANK="0",
    )
    done = subprocess.run([*argv, str(tmp_path)], capture_output=True, timeout=60, **options)
    assert done.returncode == 0, done.stderr


def test_a_forked_child_ends_when_it_is_told_to(tmp_path):
    with Watch(tmp_path) as watched:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(0.2)
        child.terminate()
        child.join(20)
        assert child.exitcode == -signal.SIGTERM and not watched.stopped


def test_the_last_words_wait_for_no_reader(tmp_path):
    argv, options = child(
        "read, write = os.pipe()\n"
        "os.set_blocking(write, False)\n"
        "while True:\n"
        "    try:\n"
        "        os.write(write, b'x' * 4096)\n"
        "    except BlockingIOError:\n"
        "        break\n"
        "os.set_blocking(write, True)\n"
        "os.dup2(write, 2)\n"
        "watch.WRITE_SECONDS = 0.1\n"
        "watch.Watch(here)._end('why')\n"
    )
    done = subprocess.run([*argv, str(tmp_path)], capture_output=True, timeout=60, **options)
    assert done.returncode == 1


def test_a_run_in_another_thread_has_no_time_limits(tmp_path):
    done = []

    def body():
        with Watch(tmp_path) as watched, watched.section("reward function f", 0.05):
            time.sleep(0.3)
            done.append(True)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert done
