"""Resolve a split's name, and find the parquet files in a folder that belong to it."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from virft_fast.batch import Row
from virft_fast.data.accounts import listing
from virft_fast.data.images import one_line

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

VALIDATION_NAMES = ("validation", "valid", "val", "dev")
# Word in a path -> the split that it names.
SPLIT_WORDS = {name: name for name in ("train", "test", "eval", *VALIDATION_NAMES)}
SPLIT_WORDS |= {"training": "train", "testing": "test", "evaluation": "eval"}
SHARD_NAME = re.compile(r"(?P<split>\w+)-(?P<number>\d+)-of-(?P<total>\d+)")


def accepted() -> str:
    """A description of what `--dataset_name` accepts, for errors."""
    from virft_fast.data.demo import DEMO_DATASETS

    return (
        f"expected a demo ({', '.join(DEMO_DATASETS)}), a folder written by save_to_disk, a .json, "
        ".jsonl, .csv, .tsv or .parquet file, a folder of .parquet files, or a hub id such as "
        "laolao77/ViRFT_COCO_base65"
    )


def refuse_config(config: str | None, name: str | Path) -> None:
    """Raise ValueError if a configuration is given for a data set without configurations."""
    if config is not None:
        raise ValueError(
            f"--dataset_config {config}: expected a hub id, or a folder of parquet files whose "
            f"README.md has configs, got --dataset_name {name}; leave it out"
        )


def resolve_split(split: str, splits: Sequence[str], name: str | Path) -> str:
    """The split; or the only validation split, if validation was requested by another name.

    Raises:
        ValueError: there is no such split.
    """
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


def files_in_folder(folder: Path, split: str, config: str | None) -> list[str]:
    """A split's parquet files: those in README.md's configurations, or else those found by name.

    Raises:
        FileNotFoundError, ValueError: there are none, or some are missing; says why.
    """
    if not _card_configs(folder):
        refuse_config(config, folder)
        return split_files(split, _parquet_files(folder), folder)
    import datasets

    try:
        builder = datasets.load_dataset_builder(str(folder), config)
    except Exception as error:  # a missing configuration, file or key: they share no base class
        # Files of another split may be missing because they weren't downloaded.
        if files := _files_on_card(folder, split, config):
            return _complete(files, folder)
        pattern = re.search(r"[*?\[]", str(folder.resolve()))
        hint = f"; rename the folder, its {pattern[0]} is taken for a pattern" if pattern else ""
        names = ", ".join(str(entry.get("config_name")) for entry in _card_configs(folder))
        raise ValueError(
            f"--dataset_name {folder}: README.md's configs can't be followed for {split!r}; "
            f"expected a --dataset_config of {names}, and its files there; got "
            f"{one_line(error)}{hint}"
        ) from error
    files = builder_files(builder, split, str(folder), "README.md to name .parquet files")
    if missing := [file for file in files if not Path(file).is_file()]:  # or an address
        raise ValueError(f"--dataset_name {folder}: README.md: no {missing[0]}; download it")
    return _complete(files, folder)


def builder_files(
    builder: datasets.DatasetBuilder, split: str, name: str, expected: str, hint: str = ""
) -> list[str]:
    """A split's files according to the data set's configuration.

    Raises:
        ValueError: some aren't parquet files, or there is no such split.
    """
    splits = {str(key): list(files) for key, files in (builder.config.data_files or {}).items()}
    kinds = {file.rsplit(".", 1)[-1] for files in splits.values() for file in files}
    if kinds != {"parquet"}:
        got = ", ".join(sorted(kinds)) or "none"
        raise ValueError(f"--dataset_name {name}: expected {expected}, got {got}{hint}")
    return splits[resolve_split(split, list(splits), name)]


def _card_configs(folder: Path) -> list[Row]:
    """The entries under `configs` in the metadata of README.md."""
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    if not card.is_file() or not card.read_bytes().startswith(b"---"):
        return []
    try:
        configs = (metadata_load(card) or {}).get("configs") or []
    except Exception as error:  # invalid YAML or encoding
        raise ValueError(f"{card}: its head can't be read: {one_line(error)}") from error
    entries = configs if isinstance(configs, list) else [configs]
    return [entry if isinstance(entry, dict) else {} for entry in entries]


def _files_on_card(folder: Path, split: str, config: str | None) -> list[str]:
    """The split's existing files, if the card lists splits with paths."""
    configs = [c for c in _card_configs(folder) if config in (None, c.get("config_name"))]
    if len(configs) != 1 or not isinstance(configs[0].get("data_files"), list):
        return []
    listed = [entry for entry in configs[0]["data_files"] if isinstance(entry, dict)]
    paths = [entry.get("path") for entry in listed if entry.get("split") == split]
    patterns = [p for path in paths for p in (path if isinstance(path, list) else [path])]
    matches = [file for p in patterns if isinstance(p, str) and p for file in folder.glob(p)]
    return [str(file) for file in sorted(matches) if file.suffix == ".parquet" and file.is_file()]


def _parquet_files(folder: Path) -> list[Path]:
    hidden = (".", "__")  # caches, and what macOS adds to archives
    files = sorted(
        file
        for file in folder.rglob("*.parquet")
        if file.is_file()
        and not any(name.startswith(hidden) for name in file.relative_to(folder).parts)
    )
    if not files:
        raise FileNotFoundError(
            f"--dataset_name {folder}: the folder contains neither dataset_dict.json or state.json "
            f"(written by save_to_disk) nor .parquet files; {accepted()}"
        )
    return files


def split_files(split: str, files: Sequence[Path], where: Path) -> list[str]:
    """The split's files. If no path names a split, all files are "train".

    Raises:
        ValueError: there is no such split, a shard is missing, or only some paths name a split.
    """
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault(_split_of(file, where), []).append(str(file))
    unnamed = splits.pop("", [])
    if unnamed and splits:
        raise ValueError(
            f"--dataset_name {where}: expected a split's name such as train or test in the path of "
            f"every .parquet file or of none, got none in {listing(unnamed)}; rename or move these"
        )
    splits = splits or {"train": unnamed}
    return _complete(splits[resolve_split(split, list(splits), where)], where)


def _complete(files: list[str], where: Path) -> list[str]:
    """The files, if no shard is missing.

    Raises:
        ValueError: a shard, such as train-00001-of-00002, is missing.
    """
    shards = [shard for file in files if (shard := SHARD_NAME.fullmatch(Path(file).stem))]
    for total in {shard["total"] for shard in shards}:
        numbers = {int(shard["number"]) for shard in shards if shard["total"] == total}
        if missing := sorted(set(range(int(total))) - numbers):
            raise ValueError(
                f"--dataset_name {where}: expected {int(total)} files of the split, but number "
                f"{', '.join(map(str, missing[:5]))} is missing"
            )
    return files


def _split_of(file: Path, where: Path) -> str:
    """The split that a file's path names; empty if it names none.

    The file's name is searched first, then its folders from the innermost to the data set's. A name
    counts if it contains the word of exactly one split, in any case and not next to other letters.
    A shard's split is everything before its number: train_sft-00000-of-00002 is in "train_sft".
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
