"""Small random models of every family."""

from __future__ import annotations

from typing import Any

import torch

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# With layers of gated DeltaNet, or with experts.
NEWER = ("qwen3_5", "qwen3_5_moe", "qwen3_vl_moe")
CLASSES = {"qwen3_vl": "Qwen3VL", "qwen3_vl_moe": "Qwen3VLMoe", "qwen3_5": "Qwen3_5",
           "qwen3_5_moe": "Qwen3_5Moe"}  # fmt: skip


def random_model(family: str, tokenizer: Any, *, seed: int = 0, **text: Any) -> torch.nn.Module:
    """Two text layers and two or three vision layers with random weights, in float32."""
    import transformers as hf

    token_id = tokenizer.convert_tokens_to_ids
    ids = {
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
    }
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 2048, "rope_parameters": rope, "tie_word_embeddings": False,
        "pad_token_id": token_id("<|endoftext|>"), "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"), **text,
    }  # fmt: skip
    patches = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if family == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
        config = hf.Qwen2VLConfig(text_config=text, vision_config=vision | patches, **ids)
        model = hf.Qwen2VLForConditionalGeneration(config)
    elif family == "qwen2_5_vl":
        vision = {
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64,
            "num_heads": 2, "window_size": 56, "fullatt_block_indexes": [1],
        }  # fmt: skip
        config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision | patches, **ids)
        model = hf.Qwen2_5_VLForConditionalGeneration(config)
    else:
        vision = {
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64,
            "num_heads": 2, "num_position_embeddings": 64,
        }  # fmt: skip
        if family.startswith("qwen3_vl"):
            vision["deepstack_visual_indexes"] = [0, 1]
        else:
            text |= {
                "layer_types": ["linear_attention", "full_attention", "linear_attention"],
                "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                "linear_value_head_dim": 16,
                "rope_parameters": {
                    **rope, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]
                },
            }  # fmt: skip
        if family.endswith("moe"):
            text |= {
                "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                "shared_expert_intermediate_size": 40,
            }  # fmt: skip
        name = CLASSES[family]
        config = getattr(hf, f"{name}Config")
        config = config(text_config=text, vision_config=vision | patches, **ids)
        model = getattr(hf, f"{name}ForConditionalGeneration")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):  # smaller than Qwen's start: sums of decays round less
                rates = torch.rand(parameter.shape, generator=generator) * 0.2 + 0.01
                parameter.copy_(rates.log())
            elif parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval()
