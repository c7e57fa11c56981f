"""A run's end: the table and summary of what changed, and report.png, which shows it."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from virft_fast.metrics import null_for_nan

logger = logging.getLogger(__name__)

# Okabe and Ito's colours, told apart with any colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
TRUE_COLOUR, PREDICTED_COLOUR = "#FFFFFF", "#FF3FB4"
SMOOTHING = 9  # steps

ParsedBoxes = list[tuple[list[float], float | None]]


def format_table(before: dict[str, float], after: dict[str, float]) -> str:
    """Name, before, after and change, one line a measure."""
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
    **more: Any,
) -> None:
    """The figures as JSON, NaN as null; written aside, then renamed."""
    summary = {
        "before": before,
        "after": after,
        "train_seconds": round(train_seconds, 2),
        "peak_rss_mib": round(peak_rss_mib, 1),
        **more,
    }

    def write() -> None:
        aside = path.with_suffix(".writing")
        aside.write_text(json.dumps(null_for_nan(summary), indent=1) + "\n")
        os.replace(aside, path)

    _or_warn(path, write)


def write_report(
    path: Path,
    *,
    curve: list[dict[str, Any]],
    before: dict[str, float],
    after: dict[str, float],
    examples: list[dict[str, Any]],
    parse_boxes: Callable[[str], ParsedBoxes],
) -> None:
    """report.png: reward curve, before and after, and a few answers to look at.

    Args:
        curve: records of metrics.jsonl.
        before, after: means to compare.
        examples: dicts with `image` (PIL), `problem`, `solution`, and the answers `before` and
            `after`.
        parse_boxes: text -> [([x1, y1, x2, y2] in 0..1000, confidence or None), ...].
    """
    _or_warn(path, lambda: _report(path, curve, before, after, examples, parse_boxes))


def _report(
    path: Path,
    curve: list[dict[str, Any]],
    before: dict[str, float],
    after: dict[str, float],
    examples: list[dict[str, Any]],
    parse_boxes: Callable[[str], ParsedBoxes],
) -> None:
    plt = _pyplot()
    columns = max(len(examples), 1)
    figure = plt.figure(figsize=(14, 10 if examples else 4.8), dpi=100, layout="constrained")
    if examples:
        top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.35])
    else:
        top, bottom = figure, None
    left, right = top.subplots(1, 2, width_ratios=[1.6, 1])
    _draw_curve(left, curve)
    _draw_bars(right, before, after)
    if bottom is not None:
        bottom.suptitle(
            "held-out images: true box solid white, predicted dashed pink with its confidence",
            fontsize=11,
        )
        axes = bottom.subplots(2, columns, squeeze=False)
        for row, when in zip(axes, ("before", "after"), strict=True):
            for axis, example in zip(row, examples, strict=True):
                _draw_example(axis, example, when, parse_boxes)
    figure.savefig(path)
    plt.close(figure)


def write_curves(path: Path, runs: dict[str, list[dict[str, Any]]], key: str = "reward") -> None:
    """One measure of several runs over their steps, in one figure."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 4.5), dpi=110, layout="constrained")
    for (name, curve), colour in zip(runs.items(), _cycle(len(runs)), strict=True):
        _draw_line(axis, curve, key, name, colour)
    axis.set(xlabel="step", ylabel=key)
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    _or_warn(path, lambda: figure.savefig(path))
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _or_warn(path: Path, write: Callable[[], Any]) -> None:
    """A finished run is not lost to a full disk, nor to a picture that can't be drawn."""
    try:
        write()
    except Exception as error:
        logger.error("COULD NOT WRITE %s: %s: %s", path, type(error).__name__, error)


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _draw_curve(axis: Any, curve: list[dict[str, Any]]) -> None:
    names = sorted({key for record in curve for key in record if key.startswith("rewards/")})
    keys = ["reward", *names] if len(names) > 1 else ["reward"]
    rewarded = any("reward" in record for record in curve)
    keys = keys if rewarded else ["loss"]
    for key, colour in zip(keys, _cycle(len(keys)), strict=True):
        _draw_line(axis, curve, key, key.removeprefix("rewards/"), colour)
    if rewarded:
        axis.set(xlabel="step", ylabel="mean over sampled completions")
        axis.set_title("training rewards", fontsize=11)
    else:
        axis.set(xlabel="step", ylabel="cross entropy of a token")
        axis.set_title("training loss", fontsize=11)
    axis.grid(alpha=0.3)
    if axis.get_lines():
        axis.legend(frameon=False)


