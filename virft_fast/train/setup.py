"""Everything before the first step."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from virft_fast import checkpoint as checkpoints
from virft_fast import dist
from virft_fast.algorithms import algorithm_of, find_algorithm
from virft_fast.algorithms.base import Data
from virft_fast.algorithms.step import TrainState
from virft_fast.arguments import need_package, was_given
from virft_fast.batch import Prompt, Row
from virft_fast.config import ALGORITHMS, RunConfig, UsageError, usage
from virft_fast.console import say
from virft_fast.data import PromptSampler
from virft_fast.data.writing import make_folder
from virft_fast.metrics import COMPLETIONS_FILE, METRICS_FILE, MetricsWriter, check_trackers
from virft_fast.models.adapters import plan_lora
from virft_fast.models.families import Processor, why_plain
from virft_fast.models.policy import Policy
from virft_fast.models.processing import load_processor
from virft_fast.models.source import BASE_FOLDER, ModelSource, find_model
from virft_fast.optimizer import EIGHT_BIT
from virft_fast.output_lock import OutputLock
from virft_fast.rollout.backends import check_cache_limit
from virft_fast.tasks.scoring import check_arguments
from virft_fast.train.dry_run import dry_run
from virft_fast.train.memory import fitting_tokens, image_patches
from virft_fast.train.model import Blueprint, draw_blueprint, prepare_training
from virft_fast.train.resume import load_checkpoint, read_resumed
from virft_fast.train.rows import prepare_data, warn_of_unearned
from virft_fast.watch import Watch

SUMMARY_FILE, REPORT_FILE = "summary.json", "report.png"
_OF_A_RUN = re.compile(rf"checkpoint-\d+|{BASE_FOLDER}|{checkpoints.LEFTOVER.pattern}")


@dataclass
class Run:
    """A run that is ready for its first step.

    Attributes:
        saved: the state of the checkpoint that it resumes; empty without one.
        saved_step: the last step that needs no checkpoint: already saved, or the initial state.
    """

    processor: Processor
    data: Data
    state: TrainState
    sampler: PromptSampler
    writer: MetricsWriter
    saved: Row
    saved_step: int


def set_up(config: RunConfig, device: torch.device, watch: Watch, lock: OutputLock) -> Run | int:
    """Prepare the run; a dry run returns its exit status instead.

    Raises:
        UsageError: the flags don't describe a run that can start.
    """
    output_dir, algorithm = Path(config.train.output_dir), algorithm_of(config)
    with usage():
        _check_flags(config, device)
        source = find_model(config.model.model_name_or_path, config.model.model_revision)
        config.model, plan = plan_lora(config.model, source)
        resume = prepare_output_dir(config, lock, source)
        config.grpo.settle_backend(why_plain(source.config.model_type))
        adapter = plan.kind if plan else None
        saved = read_resumed(resume, config, source, adapter) if resume else {}
        processor = load_processor(
            source, min_pixels=config.model.min_pixels, max_pixels=config.model.max_pixels
        )
        data = prepare_data(config, processor)
    for line in data.table:
        say(line)
    with usage():
        if plan is not None:
            say(str(plan))
        blueprint, policy = draw_blueprint(config, data, source, plan)
        prompt = data.train.first()
        if data.test is not None:
            data.test.first()
        check_arguments(data.reward_funcs, prompt.sample.columns)
        max_tokens = microbatch_tokens(blueprint, data, policy, prompt, device)
        if config.train.dry_run:
            return dry_run(blueprint, data, prompt, policy, max_tokens)
        del policy
    if algorithm.draws:
        warn_of_unearned(data)
    with usage():
        state = prepare_training(blueprint, processor, data, device, resume is not None)
        state.section, state.reward_timeout = watch.section, config.train.reward_timeout
        state.max_tokens_per_microbatch = max_tokens
    sampler = PromptSampler(
        len(data.train),
        data.prompts_per_step // dist.world_size(),
        seed=config.train.seed,
        rank=dist.rank(),
        world_size=dist.world_size(),
        permutation=data.permutation,
        curriculum=config.grpo.curriculum if algorithm.draws else 0,
    )
    if resume:
        load_checkpoint(resume, saved, state, sampler, data, config)
    here = resume is not None and resume.parent.resolve() == output_dir.resolve()
    with usage():
        # Delete an earlier run only once this one has everything it needs.
        if config.train.overwrite_output_dir and not here:
            keep = BASE_FOLDER if state.adapter == "stacked" else ""
            dist.on_main(partial(_delete_run, output_dir, keep))
        algorithm.begin(config, state, data, resumed=bool(resume))
        writer = _open_writer(config, data.total_steps, state.step)
    if saved:
        writer.load_state_dict(saved["writer"])
    saved_step = -1 if resume and not here else state.step
    return Run(processor, data, state, sampler, writer, saved, saved_step)


def microbatch_tokens(
    blueprint: Blueprint, data: Data, policy: Policy, prompt: Prompt, device: torch.device
) -> int | None:
    """The limit on a microbatch's tokens, the same on all ranks: --max_tokens_per_microbatch; or,
    on a GPU and without a batch size from the user, what fits; or None.

    Args:
        policy: without weights. prompt: its images count as typical.
    """
    train = blueprint.config.train
    given = was_given(train, "per_device_train_batch_size")
    if train.max_tokens_per_microbatch or given or device.type != "cuda":
        return train.max_tokens_per_microbatch
    free, patches = torch.cuda.mem_get_info(device)[0], image_patches(prompt)
    fits = min(dist.all_gather_object(fitting_tokens(blueprint, data, policy, patches, free)))
    say(f"microbatches: up to {fits:,} tokens; --max_tokens_per_microbatch sets another limit")
    return fits


def _check_flags(config: RunConfig, device: torch.device) -> None:
    """Raise ValueError if trackers are missing, no rollout can fit into its cache, the output
    folder has no name, or flags don't go together."""
    check_trackers(config.train.report_to)
    if algorithm_of(config).rolls_out(config):
        check_cache_limit(
            config.grpo.rollout_backend,
            config.grpo.rollout_cache_tokens,
            num_generations=config.grpo.num_generations,
            max_prompt_length=config.data.max_prompt_length,
            max_completion_length=config.grpo.max_completion_length,
            device=device,
        )
    _check_bits(config, device)
    if not config.train.output_dir.strip():
        raise UsageError("--output_dir: expected a folder, got an empty name")


