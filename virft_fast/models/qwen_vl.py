"""Loading Qwen's vision-language models, and what is done to one before it is trained.

Some names of other modules (the imports with noqa) can be imported from here, too.
"""

from __future__ import annotations

import contextlib
import json
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from virft_fast.batch import Row
from virft_fast.models import adapters as lora
from virft_fast.models.adapters import add_lora, model_chain  # noqa: F401
from virft_fast.models.families import FAMILIES, QwenConfig, base, core  # noqa: F401
from virft_fast.models.inputs import banned_token_ids, control_tokens_in, encode_prompt  # noqa: F401
from virft_fast.models.policy import Policy  # noqa: F401
from virft_fast.models.saving import find_base_folder, save_model  # noqa: F401
from virft_fast.models.trust import AsksForCode


def load_model(
    name_or_path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    empty: bool = False,
) -> nn.Module:
    """A Qwen-VL model from a folder, a hub id or `tiny`, in `dtype`, on the CPU; partitioned while
    a ZeRO-3 configuration of DeepSpeed is active.

    Args:
        name_or_path: for an adapter's folder its base model is loaded, and the adapter merged into
            it in float32.
        empty: without weights, on the meta device.
    Raises:
        FileNotFoundError: there is no such folder or hub id.
        ValueError: it is no Qwen-VL model, or can't be read.
    """
    from transformers import AutoModelForImageTextToText as AutoModel
    from transformers import GenerationConfig

    config = read_config(name_or_path, revision)
    check_weights(name_or_path, revision)
    *adapters, (path, revision) = model_chain(name_or_path, revision)
    for folder, _ in adapters:
        lora.peft_config(folder)
    options: Row = {"attn_implementation": usable_attention(attn_implementation), "dtype": dtype}
    try:
        if empty:
            with torch.device("meta"):
                return AutoModel.from_config(config, trust_remote_code=False, **options)
        # Other formats than safetensors are pickles.
        options |= {"revision": revision, "use_safetensors": True, "output_loading_info": True}
        options["dtype"] = torch.float32 if adapters else dtype
        with lora.undivided() if adapters else contextlib.nullcontext():
            loaded: Any = AutoModel.from_pretrained(path, trust_remote_code=False, **options)
    # Safetensors, torch and transformers have errors of their own for foreign or damaged files.
    except Exception as error:
        file, hint = ("config.json", "") if empty else ("weights", "; is the folder complete?")
        raise ValueError(
            f"--model_name_or_path {name_or_path!r}: expected the {file} of a {config.model_type} "
            f"model, got {type(error).__name__}: {str(error)[:300]}{hint}"
        ) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"--model_name_or_path {name_or_path!r}: expected all weights of the model, but "
            f"{len(missing)} are missing ({', '.join(missing[:3])}, ...); is the folder complete?"
        )
    for folder, _ in reversed(adapters):
        model = lora.merge_adapter(model, folder)
    if adapters:
        cast_parameters(model, dtype)
    # Loaded under ZeRO-3, a model remembers all renamings that its checkpoint could have needed,
    # and its weights would be saved with one prefix too many instead of under Qwen's names.
    vars(model).pop("_weight_conversions", None)
    # A checkpoint's sampling defaults (Qwen ships a near-greedy temperature) must never affect a
    # rollout, so they are set aside; `save_model` writes them back.
    vars(model)["shipped_generation_config"] = base(model).generation_config
    base(model).generation_config = GenerationConfig()
    return model


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights in place; buffers such as rotary frequencies keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    base(model).config.dtype = dtype


