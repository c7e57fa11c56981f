"""Digests of texts, files, images and rows. Stored results are reused while their digests match.

Journals, evaluation results and DPO's reference files hold these values, so they must not change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from virft_fast.batch import Json

if TYPE_CHECKING:
    from PIL.Image import Image


def digest_of(parts: Iterable[str | bytes]) -> str:
    """The SHA-256 of all parts, one after another, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def json_digest(value: Json) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a value's JSON."""
    return digest_of([json.dumps(value)])[:16]


def sample_digest(text: str, images: Iterable[Image] = ()) -> str:
    """The SHA-1 of a text and of the pixels of decoded images, as 40 hexadecimal digits."""
    digest = hashlib.sha1(text.encode())
    for image in images:
        digest.update(f"{image.size}".encode() + image.tobytes())
    return digest.hexdigest()


def image_digest(image: Image) -> str:
    """The SHA-1 of an image's pixels. Equal images have equal digests, whatever their files."""
    return sample_digest("", [image])


def file_stamp(path: str | Path) -> list[str | int]:
    """A file's path, size in bytes and modification time in ns; just the path without a file."""
    try:
        stat = Path(path).stat()
    except (OSError, ValueError):  # no such file, or not a valid file name
        return [str(path)]
    return [str(path), stat.st_size, stat.st_mtime_ns]


def image_stamp(image: Json) -> Json:
    """JSON that changes with an image as a row stores it: the digest of its bytes, the `file_stamp`
    of its path, or a list of these."""
    if isinstance(image, Mapping):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, list):
        return [image_stamp(one) for one in image]
    if isinstance(image, bytes):
        return digest_of([image])
    return file_stamp(image) if isinstance(image, str) else str(image)
