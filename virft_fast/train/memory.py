"""Estimates how much memory a run needs, by formula, and how large a microbatch may be.

Activations are what a pass keeps for its backward pass, plus the gradients that exist at one time.
`tests/test_memory.py` compares the formula with counted bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from virft_fast import dist
from virft_fast.algorithms import algorithm_of
from virft_fast.algorithms.base import Data
from virft_fast.batch import Prompt, Row
from virft_fast.config import RunConfig
from virft_fast.deepspeed_config import offloads, zero_stage
from virft_fast.kernels.linear import MAX_TILE_ROWS, TILE_ELEMENTS
from virft_fast.kernels.prefix_attention import MAX_HEAD_SIZE
from virft_fast.kernels.speculation import MAX_READ
from virft_fast.models.families import TextConfig, family_of
from virft_fast.models.qwen_vl import Policy
from virft_fast.models.shared_prefix import attention_layers, core_kind
from virft_fast.optimizer import EIGHT_BIT
from virft_fast.rollout.cache import KEPT_SHARE, CachePlan, cache_numbers, state_tokens
from virft_fast.rollout.speculation import pool_bytes
from virft_fast.train.model import Blueprint, training_dtype

_CACHE = "keys and values of a rollout"
MARGIN = 0.1  # of a GPU, for CUDA itself and fragmentation: a rule of thumb, not measured
QUANTIZED = 1 / 2 + 4 / 64  # bytes of a number in 4 bits, with its share of a float32 scale
MOST_TOKENS, TOKEN_STEP = 16_384, 1024  # of a microbatch that `fitting_tokens` chooses
PROMPT_LENGTH = 1024  # where no flag limits it
# Tensors of the MLP's width that a block of the vision tower keeps.
_TOWER_MLP = {"qwen2_vl": 3, "qwen2_5_vl": 4}  # of the others 2


@dataclass(frozen=True)
class Load:
    """What one training pass reads.

    Attributes:
        tokens: of the packed row, or of all rows.
        joined: tokens whose keys are copied, so that each completion's lie behind its prompt's.
        completions: tokens of the completions.
        patches: of the images.
    """

    tokens: float
    joined: float
    completions: float
    patches: float


@dataclass(frozen=True)
class Precision:
    """The bytes of a pass's numbers.

    Attributes:
        width: of an activation. residual: of a number between two layers.
    """

    width: int
    residual: int

    @property
    def autocast(self) -> bool:
        return self.width < self.residual

    def rms_norms(self, readers: int) -> int:
        """Bytes that a layer's two RMSNorms keep per number. Under autocast, each of the linear
        layers that read their outputs keeps a cast of its own."""
        return 2 * 8 + readers * self.width if self.autocast else 2 * (4 + 2 * self.width)


def precision_of(config: RunConfig) -> Precision:
    weights = training_dtype(config).itemsize
    return Precision(2 if config.train.bf16 and not config.train.deepspeed else weights, weights)


def load_of(config: RunConfig, policy: Policy, tokens: float | None, patches: int) -> Load:
    """A microbatch of prompts and completions of the largest lengths.

    Args:
        tokens: most tokens of the microbatch, which has no more prompts than a step; None: as many
            as the flags say.
        patches: of one prompt's images.
    """
    algorithm, length = algorithm_of(config), config.grpo.max_completion_length
    given = 2 if algorithm.preferences else 1
    num = config.grpo.num_generations if algorithm.draws else given
    prompt = config.data.max_prompt_length or PROMPT_LENGTH
    joined = num * (prompt + length)
    group = prompt + num * length if policy.shares_prefix else joined
    size, steps = config.train.per_device_train_batch_size, config.train.gradient_accumulation_steps
    tokens = tokens or config.train.max_tokens_per_microbatch or size * group
    groups = min(tokens / group, size * steps)
    joined = joined if policy.shares_prefix else 0
    return Load(group * groups, joined * groups, num * length * groups, patches * max(1, groups))


def activation_bytes(
    config: RunConfig, policy: Policy, load: Load, device: torch.device
) -> dict[str, float]:
    """Bytes of a training pass that are not the model's, its gradients' or the optimizer's."""
    precision = precision_of(config)
    recomputed = config.model.gradient_checkpointing, config.model.offload_activations
    language = _language_bytes(policy, load, precision, *recomputed, device)
    is_qwen = family_of(policy.config.model_type).is_qwen
    known = "" if is_qwen else ", not estimated for this family"
    counted = is_qwen and not policy.vision_frozen
    tower = _tower_bytes(policy, load, precision, *recomputed) if counted else 0.0
    return {
        f"activations of the language model, {load.tokens:,.0f} tokens": language,
        f"activations of the vision tower, {load.patches:,.0f} patches{known}": tower,
        "logits and the gradient of the head": _head_bytes(config, policy, load, device),
    }


