"""Reward functions by name or path, called as TRL calls them: a batch of answers -> rewards."""

from __future__ import annotations

import asyncio
import copy
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import logging
import math
import re
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# What a reward function gets beside a row's columns.
_ALWAYS = ("prompts", "completions", "completion_ids", "image_grid_thw")
RESERVED = frozenset((*_ALWAYS, "trainer_state", "log_extra", "log_metric"))
LARGEST = torch.finfo(torch.float32).max
RewardFunction = Callable[..., Sequence[float | None]]


class RewardError(RuntimeError):
    """A reward function raised or gave no number; names it and the sample, __cause__ says why."""


def load_function(name: str) -> tuple[str, RewardFunction]:
    """A reward from path/to/file.py:name or package.module:name; the name may be that of a class,
    which is called without arguments, or a method of an object, `scorer.score`.

    Returns:
        the last part of the name, and the function.
    Raises:
        ValueError: there is no such file, module or name, or it can't be called.
    """
    where, _, attribute = name.rpartition(":")
    is_module = re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", where) and not Path(where).is_file()
    if not is_module and not Path(where).is_file():
        raise ValueError(
            f"--reward_funcs {name}: expected path/to/file.py:function or package.module:function, "
            f"no file {where}"
        )
    try:
        module = importlib.import_module(where) if is_module else _module_of(where)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"--reward_funcs {name}: {where} can't be imported: {type(error).__name__}: {error}"
        ) from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"--reward_funcs {name}: no function {attribute!r} in {where}{hint}")
        found = getattr(found, part)
    if inspect.isclass(found):
        found = _made(name, found)
    if not callable(found):
        raise ValueError(f"--reward_funcs {name}: no function {attribute!r} in {where}")
    return attribute.rsplit(".", 1)[-1], found


def _module_of(path: str) -> Any:
    unique = hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(f"virft_fast_rewards_{unique}", path)
    if spec is None or spec.loader is None:
        raise ImportError("expected a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


def _made(name: str, cls: type) -> Any:
    try:
        return cls()
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"--reward_funcs {name}: expected a class that is made without arguments, got "
            f"{type(error).__name__}: {error}"
        ) from error


@dataclass
class RewardLog:
    """What reward functions report beside their values, as with TRL's trainer.

    Attributes:
        metrics: name -> values. extra: column -> a value for each completion.
    """

    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        """Report a number; its mean over a step and all ranks is a metric of that name."""
        self.metrics.setdefault(str(name), []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Report a column of the completions' records, one value a completion."""
        self.extra.setdefault(str(column), []).extend(values)

    def arguments(self, trainer_state: Any = None) -> dict[str, Any]:
        """What a reward function gets of it."""
        return {
            "trainer_state": trainer_state,
            "log_extra": self.log_extra,
            "log_metric": self.log_metric,
        }


def score(
    reward_funcs: Sequence[tuple[str, RewardFunction]],
    weights: Sequence[float],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    shared: Mapping[str, Any] | None = None,
    section: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Tensor, Tensor]:
    """Call every reward function on all N completions and add up, as TRL 1.16 does.

    Args:
        columns: the data set's columns, N values each.
        shared: arguments that are not one a completion, for the functions that take them;
            default: those of a `RewardLog` that nobody reads.
        section: context that each function is called in, by what it is called in messages.
    Returns:
        (N, R) float32 rewards, NaN where a function gave None or nothing finite, and (N,) their
        weighted sums over the functions that did score; NaN where none did.
    Raises:
        RewardError: a function raised, or gave something that is neither a number nor None.
        ValueError: a function returned another number of rewards than N.
    """
    shared = RewardLog().arguments() if shared is None else shared
    per_function = []
    for name, function in reward_funcs:
        with section(f"reward function {name}"):
            given = _given(function, shared)
            per_function.append(_call(name, given, prompts, completions, columns))
    rewards = torch.tensor(per_function, dtype=torch.float32).T  # (N, R)
    # A finite double may still be too large for a float32.
    rewards = rewards.masked_fill(~rewards.isfinite(), torch.nan)
    total = (rewards * torch.tensor(weights, dtype=torch.float32)).nansum(1)
    unscored = rewards.isnan().all(1) | ~total.isfinite()
    return rewards, total.masked_fill(unscored, torch.nan)


def _given(function: RewardFunction, shared: Mapping[str, Any]) -> RewardFunction:
    """The function with those of the shared arguments that it takes."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a builtin
        return function
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    taken = {name: value for name, value in shared.items() if takes_all or name in parameters}
    return partial(function, **taken)


def check_arguments(
    reward_funcs: Sequence[tuple[str, RewardFunction]], columns: Iterable[str]
) -> None:
    """Raise ValueError if a function can't be called with what it is going to get.

    Args:
        columns: of the rows, as `Sample.columns` has them.
    """
    names = [*dict.fromkeys((*_ALWAYS, *columns))]
    for name, function in reward_funcs:
        try:
            signature = inspect.signature(_given(function, RewardLog().arguments()))
        except ValueError:  # of a builtin, which says nothing
            continue
        try:
            signature.bind(**dict.fromkeys(names))
        except TypeError as error:
            raise ValueError(
                f"--reward_funcs {name}: expected a function that takes {', '.join(names)} by "
                f"name, or **columns for what it has no use for, got {signature}: {error}"
            ) from error


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
