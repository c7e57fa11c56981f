"""The arguments of the GRPO loss besides log-probs, defined in one place."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo", "sapo", "luspo", "vespo")
LEVELS = ("token", "sequence")
KL_KINDS = ("k1", "k2", "k3")
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")

# Numbers that may not be negative, and those that may not be 0 either. LIMITS may be infinite.
NOT_NEGATIVE = ("beta", "epsilon_low", "epsilon_high", "vespo_k_pos", "vespo_k_neg",
                "importance_sampling_clip_min")  # fmt: skip
POSITIVE = ("delta", "off_policy_mask_threshold", "sapo_temperature_neg", "sapo_temperature_pos",
            "vespo_lambda_pos", "vespo_lambda_neg", "importance_sampling_clip_max")  # fmt: skip
LIMITS = ("epsilon_low", "epsilon_high", "delta", "off_policy_mask_threshold",
          "importance_sampling_clip_max")  # fmt: skip

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
    use_bias_correction_kl: bool = False
    is_weights: Tensor | None = None
    sapo_temperature_neg: float = 1.05
    sapo_temperature_pos: float = 1.0
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    off_policy_mask_threshold: float | None = None
    sampling_logps: Tensor | None = None
    importance_sampling_mode: str | None = None
    importance_sampling_clip_max: float | None = 3.0
    importance_sampling_clip_min: float | None = None
    top_entropy_quantile: float = 1.0
    entropy_threshold: float | Tensor | None = None
    entropy_coef: float = 0.0
    num_entropy_items: int | float | Tensor | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            check_type(field.name, getattr(self, field.name), str(field.type))
        choices = {"loss_type": LOSS_TYPES, "importance_sampling_level": LEVELS, "kl": KL_KINDS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")
        for name in (*NOT_NEGATIVE, *POSITIVE):
            value, sign = getattr(self, name), ">" if name in POSITIVE else ">="
            if value is None:
                continue
            if not value >= 0 or (value == 0 and sign == ">"):
                raise ValueError(f"{name}: expected a number {sign} 0, got {value}")
            if value == math.inf and name not in LIMITS:
                raise ValueError(f"{name}: expected a finite number, got {value}")
        mode = self.importance_sampling_mode
        # vespo's own weight is already a sequence's.
        modes = CORRECTIONS[:2] if self.loss_type == "vespo" else CORRECTIONS
        if mode is not None and mode not in modes:
            raise ValueError(
                f"importance_sampling_mode: expected None or, with loss_type {self.loss_type}, one "
                f"of {modes}, got {mode!r}"
            )
        if mode is not None and self.is_weights is not None:
            raise ValueError(
                "importance_sampling_mode, is_weights: expected at most one of them, got both"
            )
        if not 0 <= self.top_entropy_quantile <= 1:
            raise ValueError(
                f"top_entropy_quantile: expected a share of the tokens, 0 to 1, got "
                f"{self.top_entropy_quantile}"
            )
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef: expected a finite number, got {self.entropy_coef}")
        if self.top_entropy_quantile < 1 and self.entropy_threshold is not None:
            raise ValueError(
                "entropy_threshold, top_entropy_quantile: expected at most one of them; the "
                "threshold replaces the quantile of this call, so leave top_entropy_quantile at 1"
            )

    @property
    def upper_epsilon(self) -> float:
        return self.epsilon_low if self.epsilon_high is None else self.epsilon_high

    @property
    def by_sequence(self) -> bool:
        """Whether all tokens of a sequence share one ratio."""
        return self.importance_sampling_level == "sequence" or self.loss_type == "gspo"

    @property
    def selects(self) -> bool:
        """Whether the policy term and the entropy bonus leave out tokens of low entropy."""
        return self.top_entropy_quantile < 1 or self.entropy_threshold is not None

    @property
    def scope(self) -> str:
        """What has to be known before one token's loss is: the "token", its "sequence" or the whole
        "call"."""
        counts = self.entropy_coef != 0 and self.num_entropy_items is None
        if self.top_entropy_quantile < 1 or (self.selects and counts):
            return "call"
        whole = self.by_sequence or self.loss_type == "vespo" or self.importance_sampling_mode
        return "sequence" if whole or self.off_policy_mask_threshold is not None else "token"


def check_tensors(**tensors: object) -> None:
    """Raise ValueError for what is no plain tensor. A DTensor would be computed with all its
    communication."""
    for name, tensor in tensors.items():
        check_type(name, tensor, "Tensor")
        if hasattr(tensor, "full_tensor"):
            raise ValueError(
                f"{name}: expected a plain tensor, got a DTensor, as FSDP2 leaves parameters "
                f"outside their module's forward pass; pass {name}.full_tensor()"
            )


def check_type(name: str, value: object, expected: str) -> None:
    """Raise ValueError unless the value is of a type in `expected`, such as "int | None"."""
    if not torch.compiler.is_compiling() and not isinstance(value, _types(expected)):
        raise ValueError(f"{name}: expected {expected}, got {type(value).__name__}; convert it")


@functools.cache
def _types(words: str) -> tuple[type, ...]:
    types = {"Tensor": Tensor, "float": Real, "int": Integral, "str": str, "None": type(None)}
    return tuple(types.get(word, object) for word in words.split(" | "))


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
