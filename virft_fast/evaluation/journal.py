"""What an evaluation has so far, on disk: so that a killed one goes on where it was.

One JSON line a record, appended and flushed batch by batch; the first line says under which
settings. A line that was torn by a kill is dropped, and all after it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from virft_fast.metrics import null_for_nan

Record = dict[str, Any]


def beside(output: Path, ending: str) -> Path:
    """A file that belongs to the records in X.jsonl: X and the ending."""
    return output.with_name(output.name.removesuffix(".jsonl") + ending)


class Journal:
    """Records by stage, e.g. "answer", read back when the file is there already.

    Args:
        path: of the file, made when the first record is added.
        settings: what the records depend on, in JSON's types.
        overwrite: start again whatever is there.
    Raises:
        ValueError: the file holds records made under other settings, or is no journal.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.records: dict[str, list[Record]] = {}
        if overwrite:
            path.unlink(missing_ok=True)
        if path.exists():
            self._read()

    def _read(self) -> None:
        whole, lines = 0, []
        for line in self.path.read_bytes().splitlines(keepends=True):
            entry = _parse(line)
            if entry is None or (lines and "stage" not in entry):
                break
            whole += len(line)
            lines.append(entry)
        torn = b'{"settings": '.startswith(self.path.read_bytes()[:13])  # in its first line
        if lines or not torn:
            there = lines[0].get("settings") if lines else None
            check_settings(self.path, "was interrupted", there, self.settings)
        with self.path.open("r+b") as file:
            file.truncate(whole)
        for entry in lines[1:]:
            self.records.setdefault(entry["stage"], []).append(entry["record"])

    def add(self, stage: str, records: Iterable[Record]) -> None:
        """Append; after the return a kill of the process loses nothing of it."""
        lines = [{"stage": stage, "record": null_for_nan(record)} for record in records]
        if not lines:
            return
        with self.path.open("a", encoding="utf-8") as file:
            if not file.tell():
                file.write(json.dumps({"settings": self.settings}) + "\n")
            file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        self.records.setdefault(stage, []).extend(line["record"] for line in lines)

    def remove(self) -> None:
        """When all of it is where it belongs."""
        self.path.unlink(missing_ok=True)


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict):
        return None
    known = "settings" in entry or (isinstance(entry.get("stage"), str) and "record" in entry)
    return entry if known and ("settings" in entry or is_record(entry["record"])) else None


def is_record(value: Any, needed: Iterable[str] = ()) -> bool:
    """Whether it is about a row, and has what is needed; files can be edited."""
    return isinstance(value, dict) and type(value.get("index")) is int and set(needed) <= set(value)


def check_settings(path: Path, state: str, there: Any, here: Mapping[str, Any]) -> None:
    """Raise ValueError, which names what differs, if an evaluation made under settings `there` is
    not one under `here`.

    Args:
        state: what became of it.
    """
    there = there if isinstance(there, dict) else {}
    differing = [key for key in (*here, *there) if there.get(key) != here.get(key)]
    if differing:
        changed = ", ".join(
            f"{key} {there.get(key)!r:.60} there and {here.get(key)!r:.60} here"
            for key in dict.fromkeys(differing)
        )
        raise ValueError(
            f"{path} holds a run that {state}, made under other settings: {changed}; go on "
            "under the same ones, pass --overwrite to start again, or another --output"
        )
