"""Rows of a data set and the samples made of them.

Two steps, each of which can be used alone: `load_rows` finds the data set, `SampleDataset` makes a
`Sample` of a row or says why it can't (`BadRow`). Nothing that comes out of a data set is
evaluated, unpickled or run.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from virft_fast.batch import Sample
from virft_fast.data.streaming import ParquetRows
from virft_fast.tasks.answers import answer_text
from virft_fast.tasks.prompts import grounding_format

if TYPE_CHECKING:
    import datasets

IMAGE_COLUMNS = ("image", "images", "image_path")
PROBLEM_COLUMNS = ("problem", "prompt", "conversations")
ANSWER_COLUMNS = ("chosen", "rejected", "completion")  # texts or chats, too
IMAGE_PLACE = "<image>"
ACCEPTED = (
    "a demo ({demos}), a folder written by save_to_disk, a .json, .jsonl or .parquet file, a "
    "folder of .parquet files, or a hub id such as laolao77/ViRFT_COCO_base65"
)
# Left out on purpose: formats that PIL hands to another program (EPS runs Ghostscript).
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
if importlib.util.find_spec("PIL.AvifImagePlugin"):  # since Pillow 11.3
    IMAGE_FORMATS += ("AVIF",)
IMAGE_TAG = re.compile(r"<img>(.*?)</img>", re.DOTALL)
BOX_ANSWER = re.compile(r"\(\s*[\d.]+\s*,\s*[\d.]+\s*\)\s*,\s*\(\s*[\d.]+\s*,\s*[\d.]+\s*\)")
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
NOT_DOWNLOADED = "nothing is downloaded; fetch it and give its path"
USER_NAMES, ASSISTANT_NAMES = ("user", "human"), ("assistant", "gpt")
SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
SHARD_NAME = re.compile(r"(?P<split>\w+)-(?P<number>\d+)-of-(?P<total>\d+)")

Row = Mapping[str, Any]


# --- Loading ---------------------------------------------------------------------------------


def load_rows(
    dataset_name: str,
    split: str,
    *,
    dataset_config: str | None = None,
    image_folder: Path | None = None,
    streaming: bool = False,
) -> datasets.Dataset | ParquetRows:
    """Load one split of a data set.

    Args:
        dataset_name: a demo's name, a `save_to_disk` folder, a .json/.jsonl/.parquet file, a folder
            of parquet files, or a hub id. A set without splits is its own "train". Where a folder's
            README.md has configurations, as on the hub, they say which files are which split.
        split: to load.
        dataset_config: configuration name, for a hub id or such a folder.
        image_folder: where relative image paths of a JSON file start; None: at the file's folder.
        streaming: read rows out of the parquet files when they are asked for, over the network too,
            instead of making a copy of the whole set first.
    Returns:
        The rows, images still encoded. Relative image paths of a JSON file are made absolute.
    Raises:
        FileNotFoundError: there is no such data set.
        ValueError: it can't be read, or lacks the split, the configuration, a needed column or any
            row, or is to be streamed and not in parquet.
    """
    rows: datasets.Dataset | ParquetRows
    if streaming:
        rows = _stream_rows(dataset_name, split, dataset_config)
    else:
        rows = _find_rows(dataset_name, split, dataset_config, image_folder)
    if not len(rows):
        raise ValueError(f"--dataset_name {dataset_name}: split {split!r} has no rows")
    check_columns(rows.column_names, f"--dataset_name {dataset_name}")
    return rows


def check_columns(names: Sequence[str], where: str) -> None:
    """Raise ValueError if a data set with these columns can't be made into samples."""
    if not set(names) & set(PROBLEM_COLUMNS) and not {"chosen", "rejected"} <= set(names):
        missing = f"one of the columns {', '.join(PROBLEM_COLUMNS)}"
    elif not set(names) & {"solution", "conversations", "chosen"}:
        missing = (
            "the column solution (or conversations that end with the assistant's answer, or the "
            "preferred answer in a column chosen)"
        )
    else:
        return
    raise ValueError(
        f"{where}: expected {missing}, and maybe one of {', '.join(IMAGE_COLUMNS)}; "
        f"got the columns {', '.join(names) or 'none'}"
    )


