"""`python -m virft_fast.train`: GRPO on a vision-language model, from one process or torchrun.

Flags are flat and named as in TRL and Visual-RFT; `--config run.yaml` gives them from a file, flags
on the command line win.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from virft_fast import checkpoint as checkpoints
from virft_fast import dist, dpo, sft, tasks
from virft_fast.batch import Prompt, Sample
from virft_fast.cli import parse
from virft_fast.commands import end_process
from virft_fast.config import (
    TRAIN_GROUPS,
    GRPOConfig,
    ModelConfig,
    RunConfig,
    UsageError,
    column_names,
    usage,
)
from virft_fast.console import unbreakable
from virft_fast.data import (
    BadRow,
    BadRows,
    NoUsableRows,
    ParquetRows,
    PromptSampler,
    SampleDataset,
    TooManyBadRows,
    first_solutions,
    load_rows,
)
from virft_fast.data.prompts import PromptSource
from virft_fast.data.survey import Survey, open_space, survey
from virft_fast.data.writing import make_folder
from virft_fast.engine import (
    DeepSpeedEngine,
    OptimizerSettings,
    PlainEngine,
    check_deepspeed,
    find_state,
    load_deepspeed_config,
    make_reference,
    prepare_deepspeed,
    resolve_deepspeed_config,
    zero_stage,
)
from virft_fast.evaluation.scoring import Evaluation, evaluate_rewards
from virft_fast.grpo import TooManyBadSteps, TrainState, train_step
from virft_fast.metrics import MetricsWriter, check_trackers
from virft_fast.models.adapters import (
    BASE_FOLDER,
    LORA_DEFAULTS,
    LoraPlan,
    attach,
    is_reference,
    model_chain,
    plan_lora,
)
from virft_fast.models.processing import load_processor
from virft_fast.models.qwen_vl import (
    Policy,
    apply_liger,
    check_weights,
    freeze_vision_tower,
    load_model,
    read_config,
    weights_stamp,
)
from virft_fast.models.tiny import resolve_model_path
from virft_fast.output_lock import HEARTBEAT_SECONDS, OutputLock
from virft_fast.report import format_table, write_report, write_summary
from virft_fast.rollout.backends import check_cache_limit, check_model, make_rollout
from virft_fast.rollout.native import KEPT_SHARE, CachePlan, cache_numbers
from virft_fast.tasks.scoring import check_arguments
from virft_fast.watch import SectionStopped, SectionTimeout, Watch

logger = logging.getLogger("virft_fast")

# What a step does, (state, prompts) -> (metrics, records), by --algorithm.
STEPS: dict[str, Callable[..., Any]] = {
    "grpo": train_step,
    "sft": sft.train_step,
    "dpo": dpo.train_step,
}
# Raised by all ranks at the same place.
AGREED_ERRORS = (TooManyBadRows, TooManyBadSteps, NoUsableRows)
REFERENCE_FILE = "reference_logps.json"
LESS_MEMORY = (
    "--per_device_train_batch_size or --max_tokens_per_microbatch, --num_generations, "
    "--max_completion_length, --max_pixels, --rollout_cache_tokens or --eval_batch_size; or pass "
    "--gradient_checkpointing, --use_peft or a DeepSpeed file with a higher ZeRO stage"
)
SUMMARY_FILE, REPORT_FILE, METRICS_FILE = "summary.json", "report.png", "metrics.jsonl"
_OF_A_RUN = re.compile(rf"checkpoint-\d+|{BASE_FOLDER}|{checkpoints.LEFTOVER.pattern}")
NUM_CHECKED_ROWS, NUM_SELF_CHECKED = 200, 16
NUM_REPORT_EXAMPLES = 5
FIRST_PROMPT_SECONDS = 15.0


@dataclass
class Data:
    """The training rows and their order, the held-out rows, and how they are scored; `table` says
    what was left out and converted."""

    train: PromptSource
    test: PromptSource | None
    task: str
    reward_funcs: list[tuple[str, Callable[..., Any]]]
    reward_weights: list[float]
    bad_rows: BadRows
    permutation: Callable[[np.random.Generator], np.ndarray] | None = None
    table: Sequence[str] = ()


@dataclass
class Run:
    """A run that is set up.

    Attributes:
        saved: what the checkpoint it resumes holds; empty without one.
        saved_step: the latest step that needs no saving, because it is saved or was the first.
    """

    processor: Any
    data: Data
    state: TrainState
    sampler: PromptSampler
    writer: MetricsWriter
    total_steps: int
    saved: dict[str, Any]
    saved_step: int


def parse_args(argv: list[str]) -> RunConfig:
    """Flags and --config file -> configuration.

    Raises:
        UsageError: an unknown or misspelt flag or key, or a value out of range.
    """
    groups = parse(TRAIN_GROUPS, argv, "python -m virft_fast.train", launch_lines=True)
    config = RunConfig(*groups)
    _check_algorithm(config)
    return config


def _check_algorithm(config: RunConfig) -> None:
    """Say which flags have no effect: another algorithm's, or of an adapter that isn't trained.
    TRL's DPO has a --beta too."""
    algorithm, grpo = config.train.algorithm, config.grpo
    if algorithm == "dpo" and grpo.beta != GRPOConfig().beta:
        raise UsageError(
            f"--beta {grpo.beta}: it is the weight of GRPO's KL term; for --algorithm dpo pass "
            f"--dpo_beta {grpo.beta}"
        )
    given = [] if algorithm == "dpo" else _given(config.dpo)
    if algorithm != "grpo":
        given += [name for name in _given(grpo) if name not in ALSO_BESIDE_GRPO]
    if algorithm == "sft" and config.train.eval_samples:  # its evaluation scores answers
        given = [name for name in given if not name.startswith("reward_")]
    if algorithm == "dpo" and config.data.task != "auto":
        given.append("task")
    lora = [] if config.model.use_peft else _given(config.model)
    lora = [name for name in lora if name.startswith("lora_")]
    for names, what in ((given, f"on --algorithm {algorithm}"), (lora, "without --use_peft")):
        if names:
            flags = ", ".join(f"--{name}" for name in names)
            logger.warning("without effect %s: %s", what, flags)


def _given(config: Any) -> list[str]:
    """The flags of a group that have another value than by default."""
    default = type(config)()
    return [f.name for f in fields(config) if getattr(config, f.name) != getattr(default, f.name)]


