"""MIA-DPO's scenes: several images, and a question about one of them, the target.

A row with one image is combined with companion rows from the same source into a scene. There are
three kinds:

    sequence  2 to 5 images one after another, "Image1: ... Image2: ..."
    collage   one image with 2, 3, 4, 6 or 9 cells, labeled Image1, Image2, ...
    pip       the target in the middle of a companion ("picture in picture")

Sizes, labels and noise follow MIA-DPO's notebooks (arXiv:2410.17637, code at a85c51a). A row's
scene depends only on the seed, the row number and the rows that may be its companions.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from virft_fast.batch import Row, Sample
from virft_fast.data import BadRow, SampleDataset
from virft_fast.digests import image_digest, sample_digest
from virft_fast.models.processing import resized

if TYPE_CHECKING:
    import datasets

KINDS = ("sequence", "collage", "pip")
# Number of cells -> (rows, columns).
GRIDS = {2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 9: (3, 3)}
# Largest share of the companion's width and height that the target may fill.
PIP_SHARE = 0.7
# Standard deviation of the noise on a collage's target cell, and on a whole picture in picture.
COLLAGE_SIGMA, PIP_SIGMA = 225.0, 49.0
PIP_PREFIXES = (
    "In the picture in the middle,", "Look at the smaller image in the centre:",
    "Regarding the inset in the middle of the image,",
    "For the image that lies on top, in the centre,", "Considering only the inner picture,",
    "About the picture placed at the centre:", "Within the framed image at the centre,",
    "Leaving the background aside, in the central picture,",
)  # fmt: skip
# A box in the text is no longer correct once its image is part of a larger one.
BOX_TEXT = re.compile(r"\[\s*\d*\.?\d+(?:\s*,\s*\d*\.?\d+){3}\s*\]")
_IMAGE_MARKS = re.compile(r"<image>|<\|image_pad\|>|<\|vision_start\|>|<\|vision_end\|>")

Box: TypeAlias = tuple[int, int, int, int]  # left, top, right, bottom in pixels
Excludes: TypeAlias = Callable[[int, int], bool]  # whether two rows can't share a scene


@dataclass(frozen=True)
class SceneLayout:
    """The kinds of scenes to make, and their sizes.

    Attributes:
        shares: kind -> weight.
        sequence_images, collage_images: image counts to draw from uniformly; repeat a count to
            give it more weight.
        cell: side of a collage's cell in pixels.
        gutter: space between cells, and height of the label strip above each row, in pixels.
        label_size, label_indent: font size and left margin of the labels, in pixels.
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
        weights, others = self.shares.values(), self.shares.keys() - KINDS
        if others or not 0 < sum(weights) < math.inf or min(weights) < 0:
            raise ValueError(
                f"shares: expected finite weights >= 0 of {', '.join(KINDS)}, not all of them 0, "
                f"got {dict(self.shares)}"
            )
        for name, allowed in (("sequence_images", range(2, 6)), ("collage_images", GRIDS)):
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
        """Width and height in pixels of a collage with `count` images."""
        rows, columns = GRIDS[count]
        return columns * (self.cell + self.gutter) - self.gutter, rows * (self.cell + self.gutter)


