"""Memory of the native rollout: how many tokens fit, and buffers that keep their addresses.

Shapes: B prompts, G completions each, P prompt and T completion tokens, both rounded up by
`CachePlan.rounded`; K key/value heads, E numbers per head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from virft_fast.models.decode_step import LayerCache, Take
from virft_fast.models.families import TextConfig
from virft_fast.models.recurrent import RecurrentCache
from virft_fast.models.shared_prefix import attention_layers
from virft_fast.rollout.graphs import Graphs

# The completion cache is allocated in multiples of this many tokens.
WIDTH_STEP = {"cpu": 16, "cuda": 128}
# The share of a GPU's free memory that keys and values may use.
CACHE_SHARE = 0.8
# Buffers up to this share of a GPU's total memory, and the graphs that use them, are kept for the
# next rollout. Larger buffers are freed for training, and the graphs must then be captured again.
# The value is a choice, not measured yet.
KEPT_SHARE = 0.1
# On CUDA a prompt's length is rounded up to this, or to the next of 1,536, 2,048, 3,072, 4,096, ...
# So few graphs serve all prompts, and memory seldom has to move. The value is not measured yet.
PROMPT_LENGTH = 1_024
# If that exceeds the limit on the cache, it is rounded up to a multiple of this.
PROMPT_STEP = 64


def for_device(settings: dict[str, int], device_type: str) -> int:
    """The setting for a device type; types without one use the CPU's."""
    return settings.get(device_type, settings["cpu"])


