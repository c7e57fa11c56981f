"""A run that goes on from a checkpoint: what must be as it was, and what is restored."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from virft_fast import checkpoint as checkpoints
from virft_fast import dist
from virft_fast.algorithms import algorithm_of
from virft_fast.algorithms.base import Data
from virft_fast.algorithms.step import TrainState
from virft_fast.config import RunConfig, UsageError, usage
from virft_fast.console import say
from virft_fast.data import PromptSampler
from virft_fast.engine import find_state
from virft_fast.models.adapters import LoraPlan
from virft_fast.models.qwen_vl import weights_stamp
from virft_fast.models.tiny import resolve_model_path

logger = logging.getLogger("virft_fast")

# What must not change between a run and its continuation; anything else may, and is named, except
# what says where and how often things are written.
SAME_ON_RESUME = """
    algorithm per_device_train_batch_size gradient_accumulation_steps num_generations seed
    dataset_name dataset_train_split dataset_config dataset_streaming compat_prompt
    model_name_or_path freeze_vision_tower bf16 use_peft lora_r lora_alpha lora_target_modules
    dpo_beta label_smoothing dpo_gamma precompute_ref_log_probs
""".split()
UNNAMED_ON_RESUME = """
    output_dir overwrite_output_dir run_name config dry_run logging_steps report_to
    log_completions_steps save_steps save_only_model save_total_limit resume_from_checkpoint
    local_rank
""".split()


def read_resumed(folder: Path, config: RunConfig, plan: LoraPlan | None) -> dict[str, Any]:
    """The state of the run that is continued, and in `changed` which flags are others.

    Raises:
        ValueError, FileNotFoundError: it can't be continued so.
    """
    saved = checkpoints.read_state(folder)
    checkpoints.check_state(folder, saved)
    saved["config"] = saved.get("config") or {}
    now = config.flat() | {"processes": dist.world_size()}
    was = saved["config"] | {"processes": saved.get("world_size")}
    changed = [k for k in ("processes", *SAME_ON_RESUME) if was.get(k, now[k]) != now[k]]
    if changed:
        raise UsageError(
            f"--resume_from_checkpoint {folder}: expected what it was saved with, "
            f"{ {k: was[k] for k in changed} }, got { {k: now[k] for k in changed} }; pass the "
            "same, or start a new run in another folder"
        )
    adapter = plan.kind if plan else None
    if config.model.use_peft and saved.get("adapter", "new") != adapter:
        raise UsageError(
            f"--resume_from_checkpoint {folder}: expected a run whose adapter is "
            f"{adapter}, got one whose adapter is "
            f"{saved.get('adapter', 'on merged weights that were not saved')}; "
            "docs/checkpoints.md says how to rescue what an earlier version wrote"
        )
    find_state(folder / "engine", deepspeed=config.train.deepspeed is not None)
    if adapter != "stacked":  # else its base may have to be merged again first
        path = resolve_model_path(config.model.model_name_or_path)
        check_base_weights(folder, saved, weights_stamp(path), config)
    changed = {k for k in now.keys() - UNNAMED_ON_RESUME if was.get(k, now[k]) != now[k]}
    saved["changed"] = ", ".join(f"--{k} {was[k]} -> {now[k]}" for k in now if k in changed)
    if changed:
        logger.warning("resumed with other flags: %s", saved["changed"])
    return saved


def load_checkpoint(
    folder: Path,
    saved: dict[str, Any],
    state: TrainState,
    sampler: PromptSampler,
    data: Data,
    config: RunConfig,
) -> None:
    with usage():
        check_base_weights(folder, saved, state.base_weights, config)
        state.engine.load_state(folder / "engine")
        try:
            _restore(saved, state, sampler, data)
        except ValueError as error:
            raise UsageError(
                f"{folder}: expected the state of this run: {error}; or resume an earlier "
                f"checkpoint"
            ) from error
    if dist.is_main():
        output_dir = Path(config.train.output_dir)
        # Not another run's, which `folder` may be of.
        for path in checkpoints.set_later_aside(output_dir, state.step):
            say(f"a later checkpoint is now {path}")
        checkpoints.delete_leftovers(output_dir, config.train.save_total_limit)
    say(f"resumed {folder} at step {state.step}")


def check_base_weights(
    folder: Path, saved: dict[str, Any], now: list[Any] | None, config: RunConfig
) -> None:
    if not _same_weights(config, saved.get("weights"), now):
        raise UsageError(
            f"--resume_from_checkpoint {folder}: expected the weights in "
            f"--model_name_or_path {config.model.model_name_or_path} as they were when the run "
            "began, for they are its reference or under its adapter; put them back or start "
            "again"
        )


def _same_weights(config: RunConfig, saved: list[Any] | None, now: list[Any] | None) -> bool:
    """Whether the files that the rest of the run goes on needing are those it began with: all of
    them for a reference, the base model's for an adapter."""
    if algorithm_of(config).uses_reference(config):
        return saved is None or saved == now
    if saved is None or not config.model.use_peft:
        return True
    of_base = [
        [file for file in stamp if not file[0].startswith("adapter_model.")]
        for stamp in (saved, now or [])
    ]
    return of_base[0] == of_base[1]


def _restore(saved: dict[str, Any], state: TrainState, sampler: PromptSampler, data: Data) -> None:
    state.step, state.bad_steps = saved["step"], saved["bad_steps"]
    state.skipped_steps, state.num_tokens = saved["skipped_steps"], saved["num_tokens"]
    state.silent_steps = dict(saved.get("silent_steps") or {})
    state.idle_steps = dict(saved.get("idle_steps") or {})
    sampler.load_state_dict(saved["sampler"])
    data.bad_rows.load_state_dict(saved["bad_rows"])
