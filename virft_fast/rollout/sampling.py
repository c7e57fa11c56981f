"""Samples tokens from logits on the device, without waiting for it.

Each token is chosen by looking up a number in [0, 1) in the cumulative probabilities. The number
depends only on (seed, row in the global batch, position). So a completion depends neither on the
other rows nor on how the batch is divided among ranks, and all backends sample the same tokens.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from virft_fast.batch import Prompt, Rollouts
from virft_fast.models.decode_step import Take
from virft_fast.models.families import Tokenizer
from virft_fast.models.inputs import control_token_ids
from virft_fast.rollout import Sampling
from virft_fast.rollout.cache import select


class Sampler:
    """Samples the tokens of N rows.

    Args:
        banned: token ids that are never sampled.
        first_row: index of the first row in the global batch.
        prompts: one per row; only a repetition penalty reads them.
        take: allocates the state's tensors; None: allocate new ones.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        vocab_size: int,
        banned: Sequence[int],
        first_row: int,
        prompts: Sequence[Prompt],
        device: torch.device,
        take: Take | None = None,
    ) -> None:
        self.sampling = sampling
        take = take or (lambda name, shape, dtype: torch.empty(shape, dtype=dtype, device=device))
        rows = range(first_row, first_row + len(prompts))
        seeds = torch.tensor([_mix(sampling.seed, row) for row in rows], dtype=torch.long)
        self.seeds = take("seeds", (len(prompts),), torch.long).copy_(seeds)
        self.bias = take("ban_bias", (vocab_size,), torch.float32).zero_()
        self.bias[torch.tensor(list(banned), dtype=torch.long, device=device)] = -torch.inf
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self.seen = take("seen", (len(prompts), vocab_size), torch.bool).zero_()
            for row, prompt in zip(self.seen, prompts, strict=True):
                row[prompt.input_ids.to(device)] = True

    def keep(self, rows: Tensor) -> None:
        """Continue with only the given rows, in the given order."""
        self.seeds = select(self.seeds, rows)
        if self.seen is not None:
            self.seen = select(self.seen, rows)

    def __call__(self, logits: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Sample the next token of each row.

        Args:
            logits: (N, V) float32.
            position: () int64, index of the token in its completion.
        Returns:
            Tokens, (N,) int64, and their log-probs, (N,) float32, under the distribution they were
            sampled from.
        """
        scores = self._scores(logits)
        if self.sampling.greedy:
            tokens = scores.argmax(-1)
            log_norm = scores.logsumexp(-1)
        else:
            tokens, log_norm = _draw(scores, _uniform(self.seeds, position))
        logps = scores.gather(1, tokens[:, None])[:, 0] - log_norm
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens, logps

    def _scores(self, logits: Tensor) -> Tensor:
        """Logits after penalty, temperature and filters, in transformers' order."""
        sampling = self.sampling
        scores = logits + self.bias
        if self.seen is not None:
            penalty = sampling.repetition_penalty
            penalised = torch.where(scores > 0, scores / penalty, scores * penalty)
            scores = torch.where(self.seen, penalised, scores)
        if sampling.greedy:
            return scores
        if sampling.temperature != 1.0:
            scores = scores / sampling.temperature
        if 0 < sampling.top_k < scores.shape[-1]:
            smallest = scores.topk(sampling.top_k, -1).values[:, -1:]
            scores = scores.masked_fill(scores < smallest, -torch.inf)
        if sampling.top_p < 1.0:
            scores = scores.masked_fill(_outside_nucleus(scores, sampling.top_p), -torch.inf)
        if sampling.min_p > 0.0:
            probs = scores.softmax(-1)
            unlikely = probs < sampling.min_p * probs.amax(-1, keepdim=True)
            scores = scores.masked_fill(unlikely, -torch.inf)
        return scores


def _outside_nucleus(scores: Tensor, top_p: float) -> Tensor:
    """(N, V) bool, true outside the most likely tokens whose probabilities add up to top_p."""
    ordered, order = scores.sort(-1, descending=False)
    below = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    below[:, -1] = False  # the most likely token stays
    return torch.zeros_like(below).scatter_(1, order, below)


def _draw(scores: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Map (N,) float64 numbers in [0, 1) to (N,) tokens through the inverse cumulative softmax of
    the (N, V) scores. Also returns the softmax's log-norm, (N,).

    The sum is in float64, so that none of 150,000 small probabilities is lost.
    """
    largest = scores.amax(-1, keepdim=True)
    cumulated = (scores - largest).exp_().double().cumsum_(-1)
    total = cumulated[:, -1:]
    # right=True never selects a token with probability 0.
    tokens = torch.searchsorted(cumulated, uniform[:, None] * total, right=True)[:, 0]
    log_norm = largest[:, 0] + total[:, 0].log().float()
    return tokens.clamp_(max=scores.shape[-1] - 1), log_norm


def _uniform(seeds: Tensor, position: Tensor) -> Tensor:
    """(N,) float64 in (0, 1), one for each seed and position (splitmix64 in wrapping int64)."""
    z = seeds + (position + 1) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    z = z ^ _shifted(z, 31)
    return (_shifted(z, 32).double() + 0.5) / 2**32


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's shift keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(seed: int, row: int) -> int:
    """A 63-bit seed from two numbers (splitmix64), so that neighboring rows share no stream."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + row * 0xD1B54A32D192ED03 + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


def make_rollouts(
    prompts: Sequence[Prompt],
    num_generations: int,
    tokens: Tensor,
    logps: Tensor,
    stop_ids: Sequence[int],
    tokenizer: Tokenizer,
    image_features: Sequence[Tensor] | None,
) -> Rollouts:
    """Cut the (N, T) sampled tokens and log-probs after the first token that ends a completion."""
    ends = torch.isin(tokens, torch.tensor(list(stop_ids), device=tokens.device))  # (N, T)
    ended = ends.any(1)
    length = torch.where(ended, ends.int().argmax(1) + 1, tokens.shape[1])
    longest = int(length.max())
    mask = torch.arange(longest, device=tokens.device) < length[:, None]
    ids = tokens[:, :longest].masked_fill(~mask, tokenizer.pad_token_id)
    rows = [row[:n] for row, n in zip(ids.tolist(), length.tolist(), strict=True)]
    control = control_token_ids(tokenizer)
    text_ids = [[token for token in row if token not in control] for row in rows]
    return Rollouts(
        prompts=tuple(prompts),
        num_generations=num_generations,
        completion_ids=ids,
        completion_mask=mask,
        truncated=~ended,
        texts=tuple(tokenizer.batch_decode(text_ids)),
        sampling_logps=logps[:, :longest].masked_fill(~mask, 0.0),
        image_features=None if image_features is None else tuple(image_features),
    )
