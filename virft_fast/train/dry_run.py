"""--dry_run: print what a run would do; nothing is trained or written."""

from __future__ import annotations

import math

import torch

from virft_fast import dist, tasks
from virft_fast.algorithms import algorithm_of
from virft_fast.algorithms.base import Data
from virft_fast.batch import Json, Prompt, Row
from virft_fast.config import RunConfig
from virft_fast.data import BadRow
from virft_fast.engine import zero_stage
from virft_fast.models.adapters import is_reference
from virft_fast.models.qwen_vl import Policy
from virft_fast.rollout.cache import KEPT_SHARE, CachePlan, cache_numbers
from virft_fast.train.model import Blueprint

NUM_CHECKED_ROWS = 200
_CACHE = "keys and values of a rollout"


def dry_run(blueprint: Blueprint, data: Data, prompt: Prompt, policy: Policy) -> int:
    """Print what would run, and score the data's solutions against themselves.

    Args:
        prompt: printed as an example. policy: without weights.
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
    print(f"rows: {len(data.train)}; steps: {data.total_steps}; prompts a step: "
          f"{data.prompts_per_step}; completions a step: "
          f"{data.prompts_per_step * config.grpo.num_generations}")  # fmt: skip
    _print_model(blueprint, data, policy)
    print("\n# one prompt as the model reads it")
    print(prompt.text)
    images = [f"{image.width}x{image.height}" for image in prompt.sample.images]
    for name, text in algorithm_of(config).answers(prompt.sample).items():
        print(f"{name}: {text}")
    print(f"prompt tokens: {len(prompt.input_ids)}; images: {', '.join(images) or 'none'}")
    return _check_solutions(data)


def _print_model(blueprint: Blueprint, data: Data, policy: Policy) -> None:
    groups: dict[str, list[int]] = {}
    for name, parameter in policy.model.named_parameters():
        if is_reference(name):
            continue
        component = "vision tower" if "visual" in name else "language model"
        counts = groups.setdefault("LoRA adapter" if "lora_" in name else component, [0, 0])
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() if parameter.requires_grad else 0
    print("\n# parameters")
    for component, (count, trainable) in groups.items():
        print(f"{component:16} {count:>15,}   trainable {trainable:>15,}")
    total = sum(c for c, _ in groups.values())
    trainable = sum(t for _, t in groups.values())
    sizes = memory_estimate(blueprint, data, policy, total, trainable)
    stage, world = zero_stage(blueprint.ds_config), dist.world_size()
    print(f"\n# memory of one process, by formula (ZeRO stage {stage}, {world} processes)")
    for name, size in sizes.items():
        print(f"{size / 2**20:>12,.1f} MiB  {name}")
    print(f"{sum(sizes.values()) / 2**20:>12,.1f} MiB  in all, without activations")
    if dist.local_device().type == "cuda":
        print(_room_on_gpu(sizes, world))


def _room_on_gpu(sizes: dict[str, float], world: int) -> str:
    """A line on the GPU memory that is left. Keys and values are not counted, because rollouts that
    don't fit are decoded in batches."""
    needed = sum(size for name, size in sizes.items() if not name.startswith(_CACHE)) / 2**20
    memory = torch.cuda.mem_get_info(dist.local_device())[1] / 2**20
    verdict = f"{memory - needed:,.1f} MiB are left for activations, keys and values"
    if needed > memory:
        verdict = (
            f"TOO LITTLE with {world} processes; use more GPUs, a higher ZeRO stage, offloading, "
            "--use_peft or a smaller model"
        )
    return f"{memory:>12,.1f} MiB  on this GPU: {verdict}"


def memory_estimate(
    blueprint: Blueprint, data: Data, policy: Policy, total: int, trainable: int
) -> dict[str, float]:
    """Estimated bytes per process, by purpose: weights, gradients and optimizer state as the ZeRO
    stage partitions them, and the keys and values of the largest rollout. Excludes activations,
    which depend on the images, and the memory of CUDA and its graphs.

    Args:
        total, trainable: numbers of parameters.
    """
    config, world, stage = blueprint.config, dist.world_size(), zero_stage(blueprint.ds_config)
    low = 2 if config.train.bf16 and config.train.deepspeed else 4
    masters = 4 if low == 2 else 0
    copies = 2 if blueprint.keeps_reference else 1
    weights = copies * total * low / (world if stage == 3 else 1)
    gradients = trainable * low / (world if stage >= 2 else 1)
    optimizer = trainable * (8 + masters) / (world if stage >= 1 else 1)
    zero: Row = (blueprint.ds_config or {}).get("zero_optimization", {})
    if _offloads(zero.get("offload_optimizer")):
        optimizer = 0
    if _offloads(zero.get("offload_param")):
        weights = 0
    copied = total * low if stage == 3 and algorithm_of(config).rolls_out(config) else 0
    tokens, how = rollout_tokens(config, data, dist.local_device())
    narrow = config.train.bf16 or config.model.dtype == "bfloat16"
    cache = tokens * cache_numbers(policy.config.get_text_config()) * (2 if narrow else 4)
    sizes = {
        "weights" + (" (with the reference)" if copies == 2 else ""): weights,
        "gradients": gradients,
        "optimizer state": optimizer,
        "copy of the whole weights for rollouts": copied,
        f"{_CACHE}, {tokens:,} tokens ({how})": cache,
    }
    return {name: size for name, size in sizes.items() if size}


def _offloads(block: Json) -> bool:
    """Whether a block of DeepSpeed's file offloads anything from the GPU."""
    return isinstance(block, dict) and block.get("device", "none") != "none"


def rollout_tokens(config: RunConfig, data: Data, device: torch.device) -> tuple[int, str]:
    """The most tokens whose keys and values a process holds at once, in a step or in the
    evaluation, and a note that explains the number."""
    grpo, world = config.grpo, dist.world_size()
    prompt = config.data.max_prompt_length or 1024
    batch = min(config.train.eval_batch_size, math.ceil(config.train.eval_samples / world))
    batches = [(data.prompts_per_step // world, grpo.num_generations), (batch, 1)]
    if not algorithm_of(config).rolls_out(config):
        return 0, "none"
    batches = batches if algorithm_of(config).draws else batches[1:]
    how = f"prompts of {prompt:,}"
    if grpo.rollout_backend == "hf":
        return max(b * g * (prompt + grpo.max_completion_length) for b, g in batches), how
    tokens = max(
        CachePlan.rounded(b, g, prompt, grpo.max_completion_length, device.type).num_tokens
        for b, g in batches
    )
    # The flag caps the cache. Without it, a GPU decodes in batches what doesn't fit.
    tokens = min(tokens, grpo.rollout_cache_tokens or tokens)
    graphs = device.type == "cuda" and (config.train.deepspeed or not config.train.bf16)
    if not graphs:
        return tokens, f"{how}; free while training"
    return tokens, f"{how}; kept while training, if below {KEPT_SHARE:.0%} of the GPU's memory"


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