def _draw_line(axis: Any, curve: list[dict[str, Any]], key: str, name: str, colour: str) -> None:
    """Raw values faint, their running mean bold."""
    points = [(record["step"], record[key]) for record in curve if record.get(key) is not None]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    axis.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    means = []
    for at in range(len(values)):
        window = values[max(0, at - SMOOTHING + 1) : at + 1]
        means.append(sum(window) / len(window))
    axis.plot(steps, means, color=colour, linewidth=2, label=name)


def _draw_bars(axis: Any, before: dict[str, float], after: dict[str, float]) -> None:
    names = list(after)[::-1]
    height = 0.38
    for offset, means, label, colour in (
        (height / 2, before, "before", "#999999"),
        (-height / 2, after, "after", COLOURS[0]),
    ):
        places = [at + offset for at in range(len(names))]
        values = [means.get(name, math.nan) for name in names]
        bars = axis.barh(places, values, height, label=label, color=colour)
        axis.bar_label(bars, fmt="%.3f", padding=3, fontsize=9)
    axis.set_yticks(range(len(names)), [name.removeprefix("rewards/") for name in names])
    largest = max([1.0, *(v for v in (*before.values(), *after.values()) if math.isfinite(v))])
    axis.set_xlim(0, 1.15 * largest)
    axis.set_title("before and after", fontsize=11)
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_example(
    axis: Any, example: dict[str, Any], when: str, parse_boxes: Callable[[str], ParsedBoxes]
) -> None:
    image = example["image"]
    axis.imshow(image)
    axis.set_xticks([])
    axis.set_yticks([])
    true, predicted = parse_boxes(example["solution"]), parse_boxes(example[when])
    for box, _ in true:
        _draw_box(axis, image, box, TRUE_COLOUR, "-", None)
    for box, confidence in predicted:
        _draw_box(axis, image, box, PREDICTED_COLOUR, "--", confidence)
    quoted = re.search(r"'([^']+)'", example["problem"])  # Visual-RFT's prompts quote the category
    title = textwrap.shorten(
        quoted.group(1) if quoted else example["problem"], 34, placeholder="..."
    )
    # Text of a model or a data set may hold $; it is no formula.
    axis.set_title(f"{when}: {title}", fontsize=9, parse_math=False)
    if not true:
        answer = example[when].rpartition("<answer>")[2].partition("</answer>")[0]
        label = f"answer: {textwrap.shorten(answer, 24)}\n{_plain(example['solution'])}"
        axis.set_xlabel(label, fontsize=9, parse_math=False)


def _plain(solution: str) -> str:
    text = solution.replace("<answer>", "").replace("</answer>", "").strip()
    return f"true: {textwrap.shorten(text, 24, placeholder='...')}"


def _draw_box(
    axis: Any, image: Any, box: list[float], colour: str, style: str, confidence: float | None
) -> None:
    from matplotlib import patheffects
    from matplotlib.patches import Rectangle

    if not all(math.isfinite(v) for v in box):
        return
    x1, y1, x2, y2 = (
        v / 1000 * size - 0.5 for v, size in zip(box, 2 * image.size, strict=True)
    )  # pixel centres are at whole numbers
    # A dark rim keeps a white box visible on a white shape.
    rim = [patheffects.withStroke(linewidth=4, foreground="black")] if style == "-" else []
    axis.add_patch(
        Rectangle(
            (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, lw=2, linestyle=style,
            path_effects=rim,
        )
    )  # fmt: skip
    if confidence is not None:
        y = min(max(y1, 0.07 * image.height), image.height)
        axis.text(
            min(max(x1, 0), 0.85 * image.width), y, f"{confidence:.2g}", color="white", fontsize=8,
            va="bottom", bbox={"facecolor": colour, "edgecolor": "none", "pad": 1, "alpha": 0.8},
        )  # fmt: skip
