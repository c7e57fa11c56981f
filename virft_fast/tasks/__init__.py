"""Tasks: what an answer means and what it is worth."""

from __future__ import annotations

import asyncio
import copy
import difflib
import hashlib
import importlib.util
import inspect
import logging
import math
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from virft_fast.tasks.answers import (
    Detection,
    answer_text,
    parse_detection,
    parse_label,
    valid_box,
)
from virft_fast.tasks.coordinates import THOUSAND, extent_of, rescale
from virft_fast.tasks.rewards import (
    accuracy,
    accuracy_confidence,
    accuracy_iou,
    format_reward,
    grounding_giou,
    hungarian_iou,
)
from virft_fast.tasks.visual_rft import (
    visual_rft_accuracy,
    visual_rft_accuracy_confidence,
    visual_rft_accuracy_iou,
    visual_rft_accuracy_iou_v1,
    visual_rft_grounding,
)

__all__ = [
    "ACCURACY_REWARDS",
    "DEFAULT_REWARDS",
    "REWARDS",
    "Detection",
    "RewardError",
    "answer_text",
    "check_solution",
    "detect_task",
    "load_reward_funcs",
    "parse_detection",
    "parse_label",
    "score",
]

logger = logging.getLogger(__name__)

RewardFunction = Callable[..., Sequence[float | None]]

REWARDS: dict[str, RewardFunction] = {
    "accuracy_iou": accuracy_iou,
    "accuracy_confidence": accuracy_confidence,
    "format": format_reward,
    "accuracy": accuracy,
    "grounding_giou": grounding_giou,
    "hungarian_iou": hungarian_iou,
    "visual_rft_accuracy_iou": visual_rft_accuracy_iou,
    "visual_rft_accuracy_iou_v1": visual_rft_accuracy_iou_v1,
    "visual_rft_accuracy_confidence": visual_rft_accuracy_confidence,
    "visual_rft_accuracy": visual_rft_accuracy,
    "visual_rft_grounding": visual_rft_grounding,
}
DEFAULT_REWARDS: dict[str, list[str]] = {
    "detection": ["accuracy_iou", "accuracy_confidence", "format"],
    "classification": ["accuracy", "format"],
    "grounding": ["grounding_giou", "format"],
}
# What a solution scores against itself.
ACCURACY_REWARDS: dict[str, float] = {
    name: 2.0 if name == "visual_rft_grounding" else 1.0 for name in REWARDS if name != "format"
}


CLEAR_MAJORITY = 0.8


class RewardError(RuntimeError):
    """A reward function raised or gave no number; names it and the sample, __cause__ says why."""


def load_reward_funcs(names: Sequence[str]) -> list[tuple[str, RewardFunction]]:
    """Reward functions by registry name or as path/to/file.py:function.

    Returns:
        (name, function) in the order given; a function from a file goes by its own name.
    Raises:
        ValueError: no such name, file or function; or the same name twice.
    """
    functions = [_load_from_file(name) if ":" in name else _registered(name) for name in names]
    given = [name for name, _ in functions]
    if len(set(given)) < len(given):
        raise ValueError(f"--reward_funcs: expected different names, got {given}")
    return functions


def _registered(name: str) -> tuple[str, RewardFunction]:
    if name in REWARDS:
        return name, REWARDS[name]
    close = difflib.get_close_matches(name, REWARDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(REWARDS)}"
    raise ValueError(
        f"--reward_funcs: expected a known name or path/to/file.py:function, got {name!r}; {hint}"
    )


def _load_from_file(name: str) -> tuple[str, RewardFunction]:
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


def detect_task(solutions: Sequence[str]) -> str:
    """The task that solutions belong to: detection, classification or grounding.

    A few that look like another task are taken for malformed: `check_solution` finds them out.

    Raises:
        ValueError: there are none, or fewer than CLEAR_MAJORITY of them agree.
    """
    kinds = Counter(_kind(str(solution)) for solution in solutions)
    most, count = max(kinds.items(), key=lambda item: item[1], default=("", 0))
    if not count or count < CLEAR_MAJORITY * len(solutions):
        found = ", ".join(sorted(kinds)) or "no usable solution"
        raise ValueError(
            f"--task auto: expected solutions of one task, got {found}; pass --task detection, "
            f"classification or grounding"
        )
    return most


def _kind(solution: str) -> str:
    detection = parse_detection(solution)
    if detection is None:
        return "classification"
    written = answer_text(solution).lstrip()
    return "grounding" if written.startswith("(") else "detection"


def check_solution(task: str, solution: str, extent: Sequence[float] | None = None) -> str | None:
    """None for a ground truth that can be scored, else what is wrong with it.

    Args:
        extent: (width, height) of the space its boxes are counted in; None: 0..1000.
    """
    if task == "classification":
        return None if parse_label(solution) else "expected a class name, got an empty solution"
    try:
        detection = parse_detection(solution, None if extent is None else extent_of(extent))
    except ValueError as error:
        return str(error)
    if detection is None:
        return f"expected boxes in the solution, got {solution!r:.120}"
    bad = [box for box in detection.boxes if not valid_box(box)]
    if bad:
        space = "0..1000" if extent is None else f"0..{extent[0]}, 0..{extent[1]}"
        return (
            f"expected boxes with x1 < x2 and y1 < y2 in {space}, got {_as_written(bad[0], extent)}"
        )
    if task == "grounding" and len(detection.boxes) != 1:
        return f"expected one box, got {len(detection.boxes)}"
    return None


def _as_written(box: Sequence[float], extent: Sequence[float] | None) -> list[float]:
    return list(box if extent is None else rescale(box, (THOUSAND, THOUSAND), extent))


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
    infinite = sum(math.isinf(value) for value in clean)
    if infinite:
        logger.warning(
            "reward function %s gave %d infinite rewards; they are left out like None",
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