@dataclass(frozen=True)
class ScenePlan:
    """The contents of a scene, determined before its images are opened.

    Attributes:
        index: the target's row.
        kind: sequence, collage or pip.
        order: the images' rows in order; for pip, the target and then its companion.
        target: position of the target in `order`.
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
    """The images for a question, and the position of the target in them.

    Attributes:
        images: what the model sees.
        target_image: index in `images` of the image that contains the target.
        box: left, top, right, bottom of the target in that image, in pixels.
        content: text and image parts of the user's turn.
    """

    images: tuple[Image.Image, ...]
    target_image: int
    box: Box
    content: tuple[Row, ...]

    def sample(self, index: int) -> Sample:
        """A sample for the model to answer, without a solution."""
        message = {"role": "user", "content": list(self.content)}
        return Sample(index, (message,), self.images, "")


def plan_scene(
    index: int, pool: Sequence[int], layout: SceneLayout, seed: int, excludes: Excludes
) -> ScenePlan | str:
    """The plan of row `index`, or the reason why it can't be the target of a scene.

    Args:
        pool: rows from which to draw companions; may include `index`.
        excludes: whether two rows can't share a scene, for example because their images are equal.
    """
    rng = np.random.default_rng((seed, index))
    kinds = [kind for kind in KINDS if layout.shares.get(kind)]
    weights = np.array([layout.shares[kind] for kind in kinds], dtype=float)
    kind = str(rng.choice(kinds, p=weights / weights.sum()))
    numbers = {"sequence": layout.sequence_images, "collage": layout.collage_images, "pip": (2,)}
    count = int(rng.choice(numbers[kind]))
    if len(pool) < count:
        return f"fewer images than asked: its source has less than {count} rows; see --companions"
    companions = _companions(index, pool, count - 1, rng, excludes)
    if len(companions) < count - 1:
        return f"fewer images than asked: {kind} of {count}, only {len(companions) + 1} go together"
    target = 0 if kind == "pip" else int(rng.integers(count))
    order = (*companions[:target], index, *companions[target:])
    prefix = str(rng.choice(PIP_PREFIXES)) if kind == "pip" else f"In Image{target + 1},"
    return ScenePlan(index, kind, order, target, prefix)


def _companions(
    index: int, pool: Sequence[int], count: int, rng: np.random.Generator, excludes: Excludes
) -> list[int]:
    """Up to `count` rows, drawn uniformly from those in the pool that can share a scene with the
    target and each other."""
    chosen: list[int] = []

    def fits(row: int) -> bool:
        return row != index and not any(row == c or excludes(row, c) for c in (index, *chosen))

    for _ in range(8 * count):
        if len(chosen) == count:
            return chosen
        row = int(pool[int(rng.integers(len(pool)))])
        if fits(row):
            chosen.append(row)
    # Few rows fit, or the draws were unlucky: try every row once, in random order.
    for position in rng.permutation(len(pool)):
        if len(chosen) == count:
            break
        if fits(int(pool[position])):
            chosen.append(int(pool[position]))
    return chosen


def compose(
    plan: ScenePlan, images: Sequence[Image.Image], question: str, layout: SceneLayout
) -> Scene:
    """Build a scene from its plan.

    Args:
        images: one RGB image for each row in `plan.order`.
        question: the target row's question.
    """
    text = f"\n{plan.prefix} {question[:1].lower()}{question[1:]}"
    if plan.kind == "sequence":
        content: list[Row] = []
        for number in range(len(images)):
            before = "\n" if number else ""
            content += [{"type": "text", "text": f"{before}Image{number + 1}:"}, {"type": "image"}]
        content.append({"type": "text", "text": text})
        return Scene(tuple(images), plan.target, (0, 0, *images[plan.target].size), tuple(content))
    if plan.kind == "collage":
        whole, boxes = collage(images, layout)
        box = boxes[plan.target]
    else:
        whole, box = picture_in_picture(images[plan.target], images[1 - plan.target])
    return Scene((whole,), 0, box, ({"type": "image"}, {"type": "text", "text": text}))


def collage(images: Sequence[Image.Image], layout: SceneLayout) -> tuple[Image.Image, list[Box]]:
    """Arrange 2, 3, 4, 6 or 9 images in a labeled grid on white, each at the top left of its cell.

    Returns:
        The collage, and the box of each cell.
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
        # Cover the parts of the label's letters that extend into the cell.
        whole.paste("white", boxes[-1])
        whole.paste(_fitted(image, cell, cell), (left, top))
    return whole, boxes


