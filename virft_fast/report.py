"""The end of a run: the table and summary of what changed, and report.png. As a program, the page
of a GPU check."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import math
import re
import statistics
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from virft_fast import gpu_page
from virft_fast.batch import Json, Row
from virft_fast.commands import end_process
from virft_fast.evaluation.files import write_json
from virft_fast.tasks.answers import Box, answer_text, parse_detection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

logger = logging.getLogger(__name__)

# Okabe and Ito's colors, distinguishable with any color vision.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
TRUE_COLOR, PREDICTED_COLOR = "#FFFFFF", "#FF3FB4"
SMOOTHING = 9  # steps


def format_table(before: dict[str, float], after: dict[str, float]) -> str:
    """A text table of name, before, after and change, one line per measure."""
    width = max([len("measure"), *map(len, after)])
    lines = [f"{'measure':{width}}  {'before':>8}  {'after':>8}  {'change':>8}"]
    for name, value in after.items():
        old = before.get(name, math.nan)
        lines.append(f"{name:{width}}  {old:8.4f}  {value:8.4f}  {value - old:+8.4f}")
    return "\n".join(lines)


def write_summary(
    path: Path,
    *,
    before: dict[str, float],
    after: dict[str, float],
    train_seconds: float,
    peak_rss_mib: float,
    **more: Json,
) -> None:
    """Write the figures as JSON, NaN as null."""
    summary = {
        "before": before,
        "after": after,
        "train_seconds": round(train_seconds, 2),
        "peak_rss_mib": round(peak_rss_mib, 1),
        **more,
    }
    with _errors_logged(path):
        write_json(path, summary)


def write_report(
    path: Path,
    *,
    curve: Sequence[Row],
    before: dict[str, float],
    after: dict[str, float],
    examples: Sequence[Row],
) -> None:
    """Draw report.png: the reward curve, means before and after, and a few answers.

    Args:
        curve: records of metrics.jsonl.
        before, after: means by name.
        examples: dicts with `image` (PIL), `problem`, `solution`, and the answers `before` and
            `after`.
    """
    with _errors_logged(path):
        plt = _pyplot()
        figure = plt.figure(figsize=(14, 10 if examples else 4.8), dpi=100, layout="constrained")
        top = figure
        if examples:
            top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.35])
            bottom.suptitle(
                "held-out images: true box solid white, predicted dashed pink with its confidence",
                fontsize=11,
            )
            axes = bottom.subplots(2, len(examples), squeeze=False)
            for row, when in zip(axes, ("before", "after"), strict=True):
                for axis, example in zip(row, examples, strict=True):
                    _draw_example(axis, example, when)
        left, right = top.subplots(1, 2, width_ratios=[1.6, 1])
        _draw_curve(left, curve)
        _draw_bars(right, before, after)
        figure.savefig(path)
        plt.close(figure)


def write_curves(path: Path, runs: Mapping[str, Sequence[Row]], key: str = "reward") -> None:
    """Plot one measure of several runs over their steps in one figure."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 4.5), dpi=110, layout="constrained")
    for (name, curve), color in zip(runs.items(), itertools.cycle(COLORS), strict=False):
        _draw_line(axis, curve, key, name, color)
    axis.set(xlabel="step", ylabel=key)
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    with _errors_logged(path):
        figure.savefig(path)
    plt.close(figure)


def _pyplot() -> ModuleType:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


@contextlib.contextmanager
def _errors_logged(path: Path) -> Iterator[None]:
    """Log errors instead of raising them: a full disk or a failed plot must not fail a run."""
    try:
        yield
    except Exception as error:
        logger.error("COULD NOT WRITE %s: %s: %s", path, type(error).__name__, error)


def _draw_curve(axis: Axes, curve: Sequence[Row]) -> None:
    names = sorted({key for record in curve for key in record if key.startswith("rewards/")})
    keys = ["reward", *names] if len(names) > 1 else ["reward"]
    rewarded = any("reward" in record for record in curve)
    keys = keys if rewarded else ["loss"]
    for key, color in zip(keys, itertools.cycle(COLORS), strict=False):
        _draw_line(axis, curve, key, key.removeprefix("rewards/"), color)
    if rewarded:
        axis.set(xlabel="step", ylabel="mean over sampled completions")
        axis.set_title("training rewards", fontsize=11)
    else:
        axis.set(xlabel="step", ylabel="cross entropy of a token")
        axis.set_title("training loss", fontsize=11)
    axis.grid(alpha=0.3)
    if axis.get_lines():
        axis.legend(frameon=False)


