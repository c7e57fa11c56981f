"""Memory of the native rollout: how many tokens fit, and buffers that keep their addresses.

Shapes: B prompts, G completions each, P prompt and T completion tokens, both rounded up by
`CachePlan.rounded`; K key/value heads, E numbers per head.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from virft_fast.models.decode_step import Take
from virft_fast.models.families import TextConfig

# The completion cache is allocated and read in multiples of this many tokens: large enough to need
# few CUDA graphs, small enough to read little padding.
WIDTH_STEP = {"cpu": 32, "cuda": 128}
# The share of a GPU's free memory that keys and values may use.
CACHE_SHARE = 0.8
# Buffers up to this share of a GPU's total memory, and the graphs that use them, are kept for the
# next rollout. Larger buffers are freed for training, and the graphs must then be captured again.
# The value is a choice, not measured yet.
KEPT_SHARE = 0.1
# On CUDA a prompt's length is rounded up to a multiple of this, or of an eighth of the next power
# of two if that is more: about 20 lengths up to 4,096, so that later rollouts can reuse the graphs.
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
    """

    groups: int
    num_generations: int
    prompt_length: int
    completion_length: int

    @classmethod
    def rounded(
        cls,
        groups: int,
        num_generations: int,
        prompt_length: int,
        completion_length: int,
        device_type: str,
    ) -> CachePlan:
        """The plan for prompts and completions of at most these lengths, in tokens."""
        width = for_device(WIDTH_STEP, device_type)
        step = 1
        if device_type == "cuda":
            step = max(PROMPT_STEP, (1 << (prompt_length - 1).bit_length()) // 8)
        prompt_length = -(-prompt_length // step) * step
        return cls(groups, num_generations, prompt_length, -(-completion_length // width) * width)

    @property
    def num_tokens(self) -> int:
        return self.groups * (self.prompt_length + self.num_generations * self.completion_length)

    def check(self, limit: float, what: str) -> None:
        """Raise ValueError, its message starting with `what`, if this exceeds `limit` tokens."""
        if self.num_tokens > limit:
            raise ValueError(
                f"{what}: with {self.num_generations} completions it needs a cache of "
                f"{self.num_tokens:,} tokens ({self.prompt_length:,} + {self.num_generations} * "
                f"{self.completion_length:,}, as they are allocated), expected at most {limit:,}; "
                "lower --max_prompt_length, --num_generations or --max_completion_length, or raise "
                "--rollout_cache_tokens"
            )


def cache_numbers(text_config: TextConfig) -> int:
    """How many numbers one token's keys and values hold, over all layers."""
    heads = text_config.num_attention_heads
    size = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    return 2 * text_config.num_hidden_layers * text_config.num_key_value_heads * size


class Buffers:
    """Named memory that keeps its address between rollouts, and the CUDA graphs captured with it,
    which are valid only while the addresses are."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flat: dict[str, Tensor] = {}
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.pool: torch.cuda._POOL_HANDLE | None = None

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
            self.forget_graphs()  # they use the old addresses
            self._flat.pop(name, None)
            # Zeros, because even a masked key must not be NaN.
            flat = self._flat[name] = torch.zeros(count, dtype=dtype, device=self.device)
        return flat[:count].view(*shape)

    def forget_graphs(self) -> None:
        if self.graphs and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the last one may still be running
        self.graphs.clear()
        self.pool = None  # a pool without graphs can't be captured into again

    def release(self, *, keep_small: bool = False) -> None:
        """Free all memory and graphs; with `keep_small`, only if they exceed `KEPT_SHARE`."""
        limit = math.inf if keep_small else -1
        if keep_small and self.device.type == "cuda":
            limit = KEPT_SHARE * torch.cuda.get_device_properties(self.device).total_memory
        if self.num_bytes() > limit:
            self.forget_graphs()
            self._flat.clear()


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer.

    Attributes:
        prompt_keys, prompt_values: (B, K, P, E), one entry per prompt.
        keys, values: (B, K, G, T, E), one entry per completion.
    """

    prompt_keys: Tensor
    prompt_values: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(cls, plan: CachePlan, layer: int, value: Tensor, take: Take) -> LayerCache:
        """The cache of `layer`, in the dtype of `value`, a packed row's (1, K, S, E) values."""
        (_, heads, _, size), dtype = value.shape, value.dtype
        prompt = (plan.groups, heads, plan.prompt_length, size)
        own = (plan.groups, heads, plan.num_generations, plan.completion_length, size)
        names = {"prompt_keys": prompt, "prompt_values": prompt, "keys": own, "values": own}
        return cls(*(take(f"{name}{layer}", shape, dtype) for name, shape in names.items()))

    def select(self, groups: Tensor, rows: Tensor) -> LayerCache:
        """The cache of some groups (B',), and of some rows in each (B', G')."""
        prompts = (self.prompt_keys, self.prompt_values)
        if len(groups) < len(self.keys):  # else the prompts stay in place
            prompts = (select(self.prompt_keys, groups), select(self.prompt_values, groups))
        heads, _, length, size = self.keys.shape[1:]
        index = rows[:, None, :, None, None].expand(-1, heads, -1, length, size)
        own = (to_front(kv, kv[groups].gather(2, index)) for kv in (self.keys, self.values))
        return LayerCache(*prompts, *own)


def select(whole: Tensor, index: Tensor) -> Tensor:
    """`whole[index]`, moved to the start of the memory of `whole`."""
    return to_front(whole, whole[index])


def to_front(whole: Tensor, kept: Tensor) -> Tensor:
    """A copy of `kept` at the start of the memory of `whole`, where it must be contiguous."""
    memory = whole if whole._base is None else whole._base
    return memory.view(-1)[: kept.numel()].view(kept.shape).copy_(kept)
