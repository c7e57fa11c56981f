"""The training loop, and the checkpoint that is saved if it ends early."""

from __future__ import annotations

import contextlib
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

from virft_fast import checkpoint as checkpoints
from virft_fast import dist
from virft_fast.algorithms import algorithm_of
from virft_fast.algorithms.base import HeldOut
from virft_fast.algorithms.step import TooManyBadSteps
from virft_fast.batch import Prompt, Row
from virft_fast.config import RunConfig
from virft_fast.console import say
from virft_fast.data import BadRow, NoUsableRows, TooManyBadRows
from virft_fast.data.read_ahead import ReadAhead
from virft_fast.train.setup import Run
from virft_fast.watch import SectionStopped, Watch

# Errors that all ranks raise at the same point.
AGREED_ERRORS = (TooManyBadRows, TooManyBadSteps, NoUsableRows)


def train(config: RunConfig, run: Run, before: HeldOut | None, watch: Watch) -> str:
    """Train until the run ends.

    If a step raises on all ranks before it changes the weights, the state before the step is saved.

    Args:
        before: the evaluation before training; checkpoints keep it, so that a resumed run can
            report it.
    Returns:
        "done" after all steps, or "incomplete" if one of its checkpoints could not be written. If
        the run was asked to stop: "saved", or "lost" if the last step could not be saved.
    """
    with contextlib.closing(ReadAhead(partial(_row, run))) as ahead:
        return _train(config, run, before, watch, ahead)


def _train(
    config: RunConfig,
    run: Run,
    before: HeldOut | None,
    watch: Watch,
    ahead: ReadAhead[Prompt | BadRow],
) -> str:
    output_dir, cfg = Path(config.train.output_dir), config.train
    algorithm, complete = algorithm_of(config), True
    data, state, writer = run.data, run.state, run.writer
    writer.start()

    def save(kept: Row, only_model: bool = False) -> bool:
        if kept["step"] == run.saved_step:
            return True
        written = checkpoints.save_checkpoint(
            output_dir,
            kept["step"],
            model=state.policy.model,
            processor=run.processor,
            engine=state.engine,
            state={name: value for name, value in kept.items() if name != "history"},
            history=kept["history"] and kept["history"].state_dict(),
            dtype=state.save_dtype,
            only_model=only_model,
            total_limit=cfg.save_total_limit,
        )
        if written is not None and not only_model:
            run.saved_step = kept["step"]
        return written is not None

    state.more_prompts = partial(_next_prompts, run, ahead)
    if run.sampler.curriculum:
        state.note_equal = run.sampler.note_equal
    while state.step < data.total_steps:
        if not state.pending:  # a rollout that isn't used up can't be resumed
            kept, updates = _state_dict(config, run, before), state.engine.updates
            if dist.any_rank(watch.stopped, state.engine.device):
                # With engine state, even under --save_only_model: a stopped run should be
                # resumable.
                return "saved" if save(kept) else "lost"
        try:
            prompts = [] if state.pending else _next_prompts(run, ahead)
            metrics, records = algorithm.step(state, prompts)
        except BaseException as error:
            together = dist.is_agreed(error) or isinstance(error, AGREED_ERRORS)
            hurried = isinstance(error, KeyboardInterrupt)  # asked to stop a second time
            whole = not state.pending and state.step > kept["step"]
            if isinstance(error, AGREED_ERRORS) and whole:
                # The step was complete before the error was raised.
                kept, updates = _state_dict(config, run, before), state.engine.updates
            saved = together and updates == state.engine.updates and not hurried and save(kept)
            if is_given_up(error):
                state.step = kept["step"]
                return "saved" if saved else "lost"
            say(f"ended in step {kept['step'] + 1}; {where_to_resume(output_dir)}")
            raise
        metrics["epoch"] = state.num_prompts / len(data.train)
        metrics["bad_rows"] = float(len(data.bad_rows))
        if run.sampler.curriculum:
            metrics["rarer_rows"] = float(run.sampler.num_rarer)
        every_rank = dist.all_gather_object(records)
        writer.step(state.step, metrics)
        writer.completions(state.step, [record for rank in every_rank for record in rank])
        due = cfg.save_steps and state.step // cfg.save_steps > kept["step"] // cfg.save_steps
        if due and not state.pending:
            complete &= save(_state_dict(config, run, before), cfg.save_only_model)
    return "done" if complete else "incomplete"


def _row(run: Run, index: int) -> Prompt | BadRow:
    """A row for this device: a GPU copies its pixels from pinned memory."""
    prompt, device = run.data.train.load(index), run.state.engine.device
    if isinstance(prompt, BadRow) or prompt.pixel_values is None or device.type != "cuda":
        return prompt
    return replace(prompt, pixel_values=prompt.pixel_values.pin_memory())


def _next_prompts(run: Run, ahead: ReadAhead[Prompt | BadRow]) -> list[Prompt]:
    """This rank's next prompts, with their images on its device; starts to load those of the step
    after. If loading a row fails on one rank, for example because its disk is gone, every rank
    raises."""
    errors: list[BaseException] = []

    def load(index: int) -> Prompt | BadRow | None:
        try:
            with run.state.section("loading a row", None):
                return None if errors else ahead(index)
        except BaseException as error:
            errors.append(error)
            return None

    prompts = run.sampler.next_batch(load, dist.all_gather_object, run.data.bad_rows.add)
    with dist.agreed():
        if errors:
            raise errors[0]
    if run.state.step + 1 < run.data.total_steps:
        ahead.start(run.sampler.upcoming())
    known = [prompt for prompt in prompts if prompt is not None]
    return run.state.policy.place_images(known, run.state.engine.device)


def is_given_up(error: BaseException) -> bool:
    """Whether this rank, or another, abandoned the step because it was asked to stop."""
    kinds = error.errors.values() if isinstance(error, dist.RankFailed) else ()
    name = SectionStopped.__name__
    return isinstance(error, SectionStopped) or any(kind == name for kind, _ in kinds)


def where_to_resume(output_dir: Path) -> str:
    """The part of a message that says which checkpoint can be resumed."""
    whole = [p for p in checkpoints.list_checkpoints(output_dir) if (p / "engine").is_dir()]
    if not whole:
        return "no step was saved"
    return f"saved is {whole[-1]}; resume with --resume_from_checkpoint latest"


def _state_dict(config: RunConfig, run: Run, before: HeldOut | None) -> Row:
    counters = ("step", "bad_steps", "silent_steps", "idle_steps", "skipped_steps", "num_tokens",
                "num_prompts")  # fmt: skip
    return {name: getattr(run.state, name) for name in counters} | {
        "world_size": dist.world_size(),
        "sampler": run.sampler.state_dict(),
        "curriculum": run.sampler.streaks(),
        "history": copy(run.state.history),
        "bad_rows": run.data.bad_rows.state_dict(),
        "writer": run.writer.state_dict(),
        "before": before,
        "config": config.flat(),
        "weights": run.state.base_weights,
        "adapter": run.state.adapter,
    }
