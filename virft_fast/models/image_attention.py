"""How much of the attention of a completion lies on each token of its prompt, at one layer.

The packed row of prompts and completions goes through the layers up to that one and no further.
There the queries of the completion's tokens meet the keys: a full map, tokens by tokens, is never
formed. Queries are those that predict the tokens after the first, as in generation step by step;
of a completion of one token, the one that predicts it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from virft_fast.batch import Prompt
from virft_fast.models.qwen_vl import ModelInputs, Policy
from virft_fast.models.shared_prefix import Group, PackedAttention


class _Enough(Exception):
    """The layer has been reached."""


class _Watched:
    """A core of packed attention that keeps what is asked for at `layer`, and stops there."""

    def __init__(self, groups: Sequence[Group], device: torch.device, layer: int) -> None:
        self.groups, self.layer = groups, layer
        self.inner = PackedAttention(groups, device)
        self.found: list[Tensor] = []

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        if layer < self.layer:
            return self.inner(layer, query, key, value, scaling)
        for group in self.groups:
            self.found.append(attention_to_prompt(query[0], key[0], group, scaling))
        raise _Enough


def attention_to_prompt(query: Tensor, key: Tensor, group: Group, scaling: float) -> Tensor:
    """(P,) attention to the prompt, mean over heads and over the completion's queries; without a
    completion, of the prompt's last token.

    Args:
        query: (H, S, E). key: (K, S, E).
    """
    length = sum(group.lengths)
    first = group.first if length else group.first - 1
    queries = query[:, first : group.end].float()  # (H, n, E)
    keys = key[:, group.start : group.end].float()  # (K, P + n, E)
    count = queries.shape[1]
    # Every query sees the prompt, and of its completion what comes before it and itself.
    places = torch.arange(keys.shape[1], device=key.device)
    last = first - group.start + torch.arange(count, device=key.device)
    hidden = places > last[:, None]
    repeats = len(queries) // len(keys)
    total = torch.zeros(group.prompt_length, device=key.device)
    for number, part in enumerate(queries.split(repeats)):  # the heads that share keys
        scores = (part * scaling) @ keys[number].T
        shares = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
        total += shares[..., : group.prompt_length].sum((0, 1))
    return total / (len(queries) * count)


@torch.no_grad()
def attention_to_prompts(policy: Policy, inputs: ModelInputs, layer: int) -> list[Tensor]:
    """Attention of each completion to its prompt's tokens.

    Args:
        inputs: packed, one completion a prompt.
        layer: number of the layer, from 0.
    Returns:
        (P,) float32 for each prompt, on the device of the model; sums to less than 1, by what the
        completion's own tokens get.
    Raises:
        ValueError: the model's attention can't be reached, there is no such layer, or `inputs` are
            not packed.
    """
    count = policy.config.text_config.num_hidden_layers
    if not 0 <= layer < count:
        raise ValueError(f"layer: expected 0 to {count - 1}, got {layer}")
    if policy.unreachable is not None or inputs.groups is None:
        raise ValueError(
            "expected a model whose attention can be reached, and packed inputs; got "
            f"{policy.unreachable or 'rows of their own'}"
        )
    if any(len(group.lengths) != 1 for group in inputs.groups):
        raise ValueError("expected one completion a prompt")
    watched = _Watched(inputs.groups, inputs.input_ids.device, layer)
    try:
        policy.language(inputs, policy.image_features(inputs), attention_core=watched)
    except _Enough:
        pass
    return watched.found


def image_tokens(prompt: Prompt, merge: int) -> list[tuple[Tensor, tuple[int, int]]]:
    """Of each image of a prompt: the positions of its tokens, and the (rows, columns) they form.

    Args:
        merge: patches a side that become one token.
    """
    if prompt.image_grid_thw is None:
        return []
    grids = [
        (rows // merge, columns // merge) for _, rows, columns in prompt.image_grid_thw.tolist()
    ]
    positions = (prompt.mm_token_type_ids == 1).nonzero()[:, 0]
    counts = [rows * columns for rows, columns in grids]
    return list(zip(positions.split(counts), grids, strict=True))


def coverage(box: Sequence[float], size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(rows * columns,) float32: the share of each token's area that lies in the box.

    Args:
        box: left, top, right, bottom in pixels. size: width and height of the image in pixels.
        grid: rows and columns of its tokens.
    """
    (left, top, right, bottom), (width, height), (rows, columns) = box, size, grid
    across = _overlap(left / width * columns, right / width * columns, columns)
    down = _overlap(top / height * rows, bottom / height * rows, rows)
    return torch.outer(down, across).flatten()


def _overlap(low: float, high: float, count: int) -> Tensor:
    """(count,) length that [low, high] shares with each [i, i + 1]."""
    start = torch.arange(count, dtype=torch.float64)
    return ((start + 1).clamp(max=high) - start.clamp(min=low)).clamp(0, 1).float()
