"""--dry_run: print what a run would do; nothing is trained or written."""

from __future__ import annotations

import torch

from virft_fast import dist, tasks
from virft_fast.algorithms import algorithm_of
from virft_fast.algorithms.base import Data
from virft_fast.batch import Prompt
from virft_fast.data import BadRow
from virft_fast.engine import zero_stage
from virft_fast.models.adapters import is_reference
from virft_fast.models.families import in_tower, tower_names
from virft_fast.models.qwen_vl import Policy
from virft_fast.rollout.speculation import History
from virft_fast.train.memory import (
    Load,
    activation_bytes,
    image_patches,
    load_of,
    memory_estimate,
    needed_beside_cache,
)
from virft_fast.train.model import Blueprint

NUM_CHECKED_ROWS = 200


def dry_run(
    blueprint: Blueprint, data: Data, prompt: Prompt, policy: Policy, max_tokens: int | None
) -> int:
    """Print what would run, and score the data's solutions against themselves.

    Args:
        prompt: printed as an example. policy: without weights. max_tokens: of a microbatch.
    Returns:
        0, or 1 if a row can't be used or its own solution doesn't earn the maximum reward.
    """
    if not dist.is_main():
        return 0
    import yaml

    config = blueprint.config
    print("# configuration")
    print(yaml.safe_dump(config.flat(), sort_keys=False))
    print(f"task: {data.task}; rewards: {', '.join(name for name, _ in data.reward_funcs)}")
    per = "rollout" if config.grpo.steps_per_generation else "step"
    print(f"rows: {len(data.train)}; steps: {data.total_steps}; prompts a {per}: "
          f"{data.prompts_per_step}; completions a {per}: "
          f"{data.prompts_per_step * config.grpo.num_generations}")  # fmt: skip
    load = load_of(config, policy, max_tokens, image_patches(prompt))
    _print_model(blueprint, data, policy, load)
    print("\n# one prompt as the model reads it")
    print(prompt.text)
    images = [f"{image.width}x{image.height}" for image in prompt.sample.images]
    for name, text in algorithm_of(config).answers(prompt.sample).items():
        print(f"{name}: {text}")
    print(f"prompt tokens: {len(prompt.input_ids)}; images: {', '.join(images) or 'none'}")
    return _check_solutions(data)


def _print_model(blueprint: Blueprint, data: Data, policy: Policy, load: Load) -> None:
    groups: dict[str, list[int]] = {}
    tower = tower_names(policy.model)
    for name, parameter in policy.model.named_parameters():
        if is_reference(name):
            continue
        component = "vision tower" if in_tower(tower, name) else "language model"
        counts = groups.setdefault("LoRA adapter" if "lora_" in name else component, [0, 0])
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() if parameter.requires_grad else 0
    print("\n# parameters")
    for component, (count, trainable) in groups.items():
        print(f"{component:16} {count:>15,}   trainable {trainable:>15,}")
    total, trainable = (sum(counts) for counts in zip(*groups.values(), strict=True))
    config, device = blueprint.config, dist.local_device()
    sizes = memory_estimate(blueprint, data, policy, total, trainable)
    sizes |= activation_bytes(config, policy, load, device)
    stage, world = zero_stage(blueprint.ds_config), dist.world_size()
    print(f"\n# memory of one process, by formula (ZeRO stage {stage}, {world} processes)")
    for name, size in sizes.items():
        print(f"{size / 2**20:>12,.1f} MiB  {name}")
    print(f"{sum(sizes.values()) / 2**20:>12,.1f} MiB  in all")
    if config.grpo.speculates and not policy.recurrent:
        host = History().num_bytes() / 2**20
        print(f"{host:>12,.1f} MiB  of the host's memory, at most, for earlier answers")
    if device.type == "cuda":
        print(_room_on_gpu(sizes, world))


def _room_on_gpu(sizes: dict[str, float], world: int) -> str:
    """A line on the GPU memory that is left for keys and values. They are not counted, because
    rollouts that don't fit are decoded in batches."""
    needed = needed_beside_cache(sizes) / 2**20
    memory = torch.cuda.mem_get_info(dist.local_device())[1] / 2**20
    verdict = f"{memory - needed:,.1f} MiB are left for keys and values"
    if needed > memory:
        verdict = (
            f"TOO LITTLE with {world} processes; use smaller microbatches, more GPUs, a higher "
            "ZeRO stage, offloading, --gradient_checkpointing, --use_peft or a smaller model"
        )
    return f"{memory:>12,.1f} MiB  on this GPU: {verdict}"


def _check_solutions(data: Data) -> int:
    """Print rows whose solution, as an answer, doesn't earn the maximum; returns 1 for any."""
    num_rows = min(NUM_CHECKED_ROWS, len(data.train))
    wrong = []
    for index in range(num_rows):
        sample = data.train.samples.get(index)
        if isinstance(sample, BadRow):
            wrong.append(f"row {index}: {sample.reason}")
            continue
        unfit = data.train.check(sample) if data.train.check else None
        if unfit:
            wrong.append(f"row {index}: {unfit}")
        for row, name, value, best in tasks.unearned(data.reward_funcs, [sample]):
            wrong.append(f"row {row}: {name} of the solution itself is {value}, not {best}")
    print(f"\n# solutions: {num_rows} rows checked, {len(wrong)} problems")
    for line in wrong[:50]:
        print(line)
    return 1 if wrong else 0