@unbreakable()
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status: 0 done or stopped by a signal, 2 can't start, 1 had to stop."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    _quiet_libraries()
    if os.environ.get("RANK", "0") != "0":  # what the arguments' warnings go by, before `dist.init`
        logger.setLevel(logging.ERROR)
    try:
        config = parse_args(sys.argv[1:] if argv is None else argv)
        with usage():
            device = dist.init(config.train.ddp_timeout)
        # A warning is said once, by the main process; errors by whoever has them.
        logger.setLevel(logging.INFO if dist.is_main() else logging.ERROR)
        return run(config, device)
    except UsageError as error:
        print(f"virft_fast.train: error: {error}", file=sys.stderr)
        return 2
    except SectionTimeout as error:
        print(f"virft_fast.train: stopped: {error} (--reward_timeout)", file=sys.stderr)
        return 1
    except (*AGREED_ERRORS, dist.RankFailed) as error:
        print(f"virft_fast.train: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("virft_fast.train: interrupted", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        traceback.print_exc()
        print(f"virft_fast.train: stopped: out of memory; lower {LESS_MEMORY}", file=sys.stderr)
        return 1
    finally:
        dist.shutdown()


def _is_out_of_memory(error: BaseException) -> bool:
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def run(config: RunConfig, device: torch.device) -> int:
    """Set up, train, save, report, as the only run that writes --output_dir."""
    output_dir = Path(config.train.output_dir)
    lock = OutputLock(output_dir)
    watch = Watch(
        output_dir,
        rank=dist.rank(),
        world_size=dist.world_size(),
        timeout=config.train.ddp_timeout,
        beat=lock.beat,
        beat_seconds=HEARTBEAT_SECONDS,
        comfort=lambda: _where_to_resume(output_dir),
    )
    with watch:
        try:
            return _run(config, device, watch, lock)
        except BaseException as error:
            if not _is_given_up(error):
                raise
            _say(f"stopped by a signal before the first step; {_where_to_resume(output_dir)}")
            return watch.exit_status
        finally:
            lock.release()


def _run(config: RunConfig, device: torch.device, watch: Watch, lock: OutputLock) -> int:
    output_dir = Path(config.train.output_dir)
    with watch.section("the set-up", patience=0):
        ready = set_up(config, device, watch, lock)
    if isinstance(ready, int):
        return ready
    data, state, writer = ready.data, ready.state, ready.writer
    before = ready.saved.get("before") or _evaluate(config, state, data)
    started = time.perf_counter()
    ended = train(config, ready, before, watch)
    train_seconds = time.perf_counter() - started
    writer.close()
    if ended in ("saved", "lost"):
        where = f"stopped by a signal after step {state.step} of {ready.total_steps}"
        if ended == "lost":
            _say(f"{where}; this step could NOT be saved; {_where_to_resume(output_dir)}")
            return 1
        _say(f"{where}; {_where_to_resume(output_dir)}")
        return watch.exit_status
    written = checkpoints.write_final_model(
        output_dir,
        model=state.policy.model,
        processor=ready.processor,
        engine=state.engine,
        dtype=state.save_dtype,
    )
    after = None
    try:
        after = _evaluate(config, state, data)
    except BaseException as error:
        if not _is_given_up(error):
            raise
        _say("stopped by a signal; the evaluation after training was given up")
    if dist.is_main():
        conclude(config, data, state, before, after, train_seconds)
        if ready.saved.get("changed"):
            print(f"resumed with other flags: {ready.saved['changed']}")
    dist.barrier()
    if ended == "incomplete":
        _say(f"not all checkpoints could be written into {output_dir}; see above")
    if not written:
        _say(f"the model could NOT be written into {output_dir}; see above")
    return watch.exit_status if written and ended == "done" else 1


def set_up(config: RunConfig, device: torch.device, watch: Watch, lock: OutputLock) -> Run | int:
    """Everything until the first step; the exit status of a dry run."""
    output_dir = Path(config.train.output_dir)
    with usage():
        check_trackers(config.train.report_to)
        if rolls_out(config):
            check_cache_limit(
                config.grpo.rollout_backend,
                config.grpo.rollout_cache_tokens,
                num_generations=config.grpo.num_generations,
                max_prompt_length=config.data.max_prompt_length,
                max_completion_length=config.grpo.max_completion_length,
                device=device,
            )
        config.model, plan = begin_adapter(config.model)
        resume = prepare_output_dir(config, lock)
        saved = read_resumed(resume, config, plan) if resume else {}
        processor = load_processor(
            resolve_model_path(config.model.model_name_or_path),
            revision=config.model.model_revision,
            min_pixels=config.model.min_pixels,
            max_pixels=config.model.max_pixels,
        )
        data = prepare_data(config, processor)
    for line in data.table:
        _say(line)
    with usage():
        if plan is not None:
            _say(_account(plan))
        policy = check_start(config, data)
        if config.train.dry_run:
            return dry_run(config, data, policy)
        del policy
    if config.train.algorithm == "grpo":
        _warn_of_unearned(data)
    with usage():
        model = _base_model(config, plan, processor, resume)
        state = prepare_training(config, processor, data, device, model)
        state.adapter = plan.kind if plan else None
        state.section, state.reward_timeout = watch.section, config.train.reward_timeout
    sampler = PromptSampler(
        len(data.train),
        state.prompts_per_step,
        seed=config.train.seed,
        rank=dist.rank(),
        world_size=dist.world_size(),
        permutation=data.permutation,
    )
    total_steps = num_steps(config, len(data.train))
    if resume:
        _resume(resume, saved, state, sampler, data, config)
    here = resume is not None and resume.resolve().parent == output_dir.resolve()
    with usage():
        # Nothing of an earlier run is deleted before this one has all that it needs.
        if config.train.overwrite_output_dir and not here and dist.is_main():
            _delete_run(output_dir, keep=model.model_name_or_path)
        dist.barrier()
        if config.dpo.precompute_ref_log_probs and isinstance(state, dpo.DPOState):
            _reference_beforehand(config, state, data, resumed=bool(resume))
        writer = MetricsWriter(
            output_dir,
            total_steps=total_steps,
            report_to=config.train.report_to,
            run_name=config.train.run_name or output_dir.name,
            config=config.flat(),
            logging_steps=config.train.logging_steps,
            log_completions_steps=config.train.log_completions_steps,
            is_main=dist.is_main(),
            start_step=state.step,
        )
    if config.train.resume_from_checkpoint:
        writer.truncate_to(state.step)
    if saved:
        writer.load_state_dict(saved["writer"])
    return Run(
        processor, data, state, sampler, writer, total_steps, saved,
        saved_step=-1 if resume and not here else state.step,
    )  # fmt: skip


def prepare_output_dir(config: RunConfig, lock: OutputLock) -> Path | None:
    """Check that --output_dir is free to be written, and lock it; returns the checkpoint to resume,
    if any."""
    output_dir = Path(config.train.output_dir)
    if not config.train.output_dir.strip():
        raise UsageError("--output_dir: expected a folder, got an empty name")
    begins_in = [Path(name).resolve() for name, _ in model_chain(config.model.model_name_or_path)]
    if output_dir.is_dir() and output_dir.resolve() in begins_in:
        raise UsageError(
            f"--output_dir {output_dir}: expected another folder than --model_name_or_path, and "
            f"than an adapter's base, whose model would be overwritten"
        )
    if config.train.dry_run:
        make_folder(output_dir, "--output_dir", make=False)
    else:
        dist.on_main(partial(_take, output_dir, lock))
    resume, wanted = None, config.train.resume_from_checkpoint
    if wanted:
        resume = checkpoints.find_checkpoint(output_dir, wanted, dry_run=config.train.dry_run)
    left = [METRICS_FILE, BASE_FOLDER, "damaged-checkpoint-*"]
    if wanted and resume is None:
        _say(f"--resume_from_checkpoint {wanted}: no checkpoint in {output_dir}; this run starts")
        # A run that was killed before its first checkpoint starts again.
        left = ["config.json", "adapter_config.json", "damaged-checkpoint-*"]
    elif wanted and resume.resolve().parent == output_dir.resolve():
        return resume
    holds_run = checkpoints.list_checkpoints(output_dir) or any(
        any(output_dir.glob(name)) for name in left
    )
    occupied = dist.any_rank(bool(holds_run), dist.local_device())
    dist.barrier()
    if occupied and not config.train.overwrite_output_dir:
        raise UsageError(
            f"--output_dir {output_dir} already holds a run; pass --resume_from_checkpoint latest "
            f"to go on with it, --overwrite_output_dir to delete it, or another folder"
        )
    for model in begins_in:
        if occupied and model.parent == output_dir.resolve() and _OF_A_RUN.fullmatch(model.name):
            raise UsageError(
                f"--overwrite_output_dir would delete {model}, which --model_name_or_path names or "
                f"its adapter needs; pass another --output_dir"
            )
    return resume


def _take(output_dir: Path, lock: OutputLock) -> None:
    """Make --output_dir this run's alone."""
    make_folder(output_dir, "--output_dir")
    lock.acquire()


def _delete_run(output_dir: Path, keep: str) -> None:
    """Delete what a run writes, except the folder `keep`, and nothing else."""
    files = (METRICS_FILE, "completions.jsonl", SUMMARY_FILE, REPORT_FILE, REFERENCE_FILE,
             "config.json", "generation_config.json")  # fmt: skip
    for path in output_dir.iterdir():
        if _OF_A_RUN.fullmatch(path.name) and path.resolve() != Path(keep):
            checkpoints.delete(path)
        elif path.name in files or checkpoints.MODEL_FILES.fullmatch(path.name):
            path.unlink()


def prepare_data(config: RunConfig, processor: Any) -> Data:
    """Load the rows and find out how they are scored."""
    rows = load_rows(
        config.data.dataset_name,
        config.data.dataset_train_split,
        dataset_config=config.data.dataset_config,
        streaming=config.data.dataset_streaming,
        columns=column_names(config.data.columns),
    )
    task, space = config.data.task, config.data.box_space
    options = {
        "compat_prompt": config.data.compat_prompt,
        "box_space": "thousandths" if space == "auto" else space,
    }
    samples = SampleDataset(rows, **options)
    preferences = config.train.algorithm == "dpo"
    if preferences:
        if not {"chosen", "rejected"} <= set(rows.column_names):
            raise UsageError(
                f"--algorithm dpo: expected the columns chosen and rejected, got "
                f"{', '.join(rows.column_names)}"
            )
        if space != "auto":
            raise UsageError(
                f"--box_space {space}: expected auto with --algorithm dpo, whose answers are not "
                "converted; leave it out"
            )
        task = "preference"
    elif task == "auto":
        task = tasks.detect_task(first_solutions(samples))
    check = None if preferences else partial(tasks.check_solution, task)
    samples = SampleDataset(rows, check_solution=check, **options)
    fits, longest = None, config.grpo.max_completion_length
    if config.train.algorithm == "sft":
        fits = partial(sft.check_answer, processor.tokenizer, longest)
    elif preferences:
        fits = partial(dpo.check_pair, processor.tokenizer, longest)
    boxes = open_space(task, space)
    found = survey(samples, boxes=boxes, check=fits)
    warned = found.settle_boxes()
    _check_left_out(config, found)
    train = PromptSource(
        samples, processor, max_prompt_length=config.data.max_prompt_length, check=fits
    )
    test = None
    if config.train.eval_samples:
        test_rows = load_rows(
            config.data.dataset_name,
            config.data.dataset_test_split,
            dataset_config=config.data.dataset_config,
            streaming=config.data.dataset_streaming,
            columns=column_names(config.data.columns),
        )
        test = replace_rows(train, SampleDataset(test_rows, check_solution=check, **options))
        most = config.train.eval_samples
        held_out = survey(test.samples, boxes=boxes, most=most, check=fits)
        held_out.settle_boxes()
    names = config.grpo.reward_funcs
    if not names and not preferences:
        names = tasks.default_rewards(task, found.solutions)
    names = [] if preferences else names
    scores = config.train.algorithm == "grpo" or config.train.eval_samples > 0
    known = (
        samples.classes() if scores and "accuracy" in names and task == "classification" else None
    )
    table = found.table(config.data.dataset_train_split, "" if config.grpo.reward_funcs else task)
    table += held_out.lines(config.data.dataset_test_split) if test is not None else []
    return Data(
        train=train,
        test=test,
        task=task,
        reward_funcs=tasks.told_classes(tasks.load_reward_funcs(names), known),
        reward_weights=config.grpo.weights_of(names),
        bad_rows=BadRows(config.data.max_bad_rows),
        permutation=rows.permutation if isinstance(rows, ParquetRows) else None,
        table=[*table, *([f"  warning: {warned}"] if warned else [])],
    )


def _check_left_out(config: RunConfig, found: Survey) -> None:
    """Raise UsageError if a run over all rows is sure to end at --max_bad_rows."""
    left, most = found.read - found.kept, config.data.max_bad_rows
    if left > most and num_steps(config, found.rows) * prompts_per_step(config) >= found.rows:
        reasons = [f"{reason}: {len(rows)}" for reason, rows in found.account.left_out.items()]
        raise UsageError(
            f"--max_bad_rows {most}: expected at most so many rows that can't be used, got {left} "
            f"of {found.read} ({'; '.join(reasons[:5])}); mend the data or raise it"
        )


def _warn_of_unearned(data: Data) -> None:
    """Say which accuracy rewards the solutions themselves don't earn, on rows all over the set."""
    count = len(data.train)
    indices = sorted({n * count // NUM_SELF_CHECKED for n in range(NUM_SELF_CHECKED)})
    loaded = [data.train.samples.get(index) for index in indices if index < count]
    samples = [sample for sample in loaded if not isinstance(sample, BadRow)]
    by_name: dict[str, list[str]] = {}
    for row, name, value, best in tasks.unearned(data.reward_funcs, samples):
        by_name.setdefault(name, []).append(f"row {row}: {value} instead of {best}")
    for name, rows in by_name.items():
        logger.warning(
            "reward %s: the solution itself does not earn it in %d of %d rows checked (%s); mend "
            "the solutions, or choose others with --reward_funcs",
            name,
            len(rows),
            len(samples),
            "; ".join(rows[:3]),
        )


def replace_rows(source: PromptSource, samples: SampleDataset) -> PromptSource:
    return PromptSource(
        samples,
        source.processor,
        max_prompt_length=source.max_prompt_length,
        check=source.check,
    )


def num_steps(config: RunConfig, num_rows: int) -> int:
    """Steps of the whole run."""
    if config.train.max_steps > 0:
        return config.train.max_steps
    return max(1, math.ceil(num_rows * config.train.num_train_epochs / prompts_per_step(config)))


def prompts_per_step(config: RunConfig) -> int:
    """Prompts of one step over all ranks."""
    train = config.train
    return train.per_device_train_batch_size * train.gradient_accumulation_steps * dist.world_size()


def begin_adapter(model: ModelConfig) -> tuple[ModelConfig, LoraPlan | None]:
    """How the adapter begins, None without one, and the flags with their values filled in."""
    flags = {"r": model.lora_r, "alpha": model.lora_alpha}
    targets, plan, values = model.lora_target_modules, None, {**LORA_DEFAULTS}
    if model.use_peft:
        plan = plan_lora(
            model.model_name_or_path,
            revision=model.model_revision,
            target_modules=targets,
            **flags,
        )
        values = {name: getattr(plan, name) for name in values}
    return replace(
        model,
        lora_r=model.lora_r or values["r"],
        lora_alpha=model.lora_alpha or values["alpha"],
        lora_target_modules=targets or list(values["target_modules"]),
    ), plan


def _account(plan: LoraPlan) -> str:
    """What a run tells of its adapter."""
    shape = f"r {plan.r}, alpha {plan.alpha:g}, layers {', '.join(plan.target_modules)}"
    if plan.kind == "continued":
        return f"training continues the LoRA adapter in {plan.name} ({shape}) on {plan.base}"
    if plan.kind == "stacked":
        return (
            f"a new LoRA adapter ({shape}) is trained on the model in {plan.name}, whose own "
            f"adapter is merged into {BASE_FOLDER}/ of --output_dir"
        )
    return f"a new LoRA adapter ({shape}) is trained on {plan.base}"


def _base_model(
    config: RunConfig, plan: LoraPlan | None, processor: Any, resume: Path | None
) -> ModelConfig:
    """The model that is loaded, with its flags: of a stacked adapter the merged base, written
    before training so that what is trained is what is saved."""
    if plan is None or plan.kind != "stacked":
        return config.model
    folder = (Path(config.train.output_dir) / BASE_FOLDER).resolve()
    if dist.is_main() and not (resume and folder.is_dir()):
        dtype = training_dtype(
            config.model, bf16=config.train.bf16, deepspeed=config.train.deepspeed is not None
        )
        merged = load_model(plan.name, revision=plan.revision, dtype=dtype)
        checkpoints.write_whole_model(folder, merged, processor)
    dist.barrier()
    return replace(config.model, model_name_or_path=str(folder), model_revision=None)


def prepare_training(
    config: RunConfig,
    processor: Any,
    data: Data,
    device: torch.device,
    model: ModelConfig | None = None,
) -> TrainState:
    """Load the model, wrap it in its engine and put the parts of a step together.

    Args:
        model: which model is loaded, and how; default: as `config` says.
    """
    model = model or config.model
    train, grpo = config.train, config.grpo
    torch.manual_seed(train.seed)  # an adapter begins the same on all ranks, and in every run
    if train.algorithm != "grpo":
        fixed = sft.AS_CROSS_ENTROPY if train.algorithm == "sft" else dpo.AS_PAIRS
        grpo = replace(grpo, **fixed)
    settings = OptimizerSettings(
        learning_rate=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        epsilon=train.adam_epsilon,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
    )
    base_weights = weights_stamp(resolve_model_path(model.model_name_or_path))
    ds_config, settings = _deepspeed(config, settings)
    partitioning = prepare_deepspeed(ds_config, device) if ds_config else None
    dtype = training_dtype(model, bf16=train.bf16, deepspeed=ds_config is not None)
    # Whatever beta is: resuming with another one needs the same parameters.
    frozen_copy = train.algorithm == "grpo" or uses_reference(config)
    policy = build_policy(model, grpo, dtype, device, frozen_copy=frozen_copy)
    if rolls_out(config):
        check_model(grpo.rollout_backend, policy)
    reference = None
    if keeps_reference(config):
        frozen = replace(model, gradient_checkpointing=False)
        reference = build_policy(frozen, grpo, dtype, device)
    del partitioning
    engine: PlainEngine | DeepSpeedEngine
    if ds_config is None:
        engine = PlainEngine(policy, settings, device=device, bf16=train.bf16)
    else:
        engine = DeepSpeedEngine(
            policy,
            settings,
            config=ds_config,
            device=device,
            make_empty=lambda: build_policy(
                model, grpo, dtype, device, empty=True, frozen_copy=frozen_copy
            ),
        )
    call_reference = engine.forward if uses_reference(config) else None
    if reference is not None:
        call_reference = make_reference(reference, engine, ds_config)
    rate = learning_rates(config, num_steps(config, len(data.train)))
    kind = TrainState
    if train.algorithm == "dpo":
        kind = partial(dpo.DPOState, dpo=config.dpo)
    return kind(
        config=grpo,
        policy=policy,
        engine=engine,
        reference=call_reference,
        rollout=make_rollout(
            grpo.rollout_backend,
            engine.whole_weights,
            processor.tokenizer,
            device=device,
            max_cache_tokens=grpo.rollout_cache_tokens,
        ),
        tokenizer=processor.tokenizer,
        reward_funcs=data.reward_funcs,
        reward_weights=data.reward_weights,
        learning_rate=rate,
        prompts_per_microbatch=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        max_tokens_per_microbatch=train.max_tokens_per_microbatch,
        seed=train.seed,
        max_bad_steps=train.max_bad_steps,
        base_weights=base_weights,
        save_dtype=stored_dtype(config),
        max_steps=num_steps(config, len(data.train)),
        num_rows=len(data.train),
    )


def rolls_out(config: RunConfig) -> bool:
    """Whether the model answers prompts, in steps or in the evaluation before and after."""
    evaluates = config.train.algorithm == "sft" and config.train.eval_samples > 0
    return config.train.algorithm == "grpo" or evaluates


def uses_reference(config: RunConfig) -> bool:
    """Whether a step asks a reference for log-probs: a model of its own, or the policy with its
    adapter off or as it began."""
    if config.train.algorithm == "dpo":
        return not config.dpo.precompute_ref_log_probs
    return config.train.algorithm == "grpo" and config.grpo.beta > 0


def keeps_reference(config: RunConfig) -> bool:
    """Whether there is a second, frozen model."""
    return uses_reference(config) and not config.model.use_peft


def _reference_beforehand(
    config: RunConfig, state: dpo.DPOState, data: Data, *, resumed: bool
) -> None:
    """The reference's log-probs of all rows: computed at the start of a run, read later on. From
    then on only rows that are as they were can be used."""
    path = Path(config.train.output_dir) / REFERENCE_FILE
    held_out = 0 if data.test is None else min(config.train.eval_samples, len(data.test))
    counts = {"train": len(data.train), "test": held_out}
    # What decides which rows can be used, and what the model reads of them.
    flags = ("max_completion_length", "max_prompt_length", "min_pixels", "max_pixels")
    limits = {name: config.flat()[name] for name in flags}
    if resumed:
        try:
            saved = json.loads(path.read_text())
            had = saved["counts"]
            if had["train"] != counts["train"] or had["test"] < held_out:
                raise ValueError(f"it is of {had} rows, these are {counts}")
            if saved["limits"] != limits:
                raise ValueError(f"it was made with {saved['limits']}, these are {limits}")
            tables = [
                (
                    {int(row): (float(c), float(r)) for row, (c, r) in saved[name].items()},
                    {int(row): str(d) for row, d in saved["digests"][name].items()},
                )
                for name in counts
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{path}: expected the reference's log-probs of this run, got a file that is "
                "damaged or of another version; start the run again"
            ) from error
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{path}: expected the reference's log-probs of this run: {error}; start it again"
            ) from error
        _use_reference(state, data, tables)
        return
    from tqdm import tqdm

    tables = []
    for source, count in ((data.train, counts["train"]), (data.test, counts["test"])):
        with tqdm(total=count, unit="row", desc="reference", disable=not dist.is_main()) as bar:
            size = max(config.train.eval_batch_size, state.prompts_per_microbatch)
            load = source.load if source is not None else None
            tables.append(dpo.reference_logps(state, load, count, size, bar.update))
    _use_reference(state, data, tables)
    if dist.is_main():
        aside = path.with_suffix(".writing")
        content = {"counts": counts, "limits": limits, "digests": {}}
        for name, (logps, digests) in zip(counts, tables, strict=True):
            content |= {name: logps}
            content["digests"] |= {name: digests}
        aside.write_text(json.dumps(content))
        aside.replace(path)


def _use_reference(
    state: dpo.DPOState, data: Data, tables: Sequence[tuple[dpo.RefLogps, dict[int, str]]]
) -> None:
    (state.ref_logps, of_train), (state.test_ref_logps, of_test) = tables
    for source, digests in ((data.train, of_train), (data.test, of_test)):
        if source is not None:
            source.check = partial(_all_checks, (source.check, partial(dpo.check_known, digests)))


def _all_checks(checks: Sequence[Callable[[Sample], str | None]], sample: Sample) -> str | None:
    return next((wrong for wrong in (check(sample) for check in checks) if wrong), None)


def _deepspeed(
    config: RunConfig, settings: OptimizerSettings
) -> tuple[dict[str, Any] | None, OptimizerSettings]:
    if config.train.deepspeed is None:
        return None, settings
    model_config = read_config(config.model.model_name_or_path, config.model.model_revision)
    return resolve_deepspeed_config(
        load_deepspeed_config(config.train.deepspeed),
        settings=settings,
        micro_batch_size=config.train.per_device_train_batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        bf16=config.train.bf16,
        hidden_size=model_config.get_text_config().hidden_size,
        world_size=dist.world_size(),
    )


def training_dtype(model: ModelConfig, *, bf16: bool, deepspeed: bool) -> torch.dtype:
    """The dtype weights are loaded in. With bf16 DeepSpeed keeps float32 masters of bf16 weights;
    without DeepSpeed the weights themselves are the masters and only the passes are in bf16."""
    if model.dtype != "auto":
        return getattr(torch, model.dtype)
    return torch.bfloat16 if bf16 and deepspeed else torch.float32


def stored_dtype(config: RunConfig) -> torch.dtype | None:
    """The dtype of saved weights; None: as they are trained."""
    if config.train.save_dtype != "auto":
        return getattr(torch, config.train.save_dtype)
    if config.model.use_peft or not config.train.bf16:
        return None
    return read_config(config.model.model_name_or_path, config.model.model_revision).dtype


def build_policy(
    model: ModelConfig,
    grpo: GRPOConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    empty: bool = False,
    frozen_copy: bool = False,
) -> Policy:
    """The model as the flags want it trained.

    Args:
        empty: its shape alone, on the meta device.
        frozen_copy: of an adapter that is continued, as the reference.
    """
    if grpo.prefix_attention == "flex" and device.type != "cuda":
        raise UsageError(
            "--prefix_attention flex: expected a CUDA device, because FlexAttention has no "
            "backward pass on the CPU; use two_part"
        )
    _, plan = begin_adapter(model)
    loaded = load_model(
        plan.base if plan else model.model_name_or_path,
        revision=plan.revision if plan else model.model_revision,
        dtype=dtype,
        attn_implementation=model.attn_implementation,
        empty=empty,
    )
    if model.use_liger_kernel:
        apply_liger(loaded, device)
    if plan is not None:
        loaded = attach(loaded, plan, reference=frozen_copy)
    if model.freeze_vision_tower:
        freeze_vision_tower(loaded)
    if model.gradient_checkpointing:
        loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(
        loaded.train(),
        loss_impl=grpo.loss_impl,
        prefix_sharing=grpo.prefix_sharing,
        prefix_attention=grpo.prefix_attention,
    )


def learning_rates(config: RunConfig, total_steps: int) -> Callable[[int], float]:
    """Step -> its rate, by transformers' schedules."""
    from transformers import get_scheduler

    train = config.train
    warmup = train.warmup_steps or train.warmup_ratio
    warmup_steps = math.ceil(warmup * total_steps) if warmup < 1 else int(warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=train.learning_rate)
    try:
        schedule = get_scheduler(
            train.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup_steps,
            num_training_steps=total_steps,
        )
        factors = schedule.lr_lambdas
        factors[0](0), factors[0](total_steps - 1)
    except (ValueError, TypeError, ArithmeticError, AttributeError) as error:
        raise UsageError(
            f"--lr_scheduler_type {train.lr_scheduler_type}: expected a schedule of transformers "
            f"that depends on the step alone, such as linear or cosine, got {error}"
        ) from error
    return lambda step: train.learning_rate * factors[0](min(step, total_steps - 1))


def train(config: RunConfig, run: Run, before: dict[str, Any] | None, watch: Watch) -> str:
    """The loop. Returns "done" after all steps, "incomplete" if one of its checkpoints could not be
    written; if the run was asked to stop "saved", or "lost" if that one could not.

    What a step raises is raised from here, once the step before it is saved: where every rank
    raises it, and no update of the weights had begun.

    Args:
        before: the evaluation before training, which a resumed run shows at its end.
    """
    output_dir, cfg = Path(config.train.output_dir), config.train
    data, state, writer = run.data, run.state, run.writer
    complete = True

    def state_dict() -> dict[str, Any]:
        return _state_dict(config, state, run.sampler, data, writer, before)

    def save(kept: dict[str, Any], only_model: bool = False) -> bool:
        if kept["step"] == run.saved_step:
            return True
        written = checkpoints.save_checkpoint(
            output_dir,
            kept["step"],
            model=state.policy.model,
            processor=run.processor,
            engine=state.engine,
            state=kept,
            dtype=state.save_dtype,
            only_model=only_model,
            total_limit=cfg.save_total_limit,
        )
        if written is not None and not only_model:
            run.saved_step = kept["step"]
        return written is not None

    while state.step < run.total_steps:
        kept = state_dict()
        if dist.any_rank(watch.stopped, state.engine.device):
            # Whatever --save_only_model says: who is stopped wants to go on.
            return "saved" if save(kept) else "lost"
        updates = state.engine.updates
        try:
            prompts = _next_prompts(run)
            metrics, records = STEPS[cfg.algorithm](state, prompts)
        except BaseException as error:
            together = dist.is_agreed(error) or isinstance(error, AGREED_ERRORS)
            hurried = isinstance(error, KeyboardInterrupt)  # asked to stop, a second time
            if isinstance(error, AGREED_ERRORS) and state.step > kept["step"]:
                kept, updates = state_dict(), state.engine.updates  # raised by a whole step
            saved = together and updates == state.engine.updates and not hurried and save(kept)
            if _is_given_up(error):
                state.step = kept["step"]
                return "saved" if saved else "lost"
            _say(f"ended in step {kept['step'] + 1}; {_where_to_resume(output_dir)}")
            raise
        metrics["epoch"] = state.step * prompts_per_step(config) / len(data.train)
        metrics["bad_rows"] = float(len(data.bad_rows))
        parts = dist.all_gather_object(records)
        writer.step(state.step, metrics)
        writer.completions(state.step, [record for part in parts for record in part])
        if cfg.save_steps and state.step % cfg.save_steps == 0:
            complete &= save(state_dict(), cfg.save_only_model)
    return "done" if complete else "incomplete"


def _next_prompts(run: Run) -> list[Any]:
    """This rank's prompts; a row that can't be loaded on one rank, its disk is gone say, is an
    error on all."""
    errors: list[BaseException] = []

    def load(index: int) -> Any:
        try:
            with run.state.section("loading a row", None):
                return None if errors else run.data.train.load(index)
        except BaseException as error:
            errors.append(error)

    prompts = run.sampler.next_batch(load, dist.all_gather_object, run.data.bad_rows.add)
    with dist.agreed():
        if errors:
            raise errors[0]
    return prompts


def _is_given_up(error: BaseException) -> bool:
    """Whether this rank, or another, was asked to stop and has given the step up."""
    kinds = error.errors.values() if isinstance(error, dist.RankFailed) else ()
    name = SectionStopped.__name__
    return isinstance(error, SectionStopped) or any(kind == name for kind, _ in kinds)


def _where_to_resume(output_dir: Path) -> str:
    """What there is to go on with."""
    found = checkpoints.list_checkpoints(output_dir)
    whole = [path for path in found if (path / "engine").is_dir()]
    if not whole:
        return "no step was saved"
    return f"saved is {whole[-1]}; resume with --resume_from_checkpoint latest"


def _state_dict(
    config: RunConfig,
    state: TrainState,
    sampler: PromptSampler,
    data: Data,
    writer: MetricsWriter,
    before: dict[str, Any] | None,
) -> dict[str, Any]:
    return {
        "step": state.step,
        "bad_steps": state.bad_steps,
        "silent_steps": state.silent_steps,
        "idle_steps": state.idle_steps,
        "skipped_steps": state.skipped_steps,
        "num_tokens": state.num_tokens,
        "world_size": dist.world_size(),
        "sampler": sampler.state_dict(),
        "bad_rows": data.bad_rows.state_dict(),
        "writer": writer.state_dict(),
        "before": before,
        "config": config.flat(),
        "weights": state.base_weights,
        "adapter": state.adapter,
    }


# What of GRPO's the other algorithms have, too.
ALSO_BESIDE_GRPO = (
    "max_completion_length",
    "loss_impl",
    "prefix_sharing",
    "prefix_attention",
    "rollout_backend",
    "rollout_cache_tokens",
)

# What must not change between a run and its continuation; anything else may, and is named, except
# what says where and how often things are written.
SAME_ON_RESUME = (
    "algorithm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_generations",
    "seed",
    "dataset_name",
    "dataset_train_split",
    "dataset_config",
    "dataset_streaming",
    "compat_prompt",
    "model_name_or_path",
    "freeze_vision_tower",
    "bf16",
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "dpo_beta",
    "label_smoothing",
    "dpo_gamma",
    "precompute_ref_log_probs",
)
UNNAMED_ON_RESUME = (
    "output_dir",
    "overwrite_output_dir",
    "run_name",
    "config",
    "dry_run",
    "logging_steps",
    "report_to",
    "log_completions_steps",
    "save_steps",
    "save_only_model",
    "save_total_limit",
    "resume_from_checkpoint",
    "local_rank",
)


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
        _check_weights(folder, saved, weights_stamp(path), config)
    changed = {k for k in now.keys() - UNNAMED_ON_RESUME if was.get(k, now[k]) != now[k]}
    saved["changed"] = ", ".join(f"--{k} {was[k]} -> {now[k]}" for k in now if k in changed)
    if changed:
        logger.warning("resumed with other flags: %s", saved["changed"])
    return saved


def _resume(
    folder: Path,
    saved: dict[str, Any],
    state: TrainState,
    sampler: PromptSampler,
    data: Data,
    config: RunConfig,
) -> None:
    with usage():
        _check_weights(folder, saved, state.base_weights, config)
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
            _say(f"a later checkpoint is now {path}")
        checkpoints.delete_leftovers(output_dir, config.train.save_total_limit)
    _say(f"resumed {folder} at step {state.step}")


def _check_weights(
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
    if uses_reference(config):
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


def _evaluate(config: RunConfig, state: TrainState, data: Data) -> dict[str, Any] | None:
    """Means on the held-out rows and the answers to show; None without --eval_samples."""
    if data.test is None:
        return None
    if isinstance(state, dpo.DPOState):
        count = min(config.train.eval_samples, len(data.test))
        means = dpo.evaluate(state, data.test.load, count, config.train.eval_batch_size)
        return {"means": means, "answers": {}, "num_samples": int(means.pop("num_pairs"))}
    with state.engine.whole_weights():
        pass  # gathered by all ranks, before anything can fail on one of them
    result: Evaluation = evaluate_rewards(
        state.rollout,
        data.test.load,
        range(min(config.train.eval_samples, len(data.test))),
        reward_funcs=data.reward_funcs,
        bad_rows=BadRows(config.data.max_bad_rows),
        task=data.task,
        batch_size=config.train.eval_batch_size,
        max_completion_length=config.grpo.max_completion_length,
        section=lambda what: state.section(what, None),
        reward_section=lambda what: state.section(what, state.reward_timeout),
    )
    answers = {str(r["index"]): r["completion"] for r in result.records[:NUM_REPORT_EXAMPLES]}
    return {"means": result.means, "answers": answers, "num_samples": len(result.records)}


def conclude(
    config: RunConfig,
    data: Data,
    state: TrainState,
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
    train_seconds: float,
) -> None:
    """Tell where things are and what changed; write summary.json and report.png."""
    output_dir = Path(config.train.output_dir)
    curve = _read_curve(output_dir / METRICS_FILE)
    names = [name for name, _ in data.reward_funcs]
    if before is None or after is None:
        tenth = max(1, len(curve) // 10)
        keys = ["reward", *(f"rewards/{name}" for name in names)]
        if config.train.algorithm != "grpo":
            keys = ["loss"]
        first, last = (
            {k: _mean(part, k) for k in keys} for part in (curve[:tenth], curve[-tenth:])
        )
        title = f"training {keys[0]}, first and last {tenth} records"
        examples = []
        shown = last
    else:
        first, last = before["means"], after["means"]
        shown = last
        title = f"held-out rewards, greedy, {after['num_samples']} samples"
        if config.train.algorithm == "dpo":
            title = f"held-out pairs, {after['num_samples']} samples"
            # Before training the policy is the reference, and prefers nothing to it.
            first = {k: v for k, v in first.items() if not k.startswith("rewards/")}
            shown = {k: v for k, v in last.items() if k in first}
        examples = _examples(data, before["answers"], after["answers"])
    write_summary(
        output_dir / SUMMARY_FILE,
        before=first,
        after=last,
        train_seconds=train_seconds,
        peak_rss_mib=peak_rss_mib(),
        steps=state.step,
        skipped_steps=state.skipped_steps,
        bad_rows=len(data.bad_rows),
        measured=title,
        seed=config.train.seed,
    )
    print(f"\n{title}\n{format_table(first, shown)}\n")
    write_report(
        output_dir / REPORT_FILE,
        curve=curve,
        before=first,
        after=shown,
        examples=examples,
        parse_boxes=_boxes_with_confidence,
    )
    print(f"model and processor  {output_dir}")
    print(f"metrics              {output_dir / METRICS_FILE}")
    if config.train.algorithm == "grpo":
        print(f"completions          {output_dir / 'completions.jsonl'}")
    print(f"report               {output_dir / REPORT_FILE}, {output_dir / SUMMARY_FILE}")
    print(f"trained {state.step} steps in {train_seconds:.0f} s; peak memory of this process "
          f"{peak_rss_mib():.0f} MiB")  # fmt: skip
    if state.skipped_steps or len(data.bad_rows):
        print(f"skipped: {state.skipped_steps} non-finite steps, {len(data.bad_rows)} bad rows")


def _read_curve(path: Path) -> list[dict[str, Any]]:
    """The records that could be written: a full disk may have lost some, or cut one off."""
    records = []
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


def _mean(records: list[dict[str, Any]], key: str) -> float:
    values = [r[key] for r in records if r.get(key) is not None]
    return sum(values) / len(values) if values else math.nan


def _examples(data: Data, before: dict[str, str], after: dict[str, str]) -> list[dict[str, Any]]:
    examples = []
    for index, text in before.items():
        prompt = data.test.load(int(index)) if index in after and data.test else None
        if prompt is None or isinstance(prompt, BadRow) or not prompt.sample.images:
            continue
        sample = prompt.sample
        examples.append(
            {
                "image": sample.images[0],
                "problem": str(sample.columns.get("problem", "")),
                "solution": sample.solution,
                "before": text,
                "after": after[index],
            }
        )
    return examples


def _boxes_with_confidence(text: str) -> list[tuple[list[float], float | None]]:
    detection = tasks.parse_detection(text)
    if detection is None:
        return []
    pairs = zip(detection.boxes, detection.confidences, strict=True)
    return [(list(box), confidence) for box, confidence in pairs]


def peak_rss_mib() -> float:
    """Peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def check_start(config: RunConfig, data: Data) -> Policy:
    """All that would fail once the model is loaded, found before; returns the policy's shape.

    Raises:
        ValueError, FileNotFoundError: what is wrong with the flags, the weights' files or the rows.
    """
    learning_rates(config, num_steps(config, len(data.train)))
    ds_config, _ = _deepspeed(config, OptimizerSettings(config.train.learning_rate))
    if ds_config is not None:
        check_deepspeed(ds_config)
    check_weights(config.model.model_name_or_path, config.model.model_revision)
    policy = build_policy(config.model, config.grpo, torch.float32, dist.local_device(), empty=True)
    if rolls_out(config):
        check_model(config.grpo.rollout_backend, policy)
    columns = first_prompt(data.train).sample.columns
    if data.test is not None:
        first_prompt(data.test)
    check_arguments(data.reward_funcs, columns)
    return policy


def dry_run(config: RunConfig, data: Data, policy: Policy) -> int:
    """Print what would run and check the data's solutions; trains nothing, writes nothing.

    Returns:
        0, or 1 if the solution of a row does not score the maximum against itself.
    """
    if not dist.is_main():
        return 0
    import yaml

    print("# configuration")
    print(yaml.safe_dump(config.flat(), sort_keys=False))
    print(f"task: {data.task}; rewards: {', '.join(name for name, _ in data.reward_funcs)}")
    print(f"rows: {len(data.train)}; steps: {num_steps(config, len(data.train))}; prompts a step: "
          f"{prompts_per_step(config)}; completions a step: "
          f"{prompts_per_step(config) * config.grpo.num_generations}")  # fmt: skip
    _print_model(config, policy)
    print("\n# one prompt as the model reads it")
    sample = first_prompt(data.train)
    print(sample.text)
    images = [f"{image.width}x{image.height}" for image in sample.sample.images]
    if config.train.algorithm == "dpo":
        for name, text in zip(("chosen", "rejected"), dpo.pair_of(sample.sample), strict=True):
            print(f"{name}: {text}")
    else:
        print(f"solution: {sample.sample.solution}")
    print(f"prompt tokens: {len(sample.input_ids)}; images: {', '.join(images) or 'none'}")
    return _check_solutions(data)


def first_prompt(source: PromptSource) -> Prompt:
    """Of the rows that the model can read.

    Raises:
        ValueError: there is none.
    """
    reasons, started = [], time.monotonic()
    for prompt in map(source.load, range(len(source))):
        if not isinstance(prompt, BadRow):
            return prompt
        reasons.append(f"row {prompt.index}: {prompt.reason}")
        if time.monotonic() - started > FIRST_PROMPT_SECONDS:
            break
    first = "; ".join(reasons[:3])
    raise ValueError(f"expected at least one usable row of {len(reasons)}, got none: {first}")


def _print_model(config: RunConfig, policy: Policy) -> None:
    groups: dict[str, list[int]] = {}
    for name, parameter in policy.model.named_parameters():
        if is_reference(name):
            continue
        part = "vision tower" if "visual" in name else "language model"
        part = "LoRA adapter" if "lora_" in name else part
        counts = groups.setdefault(part, [0, 0])
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() if parameter.requires_grad else 0
    print("\n# parameters")
    for part, (count, trainable) in groups.items():
        print(f"{part:16} {count:>15,}   trainable {trainable:>15,}")
    total = sum(c for c, _ in groups.values())
    trainable = sum(t for _, t in groups.values())
    ds_config = load_deepspeed_config(config.train.deepspeed) if config.train.deepspeed else None
    for line in memory_estimate(config, total, trainable, policy, zero_stage(ds_config)):
        print(line)


def memory_estimate(
    config: RunConfig, total: int, trainable: int, policy: Policy, stage: int
) -> list[str]:
    """Bytes per process by formula: weights, gradients and optimizer state as ZeRO divides them,
    the keys and values of the largest rollout. Activations depend on the images and are left out,
    as is what CUDA needs for itself and for graphs."""
    world = dist.world_size()
    low = 2 if config.train.bf16 and config.train.deepspeed else 4
    masters = 4 if low == 2 else 0
    copies = 2 if keeps_reference(config) else 1
    weights = copies * total * low / (world if stage == 3 else 1)
    gradients = trainable * low / (world if stage >= 2 else 1)
    optimizer = trainable * (8 + masters) / (world if stage >= 1 else 1)
    copied = total * low if stage == 3 and rolls_out(config) else 0
    tokens, how = rollout_tokens(config, dist.local_device())
    cache = tokens * cache_numbers(policy.config.get_text_config())
    narrow = config.train.bf16 or config.model.dtype == "bfloat16"
    cache *= 2 if narrow else 4
    parts = {
        "weights" + (" (with the reference)" if copies == 2 else ""): weights,
        "gradients": gradients,
        "optimizer state": optimizer,
        "copy of the whole weights for rollouts": copied,
        f"keys and values of a rollout, {tokens:,} tokens ({how})": cache,
    }
    lines = [f"\n# memory of one process, by formula (ZeRO stage {stage}, {world} processes)"]
    lines += [f"{size / 2**20:>12,.1f} MiB  {name}" for name, size in parts.items() if size]
    return [*lines, f"{sum(parts.values()) / 2**20:>12,.1f} MiB  in all, without activations"]


def rollout_tokens(config: RunConfig, device: torch.device) -> tuple[int, str]:
    """Tokens whose keys and values the largest rollout of a process holds at once, a step's or the
    evaluation's, and how that is meant."""
    grpo, world = config.grpo, dist.world_size()
    prompt = config.data.max_prompt_length or 1024
    batch = min(config.train.eval_batch_size, math.ceil(config.train.eval_samples / world))
    batches = [(prompts_per_step(config) // world, grpo.num_generations), (batch, 1)]
    if not rolls_out(config):
        return 0, "none"
    batches = batches if config.train.algorithm == "grpo" else batches[1:]
    how = f"prompts of {prompt:,}"
    if grpo.rollout_backend == "hf":
        return max(b * g * (prompt + grpo.max_completion_length) for b, g in batches), how
    tokens = max(
        CachePlan.rounded(b, g, prompt, grpo.max_completion_length, device.type).num_tokens
        for b, g in batches
    )
    # Without a limit a GPU's free memory is one; what doesn't fit is decoded in several batches.
    tokens = min(tokens, grpo.rollout_cache_tokens or tokens)
    graphs = device.type == "cuda" and (config.train.deepspeed or not config.train.bf16)
    if not graphs:
        return tokens, f"{how}; free while training"
    return tokens, f"{how}; kept while training, if below {KEPT_SHARE:.0%} of the GPU's memory"


def _check_solutions(data: Data) -> int:
    """Do the accuracy rewards of (solution, solution) reach their maximum?"""
    num_rows = min(NUM_CHECKED_ROWS, len(data.train))
    wrong = []
    for index in range(num_rows):
        sample = data.train.samples.get(index)
        if isinstance(sample, BadRow):
            wrong.append(f"row {index}: {sample.reason}")
            continue
        unfit = data.train.check(sample) if data.train.check else None
        if unfit:
            wrong.append(f"row {index}: {unfit}")
        for row, name, value, best in tasks.unearned(data.reward_funcs, [sample]):
            wrong.append(f"row {row}: {name} of the solution itself is {value}, not {best}")
    print(f"\n# solutions: {num_rows} rows checked, {len(wrong)} problems")
    for line in wrong[:50]:
        print(line)
    return 1 if wrong else 0


def _say(text: str) -> None:
    if dist.is_main():
        print(text, file=sys.stderr)


def _quiet_libraries() -> None:
    """One progress bar is enough: ours. DeepSpeed calls torch functions that warn every time."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        # transformers imports DeepSpeed when it saves; without this it warns that there is no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    end_process(main())
