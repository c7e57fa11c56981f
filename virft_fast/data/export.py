"""Write a data set in the format of another trainer.

LLaMA-Factory: a JSON list in its sharegpt format with OpenAI's role names, image files, and
`dataset_info.json`, which lists both (https://llamafactory.readthedocs.io, data preparation).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from virft_fast.batch import Json, Row, Sample
from virft_fast.data.samples import BadRow, SampleDataset, taught_answer
from virft_fast.data.texts import read_json
from virft_fast.data.turns import IMAGE_PLACE
from virft_fast.data.writing import make_folder

# LLaMA-Factory replaces each of these in a text by another file.
MARKS = re.compile(r"<(image|video|audio)>")
INFO = "dataset_info.json"
SPEAKERS = ("user", "assistant", "system")


def check_export(out: Path, name: str, *, overwrite: bool) -> None:
    """Check, before the work starts, that the data set can be written.

    Raises:
        ValueError: the name can't be used, or exists already.
    """
    plain = re.fullmatch(r"[\w-][\w.-]*", name) and not name.lower().endswith(".json")
    if not plain or name.lower() == Path(INFO).stem:
        raise ValueError(
            f"--name: expected letters, digits, _, - and dots, without a leading dot or .json at "
            f"the end, and not dataset_info, got {name!r}; pass --name"
        )
    make_folder(out)
    listed = name in _read_info(out / INFO)
    files = [file for file in (name, f"{name}.json") if os.path.lexists(out / file)]
    if (listed or files) and not overwrite:
        existing = f"{files[0]} exists" if files else f"{INFO} has {name}"
        raise ValueError(f"--output {out}: {existing} already; pass --overwrite or another --name")


def export_llamafactory(
    samples: SampleDataset,
    out: Path,
    name: str,
    *,
    overwrite: bool = False,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda indices: indices,
) -> tuple[int, list[BadRow]]:
    """Write OUT/NAME.json and OUT/NAME/*.png, and add them to OUT/dataset_info.json.

    Everything is first written to a temporary folder. If that fails, nothing is replaced.

    Returns:
        The number of rows written, and the rows that can't be used.
    Raises:
        ValueError: no row could be written, or as in `check_export`.
    """
    check_export(out, name, overwrite=overwrite)
    aside = out / f".{name}.writing"
    _remove(aside)
    (aside / name).mkdir(parents=True)
    records: list[Row] = []
    bad: list[BadRow] = []
    try:
        for index in progress(range(len(samples))):
            sample = samples.get(index)
            record = sample if isinstance(sample, BadRow) else _record(sample, aside, name)
            if isinstance(record, BadRow):
                bad.append(record)
            else:
                records.append(record)
        if not records:
            raise ValueError(f"no row could be exported; the first: {bad[0].reason if bad else ''}")
        info = _read_info(out / INFO)  # again, because others may have changed it in the meantime
        info[name] = {
            "file_name": f"{name}.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
            "tags": {f"{tag}_tag": tag for tag in ("role", "content", *SPEAKERS)},
        }
        _write(aside / f"{name}.json", records)
        _write(aside / INFO, info)
        for file in (name, f"{name}.json"):
            if os.path.lexists(out / file):  # renaming can't replace a folder
                os.replace(out / file, aside / f"{file}.old")
        for file in (name, f"{name}.json", INFO):
            os.replace(aside / file, out / file)
    finally:
        _remove(aside)
    return len(records), bad


def _remove(path: Path) -> None:
    """Remove a file, a folder or a link, but not the target of a link."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _read_info(path: Path) -> Row:
    if not path.exists():
        return {}
    info = read_json(path, str(path))
    if not isinstance(info, dict):
        raise ValueError(f"{path}: expected an object of data sets, got {type(info).__name__}")
    return info


def _record(sample: Sample, aside: Path, name: str) -> Row | BadRow:
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
    """The turns, with adjacent ones of a role merged; None if roles still don't alternate."""
    merged: list[dict[str, str]] = []
    for turn in messages:
        if merged and merged[-1]["role"] == turn["role"]:
            turn = {**turn, "content": f"{merged.pop()['content']}\n{turn['content']}"}
        merged.append(turn)
    spoken = [turn["role"] for turn in merged[merged[0]["role"] == "system" :]]
    expected = [SPEAKERS[place % 2] for place in range(len(spoken))]
    return merged if spoken == expected else None


def _text(content: Json) -> str:
    if isinstance(content, str):
        return _escaped(content)
    parts = (IMAGE_PLACE if p["type"] == "image" else _escaped(p["text"]) for p in content)
    return "".join(parts)


def _escaped(text: str) -> str:
    return MARKS.sub(r"< \1 >", text)


def _write(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
