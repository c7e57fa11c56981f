"""The arguments of the GRPO loss besides log-probs, defined in one place."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ParamSpec, TypeVar

from torch import Tensor

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo")
LEVELS = ("token", "sequence")
KL_KINDS = ("k1", "k2", "k3")

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class LossArgs:
    """The arguments of `grpo_loss`, documented there. Checked as far as possible without the
    tokens.

    Raises:
        ValueError: a wrong name or number; says what was expected and what was given.
    """

    rewards: Tensor | None = None
    advantages: Tensor | None = None
    num_generations: int | None = None
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    beta: float = 0.0
    epsilon_low: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    loss_type: str = "grpo"
    importance_sampling_level: str = "token"
    kl: str = "k3"
    max_completion_length: int | None = None
    num_items: int | float | Tensor | None = None

    def __post_init__(self) -> None:
        choices = {"loss_type": LOSS_TYPES, "importance_sampling_level": LEVELS, "kl": KL_KINDS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")
        numbers = {"beta": self.beta, "epsilon_low": self.epsilon_low,
                   "epsilon_high": self.upper_epsilon}  # fmt: skip
        for name, value in numbers.items():
            if not value >= 0 or (name == "beta" and value == math.inf):
                raise ValueError(f"{name}: expected a number >= 0, got {value}")
        if self.delta is not None and not self.delta > 0:
            raise ValueError(f"delta: expected a number > 0 or None, got {self.delta}")

    @property
    def upper_epsilon(self) -> float:
        return self.epsilon_low if self.epsilon_high is None else self.epsilon_high


def takes_loss_args(function: Callable[P, R]) -> Callable[P, R]:
    """Show LossArgs' fields in the signature of a function that collects them in `**loss`."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
    kind = inspect.Parameter.KEYWORD_ONLY
    collected = [
        inspect.Parameter(field.name, kind, default=field.default, annotation=field.type)
        for field in fields(LossArgs)
    ]
    shown = signature.replace(parameters=[*own, *collected])

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if unknown := kwargs.keys() - shown.parameters.keys():
            message = f"expected what its help shows, got the unknown argument {min(unknown)}"
            raise TypeError(f"{function.__name__}: {message}")
        return function(*args, **kwargs)

    vars(checked)["__signature__"] = shown
    return checked
