"""Reward functions by name or path, called as in TRL: a batch of completions -> rewards."""

from __future__ import annotations

import asyncio
import copy
import difflib
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
from types import ModuleType
from typing import Any, Protocol, SupportsFloat, TypeAlias

import torch
from torch import Tensor

from virft_fast.batch import Json, Row
from virft_fast.digests import digest_of

logger = logging.getLogger(__name__)

# Arguments of a reward function that are not columns of the data set.
_ALWAYS = ("prompts", "completions", "completion_ids", "image_grid_thw")
RESERVED = frozenset((*_ALWAYS, "images", "trainer_state", "log_extra", "log_metric"))
LARGEST = torch.finfo(torch.float32).max
Conversation: TypeAlias = str | Sequence[Row]  # a prompt or a completion: text, or messages


class RewardFunction(Protocol):
    """A reward function as TRL calls it, with all arguments by name. It may be `async`.

    Args:
        prompts, completions: N each.
        columns: the data set's columns, N values each, and `RewardLog.arguments`.
    Returns:
        N rewards; None for a completion that the function doesn't score.
    """

    def __call__(
        self,
        *,
        prompts: Sequence[Conversation],
        completions: Sequence[Conversation],
        **columns: Json,
    ) -> Sequence[float | None]: ...


NamedRewards: TypeAlias = Sequence[tuple[str, RewardFunction]]


class RewardError(RuntimeError):
    """A reward function raised or didn't return numbers. Names the function and the sample."""


