"""Converts completions to the form that rewards, evaluation and completions.jsonl need."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

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
