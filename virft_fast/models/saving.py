"""What a saved folder holds beside the weights, and for whom.

Training changes neither the tokenizer nor, bounds on image sizes aside, the processor. So the base
model's own files are written again byte for byte, and what one of the readers misses is added:
transformers 5 keeps some of its settings in other files and under other keys than transformers 4,
which vLLM, SGLang and llama.cpp follow. docs/checkpoints.md lists who reads what.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from virft_fast.models.adapters import TRAINED, has_adapter
from virft_fast.models.trust import refuse_code

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """How a family's released checkpoints look.

    Attributes:
        processor, video_processor: names of transformers' classes.
        flat: config.json has the language model's fields at its top level, not in `text_config`.
    """

    processor: str
    video_processor: str
    flat: bool


LAYOUTS = {
    "qwen2_vl": Layout("Qwen2VLProcessor", "Qwen2VLVideoProcessor", flat=True),
    "qwen2_5_vl": Layout("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", flat=True),
    "qwen3_vl": Layout("Qwen3VLProcessor", "Qwen3VLVideoProcessor", flat=False),
}
IMAGE, VIDEO, BOTH = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
PROCESSOR_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    IMAGE,
    VIDEO,
    BOTH,
}
MAX_FILE_BYTES = 64 * 2**20  # a tokenizer has 11 MB
# Not carried over: weights in any format; what describes them or an adapter; code, which a loader
# could run; what a training run leaves beside a model.
NOT_KEPT = (
    ".*", "config.json", "*.index.json", "adapter_*",
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx",
    "*.npy", "*.npz", "*.pkl", "*.pickle", "*.tar", "*.gz", "*.zip", "*.7z",
    "*.py", "*.pyc", "*.so", "*.sh", "*.ipynb",
    "*.jsonl", "*.log", "*.lock", "*.parquet", "events.out.*",
    "trainer_state.json", "*_results.json", "summary.json", "report.png", "reference_logps.json",
    "checksums.json", "stalled-rank-*.txt",
    # of an evaluation that was written beside the model
    "eval_*", "*.html", "*.journal", "*.summary.json", "*.predictions.json", "*.truth.json",
    "*.exists_map.json",
)  # fmt: skip


def find_base_folder(name_or_path: str, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: itself, or the snapshot in the hub's cache, into which
    the small files that a processor consists of are fetched if they aren't there.

    Raises:
        OSError: neither a folder nor a hub id that can be reached.
        ValueError: the hub's files ask for code.
    """
    from transformers.utils import cached_file

    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    config = cached_file(name_or_path, "config.json", revision=revision)
    for name in sorted({*PROCESSOR_FILES, "adapter_config.json", "generation_config.json"}):
        cached_file(
            name_or_path,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    refuse_code(Path(config).parent)
    return Path(config).parent


def read_base_files(folder: Path, base: Path | None = None) -> dict[str, bytes]:
    """Name -> content of the files of a model's folder that its descendants keep.

    They are held in memory, 20 MB for a Qwen-VL: the folder may be gone when a run ends.
    Of an adapter's folder only the processor's are kept, because its README.md is about the
    adapter; the others are those of its `base`.
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
    model: nn.Module, state_dict: dict[str, Tensor], processor: Any, folder: Path
) -> None:
    """Write a folder that plain `from_pretrained` loads: weights, config, processor.

    A LoRA adapter's folder gets the tokenizer and the processor, but nothing else of its base, so
    that no program takes it for a whole model.

    Args:
        state_dict: the gathered weights under the names of `model`, already in the dtype to store.
            It may be empty afterwards.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    current = inner.generation_config
    inner.generation_config = getattr(inner, "shipped_generation_config", current)
    adapter = {"selected_adapters": [TRAINED]} if has_adapter(model) else {}
    # Read first: save_pretrained may take the tensors out of `state_dict` as it writes them.
    dtype = next(t.dtype for t in state_dict.values() if t.is_floating_point())
    try:
        model.save_pretrained(folder, state_dict=state_dict, **adapter)
    finally:
        inner.generation_config = current
    if inner is model:
        _rewrite(folder / "config.json", lambda config: released_config(config, dtype))
        for name, content in processor.base_files.items():
            if name not in PROCESSOR_FILES:
                (folder / name).write_bytes(content)
    own = copy.copy(processor)  # the caller's may be of another family
    own.model_type = inner.config.model_type
    own.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):  # written for their owner's eyes only
        path.chmod(next(folder.glob("*config.json")).stat().st_mode)


