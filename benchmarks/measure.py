"""Measuring tools of the suites: cases, contenders and peak memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from itertools import accumulate
from typing import Any

import torch

import virft_fast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The first word that is in a contender's name says whose it is; without one, it is torch's.
PACKAGES = {
    "ours": "virft_fast", "TRL": "trl", "Liger": "liger-kernel", "transformers": "transformers",
    "torch-linear-assignment": "torch-linear-assignment", "scipy": "scipy",
}  # fmt: skip


@dataclass
class Case:
    """Contenders that compute the same thing: a group of benchmarks, compared before it is made.

    runs: what each contender calls, or a text that says why it can't take part; a peer that isn't
        installed may be left out.
    notes: further figures of a contender, by name. A function is called after the timing.
    work: how much one call gets done, e.g. {"tokens": 512}.
    threads: of torch, for contenders that don't use all.
    """

    name: str
    runs: dict[str, Callable[[], Any] | str]
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    work: dict[str, int] = field(default_factory=dict)
    threads: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of each round, once timed


def contenders(*names: str) -> Any:
    """Decorates a test: one benchmark for each contender."""
    import pytest  # here, because scripts/gpu_check.py runs without it

    return pytest.mark.parametrize("contender", names)


def provider(contender: str) -> tuple[str, str | None]:
    """The package that a contender's name stands for, and its version if it is installed."""
    package = next((PACKAGES[word] for word in PACKAGES if word in contender), "torch")
    if package == "virft_fast":
        return package, virft_fast.__version__
    try:
        return package, metadata.version(package)
    except metadata.PackageNotFoundError:
        return package, None


def peak_mib(function: Callable[[], Any]) -> float:
    """The most memory that the call holds at once, in addition to what was allocated before it."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0)) / 2**20
