"""Turn pytest-benchmark's JSON into docs/benchmarks.md, docs/benchmarks.png and the front page's
docs/step.png.

python benchmarks/report.py [--results FILE_OR_FOLDER] [--out FOLDER]

If several files have a case, the newest counts, and for all of the case's contenders.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
HEAD = """# Benchmarks

This page has every measured time. All figures are from a CPU; [Performance](performance.md) sums
them up.

The contenders of a table are timed in turns in one run, after their results were compared. Compare
times within a table only: tables may come from different days. The column ms has the time of the
fastest round in milliseconds, because other programs can only make a round slower. In parentheses
is that time divided by ours: above 1, ours is faster. The column threads says how many threads a
contender keeps busy: the CPU time of the process divided by that of the calling thread. P and C are
the tokens of a prompt and of a completion, G is the number of completions per prompt.

`make bench BENCH_ARGS=--benchmark-save=NAME` adds a file to benchmarks/results, and
`python benchmarks/report.py` makes this page of them. Every contender is an entry of
pytest-benchmark, so its options work as usual, such as `--benchmark-json`, `--benchmark-compare`,
`--benchmark-histogram` and `-k "matching and ours"`. [All ratios in a picture](benchmarks.png).
"""
SUITES = {
    "checkpoint": "Checkpoints", "dpo": "A DPO step", "evaluate": "Evaluation",
    "loss": "The loss", "matching": "Matching boxes",
    "mia": "MIA-DPO's selection", "rollout": "The rollout", "step": "A GRPO step",
}  # fmt: skip
WORK = ("tokens", "images", "scenes")  # that one call gets done
HEADS = {"threads_used": "threads", "peak_mib": "peak MiB", "gb_per_s": "GB/s"}


def load(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """By suite and case, the newest: {"about": text, "entries": {contender: figures}}."""
    files = path.rglob("*.json") if path.is_dir() else [path]
    files = [file for file in files if not file.parent.name.startswith("gpu_")]  # of gpu_check.py
    cases: dict[tuple[str, str], dict[str, Any]] = {}
    for run in sorted((json.loads(f.read_text()) for f in files), key=lambda r: r["datetime"]):
        facts = ", ".join(f"{key} {value}" for key, value in run["machine_info"].items())
        commit = run["commit_info"]
        changed = " with changes" if commit.get("dirty") else ""
        about = f"{run['datetime'][:10]}, commit {commit['id'][:7]}{changed}, {facts}"
        new: dict[tuple[str, str], dict[str, Any]] = {}
        for bench in run["benchmarks"]:
            suite = bench["fullname"].split("test_bench_")[1].split(".py")[0]
            case = new.setdefault((suite, bench["group"]), {"about": about, "entries": {}})
            info = bench["extra_info"]
            case["entries"][info["contender"]] = {"ms": 1e3 * bench["stats"]["min"], **info}
        cases |= new
    return {key: cases[key] for key in sorted(cases, key=lambda key: key[0])}


def base(case: dict[str, Any]) -> dict[str, Any]:
    """By whose time others are divided: "ours", or the first of ours."""
    entries = case["entries"]
    return entries.get("ours") or next(entries[n] for n in entries if n.startswith("ours"))


def markdown(cases: dict[tuple[str, str], dict[str, Any]]) -> str:
    parts, before = [HEAD], (None, None)
    for (suite, name), case in cases.items():
        if suite != before[0]:
            parts.append(f"## {SUITES.get(suite, suite)}\n")
        if (suite, case["about"]) != before:
            parts.append(case["about"] + "\n")
        before = suite, case["about"]
        parts.append(table(name, case))
    return "\n".join(parts)


def table(name: str, case: dict[str, Any]) -> str:
    ours, entries = base(case), case["entries"]
    keys = dict.fromkeys(key for each in entries.values() for key in each)
    keys = [key for key in keys if key not in ("ms", "contender", "package", "version")]
    heads = [f"{k}/s" if k in WORK else HEADS.get(k, k.replace("_", " ")) for k in keys]
    rows = [f"| {name} | ms | {' | '.join(heads)} |", "|---|---|" + "---|" * len(keys)]
    for contender, each in entries.items():
        label = f"**{contender}**" if each is ours else contender
        if each["package"] not in ("virft_fast", "torch"):
            label += f" ({each['version']})"
        cells = [f"{each['ms']:.3f} ({each['ms'] / ours['ms']:.2f}x)"]
        for key in keys:
            value = each.get(key)
            cells.append(number(1e3 * value / each["ms"] if value and key in WORK else value))
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def number(value: float | None) -> str:
    """Three digits, or whole from 1,000 on."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def plot(cases: dict[tuple[str, str], dict[str, Any]], path: Path) -> None:
    """One row of bars per case: how many times faster ours is than each contender."""
    bars = [
        (f"{case}: {contender}", each["ms"] / base(result)["ms"])
        for (_, case), result in cases.items()
        for contender, each in result["entries"].items()
        if each["package"] != "virft_fast"
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


def plot_step(steps: dict[str, dict[str, Any]], path: Path) -> None:
    """Time and peak memory of a whole training step: ours next to TRL's."""
    parts = [case.split("G=8, ")[1].split(", ") for case in steps]
    names = {"qwen3_5": "Qwen3.5", "gemma3": "Gemma 3", "glm46v": "GLM-4.6V"}
    labels = [f"{p[2:]} +\n{c[2:]}\n" + "".join(map(names.get, more)) for p, c, *more in parts]
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    units = ("Time (seconds)", "ms", 1e3), ("Peak memory (MiB)", "peak_mib", 1)
    for axes, (title, key, unit) in zip(panels, units, strict=True):
        theirs, ours = (
            [case["entries"][name][key] / unit for case in steps.values()]
            for name in ("TRL", "ours")
        )
        places = range(len(labels))
        peer = "TRL " + next(iter(steps.values()))["entries"]["TRL"]["version"]
        axes.bar([x - 0.2 for x in places], theirs, 0.38, color="#b0b7c3", label=peer)
        bars = axes.bar([x + 0.2 for x in places], ours, 0.38, color="#2563eb", label="virft_fast")
        ratios = [f"{t / o:.1f}x less" for t, o in zip(theirs, ours, strict=True)]
        axes.bar_label(bars, ratios, padding=2, fontsize=8)
        axes.set_xticks(places, labels, fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=9)
    about = next(iter(steps.values()))["about"]
    about = about.split(", ", 2)[2].split(", python")[0]  # processor and threads
    figure.suptitle(
        f"One GRPO step of a small model, 8 completions: prompt + answer in tokens ({about})",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    matplotlib.use("Agg")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    cases = load(arguments.results)
    if not cases:
        parser.error(f"--results {arguments.results}: expected JSON of pytest-benchmark, got none")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "benchmarks.md").write_text(markdown(cases))
    plot(cases, arguments.out / "benchmarks.png")
    steps = {name: case for (suite, name), case in cases.items() if suite == "step"}
    if steps:
        plot_step(steps, arguments.out / "step.png")
    print(f"written: benchmarks.md and its pictures in {arguments.out}")


if __name__ == "__main__":
    main()
