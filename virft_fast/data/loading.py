"""Rows of a data set, found by its name: demos, files, folders and hub sets.

`load_rows` finds the rows; `virft_fast.data.layouts` says what a row is, and `SampleDataset` makes
samples of rows. Nothing that comes out of a data set is evaluated, unpickled or run.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virft_fast.data.accounts import Built, listing
from virft_fast.data.images import one_line, placed
from virft_fast.data.layouts import (
    ANSWERS,
    IMAGE_COLUMNS,
    JSON_COLUMNS,
    LIST_COLUMNS,
    QUESTIONS,
    check_columns,
    read_list,
)
from virft_fast.data.samples import BadRow, SampleDataset, first_solutions, taught_answer
from virft_fast.data.streaming import ParquetRows
from virft_fast.data.texts import read_table, read_text

if TYPE_CHECKING:
    import datasets

__all__ = ["BadRow", "SampleDataset", "first_solutions", "load_rows", "taught_answer"]

logger = logging.getLogger(__name__)

ACCEPTED = (
    "a demo ({demos}), a folder written by save_to_disk, a .json, .jsonl, .csv, .tsv or .parquet "
    "file, a folder of .parquet files, or a hub id such as laolao77/ViRFT_COCO_base65"
)
OTHER_COLUMNS = ("rejected", "system", "completion", *LIST_COLUMNS)
FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
VALIDATION_NAMES = ("validation", "valid", "val", "dev")
# Word in a path -> the split it names.
SPLIT_WORDS = {name: name for name in ("train", "test", "eval", *VALIDATION_NAMES)}
SPLIT_WORDS |= {"training": "train", "testing": "test", "evaluation": "eval"}
SHARD_NAME = re.compile(r"(?P<split>\w+)-(?P<number>\d+)-of-(?P<total>\d+)")


# --- Loading ---------------------------------------------------------------------------------


def load_rows(
    dataset_name: str,
    split: str,
    *,
    dataset_config: str | None = None,
    image_folder: Path | None = None,
    streaming: bool = False,
    columns: Mapping[str, str] | None = None,
) -> datasets.Dataset | ParquetRows:
    """Load one split of a data set.

    Args:
        dataset_name: a demo's name, a `save_to_disk` folder, a .json, .jsonl, .csv, .tsv or
            .parquet file, a folder of parquet files, or a hub id. A set without splits is its own
            "train". Where a folder's README.md has configurations, as on the hub, they say which
            files are which split.
        split: to load.
        dataset_config: configuration name, for a hub id or such a folder.
        image_folder: where relative image paths of a JSON or CSV file start; None: at the file's
            folder.
        streaming: read rows out of the parquet files when they are asked for, over the network too,
            instead of making a copy of the whole set first.
        columns: our name of a column -> the data set's own.
    Returns:
        The rows, images still encoded. Relative image paths of JSON and CSV files are made
        absolute.
    Raises:
        FileNotFoundError: there is no such data set.
        ValueError: it can't be read, or lacks the split, the configuration, a needed column or any
            row, or is to be streamed and not in parquet.
    """
    load = _stream_rows if streaming else partial(_find_rows, image_folder=image_folder)
    rows: datasets.Dataset | ParquetRows = load(dataset_name, split, dataset_config)
    account = getattr(rows, "account", None)
    rows = _renamed(rows, columns or {}, f"--dataset_name {dataset_name}")
    rows.image_folder, rows.account = _folder_of(dataset_name, image_folder), account
    if not len(rows):
        raise ValueError(f"--dataset_name {dataset_name}: split {split!r} has no rows")
    check_columns(rows.column_names, f"--dataset_name {dataset_name}")
    return rows


def _renamed(rows: Any, columns: Mapping[str, str], where: str) -> Any:
    """The rows with these columns under our names, which replace others of these names, and without
    those that would be read in their place.

    Raises:
        ValueError: there is no such column, or none of ours of such a name.
    """
    ours = {*IMAGE_COLUMNS, *QUESTIONS, *ANSWERS, *OTHER_COLUMNS} - {"conversation"}
    for name, source in columns.items():
        if name not in ours:
            raise ValueError(
                f"--columns {name}={source}: expected one of {', '.join(sorted(ours))} before the ="
            )
        if source not in rows.column_names:
            raise ValueError(
                f"--columns {name}={source}: {where} has no column {source!r}, it has "
                f"{', '.join(rows.column_names)}"
            )
    kinds = ({*QUESTIONS}, {*ANSWERS} - {"completion", "chosen"}, {*IMAGE_COLUMNS})
    replaced = set(columns).union(*(kind for kind in kinds if kind & set(columns)))
    dropped = sorted(replaced.intersection(rows.column_names) - set(columns.values()))
    if dropped:
        logger.warning("--columns: not read, because others are named: %s", ", ".join(dropped))
    renamed = {source: name for name, source in columns.items() if name != source}
    if isinstance(rows, ParquetRows):
        rows.rename(renamed, without=dropped)
        return rows
    return rows.remove_columns(dropped).rename_columns(renamed) if renamed or dropped else rows


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


def _folder_of(name: str, image_folder: Path | None) -> Path | None:
    """Where relative image paths start: at the data set's file or folder; None: nowhere known."""
    path = Path(name).expanduser()
    if image_folder is not None or path.exists():
        return (image_folder or (path if path.is_dir() else path.parent)).resolve()
    return None


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
    if name.endswith(FILE_SUFFIXES):
        return True
    return not re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", name)