def _language_bytes(
    policy: Policy,
    load: Load,
    precision: Precision,
    checkpointing: bool,
    offload: bool,
    device: torch.device,
) -> float:
    text: Any = policy.config.get_text_config()
    depth, dim, width = text.num_hidden_layers, text.hidden_size, precision.width
    full, read, inner = len(attention_layers(text)), 0, getattr(text, "intermediate_size", 0)
    if hasattr(text, "num_experts"):
        read = text.num_experts_per_tok
        inner = read * text.moe_intermediate_size
        inner += getattr(text, "shared_expert_intermediate_size", 0)
    keys_values = cache_numbers(text) // full
    keys = keys_values // 2
    heads = keys // text.num_key_value_heads * text.num_attention_heads
    masked = family_of(policy.config.model_type).image_blocks
    large = keys // text.num_key_value_heads > MAX_HEAD_SIZE
    kind = "two_part" if masked or large else core_kind(policy.prefix_attention, device)
    fused = policy.shares_prefix and kind == "fused"
    # The norms and the MLP, and for each expert that a token visits, its inputs and outputs.
    shared = precision.rms_norms(readers=5) * dim + width * (4 * inner + 3 * read * dim)
    # Queries and attention's output, which two_part keeps as its parts and whole.
    token = shared + width * (3 - fused) * heads
    token += 4 * text.num_attention_heads  # the log-sum-exp of attention
    if policy.config.model_type not in ("qwen2_vl", "qwen2_5_vl"):  # norms of queries and keys
        token += (heads + keys) * (4 + width)
    # See `prefix_attention.for_query_heads`. The fused kernel reads the row where it is.
    copied = not policy.shares_prefix or (
        device.type == "cuda" and (width == 4 or masked) and not fused
    )
    attended = width * (2 * heads if copied else keys_values)
    layer = load.tokens * token + (load.tokens + (0 if fused else load.joined)) * attended
    kept = full * layer
    if full < depth:  # the gate of attention, and the other layers
        other = load.tokens * (shared + _recurrent_bytes(text, width))
        layer += 3 * width * heads * load.tokens
        kept, layer = full * layer + (depth - full) * other, max(layer, other)
    if checkpointing:
        kept = layer + (0 if offload else depth * load.tokens * dim * precision.residual)
    # The last norm, and the gradients that exist at one time.
    return kept + load.tokens * ((4 + 2 * width) * dim + width * (inner + 6 * dim))


def _widths(text: Any) -> tuple[int, int]:
    """Channels of a gated DeltaNet's convolution, and numbers of its values."""
    values = text.linear_num_value_heads * text.linear_value_head_dim
    return 2 * text.linear_num_key_heads * text.linear_key_head_dim + values, values


def _recurrent_bytes(text: Any, width: int) -> float:
    """What a layer of gated DeltaNet keeps for each token, by transformers' torch functions;
    flash-linear-attention keeps less. The factors are a fit to counted bytes."""
    key, value = text.linear_key_head_dim, text.linear_value_head_dim
    channels, values = _widths(text)
    rule = 9 * key + 7 * value + 6 * 64 + key * value / 64  # float32, in chunks of 64 tokens
    mixing = 2 * text.hidden_size + 3 * channels + 2 * values
    return width * mixing + 4 * text.linear_num_value_heads * rule


def _tower_bytes(
    policy: Policy, load: Load, precision: Precision, checkpointing: bool, offload: bool
) -> float:
    vision: Any = policy.config.vision_config
    family, width = policy.config.model_type, precision.width
    if family == "qwen2_vl":  # where hidden_size is the language model's
        dim, inner = vision.embed_dim, vision.embed_dim * vision.mlp_ratio
    else:
        dim, inner = vision.hidden_size, vision.intermediate_size
    norms = 2 * (precision.residual + width)
    if family == "qwen2_5_vl":
        norms = precision.rms_norms(readers=3)
    # Queries, keys and values before their rotation, queries and keys after it, and two outputs.
    block = load.patches * (dim * (norms + 7 * width) + _TOWER_MLP.get(family, 2) * inner * width)
    kept = vision.depth * block + load.patches * 8 * dim * width  # with the merger
    if checkpointing:
        inputs = 0 if offload else vision.depth * load.patches * dim * precision.residual
        kept = block + inputs
    return kept + load.patches * width * (inner + 6 * dim)


