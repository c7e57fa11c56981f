"""MIA-DPO's scenes: several images around a question about one of them.

From a row with one image (its target) and companions drawn from the same source come three kinds:

    sequence  2 to 5 images one after another, "Image1: ... Image2: ..."
    collage   2, 3, 4, 6 or 9 cells of one image, labelled Image1, Image2, ...
    pip       the target in the middle of a companion ("picture in picture")

Sizes, labels and the noise of the original's corrupted mode are those of its notebooks
(arXiv:2410.17637, MIA-DPO a85c51a). What a row becomes depends on the seed and its number alone.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from virft_fast.batch import Sample

KINDS = ("sequence", "collage", "pip")
# Cells -> (rows, columns).
GRIDS = {2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 9: (3, 3)}
# Share of the companion's width and height that the target fits into.
PIP_SHARE = 0.7
# Standard deviation of the noise: on the target's cell, and on the whole picture in picture.
COLLAGE_SIGMA, PIP_SIGMA = 225.0, 49.0
PIP_PREFIXES = (
    "In the picture in the middle,",
    "Look at the smaller image in the centre:",
    "Regarding the inset in the middle of the image,",
    "For the image that lies on top, in the centre,",
    "Considering only the inner picture,",
    "About the picture placed at the centre:",
    "Within the framed image at the centre,",
    "Leaving the background aside, in the central picture,",
)
# Boxes in a text no longer hold when their image becomes a part of another.
BOX_TEXT = re.compile(r"\[\s*\d*\.?\d+(?:\s*,\s*\d*\.?\d+){3}\s*\]")
_IMAGE_PLACE = re.compile(r"<image>|<\|image_pad\|>|<\|vision_start\|>|<\|vision_end\|>")

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Layout:
    """Which scenes are made, and how large.

    Attributes:
        shares: kind -> weight among the rows.
        sequence_images, collage_images: numbers of images to draw from, uniformly; a number that
            is there twice has twice the weight.
        cell, gutter: of a collage, in pixels; the gutter is also the height of the strip above
            each row of cells.
        label_size, label_indent: of the labels in the strips, in pixels.
    """

    shares: Mapping[str, float] = field(
        default_factory=lambda: {"sequence": 15.1, "collage": 9.3, "pip": 4.5}
    )
    sequence_images: tuple[int, ...] = (2, 3, 4, 5)
    collage_images: tuple[int, ...] = (2, 3, 4, 6, 9)
    cell: int = 448
    gutter: int = 40
    label_size: int = 36
    label_indent: int = 20

    def __post_init__(self) -> None:
        weights = self.shares.values()
        known = set(self.shares) <= set(KINDS)
        if not known or not 0 < sum(weights) < math.inf or min(weights) < 0:
            raise ValueError(
                f"shares: expected finite weights >= 0 of {', '.join(KINDS)}, not all of them 0, "
                f"got {dict(self.shares)}"
            )
        for name, allowed in (
            ("sequence_images", range(2, 6)),
            ("collage_images", tuple(GRIDS)),
        ):
            numbers = getattr(self, name)
            if not numbers or any(number not in allowed for number in numbers):
                raise ValueError(f"{name}: expected some of {list(allowed)}, got {list(numbers)}")
        if self.cell < 1 or self.gutter < 0:
            raise ValueError(f"cell, gutter: expected pixels, got {self.cell} and {self.gutter}")
        width, height = self.size(max(self.collage_images))
        limit = Image.MAX_IMAGE_PIXELS or math.inf
        if self.shares.get("collage") and width * height > limit:
            raise ValueError(
                f"cell, gutter: expected collages of at most {limit} pixels, which is what can be "
                f"read again, got {width}x{height} from {self.cell} and {self.gutter}"
            )

    def size(self, count: int) -> tuple[int, int]:
        """Width and height of a collage of so many images, in pixels."""
        rows, columns = GRIDS[count]
        return columns * (self.cell + self.gutter) - self.gutter, rows * (self.cell + self.gutter)


@dataclass(frozen=True)
class Plan:
    """What a row becomes, before any image is opened.

    Attributes:
        kind: of the scene. order: rows of its images, the target among them; for pip the target
            and its companion. target: position of the target in `order`.
        prefix: words before the question.
    """

    index: int
    kind: str
    order: tuple[int, ...]
    target: int
    prefix: str

    @property
    def num_images(self) -> int:
        return len(self.order)


@dataclass(frozen=True)
class Scene:
    """The images of a question and where its target lies.

    Attributes:
        images: as the model gets them.
        target_image: number of the image that holds the target.
        box: left, top, right, bottom of the target in that image, in pixels.
        content: the user's turn, text and image parts.
    """

    images: tuple[Image.Image, ...]
    target_image: int
    box: Box
    content: tuple[dict[str, Any], ...]

    def sample(self, index: int) -> Sample:
        """To be answered; the solution is somebody else's business."""
        message = {"role": "user", "content": list(self.content)}
        return Sample(index, (message,), self.images, "")


def plan_scene(
    index: int,
    pool: Sequence[int],
    layout: Layout,
    seed: int,
    apart: Callable[[int, int], bool],
) -> Plan | str:
    """What row `index` becomes, or why it can become nothing.

    Args:
        pool: rows that companions are drawn from, `index` itself maybe among them.
        apart: whether two rows can't be in one scene, such as those with the same image.
    """
    rng = np.random.default_rng((seed, index))
    kinds = [kind for kind in KINDS if layout.shares.get(kind)]
    weights = np.array([layout.shares[kind] for kind in kinds], dtype=float)
    kind = str(rng.choice(kinds, p=weights / weights.sum()))
    numbers = {"sequence": layout.sequence_images, "collage": layout.collage_images, "pip": (2,)}
    count = int(rng.choice(numbers[kind]))
    if len(pool) < count:
        return f"fewer images than asked: its source has less than {count} rows; see --companions"
    companions = _companions(index, pool, count - 1, rng, apart)
    if len(companions) < count - 1:
        return f"fewer images than asked: {kind} of {count}, only {len(companions) + 1} go together"
    target = 0 if kind == "pip" else int(rng.integers(count))
    order = (*companions[:target], index, *companions[target:])
    prefix = f"In Image{target + 1},"
    if kind == "pip":
        prefix = str(rng.choice(PIP_PREFIXES))
    return Plan(index, kind, order, target, prefix)


