"""Reward functions by name or path, called as TRL calls them: a batch of answers -> rewards."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import importlib.util
import inspect
import logging
import math
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

LARGEST = torch.finfo(torch.float32).max
RewardFunction = Callable[..., Sequence[float | None]]


class RewardError(RuntimeError):
    """A reward function raised or gave no number; names it and the sample, __cause__ says why."""


def load_function(name: str) -> tuple[str, RewardFunction]:
    path, _, attribute = name.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(
            f"--reward_funcs {name}: expected path/to/file.py:function, no file {path}"
        )
    unique = hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(f"virft_fast_rewards_{unique}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--reward_funcs {name}: expected a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"--reward_funcs {name}: {path} can't be imported: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"--reward_funcs {name}: no function {attribute!r} in {path}")
    return attribute, function


def score(
    reward_funcs: Sequence[tuple[str, RewardFunction]],
    weights: Sequence[float],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
) -> tuple[Tensor, Tensor]:
    """Call every reward function on all N completions and add up, as TRL 1.16 does.

    Args:
        columns: the data set's columns, N values each.
    Returns:
        (N, R) float32 rewards, NaN where a function gave None or nothing finite, and (N,) their
        weighted sums over the functions that did score; NaN where none did.
    Raises:
        RewardError: a function raised, or gave something that is neither a number nor None.
        ValueError: a function returned another number of rewards than N.
    """
    per_function = [
        _call(name, function, prompts, completions, columns) for name, function in reward_funcs
    ]
    rewards = torch.tensor(per_function, dtype=torch.float32).T  # (N, R)
    # A finite double may still be too large for a float32.
    rewards = rewards.masked_fill(~rewards.isfinite(), torch.nan)
    total = (rewards * torch.tensor(weights, dtype=torch.float32)).nansum(1)
    unscored = rewards.isnan().all(1) | ~total.isfinite()
    return rewards, total.masked_fill(unscored, torch.nan)


def _call(
    name: str,
    function: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
) -> list[float]:
    try:
        values = _values(function, prompts, completions, columns)
    except (Exception, SystemExit) as error:  # not a bad answer: somebody's bug, which ends the run
        raise RewardError(_blame(name, function, prompts, completions, columns)) from error
    if len(values) != len(completions):
        raise ValueError(
            f"reward function {name}: expected {len(completions)} rewards, one a completion, got "
            f"{len(values)}"
        )
    clean = []
    for row, value in enumerate(values):
        try:
            clean.append(math.nan if value is None else float(value))
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise RewardError(
                f"reward function {name}: expected a number or None for each completion, got "
                f"{value!r:.200} for completion {completions[row]!r:.1000}"
            ) from error
    infinite = sum(abs(value) > LARGEST for value in clean)
    if infinite:
        logger.warning(
            "reward function %s gave %d rewards that no float32 holds; they are left out like None",
            name,
            infinite,
        )
    return clean


def _values(
    function: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
) -> list[Any]:
    """What a function returns, also one declared `async`.

    It gets copies: what it does to them is nothing to the functions after it.
    """
    given = copy.deepcopy({**columns, "prompts": list(prompts), "completions": list(completions)})
    values = function(**given)
    if inspect.isawaitable(values):
        values = asyncio.run(_wait(values))
    if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"expected a list of {len(completions)} rewards, got {values!r:.200}")
    return list(values)


async def _wait(values: Awaitable[Any]) -> Any:
    return await values


def _blame(
    name: str,
    function: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
) -> str:
    """Which sample does it? Each is tried alone."""
    for row in range(len(completions)):
        one = {key: [values[row]] for key, values in columns.items()}
        try:
            _values(function, [prompts[row]], [completions[row]], one)
        except (Exception, SystemExit) as error:
            sample = {key: repr(values[0])[:500] for key, values in one.items()}
            return (
                f"reward function {name} raised {type(error).__name__}: {error}; the sample is "
                f"completion {completions[row]!r:.1000} with {sample}"
            )
    return f"reward function {name} raised on the whole batch, but on no sample alone"
