"""docs/gpu.md and its plot, from the results of scripts/gpu_check.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from virft_fast.batch import Row

BEGIN, END = "<!-- begin: python -m virft_fast.report gpu -->\n", "<!-- end -->"


def write(folder: Path, target: Path) -> None:
    """Replace the figures on the page `target`, and draw their plot beside it.

    Raises:
        ValueError: the folder holds no results, or those of a run at toy sizes; the page has no
            place for figures.
    """
    paths = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)  # as they ran
    results = [json.loads(path.read_text()) for path in paths]
    if not results or not all(result.get("toy") is False for result in results):
        raise ValueError(f"{folder}: expected what scripts/gpu_check.py wrote on a GPU")
    before, found, rest = target.read_text().partition(BEGIN)
    if not found:
        raise ValueError(f"{target}: expected the line {BEGIN.strip()}")
    plot = target.with_suffix(".png")
    draw(results, plot)
    head = f"![Figures beside their limits]({plot.name})\n"
    made = before + BEGIN + head + "".join(map(section, results)) + END
    target.write_text(made + rest.partition(END)[2])


def section(result: Row) -> str:
    """A stage's status, table and notes."""
    error = f": {result['error']}" if result["error"] else ""
    lines = [f"\n## {result['stage'].capitalize()}\n", result["status"] + error]
    if result["figures"]:
        lines += ["", "| figure | value | limit | unit |", "|---|---|---|---|"]
    for figure in result["figures"]:
        limit = "" if figure["floor"] is None else f"{figure['floor']:,.4g}"
        lines.append(f"| {figure['name']} | {figure['value']:,.4g} | {limit} | {figure['unit']} |")
    if result["notes"]:
        lines += ["", "```text", *result["notes"], "```"]
    return "\n".join(lines) + "\n"


def draw(results: Sequence[Row], path: Path) -> None:
    """A bar for each figure with a limit: how many times as long as the limit, or as slow."""
    from matplotlib.figure import Figure

    figures = [f for result in results[::-1] for f in result["figures"][::-1] if f["floor"]]
    ratios = [
        f["value"] / f["floor"] if f["unit"] in ("ms", "us") else f["floor"] / f["value"]
        for f in figures
    ]
    drawn = Figure(figsize=(9, 1 + 0.3 * len(ratios)), layout="constrained")
    axis = drawn.subplots()
    axis.bar_label(axis.barh([f["name"] for f in figures], ratios, color="#0072B2"), fmt=" %.2f")
    axis.set_xscale("log")
    axis.set_xlabel("times the limit (1 is the best possible)")
    drawn.savefig(path, dpi=120)