def _check_bits(config: RunConfig, device: torch.device) -> None:
    """Raise ValueError if this run can't use the few bits of --load_in_4bit or --optim."""
    eight_bit, deepspeed = config.train.optim in EIGHT_BIT, config.train.deepspeed
    if not eight_bit and not config.model.load_in_4bit:
        return
    flag = f"--optim {config.train.optim}" if eight_bit else "--load_in_4bit"
    if deepspeed:
        raise UsageError(f"{flag}: expected a run without --deepspeed, got {deepspeed}; drop one")
    if eight_bit and device.type != "cuda":
        raise UsageError(f"{flag}: expected a GPU, got the {device.type}; pass adamw_torch")
    need_package(flag, "bitsandbytes", "bitsandbytes", "4bit")


def _open_writer(config: RunConfig, total_steps: int, step: int) -> MetricsWriter:
    """The writer of the run's records; drops the records after `step` when a run resumes."""
    train, output_dir = config.train, Path(config.train.output_dir)
    writer = MetricsWriter(
        output_dir,
        total_steps=total_steps,
        report_to=train.report_to,
        run_name=train.run_name or output_dir.name,
        config=config.flat(),
        logging_steps=train.logging_steps,
        log_completions_steps=train.log_completions_steps,
        is_main=dist.is_main(),
        start_step=step,
    )
    if train.resume_from_checkpoint:
        writer.truncate_to(step)
    return writer


def prepare_output_dir(config: RunConfig, lock: OutputLock, source: ModelSource) -> Path | None:
    """Lock --output_dir and check that this run may write there; returns the checkpoint to resume,
    if any.

    Args:
        source: the model that the run starts from.
    Raises:
        UsageError: the folder holds another run or a model, or training would overwrite its own
            model.
    """
    output_dir = Path(config.train.output_dir)
    begins_in = [Path(name).resolve() for name, _ in source.chain]
    if output_dir.is_dir() and output_dir.resolve() in begins_in:
        raise UsageError(
            f"--output_dir {output_dir}: expected a folder other than --model_name_or_path and "
            "its adapter's base, which would be overwritten"
        )
    if config.train.dry_run:
        make_folder(output_dir, "--output_dir", make=False)
    else:
        dist.on_main(partial(make_folder, output_dir, "--output_dir"))
        dist.on_main(lock.acquire)
    resume, wanted = None, config.train.resume_from_checkpoint
    if wanted:
        resume = checkpoints.find_checkpoint(output_dir, wanted, dry_run=config.train.dry_run)
    left = ["config.json", "adapter_config.json", "damaged-checkpoint-*"]
    if wanted and resume is None:
        say(f"--resume_from_checkpoint {wanted}: no checkpoint in {output_dir}; this run starts")
    elif resume is not None and resume.parent.resolve() == output_dir.resolve():
        return resume
    else:  # `true` also restarts a run that was killed before its first checkpoint
        left += [METRICS_FILE, BASE_FOLDER]
    holds_run = checkpoints.list_checkpoints(output_dir) or any(
        any(output_dir.glob(name)) for name in left
    )
    occupied = dist.any_rank(bool(holds_run), dist.local_device())
    dist.barrier()
    if occupied and not config.train.overwrite_output_dir:
        raise UsageError(
            f"--output_dir {output_dir} already holds a run or a model; pass "
            "--resume_from_checkpoint latest to continue it, --overwrite_output_dir to delete "
            "it, or another folder"
        )
    for model in begins_in:
        if occupied and model.parent == output_dir.resolve() and _OF_A_RUN.fullmatch(model.name):
            raise UsageError(
                f"--overwrite_output_dir would delete {model}, which --model_name_or_path names or "
                f"its adapter needs; pass another --output_dir"
            )
    return resume


def _delete_run(output_dir: Path, keep: str) -> None:
    """Delete the files that a run writes, except `keep`; all other files stay."""
    files = {METRICS_FILE, COMPLETIONS_FILE, SUMMARY_FILE, REPORT_FILE, "config.json",
             "generation_config.json"}  # fmt: skip
    files |= {name for algorithm in map(find_algorithm, ALGORITHMS) for name in algorithm.files}
    for path in output_dir.iterdir():
        if _OF_A_RUN.fullmatch(path.name) and path.name != keep:
            checkpoints.delete(path)
        elif path.name in files or checkpoints.MODEL_FILES.fullmatch(path.name):
            path.unlink()
