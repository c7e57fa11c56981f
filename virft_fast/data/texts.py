"""Text files as people have them: gzipped, with a byte order mark, or in an old encoding."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from virft_fast.batch import Json
from virft_fast.data.accounts import Built

# UTF-32 first: its little-endian mark starts with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What spreadsheets and annotation tools write, the likelier first.
_CODE_PAGES = (
    "cp1252", "gb18030", "cp1251", "cp932", "cp949", "big5", "cp1250", "euc_jp", "cp1254",
    "cp1253", "cp1255", "cp1256", "cp1257", "cp874", "cp1258", "koi8_r", "mac_roman",
)  # fmt: skip
_GZIP = b"\x1f\x8b"
_LINES_LOOKED_AT = 100
csv.field_size_limit(2**31 - 1)  # a cell may be an image in base64


def read_text(path: Path, account: Built) -> str:
    """The text of a file.

    Args:
        account: records the encoding where it is not UTF-8.
    Raises:
        FileNotFoundError: no such file.
        ValueError: the file can't be read, or holds no text.
    """
    try:
        data = path.read_bytes()
        if data.startswith(_GZIP):
            data = gzip.decompress(data)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a text file, maybe gzipped, got {error}") from error
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8-sig")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        encoding = _guessed(data, path)
        account.convert(f"text read as {encoding}, which was guessed; save it as UTF-8", str(path))
        return data.decode(encoding)


def read_json(path: Path, account: Built, source: str) -> Json:
    """The value of a JSON file.

    Args:
        account: see `read_text`.
        source: names the file in errors, such as "--annotations instances.json".
    Raises:
        FileNotFoundError: no such file.
        ValueError: the file can't be read, or is not JSON.
    """
    try:
        return json.loads(read_text(path, account))
    except FileNotFoundError:
        raise FileNotFoundError(f"{source}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: expected JSON, got {error}") from error


def _guessed(data: bytes, path: Path) -> str:
    from charset_normalizer import from_bytes

    matches = [] if b"\0" in data else list(from_bytes(data, cp_isolation=list(_CODE_PAGES)))
    if not matches:
        raise ValueError(f"{path}: expected a text file, got bytes in no known encoding")
    # A few words fit several as well as each other.
    rank = _CODE_PAGES.index
    return min(matches, key=lambda m: (m.chaos, -m.coherence, rank(m.encoding))).encoding


def read_table(
    path: Path, needed: Sequence[Collection[str]], account: Built
) -> tuple[list[str], Iterator[tuple[int, dict[str, str | None]]]]:
    """A CSV file with any character between its cells.

    Args:
        needed: for each column that has to be there, the names it may have. They tell the
            separator, too.
        account: records the encoding and a separator other than a comma.
    Returns:
        The header, and (line number, row) for each row. A row with fewer cells than the header has
        None in the others.
    Raises:
        FileNotFoundError, ValueError: as `read_text`, also while the rows are read; or two columns
            have one name, or a row has more cells than the header.
    """
    text = read_text(path, account)
    if "\0" in text:
        raise ValueError(f"{path}: expected CSV, got zero bytes")
    lines = list(io.StringIO(text, newline=""))
    start = 0  # behind empty lines and Excel's "sep=;"
    while start < len(lines) and not lines[start].lower().partition("sep=")[0].strip():
        start += 1
    lines[:start] = []
    mark = _separator(lines, needed)
    if mark != ",":
        account.convert(f"cells separated by {mark!r}", str(path))
    header = _header(lines, mark)
    named = [name for name in header if name]
    if len(set(named)) < len(named):
        raise ValueError(f"{path}: expected a name for each column, got {', '.join(named):.300}")
    return header, _rows(lines[1:], header, mark, start + 1, path)


def _separator(lines: Sequence[str], needed: Sequence[Collection[str]]) -> str:
    """With which the header has the needed columns, else most cells and rows as many; a comma
    before others."""
    first = lines[0].strip() if lines else ""
    marks = dict.fromkeys((",", *"\t;|", *first))

    def fits(mark: str) -> tuple[bool, bool, int]:
        header = _header(lines, mark)
        rows = list(csv.reader(lines[:_LINES_LOOKED_AT], delimiter=mark))
        if len(lines) > _LINES_LOOKED_AT:
            del rows[-1]  # which may go on
        known = all(set(names) & set(header) for names in needed)
        return known, all(len(row) in (0, len(header)) for row in rows), len(header)

    return max((m for m in marks if m == "," or (m in first and _parts(m))), key=fits)


def _parts(mark: str) -> bool:
    return mark == "\t" or (mark.isprintable() and not mark.isalnum() and mark not in '_" ')


def _header(lines: Sequence[str], mark: str) -> list[str]:
    return [name.strip() for name in next(csv.reader(lines[:1], delimiter=mark), [])]


def _rows(
    lines: Sequence[str], header: list[str], mark: str, before: int, path: Path
) -> Iterator[tuple[int, dict[str, str | None]]]:
    reader = csv.DictReader(lines, header, strict=True, delimiter=mark)
    try:
        for row in reader:
            number = reader.line_num + before
            if None in row:  # such as a comma in a label without quotes around it
                raise ValueError(
                    f"{path}: line {number}: expected {len(header)} cells, got more; put a text "
                    f"that holds a {mark!r} in quotes"
                )
            yield number, row
    except csv.Error as error:
        raise ValueError(f"{path}: expected CSV: {error}") from error