def _pick_split(data: Any, split: str, name: str | Path) -> datasets.Dataset:
    """The split of a DatasetDict, or a Dataset itself, which is its own "train"."""
    import datasets

    splits = data if isinstance(data, datasets.DatasetDict) else {"train": data}
    return splits[_resolve_split(split, list(splits), name)]


def _resolve_split(split: str, splits: Sequence[str], name: str | Path) -> str:
    """The split, or the one that goes by another name for validation."""
    if split in splits:
        return split
    same = [other for other in splits if {split, other} <= set(VALIDATION_NAMES)]
    if len(same) == 1:
        logger.warning("--dataset_name %s: its split %s is used for %s", name, same[0], split)
        return same[0]
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
            raise ValueError(f"--dataset_name {path}: can't be read: {one_line(error)}") from error
        return _pick_split(data, split, path)
    return _load_parquet(_folder_files(path, split, config), path)


def _load_file(path: Path, split: str, image_folder: Path | None = None) -> datasets.Dataset:
    if path.suffix == ".parquet":
        return _load_parquet(_files_of(split, [path], path), path)
    if path.suffix not in FILE_SUFFIXES:
        raise ValueError(f"--dataset_name {path}: unknown kind of file; {_accepted()}")
    _resolve_split(split, ["train"], path)
    folder = path.parent if image_folder is None else image_folder
    try:
        account = Built()
        read = _read_csv if path.suffix in (".csv", ".tsv") else _read_json
        rows = _as_dataset(read(path, account), folder.resolve())
        rows.account = account
        return rows
    except RecursionError:
        raise ValueError(
            f"--dataset_name {path}: expected rows, got values nested too deep"
        ) from None
    except ValueError as error:
        raise ValueError(f"--dataset_name {error}") from error


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
            f"--dataset_name {where}: can't be read: {one_line(error.__cause__ or error)}"
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
        # Another split may have no files: it was not downloaded.
        if files := _files_on_card(folder, split, config):
            _check_shards(files, folder)
            return files
        pattern = re.search(r"[*?\[]", str(folder.resolve()))
        hint = f"; rename the folder, its {pattern[0]} is taken for a pattern" if pattern else ""
        names = ", ".join(str(entry.get("config_name")) for entry in _card_configs(folder))
        raise ValueError(
            f"--dataset_name {folder}: README.md's configs can't be followed for {split!r}; "
            f"expected a --dataset_config of {names}, and its files there; got "
            f"{one_line(error)}{hint}"
        ) from error
    files = _builder_files(builder, split, str(folder), "README.md to name .parquet files")
    if missing := [file for file in files if not Path(file).is_file()]:  # or addresses
        raise ValueError(f"--dataset_name {folder}: README.md: no file {missing[0]}; fetch it")
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
        raise ValueError(f"{card}: its head can't be read: {one_line(error)}") from error
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
    matches = [file for p in patterns if isinstance(p, str) and p for file in folder.glob(p)]
    return [str(file) for file in sorted(matches) if file.suffix == ".parquet" and file.is_file()]


