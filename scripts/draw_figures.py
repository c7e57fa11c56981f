"""Draws the figures of docs/how_it_works.md into docs/figures/.

python scripts/draw_figures.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

FOLDER = Path(__file__).parent.parent / "docs/figures"
PROMPT, IMAGE, DARK, GRAY, RED = "#9ec5e8", "#f2c14e", "#333333", "#e6e6e6", "#d1495b"
COMPLETIONS = ("#8fd19e", "#c3a6e0", "#f4a582")
STYLE = {
    "font.size": 11,
    "svg.hashsalt": "virft_fast",  # equal drawings give equal files
    "svg.fonttype": "none",  # text stays text
    "savefig.facecolor": "white",
}


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """A figure whose axes are in tenths of an inch."""
    figure = plt.figure(figsize=(width / 10, height / 10))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(0, height))
    axis.axis("off")
    return figure, axis


def box(axis: Any, x: float, y: float, w: float, h: float, color: str, text: str = "") -> None:
    axis.add_patch(Rectangle((x, y), w, h, facecolor=color, edgecolor=DARK, linewidth=0.8))
    axis.text(x + w / 2, y + h / 2, text, ha="center", va="center", color=DARK)


def say(axis: Any, x: float, y: float, text: str, **more: Any) -> None:
    axis.text(x, y, text, color=DARK, va="center", **more)


def arrow(axis: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=DARK, linewidth=1)
    )


def shared_prefix() -> Any:
    """Three rows compared with one packed row, and which of its tokens attend to which."""
    figure, axis = canvas(92, 46)
    lengths = (9, 6, 8)
    say(axis, 2, 43.5, "usual: a row for each completion", weight="bold")
    for row, (length, color) in enumerate(zip(lengths, COMPLETIONS, strict=True)):
        y = 38 - 4 * row
        box(axis, 2, y, 8, 3, IMAGE, "image")
        box(axis, 10, y, 12, 3, PROMPT, "prompt")
        box(axis, 22, y, length, 3, color, f"{row + 1}")
        if length < max(lengths):
            box(axis, 22 + length, y, max(lengths) - length, 3, GRAY)
    say(axis, 32.5, 38.5, "padding in gray", fontsize=9)
    say(axis, 2, 24, "here: one packed row for the group", weight="bold")
    box(axis, 2, 18.5, 8, 3, IMAGE, "image")
    box(axis, 10, 18.5, 12, 3, PROMPT, "prompt")
    x = 22.0
    for row, (length, color) in enumerate(zip(lengths, COMPLETIONS, strict=True)):
        box(axis, x, 18.5, length, 3, color, f"{row + 1}")
        x += length
    say(axis, 2, 14.5, "The prompt and its image are computed once.", fontsize=10)
    say(axis, 2, 11.5, "Positions restart behind the prompt for every completion.", fontsize=10)
    say(axis, 2, 8.5, "The row has no padding.", fontsize=10)
    _mask(axis, 56, 6)
    return figure


def _mask(axis: Any, left: float, lower: float) -> None:
    """The attention mask: a triangle for the prompt, then a stripe and a triangle per
    completion."""
    sizes, scale = (12, 7, 5, 6), 1.05
    colors = (PROMPT, *COMPLETIONS)
    side = sum(sizes) * scale
    axis.add_patch(Rectangle((left, lower), side, side, facecolor="white", edgecolor=DARK))
    start = 0.0
    for part, (size, color) in enumerate(zip(sizes, colors, strict=True)):
        x, top = left + start * scale, lower + side - start * scale
        low = top - size * scale
        if part:
            axis.add_patch(
                Rectangle((left, low), sizes[0] * scale, size * scale, facecolor=PROMPT, alpha=0.6)
            )
        axis.fill([x, x, x + size * scale], [top, low, low], color=color)
        start += size
    axis.add_patch(Rectangle((left, lower), side, side, fill=False, edgecolor=DARK))
    say(axis, left + side / 2, lower + side + 5.5, "who sees whom", ha="center", weight="bold")
    say(axis, left + side / 2, lower + side + 2, "keys: prompt, 1, 2, 3", ha="center", fontsize=9)
    say(axis, left - 2, lower + side / 2, "queries", ha="center", rotation=90, fontsize=9)


def fused_head() -> Any:
    """Tiles of logits that are dropped, compared with the whole matrix."""
    figure, axis = canvas(92, 36)
    say(axis, 2, 33.5, "usual: all logits", weight="bold")
    box(axis, 2, 8, 5, 20, PROMPT)
    say(axis, 1, 5.5, "hidden, S x D", fontsize=9)
    say(axis, 8.6, 18, "x", ha="center")
    box(axis, 10, 20, 13, 5, IMAGE, "head, D x V")
    say(axis, 25, 18, "=", ha="center")
    box(axis, 27, 8, 13, 20, RED + "99", "logits\nS x V")
    say(axis, 33.5, 5.5, "kept for backward", ha="center", fontsize=9)
    say(axis, 48, 33.5, "here: one tile at a time", weight="bold")
    for part in range(4):
        y = 23 - 5 * part
        box(axis, 48, y, 5, 5, PROMPT)
        if part == 1:
            box(axis, 60, y, 13, 5, RED + "99", "tile of logits")
        else:
            axis.add_patch(
                Rectangle((60, y), 13, 5, fill=False, edgecolor="#999999", linestyle=":")
            )
    say(axis, 50.5, 5.5, "hidden", ha="center", fontsize=9)
    say(axis, 56.5, 20.5, "x head =", ha="center", fontsize=9)
    arrow(axis, (73.5, 20.5), (78, 20.5))
    for text, y in (
        ("loss", 25), ("log-prob", 22), ("gradient of hidden", 19), ("gradient of head", 16)
    ):  # fmt: skip
        say(axis, 78.5, y, text, fontsize=9)
    say(axis, 66.5, 5.5, "then the tile is dropped", ha="center", fontsize=9)
    return figure


def matcher() -> Any:
    """Boxes of one image, and the IoU table for the assignment."""
    figure, axis = canvas(92, 36)
    say(axis, 2, 33.5, "predicted (dashed) and true boxes", weight="bold")
    axis.add_patch(Rectangle((2, 4), 34, 26, facecolor="#f7f7f7", edgecolor=DARK))
    true = {"A": (5, 13, 11, 13), "B": (21, 8, 12, 12)}
    predicted = {"1": (6.5, 12, 11, 13), "2": (4, 16, 11, 12), "3": (22, 6.5, 12, 12.5)}
    for name, (x, y, w, h) in true.items():
        axis.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=DARK, linewidth=2))
        say(axis, x + w - 1.5, y + h - 1.5, name, ha="center", weight="bold")
    for name, (x, y, w, h) in predicted.items():
        axis.add_patch(
            Rectangle((x, y), w, h, fill=False, edgecolor=RED, linewidth=1.6, linestyle="--")
        )
        axis.text(x + 1.2, y + 1.4, name, color=RED, ha="center", va="center", weight="bold")
    say(axis, 44, 33.5, "IoU of every pair", weight="bold")
    best = {("1", "A"), ("3", "B")}
    for row, (name, p) in enumerate(predicted.items()):
        y = 21 - 6 * row
        axis.text(46, y + 2.5, name, color=RED, ha="center", va="center", weight="bold")
        for column, (label, t) in enumerate(true.items()):
            x = 49 + 8 * column
            color = COMPLETIONS[0] if (name, label) in best else "white"
            box(axis, x, y, 8, 5, color, f"{_iou(p, t):.2f}")
            if not row:
                say(axis, x + 4, 28.5, label, ha="center", weight="bold")
    say(axis, 69, 23.5, "1 is A, 3 is B:", fontsize=10)
    say(axis, 69, 20.5, "the largest sum of IoU", fontsize=10)
    say(axis, 69, 17.5, "with each box used once.", fontsize=10)
    say(axis, 69, 12.5, "2 is left over:", fontsize=10)
    say(axis, 69, 9.5, "it lowers the reward.", fontsize=10)
    return figure


def _iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / (a[2] * a[3] + b[2] * b[3] - inter)


def rollout() -> Any:
    """A batch that is decoded together and shrinks."""
    figure, axis = canvas(92, 40)
    say(axis, 2, 37.5, "keys and values, stored", weight="bold")
    say(axis, 34, 37.5, "completions, decoded together: one token each a step", weight="bold")
    ends = ((26, 9, 20), (14, 24, 12))
    for group, lengths in enumerate(ends):
        top = 34 - 15 * group
        box(axis, 2, top - 11.5, 16, 11.5, PROMPT, f"prompt {group + 1}\nand its image,\nonce")
        for row, length in enumerate(lengths):
            y = top - 3.5 - 4 * row
            axis.plot([18, 34], [top - 5.7, y + 1.5], color="#999999", linewidth=0.8)
            box(axis, 34, y, length, 3.5, COMPLETIONS[row], f"{row + 1}")
            say(axis, 34.6 + length, y + 1.7, "EOS", fontsize=8)
    axis.plot([52.5, 52.5], [5.5, 35.5], color=RED, linestyle="--", linewidth=1.2)
    axis.text(52.5, 4, "batch shrinks", color=RED, ha="center", va="center", fontsize=9)
    say(axis, 67, 23, "When enough completions have", fontsize=9.5)
    say(axis, 67, 20.4, "ended, the rest move together", fontsize=9.5)
    say(axis, 67, 17.8, "and later steps compute less.", fontsize=9.5)
    arrow(axis, (34, 2), (62, 2))
    say(axis, 63, 2, "steps", fontsize=9)
    return figure


FIGURES = (shared_prefix, fused_head, matcher, rollout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    args = parser.parse_args()
    matplotlib.use("Agg")
    args.out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for draw in FIGURES:
            figure = draw()
            path = args.out / f"{draw.__name__}.{args.format}"
            metadata = {"Date": None} if args.format == "svg" else {}
            figure.savefig(path, metadata=metadata)
            plt.close(figure)
            print(f"written: {path}")


if __name__ == "__main__":
    main()
