"""Reads a prompt once for all its completions, with packed rows and attention within them.

A packed row holds whole groups, [prompt | completion 1 | ... | completion G | next prompt | ...].
Every completion attends to its prompt and to itself, and its rotary positions continue from the
prompt's. The transformers model's code is unchanged: its attention interface calls `attend`, which
passes the row to the core given with the call.

Shapes: S tokens of the row, H query heads, K key/value heads, E numbers per head, G completions of
a group, P prompt tokens, C completion tokens that the model reads: all but the last, which predicts
nothing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional as F

from virft_fast.devices import to_device

if TYPE_CHECKING:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel as TextModel

_PREFIX = "shared_prefix_"
# (query (H, S, E), key (K, S, E), value (K, S, E), scaling) -> (S, H, E)
Core = Callable[[Tensor, Tensor, Tensor, float], Tensor]
Padding = tuple[Tensor, Tensor] | None  # see `_padding`


@dataclass(frozen=True)
class Group:
    """The position of a prompt and its completions in the packed row.

    Attributes:
        start: position of the prompt's first token.
        prompt_length: P.
        lengths: C of each completion, in order after the prompt; 0 is allowed.
    """

    start: int
    prompt_length: int
    lengths: tuple[int, ...]

    @property
    def first(self) -> int:
        """Position of the first completion token."""
        return self.start + self.prompt_length

    @property
    def end(self) -> int:
        return self.first + sum(self.lengths)


def install(language_model: TextModel) -> str | None:
    """Route the attention of transformers' language model through `attend`, in place.

    Calls without a core give the same results as before.

    Returns:
        None, or the reason why its attention can't be replaced.
    """
    reason, config = unreachable(language_model), language_model.config
    if reason is None and not config._attn_implementation.startswith(_PREFIX):
        config._attn_implementation = _register(config._attn_implementation)
    return reason


def unreachable(language_model: TextModel) -> str | None:
    """The reason why prompts can't be shared in this model; None if they can."""
    config = language_model.config
    if not getattr(language_model, "_supports_attention_backend", False):
        return f"{type(language_model).__name__} has its attention built in"
    if dropout := getattr(config, "attention_dropout", 0.0):
        return f"attention_dropout is {dropout}, and two passes would differ"
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if others:
        return f"it has layers of another kind than full attention: {', '.join(sorted(others))}"
    return None


