"""Random models and prompts of a given length, for the suites that run a whole model."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import numpy as np
import torch
from measure import DEVICE
from PIL import Image

from virft_fast.batch import Prompt, Sample
from virft_fast.models.processing import image_only, load_processor
from virft_fast.models.qwen_vl import encode_prompt
from virft_fast.rollout.hf import HFRollout
from virft_fast.rollout.native import NativeRollout

LENGTHS = [(500, 64), (650, 200), (130, 256)]  # prompt tokens, completion tokens
# Sizes of the vision tower and the language model. "cpu" takes minutes; the others are those of the
# released models (V and tying from memory of their configurations).
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 640,
        "tie_word_embeddings": True, "mrope_section": [4, 2, 2],
        "vision": {"depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2},
    },
    "cpu": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 640,
        "tie_word_embeddings": True, "mrope_section": [8, 12, 12],
        "vision": {"depth": 2, "embed_dim": 128, "num_heads": 4, "mlp_ratio": 2},
    },
    "2b": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_936,
        "tie_word_embeddings": True, "mrope_section": [16, 24, 24],
        "vision": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4},
    },
    "7b": {
        "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064,
        "tie_word_embeddings": False, "mrope_section": [16, 24, 24],
        "vision": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4},
    },
}  # fmt: skip


# Qwen3.5 of the size "cpu": three layers of gated DeltaNet and one with attention, in the released
# models' proportions.
QWEN3_5: dict[str, Any] = {
    "head_dim": 64, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e7, "mrope_section": [4, 2, 2],
        "partial_rotary_factor": 0.25,
    },
}  # fmt: skip
QWEN3_5_VISION = {
    "depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4,
    "num_position_embeddings": 2304,
}  # fmt: skip
GLM46V_VISION = {
    "depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "image_size": 1260
}  # fmt: skip


# Gemma 3 of the size "cpu": three layers with a sliding window and one without (released: five to
# one), with the released models' window and number of tokens per image.
GEMMA3: dict[str, Any] = {
    "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 1024, "vocab_size": 704,
    "layer_types": [*["sliding_attention"] * 3, "full_attention"],
}  # fmt: skip
GEMMA3_VISION = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "patch_size": 14, "image_size": 448, "vision_use_head": False,
}  # fmt: skip
GEMMA3_TOKENS = {
    "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}  # fmt: skip
GEMMA3_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{{ '<start_of_image>' if part.type == 'image' else part.text }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class FixedLength(NativeRollout):
    """A rollout that never draws EOS."""

    def banned(self, policy: Any) -> list[int]:
        return [*super().banned(policy), self.tokenizer.eos_token_id]


class FixedLengthHF(HFRollout):
    """transformers' `generate`, which never draws EOS."""

    def banned(self, policy: Any) -> list[int]:
        return [*super().banned(policy), self.tokenizer.eos_token_id]


def cases_of(lengths: list[tuple[int, int]] = LENGTHS) -> dict[str, dict[str, tuple[int, ...]]]:
    """A suite's `CASES`: (P, C) by size and id."""
    full = {f"P{p}-C{c}": (p, c) for p, c in lengths}
    return {"tiny": {"P60-C8": (60, 8)}} | {size: dict(full) for size in ("cpu", "2b", "7b")}