def _companions(
    index: int,
    pool: Sequence[int],
    count: int,
    rng: np.random.Generator,
    apart: Callable[[int, int], bool],
) -> list[int]:
    """Up to `count` rows of the pool, uniformly, that can be with each other and the target."""
    chosen: list[int] = []

    def fits(row: int) -> bool:
        return row != index and not any(row == c or apart(row, c) for c in (index, *chosen))

    for _ in range(8 * count):
        if len(chosen) == count or not len(pool):
            return chosen
        row = int(pool[int(rng.integers(len(pool)))])
        if fits(row):
            chosen.append(row)
    # Few differ, or bad luck: all of them once, in any order.
    for place in rng.permutation(len(pool)):
        if len(chosen) == count:
            break
        if fits(int(pool[place])):
            chosen.append(int(pool[place]))
    return chosen


def compose(plan: Plan, images: Sequence[Image.Image], question: str, layout: Layout) -> Scene:
    """The scene of a plan.

    Args:
        images: RGB, one for each row of `plan.order`.
        question: about the target, as its row has it.
    """
    asked = f"{plan.prefix} {_lowered(question)}"
    if plan.kind == "sequence":
        parts: list[dict[str, Any]] = []
        for number in range(len(images)):
            before = "\n" if number else ""
            parts += [{"type": "text", "text": f"{before}Image{number + 1}:"}, {"type": "image"}]
        size = images[plan.target].size
        content = (*parts, {"type": "text", "text": f"\n{asked}"})
        return Scene(tuple(images), plan.target, (0, 0, *size), content)
    if plan.kind == "collage":
        whole, boxes = collage(images, layout)
        box = boxes[plan.target]
    else:
        whole, box = picture_in_picture(images[plan.target], images[1 - plan.target])
    content = ({"type": "image"}, {"type": "text", "text": f"\n{asked}"})
    return Scene((whole,), 0, box, content)


def collage(images: Sequence[Image.Image], layout: Layout) -> tuple[Image.Image, list[Box]]:
    """One image of 2, 3, 4, 6 or 9, each fitted into its cell at the top left, on white.

    Returns:
        the image, and the box of each cell.
    """
    _, columns = GRIDS[len(images)]
    cell, gutter = layout.cell, layout.gutter
    whole = Image.new("RGB", layout.size(len(images)), "white")
    draw = ImageDraw.Draw(whole)
    font = ImageFont.load_default(layout.label_size)
    boxes: list[Box] = []
    for number, image in enumerate(images):
        left = number % columns * (cell + gutter)
        top = number // columns * (cell + gutter) + gutter
        boxes.append((left, top, left + cell, top + cell))
        label = f"Image{number + 1}"
        draw.text((left + layout.label_indent, top - gutter), label, "black", font)
        # Over the label, whose letters reach below the line.
        whole.paste("white", boxes[-1])
        whole.paste(_fitted(image, cell, cell), (left, top))
    return whole, boxes


def picture_in_picture(target: Image.Image, companion: Image.Image) -> tuple[Image.Image, Box]:
    """The target in the middle of its companion, and the target's box."""
    whole = companion.copy()
    width, height = (max(1, round(PIP_SHARE * side)) for side in companion.size)
    inner = _fitted(target, width, height)
    left, top = ((a - b) // 2 for a, b in zip(companion.size, inner.size, strict=True))
    whole.paste(inner, (left, top))
    return whole, (left, top, left + inner.width, top + inner.height)


def corrupted(scene: Scene, kind: str, seed: int, index: int) -> Scene:
    """The scene with noise on its target, as the original makes rejected answers more likely: on
    the cell of a collage, on the whole of a picture in picture; sequences stay clean.

    Like there, sums wrap around at 256 instead of ending at white or black.
    """
    if kind == "sequence":
        return scene
    rng = np.random.default_rng((seed, index, 1))
    pixels = np.asarray(scene.images[0]).copy()
    left, top, right, bottom = scene.box if kind == "collage" else (0, 0, *scene.images[0].size)
    part = pixels[top:bottom, left:right]
    noise = rng.normal(0.0, COLLAGE_SIGMA if kind == "collage" else PIP_SIGMA, part.shape)
    pixels[top:bottom, left:right] = (part + noise).astype(np.int64).astype(np.uint8)
    return Scene((Image.fromarray(pixels),), 0, scene.box, scene.content)


def clean_question(problem: str) -> str:
    """The question without the places of its image."""
    return _IMAGE_PLACE.sub("", problem).strip()


def digest(image: Image.Image) -> str:
    """Of the pixels, to know an image again under another name."""
    return hashlib.sha1(f"{image.size}".encode() + image.tobytes()).hexdigest()


def _fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """As large as fits, in its own proportions."""
    scale = min(width / image.width, height / image.height)
    size = (max(1, min(width, round(image.width * scale))),
            max(1, min(height, round(image.height * scale))))  # fmt: skip
    return image.resize(size, Image.Resampling.LANCZOS)


def _lowered(question: str) -> str:
    return question[:1].lower() + question[1:]
