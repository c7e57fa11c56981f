"""Observers of the native rollout: the interface, and an observer that measures attention.

Shapes: B prompts, G completions each, N = B*G. R of these N rows are still being decoded. P prompt
tokens, padded; H query heads, K key/value heads, E numbers per head, S tokens of a packed row.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from virft_fast.batch import Prompt
from virft_fast.models.decode_step import Take
from virft_fast.models.image_attention import attention_to_prompt
from virft_fast.models.shared_prefix import Group
from virft_fast.rollout.cache import CachePlan


class Observer(Protocol):
    """Decoding calls these methods in order, for each batch of prompts."""

    @property
    def layers(self) -> Container[int]:
        """The layers whose steps are observed; in these, attention is computed twice."""

    @property
    def key(self) -> Hashable:
        """Observers with equal keys share their captured graphs."""

    def start(self, prompts: Sequence[Prompt], plan: CachePlan, take: Take) -> Sequence[Tensor]:
        """Prepare for a batch.

        Args:
            take: allocates the observer's tensors at addresses that captured graphs can use.
        Returns:
            The tensors that `step_attention` changes.
        """

    def prompt_attention(
        self, layer: int, number: int, query: Tensor, key: Tensor, group: Group, scaling: float,
        window: int | None,
    ) -> None:  # fmt: skip
        """Called after prompt `number` of the batch has been read. It is `group` in a packed row
        with (H, S, E) queries and (K, S, E) keys. `window` is that of `PrefixLayout`."""

    def step_attention(self, layer: int, shares: Tensor, rows: Tensor, done: Tensor) -> None:
        """Called for each of `layers` after Q tokens of each row were read. It is part of a CUDA
        graph, so it must not wait for the device.

        Args:
            shares: (R * Q, K, H / K, P) float32, attention of the rows' tokens to their prompts.
            rows: (R * Q,) int64, the rows' indices among the batch's N.
            done: (R * Q,) bool, true for what doesn't count: after the completion's end, and after
                a wrong guess.
        """

    def finish(self) -> None:
        """The batch is complete."""


class AttentionObserver:
    """Measures how much each completion attends to its prompt's tokens at one layer.

    Attributes:
        layer: counted from 0.
        attention: for each of the N completions, (P,) float32 without padding. It is averaged over
            the heads and the queries that predict the tokens after the first; for a one-token
            completion, it is from the query that predicts that token. Batches and rollouts append
            to this list.
    """

    def __init__(self, layer: int) -> None:
        self.layer, self.layers, self.key = layer, (layer,), (type(self), layer)
        self.attention: list[Tensor] = []

    def start(self, prompts: Sequence[Prompt], plan: CachePlan, take: Take) -> Sequence[Tensor]:
        self.lengths = [len(p.input_ids) for p in prompts for _ in range(plan.num_generations)]
        # Each row's sum over its queries, and their number.
        self.sums = take("observed", (len(self.lengths), plan.prompt_length), torch.float32).zero_()
        self.counts = take("num_observed", (len(self.lengths),), torch.float32).zero_()
        self.last_of_prompt = take("last", (plan.groups, plan.prompt_length), torch.float32)
        return self.sums, self.counts

    def prompt_attention(
        self, layer: int, number: int, query: Tensor, key: Tensor, group: Group, scaling: float,
        window: int | None,
    ) -> None:  # fmt: skip
        if layer == self.layer:
            attention = attention_to_prompt(query, key, group, scaling, window)
            self.last_of_prompt[number, : group.prompt_length] = attention

    def step_attention(self, layer: int, shares: Tensor, rows: Tensor, done: Tensor) -> None:
        active = (~done).float()
        self.sums.index_add_(0, rows, shares.mean((1, 2)).float() * active[:, None])
        self.counts.index_add_(0, rows, active)

    def finish(self) -> None:
        repeats = len(self.sums) // len(self.last_of_prompt)
        single = self.last_of_prompt.repeat_interleave(repeats, 0)
        mean = self.sums / self.counts.clamp(min=1)[:, None]
        attention = torch.where(self.counts[:, None] > 0, mean, single)
        rows = zip(attention, self.lengths, strict=True)
        self.attention += [row[:length].clone() for row, length in rows]