def make_model(size: str, family: str = "qwen2_vl") -> torch.nn.Module:
    """A model with random weights: float32 on a CPU, bfloat16 on a GPU.

    Args:
        family: qwen2_vl; or of the size "cpu" qwen3_5, gemma3, or glm46v, which shares no prompts.
    """
    import transformers as hf

    shape = dict(SHAPES[size])
    token_id = make_processor(family).tokenizer.convert_tokens_to_ids
    vision, section = shape.pop("vision"), shape.pop("mrope_section")
    tied, vision["hidden_size"] = shape["tie_word_embeddings"], shape["hidden_size"]
    shape["rope_parameters"] = {
        "rope_type": "default", "rope_theta": 1e6, "mrope_section": section
    }  # fmt: skip
    make_config, make = hf.Qwen2VLConfig, hf.Qwen2VLForConditionalGeneration
    if family == "qwen3_5":
        shape, vision = shape | QWEN3_5, QWEN3_5_VISION | {"out_hidden_size": shape["hidden_size"]}
        make_config, make = hf.Qwen3_5Config, hf.Qwen3_5ForConditionalGeneration
    tokens = {
        "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
    }  # fmt: skip
    if family == "gemma3":
        del shape["rope_parameters"]
        shape, vision = shape | GEMMA3, GEMMA3_VISION
        make_config, make = hf.Gemma3Config, hf.Gemma3ForConditionalGeneration
        names = ("boi_token", "eoi_token", "image_token")
        tokens = {f"{name}_index": GEMMA3_TOKENS[name] for name in names}
    if family == "glm46v":
        shape["head_dim"], vision = 64, GLM46V_VISION | {"out_hidden_size": shape["hidden_size"]}
        shape["rope_parameters"]["partial_rotary_factor"] = 1.0
        make_config, make = hf.Glm46VConfig, hf.Glm46VForConditionalGeneration
    config = make_config(
        text_config={
            **shape,
            "max_position_embeddings": 4096,
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
        },
        vision_config={
            **vision, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2
        },
        tie_word_embeddings=tied,
        **{name: token_id(token) for name, token in tokens.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            model = make(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02 if size in ("2b", "7b") else 0.08)
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    return model.train()


def prepare(trainer: Any) -> None:
    """A trainer of TRL or transformers as its `train()` leaves it before the first step."""
    trainer.create_optimizer()
    trainer.model_wrapped = trainer.model.train()


def update(trainer: Any) -> None:
    """What the loop of `train()` does after a backward pass."""
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.model.zero_grad(set_to_none=True)


@functools.cache
def make_processor(family: str = "qwen2_vl") -> Any:
    """The embedded model's processor, or Gemma 3's with the embedded model's text tokens."""
    if family != "gemma3":
        return load_processor("tiny", max_pixels=28 * 28 * 2000)
    import transformers as hf
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    backend = load_processor("tiny").tokenizer._tokenizer
    backend.add_special_tokens(list(GEMMA3_TOKENS.values()))
    end = "<|endoftext|>"
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token=end, padding_side="left",
        extra_special_tokens=GEMMA3_TOKENS,
    )  # fmt: skip
    side = GEMMA3_VISION["image_size"]
    images = Gemma3ImageProcessorPil(size={"height": side, "width": side})
    processor = image_only(hf.Gemma3Processor)(images, tokenizer, chat_template=GEMMA3_TEMPLATE)
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        hf.Gemma3Config(
            image_token_index=tokenizer.convert_tokens_to_ids(GEMMA3_TOKENS["image_token"])
        ).save_pretrained(folder)
        return load_processor(folder)


def make_sample(processor: Any, index: int, length: int) -> Sample:
    """An image and a question that make a prompt of exactly `length` tokens."""
    side = 28 * int((length - 20) ** 0.5)
    rng = np.random.default_rng(index)
    image = Image.fromarray(rng.integers(0, 255, (side, side, 3)).astype("u1"))
    words = "Detect every red."
    while True:
        content = [{"type": "image"}, {"type": "text", "text": words}]
        sample = Sample(
            index, ({"role": "user", "content": content},), (image,), "", {"problem": words}
        )
        missing = length - len(encode_prompt(processor, sample).input_ids)
        if missing == 0:
            return sample
        assert missing > 0, (length, missing)
        words += " red" * missing if missing < 8 else " red" * (missing // 2)


def make_prompts(processor: Any, count: int, length: int) -> list[Prompt]:
    return [encode_prompt(processor, make_sample(processor, i, length)) for i in range(count)]
