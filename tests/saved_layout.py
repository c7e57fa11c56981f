"""What other programs need of a folder that was saved, as assertions; docs/checkpoints.md has the
rules in words, by program."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

# architectures, processor_class, video_processor_type, and what the vision tower's sizes are called
FAMILY = {
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "Qwen2VLProcessor", "Qwen2VLVideoProcessor",
                 {"embed_dim", "mlp_ratio"}),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor",
                   "Qwen2VLVideoProcessor",
                   {"intermediate_size", "out_hidden_size", "window_size",
                    "fullatt_block_indexes"}),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", "Qwen3VLProcessor", "Qwen3VLVideoProcessor",
                 {"intermediate_size", "out_hidden_size", "num_position_embeddings",
                  "deepstack_visual_indexes"}),
}  # fmt: skip
TEXT = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "rms_norm_eps", "max_position_embeddings"}  # fmt: skip
VISION = {"depth", "hidden_size", "num_heads", "patch_size", "spatial_merge_size"}
NOT_IN_AN_ADAPTER = {"config.json", "generation_config.json", "model.safetensors"}


def read(folder, name):
    return json.loads((Path(folder) / name).read_text(encoding="utf-8"))


def tensors(folder, prefix):
    """Name -> (shape, safetensors' dtype) in all shards; they are the ones the index names."""
    found = {}
    for path in sorted(Path(folder).glob(f"{prefix}*.safetensors")):
        with safe_open(path, "pt") as weights:
            assert weights.metadata()["format"] == "pt"  # transformers 4 refuses any other
            for name in weights.keys():  # noqa: SIM118
                part = weights.get_slice(name)
                found[name] = tuple(part.get_shape()), part.get_dtype()
    index = Path(folder) / f"{prefix}.safetensors.index.json"
    if index.is_file():
        assert read(folder, index.name)["weight_map"].keys() == found.keys()
    return found


def check_saved(folder):
    """A whole model, or an adapter on one. Returns its family."""
    names = {path.name for path in Path(folder).iterdir()}
    if "adapter_config.json" in names:
        return check_adapter(folder, names)
    config = read(folder, "config.json")
    family = config["model_type"]
    check_config(config, folder)
    check_weights(config, folder)
    check_processor(folder, family, config["vision_config"])
    check_tokenizer(folder, config)
    assert "generation_config.json" in names  # vLLM samples by it
    assert not [name for name in names if name.startswith("adapter_")]
    return family


def check_adapter(folder, names):
    config = read(folder, "adapter_config.json")
    base = config["base_model_name_or_path"]
    # vLLM's and llama.cpp's rules; the latter's scaling is alpha over r.
    assert config["peft_type"] == "LORA" and config["target_modules"]
    assert not config["modules_to_save"] and not config["use_dora"] and not config["use_rslora"]
    assert config["bias"] == "none" and config["lora_alpha"] > 0
    assert not names & NOT_IN_AN_ADAPTER and Path(base).is_absolute()
    for name, (shape, _) in tensors(folder, "adapter_model").items():
        assert name.startswith("base_model.model.model.language_model.layers."), name
        part = "lora_A" if name.endswith(".lora_A.weight") else "lora_B"
        assert name.endswith(f".{part}.weight") and shape[part == "lora_B"] == config["r"]
    family = check_saved(base)
    check_processor(folder, family, read(base, "config.json")["vision_config"])
    check_tokenizer(folder, read(base, "config.json"))
    return family


def check_config(config, folder):
    family = config["model_type"]
    architecture, _, _, sizes = FAMILY[family]
    assert config["architectures"] == [architecture]
    nested = family == "qwen3_vl"
    assert ("text_config" in config) == nested  # transformers 4.49 fails on one in the others
    text = config["text_config"] if nested else config
    assert text.keys() >= TEXT and config["vision_config"].keys() >= VISION | sizes
    assert config["vision_config"].get("temporal_patch_size") == 2  # all that llama.cpp converts
    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    rope, legacy = text["rope_parameters"], text["rope_scaling"]
    assert 2 * sum(rope["mrope_section"]) == head
    kind = {"rope_type": "default"} if nested else {"type": "mrope"}
    assert rope["rope_type"] == "default"
    assert legacy == {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type")} | kind
    assert text["rope_theta"] == rope["rope_theta"] > 0
    # The current vLLM and llama.cpp read the file through transformers.
    loaded = AutoConfig.from_pretrained(folder)
    assert loaded.tie_word_embeddings == config["tie_word_embeddings"]
    theirs = loaded.get_text_config().rope_parameters
    assert theirs | rope == theirs


def check_weights(config, folder):
    found = tensors(folder, "model")
    dtype = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[config["dtype"]]
    assert config["torch_dtype"] == config["dtype"] and {d for _, d in found.values()} == {dtype}
    assert ("lm_head.weight" in found) != config["tie_word_embeddings"]
    text, vision = "model.", "visual."
    if config["model_type"] == "qwen3_vl":
        text, vision = "model.language_model.", "model.visual."
    parts = tuple(text + part for part in ("layers.", "embed_tokens.", "norm."))
    assert all(name.startswith((*parts, vision, "lm_head.")) for name in found)
    layers = config.get("text_config", config)["num_hidden_layers"]
    assert f"{text}layers.{layers - 1}.self_attn.q_proj.weight" in found
    assert f"{vision}blocks.{config['vision_config']['depth'] - 1}.attn.qkv.weight" in found


def check_processor(folder, family, vision):
    _, processor, video_processor, _ = FAMILY[family]
    image, video = (read(folder, f"{kind}preprocessor_config.json") for kind in ("", "video_"))
    both = read(folder, "processor_config.json")
    assert image["image_processor_type"] == "Qwen2VLImageProcessor"
    assert {part["processor_class"] for part in (image, video, both)} == {processor}
    size = {"shortest_edge": image["min_pixels"], "longest_edge": image["max_pixels"]}
    assert image["size"] == size and 0 < image["min_pixels"] <= image["max_pixels"]
    assert len(image["image_mean"]) == len(image["image_std"]) == 3
    for part in (image, video):
        assert part["patch_size"] == vision["patch_size"]
        assert part["merge_size"] == vision["spatial_merge_size"]
        assert part["temporal_patch_size"] == vision["temporal_patch_size"]
    assert video["video_processor_type"] == video_processor and both["video_processor"] == video
    # transformers 4.49 fails on one here, and llama.cpp prefers it to preprocessor_config.json.
    assert "image_processor" not in both


def check_tokenizer(folder, config):
    settings, tokenizer = read(folder, "tokenizer_config.json"), read(folder, "tokenizer.json")
    # Other classes are unknown to transformers 4, which makes token_type_ids with the last one.
    plain = settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert plain or settings["tokenizer_class"] in ("Qwen2Tokenizer", "Qwen2TokenizerFast")
    assert not plain or settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert isinstance(settings.get("extra_special_tokens", {}), dict)  # 4 fails on a list
    added = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    kept = {int(i): token["content"] for i, token in settings["added_tokens_decoder"].items()}
    assert added == kept and {settings["eos_token"], settings["pad_token"]} <= set(added.values())
    assert "<|image_pad|>" == added[config["image_token_id"]]
    assert "<|vision_start|>" == added[config["vision_start_token_id"]]
    assert tokenizer["model"]["type"] == "BPE" and tokenizer["model"]["merges"]
    template = (Path(folder) / "chat_template.jinja").read_text(encoding="utf-8")
    assert read(folder, "chat_template.json")["chat_template"] == template
    assert settings["chat_template"] == template
    loaded = AutoTokenizer.from_pretrained(folder)
    size = config.get("text_config", config)["vocab_size"]
    assert max(loaded.get_vocab().values()) < size  # llama.cpp's converter asserts it, too
