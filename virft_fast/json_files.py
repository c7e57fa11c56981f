"""Reads JSON that people edit or killed processes leave incomplete; errors name the file."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path

from virft_fast.batch import Json, Row

COUNT, NUMBER, MEAN = "a whole number from 0 to 2**63 - 1", "a finite number", "a number or NaN"


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


def replace_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it, so that it is never half written."""
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(text, encoding="utf-8", errors="replace")  # for lone surrogates
    os.replace(aside, path)


def intact_lines(path: Path) -> Iterator[tuple[str, Json]]:
    """Each line of a JSON Lines file with its value; lines that are not JSON are skipped, because
    a kill or a full disk may have cut them off."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            value = parse_json(line, str(path))
        except ValueError:
            continue
        yield line, value


def misfit(value: Json, form: Json, where: str = "") -> str | None:
    """The first place where JSON data differs from `form`: what was expected and what was found.

    Args:
        form: `COUNT`, `NUMBER`, `MEAN` or a type; [form of every item]; (form of each item);
            {str: form of the values}; {key: form}, which allows other keys.
        where: path from the root to `value`, such as ".writer.window".
    """
    children: list[tuple[Json, Json, str]] = []
    expected, fits = "a list", type(value) is list
    if form == COUNT:
        expected, fits = form, type(value) is int and 0 <= value < 2**63
    elif form in (NUMBER, MEAN):  # NaN is not below anything
        expected, fits = form, type(value) in (int, float)
        fits = fits and (abs(value) < 1e300 or (form == MEAN and value != value))
    elif isinstance(form, type):
        expected, fits = f"a {form.__name__}", type(value) is form
    elif isinstance(form, dict):
        expected, fits = "a dict", type(value) is dict
        if fits:
            keys = value if str in form else form
            children = [(value.get(k), form.get(str, form.get(k)), f".{k}") for k in keys]
    else:
        if isinstance(form, tuple):
            expected, fits = f"a list of {len(form)}", fits and len(value) == len(form)
        if fits:
            forms = form if isinstance(form, tuple) else form * len(value)
            children = [(v, f, f"[{i}]") for i, (v, f) in enumerate(zip(value, forms, strict=True))]
    if not fits:
        return f"{where.removeprefix('.')}: expected {expected}, got {reprlib.repr(value)}"
    return next(filter(None, (misfit(v, f, where + at) for v, f, at in children)), None)
