"""What an evaluation leaves: each file written aside, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from virft_fast.data.writing import make_folder
from virft_fast.evaluation import pages
from virft_fast.evaluation.journal import Record, beside
from virft_fast.evaluation.results import Result
from virft_fast.metrics import null_for_nan

TAKEN = (".json", ".md", ".html", ".journal")
BESIDE = (
    ".summary.json", ".md", ".html", ".journal", ".predictions.json", ".truth.json",
    ".exists_map.json", ".presence.jsonl",
)  # fmt: skip


def check_output(
    path: Path, models: Sequence[str], inputs: Sequence[str | None], *, overwrite: bool
) -> None:
    """Better before the evaluation than after it.

    Args:
        models: that are compared; none for a single one.
        inputs: files that are read, and so not to be written.
    Raises:
        ValueError: nothing can be written there, or what is there is something else.
    """
    if path.is_dir():
        raise ValueError(f"--output {path}: expected a file's name, got a folder")
    if path.suffix in TAKEN:
        raise ValueError(f"--output {path}: expected a name for the records, such as answers.jsonl")
    read = {Path(name).expanduser().resolve() for name in inputs if name}
    for place in (path, *(of_models(path, models) if models else ())):
        there = [f for f in (place, *(beside(place, end) for end in BESIDE)) if f.exists()]
        for file in there:
            if file.is_dir() or file.resolve() in read:
                what = "a folder" if file.is_dir() else "read by this evaluation"
                raise ValueError(f"--output {path}: expected another name, {file} is {what}")
        if there and not overwrite and not _is_ours(place, bool(models) and place == path):
            raise ValueError(
                f"--output {path}: expected a new name or that of the same evaluation, "
                f"{there[0]} is something else; --overwrite replaces it"
            )
    make_folder(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"--output {path}: expected a file that can be written")


def _is_ours(place: Path, compared: bool) -> bool:
    """Whether an evaluation lies there, or a comparison: its models' own files hold what is in it,
    so one of other models may replace it."""
    try:
        summary = json.loads(beside(place, ".summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        summary = {}
    done = isinstance(summary, dict) and ("models" if compared else "settings") in summary
    return done or (not compared and beside(place, ".journal").exists())


def of_models(output: Path, models: Sequence[str]) -> list[Path]:
    """Where each of several models' records go."""
    names = [
        "".join(c if c.isalnum() or c in "-_" else "-" for c in model.strip("/")).strip("-")
        for model in models
    ]
    # Of paths that differ only in signs, such as a/b and a-b.
    told_apart = [
        f"{name}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"
        if names.count(name) > 1
        else name
        for name, model in zip(names, models, strict=True)
    ]
    return [beside(output, f".{name}.jsonl") for name in told_apart]


def write_result(
    output: Path,
    result: Result,
    *,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    presence: Sequence[Record] = (),
    exists: Mapping[int, Sequence[str]] | None = None,
) -> None:
    """Records and summary, and what belongs to the task: predictions in COCO's results format and
    the truth they are measured against, the map of what exists. What lies there of an earlier
    evaluation and is not of this one goes."""
    _write_lines(output, result.records)
    coco = result.predictions is not None and result.truth is not None
    of_task = {
        ".exists_map.json": exists if presence else None,
        ".predictions.json": result.predictions if coco else None,
        ".truth.json": result.truth.as_coco() if coco else None,
    }
    for ending, value in of_task.items():
        if value is None:
            beside(output, ending).unlink(missing_ok=True)
        else:
            _write(beside(output, ending), _json(value))
    if presence:
        _write_lines(beside(output, ".presence.jsonl"), presence)
    else:
        beside(output, ".presence.jsonl").unlink(missing_ok=True)
    summary = {
        "model": result.model,
        "means": result.means,
        "intervals": {name: result.interval(name) for name in result.draws},
        "task": result.task,
        "num_samples": len(result.records),
        "bad_rows": result.counts.get("rows that can't be used", 0),
        "counts": result.counts,
        "images_missing": result.missing,
        "categories": result.categories,
        "confusions": result.confusions,
        "settings": settings,
        "config": config,
    }
    # Last: with it, the evaluation is done.
    write_json(beside(output, ".summary.json"), summary)


def write_comparison(path: Path, results: Sequence[Result]) -> None:
    """The measures of several models and how the last differs from the first, as JSON."""
    first, last = results[0], results[-1]
    changes = {}
    for name in first.means:
        difference, interval = pages.change(first, last, name)
        changes[name] = {"change": difference, "interval": interval}
    models = {result.model: result.means for result in results}
    write_json(path, {"models": models, "change": changes})


def write_report(
    output: Path,
    title: str,
    results: Sequence[Result],
    *,
    num_pictures: int,
    load: Callable[[int], Any],
    question: Callable[[Any], str],
) -> list[pages.Table]:
    """The tables in Markdown and, with pictures, as a page; returns the tables."""
    shown = pages.tables(results)
    found = pages.pictures(results, num_pictures, load, question) if num_pictures else []
    _write(beside(output, ".md"), pages.markdown(title, shown))
    names = [result.model for result in results]
    _write(beside(output, ".html"), pages.html(title, shown, found, names))
    return shown


def write_json(path: Path, value: Any) -> None:
    _write(path, _json(value, indent=1) + "\n")


def _write_lines(path: Path, records: Sequence[Record]) -> None:
    _write(path, "".join(_json(record) + "\n" for record in records))


def _json(value: Any, **options: Any) -> str:
    """As every program reads it: without NaN and Infinity."""
    return json.dumps(null_for_nan(value), allow_nan=False, **options)


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(text, encoding="utf-8", errors="replace")  # JSON may hold lone surrogates
    os.replace(aside, path)
