"""Qwen's vision-language families: a table of their differences, and types for their common parts.

The types are transformers' classes, reduced to the attributes that this package uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase as Tokenizer

if TYPE_CHECKING:
    from transformers import BatchEncoding, GenerationConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

    from virft_fast.batch import Json


@dataclass(frozen=True)
class Family:
    """The properties that distinguish a family.

    Attributes:
        processor, video_processor: names of transformers' classes.
        flat: a released config.json has the language model's fields at its top level, not in
            `text_config`.
        deepstack: the vision tower also computes features for the first language layers.
    """

    processor: str
    video_processor: str
    flat: bool = True
    deepstack: bool = False


FAMILIES = {
    "qwen2_vl": Family("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": Family("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": Family("Qwen3VLProcessor", "Qwen3VLVideoProcessor", flat=False, deepstack=True),
}


class TextConfig(Protocol):
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int


class VisionConfig(Protocol):
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int


class QwenConfig(Protocol):
    model_type: str
    dtype: torch.dtype
    text_config: TextConfig
    vision_config: VisionConfig
    get_text_config: Callable[[], TextConfig]


class QwenCore(Protocol):
    visual: nn.Module
    language_model: Qwen3VLTextModel  # or its counterpart in another family
    get_input_embeddings: Callable[[], nn.Embedding]
    get_image_features: Callable[..., Json]
    get_rope_index: Callable[..., tuple[Tensor, Tensor]]


class QwenVL(Protocol):
    name_or_path: str
    config: QwenConfig
    generation_config: GenerationConfig
    lm_head: nn.Linear
    model: QwenCore
    generate: Callable[..., Tensor]
    save_pretrained: Callable[..., None]


def base(model: nn.Module) -> QwenVL:
    """The transformers model inside a peft wrapper, or the model itself."""
    unwrap = getattr(model, "get_base_model", lambda: model)
    return cast(QwenVL, unwrap())  # nn.Module declares none of these attributes


def core(model: nn.Module) -> QwenCore:
    """The part that holds `visual` and `language_model`."""
    return base(model).model


def freeze_vision_tower(model: nn.Module) -> None:
    for parameter in core(model).visual.parameters():
        parameter.requires_grad_(False)


class Processor(Protocol):
    """The interface of `ImageOnlyQwen2VLProcessor`, which documents it."""

    tokenizer: Tokenizer
    image_processor: Any
    image_token: str
    chat_template: str | dict[str, str] | None
    base_files: dict[str, bytes]
    model_type: str

    def __call__(self, *args: Any, **options: Any) -> BatchEncoding: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...
    def save_pretrained(self, save_directory: str | Path) -> object: ...
