"""The files of an evaluation; each is written under another name first, then renamed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from virft_fast.batch import Json, Row, Sample
from virft_fast.data.writing import make_folder
from virft_fast.digests import digest_of
from virft_fast.evaluation import pages
from virft_fast.evaluation.journal import Record, RecordStore, companion
from virft_fast.evaluation.results import Result
from virft_fast.json_files import read_object, replace_text
from virft_fast.metrics import null_for_nan

RESERVED_SUFFIXES = (".json", ".md", ".html", ".journal")
COMPANIONS = (
    ".summary.json", ".md", ".html", ".journal", ".predictions.json", ".truth.json",
    ".exists_map.json", ".presence.jsonl",
)  # fmt: skip


def check_result_files(
    path: Path, models: Sequence[str], inputs: Sequence[str | None], *, overwrite: bool
) -> None:
    """Check, before any answers are computed, that the files of an evaluation can be written.

    Args:
        models: those of a comparison; empty for a single model.
        inputs: files that the evaluation reads, and so must not overwrite.
    Raises:
        ValueError: they can't be written, or would overwrite something other than this evaluation.
    """
    if path.is_dir():
        raise ValueError(f"--output {path}: expected a file's name, got a folder")
    if path.suffix in RESERVED_SUFFIXES:
        raise ValueError(f"--output {path}: expected a name for the records, such as answers.jsonl")
    read = {Path(name).expanduser().resolve() for name in inputs if name}
    for output in (path, *(of_models(path, models) if models else ())):
        names = (output, *(companion(output, ending) for ending in COMPANIONS))
        existing = [file for file in names if file.exists()]
        for file in existing:
            if file.is_dir() or file.resolve() in read:
                what = "a folder" if file.is_dir() else "read by this evaluation"
                raise ValueError(f"--output {path}: expected another name, {file} is {what}")
        if existing and not overwrite and not _is_ours(output, bool(models) and output == path):
            raise ValueError(
                f"--output {path}: expected a new name or that of the same evaluation, "
                f"{existing[0]} is something else; --overwrite replaces it"
            )
    make_folder(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"--output {path}: expected a file that can be written")


def _is_ours(output: Path, compared: bool) -> bool:
    """Whether the existing files come from an evaluation, or from a comparison. A comparison of
    other models may be overwritten, because each model's own files hold its results."""
    summary = read_object(companion(output, ".summary.json")) or {}
    if compared:
        return "models" in summary
    return "settings" in summary or companion(output, ".journal").exists()


def of_models(output: Path, models: Sequence[str]) -> list[Path]:
    """The path of each model's records."""
    names = [re.sub(r"[^\w-]", "-", model.strip("/")).strip("-") for model in models]
    # A digest distinguishes paths such as a/b and a-b.
    digests = [f"-{digest_of([model])[:6]}" for model in models]
    unique = [n + d if names.count(n) > 1 else n for n, d in zip(names, digests, strict=True)]
    return [companion(output, f".{name}.jsonl") for name in unique]


def write_result(
    output: Path,
    result: Result,
    *,
    store: RecordStore,
    config: Row,
    exists: Mapping[int, Sequence[str]] | None,
) -> None:
    """Write records, summary and the task's own files: predictions in COCO's results format with
    their truth, and the presence answers with their map. Delete files of an earlier evaluation that
    this one doesn't write."""
    presence = store.records("presence")
    replace_text(output, _lines(result.records))
    of_task = {
        ".exists_map.json": _json(exists) if presence else None,
        ".predictions.json": _json(result.predictions) if result.truth else None,
        ".truth.json": _json(result.truth.as_coco()) if result.truth else None,
        ".presence.jsonl": _lines(presence) if presence else None,
    }
    for ending, text in of_task.items():
        if text is None:
            companion(output, ending).unlink(missing_ok=True)
        else:
            replace_text(companion(output, ending), text)
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
        "settings": store.journal.settings,
        "config": config,
    }
    # Last, because it marks the evaluation as done.
    write_json(companion(output, ".summary.json"), summary)


def write_comparison(path: Path, results: Sequence[Result]) -> None:
    """Write the measures of all models, and the change from the first to the last, as JSON."""
    first, last = results[0], results[-1]
    changes = {}
    for name in first.means:
        difference, interval = pages.change(first, last, name)
        changes[name] = {"change": difference, "interval": interval}
    models = {result.model: result.means for result in results}
    write_json(path, {"models": models, "change": changes})


def write_pages(
    output: Path,
    title: str,
    results: Sequence[Result],
    *,
    num_pictures: int,
    load: pages.LoadSample,
    question: Callable[[Sample], str],
) -> list[pages.Table]:
    """Write the report as Markdown and, with pictures, as HTML; returns its tables."""
    tables = pages.tables(results)
    pictures = pages.pictures(results, num_pictures, load, question) if num_pictures else []
    replace_text(companion(output, ".md"), pages.markdown(title, tables))
    names = [result.model for result in results]
    replace_text(companion(output, ".html"), pages.html(title, tables, pictures, names))
    return tables


def write_json(path: Path, value: Json) -> None:
    """Write a value as JSON, NaN and Infinity as null."""
    replace_text(path, _json(value, indent=1) + "\n")


def _lines(records: Sequence[Record]) -> str:
    return "".join(_json(record) + "\n" for record in records)


def _json(value: Json, indent: int | None = None) -> str:
    """Standard JSON, which has no NaN and Infinity."""
    return json.dumps(null_for_nan(value), allow_nan=False, indent=indent)