def picture_in_picture(target: Image.Image, companion: Image.Image) -> tuple[Image.Image, Box]:
    """Paste the target into the middle of its companion. Also returns the target's box."""
    whole = companion.copy()
    width, height = (max(1, round(PIP_SHARE * side)) for side in companion.size)
    inner = _fitted(target, width, height)
    left, top = ((a - b) // 2 for a, b in zip(companion.size, inner.size, strict=True))
    whole.paste(inner, (left, top))
    return whole, (left, top, left + inner.width, top + inner.height)


def corrupted(scene: Scene, kind: str, seed: int, index: int) -> Scene:
    """Add noise to the scene's target, which makes wrong answers more likely.

    As in MIA-DPO, noise covers the target's cell of a collage or the whole picture in picture, and
    sequences stay clean. Pixel values wrap around at 256 instead of saturating.
    """
    if kind == "sequence":
        return scene
    rng = np.random.default_rng((seed, index, 1))
    pixels = np.asarray(scene.images[0]).copy()
    left, top, right, bottom = scene.box if kind == "collage" else (0, 0, *scene.images[0].size)
    region = pixels[top:bottom, left:right]
    noise = rng.normal(0.0, COLLAGE_SIGMA if kind == "collage" else PIP_SIGMA, region.shape)
    pixels[top:bottom, left:right] = (region + noise).astype(np.int64).astype(np.uint8)
    return Scene((Image.fromarray(pixels),), 0, scene.box, scene.content)


def clean_question(problem: str) -> str:
    """The question without placeholders for its image."""
    return _IMAGE_MARKS.sub("", problem).strip()


def _fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize the image to fit into width and height, keeping its aspect ratio."""
    scale = min(width / image.width, height / image.height)
    size = (max(1, min(width, round(image.width * scale))),
            max(1, min(height, round(image.height * scale))))  # fmt: skip
    return image.resize(size, Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class SceneRow:
    """What planning needs to know about a row. Stored, so that its image is opened only once.

    Attributes:
        digest: of its image; empty if the row has no usable image.
        question: its question, without image marks.
        truth: its own answer.
        problem: why it can't be a target. If it has an image, it can still be a companion.
    """

    digest: str = ""
    question: str = ""
    truth: str = ""
    problem: str = ""


class Scenes:
    """The scenes of a data set with one image per row.

    Args:
        rows: from `load_rows`.
        noise: whether scenes are `corrupted`.
        groups: the source of each row; companions come from the same source. None: one source.
        test_share: share of the images to hold out; no scene mixes images from both splits.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        layout: SceneLayout,
        *,
        seed: int,
        noise: bool,
        groups: Sequence[str] | None = None,
        test_share: float = 0.0,
    ) -> None:
        self.samples = SampleDataset(rows, first_exchange=True)
        self.layout, self.seed, self.noise, self.test_share = layout, seed, noise, test_share
        self._unwrap = "conversations" in getattr(rows, "column_names", ())
        self._groups = groups or [""] * len(self.samples)
        self._pools: dict[str, list[int]] = {}
        for index, group in enumerate(self._groups):
            self._pools.setdefault(group, []).append(index)
        self._row = functools.cache(self._read)

    def __len__(self) -> int:
        return len(self.samples)

    def truth(self, index: int) -> str:
        """The row's own answer."""
        return self._row(index).truth

    def held_out(self, index: int) -> bool:
        """Whether the row is in the test split. Depends only on the seed and the row's image."""
        drawn = int(sample_digest(f"{self.seed} {self._row(index).digest}")[:8], 16)
        return drawn < self.test_share * 2**32

    def plan(self, index: int) -> ScenePlan | str:
        """The plan of a row, or the reason why it can't be the target of a scene."""
        problem, pool = self._row(index).problem, self._pools[self._groups[index]]
        return problem or plan_scene(index, pool, self.layout, self.seed, self._excludes)

    def digest(self, plan: ScenePlan) -> str:
        """A hash of the scene: its images and texts, and their arrangement."""
        target = self._row(plan.index)
        images = [self._row(row).digest for row in plan.order]
        described = repr((plan, target.question, target.truth, images))
        described = described.replace("ScenePlan(", "Plan(", 1)  # so that older journals stay valid
        return sample_digest(described)[:16]

    def scene(self, plan: ScenePlan, *, clean: bool = False) -> Scene | str:
        """The scene of a plan, or the reason why one of its images can no longer be loaded.

        Args:
            clean: without noise, as in training.
        """
        images = []
        for row in plan.order:
            sample = self.samples.get(row)
            if isinstance(sample, BadRow):
                return without_details(sample.reason)
            images.append(sample.images[0])
        scene = compose(plan, images, self._row(plan.index).question, self.layout)
        if self.noise and not clean:
            scene = corrupted(scene, plan.kind, self.seed, plan.index)
        return scene

    def build(self, index: int, *, clean: bool = False) -> tuple[ScenePlan, Scene] | str:
        """The plan and scene of a row, or the reason why it has none."""
        plan = self.plan(index)
        if isinstance(plan, str):
            return plan
        scene = self.scene(plan, clean=clean)
        return scene if isinstance(scene, str) else (plan, scene)

    def _excludes(self, one: int, other: int) -> bool:
        """Whether two rows can't share a scene: equal images, other splits, no usable image."""
        digests = {self._row(one).digest, self._row(other).digest}
        return "" in digests or len(digests) == 1 or self.held_out(one) != self.held_out(other)

    def _read(self, index: int) -> SceneRow:
        sample = self.samples.get(index)
        if isinstance(sample, BadRow):
            return SceneRow(problem=without_details(sample.reason))
        if len(sample.images) != 1:
            return SceneRow(problem=f"expected one image, got {len(sample.images)}")
        try:
            resized(*sample.images[0].size, min_pixels=1, max_pixels=2**40)
        except ValueError:  # as a companion, it would make other rows' scenes unusable
            return SceneRow(problem="image too narrow for the processor")
        question, truth = clean_question(sample.columns["problem"]), sample.solution
        # Loading wraps the answers of conversations in the tags that the tasks expect.
        if self._unwrap and truth.startswith("<answer> ") and truth.endswith(" </answer>"):
            truth = truth.removeprefix("<answer> ").removesuffix(" </answer>")
        problem = "" if question else "the question is empty"
        problem = "boxes in the text" if BOX_TEXT.search(question) else problem
        return SceneRow(image_digest(sample.images[0]), question, truth, problem)


def without_details(reason: str) -> str:
    """A row's problem without names and numbers, so that equal problems can be counted."""
    return "image can't be read" if reason.startswith("image") else reason.split(", got")[0]


def source_groups(rows: datasets.Dataset) -> list[str] | None:
    """The source of each row, "" for rows without an image; None if the source is unknown.

    The source is the column `source`, or else the first folder level at which image paths differ.
    """
    names = list(getattr(rows, "column_names", ()))
    if "source" in names:
        return [str(value) for value in rows["source"]]
    column = next((name for name in ("image", "images", "image_path") if name in names), None)
    if column is None or hasattr(getattr(rows, "features", {}).get(column), "decode"):
        return None
    folders = []
    for value in rows.with_format(None)[column] if hasattr(rows, "with_format") else rows[column]:
        value = value[0] if isinstance(value, list) and value else value
        if value and not isinstance(value, str):
            return None
        folders.append(Path(value).parts[:-1] if value else None)
    levels = zip(*(parts for parts in folders if parts is not None), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda names: len(set(names)) == 1, levels))
    return [parts[common] if parts and len(parts) > common else "" for parts in folders]
