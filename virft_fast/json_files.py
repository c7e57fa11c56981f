"""JSON that people edit and that killed processes leave incomplete: read, or rejected by name."""

from __future__ import annotations

import json
from pathlib import Path

from virft_fast.batch import Json, Row


def parse_json(text: str | bytes, source: str) -> Json:
    """The value of a JSON text.

    Args:
        source: names the text in the error, such as "--deepspeed zero3.json".
    Raises:
        ValueError: it is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: expected JSON, got {error}") from error


def json_object(text: str | bytes) -> Row | None:
    """The JSON object in a text; None if the text is incomplete or anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_object(path: Path) -> Row | None:
    """The JSON object in a file; None if there is no such file or it holds anything else."""
    try:
        return json_object(path.read_bytes())
    except OSError:
        return None
