"""Reads a prompt once for all its completions, with packed rows and attention within them.

A packed row holds whole groups, [prompt | completion 1 | ... | completion G | next prompt | ...].
Every completion attends to its prompt and to itself, and its rotary positions continue from the
prompt's. The transformers model's code is unchanged: its attention interface calls `attend`, which
passes the row to the core given with the call. Layers with a recurrent state: see `recurrent`.

Shapes: S tokens of the row, H query heads, K key/value heads, E numbers per head, G completions of
a group, P prompt tokens, C completion tokens that the model reads: all but the last, which predicts
nothing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from virft_fast.devices import to_device
from virft_fast.kernels.prefix_attention import (
    Group,
    PrefixLayout,
    for_query_heads,
    prefix_attention,
    two_part_attention,
)
from virft_fast.models import recurrent

if TYPE_CHECKING:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel as TextModel

_PREFIX = "shared_prefix_"
# The language models whose sliding windows are those of `windows`. Others may have more that is
# special, such as GPT-OSS's attention sinks.
WINDOWED = ("gemma3_text", "mistral", "qwen2")


def install(language_model: TextModel) -> str | None:
    """Route the attention of transformers' language model through `attend`, in place.

    Calls without a core give the same results as before.

    Returns:
        None, or the reason why its attention can't be replaced.
    """
    reason, config = unreachable(language_model), language_model.config
    if reason is None:
        recurrent.install(language_model)
        if not config._attn_implementation.startswith(_PREFIX):  # as in a copied configuration
            config._attn_implementation = _register(config._attn_implementation)
    return reason


def unreachable(language_model: TextModel) -> str | None:
    """The reason why prompts can't be shared in this model; None if they can."""
    config, hybrid = language_model.config, recurrent.supported(language_model)
    # Qwen3.5 doesn't declare that its attention can be replaced, but it can.
    if not (hybrid or getattr(language_model, "_supports_attention_backend", False)):
        return f"{type(language_model).__name__} has its attention built in"
    if dropout := getattr(config, "attention_dropout", 0.0):
        return f"attention_dropout is {dropout}, and two passes would differ"
    if getattr(config, "use_bidirectional_attention", False):
        return "its tokens see those after them"
    sinks = any(name.endswith("sinks") for name, _ in language_model.named_parameters())
    if sinks or getattr(config, "attn_logit_softcapping", None):
        return "its attention has sinks or soft-capped scores"
    others = set(_kinds(config)) - {"full_attention"}
    if hybrid:
        others.discard("linear_attention")
    if config.model_type in WINDOWED:
        others.discard("sliding_attention")
    if others:
        return f"it has layers of another kind than full attention: {', '.join(sorted(others))}"
    return None


def _kinds(config: Any) -> Sequence[str]:
    """The kind of each layer of a language model, from its configuration. Mistral's layers are all
    alike, even if its configuration has `layer_types`, which transformers' model doesn't read."""
    slides = getattr(config, "sliding_window", None)
    kind = "sliding_attention" if slides else "full_attention"
    given = getattr(config, "layer_types", None)
    mistral = getattr(config, "model_type", "") == "mistral"
    return given if given and not mistral else [kind] * config.num_hidden_layers


def attention_layers(config: Any) -> list[int]:
    """The indices of a language model's layers with attention, from its configuration."""
    return [layer for layer, kind in enumerate(_kinds(config)) if kind != "linear_attention"]


