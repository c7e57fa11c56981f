"""Images as data sets give them: paths, encoded bytes, base64, `data:` URIs. Nothing is downloaded,
and nothing is decoded before its size is known."""

from __future__ import annotations

import base64
import importlib.util
import io
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image, ImageOps

# Left out on purpose: formats that PIL hands to another program (EPS runs Ghostscript).
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
if importlib.util.find_spec("PIL.AvifImagePlugin"):  # since Pillow 11.3
    IMAGE_FORMATS += ("AVIF",)
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
NOT_DOWNLOADED = "nothing is downloaded; fetch it and give its path"
# What PNG, JPEG, GIF, WEBP, BMP and TIFF begin with, in base64.
_BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A")
_ALPHABET = re.compile(r"[\w+/=\s-]*")
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class UnreadableImage(ValueError):
    """An image that can't be read; the text names it and says why."""


def placed(folder: Path, name: str) -> str:
    """A path that starts at `folder`; an address or encoded image stays as it is."""
    if is_encoded(name):
        return name
    path = str(folder / name)
    return name if ADDRESS.match(name) and not os.path.exists(path) else path


def is_address(name: str) -> bool:
    """Whether it is no path but such as https://... or data:..."""
    return bool(ADDRESS.match(name)) and not os.path.exists(name)


def is_encoded(name: str) -> bool:
    """Whether the text is an image itself: a `data:` URI or base64."""
    if name[:5].lower() == "data:":
        return True
    if len(name) <= 40 or not name.startswith(_BASE64) or os.path.exists(name):
        return False
    return bool(_ALPHABET.fullmatch(name, 0, 200))


def locate(name: str, folder: Path | None) -> Path:
    """Where a path of a data set leads: to the data set's folder, where it is no absolute one.

    Raises:
        ValueError: it is an address, or nothing is there but the working folder has it.
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
    beside = folder / path
    if not beside.exists() and os.path.exists(os.path.relpath(beside, folder)):
        raise ValueError(
            f"expected it in the data set's folder, which has none; the working folder, which is "
            f"not read, has one: write whole paths, or put it at {beside}"
        )
    return beside


def open_image(source: Any, folder: Path | None = None) -> Image.Image:
    """Decode a path, encoded bytes, base64, {"bytes", "path"} or an image to RGB.

    Args:
        folder: where relative paths start; None: at the working folder.
    Raises:
        UnreadableImage: it can't be read.
    """
    return _reading(source, folder, _decode, _to_rgb)


def image_size(source: Any, folder: Path | None = None) -> tuple[int, int]:
    """(width, height) that `open_image` would give, from the image's header alone.

    Raises:
        UnreadableImage: it is no image, or too large.
    """
    return _reading(source, folder, _header, lambda image: (image.size, 1))[0]


def is_turned(source: Any, folder: Path | None = None) -> bool:
    """Whether EXIF data turn or mirror the image when it is shown.

    Raises:
        UnreadableImage: as `image_size`.
    """
    return _reading(source, folder, _header, lambda image: (image.size, 1))[1] in range(2, 9)


def _reading(source: Any, folder: Path | None, read: Any, take: Any) -> Any:
    name = "bytes"
    if isinstance(source, Mapping):
        name = source.get("path") or name
        data = source.get("bytes")
        source = data if data is not None else source.get("path")
    try:
        if isinstance(source, Image.Image):
            return take(source)
        if isinstance(source, (bytes, bytearray)):
            return read(io.BytesIO(source))
        if isinstance(source, (str, Path)) and str(source):
            name = f"{source!s:.200}"
            if is_encoded(str(source)):
                name = f"{source!s:.40}"
                return read(io.BytesIO(_from_base64(str(source))))
            path = locate(str(source), folder)
            if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe is waited for
                raise ValueError("expected a file")
            return read(path)
    except Exception as error:  # PIL's decoders raise nearly anything on damaged input
        raise UnreadableImage(f"image {name}: {one_line(error)}") from error
    raise UnreadableImage(f"image: expected a path, bytes or an image, got {source!r:.80}")


def _from_base64(text: str) -> bytes:
    """The bytes of a `data:` URI or of base64 text, in either alphabet, padded or not."""
    if text[:5].lower() == "data:":
        head, _, text = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise ValueError("expected data:image/...;base64,...")
    plain = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)


def _decode(file: Path | io.BytesIO) -> Image.Image:
    with Image.open(file, formats=IMAGE_FORMATS) as image:
        check_pixels(image)
        # As `datasets` does on decoding, so that boxes fit the image whoever opens it.
        return _to_rgb(ImageOps.exif_transpose(image))


def _header(file: Path | io.BytesIO) -> tuple[tuple[int, int], int | None]:
    """(width, height) as the image is shown, and its EXIF orientation."""
    with Image.open(file, formats=IMAGE_FORMATS) as image:
        check_pixels(image)
        decode = image.format != "PNG"
        if not decode and "exif" not in image.info:  # its chunk may come last
            start = image.fp.tell()
            image.fp.seek(0)
            decode = b"eXIf" in image.fp.read()
            image.fp.seek(start)
        # PNG's own method decodes the image first.
        exif = image.getexif() if decode else Image.Image.getexif(image)
        turn = exif.get(0x0112)
        return image.size[::-1] if turn in SIDEWAYS else image.size, turn


def as_shown(
    points: Iterable[tuple[float, float]], size: tuple[float, float], orientation: int
) -> list[tuple[float, float]]:
    """Points of an image of (width, height) as it is stored where its EXIF orientation shows them;
    in any unit."""
    sideways, flip_x, flip_y = (orientation in o for o in (SIDEWAYS, (2, 3, 6, 7), (3, 4, 7, 8)))
    width, height = size[::-1] if sideways else size
    turned = [(y, x) if sideways else (x, y) for x, y in points]
    return [(width - x if flip_x else x, height - y if flip_y else y) for x, y in turned]


def check_pixels(image: Image.Image) -> None:
    """Raise ValueError for an image too large to be decoded."""
    limit = Image.MAX_IMAGE_PIXELS
    # PIL itself only warns up to twice this limit.
    if limit is not None and image.width * image.height > limit:
        raise ValueError(f"{image.width}x{image.height} is more than {limit} pixels")


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB in memory; what is transparent becomes white."""
    if image.mode.startswith("I"):  # convert() would clip instead of scale
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
    """What went wrong, in one line that is the same every time."""
    text = re.sub(r"<\S+ object at 0x\w+>", "it", f"{type(error).__name__}: {error}")
    return " ".join(text.split())[:limit]
