"""Read text files as they occur: gzipped, with a byte order mark, or in a legacy encoding."""

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
_BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
                     codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
# Encodings that spreadsheets and annotation tools write, most likely first.
_CODE_PAGES = (
    "cp1252", "gb18030", "cp1251", "cp932", "cp949", "big5", "cp1250", "euc_jp", "cp1254",
    "cp1253", "cp1255", "cp1256", "cp1257", "cp874", "cp1258", "koi8_r", "mac_roman",
)  # fmt: skip
_GZIP = b"\x1f\x8b"
_LINES_SAMPLED = 100
csv.field_size_limit(2**31 - 1)  # a cell may contain an image in base64


def read_text(path: Path, account: Built | None = None) -> str:
    """The text of a file.

    Args:
        account: records the encoding if it had to be guessed; None: don't guess.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file can't be read, or isn't text.
    """
    try:
        data = path.read_bytes()
        if data.startswith(_GZIP):
            data = gzip.decompress(data)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a text file, maybe gzipped, got {error}") from error
    encoding = next(
        (name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8-sig"
    )
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        if account is None:
            raise ValueError(f"{path}: expected UTF-8 text: {error}") from error
        encoding = _guessed(data, path)
        account.convert(f"text read as {encoding}, which was guessed; save it as UTF-8", str(path))
        return data.decode(encoding)


def read_json(path: Path, where: str, account: Built | None = None) -> Json:
    """The value in a JSON file.

    Args:
        where: names the file in errors, such as "--source FILE".
        account: see `read_text`.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file can't be read, or isn't JSON.
    """
    try:
        return json.loads(read_text(path, account))
    except FileNotFoundError:
        raise FileNotFoundError(f"{where}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected JSON, got {error}") from error


def only_file(files: Sequence[Path], source: Path, expected: str, hint: str = "") -> Path:
    """The only file in `files`, the matches in `source`.

    Raises:
        FileNotFoundError: there is none, or there are several; says what was expected.
    """
    if len(files) != 1:
        got = ", ".join(file.name for file in files) or "none"
        raise FileNotFoundError(f"--source {source}: expected {expected}, got {got}{hint}")
    return files[0]


def _guessed(data: bytes, path: Path) -> str:
    from charset_normalizer import from_bytes

    matches = [] if b"\0" in data else list(from_bytes(data, cp_isolation=list(_CODE_PAGES)))
    if not matches:
        raise ValueError(f"{path}: expected a text file, got bytes in no known encoding")
    # A few words may fit several encodings equally well.
    rank = _CODE_PAGES.index
    return min(matches, key=lambda m: (m.chaos, -m.coherence, rank(m.encoding))).encoding


def read_table(
    path: Path, needed: Sequence[Collection[str]], account: Built
) -> tuple[list[str], Iterator[tuple[int, dict[str, str | None]]]]:
    """Read a CSV file with any separator.

    Args:
        needed: for each required column, its possible names. They also help to find the separator.
        account: records a guessed encoding, and a separator other than a comma.
    Returns:
        The header, and (line number, row) for each row. Missing cells at a row's end are None.
    Raises:
        FileNotFoundError, ValueError: as in `read_text`, even while the rows are read; or two
            columns have the same name, or a row has more cells than the header.
    """
    text = read_text(path, account)
    if "\0" in text:
        raise ValueError(f"{path}: expected CSV, got zero bytes")
    lines = list(io.StringIO(text, newline=""))
    start = 0  # skip empty lines and Excel's "sep=;"
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
    """The separator that gives the header the needed columns. Failing that, the one that gives rows
    the same number of cells as the header, and the most cells. A comma wins ties."""
    first = lines[0].strip() if lines else ""
    marks = dict.fromkeys((",", *"\t;|", *first))

    def fits(mark: str) -> tuple[bool, bool, int]:
        header = _header(lines, mark)
        rows = list(csv.reader(lines[:_LINES_SAMPLED], delimiter=mark))
        if len(lines) > _LINES_SAMPLED:
            del rows[-1]  # may be cut off
        complete = all(set(names) & set(header) for names in needed)
        return complete, all(len(row) in (0, len(header)) for row in rows), len(header)

    return max((m for m in marks if m == "," or (m in first and _separates(m))), key=fits)


def _separates(mark: str) -> bool:
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
            if None in row:  # such as an unquoted label with a comma
                raise ValueError(
                    f"{path}: line {number}: expected {len(header)} cells, got more; put text "
                    f"that contains {mark!r} in quotes"
                )
            yield number, row
    except csv.Error as error:
        raise ValueError(f"{path}: expected CSV: {error}") from error