def _find_rows(
    name: str, split: str, config: str | None, image_folder: Path | None = None
) -> datasets.Dataset:
    from virft_fast.data.demo import DEMO_DATASETS, demo_dataset

    if not name.strip():
        raise ValueError(f"--dataset_name: {_accepted()}, got an empty name")
    if name in DEMO_DATASETS:
        _without_config(config, name)
        return _pick_split(demo_dataset(name), split, name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path, split, config)
    if path.is_file():
        _without_config(config, path)
        return _load_file(path, split, image_folder)
    if _looks_like_path(name):
        raise FileNotFoundError(
            f"--dataset_name {name}: no such file, folder or demo; {_accepted()}"
        )
    return _load_hub(name, split, config)


def _without_config(config: str | None, name: str | Path) -> None:
    if config is not None:
        raise ValueError(
            f"--dataset_config {config}: expected a hub id, or a folder of parquet files whose "
            f"README.md has configs, got --dataset_name {name}; leave it out"
        )


def _accepted() -> str:
    from virft_fast.data.demo import DEMO_DATASETS

    return "expected " + ACCEPTED.format(demos=", ".join(DEMO_DATASETS))


def _looks_like_path(name: str) -> bool:
    """Whether `name` can't be a hub id, "owner/name".

    A name alone never goes to `datasets`: to it "json" or "pandas" mean the files of this folder,
    pickles included. It would also make a mistyped demo wait for the network.
    """
    if name.endswith((".json", ".jsonl", ".parquet")):
        return True
    return not re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", name)


def _pick_split(data: Any, split: str, name: str | Path) -> datasets.Dataset:
    """The split of a DatasetDict, or a Dataset itself, which is its own "train"."""
    import datasets

    splits = data if isinstance(data, datasets.DatasetDict) else {"train": data}
    _check_split(split, list(splits), name)
    return splits[split]


def _check_split(split: str, splits: Sequence[str], name: str | Path) -> None:
    if split not in splits:
        raise ValueError(
            f"--dataset_name {name}: no split {split!r}, it has {', '.join(splits) or 'none'}; "
            f"choose with --split, in training --dataset_train_split and --dataset_test_split"
        )


def _load_folder(path: Path, split: str, config: str | None) -> datasets.Dataset:
    import datasets

    if _saved_to_disk(path):
        _without_config(config, path)
        try:
            data = datasets.load_from_disk(str(path))
        except Exception as error:  # whatever a damaged folder makes arrow or json raise
            raise ValueError(f"--dataset_name {path}: can't be read: {_line(error)}") from error
        return _pick_split(data, split, path)
    return _load_parquet(_folder_files(path, split, config), path)


def _load_file(path: Path, split: str, image_folder: Path | None = None) -> datasets.Dataset:
    if path.suffix == ".parquet":
        return _load_parquet(_files_of(split, [path], path), path)
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"--dataset_name {path}: unknown kind of file; {_accepted()}")
    _check_split(split, ["train"], path)
    folder = path.parent if image_folder is None else image_folder
    try:
        return _json_rows(_read_json(path), folder.resolve())
    except RecursionError:
        raise ValueError(
            f"--dataset_name {path}: expected rows, got values nested too deep"
        ) from None


def _load_parquet(files: Sequence[str], where: Path) -> datasets.Dataset:
    import datasets

    try:
        import pyarrow.parquet as pq

        if not any(pq.read_metadata(file).num_rows for file in files):
            names = pq.read_schema(files[0]).names
            return datasets.Dataset.from_dict({name: [] for name in names})
        return datasets.Dataset.from_parquet(list(files))
    except Exception as error:  # `datasets` wraps arrow's errors in its own, none of them public
        raise ValueError(
            f"--dataset_name {where}: can't be read: {_line(error.__cause__ or error)}"
        ) from error


def _folder_files(folder: Path, split: str, config: str | None) -> list[str]:
    """A split's parquet files: as README.md says where it has configurations, else by name."""
    if not _card_configs(folder):
        _without_config(config, folder)
        return _files_of(split, _parquet_files(folder), folder)
    import datasets

    try:
        builder = datasets.load_dataset_builder(str(folder), config)
    except Exception as error:  # a missing configuration, file or key: they share no base
        files = _files_on_card(folder, split, config)
        if files:  # another split has none: it was not downloaded
            _check_shards(files, folder)
            return files
        pattern = re.search(r"[*?\[]", str(folder.resolve()))
        hint = f"; rename the folder, its {pattern[0]} is taken for a pattern" if pattern else ""
        names = ", ".join(str(entry.get("config_name")) for entry in _card_configs(folder))
        raise ValueError(
            f"--dataset_name {folder}: README.md's configs can't be followed for {split!r}; "
            f"expected a --dataset_config of {names}, and its files there; got {_line(error)}{hint}"
        ) from error
    files = _builder_files(builder, split, str(folder), "README.md to name .parquet files")
    elsewhere = next((file for file in files if not Path(file).is_file()), None)
    if elsewhere:  # an address: nothing of a folder is downloaded
        raise ValueError(f"--dataset_name {folder}: README.md: no file {elsewhere}; fetch it")
    _check_shards(files, folder)
    return files


