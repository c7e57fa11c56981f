"""The records of an evaluation on disk, so that a killed run resumes where it stopped.

A journal has one JSON line per record, appended and flushed batch by batch. Its first line holds
the settings that the records depend on. A line that a kill cut off is dropped, with all lines after
it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from virft_fast.batch import Json, Row
from virft_fast.json_files import json_object, read_object
from virft_fast.metrics import null_for_nan

Record = Row
# Keys that a record must have to be reused, by stage.
_NEEDED = {
    "answer": ("prompt", "completion", "solution", "rewards"),
    "presence": ("image_id", "completion"),
    "mask": ("sam",),
}


def companion(output: Path, ending: str) -> Path:
    """The path of a file that accompanies the records X.jsonl: X plus the ending."""
    return output.with_name(output.name.removesuffix(".jsonl") + ending)


class Journal:
    """Records by stage, such as "answer"; an existing file is read first.

    Args:
        path: the file, created with the first record.
        settings: what the records depend on, as JSON values.
        overwrite: delete an existing file, whatever it is.
    Raises:
        ValueError: the file holds records made under other settings, or isn't a journal.
    """

    def __init__(self, path: Path, settings: Row, *, overwrite: bool = False) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.records: dict[str, list[Record]] = {}
        if overwrite:
            path.unlink(missing_ok=True)
        if path.exists():
            self._read()

    def _read(self) -> None:
        whole = 0
        entries: list[Row] = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            entry = _parse(line)
            if entry is None or (entries and "stage" not in entry):
                break
            whole += len(line)
            entries.append(entry)
        torn = b'{"settings": '.startswith(self.path.read_bytes()[:13])  # cut off in the first line
        if entries or not torn:
            saved = entries[0].get("settings") if entries else None
            check_settings(self.path, "was interrupted", saved, self.settings)
        with self.path.open("r+b") as file:
            file.truncate(whole)
        for entry in entries[1:]:
            self.records.setdefault(entry["stage"], []).append(entry["record"])

    def add(self, stage: str, records: Iterable[Record]) -> None:
        """Append records; once this returns, killing the process loses none of them."""
        lines = [{"stage": stage, "record": null_for_nan(record)} for record in records]
        if not lines:
            return
        with self.path.open("a", encoding="utf-8") as file:
            if not file.tell():
                file.write(json.dumps({"settings": self.settings}) + "\n")
            file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        self.records.setdefault(stage, []).extend(line["record"] for line in lines)

    def remove(self) -> None:
        """Delete the file, once all its records are in the result."""
        self.path.unlink(missing_ok=True)


def _parse(line: bytes) -> Row | None:
    entry = json_object(line) if line.endswith(b"\n") else None
    if entry is None or "settings" in entry:
        return entry
    return entry if isinstance(entry.get("stage"), str) and is_record(entry.get("record")) else None


def is_record(value: Json, needed: Iterable[str] = ()) -> bool:
    """Whether a value has a row's index and the needed keys; people edit these files."""
    return isinstance(value, dict) and type(value.get("index")) is int and set(needed) <= set(value)


def check_settings(path: Path, state: str, saved: Json, current: Row) -> None:
    """Compare the settings of an earlier run with those of this one.

    Args:
        state: how the earlier run ended, for the message.
    Raises:
        ValueError: they differ; names the settings and their values.
    """
    saved = saved if isinstance(saved, dict) else {}
    differing = [key for key in (*current, *saved) if saved.get(key) != current.get(key)]
    if differing:
        changed = ", ".join(
            f"{key} {saved.get(key)!r:.60} there and {current.get(key)!r:.60} here"
            for key in dict.fromkeys(differing)
        )
        raise ValueError(
            f"{path} holds a run that {state}, made with other settings: {changed}; pass the same "
            "ones, --overwrite to start over, or another --output"
        )


class RecordStore:
    """All records of one evaluation: those of a finished run, and those of the journal.

    Args:
        output: X.jsonl. The journal is X.journal; X.summary.json shows that a run has finished.
        settings: see `Journal`.
        overwrite: ignore and replace earlier records.
    Raises:
        ValueError: earlier records were made under other settings, or a file isn't a journal.
    """

    def __init__(self, output: Path, settings: Row, *, overwrite: bool) -> None:
        self.journal = Journal(companion(output, ".journal"), settings, overwrite=overwrite)
        self._finished = {} if overwrite else _read_finished(output, self.journal)

    def records(self, stage: str) -> list[Record]:
        """The usable records of a stage, one per row."""
        records = [*self._finished.get(stage, []), *self.journal.records.get(stage, [])]
        return list({r["index"]: r for r in records if is_record(r, _NEEDED[stage])}.values())

    def keep_unused(self, used: Iterable[Record]) -> bool:
        """Keep answers and masks that this run didn't use, for example because of a lower
        --max_samples, in the journal for the next run; returns whether there are any."""
        indices = {record["index"] for record in used}
        unused = 0
        for stage in ("answer", "mask"):
            journaled = {record["index"] for record in self.journal.records.get(stage, [])}
            rest = [record for record in self.records(stage) if record["index"] not in indices]
            self.journal.add(stage, [r for r in rest if r["index"] not in journaled])
            unused += len(rest)
        return unused > 0


def _read_finished(output: Path, journal: Journal) -> Mapping[str, list[Record]]:
    """The records of a finished evaluation by stage; none if they can't be read.

    Raises:
        ValueError: they were made under other settings, and there is no journal to show that
            --overwrite has since restarted the evaluation.
    """
    path = companion(output, ".summary.json")
    settings = (read_object(path) or {}).get("settings")
    if settings is None:
        return {}
    if not journal.records:
        check_settings(path, "is done", settings, journal.settings)
    elif settings != journal.settings:
        return {}
    records = _read_lines(output)
    masks = [record["mask"] for record in records if is_record(record.get("mask"))]
    presence = _read_lines(companion(output, ".presence.jsonl"))
    return {"answer": records, "mask": masks, "presence": presence}


def _read_lines(path: Path) -> list[Record]:
    """The records of a JSONL file; none at all if one line can't be read."""
    try:
        values = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError):
        return []
    return [value for value in values if is_record(value)]
