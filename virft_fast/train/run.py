"""One run, from its flags to its exit status."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from virft_fast import checkpoint as checkpoints
from virft_fast import dist
from virft_fast.algorithms import algorithm_of
from virft_fast.algorithms.base import Data, HeldOut
from virft_fast.algorithms.step import TrainState
from virft_fast.arguments import was_given
from virft_fast.cli import parse
from virft_fast.config import TRAIN_GROUPS, RunConfig, UsageError, given_flags, usage
from virft_fast.console import log_warnings, say, unbreakable
from virft_fast.output_lock import HEARTBEAT_SECONDS, OutputLock
from virft_fast.train.conclusion import conclude
from virft_fast.train.loop import AGREED_ERRORS, is_given_up, train, where_to_resume
from virft_fast.train.setup import set_up
from virft_fast.versions import too_old, unusable_driver
from virft_fast.watch import SectionTimeout, Watch

logger = logging.getLogger("virft_fast")

LESS_MEMORY = (
    "--per_device_train_batch_size or --max_tokens_per_microbatch, --num_generations, "
    "--max_completion_length, --max_pixels, --rollout_cache_tokens or --eval_batch_size; or pass "
    "--gradient_checkpointing, --use_peft or a DeepSpeed file with a higher ZeRO stage"
)


@unbreakable()
def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit status: 0 if done or stopped by a signal, 1 if the run had to stop, 2
    if it can't start, 130 after Ctrl-C."""
    log_warnings()
    _quiet_libraries()
    if os.environ.get("RANK", "0") != "0":  # before `dist.init`, for warnings about the arguments
        logger.setLevel(logging.ERROR)
    try:
        config = parse_args(sys.argv[1:] if argv is None else argv)
        _check_versions(config)
        with usage():
            device = dist.init(config.train.ddp_timeout)
        # Only the main process logs warnings; every process logs its errors.
        logger.setLevel(logging.INFO if dist.is_main() else logging.ERROR)
        if dist.is_main() and config.model.model_name_or_path != "tiny":
            transformers_logging.enable_progress_bar()  # loading takes a while
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


def parse_args(argv: list[str]) -> RunConfig:
    """The configuration that flags and a --config file describe.

    Raises:
        UsageError: an unknown or misspelled flag or key, or a value out of range.
    """
    config = RunConfig(*parse(TRAIN_GROUPS, argv, "python -m virft_fast.train", launch_lines=True))
    config.grpo.settle_speculation()
    _warn_of_unused(config)
    return config


def _check_versions(config: RunConfig) -> None:
    """Raise UsageError if a package is older than required, or a GPU has no bfloat16 for --bf16;
    warn if a GPU can't be used."""
    if old := too_old():
        raise UsageError("; ".join(old))
    if trouble := unusable_driver():
        logger.warning("running on the CPU: %s; %s", *trouble)
    if config.train.bf16 and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            raise UsageError(
                f"--bf16: expected a GPU of sm_80 or later, got sm_{major}{minor}; leave --bf16 out"
            )


def _warn_of_unused(config: RunConfig) -> None:
    """Warn about flags without effect: another algorithm's, those of an unused adapter, or
    --scale_rewards where advantages have a scale of their own."""
    grpo, algorithm = config.grpo, algorithm_of(config)
    unused = {f"on --algorithm {algorithm.name}": algorithm.without_effect(config)}
    lora = [name for name in given_flags(config.model) if name.startswith("lora_")]
    unused["without --use_peft"] = [] if config.model.use_peft else lora
    own = {"advantage_estimator", "multi_objective_aggregation"} & {*given_flags(grpo)}
    for name in own if was_given(grpo, "scale_rewards") else ():
        unused[f"with --{name} {getattr(grpo, name)}"] = ["scale_rewards"]
    for what, names in unused.items():
        if names:
            flags = ", ".join(f"--{name}" for name in names)
            logger.warning("without effect %s: %s", what, flags)


def _is_out_of_memory(error: BaseException) -> bool:
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def run(config: RunConfig, device: torch.device) -> int:
    """Train while holding the lock on --output_dir; returns the exit status."""
    output_dir = Path(config.train.output_dir)
    lock = OutputLock(output_dir)
    watch = Watch(
        output_dir,
        rank=dist.rank(),
        world_size=dist.world_size(),
        timeout=config.train.ddp_timeout,
        beat=lock.beat,
        beat_seconds=HEARTBEAT_SECONDS,
        comfort=lambda: where_to_resume(output_dir),
    )
    with watch:
        try:
            return _run(config, device, watch, lock)
        except BaseException as error:
            if not is_given_up(error):
                raise
            say(f"stopped by a signal before the first step; {where_to_resume(output_dir)}")
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
    before = ready.saved.get("before") or evaluate(config, state, data)
    started = time.perf_counter()
    ended = train(config, ready, before, watch)
    train_seconds = time.perf_counter() - started
    writer.close()
    if ended in ("saved", "lost"):
        where = f"stopped by a signal after step {state.step} of {data.total_steps}"
        if ended == "lost":
            say(f"{where}; this step could NOT be saved; {where_to_resume(output_dir)}")
            return 1
        say(f"{where}; {where_to_resume(output_dir)}")
        return watch.exit_status
    written = checkpoints.write_final_model(
        output_dir,
        model=state.policy.model,
        processor=ready.processor,
        engine=state.engine,
        dtype=state.save_dtype,
    )
    after, failure = None, None
    try:
        after = evaluate(config, state, data)
    except BaseException as error:
        if is_given_up(error):
            say("stopped by a signal; the evaluation after training was given up")
        elif isinstance(error, Exception) and dist.is_agreed(error):
            failure = error  # raised once the report is written
        else:
            raise
    if dist.is_main():
        conclude(config, data, state, before, after, train_seconds)
        if ready.saved.get("changed"):
            print(f"resumed with other flags: {ready.saved['changed']}")
    dist.barrier()
    if failure is not None:
        raise failure
    if ended == "incomplete":
        say(f"not all checkpoints could be written into {output_dir}; see above")
    if not written:
        say(f"the model could NOT be written into {output_dir}; see above")
    return watch.exit_status if written and ended == "done" else 1


def evaluate(config: RunConfig, state: TrainState, data: Data) -> HeldOut | None:
    """Evaluate the held-out rows; None without --eval_samples."""
    if data.test is None:
        return None
    num_rows = min(config.train.eval_samples, len(data.test))
    return algorithm_of(config).evaluate(config, state, data, num_rows)


def _quiet_libraries() -> None:
    """Silence other libraries' progress bars, and warnings that recur at every call."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
