"""The configuration from flags and a --config file."""

from __future__ import annotations

import logging

from virft_fast.algorithms import algorithm_of
from virft_fast.cli import parse
from virft_fast.config import TRAIN_GROUPS, RunConfig, given_flags

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
