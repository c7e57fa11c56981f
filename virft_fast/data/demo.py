"""Demo data sets, generated from a seed in Visual-RFT's schema: `image`, `problem`, `solution`.

`shapes_detection`: 112x112 images with one or two colored shapes; the task is to find the one with
a given color. Corners are multiples of 40 in the 0..1000 space, an even grid in pixels.
`digits_classification`: scikit-learn's handwritten digits, at random positions and in random colors
on 56x56 images. Train and test use different digits.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from virft_fast.batch import Row

if TYPE_CHECKING:
    import datasets

GRID = 40
SHAPES_SIZE, DIGITS_SIZE = 112, 56
COLOURS = {
    "red": (220, 50, 50), "green": (60, 200, 70), "blue": (70, 90, 235),
    "yellow": (235, 220, 60), "white": (240, 240, 240), "purple": (170, 70, 210),
}  # fmt: skip
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS_PROBLEM = "Which digit is this? Think, then answer."
SHAPES_PROBLEM = "Detect every {}. Think, then answer."

PixelBox = tuple[int, int, int, int]


def box_list(boxes: Sequence[Sequence[float]], confidence: str = "1") -> str:
    """Boxes as Visual-RFT writes them: [{'Position': [x1, y1, x2, y2], 'Confidence': 1}, ...]."""
    items = [f"{{'Position': {[int(v) for v in b]}, 'Confidence': {confidence}}}" for b in boxes]
    return f"[{', '.join(items)}]"


def shapes(seed: int) -> Iterator[Row]:
    """Endless detection examples, with the additional columns `box` (0..1000) and `colour`."""
    rng = np.random.default_rng(seed)
    while True:
        yield _shape_example(rng)


def digits(seed: int, glyphs: tuple[np.ndarray, np.ndarray]) -> Iterator[Row]:
    """Endless classification examples from (glyphs (n, 8, 8) in 0..1, labels (n,)), with the
    additional column `label`."""
    rng = np.random.default_rng(seed)
    while True:
        yield _digit_example(rng, *glyphs)


def digit_glyphs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """scikit-learn's 1,797 digits: three quarters for train, the rest for test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    cut = 3 * len(order) // 4
    images, labels = data.images / 16.0, data.target
    return {
        "train": (images[order[:cut]], labels[order[:cut]]),
        "test": (images[order[cut:]], labels[order[cut:]]),
    }


def _shape_example(rng: np.random.Generator) -> Row:
    size = SHAPES_SIZE
    background = tuple(int(v) for v in rng.integers(0, 70, 3))
    image = Image.new("RGB", (size, size), background)
    draw = ImageDraw.Draw(image)
    names = list(COLOURS)
    placed: list[tuple[str, PixelBox]] = []
    for choice in rng.permutation(len(names))[: int(rng.integers(1, 3))]:
        box = _free_box(rng, [box for _, box in placed])
        if box is None:
            continue
        shade = [int(np.clip(v + rng.integers(-20, 21), 0, 255)) for v in COLOURS[names[choice]]]
        _draw_shape(draw, int(rng.integers(3)), box, tuple(shade))
        placed.append((names[choice], box))
    pixels = np.asarray(image, np.float32) + rng.normal(0, 6, (size, size, 3))
    colour, box = placed[int(rng.integers(len(placed)))]
    position = [_grid(v) for v in box]
    solution = f"<answer>{box_list([position])}</answer>"
    return {"image": _to_image(pixels), "problem": SHAPES_PROBLEM.format(colour),
            "solution": solution, "box": position, "colour": colour}  # fmt: skip


def _free_box(rng: np.random.Generator, taken: list[PixelBox]) -> PixelBox | None:
    """A box in pixels with corners on the grid and no overlap with `taken`; None after 40 tries."""
    for _ in range(40):
        width, height = (int(v) for v in rng.integers(24, 57, 2))
        x = int(rng.integers(0, SHAPES_SIZE - width + 1))
        y = int(rng.integers(0, SHAPES_SIZE - height + 1))
        x1, y1, x2, y2 = (
            round(_grid(v) / 1000 * SHAPES_SIZE) for v in (x, y, x + width, y + height)
        )
        if all(x2 <= t[0] or t[2] <= x1 or y2 <= t[1] or t[3] <= y1 for t in taken):
            return x1, y1, x2, y2
    return None


def _grid(pixel: int) -> int:
    """The nearest multiple of GRID in the 0..1000 space."""
    return min(1000, round(pixel / SHAPES_SIZE * 1000 / GRID) * GRID)


