"""Load the rows of a data set by name: demos, files, folders and hub data sets.

`load_rows` finds the rows, `virft_fast.data.layouts` defines their possible layouts, and
`SampleDataset` turns them into samples. Nothing from a data set is evaluated, unpickled or run.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

import virft_fast.data.splits as splits
from virft_fast.data.accounts import Built
from virft_fast.data.images import one_line
from virft_fast.data.layouts import ANSWERS, IMAGE_COLUMNS, LIST_COLUMNS, QUESTIONS, check_columns
from virft_fast.data.samples import BadRow, SampleDataset, first_solutions, taught_answer
from virft_fast.data.streaming import ParquetRows
from virft_fast.data.tables import read_file

if TYPE_CHECKING:
    import datasets

__all__ = ["BadRow", "SampleDataset", "first_solutions", "load_rows", "taught_answer"]

logger = logging.getLogger(__name__)

OTHER_COLUMNS = ("rejected", "system", "completion", *LIST_COLUMNS)
FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")


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
            "train". If a folder's README.md has configurations, as on the hub, they determine which
            files are in which split.
        split: the split to load.
        dataset_config: configuration name, for a hub id or such a folder.
        image_folder: where relative image paths in a JSON or CSV file start; None: the file's
            folder.
        streaming: read rows from parquet files on access, even over the network, instead of copying
            the whole set first.
        columns: our name of a column -> its name in the data set.
    Returns:
        The rows, with images still encoded. Relative image paths from JSON and CSV files are made
        absolute.
    Raises:
        FileNotFoundError: there is no such data set.
        ValueError: it can't be read, has no rows, lacks the split, the configuration or a required
            column, or should be streamed but isn't in parquet.
    """
    path = Path(dataset_name).expanduser()
    folder = image_folder or (path if path.is_dir() else path.parent)
    load = _stream_rows if streaming else partial(_find_rows, image_folder=folder)
    rows: datasets.Dataset | ParquetRows = load(dataset_name, split, dataset_config)
    account = getattr(rows, "account", None)
    rows = _renamed(rows, columns or {}, f"--dataset_name {dataset_name}")
    rows.image_folder = folder.resolve() if image_folder or path.exists() else None
    rows.account = account
    if not len(rows):
        raise ValueError(f"--dataset_name {dataset_name}: split {split!r} has no rows")
    check_columns(rows.column_names, f"--dataset_name {dataset_name}")
    return rows


