"""One decoding pass through transformers' Qwen text layers, on the kernels of `kernels/decode.py`.

It uses the weights of transformers' own modules, but skips their code. The query, key and value
projections are one matrix product if their weights are neighbors in memory, and so are the gate and
up projections; `lay_out` makes them neighbors. For models with another structure, `DecodeStep`
calls their own forward instead.

Shapes: R rows, Q tokens of each row in this pass, B prompts, P prompt and T completion tokens, D
hidden, H query heads, K key/value heads, E numbers per head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from virft_fast.kernels.backend import triton_for
from virft_fast.kernels.decode import add_rms_norm, find_places, rotate_and_store, silu_mul
from virft_fast.models.shared_prefix import read

if TYPE_CHECKING:  # other families' classes match, but lack the two norms
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen

# transformers' classes that `DecodeStep` can replace.
SUPPORTED_LAYERS = ("Qwen2VLDecoderLayer", "Qwen2_5_VLDecoderLayer", "Qwen3VLTextDecoderLayer")
SUPPORTED_NORMS = ("Qwen2VLRMSNorm", "Qwen2_5_VLRMSNorm", "Qwen3VLTextRMSNorm")

# (layer, query (R, Q, H, E), scaling) -> (R, Q, H * E); this pass's keys are in the cache already
Attend = Callable[[int, Tensor, float], Tensor]
# a `LayerCache` or a `RecurrentCache` by the layer's index
Caches = dict[int, Any]
# (name, shape, dtype) -> a tensor at the same address in every rollout
Take = Callable[[str, Sequence[int], torch.dtype], Tensor]


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer.

    Attributes:
        prompt_keys, prompt_values: (B, K, P, E), one entry per prompt.
        keys, values: (R, K, T, E), one entry per completion.
    """

    prompt_keys: Tensor
    prompt_values: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class _Layer:
    """A decoder layer's weights and products: looking them up in its modules costs as much time on
    a CPU as a small product.

    Attributes:
        norms: weights of the norms before attention and MLP.
        head_norms: weights of the norms of queries and keys (Qwen3).
        heads: H. scaling: of the scores.
    """

    norms: tuple[Tensor, Tensor]
    head_norms: tuple[Tensor | None, Tensor | None]
    heads: int
    scaling: float
    qkv: Callable[[Tensor], Tensor]
    out: Callable[[Tensor], Tensor]
    gate_up: Callable[[Tensor], Tensor]
    gate: Callable[[Tensor], Tensor]
    up: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, layer: qwen.Qwen3VLTextDecoderLayer) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        qkv, gate_up = map(_side_by_side, merged_linears(layer))
        q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        products = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        return cls(
            (layer.input_layernorm.weight, layer.post_attention_layernorm.weight),
            (q_norm and q_norm.weight, k_norm and k_norm.weight),
            attention.config.num_attention_heads, attention.scaling,
            qkv, _product(attention.o_proj), gate_up, *map(_product, products),
        )  # fmt: skip