def read_config(name_or_path: str, revision: str | None = None) -> QwenConfig:
    """The configuration of a Qwen-VL model; for a LoRA adapter, its base model's.

    Raises:
        FileNotFoundError, ValueError: as `load_model`.
    """
    from transformers import AutoConfig

    *adapters, (path, revision) = model_chain(name_or_path, revision)
    try:
        find_base_folder(path, revision)  # raises AsksForCode
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except AsksForCode:
        raise
    except Exception as error:  # transformers raises many kinds for unexpected content
        named = f"{name_or_path!r}" + (f", an adapter on {path!r}" if adapters else "")
        raise FileNotFoundError(
            f"--model_name_or_path: expected a folder with config.json, a hub id or `tiny`, got "
            f"{named}: {' '.join(str(error).split())[:300]}"
        ) from error
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"--model_name_or_path {name_or_path!r}: expected one of the families "
            f"{', '.join(FAMILIES)}, got model_type {config.model_type!r}"
        )
    return config


def check_weights(name_or_path: str, revision: str | None = None) -> None:
    """Check that the weight files in a model's folder are complete; for an adapter's folder, also
    its base model's. Reads only the headers of the files, and skips hub ids.

    Raises:
        ValueError: a file is missing or damaged.
    """
    for folder, _ in model_chain(name_or_path, revision):
        if not Path(folder).is_dir():
            continue
        try:
            for file in _weight_files(Path(folder)):
                with safe_open(file, "pt"):
                    pass
        except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
            pickles = sorted(file.name for file in Path(folder).glob("*.bin"))
            hint = f"{pickles[0]} is a pickle and not opened, convert it" if pickles else ""
            raise ValueError(
                f"--model_name_or_path {folder!r}: expected the weights of a Qwen-VL model or of "
                f"an adapter in safetensors, got {type(error).__name__}: {error}; "
                f"{hint or 'is the folder complete?'}"
            ) from error


def _weight_files(folder: Path) -> list[Path]:
    """The files that are going to be loaded, whether they exist or not."""
    index = folder / "model.safetensors.index.json"
    if (folder / lora.CONFIG_FILE).is_file():
        return [folder / "adapter_model.safetensors"]
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [folder / "model.safetensors"]
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(shards))]


def weights_stamp(path: str) -> list[list[str | int]]:
    """Name, size and checksum of each weight file of a model's folder, and of its base model's for
    an adapter; empty for a hub id.

    A copy of the files has the same stamp. The checksum is over up to 64 MiB of a file, in blocks
    spread over it, so a change that is smaller than the gap between two blocks may go unnoticed.
    """
    stamp: list[list[str | int]] = []
    for folder in (Path(name) for name, _ in model_chain(path) if Path(name).is_dir()):
        files = [f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin")]
        stamp += sorted([file.name, file.stat().st_size, _crc_of_blocks(file)] for file in files)
    return stamp


def _crc_of_blocks(file: Path, count: int = 1024, size: int = 2**16) -> int:
    total, crc = file.stat().st_size, 0
    if total <= count * size:
        return zlib.crc32(file.read_bytes())
    with file.open("rb") as opened:
        for number in range(count):
            opened.seek(number * max(0, total - size) // (count - 1))
            crc = zlib.crc32(opened.read(size), crc)
    return crc


def usable_attention(name: str) -> str:
    """`name`, or, with a warning, sdpa in place of a flash_attention_2 that can't run."""
    if name != "flash_attention_2":
        return name
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        return name
    warnings.warn(
        "flash_attention_2 needs the flash-attn package and a CUDA device; using sdpa instead",
        stacklevel=2,
    )
    return "sdpa"


def apply_liger(model: nn.Module, device: torch.device) -> None:
    """Replace RMSNorm, SwiGLU and rotary embedding by liger-kernel's; only a warning off CUDA."""
    if device.type != "cuda":
        warnings.warn("--use_liger_kernel has no effect without CUDA", stacklevel=2)
        return
    try:
        import liger_kernel.transformers as liger
    except ImportError as error:
        raise ValueError(
            "--use_liger_kernel: expected the package liger-kernel; pip install liger-kernel, or "
            "'.[gpu]' in a checkout"
        ) from error
    patch = getattr(liger, f"apply_liger_kernel_to_{base(model).config.model_type}")
    # Without liger's fused cross entropy, because the loss is ours.
    patch(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def freeze_vision_tower(model: nn.Module) -> None:
    for parameter in core(model).visual.parameters():
        parameter.requires_grad_(False)