def _builder_files(builder: Any, split: str, name: str, expected: str, hint: str = "") -> list[str]:
    splits = {str(key): list(files) for key, files in (builder.config.data_files or {}).items()}
    kinds = {file.rsplit(".", 1)[-1] for files in splits.values() for file in files}
    if kinds != {"parquet"}:
        got = ", ".join(sorted(kinds)) or "none"
        raise ValueError(f"--dataset_name {name}: expected {expected}, got {got}{hint}")
    return splits[_resolve_split(split, list(splits), name)]


def _parquet_files(folder: Path) -> list[Path]:
    hidden = (".", "__")  # caches, and what macOS adds to archives
    files = sorted(
        file
        for file in folder.rglob("*.parquet")
        if file.is_file()
        and not any(part.startswith(hidden) for part in file.relative_to(folder).parts)
    )
    if not files:
        raise FileNotFoundError(
            f"--dataset_name {folder}: the folder holds neither dataset_dict.json or state.json "
            f"(written by save_to_disk) nor .parquet files; {_accepted()}"
        )
    return files


def _files_of(split: str, files: Sequence[Path], where: Path) -> list[str]:
    """The split's files; where no path names a split, all of them are "train".

    Raises:
        ValueError: no such split, a shard is missing, or only some of the paths name a split.
    """
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault(_parquet_split(file, where), []).append(str(file))
    unnamed = splits.pop("", [])
    if unnamed and splits:
        raise ValueError(
            f"--dataset_name {where}: expected a split's name such as train or test in the path of "
            f"every .parquet file or of none, got none in {listing(unnamed)}; rename or move these"
        )
    splits = splits or {"train": unnamed}
    _check_shards(chosen := splits[_resolve_split(split, list(splits), where)], where)
    return chosen


def _check_shards(files: Sequence[str], where: Path) -> None:
    """Raise ValueError if a file of train-00000-of-00002, train-00001-of-00002 is not there."""
    shards = [shard for file in files if (shard := SHARD_NAME.fullmatch(Path(file).stem))]
    for total in {shard["total"] for shard in shards}:
        numbers = {int(shard["number"]) for shard in shards if shard["total"] == total}
        if missing := sorted(set(range(int(total))) - numbers):
            raise ValueError(
                f"--dataset_name {where}: expected {int(total)} files of the split, number "
                f"{', '.join(map(str, missing[:5]))} is not there"
            )


def _parquet_split(file: Path, where: Path) -> str:
    """The split that a file's path names; empty if it names none.

    The file's name decides, then the nearest folder below the data set's: a name that holds one
    split's word, in any case, between characters that aren't letters. A shard keeps the name before
    its number, so that train_sft-00000-of-00002 is of "train_sft".
    """
    shard = SHARD_NAME.fullmatch(file.stem)
    stem = shard["split"] if shard else file.stem
    folders = file.relative_to(where).parts[:-1]
    if file == where and file.parent.name.lower() in SPLIT_WORDS:
        folders = (file.parent.name,)
    for name in (stem, *reversed(folders)):
        words = [word for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_WORDS]
        if len(splits := {SPLIT_WORDS[word] for word in words}) == 1:
            own = shard and name is stem and name.lower() not in SPLIT_WORDS
            return name if own else splits.pop()
    return stem if shard else ""