def _head_bytes(config: RunConfig, policy: Policy, load: Load, device: torch.device) -> float:
    """Of `kernels.linear`: hidden states and their gradient, a tile of logits and its gradient in
    16 bits, and the gradient of the weight in float32 and as it is stored."""
    text, precision = policy.config.get_text_config(), precision_of(config)
    numbers = 0 if config.model.use_peft else text.vocab_size * text.hidden_size
    rows = load.completions
    if config.grpo.loss_impl == "fused":
        tile = TILE_ELEMENTS.get(device.type, TILE_ELEMENTS["cpu"])
        rows = min(rows, MAX_TILE_ROWS, tile // text.vocab_size)
    gradient = 2 if precision.width == 2 else 0  # in float32, it overwrites the logits
    logits = rows * text.vocab_size * (4 + gradient)
    hidden = load.completions * text.hidden_size * (4 + 2 * precision.residual)
    return hidden + numbers * 4 + max(logits, numbers * precision.residual)


def fitting_tokens(
    blueprint: Blueprint, data: Data, policy: Policy, patches: int, free: float
) -> int:
    """The most tokens of a microbatch whose activations fit, at most `MOST_TOKENS`.

    A multiple of `TOKEN_STEP`, so that small differences in free memory change nothing; at least
    one `TOKEN_STEP`, even if that doesn't fit.

    Args:
        policy: with or without weights, but not divided by ZeRO-3.
        patches: of one prompt's images.
        free: bytes of the GPU that are free before the model is loaded.
    """
    total = sum(p.numel() for p in policy.parameters())
    trainable = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    sizes = memory_estimate(blueprint, data, policy, total, trainable)
    needed, config = needed_beside_cache(sizes), blueprint.config
    # A small cache is kept while training; see `cache.KEPT_SHARE`.
    room = (1 - MARGIN) * free - needed - min(sum(sizes.values()) - needed, KEPT_SHARE * free)
    prompts = data.prompts_per_step // dist.world_size()
    shortest = (config.data.max_prompt_length or PROMPT_LENGTH) + config.grpo.num_generations

    def fits(tokens: int) -> bool:
        # Short completions leave room for more prompts, and so for more images.
        images = min(prompts, max(1.0, tokens / shortest))
        load = replace(load_of(config, policy, tokens, 0), patches=patches * images)
        return sum(activation_bytes(config, policy, load, dist.local_device()).values()) <= room

    choices = range(MOST_TOKENS, TOKEN_STEP, -TOKEN_STEP)
    return next((tokens for tokens in choices if fits(tokens)), TOKEN_STEP)


def image_patches(prompt: Prompt) -> int:
    """How many patches the images of a prompt have."""
    return 0 if prompt.image_grid_thw is None else int(prompt.image_grid_thw.prod(1).sum())


def needed_beside_cache(sizes: dict[str, float]) -> float:
    """The sum of `memory_estimate` without a rollout's keys and values."""
    return sum(size for name, size in sizes.items() if not name.startswith(_CACHE))


def memory_estimate(
    blueprint: Blueprint, data: Data, policy: Policy, total: int, trainable: int
) -> dict[str, float]:
    """Estimated bytes per process, by purpose: weights, gradients and optimizer state as the ZeRO
    stage partitions them, and the keys and values of the largest rollout. Excludes the memory of
    CUDA and its graphs, and activations, which `activation_bytes` estimates.

    Args:
        total, trainable: numbers of parameters.
    """
    config, world, stage = blueprint.config, dist.world_size(), zero_stage(blueprint.ds_config)
    low = training_dtype(config).itemsize
    masters = 4 if config.train.bf16 and config.train.deepspeed else 0
    copies = 2 if blueprint.keeps_reference else 1
    quantized, matrix = _linear_numbers(policy) if config.model.load_in_4bit else (0, 0)
    trained = 4 if quantized else low  # then only the adapter, in float32
    model = total * low + trainable * (trained - low) - quantized * (low - QUANTIZED)
    weights = copies * model / (world if stage == 3 else 1)
    gradients = trainable * trained / (world if stage >= 2 else 1)
    # Beside 8 bits, a float32 scale for each 256 numbers of both moments.
    moments = 2 + 2 * 4 / 256 if config.train.optim in EIGHT_BIT else 8
    optimizer = trainable * (moments + masters) / (world if stage >= 1 else 1)
    if offloads(blueprint.ds_config, "offload_optimizer"):
        optimizer = 0
    if offloads(blueprint.ds_config, "offload_param"):
        weights = 0
    device, autocast = dist.local_device(), precision_of(config).autocast
    text = policy.config.get_text_config()
    width = 2 if config.train.bf16 or config.model.dtype == "bfloat16" else 4
    tokens, how = rollout_tokens(config, data, text, width, device)
    guesses = max(
        (pool_bytes(b, g, prompt_tokens(config), config.grpo.max_completion_length)
         for b, g in rollout_batches(config, data) if _guesses(config, text)),
        default=0,
    )  # fmt: skip
    on_copy = bool(config.train.deepspeed) or autocast or config.model.use_peft
    copied = stage == 3 or (device.type == "cuda" and on_copy)
    copied &= algorithm_of(config).rolls_out(config) and not config.grpo.offload_rollout_weights
    copied &= not quantized
    cache = tokens * cache_numbers(text) * width
    casts = 2 * (total - quantized) if autocast else 0
    sizes = {
        "weights" + (" (with the reference)" if copies == 2 else ""): weights,
        "gradients": gradients,
        "optimizer state": optimizer,
        "copy of the whole weights for rollouts": copied * total * (2 if autocast else low),
        "copies of the weights in bfloat16 while training": casts,
        "tokens of earlier answers, to guess from": guesses,
        "the largest 4-bit matrix while a product reads it": matrix * low,
        f"{_CACHE}, {tokens:,} tokens ({how})": cache,
    }
    return {name: size for name, size in sizes.items() if size}


def prompt_tokens(config: RunConfig) -> int:
    """Of the longest prompt that the flags allow, or of a typical one."""
    return config.data.max_prompt_length or PROMPT_LENGTH


def rollout_batches(config: RunConfig, data: Data) -> list[tuple[int, int]]:
    """Prompts of a process, and completions of each, in a step and in the evaluation."""
    algorithm, train, world = algorithm_of(config), config.train, dist.world_size()
    if not algorithm.rolls_out(config):
        return []
    evaluation = min(train.eval_batch_size, math.ceil(train.eval_samples / world)), 1
    step = data.prompts_per_step // world, config.grpo.num_generations
    return [step, evaluation] if algorithm.draws else [evaluation]


def _linear_numbers(policy: Policy) -> tuple[int, int]:
    """Numbers in the linear layers that --load_in_4bit quantizes: in all, and in the largest."""
    text: Any = policy.config.get_text_config()
    dim, depth = text.hidden_size, text.num_hidden_layers
    inner = getattr(text, "shared_expert_intermediate_size", None)  # not in the other experts
    if inner is None:
        inner = 0 if hasattr(text, "num_experts") else text.intermediate_size
    full = len(attention_layers(text))
    keys_values = cache_numbers(text) // full
    heads = keys_values // 2 // text.num_key_value_heads * text.num_attention_heads
    queries = heads if full == depth else 2 * heads  # Qwen3.5's have a gate beside them
    numbers, largest = full * (heads + queries + keys_values), max(inner, queries)
    if full < depth:
        channels, values = _widths(text)
        numbers += (depth - full) * (channels + 2 * values + 2 * text.linear_num_value_heads)
        largest = max(largest, channels)
    return dim * (numbers + 3 * depth * inner), dim * largest


def _guesses(config: RunConfig, text: TextConfig) -> bool:
    return config.grpo.speculates and len(attention_layers(text)) == text.num_hidden_layers


def rollout_tokens(
    config: RunConfig, data: Data, text: TextConfig, width: int, device: torch.device
) -> tuple[int, str]:
    """The most tokens whose keys and values a process holds at once, in a step or in the
    evaluation, and a note that explains the number.

    Args:
        width: bytes of a number in the cache.
    """
    grpo, prompt = config.grpo, prompt_tokens(config)
    batches = rollout_batches(config, data)
    if not batches:
        return 0, "none"
    how = f"prompts of {prompt:,}"
    if grpo.rollout_backend == "hf":
        return max(b * g * (prompt + grpo.max_completion_length) for b, g in batches), how
    lengths = (prompt, grpo.max_completion_length)
    options: Row = {
        "extra": MAX_READ * _guesses(config, text),
        "state": state_tokens(text, width),
    }
    plans = [CachePlan.rounded(*batch, *lengths, device.type, **options) for batch in batches]
    tokens = max(plan.num_tokens for plan in plans)
    # The flag caps the cache. Without it, a GPU decodes in batches what doesn't fit.
    tokens = min(tokens, grpo.rollout_cache_tokens or tokens)
    if device.type != "cuda":
        return tokens, f"{how}; free while training"
    return tokens, f"{how}; kept while training, if below {KEPT_SHARE:.0%} of the GPU's memory"
