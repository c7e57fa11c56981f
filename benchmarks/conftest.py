"""Shared by the benchmarks: contenders timed in turns in one run, and a table of ratios.

    pytest benchmarks/ --save-results    also writes benchmarks/results/SUITE-MACHINE.json

A contender's answer is checked before anything is timed. Contenders take turns, so that a slowdown
of the machine affects all of them. Each contender's figure is its best time; for whole steps and
rollouts, its median.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

RESULTS = Path(__file__).parent / "results"
SECONDS = 1.5  # per case, about


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save-results", action="store_true", help="write benchmarks/results/*.json")
    parser.addoption(
        "--size",
        default="cpu",
        choices=["tiny", "cpu", "2b", "7b"],
        help="of LM head and model: cpu is small, 2b and 7b are Qwen2-VL's; tiny only shows that "
        "they run",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.ratios = {}


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., dict[str, float]]:
    """race(case, {name: function}, ours=name) times the contenders in turns and records the ratios.

    `rounds` fixes the number of turns, and the figure is then their median. `notes` are further
    figures by name, e.g. {"ours": {"peak_mib": 12.0}}. pytest-benchmark reports `ours`. Returns
    each contender's figure in milliseconds.
    """

    def run(
        case: str,
        contenders: dict[str, Callable[[], Any]],
        ours: str,
        notes: dict[str, dict[str, float]] | None = None,
        rounds: int | None = None,
    ) -> dict[str, float]:
        if not benchmark.enabled:  # --benchmark-disable: only check that they run
            for function in contenders.values():
                function()
            benchmark.pedantic(contenders[ours], rounds=1)
            return {}
        times: dict[str, list[float]] = {name: [] for name in contenders}

        def turn() -> float:
            for name, function in contenders.items():
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
            return sum(taken[-1] for taken in times.values())

        first = turn()  # warms up, and determines the number of turns
        for _ in range(rounds or max(3, min(50, int(SECONDS / first)))):
            turn()
        benchmark.pedantic(contenders[ours], rounds=3 if rounds is None else 1)
        figure = min if rounds is None else lambda taken: statistics.median(taken[1:])
        ms = {name: 1e3 * figure(taken) for name, taken in times.items()}
        suite = request.path.stem.removeprefix("test_bench_")
        request.config.ratios.setdefault(suite, {})[case] = {
            "ours": ours,
            "ms": ms,
            "notes": notes or {},
        }
        return ms

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for suite, cases in config.ratios.items():
        terminalreporter.section(f"{suite}: time in ms, and how many times ours is faster")
        for case, result in cases.items():
            ours = result["ms"][result["ours"]]
            terminalreporter.write_line(case)
            for name, ms in result["ms"].items():
                more = result["notes"].get(name, {})
                more = "   ".join(f"{key} {value:.3g}" for key, value in more.items())
                terminalreporter.write_line(f"  {name:34} {ms:10.3f}   {ms / ours:7.2f}x   {more}")
        if config.getoption("--save-results"):
            terminalreporter.write_line(f"written: {save(suite, cases)}")


def save(suite: str, cases: dict[str, Any]) -> Path:
    """Write the figures, with the machine they were measured on; returns the file's path."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "cuda_device": cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    label = (cuda or f"cpu-{torch.get_num_threads()}-threads").replace(" ", "-").lower()
    path = RESULTS / f"{suite}-{label}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "cases": cases}, indent=1) + "\n")
    return path


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