def load_function(name: str) -> tuple[str, RewardFunction]:
    """Load a reward function from path/to/file.py:name or package.module:name. The name may also be
    a class, which is called without arguments, or an object's method, such as `scorer.score`.

    Returns:
        The last part of the name, and the function.
    Raises:
        ValueError: the file, module or name doesn't exist, or isn't callable.
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
    target: Any = module
    for word in attribute.split("."):
        if not hasattr(target, word):
            close = difflib.get_close_matches(word, dir(target), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"--reward_funcs {name}: no function {attribute!r} in {where}{hint}")
        target = getattr(target, word)
    if inspect.isclass(target):
        try:
            target = target()
        except (Exception, SystemExit) as error:
            raise ValueError(
                f"--reward_funcs {name}: expected a class that can be created without arguments, "
                f"got {type(error).__name__}: {error}"
            ) from error
    if not callable(target):
        raise ValueError(f"--reward_funcs {name}: no function {attribute!r} in {where}")
    return attribute.rsplit(".", 1)[-1], target


def _module_of(path: str) -> ModuleType:
    unique = digest_of([str(Path(path).resolve())])[:12]
    spec = importlib.util.spec_from_file_location(f"virft_fast_rewards_{unique}", path)
    if spec is None or spec.loader is None:
        raise ImportError("expected a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their own module
    spec.loader.exec_module(module)
    return module


@dataclass
class RewardLog:
    """What reward functions report in addition to their rewards, as with TRL's trainer.

    Attributes:
        metrics: name -> values.
        extra: column -> one value per completion.
    """

    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Json]] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        """Report a number. Its mean over a step and all ranks becomes a metric with that name."""
        self.metrics.setdefault(str(name), []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Json]) -> None:
        """Report a column for the records of completions, with one value per completion."""
        self.extra.setdefault(str(column), []).extend(values)

    def arguments(self, trainer_state: object = None) -> dict[str, object]:
        """The arguments that give a reward function access to this log."""
        logs = {"log_extra": self.log_extra, "log_metric": self.log_metric}
        return {"trainer_state": trainer_state, **logs}


def score(
    reward_funcs: NamedRewards,
    weights: Sequence[float],
    prompts: Sequence[Conversation],
    completions: Sequence[Conversation],
    columns: Mapping[str, Sequence[Json]],
    shared: Mapping[str, object] | None = None,
    section: Callable[[str], AbstractContextManager[object]] = nullcontext,
    clip: Sequence[float] = (),
) -> tuple[Tensor, Tensor]:
    """Call every reward function on all N completions and sum their rewards, like TRL 1.16.

    Args:
        columns: the data set's columns, N values each. `images` goes only to functions that name
            it.
        shared: arguments that don't belong to one completion, passed to functions that take them.
            None: the arguments of a `RewardLog` that is discarded.
        section: description of a function -> the context in which it is called.
        clip: the range (lowest, highest) to which each reward is clipped; empty: unlimited.
    Returns:
        (N, R) float32 rewards, NaN where a function returned None or a non-finite number; and (N,)
        their weighted sums over the functions that did score, NaN if none did.
    Raises:
        RewardError: a function raised, or returned something other than numbers and None.
        ValueError: a function didn't return N rewards.
    """
    shared = RewardLog().arguments() if shared is None else shared
    arguments = {**columns, "prompts": list(prompts), "completions": list(completions)}
    per_function = []
    for name, function in reward_funcs:
        with section(f"reward function {name}"):
            taken = _taken(function, arguments)
            per_function.append(_call(name, _given(function, shared), taken))
    rewards = torch.tensor(per_function, dtype=torch.float32).T  # (N, R)
    # A finite double may still overflow float32.
    rewards = rewards.masked_fill(~rewards.isfinite(), torch.nan)
    rewards = rewards.clamp(*clip) if clip else rewards
    total = (rewards * torch.tensor(weights, dtype=torch.float32)).nansum(1)
    unscored = rewards.isnan().all(1) | ~total.isfinite()
    return rewards, total.masked_fill(unscored, torch.nan)


def _given(
    function: Callable[..., Sequence[float | None]], shared: Mapping[str, object]
) -> RewardFunction:
    """The function, with those shared arguments bound that it takes."""
    parameters = _parameters(function)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    taken = {name: value for name, value in shared.items() if takes_all or name in parameters}
    return partial(function, **taken)


def _taken(function: RewardFunction, arguments: _Arguments) -> _Arguments:
    """The arguments without images, unless the function names them: they are large."""
    if "images" in _parameters(function):
        return arguments
    return {name: values for name, values in arguments.items() if name != "images"}


def _parameters(function: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin
        return {}


def check_arguments(reward_funcs: NamedRewards, columns: Iterable[str]) -> None:
    """Raise ValueError if a function can't be called with the arguments it will get.

    Args:
        columns: names in `Sample.columns`.
    """
    names = [*dict.fromkeys((*_ALWAYS, *columns))]
    for name, function in reward_funcs:
        try:
            signature = inspect.signature(_given(function, RewardLog().arguments()))
            given = _taken(function, dict.fromkeys((*names, "images"), ()))
        except ValueError:  # a builtin without a signature
            continue
        try:
            signature.bind(**given)
        except TypeError as error:
            raise ValueError(
                f"--reward_funcs {name}: expected a function that takes {', '.join(names)} by "
                f"name, or **columns for those it doesn't need, got {signature}: {error}"
            ) from error


_Arguments: TypeAlias = Mapping[str, Sequence[Json]]  # columns, prompts, completions; N values each


def _call(name: str, function: RewardFunction, arguments: _Arguments) -> list[float]:
    """The rewards of a function, with NaN for None."""
    try:
        values = call(function, arguments)
    except (Exception, SystemExit) as error:  # a bug in the reward, not a bad answer: end the run
        raise RewardError(_blame(name, function, arguments)) from error
    completions = arguments["completions"]
    if len(values) != len(completions):
        raise ValueError(
            f"reward function {name}: expected {len(completions)} rewards, one per completion, got "
            f"{len(values)}"
        )
    clean = []
    for completion, value in zip(completions, values, strict=True):
        try:
            clean.append(math.nan if value is None else float(value))
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise RewardError(
                f"reward function {name}: expected a number or None for each completion, got "
                f"{value!r:.200} for completion {completion!r:.1000}"
            ) from error
    infinite = sum(abs(value) > LARGEST for value in clean)
    if infinite:
        logger.warning(
            "reward function %s gave %d rewards beyond the range of float32; they count as None",
            name,
            infinite,
        )
    return clean


def call(function: RewardFunction, arguments: _Arguments) -> list[SupportsFloat | None]:
    """The return value of a function, awaited if the function is `async`.

    The function gets copies, so that it can't change what the next function sees, except of images.
    """
    same = {id(image): image for images in arguments.get("images", ()) for image in images}
    values: object = function(**copy.deepcopy(dict(arguments), same))
    if inspect.isawaitable(values):
        values = asyncio.run(_wait(values))
    if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
        count = len(arguments["completions"])
        raise TypeError(f"expected a list of {count} rewards, got {values!r:.200}")
    return list(values)


async def _wait(values: Awaitable[object]) -> object:
    return await values


def _blame(name: str, function: RewardFunction, arguments: _Arguments) -> str:
    """An error message that names the first sample for which the function raises on its own."""
    for row, completion in enumerate(arguments["completions"]):
        one = {key: [values[row]] for key, values in arguments.items()}
        try:
            call(function, one)
        except (Exception, SystemExit) as error:
            columns = {key: one[key] for key in one if key not in ("prompts", "completions")}
            sample = {key: repr(value)[:500] for key, (value,) in columns.items()}
            return (
                f"reward function {name} raised {type(error).__name__}: {error}; the sample is "
                f"completion {completion!r:.1000} with {sample}"
            )
    return f"reward function {name} raised on the whole batch, but on no sample alone"
