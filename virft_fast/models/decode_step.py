"""A lean forward pass of transformers' Qwen text layers, for one token per row.

It calls transformers' own modules, including LoRA and liger patches, but skips the generic code
around them, which takes longer than the arithmetic of a small batch. For models with another
structure, `DecodeStep` calls their own forward instead.

Shapes: R rows, D hidden, H query heads, K key/value heads, E numbers per head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from virft_fast.models.shared_prefix import read

if TYPE_CHECKING:  # other families' classes match, but lack the two norms
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen

# transformers' classes that `_layer` and `_norm` can replace.
SUPPORTED_LAYERS = ("Qwen2VLDecoderLayer", "Qwen2_5_VLDecoderLayer", "Qwen3VLTextDecoderLayer")
SUPPORTED_NORMS = ("Qwen2VLRMSNorm", "Qwen2_5_VLRMSNorm", "Qwen3VLTextRMSNorm")

# (layer, query (R, H, E), key (R, K, E), value (R, K, E), scaling) -> (R, H * E)
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
# (name, shape, dtype) -> a tensor at the same address in every rollout
Take = Callable[[str, Sequence[int], torch.dtype], Tensor]


class DecodeStep:
    """One decoding step of transformers' language model.

    Args:
        text: the language model, after `shared_prefix.install`.
    """

    def __init__(self, text: qwen.Qwen3VLTextModel) -> None:
        self.text = text
        self.supported = all(type(layer).__name__ in SUPPORTED_LAYERS for layer in text.layers)
        self.supported &= getattr(text.rotary_emb, "rope_type", None) == "default"
        self.rotation: tuple[Tensor, Tensor] | None = None  # cosine and sine, (length, E) each

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

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """(R,) token ids at (R,) positions, the same on all axes -> (R, D) last hidden states."""
        hidden = self.text.get_input_embeddings()(tokens)
        if self.rotation is None:
            return self._own_forward(hidden, positions[None, :, None].expand(3, -1, -1), attend)
        cos, sin = (table[positions][:, None] for table in self.rotation)  # (R, 1, E)
        layers = cast("list[qwen.Qwen3VLTextDecoderLayer]", self.text.layers)
        for layer in layers:
            hidden = _layer(layer, hidden, cos, sin, attend)
        return _norm(self.text.norm, hidden)

    def _own_forward(self, embeds: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        def core(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
            out = attend(layer, query[:, :, 0], key[:, :, 0], value[:, :, 0], scaling)
            return out.view(len(out), 1, -1, query.shape[-1])

        return read(self.text, embeds[:, None], positions, attention_core=core)[:, 0]


def _layer(
    layer: qwen.Qwen3VLTextDecoderLayer, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend
) -> Tensor:
    attention = layer.self_attn
    normed = _norm(layer.input_layernorm, hidden)
    query = attention.q_proj(normed).unflatten(1, (-1, attention.head_dim))
    key = attention.k_proj(normed).unflatten(1, (-1, attention.head_dim))
    value = attention.v_proj(normed).unflatten(1, (-1, attention.head_dim))
    if hasattr(attention, "q_norm"):
        query, key = _norm(attention.q_norm, query), _norm(attention.k_norm, key)
    both = torch.cat([query, key], 1)  # (R, H + K, E)
    both = torch.addcmul(both * cos, both.roll(both.shape[-1] // 2, -1), sin)
    query, key = both.split([query.shape[1], key.shape[1]], 1)
    out = attend(attention.layer_idx, query, key, value, attention.scaling)
    hidden = hidden + attention.o_proj(out)
    return hidden + layer.mlp(_norm(layer.post_attention_layernorm, hidden))


def _norm(norm: qwen.Qwen3VLTextRMSNorm, hidden: Tensor) -> Tensor:
    """Apply transformers' RMSNorm as one fused call; any other norm through its own forward."""
    if type(norm).__name__ not in SUPPORTED_NORMS:
        return norm(hidden)
    return F.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)
