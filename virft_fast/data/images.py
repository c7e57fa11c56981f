"""Read images as data sets store them: paths, encoded bytes, base64, `data:` URIs.

Nothing is downloaded. An image's size is checked before the image is decoded.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image, ImageFile, ImageOps

# Deliberately without formats that PIL hands to another program: EPS runs Ghostscript.
IMAGE_FORMATS: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
if importlib.util.find_spec("PIL.AvifImagePlugin"):  # since Pillow 11.3
    IMAGE_FORMATS += ("AVIF",)
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
NOT_DOWNLOADED = "nothing is downloaded; fetch it and give its path"
# The first base64 characters of PNG, JPEG, GIF, WEBP, BMP and TIFF files.
_BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A")
_ALPHABET = re.compile(r"[\w+/=\s-]*")
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
T = TypeVar("T")


class UnreadableImage(ValueError):
    """An image that can't be read. The message names it and says why."""


def placed(folder: Path, name: str) -> str:
    """The path under `folder`. An address or an encoded image is returned unchanged."""
    if is_encoded(name):
        return name
    path = str(folder / name)
    return name if ADDRESS.match(name) and not os.path.exists(path) else path


def is_address(name: str) -> bool:
    """Whether the name is an address, such as https://... or data:..., not a path."""
    return bool(ADDRESS.match(name)) and not os.path.exists(name)


def is_encoded(name: str) -> bool:
    """Whether the text is an encoded image: a `data:` URI or base64."""
    if name[:5].lower() == "data:":
        return True
    if len(name) <= 40 or not name.startswith(_BASE64) or os.path.exists(name):
        return False
    return bool(_ALPHABET.fullmatch(name, 0, 200))


def locate(name: str, folder: Path | None) -> Path:
    """Resolve a path from a data set. Relative paths start at the data set's folder.

    Raises:
        ValueError: it is an address, or the file exists only relative to the working folder.
    """
    if name[:7].lower() == "file://":
        parts = urlsplit(name)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"expected file:///path, got the host {parts.netloc}")
        name = unquote(parts.path)
    elif is_address(name):
        raise ValueError(NOT_DOWNLOADED)
    path = Path(name).expanduser()
    if folder is None or (path.is_absolute() and not path.is_relative_to(folder)):
        return path
    place = folder / path
    if not place.exists() and os.path.exists(os.path.relpath(place, folder)):
        raise ValueError(
            f"expected it in the data set's folder, got none; the working folder has one but is "
            f"not searched: write absolute paths, or move it to {place}"
        )
    return place


def open_image(source: object, folder: Path | None = None) -> Image.Image:
    """Decode a path, encoded bytes, base64, {"bytes", "path"} or an image to RGB.

    Args:
        folder: where relative paths start; None: the working folder.
    Raises:
        UnreadableImage: it can't be read.
    """
    return read_image(source, folder, _decoded)


def image_size(source: object, folder: Path | None = None) -> tuple[int, int]:
    """(width, height) of the image that `open_image` would return, read from the header only.

    Raises:
        UnreadableImage: it isn't an image, or is too large.
    """
    return read_image(source, folder, _header)[0]


def is_turned(source: object, folder: Path | None = None) -> bool:
    """Whether the image's EXIF data rotate or mirror it for display.

    Raises:
        UnreadableImage: as in `image_size`.
    """
    return read_image(source, folder, _header)[1] in range(2, 9)


def read_image(source: object, folder: Path | None, read: Callable[[Image.Image, bool], T]) -> T:
    """Call `read` with the image and whether it was opened here, so that its EXIF data apply; for
    the arguments see `open_image`.

    Raises:
        UnreadableImage: it can't be read.
    """
    name: object = "bytes"
    if isinstance(source, Mapping):
        name = source.get("path") or name
        data = source.get("bytes")
        source = data if data is not None else source.get("path")
    try:
        if isinstance(source, Image.Image):
            return read(source, False)
        file: io.BytesIO | Path | None = None
        if isinstance(source, (bytes, bytearray)):
            file = io.BytesIO(source)
        elif isinstance(source, (str, Path)) and str(source):
            name = f"{source!s:.200}"
            if is_encoded(str(source)):
                name = f"{source!s:.40}"
                file = io.BytesIO(_from_base64(str(source)))
            else:
                file = locate(str(source), folder)
                if file.exists() and not (file.is_file() or file.is_dir()):
                    raise ValueError("expected a file")  # opening a pipe would block
        if file is not None:
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                check_pixels(image)
                return read(image, True)
    except Exception as error:  # PIL's decoders raise almost anything on damaged input
        raise UnreadableImage(f"image {name}: {one_line(error)}") from error
    raise UnreadableImage(f"image: expected a path, bytes or an image, got {source!r:.80}")


def _from_base64(text: str) -> bytes:
    """Decode a `data:` URI or base64, in either alphabet, with or without padding."""
    if text[:5].lower() == "data:":
        head, _, text = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise ValueError("expected data:image/...;base64,...")
    plain = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)


def _decoded(image: Image.Image, opened: bool) -> Image.Image:
    # `datasets` also applies EXIF data when it decodes, so boxes fit however the image is opened.
    return _to_rgb(ImageOps.exif_transpose(image) if opened else image)


def _header(image: Image.Image, opened: bool) -> tuple[tuple[int, int], int | None]:
    """(width, height) of the image as displayed, and its EXIF orientation."""
    if not opened or not isinstance(image, ImageFile.ImageFile):
        return image.size, 1
    decode = image.format != "PNG"
    if not decode and "exif" not in image.info and image.fp:  # a PNG's EXIF chunk may come last
        start = image.fp.tell()
        image.fp.seek(0)
        decode = b"eXIf" in image.fp.read()
        image.fp.seek(start)
    # PNG's own method decodes the whole image first.
    turn = (image.getexif() if decode else Image.Image.getexif(image)).get(0x0112)
    return image.size[::-1] if turn in SIDEWAYS else image.size, turn


def as_shown(
    points: Iterable[tuple[float, float]], size: tuple[float, float], orientation: int
) -> list[tuple[float, float]]:
    """Move points of a stored image to their positions after its EXIF orientation is applied.

    Args:
        points: (x, y) in any unit.
        size: (width, height) of the stored image, in the same unit.
    """
    sideways, flip_x, flip_y = (orientation in o for o in (SIDEWAYS, (2, 3, 6, 7), (3, 4, 7, 8)))
    width, height = size[::-1] if sideways else size
    turned = [(y, x) if sideways else (x, y) for x, y in points]
    return [(width - x if flip_x else x, height - y if flip_y else y) for x, y in turned]


def check_pixels(image: Image.Image) -> None:
    """Raise ValueError if the image is too large to decode."""
    limit = Image.MAX_IMAGE_PIXELS
    # Up to twice this limit, PIL only warns.
    if limit is not None and image.width * image.height > limit:
        raise ValueError(f"{image.width}x{image.height} is more than {limit} pixels")


def _to_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB, loaded into memory. Transparent areas become white."""
    if image.mode.startswith("I"):  # convert() would clip, not scale
        values = np.asarray(image)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65_535:
            raise ValueError("expected an image of 8 or 16 bits a channel, got 32")
        if image.mode != "I" or values.max(initial=0) > 255:
            image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("expected an image of 8 or 16 bits a channel, got floating point numbers")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def one_line(error: BaseException, limit: int = 300) -> str:
    """The error on one line, without memory addresses, which change from run to run."""
    text = re.sub(r"<\S+ object at 0x\w+>", "it", f"{type(error).__name__}: {error}")
    return " ".join(text.split())[:limit]
