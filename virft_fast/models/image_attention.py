"""Measures how much a completion attends to each token of its prompt, at one layer.

The packed row of prompts and completions runs only up to that layer. There, the completion's
queries are multiplied with the keys; the full attention map is never formed. As in step-by-step
generation, the queries are those that predict the tokens after the first. For a one-token
completion, it is the query that predicts that token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from virft_fast.batch import Prompt
from virft_fast.models.inputs import ModelInputs
from virft_fast.models.policy import Policy
from virft_fast.models.shared_prefix import Group, PackedAttention


class _Enough(Exception):
    """Raised when the layer has been reached."""


class _Watched:
    """A packed-attention core that measures attention at `layer`, then stops the pass."""

    def __init__(self, inner: PackedAttention, layer: int) -> None:
        self.inner, self.layer = inner, layer
        self.attention: list[Tensor] = []

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        if layer < self.layer:
            return self.inner(layer, query, key, value, scaling)
        window = self.inner.windows.get(layer)
        for group in self.inner.groups:
            self.attention.append(attention_to_prompt(query[0], key[0], group, scaling, window))
        raise _Enough


def attention_to_prompt(
    query: Tensor, key: Tensor, group: Group, scaling: float, window: int | None = None
) -> Tensor:
    """(P,) float32 attention to the prompt, averaged over the heads and the completion's queries;
    for an empty completion, the attention of the prompt's last token.

    Args:
        query: (H, S, E). key: (K, S, E). window: see `PrefixLayout`.
    """
    length = sum(group.lengths)
    first = group.first if length else group.first - 1
    queries = query[:, first : group.end].float()  # (H, n, E)
    keys = key[:, group.start : group.end].float()  # (K, P + n, E)
    count = queries.shape[1]
    # Every query sees the prompt, and the completion up to its own position.
    places = torch.arange(keys.shape[1], device=key.device)
    last = first - group.start + torch.arange(count, device=key.device)
    hidden = places > last[:, None]
    if window is not None:
        hidden |= places <= last[:, None] - window
    repeats = len(queries) // len(keys)
    total = torch.zeros(group.prompt_length, device=key.device)
    for number, heads in enumerate(queries.split(repeats)):  # that share keys
        scores = (heads * scaling) @ keys[number].T
        shares = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
        total += shares[..., : group.prompt_length].sum((0, 1))
    return total / (len(queries) * count)


@torch.no_grad()
def attention_to_prompts(policy: Policy, inputs: ModelInputs, layer: int) -> list[Tensor]:
    """The attention of each completion to its prompt's tokens.

    Args:
        inputs: packed, one completion per prompt.
        layer: index of the layer, from 0.
    Returns:
        (P,) float32 for each prompt, on the model's device. It sums to less than 1, because a
        completion also attends to its own tokens.
    Raises:
        ValueError: the model's attention can't be replaced, the layer doesn't exist, or `inputs`
            are not packed.
    """
    count = policy.config.text_config.num_hidden_layers
    if not 0 <= layer < count:
        raise ValueError(f"layer: expected 0 to {count - 1}, got {layer}")
    if policy.unreachable is not None or not inputs.groups:
        raise ValueError(
            "expected a model whose attention can be reached, and packed inputs; got "
            f"{policy.unreachable or 'rows of their own'}"
        )
    if any(len(group.lengths) != 1 for group in inputs.groups):
        raise ValueError("expected one completion a prompt")
    watched = _Watched(policy.attention(inputs), layer)
    with contextlib.suppress(_Enough):
        policy.language(inputs, policy.image_features(inputs), attention_core=watched)
    return watched.attention


def image_tokens(prompt: Prompt, merge: int) -> list[tuple[Tensor, tuple[int, int]]]:
    """For each image of a prompt, its tokens' positions and the (rows, columns) of their grid.

    Args:
        merge: one token represents merge * merge patches.
    """
    if prompt.image_grid_thw is None:
        return []
    sizes = prompt.image_grid_thw.tolist()
    grids = [(rows // merge, columns // merge) for _, rows, columns in sizes]
    positions = (prompt.mm_token_type_ids == 1).nonzero()[:, 0]
    counts = [rows * columns for rows, columns in grids]
    return list(zip(positions.split(counts), grids, strict=True))


def coverage(box: Sequence[float], size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(rows * columns,) float32, the share of each token's area inside the box.

    Args:
        box: left, top, right, bottom in pixels. size: width and height of the image in pixels.
        grid: rows and columns of the image's tokens.
    """
    (left, top, right, bottom), (width, height), (rows, columns) = box, size, grid
    across = _overlap(left / width * columns, right / width * columns, columns)
    down = _overlap(top / height * rows, bottom / height * rows, rows)
    return torch.outer(down, across).flatten()


def _overlap(low: float, high: float, count: int) -> Tensor:
    """(count,) float32, the length of the overlap of [low, high] with each [i, i + 1]."""
    start = torch.arange(count, dtype=torch.float64)
    return ((start + 1).clamp(max=high) - start.clamp(min=low)).clamp(0, 1).float()
