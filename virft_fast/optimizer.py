"""AdamW for both engines: its settings, which weights decay, and steps that can be skipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.optimizer import StateDict

from virft_fast.arguments import need_package
from virft_fast.batch import Row

# Dettmers et al. 2021, arXiv:2110.02861: name -> bitsandbytes' class.
EIGHT_BIT = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of AdamW and gradient clipping. The learning rate is passed to each step instead."""

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optim: str = "adamw_torch_fused"

    def __post_init__(self) -> None:
        numbers = (self.learning_rate, self.weight_decay, *self.betas)
        ordered = all(0 <= number < math.inf for number in numbers) and 0 < self.epsilon < math.inf
        if not ordered or len(self.betas) != 2 or max(self.betas) >= 1:
            raise ValueError(
                f"optimizer: expected a rate, a weight decay and an epsilon of 0 or more and two "
                f"betas in [0, 1), got {self}"
            )


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that changes neither parameters nor state in a step for which `guard()` is false.

    The guard sits below DeepSpeed, so that all ranks run the same collectives whether or not a step
    is skipped.
    """

    guard: Callable[[], bool] = staticmethod(lambda: True)

    # torch also returns the closure's loss; here, there is never a closure.
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if self.guard():
            super().step(closure)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As torch's, but which kernel computes a step remains as it is here: a state may have been
        saved by another one."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        for saved, own in zip(groups, self.param_groups, strict=False):
            saved.update(fused=own["fused"], foreach=own["foreach"])
        super().load_state_dict({**state_dict, "param_groups": groups})


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """The trainable parameters in two groups: matrices, which decay, and biases and norm weights,
    which don't."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    # Under ZeRO-3 a partitioned parameter keeps its true shape in ds_shape.
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) > 1]
    others = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = ((matrices, weight_decay), (others, 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def make_optimizer(
    policy: nn.Module, settings: OptimizerSettings, fused: bool | None = None
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, as `settings.optim` says.

    Args:
        fused: compute a step in one kernel, without temporary copies of the parameters; None: as
            torch chooses, which is never fused. For adamw_torch_fused only.
    Raises:
        ValueError: bitsandbytes, which has the ones with 8-bit state, is not installed.
    """
    groups = decay_groups(policy, settings.weight_decay)
    options: Row = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.epsilon}
    if settings.optim in EIGHT_BIT:
        bnb = need_package(f"--optim {settings.optim}", "bitsandbytes", "bitsandbytes", "4bit")
        return getattr(bnb.optim, EIGHT_BIT[settings.optim])(groups, **options)
    fused = fused if settings.optim == "adamw_torch_fused" else None
    return GuardedAdamW(groups, **options, fused=fused)