def _load_hub(name: str, split: str, config: str | None) -> datasets.Dataset:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, trust_remote_code=False)
    except Exception as error:  # network, hub, configuration and builder errors share no base
        if unknown := re.match(r"Unknown split .* Should be one of (\[.*\])", str(error)):
            resolved = _resolve_split(split, re.findall(r"'([^']*)'", unknown[1]), name)
            return datasets.load_dataset(name, config, split=resolved, trust_remote_code=False)
        raise _hub_error(name, error) from error


def _hub_error(name: str, error: Exception) -> Exception:
    kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
    return kind(
        f"--dataset_name {name}: no such file, folder or demo, and the hub says: "
        f"{one_line(error)}; {_accepted()}"
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
        raise ValueError(f"--dataset_name {name}: can't be read: {one_line(error)}") from error


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


# --- JSON and CSV ----------------------------------------------------------------------------


def _read_json(path: Path, account: Built) -> list[dict[str, Any]]:
    """The records of a JSON list or of JSON lines, told apart by content; in any encoding, which
    `account` records where it had to be guessed."""
    records = _parse_json(read_text(path, account), path)
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}: expected every record to be an object such as "
                f'{{"image_path", "problem", "solution"}}, got {record!r:.80} at {number}'
            )
    return records


def _parse_json(text: str, path: Path) -> list[Any]:
    try:
        value = json.loads(text, object_pairs_hook=_once)
        return value if isinstance(value, list) else [value]
    except (ValueError, RecursionError) as error:  # also numbers of too many digits
        if text.lstrip().startswith("["):
            raise ValueError(f"{path}: not valid JSON: {error}") from error
    records = []
    # Not splitlines(): that also splits at characters which may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            records += [json.loads(line, object_pairs_hook=_once)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number} is not valid JSON: {error}") from error
    return records


def _read_csv(path: Path, account: Built) -> list[dict[str, Any]]:
    """The rows of a table, of texts; an empty cell is no value."""
    rows = read_table(path, (QUESTIONS,), account)[1]
    return [{k: v or None for k, v in row.items() if k} for _, row in rows]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys, of which json.loads would keep the last."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is in one object twice")
    return value


def _as_dataset(records: list[dict[str, Any]], folder: Path) -> datasets.Dataset:
    import datasets
    import pyarrow as pa

    columns = {}
    for name in dict.fromkeys(key for record in records for key in record):
        values = [_utf8(record.get(name)) for record in records]
        if name in IMAGE_COLUMNS:
            columns[name] = _column([_absolute_paths(value, folder) for value in values])
        elif name in JSON_COLUMNS and any(isinstance(value, (list, dict)) for value in values):
            columns[name] = _as_json(values)
        else:
            columns[name] = _column(values)
    return datasets.Dataset(pa.table(columns))


def _absolute_paths(value: Any, folder: Path) -> Any:
    """One path or a list of them as a list of absolute ones: rows of both kinds fit one column."""
    value = read_list(IMAGE_COLUMNS[0], value)
    if value is None:
        return None
    items = value if isinstance(value, list) else [value]
    paths = [i.get("path") or i.get("url") if isinstance(i, dict) else i for i in items]
    return [placed(folder, path) if isinstance(path, str) and path else "" for path in paths]


def _utf8(value: Any) -> Any:
    """Without lone surrogates such as "\ud800", which JSON may hold and arrow may not."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_utf8(item) for item in value]
    if isinstance(value, dict):
        return {_utf8(key): _utf8(item) for key, item in value.items()}
    return value


def _as_json(values: list[Any]) -> Any:
    import pyarrow as pa

    return pa.array([None if v is None else json.dumps(v) for v in values], pa.json_())


def _column(values: list[Any]) -> Any:
    """An arrow array; where the kinds of value differ between rows, of JSON, so that each stays
    what it is and one odd row does not make the whole file unreadable."""
    import pyarrow as pa

    if {int, float} <= set(map(type, values)):  # arrow makes 1.0 of a 1
        return _as_json(values)
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        return _as_json(values)