class DecodeStep:
    """One decoding pass of transformers' language model.

    Args:
        text: the language model, after `shared_prefix.install`.
    Attributes:
        supported: whether the pass runs on the kernels.
        waits: whether it may wait for the device.
    """

    def __init__(self, text: qwen.Qwen3VLTextModel) -> None:
        self.text = text
        self.supported = _supported(text)
        self.waits = not self.supported and _waits(text)
        self.rotation: tuple[Tensor, Tensor] | None = None  # cosine and sine, (length, E) each
        layers = cast("list[qwen.Qwen3VLTextDecoderLayer]", text.layers)
        self.layers = [_Layer.of(layer) for layer in layers] if self.supported else []

    def prepare(self, length: int, take: Take) -> None:
        """Tabulate the rotation for positions below `length`."""
        if not self.supported:
            return
        embeds = self.text.embed_tokens.weight[:1, None]  # for its dtype and device
        positions = torch.arange(length, device=embeds.device).expand(3, 1, -1)
        cos, sin = self.text.rotary_emb(embeds, positions)  # (1, length, E)
        # q * cos + rotate_half(q) * sin, with the minus of rotate_half moved to the sine.
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        self.rotation = (
            take("cos", cos.shape[1:], cos.dtype).copy_(cos[0]),
            take("sin", sin.shape[1:], sin.dtype).copy_(sin[0]),
        )

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        lengths: Tensor,
        caches: Caches,
        attend: Attend,
    ) -> Tensor:
        """Read some tokens of each row, and store their keys and values.

        Args:
            tokens: (R, Q) int64. Recurrent layers read one: no state could be taken back.
            positions: (R,) int64, the rotary position of each row's first token, the same on all
                axes; the next tokens continue from it.
            lengths: (R,) int64, each row's tokens in the cache; the new ones go after them.
        Returns:
            (R, Q, D) last hidden states.
        """
        if self.rotation is None:
            return self._own_forward(tokens, positions, lengths, caches, attend)
        cos, sin = self.rotation
        rows, count = tokens.shape
        eps = self.text.norm.variance_epsilon
        following = [*(layer.norms[0] for layer in self.layers), self.text.norm.weight]
        hidden = F.embedding(tokens.flatten(), self.text.embed_tokens.weight)  # (R * Q, D)
        hidden, normed = add_rms_norm(hidden, None, following[0], eps)
        places = None
        if triton_for(hidden, "triton_decode") is None:
            keys = caches[0].keys
            places = find_places(cos, sin, positions, keys, lengths, num_tokens=count)
        for number, layer in enumerate(self.layers):
            cache = caches[number]
            q_norm, k_norm = layer.head_norms
            query = rotate_and_store(
                layer.qkv(normed).view(rows, count, -1), cos, sin, positions, cache.keys,
                cache.values, lengths, num_heads=layer.heads, q_norm=q_norm, k_norm=k_norm,
                eps=eps, places=places,
            )  # fmt: skip
            out = attend(number, query, layer.scaling).flatten(0, 1)
            hidden, normed = add_rms_norm(hidden, layer.out(out), layer.norms[1], eps)
            if places is not None:  # two products are faster on a CPU
                inner = F.silu(layer.gate(normed)) * layer.up(normed)
            else:
                inner = silu_mul(layer.gate_up(normed))
            hidden, normed = add_rms_norm(hidden, layer.down(inner), following[number + 1], eps)
        return normed.view(rows, count, -1)

    def _own_forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        lengths: Tensor,
        caches: Caches,
        attend: Attend,
    ) -> Tensor:
        rows, steps = (torch.arange(n, device=tokens.device) for n in tokens.shape)
        places = (rows[:, None], slice(None), lengths[:, None] + steps)

        def core(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
            cache = caches[layer]
            for stored, new in ((cache.keys, key), (cache.values, value)):
                stored[places] = new.transpose(1, 2).to(stored.dtype)  # (R, Q, K, E)
            query = query.transpose(1, 2).to(cache.keys.dtype).contiguous()
            return attend(layer, query, scaling).view(query.shape)

        def recur(layer: Any, *inputs: Tensor) -> Tensor:
            return caches[layer.layer_idx].read(layer, *inputs)

        embeds = self.text.get_input_embeddings()(tokens)
        axes = (positions[:, None] + steps).expand(3, -1, -1)
        return read(self.text, embeds, axes, attention_core=core, recurrent_core=recur)


def _supported(text: qwen.Qwen3VLTextModel) -> bool:
    norms = [m for name, m in text.named_modules() if name.endswith("norm")]
    return (
        all(type(layer).__name__ in SUPPORTED_LAYERS for layer in text.layers)
        and all(type(norm).__name__ in SUPPORTED_NORMS for norm in norms)
        and getattr(text.rotary_emb, "rope_type", None) == "default"
        and text.config.hidden_act == "silu"
    )


def _waits(text: nn.Module) -> bool:
    """Whether transformers' own forward pass waits for the device: because the rotation depends on
    the longest row, or to learn how many tokens an expert reads. torch's grouped product, which
    transformers calls by default, reads that on the device in bfloat16 on compute capability 9 and
    10."""
    kinds = getattr(getattr(text, "rotary_emb", None), "rope_type", None)  # Gemma 3: by layer type
    kinds = set(kinds.values() if isinstance(kinds, dict) else [kinds])
    if kinds & {"dynamic", "longrope"}:
        return True
    experts = [weight for name, weight in text.named_parameters() if ".experts." in name]
    grouped = getattr(text.config, "_experts_implementation", None) == "grouped_mm"
    return not all(
        grouped
        and weight.dtype == torch.bfloat16
        and (not weight.is_cuda or torch.cuda.get_device_capability(weight.device)[0] in (9, 10))
        for weight in experts
    )


def merged_linears(layer: qwen.Qwen3VLTextDecoderLayer) -> Iterator[tuple[nn.Linear, ...]]:
    """The layer's projections that read the same states: of the attention, then of the MLP."""
    parts = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
    for module, names in parts.items():
        if hasattr(getattr(layer, module, None), names[0]):  # else recurrent, or experts
            yield tuple(getattr(getattr(layer, module), name) for name in names)


def lay_out(text: qwen.Qwen3VLTextModel) -> None:
    """Make the weights of projections that read the same states neighbors in memory, in place.

    Neither values nor parameters change. Projections with an adapter stay as they are, and so do
    weights that are parts of other memory, such as DeepSpeed's buffers.
    """
    for layer in text.layers:
        for linears in merged_linears(cast("qwen.Qwen3VLTextDecoderLayer", layer)):
            if not all(type(linear) is nn.Linear for linear in linears):
                continue
            for parameters in zip(*(linear.parameters() for linear in linears), strict=False):
                alike = len({(parameter.dtype, parameter.device) for parameter in parameters}) == 1
                if alike and all(map(_owns_memory, parameters)):
                    whole = torch.cat([parameter.data for parameter in parameters])
                    parts = whole.split([len(parameter) for parameter in parameters])
                    for parameter, part in zip(parameters, parts, strict=True):
                        parameter.data = part


def _owns_memory(parameter: Tensor) -> bool:
    """Whether the parameter has memory that holds nothing else."""
    size = parameter.numel() * parameter.element_size()
    return not parameter.is_meta and parameter.untyped_storage().nbytes() == size > 0


def _product(linear: nn.Module) -> Callable[[Tensor], Tensor]:
    """The projection, without its module where it is a plain one."""
    if type(linear) is nn.Linear:
        return partial(F.linear, weight=linear.weight, bias=linear.bias)
    return linear


def _side_by_side(linears: tuple[nn.Linear, ...]) -> Callable[[Tensor], Tensor]:
    """A function that computes the projections' outputs side by side."""
    if all(type(linear) is nn.Linear for linear in linears):
        weight = _joined([linear.weight for linear in linears])
        biases = [linear.bias for linear in linears if linear.bias is not None]
        bias = _joined(biases) if biases else None
        if weight is not None and (bias is None) == (not biases):
            return partial(F.linear, weight=weight, bias=bias)
    return lambda states: torch.cat([linear(states) for linear in linears], -1)


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor that consists of these neighbors in memory; None if they aren't."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.dtype != first.dtype or not part.is_contiguous():
            return None
        end += part.numel() * part.element_size()
    if first.untyped_storage().data_ptr() + first.untyped_storage().nbytes() < end:
        return None  # neighbors by chance
    shape = (sum(len(part) for part in parts), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride())
