"""Writes a model's folder so that other programs can load it.

Training doesn't change the tokenizer, and changes only the image-size bounds of the processor. So
the base model's files are copied byte for byte, then completed for other readers: transformers 5
stores some settings in other files and under other keys than transformers 4, whose files vLLM,
SGLang and llama.cpp expect. docs/checkpoints.md lists which files each program reads.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from virft_fast.batch import Row
from virft_fast.models.adapters import TRAINED, has_adapter
from virft_fast.models.families import FAMILIES, Family, Processor, base, family_of
from virft_fast.models.source import BOTH, IMAGE, PROCESSOR_FILES, VIDEO, find_base_folder  # noqa: F401

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 64 * 2**20  # a tokenizer takes 11 MB
# Not copied from the base model's folder: weights in any format, files that describe weights or an
# adapter, code that a loader could run, and other files of a training run.
NOT_KEPT = (
    ".*", "config.json", "*.index.json", "adapter_*",
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx",
    "*.npy", "*.npz", "*.pkl", "*.pickle", "*.tar", "*.gz", "*.zip", "*.7z",
    "*.py", "*.pyc", "*.so", "*.sh", "*.ipynb",
    "*.jsonl", "*.log", "*.lock", "*.parquet", "events.out.*",
    "trainer_state.json", "*_results.json", "summary.json", "report.png", "reference_logps.json",
    "checksums.json", "stalled-rank-*.txt",
    # from an evaluation written into the model's folder
    "eval_*", "*.html", "*.journal", "*.summary.json", "*.predictions.json", "*.truth.json",
    "*.exists_map.json",
)  # fmt: skip


def read_base_files(folder: Path, base: Path | None = None) -> dict[str, bytes]:
    """Name -> content of the files to copy into the folders of models trained from this one.

    They stay in memory (20 MB for a Qwen-VL), because the folder may be gone when a run ends.

    Args:
        base: the base model's folder, if `folder` is an adapter's. Then only the processor's files
            come from `folder`, because others, such as README.md, describe the adapter.
    """
    files = {} if base is None else read_base_files(base)
    adapter = (folder / "adapter_config.json").is_file()
    for path in sorted(folder.iterdir()):
        if not path.is_file() or any(fnmatch.fnmatch(path.name, p) for p in NOT_KEPT):
            continue
        if adapter and path.name not in PROCESSOR_FILES:
            continue
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise OSError(f"more than {MAX_FILE_BYTES >> 20} MiB")
            files[path.name] = path.read_bytes()
        except OSError as error:
            logger.warning("%s is not copied to the models saved from it: %s", path, error)
    return files


def save_model(
    model: nn.Module, state_dict: dict[str, Tensor], processor: Processor, folder: Path
) -> None:
    """Write a folder that plain `from_pretrained` loads: weights, config, processor.

    A LoRA adapter's folder gets the tokenizer and processor but no other file of the base model, so
    that no program mistakes it for a whole model.

    Args:
        state_dict: the gathered weights under the names of `model`, already in the dtype to store.
            It may be empty afterwards.
    """
    if not torch.cuda.is_available():  # transformers imports DeepSpeed, which would warn about it
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    inner = base(model)
    is_qwen = family_of(inner.config.model_type).is_qwen
    current = inner.generation_config
    inner.generation_config = getattr(inner, "shipped_generation_config", current)
    # Read the dtype before save_pretrained, which may remove tensors from `state_dict` as it
    # writes.
    dtype = next(t.dtype for t in state_dict.values() if t.is_floating_point())
    try:
        if has_adapter(model):
            model.save_pretrained(str(folder), state_dict=state_dict, selected_adapters=[TRAINED])
        else:
            inner.save_pretrained(folder, state_dict=_released_experts(inner, state_dict))
    finally:
        inner.generation_config = current
        if is_qwen:
            vars(inner).pop("_weight_conversions", None)
    if not has_adapter(model):
        if is_qwen:
            _rewrite(folder / "config.json", lambda config: released_config(config, dtype))
        for name, content in processor.base_files.items():
            if name not in PROCESSOR_FILES:
                (folder / name).write_bytes(content)
    own = copy.copy(processor)  # use the model's family, not the processor's
    own.model_type = inner.config.model_type
    own.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):  # by default, only their owner can read them
        path.chmod(next(folder.glob("*config.json")).stat().st_mode)


def _released_experts(model: Any, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in the layout of the released Qwen3-VL-MoE, whose experts' matrices are (experts,
    inputs, outputs).

    transformers (5.23) writes its own layout and reads both, but under ZeRO-3 only the released
    one. Also turns off its conversion for the next `save_pretrained`.
    """
    if model.config.model_type != "qwen3_vl_moe":
        return state_dict
    vars(model)["_weight_conversions"] = []
    for name in [name for name in state_dict if ".mlp.experts." in name]:
        state_dict[name] = state_dict[name].transpose(1, 2).contiguous()
    return state_dict


