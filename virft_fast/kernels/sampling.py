"""Samples tokens from logits on the device, without waiting for it.

A token is chosen by looking up a number in (0, 1) in the cumulative probabilities. The number
depends only on the row's seed and its position.

Shapes: R rows, Q consecutive tokens of each, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from virft_fast.kernels.backend import triton_for
from virft_fast.kernels.decode import _check

# splitmix64, Steele et al. 2014, doi:10.1145/2660193.2660195.
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def sample_tokens(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    bias: Tensor | None = None,
    seen: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    greedy: bool = False,
) -> tuple[Tensor, Tensor]:
    """Q tokens of each row, in at most three launches.

    In this order, as in transformers: bias, repetition penalty, temperature, top-k, top-p, min-p.
    Each filter is a lower bound on the scores, so tokens with equal scores stay or go together.

    Args:
        logits: (R * Q, V) float32.
        seeds: (R,) int64 (`row_seed`). positions: (R,) or () int64, the index of the row's first
            token in its completion. Both are in memory, so a captured graph samples anew.
        bias: (V,) float32 added to the logits; -inf bans a token.
        seen: (R * Q, V) bool, the tokens that the penalty applies to; the sampled ones are added.
        temperature: above 0; divides the scores.
        top_k: keep scores at least as high as the k-th highest; 0 is off.
        top_p: keep scores at least as high as the highest bound whose tokens have this share of the
            probability; 1 is off.
        min_p: keep tokens with this share of the most likely token's probability; 0 is off.
        repetition_penalty: divides positive scores of `seen` tokens, multiplies the others.
        greedy: take the first of the highest scores; temperature and filters don't apply.
    Returns:
        Tokens, (R * Q,) int64, and their log-probs, (R * Q,) float32, under the distribution they
        were sampled from.
    Raises:
        ValueError: shapes or dtypes disagree; says what was expected and what was given.
    """
    logits = logits.contiguous()
    if logits.ndim != 2 or logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"logits: expected (R, V) float32, got {tuple(logits.shape)} {logits.dtype}; "
            "call .float()"
        )
    count, vocab = logits.shape
    rows = len(seeds) if len(seeds) and count % len(seeds) == 0 else count
    if positions.ndim == 0:
        positions = positions.repeat(rows)
    for name, tensor, shape in (
        ("seeds", seeds, (rows,)), ("positions", positions, (rows,)), ("bias", bias, (vocab,)),
        ("seen", seen, (count, vocab)),
    ):  # fmt: skip
        if tensor is not None:
            _check(name, tensor, shape)
    top_k = 0 if top_k >= vocab else top_k
    if greedy:
        temperature, top_k, top_p, min_p = 1.0, 0, 1.0, 0.0
    triton_sampling = triton_for(logits, "triton_sampling")
    if triton_sampling is not None:
        return triton_sampling.sample_tokens(
            logits, seeds, positions, bias, seen, temperature, top_k, top_p, min_p,
            repetition_penalty, greedy,
        )  # fmt: skip
    scores = logits if bias is None else logits + bias
    if seen is not None:
        penalized = torch.where(
            scores > 0, scores / repetition_penalty, scores * repetition_penalty
        )
        scores = torch.where(seen, penalized, scores)
    if temperature != 1.0:
        scores = scores / temperature
    if top_k or top_p < 1.0 or min_p:
        low = _threshold(scores, top_k, top_p, min_p)
        scores = scores.masked_fill(scores < low, -torch.inf)
    if greedy:
        tokens, log_norm = scores.argmax(-1), scores.logsumexp(-1)
    else:
        if count > rows:
            seeds, steps = seeds[:, None], torch.arange(count // rows, device=seeds.device)
            positions = positions[:, None] + steps
        tokens, log_norm = _draw(scores, uniform(seeds, positions).flatten())
    logps = scores.gather(1, tokens[:, None])[:, 0] - log_norm
    if seen is not None:
        seen.scatter_(1, tokens[:, None], True)
    return tokens, logps


def _threshold(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """(R, 1), the lowest score that all filters keep."""
    highest = scores.amax(-1, keepdim=True)
    low = torch.full_like(highest, -torch.inf)
    if top_k:
        low = scores.topk(top_k, -1).values[:, -1:]
    if top_p < 1.0:
        ordered = scores.sort(-1, descending=True).values
        kept = torch.where(ordered < low, 0.0, (ordered - highest).exp_())
        mass = kept.double().cumsum_(-1)
        enough = torch.searchsorted(mass, top_p * mass[:, -1:])
        low = ordered.gather(1, enough.clamp_(max=scores.shape[-1] - 1))
    if min_p:
        low = torch.maximum(low, highest + math.log(min_p))
    return low


def _draw(scores: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Map (R,) float64 numbers in (0, 1) to (R,) tokens through the inverse cumulative softmax of
    the (R, V) scores. Also returns the softmax's log-norm, (R,).

    The sum is in float64, so that none of 150,000 small probabilities is lost.
    """
    largest = scores.amax(-1, keepdim=True)
    cumulated = (scores - largest).exp_().double().cumsum_(-1)
    total = cumulated[:, -1:]
    # right=True never selects a token with probability 0.
    tokens = torch.searchsorted(cumulated, uniform[:, None] * total, right=True)[:, 0]
    log_norm = largest[:, 0] + total[:, 0].log().to(scores.dtype)
    return tokens.clamp_(max=scores.shape[-1] - 1), log_norm


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """float64 in (0, 1), one for each seed and position, which broadcast (splitmix64 in wrapping
    int64)."""
    z = seeds + (positions + 1) * _signed(GOLDEN_GAMMA)
    for shift, factor in MIX:
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    z = z ^ _shifted(z, 31)
    return (_shifted(z, 32).double() + 0.5) / 2**32


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's shift keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def row_seed(seed: int, row: int) -> int:
    """A 63-bit seed from two numbers (splitmix64), so that neighboring rows share no stream."""
    mask = (1 << 64) - 1
    z = (seed * GOLDEN_GAMMA + row * 0xD1B54A32D192ED03 + GOLDEN_GAMMA) & mask
    for shift, factor in MIX:
        z = ((z ^ (z >> shift)) * factor) & mask
    return (z ^ (z >> 31)) >> 1
