"""Reads a prompt once for all its completions in layers with a recurrent state: gated DeltaNet.

Such a layer mixes tokens twice: by a causal convolution over W tokens, and by the gated delta rule
(Yang et al. 2024, arXiv:2412.06464), whose state is a matrix for each head. In a packed row, a
completion's convolution continues from the prompt's last inputs, and its delta rule from the state
after the prompt; autograd sums the completions' gradients into both. The prompts run as one batch,
then all completions as one.

The layers' forward pass is replaced, but calls their own modules and transformers' functions, which
use flash-linear-attention and causal-conv1d if these are installed.

Shapes: S tokens of the row, D hidden, C channels of the convolution, H heads, K and V numbers of a
head's keys and values, R rows in decoding.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from virft_fast.devices import to_device
from virft_fast.kernels.prefix_attention import Group

logger = logging.getLogger(__name__)

# transformers' classes whose forward pass `_forward` can replace.
SUPPORTED = ("Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")

# What transformers' functions run much faster with on a GPU, and the modules' names.
PACKAGES = {"flash-linear-attention": "fla", "causal-conv1d": "causal_conv1d"}

# (layer, inputs of the convolution (rows, tokens, C), log decay and beta (rows, tokens, H))
# -> (rows, tokens, H, V)
RecurrentCore = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
# (the layer's index, last inputs of the convolution (B, C, W - 1), states (B, H, K, V))
Keep = Callable[[int, Tensor, Tensor], None]


def recurrent_layers(language_model: Any) -> list[Any]:
    """The modules with a recurrent state, in order."""
    return [layer.linear_attn for layer in language_model.layers if hasattr(layer, "linear_attn")]


def supported(language_model: Any) -> bool:
    """Whether there are such modules, and `install` can replace the forward pass of all of them."""
    names = {type(layer).__name__ for layer in recurrent_layers(language_model)}
    return bool(names) and names <= set(SUPPORTED)


def install(language_model: Any) -> None:
    """Let recurrent layers accept a `recurrent_core` with a call, in place."""
    layers = recurrent_layers(language_model)
    missing = [package for package, module in PACKAGES.items() if not find_spec(module)]
    if layers and missing and torch.cuda.is_available():
        logger.warning("recurrent layers are slow without %s; install them", " and ".join(missing))
    for layer in layers:
        layer.forward = MethodType(_forward, layer)


def _forward(
    layer: Any, hidden_states: Tensor, recurrent_core: RecurrentCore | None = None, **options: Any
) -> Tensor:
    """(rows, tokens, D) -> the same shape; without a core, transformers' own forward pass."""
    if recurrent_core is None:
        return type(layer).forward(layer, hidden_states, **options)
    mixed, gate = layer.in_proj_qkv(hidden_states), layer.in_proj_z(hidden_states)
    beta = layer.in_proj_b(hidden_states).sigmoid()
    steps = F.softplus(layer.in_proj_a(hidden_states).float() + layer.dt_bias)
    out = recurrent_core(layer, mixed, -layer.A_log.float().exp() * steps, beta)
    size = layer.head_v_dim
    out = layer.norm(out.reshape(-1, size), gate.reshape(-1, size))
    return layer.out_proj(out.view(gate.shape))


