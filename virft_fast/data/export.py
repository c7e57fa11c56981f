"""A data set as other trainers read it.

LLaMA-Factory: a JSON list in its sharegpt form with OpenAI's role names, the images as files, and
the `dataset_info.json` that names both (https://llamafactory.readthedocs.io, data preparation).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from virft_fast.batch import Sample
from virft_fast.data.loading import BadRow, SampleDataset

IMAGE_MARK = "<image>"


def export_llamafactory(
    samples: SampleDataset,
    out: Path,
    name: str,
    *,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda indices: indices,
) -> tuple[int, list[BadRow]]:
    """Write OUT/NAME.json, OUT/NAME/*.png and OUT/dataset_info.json, whose other entries stay.

    Returns:
        number of rows written, and the rows that could not be.
    Raises:
        ValueError: not one row could be written, or `dataset_info.json` is no JSON object.
    """
    out.mkdir(parents=True, exist_ok=True)
    info = _read_info(out / "dataset_info.json")
    aside = out / f".{name}.writing"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    records, bad = [], []
    try:
        for index in progress(range(len(samples))):
            sample = samples.get(index)
            if isinstance(sample, BadRow):
                bad.append(sample)
                continue
            records.append(_record(sample, aside, name))
        if not records:
            raise ValueError(f"no row could be exported; the first: {bad[0].reason if bad else ''}")
        shutil.rmtree(out / name, ignore_errors=True)
        os.replace(aside, out / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
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
    _write(out / f"{name}.json", records)
    _write(out / "dataset_info.json", info)
    return len(records), bad


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(info, dict):
        raise ValueError(f"{path}: expected an object of data sets, got {type(info).__name__}")
    return info


def _record(sample: Sample, aside: Path, name: str) -> dict[str, Any]:
    files = []
    for number, image in enumerate(sample.images):
        file = f"{sample.index:06d}_{number}.png"
        image.save(aside / file)
        files.append(f"{name}/{file}")
    messages = [{"role": m["role"], "content": _text(m["content"])} for m in sample.messages]
    messages.append({"role": "assistant", "content": _escaped(sample.solution)})
    return {"messages": messages, "images": files}


def _text(content: Any) -> str:
    if isinstance(content, str):
        return _escaped(content)
    parts = (IMAGE_MARK if p["type"] == "image" else _escaped(p["text"]) for p in content)
    return "".join(parts)


def _escaped(text: str) -> str:
    """A text that says "<image>" itself would count as one more image."""
    return text.replace(IMAGE_MARK, "< image >")


def _write(path: Path, value: Any) -> None:
    aside = path.with_suffix(".writing")
    aside.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)