@dataclass(frozen=True)
class CachePlan:
    """The allocated size of the keys and values for groups that are decoded together.

    Attributes:
        groups: B. num_generations: G.
        prompt_length: P. completion_length: T.
        state: the memory of a completion's recurrent states, in tokens; see `state_tokens`.
    """

    groups: int
    num_generations: int
    prompt_length: int
    completion_length: int
    state: int = 0

    @classmethod
    def rounded(
        cls,
        groups: int,
        num_generations: int,
        prompt_length: int,
        completion_length: int,
        device_type: str,
        limit: float = math.inf,
        *,
        extra: int = 0,
        state: int = 0,
    ) -> CachePlan:
        """The plan for prompts and completions of at most these lengths, in tokens.

        Args:
            limit: on the plan's tokens; if they exceed it, the prompts are rounded up less.
            extra: tokens that a pass may read after a completion's end, because they are guesses.
            state: see `CachePlan`.
        """
        width = for_device(WIDTH_STEP, device_type)
        rounded = -(-completion_length // width) * width
        completion_length = max(rounded, completion_length + extra)
        if device_type != "cuda":
            return cls(groups, num_generations, prompt_length, completion_length, state)
        size = max(PROMPT_LENGTH, bucket(prompt_length))
        plan = cls(groups, num_generations, size, completion_length, state)
        if plan.num_tokens <= limit:
            return plan
        return replace(plan, prompt_length=-(-prompt_length // PROMPT_STEP) * PROMPT_STEP)

    @property
    def num_tokens(self) -> int:
        own = self.completion_length + self.state
        return self.groups * (self.prompt_length + self.num_generations * own)

    def check(self, limit: float, what: str) -> None:
        """Raise ValueError, its message starting with `what`, if this exceeds `limit` tokens."""
        if self.num_tokens > limit:
            own = self.completion_length + self.state
            raise ValueError(
                f"{what}: with {self.num_generations} completions it needs a cache of "
                f"{self.num_tokens:,} tokens ({self.prompt_length:,} + {self.num_generations} * "
                f"{own:,}, as they are allocated), expected at most {limit:,}; lower "
                "--max_prompt_length, --num_generations or --max_completion_length, or raise "
                "--rollout_cache_tokens"
            )


def cache_numbers(text_config: TextConfig) -> int:
    """How many numbers one token's keys and values hold, over all layers."""
    heads = text_config.num_attention_heads
    size = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    return 2 * len(attention_layers(text_config)) * text_config.num_key_value_heads * size


def state_tokens(text_config: TextConfig, itemsize: int) -> int:
    """The memory of a completion's recurrent states, as a number of tokens whose keys and values,
    of `itemsize` bytes a number, take as much."""
    config: Any = text_config
    layers = config.num_hidden_layers - len(attention_layers(config))
    if not layers:
        return 0
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    window = (2 * keys + values) * (config.linear_conv_kernel_dim - 1) * itemsize
    size = layers * (4 * values * config.linear_key_head_dim + window)
    return math.ceil(size / (itemsize * cache_numbers(config)))


class Buffers:
    """Named memory that keeps its address between rollouts, and the CUDA graphs that use it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flat: dict[str, Tensor] = {}
        self.graphs = Graphs(device)

    def num_bytes(self) -> int:
        return sum(flat.numel() * flat.element_size() for flat in self._flat.values())

    def capacity(self, token_bytes: int) -> float:
        """How many tokens a cache may hold if each takes `token_bytes`; infinity on a CPU."""
        if self.device.type != "cuda":
            return math.inf
        free, _ = torch.cuda.mem_get_info(self.device)
        # Memory that torch reserved but doesn't use is free, too, and so are these buffers.
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(CACHE_SHARE * (free + self.num_bytes()) / token_bytes)

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor at the start of the memory called `name`."""
        count = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < count or flat.dtype != dtype:
            self.graphs.clear()  # they use the old addresses
            self._flat.pop(name, None)
            # Zeros, because even a masked key must not be NaN.
            flat = self._flat[name] = torch.zeros(count, dtype=dtype, device=self.device)
        return flat[:count].view(*shape)

    def release(self, *, keep_small: bool = False) -> None:
        """Free all memory and graphs; with `keep_small`, only if they exceed `KEPT_SHARE`."""
        limit = math.inf if keep_small else -1
        if keep_small and self.device.type == "cuda":
            limit = KEPT_SHARE * torch.cuda.get_device_properties(self.device).total_memory
        if self.num_bytes() > limit:
            self.graphs.clear()
            self._flat.clear()


def allocate_layer(plan: CachePlan, layer: int, value: Tensor, take: Take) -> LayerCache:
    """The cache of `layer`, in the dtype of `value`, a packed row's (1, K, S, E) values."""
    (_, heads, _, size), dtype = value.shape, value.dtype
    prompt = (plan.groups, heads, plan.prompt_length, size)
    own = (plan.groups * plan.num_generations, heads, plan.completion_length, size)
    names = {"prompt_keys": prompt, "prompt_values": prompt, "keys": own, "values": own}
    return LayerCache(*(take(f"{name}{layer}", shape, dtype) for name, shape in names.items()))


def store_states(
    plan: CachePlan, layer: int, inputs: Tensor, states: Tensor, first: int, take: Take
) -> RecurrentCache:
    """The cache of a recurrent layer, after it has been filled for all completions of some prompts.

    Args:
        inputs, states: as `recurrent.Keep` gets them. first: the number of their first prompt.
    """
    size, rows = plan.num_generations, plan.groups * plan.num_generations
    cache = RecurrentCache(
        take(f"inputs{layer}", (rows, *inputs.shape[1:]), inputs.dtype),
        take(f"states{layer}", (rows, *states.shape[1:]), states.dtype),
    )
    place = slice(first * size, (first + len(states)) * size)
    cache.inputs[place] = inputs.repeat_interleave(size, 0)
    cache.states[place] = states.repeat_interleave(size, 0)
    return cache


def select_rows(
    cache: LayerCache | RecurrentCache, rows: Tensor, prompts: Tensor | None, used: int
) -> LayerCache | RecurrentCache:
    """The cache of some rows, at the start of the same memory.

    Args:
        rows: (R',) int64. prompts: (B',) int64, or None to leave all prompts in place.
        used: how many of a row's tokens are copied at most.
    """
    if isinstance(cache, RecurrentCache):
        return RecurrentCache(select(cache.inputs, rows), select(cache.states, rows))
    kept = [cache.prompt_keys, cache.prompt_values]
    if prompts is not None:
        kept = [select(whole, prompts) for whole in kept]
    for whole in (cache.keys, cache.values):
        kept.append(whole[: len(rows)])
        kept[-1][:, :, :used] = whole[rows, :, :used]
    return LayerCache(*kept)


def select(whole: Tensor, index: Tensor) -> Tensor:
    """`whole[index]`, moved to the start of the memory of `whole`."""
    return whole[: len(index)].copy_(whole[index])


def bucket(count: int) -> int:
    """`count` rounded up to 1, 2, 3, 4, 6, 8, 12, 16, ...: fewer sizes need fewer graphs."""
    power = 1 << (count - 1).bit_length()
    return 3 * power // 4 if count <= 3 * power // 4 else power
