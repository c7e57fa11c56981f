"""Small random models of every family, each with its own processor, as folders that transformers
could have written."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from models import random_model
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from virft_fast.models.families import FAMILIES, UNSHARED, family_of
from virft_fast.models.processing import image_only, load_processor
from virft_fast.models.saving import save_model

EVERY = (*FAMILIES, *UNSHARED)  # those that docs/models.md lists
# The columns of docs/models.md, and the families for which a test shows what stands there.
SHOWN: dict[str, tuple[str, ...]] = {}
SIZE = 56  # of an image, or of a tile of one
BEGIN, END = "<|im_start|>", "<|im_end|>"  # of a turn


def shows(column: str, families: tuple[str, ...] = EVERY) -> Any:
    """Decorator: run a test once per family; docs/models.md says "yes" where there is one."""
    SHOWN[column] = families
    return pytest.mark.parametrize("family", families, indirect=True)


def _template(image: str) -> str:
    """A chat template that reads lists of parts alone, as many do."""
    return (
        "{% for message in messages %}" + BEGIN + "{{ message.role }}\n"
        "{% for part in message.content %}"
        "{% if part.type == 'image' %}" + image + "{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}" + END + "\n{% endfor %}"
        "{% if add_generation_prompt %}" + BEGIN + "assistant\n{% endif %}"
    )


def _tokenizer(tokens: list[str], **special: str) -> Any:
    """The embedded model's tokens and others. Its EOS is not what ends a turn."""
    backend = copy.deepcopy(load_processor("tiny").tokenizer._tokenizer)
    backend.add_special_tokens([*tokens, *special.values()])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        bos_token=tokens[0] if tokens else None,
        extra_special_tokens=special,
        padding_side="left",
    )


def _siglip(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return {**sizes, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 14, **more}


def _gemma3(text: dict[str, Any]) -> tuple[Any, Any]:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tokenizer = _tokenizer(
        ["<bos>"], image_token="<image_soft_token>", boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )  # fmt: skip
    # It begins every text with BOS, as Gemma's does.
    bos = ("<bos>", tokenizer.bos_token_id)
    begin = TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    tokenizer.backend_tokenizer.post_processor = begin
    token_id, length = tokenizer.convert_tokens_to_ids, -(-len(tokenizer) // 64) * 64
    kinds = ["sliding_attention", "full_attention"]
    text |= {"head_dim": 16, "layer_types": kinds, "vocab_size": length}
    config = hf.Gemma3Config(
        text_config={"sliding_window": 8, **text, "query_pre_attn_scalar": 16},
        vision_config=_siglip(vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=token_id("<start_of_image>"),
        eoi_token_index=token_id("<end_of_image>"),
        image_token_index=token_id("<image_soft_token>"),
    )
    images = Gemma3ImageProcessorPil(size={"height": SIZE, "width": SIZE})
    processor = image_only(hf.Gemma3Processor)(
        images, tokenizer, chat_template="<bos>" + _template("<start_of_image>"), image_seq_length=4
    )
    return config, processor


def _paligemma(text: dict[str, Any]) -> tuple[Any, Any]:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer = _tokenizer(["<bos>"], image_token="<image>")
    config = hf.PaliGemmaConfig(
        text_config={
            "model_type": "gemma", **text, "head_dim": 16, "vocab_size": len(tokenizer)
        },
        vision_config={"model_type": "siglip_vision_model", **_siglip(vision_use_head=False)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=32,
    )  # fmt: skip
    images = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    images.image_seq_length = (SIZE // 14) ** 2
    processor = image_only(hf.PaliGemmaProcessor)(
        images, tokenizer, chat_template=_template("<image>")
    )
    return config, processor


def _internvl(text: dict[str, Any]) -> tuple[Any, Any]:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    tokenizer = _tokenizer(
        [], start_image_token="<img>", end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>", video_token="<video>",
    )  # fmt: skip
    vision = _siglip(image_size=[SIZE, SIZE], patch_size=[14, 14])
    config = hf.InternVLConfig(
        text_config={"model_type": "qwen2", **text, "vocab_size": len(tokenizer)},
        vision_config=vision,
        image_token_id=tokenizer.context_image_token_id,
        tie_word_embeddings=False,
    )
    images = GotOcr2ImageProcessorPil(size={"height": SIZE, "width": SIZE}, max_patches=3)
    kind, template = image_only(hf.InternVLProcessor), _template("<IMG_CONTEXT>")
    return config, kind(images, tokenizer, image_seq_length=4, chat_template=template)


def _idefics3(text: dict[str, Any], smol: bool = False) -> tuple[Any, Any]:
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    places = [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
    tokenizer = _tokenizer(
        ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *places]
    )
    kind = hf.SmolVLMConfig if smol else hf.Idefics3Config
    config = kind(
        text_config={"model_type": "llama", **text, "vocab_size": len(tokenizer)},
        vision_config=_siglip(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * SIZE}, max_image_size={"longest_edge": SIZE}
    )
    # SmolVLM's own class needs num2words; it makes the same tensors.
    template = _template("<image>")
    processor = image_only(hf.Idefics3Processor)(
        images, tokenizer, image_seq_len=4, chat_template=template
    )
    return config, processor


def _llava_onevision(text: dict[str, Any]) -> tuple[Any, Any]:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    tokenizer = _tokenizer([], image_token="<image>", video_token="<video>")
    grids = [[SIZE, SIZE], [SIZE, 2 * SIZE], [2 * SIZE, SIZE]]
    config = hf.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text, "vocab_size": len(tokenizer)},
        vision_config={"model_type": "siglip_vision_model", **_siglip(vision_use_head=False)},
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=grids,
    )
    images = LlavaOnevisionImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, image_grid_pinpoints=grids
    )
    processor = image_only(hf.LlavaOnevisionProcessor)(
        images, tokenizer, num_image_tokens=16, vision_feature_select_strategy="full",
        chat_template=_template("<image>"),
    )  # fmt: skip
    return config, processor


def _glm4v(text: dict[str, Any]) -> tuple[Any, Any]:
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    names = {"image_token": "<|image|>", "video_token": "<|video|>"}
    around = "<|begin_of_image|>", "<|end_of_image|>"
    tokenizer = _tokenizer(["<|begin_of_video|>", "<|end_of_video|>", *around], **names)
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32,
        "num_heads": 2, "image_size": SIZE, "patch_size": 14,
    }  # fmt: skip
    config = hf.Glm4vConfig(
        text_config=text
        | {"head_dim": 16, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id,
           "rope_parameters": {**rope, "partial_rotary_factor": 1.0}},
        vision_config=vision,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
    )  # fmt: skip
    images = Glm4vImageProcessorPil(size={"shortest_edge": 56**2, "longest_edge": 112**2})
    processor = image_only(hf.Glm4vProcessor)(
        images, tokenizer, chat_template=_template("<|image|>".join(around))
    )
    return config, processor


def gemma4_config() -> Any:
    """Image tokens see each other in it. Its patches have 4 x 4 pixels, and 3 x 3 make a token."""
    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"], "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
        "use_bidirectional_attention": "vision",
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 2, "num_key_value_heads": 2, "global_head_dim": 16, "patch_size": 4,
    }  # fmt: skip
    tokens = {f"{name}_token_id": number for number, name in enumerate(
        ("image", "boi", "eoi", "video", "audio"), 1
    )}  # fmt: skip
    return hf.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **tokens)