def released_config(config: Row, dtype: torch.dtype) -> Row:
    """Convert transformers 5's config.json to the released form, keeping transformers 5's keys.

    Args:
        dtype: the weights' dtype.
    """
    flat = FAMILIES[config["model_type"]].flat
    text, vision = dict(config["text_config"]), dict(config["vision_config"])
    rope = {k: v for k, v in text["rope_parameters"].items() if k != "type"}
    sections = {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type")}
    kind = rope["rope_type"]
    # "mrope" is Qwen2-VL's name for the default; other scalings have the same name in all versions.
    legacy = {"type": "mrope" if kind == "default" else kind} if flat else {"rope_type": kind}
    text |= {"rope_parameters": rope, "rope_scaling": legacy | sections}
    text["rope_theta"] = rope["rope_theta"]
    for section in (text, vision):
        section.pop("dtype", None)  # the whole model's dtype is set below
    if vision.get("rope_parameters") == {"rope_theta": 10000.0, "rope_type": "axial"}:
        del vision["rope_parameters"]  # every version's default; only the newest has the key
    out = config | {"vision_config": vision, "text_config": text}
    if flat:
        # transformers below 4.52 keeps `text_config` as a plain dict and fails on it.
        own = {"model_type", "architectures", "torch_dtype", "tie_word_embeddings"}
        out |= {k: v for k, v in out.pop("text_config").items() if k not in own}
    name = str(dtype).removeprefix("torch.")
    return out | {"dtype": name, "torch_dtype": name}


def save_processor(processor: Processor, folder: Path) -> None:
    """Complete the tokenizer and processor files that transformers 5 wrote, so that transformers 4
    and 5 read them.

    Args:
        processor: its `base_files` are written unchanged, except for the image-size bounds; missing
            files are created from the processor in memory.
    """
    family = FAMILIES[processor.model_type]
    made = json.loads((folder / BOTH).read_text(encoding="utf-8"))
    files = getattr(processor, "base_files", {}).items()
    kept = {name: content for name, content in files if name in PROCESSOR_FILES}
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    _write_processor_configs(folder, made, kept, family)
    template = processor.chat_template
    if isinstance(template, str) and "chat_template.json" not in kept:
        _write(folder / "chat_template.json", {"chat_template": template})
    path = folder / "tokenizer_config.json"
    _rewrite(path, lambda config: _tokenizer_config(config, folder, family, template))


def _write_processor_configs(
    folder: Path, made: Row, kept: dict[str, bytes], family: Family
) -> None:
    """Write the three files in which transformers 4 and 5 configure image and video processing.

    Args:
        made: the processor_config.json that transformers 5 wrote. kept: the base model's files.
    """
    files = {name: json.loads(kept[name]) if name in kept else {} for name in (IMAGE, VIDEO, BOTH)}
    size = made["image_processor"]["size"]
    before = files[IMAGE] | files[BOTH].get("image_processor", {}) or made["image_processor"]
    stock = {"processor_class": family.processor}
    bounds = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    image = before | stock | bounds
    image |= {"image_processor_type": "Qwen2VLImageProcessor", "size": size}
    # In every version, a model without a video file uses the image settings for videos.
    video = files[BOTH].get("video_processor") or files[VIDEO] or before
    video = video | stock | {"video_processor_type": family.video_processor}
    video.pop("image_processor_type", None)
    _write(folder / IMAGE, image)
    _write(folder / VIDEO, video)
    # transformers below 4.52 fails if this has an `image_processor`; 5 reads
    # preprocessor_config.json.
    files[BOTH].pop("image_processor", None)
    _write(folder / BOTH, files[BOTH] | stock | {"video_processor": video})


def _tokenizer_config(config: Row, folder: Path, family: Family, template: object) -> Row:
    """Convert transformers 5's tokenizer_config.json for transformers 4; keep a released one."""
    out = dict(config)
    if isinstance(out.get("extra_special_tokens"), list):
        out["additional_special_tokens"] = out.pop("extra_special_tokens")
    if out.get("tokenizer_class") == "TokenizersBackend":
        out["tokenizer_class"] = "PreTrainedTokenizerFast"
    if out.get("tokenizer_class") == "PreTrainedTokenizerFast":
        # Otherwise, transformers 4 returns token_type_ids, which Qwen's models reject.
        out.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if "added_tokens_decoder" not in out:
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        out["added_tokens_decoder"] = {
            str(token["id"]): {k: v for k, v in token.items() if k != "id"}
            for token in tokenizer["added_tokens"]
        }
        out["processor_class"] = family.processor
        if isinstance(template, str):
            out.setdefault("chat_template", template)
    return out


def _rewrite(path: Path, change: Callable[[Row], Row]) -> None:
    """Change a JSON file's content. If nothing changes, the file keeps its exact bytes."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if (changed := change(content)) != content:
        _write(path, changed)


def _write(path: Path, content: Row) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
