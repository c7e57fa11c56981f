"""The families of vision-language models: a table of what is special, and types for common parts.

The table holds the families whose prompts are shared: Qwen's, and others that merge images into
their embeddings as usual. Any other model of transformers' `AutoModelForImageTextToText` is
`PLAIN`: `models/plain.py` runs it through transformers' own code.
The types are transformers' classes, reduced to the attributes that this package uses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
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
        processor, video_processor: names of transformers' classes; empty: its files say.
        flat: a released config.json has the language model's fields at its top level, not in
            `text_config`.
        deepstack: the vision tower also computes features for the first language layers.
        shares: whether a prompt may be read once for all its completions: the language model gets
            nothing but embeddings, in which the images' features replace the image tokens.
        image_blocks: whether the tokens of an image see each other in both directions.
        completion_type: the number of a completion's tokens in `token_type_ids`, if it has those.
    """

    processor: str = ""
    video_processor: str = ""
    flat: bool = True
    deepstack: bool = False
    shares: bool = True
    image_blocks: bool = False
    completion_type: int = 0

    @property
    def is_qwen(self) -> bool:
        """Whether it has Qwen-VL's parts: patches with a grid, `visual`, rotary positions."""
        return bool(self.processor)


PLAIN = Family(shares=False)
FAMILIES = {
    "qwen2_vl": Family("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": Family("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": Family("Qwen3VLProcessor", "Qwen3VLVideoProcessor", flat=False, deepstack=True),
    "qwen3_vl_moe": Family("Qwen3VLProcessor", "Qwen3VLVideoProcessor", flat=False, deepstack=True),
    "qwen3_5": Family("Qwen3VLProcessor", "Qwen3VLVideoProcessor", flat=False),
    "qwen3_5_moe": Family("Qwen3VLProcessor", "Qwen3VLVideoProcessor", flat=False),
    "internvl": Family(),
    "llava_onevision": Family(),
    "idefics3": Family(),
    "smolvlm": Family(),
    "glm4v": Family(),
    "gemma3": Family(image_blocks=True),
}
# Plain families with a peculiarity.
UNSHARED = {"paligemma": Family(shares=False, completion_type=1)}


def family_of(model_type: str) -> Family:
    return FAMILIES.get(model_type) or UNSHARED.get(model_type, PLAIN)


def why_plain(model_type: str) -> str | None:
    """Why neither training nor rollouts share a family's prompts; None if they may."""
    if family_of(model_type).shares:
        return None
    return f"{model_type} runs through transformers' own code, without shared prompts"


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
    forward: Callable[..., Json]
    language_model: Qwen3VLTextModel  # or its counterpart in another family
    get_input_embeddings: Callable[[], nn.Embedding]
    get_image_features: Callable[..., Json]
    get_rope_index: Callable[..., tuple[Tensor, Tensor]]
    get_decoder: Callable[[], Any]  # the language model
    named_children: Callable[[], Iterator[tuple[str, nn.Module]]]
    parameters: Callable[[], Iterator[nn.Parameter]]


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
    """The part that holds the vision tower and the language model: everything but the head."""
    return base(model).model


def tower_names(model: nn.Module) -> list[str]:
    """The modules beside the language model: the vision tower and its projector."""
    language = core(model).get_decoder()
    return [name for name, module in core(model).named_children() if module is not language]


def in_tower(names: Collection[str], name: str) -> bool:
    """Whether the module or parameter `name` belongs to one of `tower_names`."""
    return not set(names).isdisjoint(name.split("."))


def tower_parameters(model: nn.Module) -> list[nn.Parameter]:
    language = {id(parameter) for parameter in core(model).get_decoder().parameters()}
    return [p for p in core(model).parameters() if id(p) not in language]


def freeze_vision_tower(model: nn.Module) -> None:
    for parameter in tower_parameters(model):
        parameter.requires_grad_(False)


class Processor(Protocol):
    """The interface of `processing.ImageOnlyQwen2VLProcessor` and `processing.image_only`."""

    tokenizer: Tokenizer
    image_processor: Any
    image_token: str
    chat_template: str | dict[str, str] | None
    base_files: dict[str, bytes]
    model_type: str
    placeholder: str

    def __call__(self, *args: Any, **options: Any) -> BatchEncoding: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...
    def save_pretrained(self, save_directory: str | Path) -> object: ...
