"""The configuration from flags and a --config file, and what depends on it alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch

from virft_fast import dist
from virft_fast.algorithms import algorithm_of
from virft_fast.cli import parse
from virft_fast.config import TRAIN_GROUPS, RunConfig, UsageError, given_flags

logger = logging.getLogger("virft_fast")


def parse_args(argv: list[str]) -> RunConfig:
    """The configuration that flags and a --config file describe.

    Raises:
        UsageError: an unknown or misspelt flag or key, or a value out of range.
    """
    config = RunConfig(*parse(TRAIN_GROUPS, argv, "python -m virft_fast.train", launch_lines=True))
    _warn_of_unused(config)
    return config


def _warn_of_unused(config: RunConfig) -> None:
    """Warn of flags without effect: another algorithm's, or of an adapter that isn't trained."""
    algorithm = config.train.algorithm
    lora = [] if config.model.use_peft else given_flags(config.model)
    lora = [name for name in lora if name.startswith("lora_")]
    unused = algorithm_of(config).without_effect(config)
    for names, what in ((unused, f"on --algorithm {algorithm}"), (lora, "without --use_peft")):
        if names:
            flags = ", ".join(f"--{name}" for name in names)
            logger.warning("without effect %s: %s", what, flags)


def num_steps(config: RunConfig, num_rows: int) -> int:
    """Steps of the whole run."""
    if config.train.max_steps > 0:
        return config.train.max_steps
    return max(1, math.ceil(num_rows * config.train.num_train_epochs / prompts_per_step(config)))


def prompts_per_step(config: RunConfig) -> int:
    """Prompts of one step over all ranks."""
    train = config.train
    return train.per_device_train_batch_size * train.gradient_accumulation_steps * dist.world_size()


def learning_rates(config: RunConfig, total_steps: int) -> Callable[[int], float]:
    """Step -> its learning rate, by a schedule of transformers.

    Raises:
        UsageError: there is no such schedule, or it needs more than the step.
    """
    from transformers import get_scheduler

    train = config.train
    warmup = train.warmup_steps or train.warmup_ratio
    warmup_steps = math.ceil(warmup * total_steps) if warmup < 1 else int(warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=train.learning_rate)
    try:
        schedule = get_scheduler(train.lr_scheduler_type, optimizer, warmup_steps, total_steps)
        factors = schedule.lr_lambdas
        factors[0](0), factors[0](total_steps - 1)
    except (ValueError, TypeError, ArithmeticError, AttributeError) as error:
        raise UsageError(
            f"--lr_scheduler_type {train.lr_scheduler_type}: expected a schedule of transformers "
            f"that depends on the step alone, such as linear or cosine, got {error}"
        ) from error
    return lambda step: train.learning_rate * factors[0](min(step, total_steps - 1))