def _delta_rule(layer: Any, name: str, mixed: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """transformers' function `name`, on the convolution's outputs, (rows, tokens, C).

    Returns:
        (rows, tokens, H, V), and the last states, (rows, H, K, V).
    """
    parts = mixed.split((layer.key_dim, layer.key_dim, layer.value_dim), -1)
    sizes = (layer.head_k_dim, layer.head_k_dim, layer.head_v_dim)
    heads = [part.unflatten(-1, (-1, n)) for part, n in zip(parts, sizes, strict=True)]
    rule = getattr(sys.modules[type(layer).__module__], name)
    # Under autocast its products would be in 16 bits, and errors of the state add up.
    with torch.autocast(mixed.device.type, enabled=False):
        return rule(*heads, output_final_state=True, use_qk_l2norm_in_kernel=True, **options)


def _convolution(layer: Any, name: str, inputs: Tensor, *state: Tensor) -> Tensor:
    """transformers' function `name`: (rows, tokens, C) -> the same shape."""
    function = getattr(sys.modules[type(layer).__module__], name)
    weight, bias = layer.conv1d.weight.squeeze(1), layer.conv1d.bias
    out = function(inputs.transpose(1, 2), *state, weight, bias, activation=layer.activation)
    return out.transpose(1, 2)


class _Batch:
    """Prompts or completions as rows, padded on the right with their last token.

    Args:
        segments: for each row, its group's start, the end of the tokens that precede it, its own
            first token and its length, at least 1.
        back: W - 1, how many of the preceding tokens the convolution reads.
    Attributes:
        tokens: the packed row's tokens in the rows' order, without padding, and `places` their
            places in (rows * longest,).
    """

    def __init__(self, segments: Sequence[Sequence[int]], back: int, device: torch.device) -> None:
        start, context, first, length = torch.tensor(segments).view(-1, 4, 1).unbind(1)
        steps = torch.arange(int(length.max()))
        own = first + torch.minimum(steps, length - 1)
        read = torch.cat([context + torch.arange(-back, 0), own], 1)
        real = steps < length
        self.tokens, self.places = own[real], real.flatten().nonzero()[:, 0]
        self.shape, self.back = real.shape, back
        blank, ends = (read < start).flatten().nonzero()[:, 0], length + torch.arange(back)
        self._read, self._own, self._blank, self._ends, self._real = (
            to_device(part, device)
            for part in (read.clamp(min=0).flatten(), own.flatten(), blank, ends, real[..., None])
        )

    def run(
        self, layer: Any, mixed: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The rule's outputs, (rows * longest, H, V), its last states and the inputs, with the
        preceding ones, (rows, W - 1 + longest, C)."""
        rows = len(self._real)
        inputs = mixed.index_select(0, self._read).index_fill_(0, self._blank, 0.0)
        inputs = inputs.view(rows, -1, inputs.shape[-1])
        mixed = _convolution(layer, "causal_conv1d_fn", inputs)[:, self.back :]
        # Padding neither fades nor changes the state.
        decay, beta = (
            part.index_select(0, self._own).view(*self.shape, -1) * self._real
            for part in (decay, beta)
        )
        rule = "torch_chunk_gated_delta_rule"
        out, last = _delta_rule(layer, rule, mixed, g=decay, beta=beta, initial_state=state)
        return out.flatten(0, 1), last, inputs

    def last_inputs(self, inputs: Tensor) -> Tensor:
        """(rows, C, W - 1), the inputs that a convolution after the rows would read."""
        index = self._ends[..., None].expand(-1, -1, inputs.shape[-1])
        return inputs.gather(1, index).transpose(1, 2)


class PackedRecurrence:
    """The core of one packed row.

    Args:
        groups: the row's groups, in order and without gaps; every prompt has a token.
        width: W.
        keep: receives the states after the prompts.
    Attributes:
        layers: the indices of the layers that called it.
    """

    def __init__(
        self, groups: Sequence[Group], device: torch.device, width: int, keep: Keep | None = None
    ) -> None:
        self.layers, self.keep, completions, parents = set[int](), keep, [], []
        for number, group in enumerate(groups):
            first = group.first
            for length in group.lengths:
                if length:
                    completions.append((group.start, group.first, first, length))
                    parents.append(number)
                first += length
        prompts = [(g.start, g.start, g.start, g.prompt_length) for g in groups]
        self.prompts = _Batch(prompts, width - 1, device)
        self.completions = _Batch(completions, width - 1, device) if completions else None
        place, used = torch.zeros(groups[-1].end, dtype=torch.long), 0
        for batch in (self.prompts, self.completions):
            if batch is not None:
                place[batch.tokens] = batch.places + used
                used += batch.shape.numel()
        self.place, self.parents = (to_device(t, device) for t in (place, torch.tensor(parents)))

    def __call__(self, layer: Any, mixed: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
        """(1, S, C), (1, S, H), (1, S, H) -> (1, S, H, V)."""
        self.layers.add(layer.layer_idx)
        row = (mixed[0], decay[0], beta[0])
        out, state, inputs = self.prompts.run(layer, *row, None)
        if self.keep is not None:
            self.keep(layer.layer_idx, self.prompts.last_inputs(inputs), state)
        if self.completions is not None:
            state = state.index_select(0, self.parents)
            out = torch.cat([out, self.completions.run(layer, *row, state)[0]])
        return out.index_select(0, self.place)[None]


@dataclass(frozen=True)
class RecurrentCache:
    """The state of one layer.

    Attributes:
        inputs: (R, C, W - 1), the last inputs of the convolution.
        states: (R, H, K, V) float32.
    """

    inputs: Tensor
    states: Tensor

    def read(self, layer: Any, mixed: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
        """A `RecurrentCore` that reads one token of each row and changes the state in place."""
        mixed = _convolution(layer, "causal_conv1d_update", mixed, self.inputs)
        out, states = _delta_rule(
            layer, "torch_recurrent_gated_delta_rule", mixed, g=decay, beta=beta,
            initial_state=self.states,
        )  # fmt: skip
        self.states.copy_(states)
        return out
