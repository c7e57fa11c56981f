"""The embedded model `tiny`, a real Qwen2-VL of 1.5 M parameters: its folder and its builders.

`scripts/make_tiny_model.py` creates the checkpoint with these builders. Sizes and rotary base are
chosen for 112x112 images: Qwen gives time, height and width rotary angles of decreasing frequency.
With the usual base of 10,000, a head of 32 numbers could hardly tell columns apart.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

from virft_fast.batch import Row
from virft_fast.models.families import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2VLConfig

TINY_PATH = Path(__file__).parent / "tiny_qwen2_vl"

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# These aren't special tokens, because decoding a completion drops special tokens.
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# Qwen2's text split, except that numbers of up to four digits stay whole, so that a coordinate in
# 0..1000 is one token.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}{1,4}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def resolve_model_path(name_or_path: str) -> str:
    """The embedded checkpoint's folder for `tiny`; any other name is returned unchanged."""
    return str(TINY_PATH) if name_or_path == "tiny" else name_or_path


def build_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen2's special tokens, trained on `corpus`.

    Every multiple of 10 from 0 to 1000 is one token, bare and after a space.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    numbers = [f"[{n}, {n}, {n}]" for n in range(0, 1001, 10)] * 200
    lines = [re.sub("|".join(TAGS), "\n", line) for line in corpus] + numbers
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=1024, min_frequency=20, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: Tokenizer, *, initializer_range: float = 0.02) -> Qwen2VLConfig:
    """The tiny model's configuration: 3 text and 3 vision layers, hidden size 128."""
    from transformers import Qwen2VLConfig

    token_id = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 20.0, "mrope_section": [2, 7, 7]}
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64, "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "bos_token_id": token_id("<|endoftext|>"), "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"), "initializer_range": initializer_range,
        "rope_parameters": rope,
    }  # fmt: skip
    vision = {
        "depth": 3, "embed_dim": 128, "hidden_size": 128, "num_heads": 4, "mlp_ratio": 2,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "initializer_range": initializer_range,
    }  # fmt: skip
    special = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
               "vision_start_token_id": "<|vision_start|>"}  # fmt: skip
    ids: Row = {name: token_id(token) for name, token in special.items()}
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def tokenizer_corpus(problems: list[str], answers: list[str], *, seed: int = 0) -> list[str]:
    """Lines for `build_tokenizer`: the tasks' questions and answers, and the chat's role names."""
    rng = random.Random(seed)
    lines = [*problems, *answers, *["user\n", "assistant\n", "system\n"] * 500]
    rng.shuffle(lines)
    return lines
