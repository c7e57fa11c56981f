"""Shared by the benchmarks: contenders of a case take turns, and each is an entry of its own.

pytest-benchmark times one entry after another. A machine that slows down between two entries then
changes their ratio. Here the first entry of a case times all chosen contenders of that case, each
once a round, in an order that reverses after every round. A slowdown affects all of them, and no
contender always runs after the same one. Every entry then reports its own rounds.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import DEVICE, Case, provider


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--size",
        default="cpu",
        choices=["tiny", "cpu", "2b", "7b"],
        help="of LM head and model: cpu is small, 2b and 7b are Qwen2-VL's; tiny only shows that "
        "they run",
    )


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--size")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A suite's `CASES`, by size, are the parameters of its fixture `case`."""
    if "case" in metafunc.fixturenames and hasattr(metafunc.module, "CASES"):
        cases = metafunc.module.CASES[metafunc.config.getoption("--size")]
        metafunc.parametrize("case", cases.values(), ids=cases, indirect=True, scope="module")


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Case, str], None]:
    """race(case, contender) reports the contender's times, and takes those of the case if it is
    the first. --benchmark-min-rounds and --benchmark-max-time hold for a contender on average."""

    def run(case: Case, name: str) -> None:
        package, version = provider(name)
        function = case.runs.get(name, "")
        if version is None:
            pytest.skip(f"{name}: not installed; pip install {package}")
        if isinstance(function, str):
            pytest.skip(f"{name}: {function}")
        if benchmark.disabled:  # only show that it runs
            benchmark.pedantic(function)
            return
        benchmark.group = case.name
        benchmark.pedantic(lambda: None)  # makes the entry
        benchmark.has_error = True  # keeps it out of files until it has its own times
        if name not in case.seconds:
            take_turns(case, chosen(request), **benchmark.stats.options)
        benchmark.stats.stats.data[:] = case.seconds[name]
        benchmark.has_error = False
        notes = case.notes.get(name, {})
        benchmark.extra_info.update(
            {"contender": name, "package": package, "version": version, **case.work},
            **{key: value() if callable(value) else value for key, value in notes.items()},
        )

    return run


def chosen(request: pytest.FixtureRequest) -> list[str]:
    """The contenders of this test's case that the session runs."""

    def case(item: Any) -> Any:
        return {**item.callspec.params, "contender": None}

    tests = [i for i in request.session.items if getattr(i, "function", 0) is request.function]
    return [i.callspec.params["contender"] for i in tests if case(i) == case(request.node)]


def take_turns(
    case: Case, names: list[str], *, min_rounds: int, max_time: float, timer: Callable, **_: Any
) -> None:
    """Time the contenders, each once a round, after it was called for a tenth of a second.

    OpenMP's threads spin for some milliseconds after a contender has finished, on the cores of the
    next one. With more than one thread, a pause lets them fall asleep.
    """
    names = [name for name in names if callable(case.runs.get(name))]
    threads = torch.get_num_threads()
    pause = 0.01 if threads > 1 else 0.0  # seconds
    seconds: dict[str, list[float]] = {name: [] for name in names}

    def call(name: str) -> float:
        torch.set_num_threads(case.threads.get(name, threads))
        start = timer()
        case.runs[name]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return timer() - start

    def warm_up(name: str) -> float:
        whole, own, start = time.process_time(), time.thread_time(), timer()
        shortest = call(name)
        while timer() - start < 0.1:
            shortest = min(shortest, call(name))
        # The calling thread takes an equal share. Calls follow each other, because the kernel
        # counts the time of other threads in steps of milliseconds.
        used = (time.process_time() - whole) / (time.thread_time() - own)
        case.notes.setdefault(name, {})["threads_used"] = round(used, 2)
        return shortest + pause

    try:
        turn = sum(warm_up(name) for name in names)
        for index in range(max(min_rounds, int(max_time * len(names) / turn))):
            for name in names[:: 1 if index % 2 else -1]:
                time.sleep(pause)
                seconds[name].append(call(name))
    finally:
        torch.set_num_threads(threads)
    case.seconds.update(seconds)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """What a reader needs, without the machine's name."""
    cpu = machine_info["cpu"].get("brand_raw", machine_info["processor"])
    machine_info.clear()
    cuda = {"cuda_device": torch.cuda.get_device_name()} if DEVICE == "cuda" else {}
    machine_info.update(cpu=cpu, threads=torch.get_num_threads(), **cuda)
    machine_info.update(python=platform.python_version(), torch=torch.__version__)


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    for key in ("project", "branch"):
        commit_info.pop(key)
