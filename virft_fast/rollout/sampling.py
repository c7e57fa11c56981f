"""Samples the tokens of a batch's rows, for all backends.

A draw depends only on (seed, row in the global batch, position). So a completion depends neither on
the other rows nor on how the batch is divided among ranks, and all backends sample the same tokens.

Shapes: N rows, Q consecutive tokens of each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from virft_fast.batch import Prompt, Rollouts
from virft_fast.devices import to_device
from virft_fast.kernels.logprobs import rows_forward
from virft_fast.kernels.sampling import row_seed, sample_tokens
from virft_fast.kernels.speculation import MAX_READ
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
        seeds = torch.tensor([row_seed(sampling.seed, row) for row in rows], dtype=torch.long)
        self.seeds = take("seeds", (len(prompts),), torch.long).copy_(to_device(seeds, device))
        self.bias = take("ban_bias", (vocab_size,), torch.float32).zero_()
        never = to_device(torch.tensor(list(banned), dtype=torch.long), device)
        self.bias.index_fill_(0, never, -torch.inf)
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self.seen = take("seen", (len(prompts), vocab_size), torch.bool).zero_()
            # Token t comes after tokens 0 to t of those that were read.
            read = torch.arange(MAX_READ).repeat(MAX_READ, 1).tril()
            self.before = take("before", read.shape, torch.long).copy_(to_device(read, device))
            for row, prompt in zip(self.seen, prompts, strict=True):
                row.index_fill_(0, to_device(prompt.input_ids, device), True)

    def keep(self, rows: Tensor) -> None:
        """Continue with only the given rows, in the given order."""
        self.seeds = select(self.seeds, rows)
        if self.seen is not None:
            self.seen = select(self.seen, rows)

    def __call__(
        self, logits: Tensor, positions: Tensor, read: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sample the next tokens of each row.

        Args:
            logits: (N * Q, V) float32.
            positions: (N,) or () int64, index of each row's first token in its completion.
            read: (N, Q) int64, the row's last token and Q - 1 guesses, which the logits depend on;
                needed if Q > 1. With several tokens, those that are kept must be added to `seen`.
        Returns:
            Tokens, (N * Q,) int64; their log-probs, (N * Q,) float32, under the distribution they
            were sampled from; and the same under temperature alone, or None if that is the same.
        """
        seen = self.seen
        if seen is not None and read is not None and read.shape[1] > 1:
            count = read.shape[1]
            before = read[:, self.before[:count, :count]]  # (N, Q, Q)
            seen = seen[:, None].repeat(1, count, 1).scatter_(2, before, True).flatten(0, 1)
        tokens, logps = sample_tokens(
            logits,
            self.seeds,
            positions,
            bias=self.bias,
            seen=seen,
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            min_p=self.sampling.min_p,
            repetition_penalty=self.sampling.repetition_penalty,
            greedy=self.sampling.greedy,
        )
        plain = None
        if self.sampling.filtered:
            plain = rows_forward(logits, tokens, 1 / self.sampling.temperature)[0].float()
        return tokens, logps.float(), plain  # of weights in float64, too


def make_rollouts(
    prompts: Sequence[Prompt],
    num_generations: int,
    tokens: Tensor,
    logps: Tensor,
    stop_ids: Sequence[int],
    tokenizer: Tokenizer,
    image_features: Sequence[Tensor] | None,
    plain: Tensor | None = None,
) -> Rollouts:
    """Cut the (N, T) sampled tokens and log-probs after the first token that ends a completion.
    The result is on the CPU, but for the image features."""
    tokens, logps, plain = tokens.cpu(), logps.cpu(), None if plain is None else plain.cpu()
    ends = torch.isin(tokens, torch.tensor(list(stop_ids)))
    ended = ends.any(1)
    length = torch.where(ended, ends.int().argmax(1) + 1, tokens.shape[1])
    longest = int(length.max())
    mask = torch.arange(longest) < length[:, None]
    ids = tokens[:, :longest].masked_fill(~mask, tokenizer.pad_token_id)
    rows = [row[:n] for row, n in zip(ids.tolist(), length.tolist(), strict=True)]
    control = control_token_ids(tokenizer)
    text_ids = [[token for token in row if token not in control] for row in rows]
    tags = (prompt.opened for prompt in prompts)
    opened = [tag for tag in tags for _ in range(num_generations)]
    texts = zip(opened, tokenizer.batch_decode(text_ids), strict=True)
    return Rollouts(
        prompts=tuple(prompts),
        num_generations=num_generations,
        completion_ids=ids,
        completion_mask=mask,
        truncated=~ended,
        texts=tuple(map("".join, texts)),
        sampling_logps=logps[:, :longest].masked_fill(~mask, 0.0),
        image_features=None if image_features is None else tuple(image_features),
        plain_logps=None if plain is None else plain[:, :longest].masked_fill(~mask, 0.0),
    )