def _card_configs(folder: Path) -> list[dict[str, Any]]:
    """What the head of README.md has under `configs`."""
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    if not card.is_file() or not card.read_bytes().startswith(b"---"):
        return []
    try:
        configs = (metadata_load(card) or {}).get("configs") or []
    except Exception as error:  # YAML's errors and those of the text's encoding
        raise ValueError(f"{card}: its head can't be read: {_line(error)}") from error
    entries = configs if isinstance(configs, list) else [configs]
    return [entry if isinstance(entry, dict) else {} for entry in entries]


def _files_on_card(folder: Path, split: str, config: str | None) -> list[str]:
    """The split's files that are there, where the card lists splits with their paths."""
    configs = _card_configs(folder)
    chosen = [c for c in configs if config in (None, c.get("config_name"))]
    if len(chosen) != 1 or not isinstance(chosen[0].get("data_files"), list):
        return []
    listed = [entry for entry in chosen[0]["data_files"] if isinstance(entry, dict)]
    paths = [entry.get("path") for entry in listed if entry.get("split") == split]
    patterns = [p for path in paths for p in (path if isinstance(path, list) else [path])]
    found = [file for p in patterns if isinstance(p, str) and p for file in folder.glob(p)]
    return [str(file) for file in sorted(found) if file.suffix == ".parquet" and file.is_file()]


def _builder_files(builder: Any, split: str, name: str, expected: str, hint: str = "") -> list[str]:
    splits = {str(key): list(files) for key, files in (builder.config.data_files or {}).items()}
    kinds = {file.rsplit(".", 1)[-1] for files in splits.values() for file in files}
    if kinds != {"parquet"}:
        found = ", ".join(sorted(kinds)) or "none"
        raise ValueError(f"--dataset_name {name}: expected {expected}, got {found}{hint}")
    _check_split(split, list(splits), name)
    return splits[split]


def _parquet_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*.parquet") if file.is_file())
    if not files:
        raise FileNotFoundError(
            f"--dataset_name {folder}: the folder holds neither dataset_dict.json or state.json "
            f"(written by save_to_disk) nor .parquet files; {_accepted()}"
        )
    return files


def _files_of(split: str, files: Sequence[Path], where: Path) -> list[str]:
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault(_parquet_split(file, where), []).append(str(file))
    _check_split(split, list(splits), where)
    _check_shards(splits[split], where)
    return splits[split]


def _check_shards(files: Sequence[str], where: Path) -> None:
    """Raise ValueError if a file of train-00000-of-00002, train-00001-of-00002 is not there."""
    shards = [found for file in files if (found := SHARD_NAME.fullmatch(Path(file).stem))]
    for total in {found["total"] for found in shards}:
        there = {int(found["number"]) for found in shards if found["total"] == total}
        missing = sorted(set(range(int(total))) - there)
        if missing:
            raise ValueError(
                f"--dataset_name {where}: expected {int(total)} files of the split, number "
                f"{', '.join(map(str, missing[:5]))} is not there"
            )


def _parquet_split(file: Path, where: Path) -> str:
    """train-00000-of-00002.parquet, train.parquet and train/0000.parquet are of "train", as is a
    file that names no split."""
    shard = SHARD_NAME.fullmatch(file.stem)
    if shard:
        return shard["split"]
    first = re.split(r"[-_.]", file.stem)[0]
    if first in SPLIT_NAMES:
        return first
    return file.parent.name if file.parent != where and file.parent.name in SPLIT_NAMES else "train"


def _load_hub(name: str, split: str, config: str | None) -> datasets.Dataset:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # network, hub, configuration and builder errors share no base
        unknown = re.match(r"Unknown split .* Should be one of (\[.*\])", str(error))
        if unknown:
            _check_split(split, re.findall(r"'([^']*)'", unknown[1]), name)
        raise _hub_error(name, error) from error


