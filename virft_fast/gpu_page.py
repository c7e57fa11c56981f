"""docs/gpu.md and its plot, from the results of scripts/gpu_check.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from virft_fast.batch import Row

HEAD = """# On a GPU

`scripts/gpu_check.py` checks the package on a GPU and measures it, in at most 12 minutes and
without downloads. It needs only torch, triton and transformers. Its models have the released shapes
and random weights.

```bash
python scripts/gpu_check.py --out runs/gpu    # add --cpu to try the script at toy sizes
python -m virft_fast.report gpu runs/gpu      # writes this page
```

Each stage is a process of its own. One that fails or takes too long ends alone, and its log is in
the folder. Limits are what the data sheet of an H200 allows: the least time to read the weights or
to multiply, or the highest rate.

"""
NOTHING = "**Nothing has been measured yet.** No part of the package has run on a GPU.\n"


def read_results(folder: Path) -> list[Row]:
    """The stages' results in the order in which they ran.

    Raises:
        ValueError: the folder has none, or they are from a run at toy sizes.
    """
    paths = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    results = [json.loads(path.read_text()) for path in paths]
    if not results or not all("stage" in result for result in results):
        raise ValueError(f"{folder}: expected the results of scripts/gpu_check.py, got none")
    if any(result.get("toy") for result in results):
        raise ValueError(f"{folder}: expected results from a GPU, got those of --cpu")
    return results


def page(results: Sequence[Row], plot: str) -> str:
    """The page's text.

    Args:
        plot: the plot's address on the page.
    """
    if not results:
        return HEAD + NOTHING
    parts = [HEAD, f"![Figures beside their limits]({plot})\n"]
    for result in results:
        parts.append(f"\n## {result['stage'].capitalize()}\n\n{result['status']}")
        parts.append(f": {result['error']}\n" if result["error"] else "\n")
        if result["figures"]:
            parts.append("\n| figure | value | limit | unit |\n|---|---|---|---|\n")
        for figure in result["figures"]:
            limit = "" if figure["floor"] is None else f"{figure['floor']:,.4g}"
            parts.append(
                f"| {figure['name']} | {figure['value']:,.4g} | {limit} | {figure['unit']} |\n"
            )
        if result["notes"]:
            notes = "\n".join(result["notes"])
            parts.append(f"\n```text\n{notes}\n```\n")
    return "".join(parts)


def draw(results: Sequence[Row], path: Path) -> None:
    """A bar for each figure with a limit: how many times as long as the limit, or as slow."""
    from matplotlib.figure import Figure

    bars = []
    for figure in (f for result in results for f in result["figures"] if f["floor"]):
        ratio = figure["value"] / figure["floor"]
        bars.append((figure["name"], ratio if figure["unit"] in ("ms", "us") else 1 / ratio))
    drawn = Figure(figsize=(9, 1 + 0.3 * len(bars)), layout="constrained")
    axis = drawn.subplots()
    names, ratios = [name for name, _ in bars][::-1], [ratio for _, ratio in bars][::-1]
    axis.bar_label(axis.barh(names, ratios, color="#0072B2"), fmt=" %.2f")
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xlabel("times the limit (1 is the best possible)")
    drawn.savefig(path, dpi=120)


def write(folder: Path, target: Path) -> None:
    """Write the page and, beside it, its plot. `folder`: see `read_results`."""
    results = read_results(folder)
    plot = target.with_suffix(".png")
    draw(results, plot)
    target.write_text(page(results, plot.name))
