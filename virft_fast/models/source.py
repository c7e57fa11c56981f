"""Locates a model: its folder or hub id, the base models under its adapters, its configuration and
its weight files. This module loads no weights.
"""

from __future__ import annotations

import functools
import json
import logging
import zlib
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from virft_fast.arguments import expecting
from virft_fast.batch import Row
from virft_fast.models.families import QwenConfig, in_tower, tower_names
from virft_fast.models.tiny import resolve_model_path
from virft_fast.models.trust import AsksForCode, refuse_code

logger = logging.getLogger(__name__)

BASE_FOLDER = "base_model"  # a stacked run's merged base, in its output folder
CONFIG_FILE = "adapter_config.json"
IMAGE, VIDEO = "preprocessor_config.json", "video_preprocessor_config.json"
BOTH = "processor_config.json"
PROCESSOR_FILES = {
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json", "chat_template.json", "chat_template.jinja", IMAGE, VIDEO, BOTH,
}  # fmt: skip


@dataclass(frozen=True)
class ModelSource:
    """A model's location. Its files are read lazily, and only once.

    Attributes:
        name: the folder, hub id or `tiny`, as the user gave it.
        chain: its folder or hub id, with its revision. An adapter's folder is followed by its base
            model, and so on down to a whole model.
        adapter: its adapter_config.json; None for a whole model.
    """

    name: str
    chain: tuple[tuple[str, str | None], ...]
    adapter: Row | None = None

    @cached_property
    def folder(self) -> Path:
        """`find_base_folder` of the whole model."""
        return find_base_folder(*self.chain[-1])

    @cached_property
    def config(self) -> QwenConfig:
        """See `read_config`."""
        from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

        *adapters, (path, revision) = self.chain
        try:
            refuse_code(self.folder)
            config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        except AsksForCode:
            raise
        except Exception as error:  # transformers raises many kinds for unexpected content
            named = f"{self.name!r}" + (f", an adapter on {path!r}" if adapters else "")
            raise FileNotFoundError(
                f"--model_name_or_path: expected a folder with config.json, a hub id or `tiny`, "
                f"got {named}: {' '.join(str(error).split())[:300]}"
            ) from error
        has_images = getattr(config, "image_token_id", None) is not None
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or not has_images:
            raise ValueError(
                f"--model_name_or_path {self.name!r}: expected a vision-language model of "
                "transformers' AutoModelForImageTextToText with an image token, such as a Qwen-VL, "
                f"got model_type {config.model_type!r}; see docs/models.md"
            )
        if config.is_encoder_decoder:
            raise ValueError(
                f"--model_name_or_path {self.name!r}: expected a model whose language model only "
                f"decodes, got {config.model_type!r} with an encoder; see docs/models.md"
            )
        return config

    @cached_property
    def linear_layers(self) -> tuple[str, ...]:
        """The names of the language model's linear layers, sorted. Reads no weights."""
        from transformers import AutoModelForImageTextToText as AutoModel

        with torch.device("meta"):
            model = AutoModel.from_config(deepcopy(self.config), trust_remote_code=False)
        return linear_layers(model)

    def check_weights(self) -> None:
        """Check that the weight files in its folders are complete. Reads only headers; skips hub
        ids.

        Raises:
            ValueError: a file is missing or damaged.
        """
        for folder in (name for name, _ in self.chain if Path(name).is_dir()):
            pickles = sorted(file.name for file in Path(folder).glob("*.bin"))
            hint = f"; {pickles[0]} is a pickle and not opened, convert it" if pickles else ""
            expected = "expected the weights of a model or of an adapter in safetensors"
            with expecting(
                f"--model_name_or_path {folder!r}: {expected}",
                hint=hint or "; is the folder complete?",
            ):
                for file in _weight_files(Path(folder)):
                    with safe_open(file, "pt"):
                        pass

    def refuse_code(self) -> None:
        """Raise AsksForCode if a folder asks for code by now: its files may have changed."""
        for folder, _ in self.chain:
            refuse_code(folder)
        find_base_folder(*self.chain[-1])

    @property
    def stamp(self) -> list[list[str | int]]:
        """See `weights_stamp`. Reads the files each time, because they may change during a run."""
        stamp: list[list[str | int]] = []
        for folder in (Path(name) for name, _ in self.chain if Path(name).is_dir()):
            files = [f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin")]
            stamp += sorted([f.name, f.stat().st_size, _crc_of_blocks(f)] for f in files)
        return stamp


def linear_layers(model: nn.Module) -> tuple[str, ...]:
    """The names of a loaded model's linear layers in its language model, sorted."""
    tower = tower_names(model)
    linear = (name for name, m in model.named_modules() if isinstance(m, nn.Linear))
    names = {name.rpartition(".")[2] for name in linear if not in_tower(tower, name)}
    return tuple(sorted(names - {"lm_head"}))


def find_model(name: str | ModelSource, revision: str | None = None) -> ModelSource:
    """Locate the model `name`. A `ModelSource` is returned unchanged.

    Raises:
        ValueError: an adapter_config.json names no base model, adapters name each other, the name
            is an adapter's hub id, or a folder asks for code.
    """
    if isinstance(name, ModelSource):
        return name
    name = str(name)
    chain: list[tuple[str, str | None]] = [(resolve_model_path(name), revision)]
    refuse_code(chain[0][0])
    adapter = config = _read_adapter(chain[0][0])
    while config is not None:
        parent = _base_folder(Path(chain[-1][0]), config["base_model_name_or_path"])
        chain.append((resolve_model_path(parent), revision or config.get("revision")))
        refuse_code(chain[-1][0])
        if len(chain) > 16:
            raise ValueError(
                f"--model_name_or_path {name!r}: expected adapters on a whole model, got adapters "
                f"that name each other as base models: {[folder for folder, _ in chain[:3]]}, ..."
            )
        config = _read_adapter(chain[-1][0])
    whole = chain[-1][0]
    if not Path(whole).is_dir() and _is_hub_adapter(*chain[-1]):
        raise ValueError(
            f"--model_name_or_path {name!r}: expected a whole model or a folder with an adapter, "
            f"got the hub id of an adapter, {whole}; download it (hf download {whole} --local-dir "
            "DIR) and pass the folder"
        )
    return ModelSource(name, tuple(chain), adapter)


@functools.cache
def _is_hub_adapter(hub_id: str, revision: str | None) -> bool:
    try:
        return bool(hub_file(hub_id, CONFIG_FILE, revision))
    except OSError:  # the id doesn't exist; the loader reports that
        return False


def hub_file(hub_id: str, name: str, revision: str | None) -> str | None:
    """A hub file's path in the local cache; None if it doesn't exist or can't be downloaded."""
    from transformers.utils import cached_file

    raises = ("missing_entries", "connection_errors")
    quiet: Row = {f"_raise_exceptions_for_{kind}": False for kind in raises}
    return cached_file(hub_id, name, revision=revision, **quiet)


def _read_adapter(folder: str) -> Row | None:
    """A folder's adapter_config.json; None if it has none."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        return None
    hint = "; base_model_name_or_path is the base model's folder or hub id"
    with expecting(
        f"--model_name_or_path {folder!r}: expected {CONFIG_FILE} as peft writes it", hint=hint
    ):
        config = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"base_model_name_or_path": (str,), "r": (int,), "lora_alpha": (int, float),
                 "target_modules": (str, list)}  # fmt: skip
        for key, types in kinds.items():
            needed = key == "base_model_name_or_path" or config.get(key) is not None
            if needed and not isinstance(config[key], types):
                raise ValueError(f"{key} {config[key]!r}")
        if not all(isinstance(name, str) for name in config.get("target_modules") or ()):
            raise ValueError(f"target_modules {config['target_modules']!r}")
        return dict(config)


def _base_folder(folder: Path, named: str) -> str:
    """The folder or hub id of the base model that the adapter in `folder` names.

    A run may have been moved, so a missing folder is also looked up by name in the adapter's folder
    and its parent.
    """
    if not Path(named).is_absolute():
        return named
    candidates = [parent / Path(named).name for parent in (folder, folder.parent)]
    candidates.insert(0, Path(named))
    models = (path for path in candidates if (path / "config.json").is_file())
    path = str(next(models, named))
    if path != named and Path(named).name != BASE_FOLDER:  # BASE_FOLDER means nothing else
        logger.warning("%s names the base model %s, which is gone; %s is used", folder, named, path)
    return path


def find_base_folder(name_or_path: str, revision: str | None = None) -> Path:
    """The local folder of a checkpoint. For a hub id, it is the snapshot in the cache, after the
    processor's small files have been downloaded.

    Raises:
        OSError: the name is neither a folder nor a reachable hub id.
        ValueError: the hub's files ask for code.
    """
    from transformers.utils import cached_file

    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    config = cached_file(name_or_path, "config.json", revision=revision)
    if config is None:  # transformers itself raises an OSError in most cases
        raise FileNotFoundError(f"{name_or_path}: expected a config.json, got none")
    for name in sorted({*PROCESSOR_FILES, "adapter_config.json", "generation_config.json"}):
        hub_file(name_or_path, name, revision)
    folder = Path(config).parent
    refuse_code(folder)
    return folder


def read_config(name_or_path: str, revision: str | None = None) -> QwenConfig:
    """The configuration of a model; for a LoRA adapter, its base model's.

    Raises:
        FileNotFoundError, ValueError: as for `load_model`.
    """
    return find_model(name_or_path, revision).config


def _weight_files(folder: Path) -> list[Path]:
    """The weight files to load, whether or not they exist."""
    index = folder / "model.safetensors.index.json"
    if (folder / CONFIG_FILE).is_file():
        return [folder / "adapter_model.safetensors"]
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [folder / "model.safetensors"]
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(shards))]


def weights_stamp(path: str) -> list[list[str | int]]:
    """Name, size and checksum of each weight file in a model's folder and, for an adapter, in its
    base model's. Empty for a hub id.

    A copy of the files has the same stamp. The checksum covers up to 64 MiB of a file in evenly
    spread blocks, so it may miss a change smaller than the gap between two blocks.
    """
    return find_model(path).stamp


def _crc_of_blocks(file: Path, count: int = 1024, size: int = 2**16) -> int:
    total, crc = file.stat().st_size, 0
    if total <= count * size:
        return zlib.crc32(file.read_bytes())
    with file.open("rb") as opened:
        for number in range(count):
            opened.seek(number * max(0, total - size) // (count - 1))
            crc = zlib.crc32(opened.read(size), crc)
    return crc