def _hub_error(name: str, error: Exception) -> Exception:
    kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
    return kind(
        f"--dataset_name {name}: no such file, folder or demo, and the hub says: "
        f"{_line(error)}; {_accepted()}"
    )


def _stream_rows(name: str, split: str, config: str | None) -> ParquetRows:
    """The rows of a parquet file, a folder of them, or a hub set that is stored in parquet."""
    path = Path(name).expanduser()
    open_file = None
    if path.is_file() and path.suffix == ".parquet":
        _without_config(config, path)
        files = _files_of(split, [path], path)
    elif path.is_dir() and not _saved_to_disk(path):
        files = _folder_files(path, split, config)
    elif path.exists() or _looks_like_path(name):
        raise ValueError(
            f"--dataset_name {name}: expected a parquet file, a folder of them or a hub id, for "
            f"those are what --dataset_streaming can read in parts; leave it out (a folder "
            f"written by save_to_disk is not read whole anyway)"
        )
    else:
        files, open_file = _hub_parquet(name, split, config), _open_remote
    try:
        return ParquetRows(files, open_file=open_file)
    except Exception as error:  # files, network and damaged metadata share no base
        raise ValueError(f"--dataset_name {name}: can't be read: {_line(error)}") from error


def _saved_to_disk(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _hub_parquet(name: str, split: str, config: str | None) -> list[str]:
    """Addresses of a split's parquet files, as the hub set's own settings or their names say."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(name, config)
    except Exception as error:  # as in _load_hub
        raise _hub_error(name, error) from error
    expected = "a hub set stored in .parquet files, the only ones that --dataset_streaming reads"
    return _builder_files(builder, split, name, expected, "; leave it out")


def _open_remote(address: str) -> Any:
    import fsspec

    system, path = fsspec.core.url_to_fs(address)
    return system.open(path, "rb")


def _line(error: BaseException, most: int = 300) -> str:
    """What went wrong, in one line that is the same every time."""
    text = re.sub(r"<\S+ object at 0x\w+>", "it", f"{type(error).__name__}: {error}")
    return " ".join(text.split())[:most]


# --- JSON ------------------------------------------------------------------------------------


def _read_json(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON list or of JSON lines, told apart by content."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--dataset_name {path}: expected UTF-8 text: {error}") from error
    records = _parse_json(text, path)
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(
                f"--dataset_name {path}: expected every record to be an object such as "
                f'{{"image_path", "problem", "solution"}}, got {record!r:.80} at {number}'
            )
    return records


def _parse_json(text: str, path: Path) -> list[Any]:
    try:
        value = json.loads(text)
        return value if isinstance(value, list) else [value]
    except (json.JSONDecodeError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise ValueError(f"--dataset_name {path}: not valid JSON: {error}") from error
    records = []
    # Not splitlines(): that also splits at characters which may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            records += [json.loads(line)] if line.strip() else []
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"--dataset_name {path}: line {number} is not valid JSON: {error}"
            ) from error
    return records


def _json_rows(records: list[dict[str, Any]], folder: Path) -> datasets.Dataset:
    import datasets

    names = dict.fromkeys(key for record in records for key in record)
    columns = {}
    for name in names:
        values = [record.get(name) for record in records]
        if name in IMAGE_COLUMNS:
            values = [_absolute_paths(value, folder) for value in values]
        elif name == "conversations":
            values = [_absolute_tags(value, folder) for value in values]
        if name in (*PROBLEM_COLUMNS, *ANSWER_COLUMNS):
            values = _one_kind_of_chat([_utf8(value) for value in values], name)
        columns[name] = _column(values)
    return datasets.Dataset.from_dict(columns)


def _absolute_paths(value: Any, folder: Path) -> Any:
    """One path or a list of them as a list of absolute ones: rows of both kinds fit one column."""
    if value is None:
        return None
    paths = value if isinstance(value, list) else [value]
    return [placed(folder, item) if isinstance(item, str) and item else "" for item in paths]


def placed(folder: Path, name: str) -> str:
    """A path that starts at `folder`; an address stays as it is, to be refused as one."""
    path = str(folder / name)
    return name if ADDRESS.match(name) and not os.path.exists(path) else path


def is_address(name: str) -> bool:
    """Whether it is no path but such as https://... or data:..."""
    return bool(ADDRESS.match(name)) and not os.path.exists(name)


def _absolute_tags(turns: Any, folder: Path) -> Any:
    """Conversations with the path in <img>PATH</img> made absolute."""
    if not isinstance(turns, list):
        return None
    return [
        {
            **turn,
            "value": IMAGE_TAG.sub(
                lambda tag: f"<img>{placed(folder, tag[1].strip())}</img>",
                str(turn.get("value", "")),
            ),
        }
        for turn in turns
        if isinstance(turn, dict)
    ]


def _utf8(value: Any) -> Any:
    """Without lone surrogates such as "\ud800", which JSON may hold and arrow may not."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_utf8(item) for item in value]
    if isinstance(value, dict):
        return {key: _utf8(item) for key, item in value.items()}
    return value


def _one_kind_of_chat(values: list[Any], name: str) -> list[Any]:
    """Texts and chats of all kinds so that they fit one column: where some are chats, all are."""
    if name == "conversations" or not any(isinstance(value, list) for value in values):
        return values
    role = "assistant" if name in ANSWER_COLUMNS else "user"
    return [None if value is None else _plain_chat(value, role) for value in values]


def _plain_chat(value: Any, role: str) -> list[dict[str, Any]]:
    """A chat whose contents are all lists of parts: chats of every kind fit one column. What is no
    chat becomes a turn of a role that none has, so that its row alone is a bad one."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    turns = value if isinstance(value, list) and value else [value]
    return [_plain_turn(turn) for turn in turns]


def _plain_turn(turn: Any) -> dict[str, Any]:
    content = turn.get("content") if isinstance(turn, dict) else None
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
    if not parts or not isinstance(turn.get("role"), str):
        return {"role": "?", "content": [{"type": "text", "text": f"{turn!r:.80}"}]}
    texts = [{k: v for k, v in part.items() if isinstance(v, str)} for part in content]
    return {"role": turn["role"], "content": texts}


def _column(values: list[Any]) -> Any:
    """An arrow array; where the kinds of value differ between rows, of texts (JSON for the others).

    One odd row must not make the whole file unreadable.
    """
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        texts = (v if v is None or isinstance(v, str) else json.dumps(v) for v in values)
        # A lone surrogate, "\ud800", is legal in JSON and in no UTF-8 text.
        return pa.array([t if t is None else t.encode("utf-8", "replace").decode() for t in texts])


# --- Samples ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class BadRow:
    """A row that can't be used, and why."""

    index: int
    reason: str


class _Unusable(Exception):
    """Why the row at hand is a bad one; never leaves this file."""


class SampleDataset:
    """The rows of a data set as samples, made on access.

    Args:
        rows: what `load_rows` returns, or any sequence of mappings.
        check_solution: solution (and the row's `extent`, where it has one) -> what is wrong with
            it, or None.
        compat_prompt: LISA's conversations ask for a box as the original does, to the letter.
    Raises:
        ValueError: no column holds the problem, or none the solution; or `compat_prompt` and no
            conversations.
    """

    def __init__(
        self,
        rows: datasets.Dataset | ParquetRows | Sequence[Row],
        *,
        check_solution: Callable[..., str | None] | None = None,
        compat_prompt: bool = False,
    ) -> None:
        names = _column_names(rows)
        check_columns(names, "data set")
        # In arrow format images (and sound, and video) come as they are stored: nothing is decoded
        # that is not asked for, and a corrupt image raises where it can be caught.
        self._rows = rows.with_format("arrow") if hasattr(rows, "with_format") else rows
        self._problem_column = next((name for name in PROBLEM_COLUMNS if name in names), "prompt")
        if {"chosen", "prompt"} <= set(names):  # a preference set in TRL's form
            self._problem_column = "prompt"
        self._image_columns = _image_columns(rows)
        self._json_columns = _json_columns(rows)
        self._check_solution = check_solution
        if compat_prompt and self._problem_column != "conversations":
            raise ValueError(
                f"--compat_prompt: expected LISA's conversations, got the column "
                f"{self._problem_column}, which is asked as it stands; leave it out (`build "
                "grounding` has a flag of that name)"
            )
        self._compat_prompt = compat_prompt

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, index: int) -> Sample | BadRow:
        """Row `index` as a sample, or why it can't be one; no content of a row raises."""
        index = int(index)
        try:
            try:
                row = self._row(index)
            # What is stored needs be neither text in UTF-8 nor a time that Python can hold.
            except Exception as error:
                raise _Unusable(f"the row can't be read: {_line(error)}") from error
            return self._sample(index, row)
        except _Unusable as error:
            return BadRow(index, str(error))

    def _row(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        if not hasattr(row, "to_pylist"):
            return dict(row)
        plain = row.to_pylist()[0]
        for name in self._json_columns:
            plain[name] = None if plain[name] is None else json.loads(plain[name])
        return plain

    def _sample(self, index: int, row: dict[str, Any]) -> Sample:
        stored = next((row[c] for c in IMAGE_COLUMNS if row.get(c) is not None), None)
        sources = _as_list(stored)
        value, solution = row.get(self._problem_column), row.get("solution")
        if "chosen" in row and self._problem_column == "prompt":
            value, row = _read_pair(value, row)
        if self._problem_column == "conversations":
            problem, paths, answer = _read_conversation(value, compat=self._compat_prompt)
            sources = paths or sources
            solution = answer if solution is None else solution
            messages = _user_turn(problem, len(sources))
        elif isinstance(value, list):
            messages = _read_chat(value, len(sources))
            problem = _last_text(messages)
        else:
            problem = _non_empty(value, self._problem_column)
            messages = _user_turn(problem, len(sources))
        if "chosen" in row:
            _check_places(messages, len(sources))
        columns = {k: v for k, v in row.items() if k not in self._image_columns}
        if "chosen" in row:  # a preference pair, of texts or chats
            columns |= {name: spoken_text(row.get(name)) for name in ("chosen", "rejected")}
            if columns["chosen"] is None:
                raise _Unusable("chosen: expected an answer, a text or a chat that ends with one")
            usable = isinstance(solution, str) and solution.strip()
            solution = solution if usable else columns["chosen"]
        solution = self._checked(solution, row.get("extent"))
        return Sample(
            index=index,
            messages=tuple(messages),
            images=tuple(_open_image(source) for source in sources),
            solution=solution,
            columns=columns | {"problem": problem, "solution": solution},
        )

    def _checked(self, solution: Any, extent: Any) -> str:
        solution = _non_empty(solution, "solution")
        space = () if extent is None else (extent,)
        wrong = self._check_solution(solution, *space) if self._check_solution else None
        if wrong:
            raise _Unusable(f"solution: {wrong}")
        return solution


def first_solutions(samples: SampleDataset, most: int = 50) -> list[str]:
    """Of the usable ones among the first rows, to read the task off them.

    Raises:
        ValueError: none is; says what is wrong with the first.
    """
    loaded = [samples.get(index) for index in range(min(len(samples), most))]
    found = [sample.solution for sample in loaded if isinstance(sample, Sample)]
    if loaded and not found:
        raise ValueError(
            f"expected a row that can be used among the first {len(loaded)}, got none; row 0: "
            f"{loaded[0].reason}"
        )
    return found


def _column_names(rows: Any) -> list[str]:
    if hasattr(rows, "column_names"):
        return list(rows.column_names)
    return list(dict.fromkeys(name for row in rows for name in row))


def _image_columns(rows: Any) -> set[str]:
    """Columns that hold images, whether or not they go into the prompt (a mask does not)."""
    features = getattr(rows, "features", None) or {}
    return {*IMAGE_COLUMNS, *(name for name, feature in features.items() if _has_image(feature))}


def _json_columns(rows: Any) -> list[str]:
    """Columns that `datasets` stores as JSON texts because the kinds of value differ in them."""
    features = getattr(rows, "features", None) or {}
    return [name for name, feature in features.items() if type(feature).__name__ == "Json"]


def _has_image(feature: Any) -> bool:
    import datasets

    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return isinstance(feature, datasets.Image) or (inner is not None and _has_image(inner))


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _non_empty(value: Any, name: str) -> str:
    if value is None:
        raise _Unusable(f"{name}: missing")
    if not isinstance(value, str):
        raise _Unusable(f"{name}: expected text, got {type(value).__name__} {value!r:.80}")
    if not value.strip():
        raise _Unusable(f"{name}: empty")
    return value


def spoken_text(value: Any) -> str | None:
    """An answer as text: itself, or the last turn of a chat, as TRL writes answers; else None."""
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        said = value[-1].get("role") in ("assistant", None)
        value = value[-1].get("content") if said else None
    if isinstance(value, list):
        parts = [part for part in value if isinstance(part, Mapping) and part.get("type") == "text"]
        value = "".join(str(part.get("text") or "") for part in parts)
    return value if isinstance(value, str) and value.strip() else None


def taught_answer(sample: Sample) -> str:
    """What a model is to learn to say: the column `completion` where the row has one, else its
    solution."""
    return spoken_text(sample.columns.get("completion")) or sample.solution


def _user_turn(problem: str, num_images: int) -> list[dict[str, Any]]:
    """The images where the text has a place for each, else before it."""
    return _placed_images([{"role": "user", "content": problem}], num_images)


def _placed_images(messages: list[dict[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """Turns without image parts with the images where the users' texts have a place for each, else
    before the first of them."""
    asked = [m for m in messages if m["role"] == "user"]
    for turn in asked:
        if isinstance(turn["content"], str):
            turn["content"] = [{"type": "text", "text": turn["content"]}]
    texts = [part["text"] for turn in asked for part in turn["content"]]
    if num_images and sum(text.count(IMAGE_PLACE) for text in texts) == num_images:
        for turn in asked:
            turn["content"] = [new for part in turn["content"] for new in _split_at_images(part)]
    elif num_images:
        images = [{"type": "image"} for _ in range(num_images)]
        asked[0]["content"] = [*images, *asked[0]["content"]]
    return messages


def _split_at_images(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for number, text in enumerate(part["text"].split(IMAGE_PLACE)):
        if number:
            yield {"type": "image"}
        if text:
            yield {"type": "text", "text": text}


def _check_places(messages: Sequence[Row], num_images: int) -> None:
    """No place for an image is left in a user's text."""
    contents = [m["content"] for m in messages if m["role"] == "user"]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    texts = [part.get("text", "") for part in parts] + [c for c in contents if isinstance(c, str)]
    left = sum(text.count(IMAGE_PLACE) for text in texts)
    if left:
        raise _Unusable(
            f"prompt: expected as many {IMAGE_PLACE} as images or none, got {left} and "
            f"{num_images} images"
        )


def _read_pair(prompt: Any, row: Row) -> tuple[Any, dict[str, Any]]:
    """The prompt and the row of a preference pair whose answers may be chats: turns before the
    last are the prompt's, or go behind it, where both answers have the same."""
    leads = []
    for name in ("chosen", "rejected"):
        chat = row.get(name)
        leads.append(list(chat[:-1]) if isinstance(chat, (list, tuple)) else [])
    lead, other = leads
    if list(map(_spoken, lead)) != list(map(_spoken, other)):
        raise _Unusable(
            f"chosen, rejected: expected the same turns before the last in both, got {len(lead)} "
            f"and {len(other)} that differ; make the earlier ones the prompt"
        )
    answers = {name: spoken_text(row.get(name)) for name in ("chosen", "rejected")}
    return (_joined(prompt, lead) if lead else prompt), {**row, **answers}


def _joined(prompt: Any, lead: list[Any]) -> list[Any]:
    """A prompt and the turns before the answers: one of them where it holds the other."""
    if not isinstance(prompt, (str, list, tuple, type(None))):
        raise _Unusable(f"prompt: expected a text or a chat, got {prompt!r:.80}")
    said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or ())
    if isinstance(prompt, str) and not prompt.strip():
        said = []
    one, two = list(map(_spoken, said)), list(map(_spoken, lead))
    if any(two[at : at + len(one)] == one for at in range(len(two) - len(one) + 1)):
        return lead
    if one[-len(two) :] == two:
        return said
    if two[0][0] == "system":
        raise _Unusable(
            f"prompt: expected the turns before the answers to go on from it, or to hold it, got "
            f"{prompt!r:.80} and then {lead!r:.80}"
        )
    return [*said, *lead]


def _spoken(turn: Any) -> tuple[Any, str]:
    """Role and text of a turn, however its content is written."""
    content = turn.get("content") if isinstance(turn, Mapping) else None
    if isinstance(content, list):
        parts = [p.get("text") or f"<{p.get('type')}>" for p in content if isinstance(p, Mapping)]
        content = "".join(str(part) for part in parts)
    return (turn.get("role") if isinstance(turn, Mapping) else None, str(content))


def _read_conversation(turns: Any, *, compat: bool) -> tuple[str, list[str], str | None]:
    """LISA's form: (the user's text, image paths in it, the assistant's answer in its tags).

    Where the answer is a box, the text ends with the form it is to have, as Visual-RFT has it end;
    other conversations, such as LLaVA's, stay as they are.
    """
    turns = [turn for turn in _as_list(turns) if isinstance(turn, Mapping)]
    places = [n for n, turn in enumerate(turns) if turn.get("from") in USER_NAMES]
    asked = turns[places[0]].get("value") if places else None
    later = turns[places[0] :] if places else []  # what was said before is no answer to it
    said = next((t.get("value") for t in later if t.get("from") in ASSISTANT_NAMES), None)
    asked = _non_empty(asked, "conversations: user's value")
    problem = _non_empty(IMAGE_TAG.sub("", asked).strip(), "conversations: user's text")
    paths = [path.strip() for path in IMAGE_TAG.findall(asked)]
    boxed = paths and isinstance(said, str) and BOX_ANSWER.fullmatch(answer_text(said))
    if boxed and "<answer>" not in problem:
        problem = f"{problem} {grounding_format(compat=compat)}"
    if isinstance(said, str) and said.strip() and "<answer>" not in said:
        said = f"<answer> {said.strip()} </answer>"
    return problem, paths, said


def _read_chat(turns: list[Any], num_images: int) -> list[dict[str, Any]]:
    """A prompt that is a chat already."""
    if not turns:
        raise _Unusable("prompt: empty")
    messages = [_read_turn(turn) for turn in turns]
    if messages[-1]["role"] != "user":
        raise _Unusable(f"prompt: expected the last turn to be the user's, got {turns[-1]!r:.80}")
    parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
    places = sum(part["type"] == "image" for part in parts)
    if places == 0 and num_images:
        messages = _placed_images(messages, num_images)
    elif places != num_images:
        raise _Unusable(f"prompt: expected {num_images} image parts, as images, got {places}")
    _non_empty(_last_text(messages), "prompt")
    return messages


def _read_turn(turn: Any) -> dict[str, Any]:
    role = turn.get("role") if isinstance(turn, Mapping) else None
    content = turn.get("content") if isinstance(turn, Mapping) else None
    if role not in ("system", "user", "assistant") or not isinstance(content, (str, list)):
        raise _Unusable(f"prompt: expected turns of role and content, got {turn!r:.80}")
    if isinstance(content, list):
        content = [_read_part(part) for part in content]
    return {"role": role, "content": content}


def _read_part(part: Any) -> dict[str, Any]:
    """A part without the nulls that arrow adds for keys of other parts."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return {"type": "image"}
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise _Unusable(f"prompt: expected image and text parts, got {part!r:.80}")


def _last_text(messages: Sequence[Row]) -> str:
    content = messages[-1]["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def _open_image(source: Any) -> Image.Image:
    """Decode a path, encoded bytes, {"bytes", "path"} or an image to RGB."""
    name = "bytes"
    if isinstance(source, Mapping):
        name = source.get("path") or name
        data = source.get("bytes")
        source = data if data is not None else source.get("path")
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source)
        if isinstance(source, (bytes, bytearray)):
            return _decode(io.BytesIO(source))
        if isinstance(source, (str, Path)) and str(source):
            name = f"{source!s:.200}"
            if is_address(str(source)):
                raise ValueError(NOT_DOWNLOADED)
            path = Path(source).expanduser()
            if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe is waited for
                raise ValueError("expected a file")
            return _decode(path)
    except Exception as error:  # PIL's decoders raise nearly anything on damaged input
        raise _Unusable(f"image {name}: {_line(error)}") from error
    raise _Unusable(f"image: expected a path, bytes or an image, got {source!r:.80}")


def _decode(file: Path | io.BytesIO) -> Image.Image:
    with Image.open(file, formats=IMAGE_FORMATS) as image:
        check_pixels(image)
        # As `datasets` does on decoding, so that boxes fit the image whoever opens it.
        return _to_rgb(ImageOps.exif_transpose(image))


def check_pixels(image: Image.Image) -> None:
    """Raise ValueError for an image too large to be decoded."""
    limit = Image.MAX_IMAGE_PIXELS
    # PIL itself only warns up to twice this limit.
    if limit is not None and image.width * image.height > limit:
        raise ValueError(f"{image.width}x{image.height} is more than {limit} pixels")


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB in memory; what is transparent becomes white."""
    if image.mode.startswith("I"):  # convert() would clip instead of scale
        values = np.asarray(image)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65_535:
            raise ValueError("expected an image of 8 or 16 bits a channel, got 32")
        if image.mode != "I" or values.max(initial=0) > 255:
            image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("expected an image of 8 or 16 bits a channel, got floating point numbers")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
