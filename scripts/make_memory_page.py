"""Writes the table of docs/memory.md, by the formula of `--dry_run`.

python scripts/make_memory_page.py
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from virft_fast import dist
from virft_fast.train import parse_args
from virft_fast.train.dry_run import memory_estimate

PAGE = Path(__file__).parent.parent / "docs/memory.md"
BEGIN, END = "<!-- begin: scripts/make_memory_page.py -->\n", "<!-- end -->"
LORA_R = 16
# Name -> parameters; inputs plus outputs of the language model's linear layers, which equals a LoRA
# adapter's parameters at rank 1; layers, key/value heads and head size of the language model.
# Counted on models with the released shapes.
MODELS = {
    "Qwen2-VL-2B": (2_208_985_600, 1_154_048, 28, 2, 128),
    "Qwen2-VL-7B": (8_291_375_616, 2_523_136, 28, 4, 128),
    "Qwen2.5-VL-3B": (3_754_622_976, 1_870_848, 36, 2, 128),
    "Qwen2.5-VL-7B": (8_292_166_656, 2_523_136, 28, 4, 128),
    "Qwen3-VL-2B": (2_127_532_032, 1_089_536, 28, 8, 128),
    "Qwen3-VL-4B": (4_437_815_808, 2_064_384, 36, 8, 128),
    "Qwen3-VL-8B": (8_767_123_696, 2_727_936, 36, 8, 128),
}
# Title, processes, ZeRO stage, flags.
SETUPS = [
    ("LoRA, 1 GPU", 1, 2, "--use_peft --deepspeed configs/zero2.json"),
    ("LoRA, 1 GPU, float32", 1, 0, "--use_peft"),
    ("full, 1 GPU, no KL", 1, 2, "--beta 0 --deepspeed configs/zero2.json"),
    ("full, 8 GPUs, ZeRO-2", 8, 2, "--deepspeed configs/zero2.json"),
    ("full, 8 GPUs, ZeRO-3", 8, 3, "--deepspeed configs/zero3.json"),
    ("full, 8 GPUs, ZeRO-3, no KL", 8, 3, "--beta 0 --deepspeed configs/zero3.json"),
]
COMMON = "--bf16 --max_prompt_length 1024 --gradient_accumulation_steps 2"
GPUS_GIB = (16, 24, 40, 48, 80, 141)
ROOM = 0.25  # of the GPU, for activations and CUDA: a rule of thumb, not measured


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
    total, lora, layers, heads, size = MODELS[name]
    config = parse_args(f"{COMMON} {flags}".split())
    trainable = total
    if config.model.use_peft:
        trainable = lora * LORA_R
        total += trainable
    text = SimpleNamespace(
        num_hidden_layers=layers, num_key_value_heads=heads, head_dim=size,
        num_attention_heads=0, hidden_size=0,
    )  # fmt: skip
    policy = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
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
        sizes = memory_estimate(blueprint, data, policy, total, trainable)
    return sum(sizes.values()) / 2**30


def _cell(gib: float) -> str:
    fits = [size for size in GPUS_GIB if gib <= (1 - ROOM) * size]
    return f"{gib:.1f} ({fits[0] if fits else 'none'})"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written: {PAGE}")
