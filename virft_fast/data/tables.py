"""Load JSON, JSON lines and CSV files as `datasets` tables."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from virft_fast.batch import Json, Row
from virft_fast.data.accounts import Built
from virft_fast.data.images import placed
from virft_fast.data.layouts import IMAGE_COLUMNS, JSON_COLUMNS, QUESTIONS, read_list
from virft_fast.data.texts import read_table, read_text

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa


def read_file(path: Path, account: Built, folder: Path) -> datasets.Dataset:
    """The rows of a JSON, JSON lines, CSV or TSV file.

    Args:
        account: records the encoding if it had to be guessed.
        folder: where relative image paths start; they are made absolute.
    Raises:
        ValueError: the file can't be read; says why.
    """
    import datasets
    import pyarrow as pa

    read = _read_csv if path.suffix in (".csv", ".tsv") else _read_json
    records = read(path, account)
    columns = {}
    for name in dict.fromkeys(key for record in records for key in record):
        values = [_utf8(record.get(name)) for record in records]
        if name in IMAGE_COLUMNS:
            values = [_absolute_paths(value, folder) for value in values]
        chats = name in JSON_COLUMNS and any(isinstance(value, (list, dict)) for value in values)
        columns[name] = _column(values, as_json=chats)
    return datasets.Dataset(pa.table(columns))


def _read_json(path: Path, account: Built) -> list[Row]:
    """The records in a JSON list, a JSON object or JSON lines, distinguished by their content."""
    records = _parse_json(read_text(path, account), path)
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}: expected every record to be an object such as "
                f'{{"image_path", "problem", "solution"}}, got {record!r:.80} at {number}'
            )
    return records


def _parse_json(text: str, path: Path) -> list[Json]:
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
        return value if isinstance(value, list) else [value]
    except (ValueError, RecursionError) as error:  # also raised for numbers with many digits
        if text.lstrip().startswith("["):
            raise ValueError(f"{path}: not valid JSON: {error}") from error
    records = []
    # Not splitlines(), which also splits at characters that may occur inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            records += [json.loads(line, object_pairs_hook=_unique_keys)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number} is not valid JSON: {error}") from error
    return records


def _read_csv(path: Path, account: Built) -> list[Row]:
    """The rows of a table. Values are text, or None for empty cells."""
    rows = read_table(path, (QUESTIONS,), account)[1]
    return [{k: v or None for k, v in row.items() if k} for _, row in rows]


def _unique_keys(pairs: list[tuple[str, Json]]) -> Row:
    """Build a JSON object. A repeated key is an error; json.loads would use the last one."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return value


def _absolute_paths(value: Json, folder: Path) -> list[str] | None:
    """One path or a list of paths, as a list of absolute paths, so that both fit in one column."""
    value = read_list(IMAGE_COLUMNS[0], value)
    if value is None:
        return None
    items = value if isinstance(value, list) else [value]
    paths = [i.get("path") or i.get("url") if isinstance(i, dict) else i for i in items]
    return [placed(folder, path) if isinstance(path, str) and path else "" for path in paths]


def _utf8(value: Json) -> Json:
    """The value without lone surrogates such as "\\ud800", which JSON allows but arrow doesn't."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_utf8(item) for item in value]
    if isinstance(value, dict):
        return {_utf8(key): _utf8(item) for key, item in value.items()}
    return value


def _column(values: Sequence[Json], *, as_json: bool) -> pa.Array:
    """An arrow array. Values of different types are stored as JSON, so that each keeps its type and
    one odd row doesn't make the whole file unreadable."""
    import pyarrow as pa

    if not as_json and not {int, float} <= set(map(type, values)):  # arrow would turn 1 into 1.0
        with contextlib.suppress(pa.ArrowException, OverflowError, ValueError, TypeError):
            return pa.array(values)
    return pa.array([None if v is None else json.dumps(v) for v in values], pa.json_())
