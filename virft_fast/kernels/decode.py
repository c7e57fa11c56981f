"""The kernels of one decoding step, besides its matrix products and its sampling.

Nothing that changes from one step to the next is a Python number: lengths and positions are
tensors, so a captured CUDA graph serves all of them. CUDA tensors go to Triton (`triton_decode`),
CPU and float64 tensors to the torch references here. Nothing is differentiable.

Shapes: R rows (completions), each of which reads Q tokens in this pass; B prompts; P and T, the
lengths of the caches of prompt and own tokens; H query heads, K key/value heads, E numbers per
head; D hidden size.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from virft_fast.kernels.backend import triton_for


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    num_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    places: Places | None = None,
) -> Tensor:
    """Rotate queries and keys, and write keys and values into the rows' own caches. One launch.

    Computes in float32 and rounds once, to the caches' dtype. With norms, their result is rounded
    to the dtype of `qkv` before, as in transformers.

    Args:
        qkv: (R, Q, (H + 2K) * E), the projections of query, key and value, one after the other.
        cos, sin: (L, E) tables of the rotation; `sin` has the minus sign of `rotate_half`, in its
            first half.
        positions: (R,) int64, index into the tables of each row's first token; token t has
            `positions + t`, which must be below L.
        keys, values: (R, K, T, E) contiguous caches. Token t of row r is written at
            `lengths[r] + t`, which must be below T.
        lengths: (R,) int64, each row's own tokens before this pass.
        num_heads: H.
        q_norm, k_norm: (E,) weights of an RMSNorm of each head, before the rotation (Qwen3).
        eps: of these norms.
        places: `find_places` of this pass, for the torch reference to compute once for all layers.
    Returns:
        The rotated queries, (R, Q, H, E), in the caches' dtype.
    Raises:
        ValueError: shapes disagree; says what was expected and what was given.
    """
    rows, kv_heads, _, size = keys.shape
    tokens = qkv.shape[1]
    _check("qkv", qkv, (rows, tokens, (num_heads + 2 * kv_heads) * size))
    _check("keys", keys, keys.shape)
    _check("values", values, keys.shape)
    _check("positions", positions, (rows,))
    _check("lengths", lengths, (rows,))
    norms = (q_norm, k_norm, eps)
    triton_decode = triton_for(qkv, "triton_decode")
    if triton_decode is not None:
        return triton_decode.rotate_and_store(
            qkv, cos, sin, positions, keys, values, lengths, num_heads, *norms
        )
    if places is None:
        places = find_places(cos, sin, positions, keys, lengths, num_tokens=tokens)
    both, value = qkv.view(rows, tokens, -1, size).split([num_heads + kv_heads, kv_heads], 2)
    if q_norm is not None and k_norm is not None:
        query, key = both.split([num_heads, kv_heads], 2)
        both = torch.cat([_rms_norm(query, q_norm, eps), _rms_norm(key, k_norm, eps)], 2)
    cos, sin, slots = places
    both = _wide(both)  # (R, Q, H + K, E)
    both = torch.addcmul(both * cos, both.roll(size // 2, -1), sin).to(keys.dtype)
    query, key = both.split([num_heads, kv_heads], 2)
    keys.view(-1, size).index_copy_(0, slots, key.reshape(-1, size))
    values.view(-1, size).index_copy_(0, slots, value.reshape(-1, size).to(values.dtype))
    return query


# Each token's row of the tables, (R, Q, 1, E) twice, and (R * Q * K,) int64, where its keys are in
# the flattened cache.
Places = tuple[Tensor, Tensor, Tensor]


def find_places(
    cos: Tensor, sin: Tensor, positions: Tensor, keys: Tensor, lengths: Tensor, *, num_tokens: int
) -> Places:
    """What the torch reference of `rotate_and_store` looks up, from its arguments."""
    rows, heads, length, _ = keys.shape
    steps = torch.arange(num_tokens, device=keys.device)
    at = positions[:, None] + steps
    first = torch.arange(0, rows * heads * length, length, device=keys.device).view(rows, 1, heads)
    slots = first + (lengths[:, None] + steps)[:, :, None]
    return _wide(cos[at][:, :, None]), _wide(sin[at][:, :, None]), slots.flatten()


def decode_attention(
    query: Tensor,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    prompt_lengths: Tensor,
    first_rows: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    max_rows: int,
    window: int | None = None,
    masks: DecodeMasks | None = None,
) -> Tensor:
    """Attention of each row's tokens to its prompt and to its own tokens up to themselves.

    Two launches. The first reads a prompt's keys once for all rows of its group, split over the
    prompt's length. The second reads the own keys and merges the parts by their log-sum-exp.
    Neither reads beyond the lengths, so the caches may hold NaN there. The torch reference reads
    whole caches and masks them, so there they must be finite.

    Args:
        query: (R, Q, H, E), in the caches' dtype.
        prompt_keys, prompt_values: (B, K, P, E), contiguous.
        prompt_lengths: (B,) int64.
        first_rows: (B + 1,) int64. Rows `first_rows[b]` up to `first_rows[b + 1] - 1` belong to
            prompt b, possibly none. The results of rows from `first_rows[B]` on mean nothing.
        keys, values: (R, K, T, E), contiguous; already hold the tokens of this pass.
        lengths: (R,) int64, own tokens before this pass. Token t sees own keys up to `lengths + t`.
        scaling: factor of the scores.
        max_rows: no prompt has more rows. If R == B * max_rows, each must have exactly so many.
        window: how many tokens of its prompt and own ones, itself included, a token sees at most.
            With a window, the torch reference computes on any device. None: all.
        masks: `DecodeMasks.make` of this pass, for the torch reference to compute once for all
            layers.
    Returns:
        (R, Q, H * E).
    Raises:
        ValueError: shapes or dtypes disagree; says what was expected and what was given.
    """
    rows, tokens, heads, size = query.shape
    groups, kv_heads, _, _ = prompt_keys.shape
    _check("prompt_keys", prompt_keys, (groups, kv_heads, prompt_keys.shape[2], size))
    _check("prompt_values", prompt_values, prompt_keys.shape)
    _check("keys", keys, (rows, kv_heads, keys.shape[2], size))
    _check("values", values, keys.shape)
    _check("prompt_lengths", prompt_lengths, (groups,))
    _check("first_rows", first_rows, (groups + 1,))
    _check("lengths", lengths, (rows,))
    if heads % kv_heads or query.dtype != keys.dtype:
        raise ValueError(
            f"query: expected {keys.dtype} and a multiple of {kv_heads} heads, got {query.dtype} "
            f"and {heads}; cast it to the caches' dtype"
        )
    triton_decode = triton_for(query, "triton_decode")
    if triton_decode is not None and window is None:
        return triton_decode.decode_attention(
            query, prompt_keys, prompt_values, prompt_lengths, first_rows, keys, values, lengths,
            scaling, max_rows,
        )  # fmt: skip
    if masks is None:
        masks = DecodeMasks.make(
            prompt_keys, prompt_lengths, first_rows, keys, lengths,
            num_tokens=tokens, num_heads=heads, max_rows=max_rows, window=window,
        )  # fmt: skip
    device = query.device.type  # entering autocast takes longer than asking
    on = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if on else contextlib.nullcontext():
        shares = attention_shares(query, prompt_keys, keys, masks, scaling=scaling)
        return _weighted_sum(shares.to(values.dtype), prompt_values, values, masks, tokens)


@dataclass(frozen=True)
class DecodeMasks:
    """What the torch reference of `decode_attention` needs of the lengths.

    Attributes:
        prompt_bias: (B * K, 1 or G * Q * H / K, P) float32, 0 at the prompt's tokens that a token
            sees and -inf elsewhere.
        own_bias: (R * K or 1, 1 or Q * H / K, W) float32, the same for the own tokens that a token
            sees.
        padded: (B * G,) int64, the row in each place of groups padded to G = max_rows rows; None if
            all groups have so many.
        places: (R,) int64, each row's place; None likewise.
    """

    prompt_bias: Tensor
    own_bias: Tensor
    padded: Tensor | None
    places: Tensor | None

    @classmethod
    def make(
        cls,
        prompt_keys: Tensor,
        prompt_lengths: Tensor,
        first_rows: Tensor,
        keys: Tensor,
        lengths: Tensor,
        *,
        num_tokens: int,
        num_heads: int,
        max_rows: int,
        width: int | None = None,
        window: int | None = None,
    ) -> DecodeMasks:
        """The masks for a pass over `num_tokens` tokens of each row.

        Args:
            lengths: (R,) int64, or (1,) if all rows have the same.
            width: W, at least `lengths + num_tokens` of every row: own keys from there on are not
                read. None: T. The other arguments are those of `decode_attention`.
        """
        groups, kv_heads, length, _ = prompt_keys.shape
        rows, device = len(keys), keys.device
        width = keys.shape[2] if width is None else width
        prompt, steps = (torch.arange(n, device=device) for n in (length, num_tokens))
        outside = (prompt >= prompt_lengths[:, None])[:, None, None]  # (B, 1, 1, P)
        ends = lengths[:, None, None] + steps[:, None]
        own = torch.arange(width, device=device)
        hidden = (own > ends)[:, None]  # (R, 1, Q, W)
        if window is not None:
            hidden = hidden | (own <= ends - window)[:, None]
        repeats = 1 if num_tokens == 1 else num_heads // kv_heads
        copies = kv_heads if len(lengths) == rows else 1
        hidden = hidden[:, :, :, None].expand(-1, copies, -1, repeats, -1)
        own_bias = _bias(hidden.flatten(0, 1).flatten(1, 2))
        padded = places = None
        if rows != groups * max_rows:
            row = torch.arange(rows, device=device)
            group = torch.searchsorted(first_rows, row, right=True).sub_(1).clamp_(max=groups - 1)
            places = group * max_rows + (row - first_rows[group]).clamp_(max=max_rows - 1)
            padded = first_rows[:-1, None] + torch.arange(max_rows, device=device)
            padded = padded.flatten().clamp_(max=rows - 1)
        if window is not None:
            lengths = lengths.expand(rows)
            lengths = (lengths if padded is None else lengths[padded]).view(groups, -1, 1)
            last = prompt_lengths[:, None, None] + lengths + steps - window  # (B, G, Q)
            outside = outside | (prompt <= last[..., None])
            outside = outside.repeat_interleave(num_heads // kv_heads, 2).flatten(1, 2)[:, None]
        prompt_bias = _bias(outside.expand(-1, kv_heads, -1, -1).flatten(0, 1))
        return cls(prompt_bias, own_bias, padded, places)


def attention_shares(
    query: Tensor, prompt_keys: Tensor, keys: Tensor, masks: DecodeMasks, *, scaling: float
) -> Tensor:
    """The softmax of `decode_attention`, in torch on any device.

    Returns:
        (B, K, G, Q * H / K, P + W) float32 (float64 for float64), each token's shares of its prompt
        and own keys. G is `max_rows`, and row r is at place `masks.places[r]` of the B * G.
    """
    (rows, _, _, size), (groups, kv_heads, length, _) = query.shape, prompt_keys.shape
    # A group's rows side by side, then (token, head). One softmax over both parts equals two,
    # merged by their log-sum-exp.
    own = query.reshape(*query.shape[:2], kv_heads, -1, size).transpose(1, 2)
    own = own.reshape(rows * kv_heads, -1, size)
    grouped = _grouped(own.view(rows, kv_heads, -1, size), masks, groups)
    grouped = grouped.reshape(groups * kv_heads, -1, size)
    own_keys = keys.view(rows * kv_heads, -1, size)[:, : masks.own_bias.shape[-1]]
    to_own = _scores(own, own_keys, masks.own_bias, scaling)
    to_own = _grouped(to_own.view(rows, kv_heads, *to_own.shape[1:]), masks, groups)
    prompt_keys = prompt_keys.view(groups * kv_heads, length, size)
    to_prompt = _scores(grouped, prompt_keys, masks.prompt_bias, scaling)
    return torch.cat([to_prompt.view(*to_own.shape[:-1], length), to_own], -1).softmax(-1)


def _weighted_sum(
    shares: Tensor, prompt_values: Tensor, values: Tensor, masks: DecodeMasks, tokens: int
) -> Tensor:
    """(B, K, G, n, P + W) shares -> (R, Q, H * E)."""
    (rows, kv_heads, _, size), (groups, _, length, _) = values.shape, prompt_values.shape
    merged = shares.view(groups * kv_heads, -1, shares.shape[-1])[..., :length]
    out = torch.bmm(merged, prompt_values.view(groups * kv_heads, length, size))
    out = _by_row(out.view(*shares.shape[:-1], size), masks)
    own = _by_row(shares[..., length:], masks)
    own_values = values.view(rows * kv_heads, -1, size)[:, : own.shape[-1]]
    out = torch.baddbmm(out, own, own_values)  # (R * K, n, E)
    return out.view(rows, kv_heads, tokens, -1).transpose(1, 2).reshape(rows, tokens, -1)


def _grouped(by_row: Tensor, masks: DecodeMasks, groups: int) -> Tensor:
    """(R, K, n, x) -> (B, K, G, n, x)."""
    padded = by_row if masks.padded is None else by_row[masks.padded]
    return padded.view(groups, -1, *padded.shape[1:]).transpose(1, 2)


def _by_row(grouped: Tensor, masks: DecodeMasks) -> Tensor:
    """(B, K, G, n, x) -> (R * K, n, x)."""
    rows = grouped.transpose(1, 2)
    if masks.places is not None:
        rows = rows.flatten(0, 1)[masks.places]
    return rows.reshape(-1, *grouped.shape[3:])


def _scores(query: Tensor, keys: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """query @ keys.T * scaling + bias, at least in float32; (b, n, E), (b, m, E) -> (b, n, m)."""
    query, keys = _wide(query), _wide(keys)
    return torch.baddbmm(bias.to(query.dtype), query, keys.transpose(1, 2), alpha=scaling)


def _bias(masked: Tensor) -> Tensor:
    return torch.where(masked, -torch.inf, 0.0)


def add_rms_norm(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream, and normalize the sum by its root mean square. One launch.

    The sum is rounded to the dtype of `hidden`. The statistics are in float32, and their result is
    rounded to that dtype before the weight multiplies it, as in transformers.

    Args:
        hidden: (..., D).
        delta: the same shape, or None to normalize only.
        weight: (D,), of the same dtype.
    Returns:
        hidden + delta (`hidden` itself without a delta), and the normalized sum, both (..., D).
    Raises:
        ValueError: shapes disagree; says what was expected and what was given.
    """
    _check("weight", weight, hidden.shape[-1:])
    if delta is not None:
        _check("delta", delta, hidden.shape)
    triton_decode = triton_for(hidden, "triton_decode")
    if triton_decode is not None:
        return triton_decode.add_rms_norm(hidden, delta, weight, eps)
    if delta is not None:
        hidden = hidden + delta
    return hidden, _rms_norm(hidden, weight, eps)


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    if hidden.dtype in (torch.float32, torch.float64):  # one rounding in either order
        return F.rms_norm(hidden, weight.shape, weight, eps)
    return weight * F.rms_norm(hidden.float(), weight.shape, None, eps).to(hidden.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of (..., 2 * I) numbers, gate before up -> (..., I). One launch.

    silu is computed in float32 and rounded before the product, as in transformers.

    Raises:
        ValueError: the last dimension is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(
            f"gate_up: expected an even last dimension, got {tuple(gate_up.shape)}; concatenate "
            "the gate and up projections"
        )
    triton_decode = triton_for(gate_up, "triton_decode")
    if triton_decode is not None:
        return triton_decode.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def _wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected contiguous {tuple(shape)}, got {tuple(tensor.shape)} with strides "
            f"{tensor.stride()}; see the docstring"
        )
