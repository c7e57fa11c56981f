"""The image files in a folder, and how to find the one that an annotation file names."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from virft_fast.data.accounts import Built
from virft_fast.data.images import IMAGE_FORMATS

# Suffixes of the formats in IMAGE_FORMATS.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", *((".avif",) if "AVIF" in IMAGE_FORMATS else ()),
)  # fmt: skip
_SYSTEM_FILES = ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found",
                 "system volume information", "__pycache__")  # fmt: skip
OTHER_SPELLING = "image found by another spelling of its path (case, Unicode form, '\\', %20)"
PATH_END = "image found by the end of its path"
WHERE_PATHS_START = "give the folder where the annotations' paths start"
AMBIGUOUS = f"image whose path fits several files; {WHERE_PATHS_START}"


def is_hidden(name: str) -> bool:
    """Whether a file or folder with this name belongs to a tool or the operating system."""
    return name.startswith((".", "~$")) or name.lower() in _SYSTEM_FILES


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def walk(folder: Path, account: Built | None = None) -> Iterator[Path]:
    """Yield every visible file in a folder and its subfolders. Links are followed, and each folder
    is visited once.

    Args:
        account: records hidden files and folders.
    """
    seen = {os.path.realpath(folder)}
    for root, folders, files in os.walk(folder, followlinks=True):
        for name in sorted((*folders, *files)):
            if is_hidden(name) and account is not None:
                account.leave_out("hidden file or folder", os.path.join(root, name))
        visible = []
        for name in sorted(name for name in folders if not is_hidden(name)):
            place = os.path.realpath(os.path.join(root, name))
            if place not in seen:
                seen.add(place)
                visible.append(name)
        folders[:] = visible
        yield from (Path(root, name) for name in sorted(files) if not is_hidden(name))


class Found(NamedTuple):
    """Where an image was found.

    Attributes:
        path: the file, which may not exist; None if several files fit.
        rule: how the path differs from the one in the annotations; empty if it doesn't.
    """

    path: Path | None
    rule: str = ""


class ImageFiles:
    """Finds the files of a folder by the paths in annotation files.

    The exact path wins. Otherwise, a file fits if its path in the folder ends with the given path,
    or the given path ends with the file's. The longest common end wins. For equal lengths, exact
    spelling beats a different case or Unicode form. If several files still fit, none is chosen. No
    path leads out of the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, file: str) -> Found:
        spellings = [parts for parts in map(_parts, _spellings(file)) if parts]
        for number, parts in enumerate(spellings):
            path = self.folder.joinpath(*parts)
            if os.path.isfile(path):  # false for names that no file can have
                return Found(path, OTHER_SPELLING if number else "")
        best = max((self._fits(parts) for parts in spellings), default=((0, False), []))
        (length, equal), fits = best
        if not fits:
            return Found(self.folder.joinpath(*spellings[-1][-1:]) if spellings else self.folder)
        if len(fits) > 1:
            return Found(None, AMBIGUOUS)
        whole = length == len(fits[0]) == max(map(len, spellings))
        return Found(self.folder.joinpath(*fits[0]), OTHER_SPELLING if whole else PATH_END)

    def _fits(self, parts: tuple[str, ...]) -> tuple[tuple[int, bool], list[tuple[str, ...]]]:
        """(length of the longest common end, whether spelled exactly), and the files with it."""
        fits: dict[tuple[int, bool], list[tuple[str, ...]]] = defaultdict(list)
        for other in self._by_name.get(_folded(parts[-1]), ()):
            length = min(len(parts), len(other))
            ends = [[unicodedata.normalize("NFC", p) for p in e[-length:]] for e in (parts, other)]
            if [p.lower() for p in ends[0]] == [p.lower() for p in ends[1]]:
                fits[length, ends[0] == ends[1]].append(other)
        return max(fits.items(), default=((0, False), []))

    @cached_property
    def _by_name(self) -> dict[str, list[tuple[str, ...]]]:
        by_name = defaultdict(list)
        for path in walk(self.folder):
            by_name[_folded(path.name)].append(path.relative_to(self.folder).parts)
        return by_name


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).lower()


def _spellings(file: str) -> dict[str, None]:
    """The path as given; without a URL's host or a drive; then with / and with %20 decoded."""
    plain = urlsplit(file).path if "://" in file else file
    plain = re.sub(r"^[A-Za-z]:(?=[/\\])", "", plain)
    return dict.fromkeys((file, plain, (slashed := plain.replace("\\", "/")), unquote(slashed)))


def _parts(file: str) -> tuple[str, ...]:
    """The names in the path, except those that lead out of the folder to which they are joined."""
    return tuple(name for name in Path(file).parts if name not in ("/", "//", "..") and name)