def write_family(
    family: str, folder: Path, *, seed: int = 0, text: dict[str, Any] | None = None
) -> Path:
    """A random model of two layers in float32, and its processor, in `folder`.

    Args:
        text: more of the language model's configuration.
    """
    if family_of(family).is_qwen:
        processor = load_processor("tiny")
        model = random_model(family, processor.tokenizer, seed=seed)
        save_model(model, dict(model.named_parameters()), processor, folder)
        return folder
    text = {
        **(text or {}), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
    }  # fmt: skip
    make = {
        "gemma3": _gemma3, "paligemma": _paligemma, "internvl": _internvl,
        "idefics3": _idefics3, "glm4v": _glm4v,
        "smolvlm": lambda text: _idefics3(text, smol=True), "llava_onevision": _llava_onevision,
    }[family]  # fmt: skip
    config, processor = make(text)
    model = hf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    if getattr(config.vision_config, "model_type", "") == "siglip_vision_model":  # as released
        weights = load_file(file)
        named = [(name.replace("tower.", "tower.vision_model."), w) for name, w in weights.items()]
        save_file(dict(named), file, metadata={"format": "pt"})
    processor.save_pretrained(folder)
    ends = processor.tokenizer.convert_tokens_to_ids(["<|endoftext|>", END])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


def as_released(folder: Path, template_file: str) -> None:
    """Rewrite a processor's files as transformers 4 wrote them: the image processor in a file of
    its own, with the name of its torchvision class, and the chat template in a JSON file."""
    names = ("processor_config.json", "tokenizer_config.json")
    both, tokenizer = (json.loads((folder / name).read_text()) for name in names)
    image = both.pop("image_processor")
    if folder.name.startswith("smolvlm"):
        both["processor_class"] = tokenizer["processor_class"] = "SmolVLMProcessor"
        image["image_processor_type"] = "SmolVLMImageProcessor"
    image["image_processor_type"] += "Fast"
    image["processor_class"] = both["processor_class"]
    template = {"chat_template": (folder / "chat_template.jinja").read_text()}
    (folder / "chat_template.jinja").unlink()
    files = {"preprocessor_config.json": image, "processor_config.json": both,
             "tokenizer_config.json": tokenizer | {"padding_side": "right"}}  # fmt: skip
    files[template_file] = files.get(template_file, {}) | template
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
