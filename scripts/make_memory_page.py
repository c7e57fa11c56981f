"""Writes the table of docs/memory.md, by the formula of `--dry_run`.

python scripts/make_memory_page.py
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from virft_fast import dist
from virft_fast.train import memory, parse_args

PAGE = Path(__file__).parent.parent / "docs/memory.md"
BEGIN, END = "<!-- begin: scripts/make_memory_page.py -->\n", "<!-- end -->"
LORA_R = 16
VISION, GATED = (32, 1280, 5120, 14), (32, 1280, 3420, 14)
SMALL, LARGE = (24, 1024, 4096, 16), (27, 1152, 4304, 16)
IMAGE = (640, 480)  # pixels of each prompt's image
# Name -> family; parameters; vocabulary, width, MLP width, layers, query heads, key/value heads and
# head size of the language model; blocks, width, MLP width and patch size of the vision tower. From
# the released configurations; the parameters were counted on models of these shapes.
MODELS = {
    "Qwen2-VL-2B": ("qwen2_vl", 2_208_985_600, (151_936, 1536, 8960, 28, 12, 2, 128), VISION),
    "Qwen2-VL-7B": ("qwen2_vl", 8_291_375_616, (152_064, 3584, 18_944, 28, 28, 4, 128), VISION),
    "Qwen2.5-VL-3B": ("qwen2_5_vl", 3_754_622_976, (151_936, 2048, 11_008, 36, 16, 2, 128), GATED),
    "Qwen2.5-VL-7B": ("qwen2_5_vl", 8_292_166_656, (152_064, 3584, 18_944, 28, 28, 4, 128), GATED),
    "Qwen3-VL-2B": ("qwen3_vl", 2_127_532_032, (151_936, 2048, 6144, 28, 16, 8, 128), SMALL),
    "Qwen3-VL-4B": ("qwen3_vl", 4_437_815_808, (151_936, 2560, 9728, 36, 32, 8, 128), SMALL),
    "Qwen3-VL-8B": ("qwen3_vl", 8_767_123_696, (151_936, 4096, 12_288, 36, 32, 8, 128), LARGE),
}
QLORA = "--use_peft --load_in_4bit"
# Title, processes, ZeRO stage, flags.
SETUPS = [
    (
        "QLoRA, 1 GPU, checkpointing",
        1,
        0,
        f"{QLORA} --gradient_checkpointing --offload_activations",
    ),
    ("QLoRA, 1 GPU", 1, 0, QLORA),
    ("LoRA, 1 GPU", 1, 2, "--use_peft --deepspeed configs/zero2.json"),
    ("LoRA, 1 GPU, float32", 1, 0, "--use_peft"),
    ("full, 1 GPU, no KL", 1, 2, "--beta 0 --deepspeed configs/zero2.json"),
    ("full, 8 GPUs, ZeRO-2", 8, 2, "--deepspeed configs/zero2.json"),
    ("full, 8 GPUs, ZeRO-3", 8, 3, "--deepspeed configs/zero3.json"),
    ("full, 8 GPUs, ZeRO-3, no KL", 8, 3, "--beta 0 --deepspeed configs/zero3.json"),
]
COMMON = "--bf16 --max_prompt_length 1024 --gradient_accumulation_steps 2"
GPUS_GIB = (16, 24, 40, 48, 80, 141)


def page() -> str:
    """The text of docs/memory.md with an updated table."""
    before, rest = PAGE.read_text().split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END, 1)[1]


def table() -> str:
    lines = [["", *(title for title, *_ in SETUPS)], ["---"] * (1 + len(SETUPS))]
    lines += [
        [name, *(_cell(estimate_gib(name, *setup)) for _, *setup in SETUPS)] for name in MODELS
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def estimate_gib(name: str, world: int, stage: int, flags: str) -> float:
    """The estimate of `--dry_run` for one process, in GiB."""
    total = MODELS[name][1]
    config = parse_args(f"{COMMON} {flags}".split())
    policy, patches = policy_of(name, config.model.use_peft)
    trainable = total
    if config.model.use_peft:
        trainable = lora_parameters(policy.config.text_config)
        total += trainable
    train = config.train
    data = SimpleNamespace(
        prompts_per_step=train.per_device_train_batch_size
        * train.gradient_accumulation_steps
        * world
    )
    ds_config = {"zero_optimization": {"stage": stage}} if train.deepspeed else None
    blueprint = SimpleNamespace(
        config=config,
        ds_config=ds_config,
        keeps_reference=config.grpo.beta > 0 and not config.model.use_peft,
    )
    device = torch.device("cuda")
    with (
        mock.patch.object(dist, "world_size", return_value=world),
        mock.patch.object(dist, "local_device", return_value=device),
    ):
        sizes = memory.memory_estimate(blueprint, data, policy, total, trainable)
    load = memory.load_of(config, policy, None, patches)
    sizes |= memory.activation_bytes(config, policy, load, device)
    return sum(sizes.values()) / 2**30


def policy_of(name: str, vision_frozen: bool = False) -> tuple[SimpleNamespace, int]:
    """What the formula asks of a policy, and the patches of `IMAGE`."""
    family, _, language, tower = MODELS[name]
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    names += " num_key_value_heads head_dim"
    text = SimpleNamespace(**dict(zip(names.split(), language, strict=True)))
    depth, width, inner, patch = tower
    sides = (2 * round(side / (2 * patch)) for side in IMAGE)  # whole groups of 2 x 2 patches
    vision = SimpleNamespace(
        depth=depth, embed_dim=width, hidden_size=width, mlp_ratio=4, intermediate_size=inner
    )
    config = SimpleNamespace(
        model_type=family, text_config=text, vision_config=vision, get_text_config=lambda: text
    )
    policy = SimpleNamespace(
        config=config, vision_frozen=vision_frozen, shares_prefix=True, prefix_attention="auto"
    )
    return policy, math.prod(sides)


def lora_parameters(text: SimpleNamespace) -> int:
    """Of adapters on all linear layers of the language model."""
    dim, inner, size = text.hidden_size, text.intermediate_size, text.head_dim
    heads, keys = text.num_attention_heads * size, text.num_key_value_heads * size
    sides = 2 * (dim + heads) + 2 * (dim + keys) + 3 * (dim + inner)
    return LORA_R * text.num_hidden_layers * sides


def _cell(gib: float) -> str:
    fits = [size for size in GPUS_GIB if gib <= (1 - memory.MARGIN) * size]
    return f"{gib:.1f} ({fits[0] if fits else 'none'})"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written: {PAGE}")
