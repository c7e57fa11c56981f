"""Draw boxes on images, and arrange images in contact sheets."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw

from virft_fast.tasks.answers import Box, valid_box

TRUE, PREDICTED = (255, 255, 255), (255, 63, 180)
CELL, MARGIN, LINES = 260, 10, 4  # pixels, pixels, lines of a caption


def draw_boxes(
    image: Image.Image, boxes: Sequence[Box], colour: tuple[int, ...], labels: Sequence[str] = ()
) -> Image.Image:
    """A copy of the image with boxes in 0..1000, which have dark edges to stand out anywhere."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    width = max(2, max(image.size) // 200)
    labels = list(labels) + [""] * (len(boxes) - len(labels))
    for box, label in zip(boxes, labels, strict=True):
        if not valid_box(box):
            continue
        x, y = image.width / 1000, image.height / 1000
        place = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
        draw.rectangle(place, outline=(0, 0, 0), width=width + 2)
        draw.rectangle(place, outline=colour, width=width)
        if label:
            draw.text((place[0] + width + 2, place[1] + width), label, fill=colour,
                      stroke_width=2, stroke_fill=(0, 0, 0))  # fmt: skip
    return image


def contact_sheet(cells: Sequence[tuple[Image.Image, str]], columns: int = 5) -> Image.Image:
    """Arrange (image, caption) pairs in a grid."""
    columns = min(columns, max(1, len(cells)))
    rows = -(-len(cells) // columns)
    line = 13
    high = CELL + LINES * line + 2 * MARGIN
    sheet = Image.new("RGB", (columns * (CELL + MARGIN) + MARGIN, rows * high + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, caption) in enumerate(cells):
        left = MARGIN + number % columns * (CELL + MARGIN)
        top = MARGIN + number // columns * high
        small = image.copy()
        small.thumbnail((CELL, CELL))
        sheet.paste(small, (left + (CELL - small.width) // 2, top + (CELL - small.height) // 2))
        lines = textwrap.wrap(" ".join(caption.split()), CELL // 6)
        lines = lines[:LINES] if len(lines) <= LINES else [*lines[: LINES - 1], "..."]
        for place, text in enumerate(lines):
            # The built-in font has only Latin letters.
            text = text.encode("latin-1", "replace").decode("latin-1")
            draw.text((left, top + CELL + 4 + place * line), text, fill="black")
    return sheet
