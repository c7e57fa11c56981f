"""Resuming a checkpoint: what must not have changed, and what is restored."""

from __future__ import annotations

import logging
from pathlib import Path

from virft_fast import checkpoint as checkpoints
from virft_fast import dist
from virft_fast.algorithms import algorithm_of, find_algorithm
from virft_fast.algorithms.base import Data
from virft_fast.algorithms.step import TrainState
from virft_fast.batch import Json, Row
from virft_fast.config import ALGORITHMS, RunConfig, UsageError, usage
from virft_fast.console import say
from virft_fast.data import PromptSampler
from virft_fast.engine import find_state
from virft_fast.models.source import ModelSource

logger = logging.getLogger("virft_fast")

# Flags that must not change on resume, in addition to those that each algorithm names. Other flags
# may change. Changes are logged, except for flags in the second list, which only decide where and
# how often output is written.
SAME_ON_RESUME = """
    algorithm per_device_train_batch_size gradient_accumulation_steps num_generations seed
    dataset_name dataset_train_split dataset_config dataset_streaming compat_prompt
    model_name_or_path freeze_vision_tower bf16 use_peft lora_r lora_alpha lora_target_modules
    load_in_4bit optim
""".split()
UNNAMED_ON_RESUME = """
    output_dir overwrite_output_dir run_name config dry_run logging_steps report_to
    log_completions_steps save_steps save_only_model save_total_limit resume_from_checkpoint
    local_rank
""".split()


def read_resumed(folder: Path, config: RunConfig, source: ModelSource, adapter: str | None) -> Row:
    """The saved state of the run to resume; its `changed` entry lists the flags that differ.

    Args:
        source: the model that the flags name. adapter: a `LoraPlan.kind`; None without an adapter.
    Raises:
        ValueError, FileNotFoundError: the run can't be resumed with these flags.
    """
    saved = checkpoints.read_state(folder)
    checkpoints.check_state(folder, saved)
    saved["config"] = saved.get("config") or {}
    now = config.flat() | {"processes": dist.world_size()}
    was = saved["config"] | {"processes": saved.get("world_size")}
    changed = [k for k in now if was.get(k, now[k]) != now[k]]
    of_algorithms = [k for name in ALGORITHMS for k in find_algorithm(name).same_on_resume]
    refused = [k for k in ("processes", *SAME_ON_RESUME, *of_algorithms) if k in changed]
    if refused:
        raise UsageError(
            f"--resume_from_checkpoint {folder}: expected what it was saved with, "
            f"{ {k: was[k] for k in refused} }, got { {k: now[k] for k in refused} }; pass the "
            "same, or start a new run in another folder"
        )
    if config.model.use_peft and saved.get("adapter", "new") != adapter:
        saved_adapter = saved.get("adapter", "on merged weights that were not saved")
        raise UsageError(
            f"--resume_from_checkpoint {folder}: expected a run whose adapter is {adapter}, got "
            f"one whose adapter is {saved_adapter}; "
            "docs/checkpoints.md says how to rescue what an earlier version wrote"
        )
    find_state(folder / "engine", deepspeed=config.train.deepspeed is not None)
    if adapter != "stacked":  # a stacked one's base may need to be merged again first
        check_base_weights(folder, saved, source.stamp, config)
    named = [k for k in changed if k not in UNNAMED_ON_RESUME]
    saved["changed"] = ", ".join(f"--{k} {was[k]} -> {now[k]}" for k in named)
    if named:
        logger.warning("resumed with other flags: %s", saved["changed"])
    return saved


def load_checkpoint(
    folder: Path,
    saved: Row,
    state: TrainState,
    sampler: PromptSampler,
    data: Data,
    config: RunConfig,
) -> None:
    """Restore the engine, counters, data order, bad rows and history from a checkpoint."""
    with usage():
        check_base_weights(folder, saved, state.base_weights, config)
        state.engine.load_state(folder / "engine")
        try:
            _restore(saved, state, sampler, data)
            history = checkpoints.read_history(folder)
            if state.history is not None and history is not None:
                state.history.load_state_dict(history)
        except ValueError as error:
            raise UsageError(
                f"{folder}: expected the state of this run: {error}; or resume an earlier "
                f"checkpoint"
            ) from error
    output_dir = Path(config.train.output_dir)

    def tidy() -> None:
        # Not in `folder`, which may belong to another run, whose checkpoints stay as they are.
        for path in checkpoints.set_later_aside(output_dir, state.step):
            say(f"a later checkpoint is now {path}")
        checkpoints.delete_leftovers(output_dir, config.train.save_total_limit)

    dist.on_main(tidy)
    say(f"resumed {folder} at step {state.step}")


def check_base_weights(folder: Path, saved: Row, now: Json, config: RunConfig) -> None:
    """Raise UsageError if the weights that the run started from have changed but are still needed.

    Args:
        now: their current `weights_stamp`.
    """
    if not _same_weights(config, saved.get("weights"), now):
        raise UsageError(
            f"--resume_from_checkpoint {folder}: expected the weights in --model_name_or_path "
            f"{config.model.model_name_or_path} as they were when the run began, because they are "
            "its reference model or its adapter's base; restore them, or start a new run"
        )


def _same_weights(config: RunConfig, saved: Json, now: Json) -> bool:
    """Whether the weight files that the run still needs are unchanged: all files if it has a
    reference, the base model's if it has an adapter. Earlier versions saved no stamp."""
    if saved is None or algorithm_of(config).uses_reference(config):
        return saved is None or saved == now
    if not config.model.use_peft:
        return True
    base, base_now = (
        [file for file in stamp if not file[0].startswith("adapter_model.")]
        for stamp in (saved, now or [])
    )
    return base == base_now


def _restore(saved: Row, state: TrainState, sampler: PromptSampler, data: Data) -> None:
    state.step, state.bad_steps = saved["step"], saved["bad_steps"]
    state.skipped_steps, state.num_tokens = saved["skipped_steps"], saved["num_tokens"]
    state.silent_steps = dict(saved.get("silent_steps") or {})
    state.idle_steps = dict(saved.get("idle_steps") or {})
    prompts = saved.get("num_prompts")
    if prompts is None:  # an earlier version's steps were rollouts with one update's prompts
        per_microbatch = state.prompts_per_microbatch * dist.world_size()
        prompts = state.step * state.gradient_accumulation_steps * per_microbatch
    state.num_prompts = prompts
    sampler.load_state_dict(saved["sampler"])
    sampler.load_streaks(saved.get("curriculum") or [])
    data.bad_rows.load_state_dict(saved["bad_rows"])