def _draw_line(axis: Axes, curve: Sequence[Row], key: str, name: str, color: str) -> None:
    """Plot raw values faintly and their running mean boldly."""
    points = [(record["step"], record[key]) for record in curve if record.get(key) is not None]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    axis.plot(steps, values, color=color, alpha=0.25, linewidth=1)
    ends = range(1, len(values) + 1)
    means = [statistics.fmean(values[max(0, end - SMOOTHING) : end]) for end in ends]
    axis.plot(steps, means, color=color, linewidth=2, label=name)


def _draw_bars(axis: Axes, before: dict[str, float], after: dict[str, float]) -> None:
    names = list(after)[::-1]
    height = 0.38
    for offset, means, label, color in (
        (height / 2, before, "before", "#999999"),
        (-height / 2, after, "after", COLORS[0]),
    ):
        places = [at + offset for at in range(len(names))]
        values = [means.get(name, math.nan) for name in names]
        bars = axis.barh(places, values, height, label=label, color=color)
        axis.bar_label(bars, fmt="%.3f", padding=3, fontsize=9)
    axis.set_yticks(range(len(names)), [name.removeprefix("rewards/") for name in names])
    largest = max([1.0, *(v for v in (*before.values(), *after.values()) if math.isfinite(v))])
    axis.set_xlim(0, 1.15 * largest)
    axis.set_title("before and after", fontsize=11)
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_example(axis: Axes, example: Row, when: str) -> None:
    image = example["image"]
    axis.imshow(image)
    axis.set_xticks([])
    axis.set_yticks([])
    true, predicted = parse_detection(example["solution"]), parse_detection(example[when])
    for box in true.boxes if true else ():
        _draw_box(axis, image, box, TRUE_COLOR, "-", None)
    if predicted:
        for box, confidence in zip(predicted.boxes, predicted.confidences, strict=True):
            _draw_box(axis, image, box, PREDICTED_COLOR, "--", confidence)
    quoted = re.search(r"'([^']+)'", example["problem"])  # Visual-RFT's prompts quote the category
    title = textwrap.shorten(
        quoted.group(1) if quoted else example["problem"], 34, placeholder="..."
    )
    # A $ in text from models and data sets must not start a formula.
    axis.set_title(f"{when}: {title}", fontsize=9, parse_math=False)
    if not true or not true.boxes:
        texts = (answer_text(text) for text in (example[when], example["solution"]))
        said, right = (textwrap.shorten(text, 24, placeholder="...") for text in texts)
        axis.set_xlabel(f"answer: {said}\ntrue: {right}", fontsize=9, parse_math=False)


def _draw_box(
    axis: Axes, image: Image, box: Box, color: str, style: str, confidence: float | None
) -> None:
    from matplotlib import patheffects
    from matplotlib.patches import Rectangle

    if not all(math.isfinite(v) for v in box):
        return
    x1, y1, x2, y2 = (
        v / 1000 * size - 0.5 for v, size in zip(box, 2 * image.size, strict=True)
    )  # pixel centers are at whole numbers
    # A dark rim keeps a white box visible on a white shape.
    rim = [patheffects.withStroke(linewidth=4, foreground="black")] if style == "-" else []
    axis.add_patch(
        Rectangle(
            (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, lw=2, linestyle=style,
            path_effects=rim,
        )
    )  # fmt: skip
    if confidence is not None:
        y = min(max(y1, 0.07 * image.height), image.height)
        axis.text(
            min(max(x1, 0), 0.85 * image.width), y, f"{confidence:.2g}", color="white", fontsize=8,
            va="bottom", bbox={"facecolor": color, "edgecolor": "none", "pad": 1, "alpha": 0.8},
        )  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m virft_fast.report",
        description="Write docs/gpu.md and its plot from the results of scripts/gpu_check.py.",
    )
    parser.add_argument("kind", choices=["gpu"])
    parser.add_argument("folder", type=Path, help="the --out of scripts/gpu_check.py")
    parser.add_argument("--page", type=Path, default=Path("docs/gpu.md"), help="the page to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Write the page of a GPU check; returns the exit status."""
    arguments = make_parser().parse_args(argv)
    try:
        gpu_page.write(arguments.folder, arguments.page)
    except (OSError, ValueError) as error:
        print(f"virft_fast.report: error: {error}", file=sys.stderr)
        return 2
    print(f"written: {arguments.page}")
    return 0


if __name__ == "__main__":
    end_process(main())
