"""Observers of the native rollout: their interface, and one that measures attention.

Shapes: B prompts, G completions each, N = B*G. R of these N rows are still being decoded, equally
many in each remaining group. P prompt tokens, padded; H query heads, K key/value heads, E numbers
per head, S tokens of a packed row.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from virft_fast.batch import Prompt
from virft_fast.models.decode_step import Take
from virft_fast.models.image_attention import attention_to_prompt
from virft_fast.models.shared_prefix import Group
from virft_fast.rollout.cache import CachePlan


class Observer(Protocol):
    """Decoding calls these methods in this order, for each batch of prompts."""

    @property
    def key(self) -> Hashable:
        """Observers with equal keys share their captured graphs."""

    def start(self, prompts: Sequence[Prompt], plan: CachePlan, take: Take) -> Sequence[Tensor]:
        """Prepare for a batch.

        Args:
            take: makes the tensors of the observer, at addresses that captured graphs can use.
        Returns:
            The tensors that `step_attention` changes.
        """

    def prompt_attention(
        self, layer: int, number: int, query: Tensor, key: Tensor, group: Group, scaling: float
    ) -> None:
        """Prompt `number` of the batch has been read. It is `group` in a packed row, whose queries
        are (H, S, E) and keys (K, S, E)."""

    def step_attention(self, layer: int, shares: Tensor, rows: Tensor, done: Tensor) -> None:
        """A token of each row has been read. Part of a CUDA graph: it must not wait for the device.

        Args:
            shares: (B', K, G', H / K, P) float32, attention of the R = B'*G' rows to their prompts.
            rows: (R,) int64, their numbers among the batch's N.
            done: (R,) bool, true where the completion had ended before.
        """

    def finish(self) -> None:
        """The batch is complete."""


class AttentionObserver:
    """Measures the attention of each completion to its prompt's tokens, at one layer.

    Attributes:
        layer: counted from 0.
        attention: for each of the N completions (P,) float32, without padding, averaged over the
            heads and the queries that predict its tokens after the first; the only one's, if it has
            one token. Batches and rollouts append to this list.
    """

    def __init__(self, layer: int) -> None:
        self.layer, self.key = layer, (type(self), layer)
        self.attention: list[Tensor] = []

    def start(self, prompts: Sequence[Prompt], plan: CachePlan, take: Take) -> Sequence[Tensor]:
        self.lengths = [len(p.input_ids) for p in prompts for _ in range(plan.num_generations)]
        # For each row the sum over its queries, and their number.
        self.sums = take("observed", (len(self.lengths), plan.prompt_length), torch.float32).zero_()
        self.counts = take("num_observed", (len(self.lengths),), torch.float32).zero_()
        self.last_of_prompt = take("last", (plan.groups, plan.prompt_length), torch.float32)
        return self.sums, self.counts

    def prompt_attention(
        self, layer: int, number: int, query: Tensor, key: Tensor, group: Group, scaling: float
    ) -> None:
        if layer == self.layer:
            attention = attention_to_prompt(query, key, group, scaling)
            self.last_of_prompt[number, : group.prompt_length] = attention

    def step_attention(self, layer: int, shares: Tensor, rows: Tensor, done: Tensor) -> None:
        if layer == self.layer:
            active = (~done).float()
            attention = shares.mean((1, 3)).flatten(0, 1)  # (R, P)
            self.sums.index_add_(0, rows, attention * active[:, None])
            self.counts.index_add_(0, rows, active)

    def finish(self) -> None:
        repeats = len(self.sums) // len(self.last_of_prompt)
        single = self.last_of_prompt.repeat_interleave(repeats, 0)
        mean = self.sums / self.counts.clamp(min=1)[:, None]
        attention = torch.where(self.counts[:, None] > 0, mean, single)
        rows = zip(attention, self.lengths, strict=True)
        self.attention += [row[:length].clone() for row, length in rows]
