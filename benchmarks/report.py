"""Turn benchmarks/results/*.json into docs/benchmarks.md, docs/benchmarks.png and the front page's
docs/step.png.

python benchmarks/report.py [--results FOLDER] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HEAD = """# Benchmarks

This page has every measured time. All figures are from a CPU; [Performance](performance.md) sums
them up.

The contenders of a table are timed in turns in one run, after their results were compared. The
column ms has the best time, or for whole steps and rollouts the median, in milliseconds. In
parentheses is that time divided by ours: above 1, ours is faster.
P and C are the tokens of a prompt and of a completion, G is the number of completions per prompt.

`make bench BENCH_ARGS=--save-results` writes the results, `python benchmarks/report.py` this page.
"""
SUITES = {
    "dpo": "A DPO step", "evaluate": "Evaluation", "loss": "The loss", "matching": "Matching boxes",
    "mia": "MIA-DPO's selection", "rollout": "The rollout", "step": "A GRPO step",
}  # fmt: skip


def load(folder: Path) -> list[dict[str, Any]]:
    """Every result file, with the suite from its file name."""
    results = []
    for path in sorted(folder.glob("*.json")):
        results.append({"suite": path.stem.split("-")[0], **json.loads(path.read_text())})
    return results


def markdown(results: list[dict[str, Any]]) -> str:
    parts = [HEAD]
    for result in results:
        machine = ", ".join(f"{k} {v}" for k, v in result["machine"].items() if v is not None)
        parts.append(f"## {SUITES.get(result['suite'], result['suite'])}\n\n{machine}\n")
        for case, entry in result["cases"].items():
            parts.append(table(case, entry))
    return "\n".join(parts)


def table(case: str, entry: dict[str, Any]) -> str:
    ours, notes = entry["ms"][entry["ours"]], entry.get("notes", {})
    keys = list(dict.fromkeys(key for note in notes.values() for key in note))
    heads = [key.replace("_per_s", "/s").replace("_mib", " MiB").replace("_", " ") for key in keys]
    rows = [f"| {case} | ms | " + "".join(f"{head} | " for head in heads)]
    rows.append("|---|---|" + "---|" * len(keys))
    for name, ms in entry["ms"].items():
        more = [notes.get(name, {}).get(key) for key in keys]
        cells = "".join(f"{number(value)} | " for value in more)
        label = f"**{name}**" if name == entry["ours"] else name
        rows.append(f"| {label} | {ms:.3f} ({ms / ours:.2f}x) | {cells}")
    return "\n".join(row.rstrip() for row in rows) + "\n"


def number(value: float | None) -> str:
    """Three digits, or whole from 1,000 on."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """One row of bars per case: how many times faster ours is than each contender."""
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


def plot_step(result: dict[str, Any], path: Path) -> None:
    """Time and peak memory of a whole training step: ours next to the first contender."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = result["cases"]
    labels = ["\n".join(case.split("G=8, ")[1].split(", ")) for case in cases]
    labels = [label.replace("P=", "prompt ").replace("C=", "answer ") for label in labels]
    peer = next(iter(next(iter(cases.values()))["ms"]))
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    units = (
        ("seconds", lambda e, n: e["ms"][n] / 1e3),
        ("MiB", lambda e, n: e["notes"][n]["peak_mib"]),
    )
    for axes, title, (unit, value) in zip(panels, ("Time", "Peak memory"), units, strict=True):
        theirs = [value(entry, peer) for entry in cases.values()]
        ours = [value(entry, entry["ours"]) for entry in cases.values()]
        places = range(len(labels))
        axes.bar([x - 0.2 for x in places], theirs, 0.38, color="#b0b7c3", label=peer)
        bars = axes.bar([x + 0.2 for x in places], ours, 0.38, color="#2563eb", label="virft_fast")
        ratios = [f"{t / o:.1f}x less" for t, o in zip(theirs, ours, strict=True)]
        axes.bar_label(bars, ratios, padding=2, fontsize=8)
        axes.set_xticks(places, [f"{label} tokens" for label in labels], fontsize=8)
        axes.set_title(f"{title} ({unit})", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=9)
    threads = result["machine"]["threads"]
    figure.suptitle(
        f"One GRPO step, 8 completions of an image prompt; CPU ({threads} thread), small model",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
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
    for result in results:
        if result["suite"] == "step":
            plot_step(result, arguments.out / "step.png")
    print(f"written: benchmarks.md, benchmarks.png and step.png in {arguments.out}")


if __name__ == "__main__":
    main()