@functools.cache
def _register(inner: str) -> str:
    """Register `attend` with transformers; returns a name that contains the fallback's, `inner`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = _PREFIX + inner
    AttentionInterface.register(name, functools.partial(attend, inner))
    if inner in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    return name


def attend(
    inner: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    attention_core: Callable[..., Tensor] | None = None,
    **options: object,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface. Calls the core, or `inner` if there is no core."""
    if attention_core is not None:
        return attention_core(module.layer_idx, query, key, value, scaling), None
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(inner, eager)
    if query.dtype == value.dtype:  # else autocast will narrow them to 16 bits
        key, value = _for_query_heads(query, key, value)
    # The flash functions choose their kernel by the attention name in the configuration.
    config = _View(module.config, _attn_implementation=inner)
    view = _View(module, config=config, num_key_value_groups=query.shape[1] // key.shape[1])
    return function(view, query, key, value, attention_mask, scaling=scaling, **options)


class _View:
    """A view of an object with some attributes replaced."""

    def __init__(self, whole: object, **attributes: object) -> None:
        self._whole = whole
        vars(self).update(attributes)

    def __getattr__(self, name: str) -> object:
        return getattr(self._whole, name)


def read(model: TextModel, embeds: Tensor, positions: Tensor, **options: object) -> Tensor:
    """(R, L, D) last hidden states for embeddings (R, L, D) at rotary positions (3, R, L).

    Args:
        options: passed to transformers' model. Without an `attention_mask`, `attention_core` is
            required.
    """
    if options.get("attention_mask") is None:
        # Four dimensions, so that transformers doesn't build its own mask.
        options["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds.device)
    options |= {"inputs_embeds": embeds, "position_ids": positions, "use_cache": False}
    return model(**options).last_hidden_state


class PackedAttention:
    """The core of one packed row.

    Args:
        groups: the row's groups, in order and without gaps.
        kind: "two_part", "flex" or "dense".
    """

    def __init__(self, groups: Sequence[Group], device: torch.device, kind: str = "two_part"):
        self.groups = tuple(groups)
        self.device = device
        self.layers: set[int] = set()
        cores: dict[str, Callable[[tuple[Group, ...], torch.device], Core]]
        cores = {"two_part": _TwoPart, "flex": _Flex, "dense": _Dense}
        self._core = cores[kind](self.groups, device)

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """(1, H, S, E), (1, K, S, E), (1, K, S, E) -> (1, S, H, E)."""
        self.layers.add(layer)
        # Under autocast, the rotation returns float32, but CausalBias requires equal dtypes.
        query, key = query.to(value.dtype), key.to(value.dtype)
        return self._core(query[0], key[0], value[0], scaling)[None]

    def check(self, num_layers: int) -> None:
        """Raise RuntimeError if a layer bypassed this core."""
        if len(self.layers) < num_layers:
            raise RuntimeError(
                f"expected {num_layers} layers to share the prompt, {len(self.layers)} did; pass "
                "--prefix_sharing off for this model"
            )


class _TwoPart:
    """Two dense calls per group: the prompt over itself, the completions over prompt and
    themselves.

    Completions are padded to the longest. The padding comes last, so the causal mask hides it.
    """

    def __init__(self, groups: tuple[Group, ...], device: torch.device) -> None:
        self.groups = groups
        self.padding = [_padding(group, device) for group in groups]
        self.masks = [_suffix_mask(group, device) for group in groups]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        both = _for_query_heads(query[None], key[None], value[None])
        key, value = (states[0] for states in both)
        outputs = []
        for group, padding, mask in zip(self.groups, self.padding, self.masks, strict=True):
            prompt = slice(group.start, group.first)
            outputs.append(_causal(query[:, prompt], key[:, prompt], value[:, prompt], scaling))
            if group.end > group.first:
                outputs.append(self._suffix(group, padding, mask, (query, key, value), scaling))
        return torch.cat(outputs)

    @staticmethod
    def _suffix(
        group: Group, padding: Padding, mask: Tensor, states: tuple[Tensor, ...], scaling: float
    ) -> Tensor:
        """(sum of C, H, E) outputs of a group's completion tokens."""
        query, key, value = states
        num, longest = len(group.lengths), max(group.lengths)
        suffix, prompt = slice(group.first, group.end), slice(group.start, group.first)

        def batched(states: Tensor) -> Tensor:  # (H, S, E) -> (G, H, longest C, E)
            states = states[:, suffix]
            if padding is not None:
                states = states.index_select(1, padding[0])
            return states.unflatten(1, (num, longest)).transpose(0, 1)

        def with_prompt(states: Tensor) -> Tensor:  # -> (G, H, P + longest C, E)
            shared = states[:, prompt].expand(num, -1, -1, -1)
            return torch.cat([shared, batched(states)], 2)

        keys, values, gqa = with_prompt(key), with_prompt(value), len(query) != len(key)
        out = F.scaled_dot_product_attention(
            batched(query), keys, values, attn_mask=mask, scale=scaling, enable_gqa=gqa
        )
        out = out.transpose(1, 2).flatten(0, 1)  # (G * longest C, H, E)
        return out if padding is None else out.index_select(0, padding[1])


def _for_query_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K, S, E) keys and values as they are, or copied for each of the H query heads.

    Of torch's fused kernels on CUDA, only flash attention shares keys among query heads, and it
    takes 16-bit numbers only. With shared keys, other numbers would go to the unfused kernel.
    """
    options = (None, 0.0, False, True)  # no mask or dropout; not causal; with shared keys
    if query.is_cuda and not can_use_flash_attention(SDPAParams(query, key, value, *options)):
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return key, value


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention: (H, n, E) queries, (H or K, n, E) keys and values -> (n, H, E)."""
    gqa = len(query) != len(key)
    out = F.scaled_dot_product_attention(
        query[None], key[None], value[None], is_causal=True, scale=scaling, enable_gqa=gqa
    )
    return out[0].transpose(0, 1)


def _padding(group: Group, device: torch.device) -> Padding:
    """Indices that pad a group's completions to the longest, and indices that undo it; None if all
    have the same length."""
    lengths = torch.tensor(group.lengths)
    if not len(lengths) or bool((lengths == lengths[0]).all()):
        return None
    longest = int(lengths.max())
    real = torch.arange(longest) < lengths[:, None]  # (G, longest)
    index = torch.zeros(real.shape, dtype=torch.long)
    index[real] = torch.arange(int(lengths.sum()))
    places = (index.flatten(), real.flatten().nonzero()[:, 0])
    return to_device(places[0], device), to_device(places[1], device)


def _suffix_mask(group: Group, device: torch.device) -> Tensor:
    """(longest C, P + longest C) mask: all of the prompt, and the completion causally."""
    longest = max(group.lengths, default=0)
    if device.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right

        # The same mask in a form that the flash kernels accept.
        return causal_lower_right(longest, group.prompt_length + longest)
    mask = torch.ones(longest, group.prompt_length + longest, dtype=torch.bool, device=device)
    return mask.tril(group.prompt_length)


def _segments(groups: tuple[Group, ...], length: int, device: torch.device) -> tuple[Tensor, ...]:
    """Two (length,) int32 tensors for each position: the index of its group, -1 after the last
    group; and the number of its completion, from 1, or 0 in a prompt."""
    group_of = torch.full((length,), -1, dtype=torch.int32)
    sequence = torch.zeros(length, dtype=torch.int32)
    for number, group in enumerate(groups):
        group_of[group.start : group.end] = number
        lengths = torch.tensor(group.lengths, dtype=torch.long)
        names = torch.arange(1, len(lengths) + 1, dtype=torch.int32)
        sequence[group.first : group.end] = names.repeat_interleave(lengths)
    return to_device(group_of, device), to_device(sequence, device)


class _Dense:
    """One call with the (S, S) mask: the simplest core, against which the others are tested."""

    def __init__(self, groups: tuple[Group, ...], device: torch.device) -> None:
        length = groups[-1].end if groups else 0
        group_of, sequence = _segments(groups, length, device)
        own = (sequence[None] == 0) | (sequence[:, None] == sequence[None])
        self.mask = ((group_of[:, None] == group_of[None]) & own).tril()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        repeats = query.shape[0] // key.shape[0]
        key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
        out = F.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=self.mask, scale=scaling
        )
        return out[0].transpose(0, 1)


class _Flex:
    """FlexAttention, which skips the empty blocks of the (S, S) mask."""

    BLOCK = 128

    def __init__(self, groups: tuple[Group, ...], device: torch.device) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        self.length = groups[-1].end if groups else 0
        # Padded to whole blocks, so that one compiled kernel serves every length.
        self.padded = -(-self.length // self.BLOCK) * self.BLOCK
        group_of, sequence = _segments(groups, self.padded, device)

        def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            own = (sequence[k] == 0) | (sequence[q] == sequence[k])
            return (q >= k) & (group_of[q] == group_of[k]) & own

        self.mask = create_block_mask(
            visible, None, None, self.padded, self.padded, device=device, BLOCK_SIZE=self.BLOCK
        )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        pad = (0, 0, 0, self.padded - self.length)
        query, key, value = (F.pad(states, pad)[None] for states in (query, key, value))
        out = _flex_attention(query.device.type)(
            query, key, value, block_mask=self.mask, scale=scaling, enable_gqa=True
        )
        return out[0, :, : self.length].transpose(0, 1)


@functools.cache
def _flex_attention(device_type: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    if device_type == "cuda":
        return torch.compile(flex_attention, dynamic=True)
    return flex_attention