def _draw_shape(draw: ImageDraw.ImageDraw, kind: int, box: PixelBox, fill: tuple[int, ...]) -> None:
    x1, y1, x2, y2 = box[0], box[1], box[2] - 1, box[3] - 1  # PIL also draws the last pixel
    if kind == 0:
        draw.ellipse((x1, y1, x2, y2), fill=fill)
    elif kind == 1:
        draw.rectangle((x1, y1, x2, y2), fill=fill)
    else:
        draw.polygon([(x1, y2), (x2, y2), ((x1 + x2) // 2, y1)], fill=fill)


def _digit_example(rng: np.random.Generator, glyphs: np.ndarray, labels: np.ndarray) -> Row:
    size = DIGITS_SIZE
    chosen = int(rng.integers(len(labels)))
    background, ink = rng.uniform(0, 70, 3), rng.uniform(150, 255, 3)
    side = int(rng.integers(int(size * 0.7), size + 1))
    x, y = (int(v) for v in rng.integers(0, size - side + 1, 2))
    glyph = Image.fromarray((glyphs[chosen] * 255).astype(np.uint8))
    weight = np.zeros((size, size, 1), np.float32)
    resized = glyph.resize((side, side), Image.Resampling.BILINEAR)
    weight[y : y + side, x : x + side, 0] = np.asarray(resized, np.float32) / 255
    pixels = background * (1 - weight) + ink * weight + rng.normal(0, 8, (size, size, 3))
    word = WORDS[int(labels[chosen])]
    image, solution = _to_image(pixels), f"<answer>{word}</answer>"
    return {"image": image, "problem": DIGITS_PROBLEM, "solution": solution, "label": word}


def _to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _split_examples(name: str, split: str, seed: int) -> Iterator[Row]:
    """Examples of a split. Train and test never share a seed."""
    stream = 2 * seed + (split == "test")
    if name == "shapes_detection":
        return shapes(stream + 1_000_000)
    return digits(stream + 1_000_000, digit_glyphs()[split])


DEMO_DATASETS: dict[str, Callable[[str, int], Iterator[Row]]] = {
    name: partial(_split_examples, name) for name in ("shapes_detection", "digits_classification")
}


def build_demo(
    name: str, path: str | Path, *, seed: int = 0, num_train: int = 2000, num_test: int = 512
) -> datasets.DatasetDict:
    """Generate a demo data set and save it as a `DatasetDict` with splits train and test.

    Args:
        name: one of DEMO_DATASETS.
        path: folder to write, for `datasets.load_from_disk`.
    Raises:
        ValueError: there is no such demo.
    """
    import datasets

    if name not in DEMO_DATASETS:
        raise ValueError(f"expected one of {', '.join(DEMO_DATASETS)}, got {name!r}")
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "problem": text, "solution": text})
    seen: set[bytes] = set()
    splits = {}
    for split, count in (("train", num_train), ("test", num_test)):
        rows = _take_new(DEMO_DATASETS[name](split, seed), count, seen)
        columns = {key: [row[key] for row in rows] for key in features}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    dataset, shows_bars = datasets.DatasetDict(splits), datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        dataset.save_to_disk(str(path))
    finally:
        if shows_bars:
            datasets.enable_progress_bars()
    return dataset


def _take_new(examples: Iterator[Row], count: int, seen: set[bytes]) -> list[Row]:
    """The next `count` examples whose images aren't in `seen`; adds their images to it."""
    rows: list[Row] = []
    while len(rows) < count:
        row = next(examples)
        pixels = row["image"].tobytes()
        if pixels not in seen:
            seen.add(pixels)
            rows.append(row)
    return rows


def demo_dataset(
    name: str, cache_dir: str | Path | None = None, **sizes: int
) -> datasets.DatasetDict:
    """Load a demo data set from the cache. The first use generates it.

    Args:
        cache_dir: default $VIRFT_FAST_CACHE or ~/.cache/virft_fast.
        sizes: seed, num_train, num_test, as in `build_demo`.
    """
    import datasets

    root = Path(cache_dir or os.environ.get("VIRFT_FAST_CACHE", "~/.cache/virft_fast"))
    options = {"seed": 0, "num_train": 2000, "num_test": 512, **sizes}
    label = "-".join(f"{key}{value}" for key, value in options.items())
    folder = root.expanduser() / f"{name}-v1-{label}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
        build_demo(name, aside / "data", **options)
        try:
            os.rename(aside / "data", folder)
        except OSError:  # another process was faster, with the same data
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return datasets.load_from_disk(str(folder))
