"""Measuring tools of the suites: peak memory, and calls that return once the device is done."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def release(package: str, name: str) -> str:
    """A peer's label in tables: its name and installed release."""
    return f"{name} {'.'.join(metadata.version(package).split('.')[:2])}"


def peak_memory(function: Callable[[], Any]) -> int:
    """The most bytes that the call holds at once, in addition to what was allocated before it."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    held = peak = 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def synchronised(function: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        result = function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    return call
