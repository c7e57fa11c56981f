"""Converts completions to the form that rewards, evaluation and completions.jsonl need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from virft_fast.batch import Json, Rollouts, Row
from virft_fast.metrics import null_for_nan


def reward_arguments(rollouts: Rollouts) -> tuple[list[Json], list[Json], dict[str, list[Json]]]:
    """Prompts, completions and columns, each of length N, as TRL passes them to reward functions.
    The column `images` has each prompt's images."""
    repeated = [p.sample for p in rollouts.prompts for _ in range(rollouts.num_generations)]
    names = {name for sample in repeated for name in sample.columns}
    columns = {name: [sample.columns.get(name) for sample in repeated] for name in sorted(names)}
    grids = [p.image_grid_thw for p in rollouts.prompts for _ in range(rollouts.num_generations)]
    columns["images"] = [sample.images for sample in repeated]
    columns["image_grid_thw"] = [None if grid is None else grid.tolist() for grid in grids]
    tokens = zip(rollouts.completion_ids, rollouts.completion_mask, strict=True)
    columns["completion_ids"] = [ids[mask].tolist() for ids, mask in tokens]
    completions = [[{"role": "assistant", "content": text}] for text in rollouts.texts]
    return [list(sample.messages) for sample in repeated], completions, columns


_OF_GROUPS = ("prompts", "image_features")  # one entry for each prompt; other fields: for each row


def join_groups(parts: Sequence[Rollouts], groups: Sequence[int] | None = None) -> Rollouts:
    """Groups of one or more rollouts as one, padded to the longest completion of all.

    Args:
        groups: their indices, counted over all parts; None: all.
    """
    size = parts[0].num_generations
    everything = list(range(sum(len(part.prompts) for part in parts)))
    groups = everything if groups is None else list(groups)
    if len(parts) == 1 and groups == everything:
        return parts[0]
    rows = [group * size + g for group in groups for g in range(size)]
    longest = max(part.completion_ids.shape[1] for part in parts)

    def join(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        chosen = groups if name in _OF_GROUPS else rows
        if any(value is None for value in values):
            return None
        if isinstance(values[0], tuple):
            joined = [entry for value in values for entry in value]
            return tuple(joined[index] for index in chosen)
        if values[0].dim() == 2:
            values = [pad(value, (0, longest - value.shape[1])) for value in values]
        return torch.cat(values)[torch.tensor(chosen, dtype=torch.long)]

    names = [entry.name for entry in fields(Rollouts) if entry.name != "num_generations"]
    return replace(parts[0], **{name: join(name) for name in names})


def completion_records(rollouts: Rollouts, names: Sequence[str], rewards: Tensor) -> list[Row]:
    """One record per completion. `rewards` is (N, len(names)); NaN becomes None."""
    records = []
    for row, (text, values) in enumerate(zip(rollouts.texts, rewards.tolist(), strict=True)):
        prompt = rollouts.prompts[row // rollouts.num_generations]
        record = {
            "index": prompt.sample.index,
            "prompt": prompt.text,
            "completion": text,
            "solution": prompt.sample.solution,
            "rewards": null_for_nan(dict(zip(names, values, strict=True))),
        }
        extent = prompt.sample.columns.get("extent")
        records.append(record if extent is None else record | {"extent": list(extent)})
    return records
