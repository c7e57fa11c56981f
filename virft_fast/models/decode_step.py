"""One token a row through transformers' Qwen text layers, with nothing but what one token needs.

The modules and weights are transformers' own, LoRA and liger patches included; what is left out is
the generality around them, which costs a small batch more than its arithmetic does. Where a model
is built otherwise, `DecodeStep` calls its own forward instead.

Shapes: R rows, D hidden, H query heads, K key/value heads, E numbers a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from virft_fast.models.shared_prefix import no_mask

# The classes whose forward `_layer` follows, as transformers names them.
KNOWN_LAYERS = (
    "Qwen2VLDecoderLayer",
    "Qwen2_5_VLDecoderLayer",
    "Qwen3VLTextDecoderLayer",
)
KNOWN_NORMS = ("Qwen2VLRMSNorm", "Qwen2_5_VLRMSNorm", "Qwen3VLTextRMSNorm")

# (layer, query (R, H, E), key (R, K, E), value (R, K, E), scaling) -> (R, H * E)
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
# (name, shape, dtype) -> memory that stays where it is
Take = Callable[[str, Sequence[int], torch.dtype], Tensor]


class DecodeStep:
    """A step of transformers' language model.

    Args:
        text: the language model, routed by `shared_prefix.install`.
    """

    def __init__(self, text: nn.Module) -> None:
        self.text = text
        self.known = all(type(layer).__name__ in KNOWN_LAYERS for layer in text.layers)
        self.known &= getattr(text.rotary_emb, "rope_type", None) == "default"
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None

    def prepare(self, length: int, take: Take) -> None:
        """Tabulate the rotation for positions below `length`."""
        if not self.known:
            return
        embeds = self.text.get_input_embeddings().weight[:1, None]  # for its dtype and device
        places = torch.arange(length, device=embeds.device).expand(3, 1, -1)
        cos, sin = self.text.rotary_emb(embeds, places)  # (1, length, E)
        # q * cos + rotate_half(q) * sin, with the sign moved from the halves to the sine.
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        self.cos = take("cos", cos.shape[1:], cos.dtype).copy_(cos[0])
        self.sin = take("sin", sin.shape[1:], sin.dtype).copy_(sin[0])

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """(R,) token ids at (R,) positions, the same on all axes -> (R, D) last hidden states."""
        embeds = self.text.get_input_embeddings()(tokens)
        if not self.known:
            return self._plain(embeds, positions[None, :, None].expand(3, -1, -1), attend)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]  # (R, 1, E)
        hidden = embeds
        for number, layer in enumerate(self.text.layers):
            hidden = _layer(number, layer, hidden, cos, sin, attend)
        return _norm(self.text.norm, hidden)

    def _plain(self, embeds: Tensor, places: Tensor, attend: Attend) -> Tensor:
        def core(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
            out = attend(layer, query[:, :, 0], key[:, :, 0], value[:, :, 0], scaling)
            return out.view(len(out), 1, -1, query.shape[-1])

        return self.text(
            input_ids=None,
            inputs_embeds=embeds[:, None],
            attention_mask=no_mask(embeds.device),
            position_ids=places,
            use_cache=False,
            attention_core=core,
        ).last_hidden_state[:, 0]


def _layer(
    number: int, layer: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend
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
    out = attend(number, query, key, value, attention.scaling)
    hidden = hidden + attention.o_proj(out)
    return hidden + layer.mlp(_norm(layer.post_attention_layernorm, hidden))


def _norm(norm: Any, hidden: Tensor) -> Tensor:
    """transformers' RMSNorm in one call; any other one as it is."""
    if type(norm).__name__ not in KNOWN_NORMS:
        return norm(hidden)
    return F.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)
