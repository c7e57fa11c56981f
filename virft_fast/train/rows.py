"""A run's data: which rows are used, and how answers are scored."""

from __future__ import annotations

import logging
import math
from functools import partial

from virft_fast import dist, tasks
from virft_fast.algorithms import algorithm_of
from virft_fast.algorithms.base import Data
from virft_fast.arguments import require
from virft_fast.config import RunConfig, column_names
from virft_fast.data import BadRow, BadRows, ParquetRows, load_rows
from virft_fast.data.prompt_source import PromptSource
from virft_fast.data.samples import open_samples
from virft_fast.data.survey import open_space, survey
from virft_fast.models.families import Processor

logger = logging.getLogger("virft_fast")

NUM_SELF_CHECKED = 16


def prepare_data(config: RunConfig, processor: Processor) -> Data:
    """Load the rows, and choose how answers are scored.

    Raises:
        ValueError, OSError: the data set can't be loaded, or its rows can't be used.
    """
    flags, algorithm = config.data, algorithm_of(config)
    load = partial(
        load_rows,
        flags.dataset_name,
        dataset_config=flags.dataset_config,
        streaming=flags.dataset_streaming,
        columns=column_names(flags.columns),
    )
    rows, task, space = load(flags.dataset_train_split), flags.task, flags.box_space
    algorithm.check_data(config, rows.column_names)
    preferences = algorithm.preferences
    opened = partial(open_samples, box_space=space, compat_prompt=flags.compat_prompt)
    samples, task = opened(rows, "preference" if preferences else task)
    fits = algorithm.check_row(config, processor.tokenizer)
    prompts_of = partial(
        PromptSource, processor=processor, max_prompt_length=flags.max_prompt_length, check=fits
    )
    boxes = open_space(task, space)
    seen = survey(samples, boxes=boxes, check=fits)
    seen.settle_boxes()
    num_prompts, steps = _schedule(config, len(samples))
    if steps * num_prompts >= len(samples):
        seen.check_left_out(flags.max_bad_rows)
    names = [] if preferences else config.grpo.reward_funcs
    if not names and not preferences:
        names = tasks.default_rewards(task, seen.solutions)
    table = seen.table(flags.dataset_train_split, "" if config.grpo.reward_funcs else task)
    share = tasks.negative_share(seen.solutions) if "accuracy_presence" in names else None
    if share is not None:
        table.append(f"  without objects: {share:.1%}, for accuracy_presence")
    test = None
    if config.train.eval_samples:
        held_out, _ = opened(load(flags.dataset_test_split), task)
        test = prompts_of(held_out)
        seen = survey(held_out, boxes=boxes, limit=config.train.eval_samples, check=fits)
        seen.settle_boxes()
        table += seen.lines(flags.dataset_test_split)
    classes = None
    if "accuracy" in names and task == "classification" and algorithm.rolls_out(config):
        classes = samples.classes()
    return Data(
        train=prompts_of(samples),
        test=test,
        task=task,
        reward_funcs=tasks.with_class_set(tasks.load_reward_funcs(names), classes, share),
        reward_weights=config.grpo.weights_of(names),
        bad_rows=BadRows(flags.max_bad_rows),
        prompts_per_step=num_prompts,
        total_steps=steps,
        permutation=rows.permutation if isinstance(rows, ParquetRows) else None,
        table=table,
    )


def _schedule(config: RunConfig, num_rows: int) -> tuple[int, int]:
    """The prompts of one rollout, or of one step without rollouts, on all ranks; and the number of
    steps."""
    train, grpo, updates = config.train, config.grpo, 1
    accumulated = microbatches = train.gradient_accumulation_steps
    if grpo.steps_per_generation and algorithm_of(config).draws:
        microbatches = grpo.steps_per_generation
        updates = grpo.num_iterations * (microbatches // accumulated)
        expected = f"a multiple of --gradient_accumulation_steps {accumulated}"
        require(microbatches % accumulated == 0, "steps_per_generation", expected, microbatches)
    if train.save_steps % updates:
        logger.warning(
            "--save_steps %d: checkpoints are written where a rollout ends, after a multiple of %d "
            "steps", train.save_steps, updates,
        )  # fmt: skip
    num_prompts = train.per_device_train_batch_size * microbatches * dist.world_size()
    if train.max_steps > 0:
        return num_prompts, train.max_steps
    rollouts = max(1, math.ceil(num_rows * train.num_train_epochs / num_prompts))
    return num_prompts, rollouts * updates


def warn_of_unearned(data: Data) -> None:
    """Warn about accuracy rewards that a solution doesn't earn when it is scored as an answer;
    checks rows spread over the data set."""
    count = len(data.train)
    indices = sorted({n * count // NUM_SELF_CHECKED for n in range(NUM_SELF_CHECKED)})
    loaded = [data.train.samples.get(index) for index in indices if index < count]
    samples = [sample for sample in loaded if not isinstance(sample, BadRow)]
    by_name: dict[str, list[str]] = {}
    for row, name, value, best in tasks.unearned(data.reward_funcs, samples):
        by_name.setdefault(name, []).append(f"row {row}: {value} instead of {best}")
    for name, rows in by_name.items():
        logger.warning(
            "reward %s: the solution itself does not earn it in %d of %d rows checked (%s); fix "
            "the solutions, or choose others with --reward_funcs",
            name, len(rows), len(samples), "; ".join(rows[:3]),
        )  # fmt: skip
