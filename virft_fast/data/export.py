"""A data set as other trainers read it.

LLaMA-Factory: a JSON list in its sharegpt form with OpenAI's role names, the images as files, and
the `dataset_info.json` that names both (https://llamafactory.readthedocs.io, data preparation).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from virft_fast.batch import Sample
from virft_fast.data.layouts import IMAGE_PLACE
from virft_fast.data.loading import BadRow, SampleDataset, taught_answer
from virft_fast.data.writing import make_folder

# Each counts as one more file if a text says it itself.
MARKS = re.compile(r"<(image|video|audio)>")
INFO = "dataset_info.json"


def check_export(out: Path, name: str, *, overwrite: bool) -> None:
    """Better before the work than after it.

    Raises:
        ValueError: OUT/NAME would not be a place of its own, or something is there already.
    """
    plain = re.fullmatch(r"[\w-][\w.-]*", name) and not name.lower().endswith(".json")
    if not plain or name.lower() == Path(INFO).stem:
        raise ValueError(
            f"--name: expected letters, digits, _, - and dots, not a dot first, no .json at the "
            f"end, and not dataset_info, got {name!r}; pass --name"
        )
    make_folder(out)
    listed = name in _read_info(out / INFO)
    files = [file for file in (name, f"{name}.json") if os.path.lexists(out / file)]
    if (listed or files) and not overwrite:
        there = f"{files[0]} exists" if files else f"{INFO} has {name}"
        raise ValueError(f"--output {out}: {there} already; pass --overwrite or another --name")


def export_llamafactory(
    samples: SampleDataset,
    out: Path,
    name: str,
    *,
    overwrite: bool = False,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda indices: indices,
) -> tuple[int, list[BadRow]]:
    """Write OUT/NAME.json, OUT/NAME/*.png and OUT/dataset_info.json, whose other entries stay.

    Everything is written aside first: what was there stays if that fails.

    Returns:
        number of rows written, and the rows that could not be.
    Raises:
        ValueError: not one row could be written, or as `check_export`.
    """
    check_export(out, name, overwrite=overwrite)
    aside = out / f".{name}.writing"
    _remove(aside)
    (aside / name).mkdir(parents=True)
    records, bad = [], []
    try:
        for index in progress(range(len(samples))):
            sample = samples.get(index)
            record = sample if isinstance(sample, BadRow) else _record(sample, aside, name)
            (bad if isinstance(record, BadRow) else records).append(record)
        if not records:
            raise ValueError(f"no row could be exported; the first: {bad[0].reason if bad else ''}")
        info = _read_info(out / INFO)  # now: others may have written in the meantime
        info[name] = {
            "file_name": f"{name}.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
                "system_tag": "system",
            },
        }
        _write(aside / f"{name}.json", records)
        _write(aside / INFO, info)
        for file in (name, f"{name}.json"):
            if os.path.lexists(out / file):  # a folder is not replaced by a rename
                os.replace(out / file, aside / f"{file}.old")
        for file in (name, f"{name}.json", INFO):
            os.replace(aside / file, out / file)
    finally:
        _remove(aside)
    return len(records), bad


def _remove(path: Path) -> None:
    """Whatever it is; of a link, the link."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _read_info(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(info, dict):
        raise ValueError(f"{path}: expected an object of data sets, got {type(info).__name__}")
    return info


def _record(sample: Sample, aside: Path, name: str) -> dict[str, Any] | BadRow:
    messages = _alternating(
        [{"role": m["role"], "content": _text(m["content"])} for m in sample.messages]
    )
    if messages is None:
        roles = ", ".join(m["role"] for m in sample.messages)
        return BadRow(
            sample.index, f"prompt: expected user and assistant in turn, user first, got {roles}"
        )
    files = []
    for number, image in enumerate(sample.images):
        file = f"{name}/{sample.index:06d}_{number}.png"
        image.save(aside / file)
        files.append(file)
    messages.append({"role": "assistant", "content": _escaped(taught_answer(sample))})
    return {"messages": messages, "images": files}


def _alternating(messages: list[dict[str, str]]) -> list[dict[str, str]] | None:
    """Turns of one role in a row as one; None where roles don't alternate even so."""
    merged: list[dict[str, str]] = []
    for turn in messages:
        if merged and merged[-1]["role"] == turn["role"]:
            turn = {**turn, "content": f"{merged.pop()['content']}\n{turn['content']}"}
        merged.append(turn)
    spoken = [turn["role"] for turn in merged[merged[0]["role"] == "system" :]]
    expected = ["user" if place % 2 == 0 else "assistant" for place in range(len(spoken))]
    return merged if spoken == expected else None


def _text(content: Any) -> str:
    if isinstance(content, str):
        return _escaped(content)
    parts = (IMAGE_PLACE if p["type"] == "image" else _escaped(p["text"]) for p in content)
    return "".join(parts)


def _escaped(text: str) -> str:
    return MARKS.sub(r"< \1 >", text)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
