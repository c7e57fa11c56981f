"""Turn benchmarks/results/*.json into docs/benchmarks.md and docs/benchmarks.png.

python benchmarks/report.py [--results FOLDER] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HEAD = """# Measured

Made by `python benchmarks/report.py` from the files in `benchmarks/results/`, which
`make bench BENCH_ARGS=--save-results` writes. Best time of each contender in milliseconds (of whole
steps and rollouts the median), taken in turns in one run after its answer was compared; in brackets
how many times ours is faster (below 1: slower).
"""


def load(folder: Path) -> list[dict[str, Any]]:
    """Every result file with its name's suite."""
    results = []
    for path in sorted(folder.glob("*.json")):
        results.append({"suite": path.stem.split("-")[0], **json.loads(path.read_text())})
    return results


def markdown(results: list[dict[str, Any]]) -> str:
    parts = [HEAD]
    for result in results:
        machine = ", ".join(f"{k} {v}" for k, v in result["machine"].items() if v is not None)
        parts.append(f"## {result['suite']}\n\n{machine}\n")
        for case, entry in result["cases"].items():
            parts.append(table(case, entry))
    return "\n".join(parts)


def table(case: str, entry: dict[str, Any]) -> str:
    ours, notes = entry["ms"][entry["ours"]], entry.get("notes", {})
    keys = list(dict.fromkeys(key for note in notes.values() for key in note))
    rows = [f"| {case} | ms | " + "".join(f"{key} | " for key in keys)]
    rows.append("|---|---|" + "---|" * len(keys))
    for name, ms in entry["ms"].items():
        more = [notes.get(name, {}).get(key) for key in keys]
        cells = "".join(f"{'' if value is None else f'{value:.3g}'} | " for value in more)
        label = f"**{name}**" if name == entry["ours"] else name
        rows.append(f"| {label} | {ms:.3f} ({ms / ours:.2f}x) | {cells}")
    return "\n".join(row.rstrip() for row in rows) + "\n"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """One row of bars a case: how many times ours is faster than each contender."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [
        (f"{case}: {name}", ms / entry["ms"][entry["ours"]])
        for result in results
        for case, entry in result["cases"].items()
        for name, ms in entry["ms"].items()
        if not name.startswith("ours")
    ]
    figure, axes = plt.subplots(figsize=(9, 0.22 * len(bars) + 1), layout="constrained")
    colors = ["tab:blue" if ratio >= 1 else "tab:gray" for _, ratio in bars]
    axes.barh(range(len(bars)), [ratio for _, ratio in bars], color=colors)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=7)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("time of the contender / time of ours")
    axes.margins(y=0.01)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    results = load(arguments.results)
    if not results:
        parser.error(f"--results {arguments.results}: expected *.json in it, got none")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "benchmarks.md").write_text(markdown(results))
    plot(results, arguments.out / "benchmarks.png")
    print(f"written: {arguments.out / 'benchmarks.md'}, {arguments.out / 'benchmarks.png'}")


if __name__ == "__main__":
    main()