def windows(config: Any, longest: int) -> dict[int, int]:
    """The layers where a token doesn't see all before it in `longest` tokens, and how many it sees
    there, its own included."""
    layers = [n for n, kind in enumerate(_kinds(config)) if kind == "sliding_attention"]
    return {n: config.sliding_window for n in layers if config.sliding_window < longest}


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
        key, value = for_query_heads(query, key, value)
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
    """(R, L, D) last hidden states for embeddings (R, L, D) at rotary positions (3, R, L); a model
    without multimodal positions reads the first axis.

    Args:
        options: passed to transformers' model. Without an `attention_mask`, `attention_core` is
            required.
    """
    if options.get("attention_mask") is None:
        # Four dimensions, so that transformers doesn't build its own mask.
        options["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds.device)
    if "mrope_section" not in (model.config.rope_parameters or {}):  # one axis
        positions = positions[0]
    options |= {"inputs_embeds": embeds, "position_ids": positions, "use_cache": False}
    return model(**options).last_hidden_state


def core_kind(kind: str, device: torch.device) -> str:
    """What `kind` is on the device: "fused" (`kernels.prefix_attention`), "two_part" (its torch
    reference), "flex" or "dense". "auto" is "fused" on CUDA, else "two_part"."""
    if kind != "auto":
        return kind
    return "fused" if device.type == "cuda" else "two_part"


class PackedAttention:
    """The core of one packed row.

    Args:
        groups: the row's groups, in order and without gaps.
        kind: see `core_kind`.
        windows: `PrefixLayout.window` of the layers that have one.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        device: torch.device,
        kind: str = "auto",
        windows: Mapping[int, int] | None = None,
    ):
        self.groups = tuple(groups)
        self.device = device
        self.layers: set[int] = set()
        self.windows = windows or {}
        self.kind = core_kind(kind, device)
        self._cores: dict[int | None, Callable[..., Tensor]] = {}  # by window

    def _make(self, window: int | None) -> Callable[..., Tensor]:
        if self.kind in ("flex", "dense"):
            return (_Flex if self.kind == "flex" else _Dense)(self.groups, self.device, window)
        core = {"fused": prefix_attention, "two_part": two_part_attention}[self.kind]
        return functools.partial(core, layout=PrefixLayout(self.groups, self.device, window))

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """(1, H, S, E), (1, K, S, E), (1, K, S, E) -> (1, S, H, E)."""
        self.layers.add(layer)
        window = self.windows.get(layer)
        if window not in self._cores:
            self._cores[window] = self._make(window)
        # Under autocast, the rotation returns float32, but CausalBias requires equal dtypes.
        row = (states[0].to(value.dtype).transpose(0, 1) for states in (query, key, value))
        return self._cores[window](*row, scaling=scaling)[None]

    def check(self, num_layers: int) -> None:
        """Raise RuntimeError if a layer bypassed this core."""
        check_calls(self.layers, num_layers)


def check_calls(layers: set[int], num_layers: int) -> None:
    """Raise RuntimeError if not all layers called the core."""
    if len(layers) < num_layers:
        raise RuntimeError(
            f"expected {num_layers} layers to share the prompt, {len(layers)} did; pass "
            "--prefix_sharing off for this model"
        )


def _visible(
    groups: tuple[Group, ...], length: int, device: torch.device, window: int | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function that says whether tokens q of a row see tokens k, from their positions in it."""
    group_of = torch.full((length,), -1, dtype=torch.int32)  # after the last group
    # The number of a token's completion, from 1, or 0 in a prompt; its place in prompt and
    # completion; and the end of its block, from 1, or 0 outside.
    sequence, place, block = torch.zeros(3, length, dtype=torch.int32)
    for number, group in enumerate(groups):
        group_of[group.start : group.end] = number
        place[group.start : group.first] = torch.arange(group.prompt_length)
        start = group.first
        for completion, own in enumerate(group.lengths, 1):
            sequence[start : start + own] = completion
            place[start : start + own] = group.prompt_length + torch.arange(own)
            start += own
        for first, end in group.blocks:
            block[group.start + first : group.start + end] = end
    group_of, sequence, place, block = (
        to_device(part, device) for part in (group_of, sequence, place, block)
    )

    def visible(q: Tensor, k: Tensor) -> Tensor:
        own = (sequence[k] == 0) | (sequence[q] == sequence[k])
        seen = (q >= k) | ((block[k] > 0) & (block[q] == block[k]))
        if window is not None:
            seen = seen & (place[k] > place[q] - window)
        return seen & (group_of[q] == group_of[k]) & own

    return visible


class _Dense:
    """One call with the (S, S) mask: the simplest core, against which the others are tested."""

    def __init__(self, groups: tuple[Group, ...], device: torch.device, window: int | None) -> None:
        places = torch.arange(groups[-1].end if groups else 0, device=device)
        visible = _visible(groups, len(places), device, window)
        self.mask = visible(places[:, None], places[None])

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, scaling: float) -> Tensor:
        query, key, value = (states.transpose(0, 1) for states in (query, key, value))
        repeats = query.shape[0] // key.shape[0]
        key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
        out = F.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=self.mask, scale=scaling
        )
        return out[0].transpose(0, 1)


class _Flex:
    """FlexAttention, which skips the empty blocks of the (S, S) mask."""

    BLOCK = 128

    def __init__(self, groups: tuple[Group, ...], device: torch.device, window: int | None) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        self.length = groups[-1].end if groups else 0
        # Padded to whole blocks, so that one compiled kernel serves every length.
        self.padded = -(-self.length // self.BLOCK) * self.BLOCK
        visible = _visible(groups, self.padded, device, window)
        self.mask = create_block_mask(
            lambda batch, head, q, k: visible(q, k), None, None, self.padded, self.padded,
            device=device, BLOCK_SIZE=self.BLOCK,
        )  # fmt: skip

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, scaling: float) -> Tensor:
        pad = (0, 0, 0, self.padded - self.length)
        heads = (states.transpose(0, 1) for states in (query, key, value))
        query, key, value = (F.pad(states, pad)[None] for states in heads)
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