def released_config(config: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """transformers 5's config.json -> the released form with transformers 5's keys added.

    Args:
        dtype: the weights' torch dtype.
    """
    flat = LAYOUTS[config["model_type"]].flat
    text, vision = dict(config["text_config"]), dict(config["vision_config"])
    rope = {k: v for k, v in text["rope_parameters"].items() if k != "type"}
    sections = {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type")}
    kind = rope["rope_type"]
    # Qwen2-VL's own name for it; whatever scaling replaces it has the same name in all versions.
    legacy = {"type": "mrope" if kind == "default" else kind} if flat else {"rope_type": kind}
    text |= {
        "rope_parameters": rope,
        "rope_scaling": legacy | sections,
        "rope_theta": rope["rope_theta"],
    }
    for part in (text, vision):
        part.pop("dtype", None)  # the whole model's is below
    if vision.get("rope_parameters") == {"rope_theta": 10000.0, "rope_type": "axial"}:
        del vision["rope_parameters"]  # every version's own value, under the newest one's name
    out = config | {"vision_config": vision, "text_config": text}
    if flat:
        # transformers below 4.52 takes `text_config` for a dict without meaning and fails on it.
        own = {"model_type", "architectures", "torch_dtype", "tie_word_embeddings"}
        out |= {k: v for k, v in out.pop("text_config").items() if k not in own}
    name = str(dtype).removeprefix("torch.")
    return out | {"dtype": name, "torch_dtype": name}


def save_processor(processor: Any, folder: Path) -> None:
    """Write the tokenizer's and the processor's files, in both the old and the new layout.

    Args:
        processor: its `base_files` are written again as they were, but for the bounds on image
            sizes; without any, all is made from what is in memory.
    """
    from transformers.processing_utils import ProcessorMixin

    ProcessorMixin.save_pretrained(processor, folder)
    layout = LAYOUTS[processor.model_type]
    made = json.loads((folder / BOTH).read_text(encoding="utf-8"))
    base = {k: v for k, v in getattr(processor, "base_files", {}).items() if k in PROCESSOR_FILES}
    for name, content in base.items():
        (folder / name).write_bytes(content)
    _write_processor_configs(folder, made, base, layout)
    template = processor.chat_template
    if isinstance(template, str) and "chat_template.json" not in base:
        _write(folder / "chat_template.json", {"chat_template": template})
    _rewrite(
        folder / "tokenizer_config.json",
        lambda config: _tokenizer_config(config, folder, layout, template),
    )


def _write_processor_configs(
    folder: Path, made: dict[str, Any], base: dict[str, bytes], layout: Layout
) -> None:
    """The three files of transformers 4 and 5 that say how images and videos become pixels."""
    files = {name: json.loads(base[name]) if name in base else {} for name in (IMAGE, VIDEO, BOTH)}
    size = made["image_processor"]["size"]
    before = files[IMAGE] | files[BOTH].get("image_processor", {}) or made["image_processor"]
    stock = {"processor_class": layout.processor}
    image = before | {
        **stock,
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": size,
        "min_pixels": size["shortest_edge"],
        "max_pixels": size["longest_edge"],
    }
    # Without a video file of its own a base's videos follow its images, in every version.
    video = files[BOTH].get("video_processor") or files[VIDEO] or before
    video = video | stock | {"video_processor_type": layout.video_processor}
    video.pop("image_processor_type", None)
    _write(folder / IMAGE, image)
    _write(folder / VIDEO, video)
    # transformers below 4.52 fails on an `image_processor` here; 5 reads preprocessor_config.json.
    files[BOTH].pop("image_processor", None)
    _write(folder / BOTH, files[BOTH] | stock | {"video_processor": video})


def _tokenizer_config(
    config: dict[str, Any], folder: Path, layout: Layout, template: Any
) -> dict[str, Any]:
    """What transformers 5 writes -> what 4 reads as well; the released form as it is."""
    out = dict(config)
    if isinstance(out.get("extra_special_tokens"), list):
        out["additional_special_tokens"] = out.pop("extra_special_tokens")
    if out.get("tokenizer_class") == "TokenizersBackend":
        out["tokenizer_class"] = "PreTrainedTokenizerFast"
    if out.get("tokenizer_class") == "PreTrainedTokenizerFast":
        # Which 4 else makes token_type_ids with, and Qwen's models refuse them.
        out.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if "added_tokens_decoder" not in out:
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        out["added_tokens_decoder"] = {
            str(token["id"]): {k: v for k, v in token.items() if k != "id"}
            for token in tokenizer["added_tokens"]
        }
        out["processor_class"] = layout.processor
        if isinstance(template, str):
            out.setdefault("chat_template", template)
    return out


def _rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace a JSON file's content, and leave its bytes alone where nothing changes."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if (changed := change(content)) != content:
        _write(path, changed)


def _write(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