def _renamed(
    rows: datasets.Dataset | ParquetRows, columns: Mapping[str, str], where: str
) -> datasets.Dataset | ParquetRows:
    """Rename columns to our names.

    Removes the columns that they replace: those that already have these names, and others that
    would be read instead of them.

    Raises:
        ValueError: the data set has no such column, or we don't use a column with that name.
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
        logger.warning("not read, because --columns names others: %s", ", ".join(dropped))
    renamed = {source: name for name, source in columns.items() if name != source}
    if isinstance(rows, ParquetRows):
        rows.rename(renamed, without=dropped)
        return rows
    return rows.remove_columns(dropped).rename_columns(renamed) if renamed or dropped else rows


def _find_rows(name: str, split: str, config: str | None, image_folder: Path) -> datasets.Dataset:
    from virft_fast.data.demo import DEMO_DATASETS, demo_dataset

    if not name.strip():
        raise ValueError(f"--dataset_name: {splits.accepted()}, got an empty name")
    if name in DEMO_DATASETS:
        splits.refuse_config(config, name)
        return _pick_split(demo_dataset(name), split, name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path, split, config)
    if path.is_file():
        splits.refuse_config(config, path)
        return _load_file(path, split, image_folder)
    if _looks_like_path(name):
        raise FileNotFoundError(
            f"--dataset_name {name}: no such file, folder or demo; {splits.accepted()}"
        )
    return _load_hub(name, split, config)


def _looks_like_path(name: str) -> bool:
    """Whether `name` can't be a hub id, "owner/name".

    A single word is never passed to `datasets`: with "json" or "pandas" it would load files from
    the working folder, including pickles. And a mistyped demo name would wait for the network.
    """
    if name.endswith(FILE_SUFFIXES):
        return True
    return not re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", name)


def _pick_split(
    data: datasets.Dataset | datasets.DatasetDict, split: str, name: str | Path
) -> datasets.Dataset:
    """The split of a DatasetDict, or the Dataset itself, which is its own "train"."""
    import datasets

    tables = data if isinstance(data, datasets.DatasetDict) else {"train": data}
    return tables[splits.resolve_split(split, list(tables), name)]


def _load_folder(path: Path, split: str, config: str | None) -> datasets.Dataset:
    import datasets

    if _saved_to_disk(path):
        splits.refuse_config(config, path)
        try:
            data = datasets.load_from_disk(str(path))
        except Exception as error:  # a damaged folder makes arrow or json raise almost anything
            raise ValueError(f"--dataset_name {path}: can't be read: {one_line(error)}") from error
        return _pick_split(data, split, path)
    return _load_parquet(splits.files_in_folder(path, split, config), path)


def _load_file(path: Path, split: str, image_folder: Path) -> datasets.Dataset:
    if path.suffix == ".parquet":
        return _load_parquet(splits.split_files(split, [path], path), path)
    if path.suffix not in FILE_SUFFIXES:
        raise ValueError(f"--dataset_name {path}: unknown kind of file; {splits.accepted()}")
    splits.resolve_split(split, ["train"], path)
    account = Built()
    try:
        rows = read_file(path, account, image_folder.resolve())
    except RecursionError:
        raise ValueError(
            f"--dataset_name {path}: expected rows, got values nested too deep"
        ) from None
    except ValueError as error:
        raise ValueError(f"--dataset_name {error}") from error
    rows.account = account
    return rows


def _load_parquet(files: Sequence[str], where: Path) -> datasets.Dataset:
    import datasets

    try:
        import pyarrow.parquet as pq

        if not any(pq.read_metadata(file).num_rows for file in files):
            names = pq.read_schema(files[0]).names
            return datasets.Dataset.from_dict({name: [] for name in names})
        return datasets.Dataset.from_parquet(list(files))
    except Exception as error:  # `datasets` wraps arrow's errors in its own non-public ones
        raise ValueError(
            f"--dataset_name {where}: can't be read: {one_line(error.__cause__ or error)}"
        ) from error


def _load_hub(name: str, split: str, config: str | None) -> datasets.Dataset:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, trust_remote_code=False)
    except Exception as error:  # network, hub, configuration and builder errors share no base class
        if unknown := re.match(r"Unknown split .* Should be one of (\[.*\])", str(error)):
            resolved = splits.resolve_split(split, re.findall(r"'([^']*)'", unknown[1]), name)
            return datasets.load_dataset(name, config, split=resolved, trust_remote_code=False)
        raise _hub_error(name, error) from error


def _hub_error(name: str, error: Exception) -> Exception:
    kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
    return kind(
        f"--dataset_name {name}: no such file, folder or demo, and the hub says: "
        f"{one_line(error)}; {splits.accepted()}"
    )


def _stream_rows(name: str, split: str, config: str | None) -> ParquetRows:
    """The rows of a parquet file, a folder of parquet files, or a hub data set in parquet."""
    path = Path(name).expanduser()
    open_file = None
    if path.is_file() and path.suffix == ".parquet":
        splits.refuse_config(config, path)
        files = splits.split_files(split, [path], path)
    elif path.is_dir() and not _saved_to_disk(path):
        files = splits.files_in_folder(path, split, config)
    elif path.exists() or _looks_like_path(name):
        raise ValueError(
            f"--dataset_name {name}: expected a parquet file, a folder of them or a hub id, which "
            "--dataset_streaming reads in parts; leave the flag out (a folder written by "
            "save_to_disk is never read as a whole)"
        )
    else:
        files, open_file = _hub_parquet(name, split, config), _open_remote
    try:
        return ParquetRows(files, open_file=open_file)
    except Exception as error:  # file, network and metadata errors share no base class
        raise ValueError(f"--dataset_name {name}: can't be read: {one_line(error)}") from error


def _saved_to_disk(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _hub_parquet(name: str, split: str, config: str | None) -> list[str]:
    """Addresses of a split's parquet files, from the hub data set's configuration or file names."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(name, config)
    except Exception as error:  # as in _load_hub
        raise _hub_error(name, error) from error
    expected = "a hub set stored in .parquet files, the only ones that --dataset_streaming reads"
    return splits.builder_files(builder, split, name, expected, "; leave it out")


def _open_remote(address: str) -> IO[bytes]:
    import fsspec

    system, path = fsspec.core.url_to_fs(address)
    return system.open(path, "rb")
