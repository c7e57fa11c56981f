"""The interface between a run and its algorithm, and the data that the run passes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Generic, TypedDict, TypeVar

import numpy as np

from virft_fast.algorithms.step import Metrics, TrainState
from virft_fast.batch import Prompt, Row, Sample
from virft_fast.config import ALGORITHMS, BESIDE_GRPO, RunConfig, UsageError, given_flags
from virft_fast.data import BadRows
from virft_fast.data.prompt_source import PromptSource
from virft_fast.evaluation.scoring import evaluate_rewards
from virft_fast.models.families import Tokenizer
from virft_fast.rollout.backends import with_own_history


@dataclass
class Data:
    """The training rows and their order, the held-out rows, and how answers are scored.

    Attributes:
        prompts_per_step: over all ranks; with --steps_per_generation, of one rollout instead.
        total_steps: of the whole run.
        table: lines that say which rows were skipped or converted.
    """

    train: PromptSource
    test: PromptSource | None
    task: str
    reward_funcs: list[tuple[str, Callable[..., Any]]]
    reward_weights: list[float]
    bad_rows: BadRows
    prompts_per_step: int
    total_steps: int
    permutation: Callable[[np.random.Generator], np.ndarray] | None = None
    table: Sequence[str] = ()

    @property
    def held_out(self) -> PromptSource:
        if self.test is None:
            raise UsageError("--eval_samples: expected a data set with held-out rows, got none")
        return self.test


class HeldOut(TypedDict):
    """The result of an evaluation on held-out rows: mean metrics, and some answers by row."""

    means: Metrics
    answers: dict[str, str]
    num_samples: int


NUM_SHOWN = 5  # answers stored with each evaluation
Check = Callable[[Sample], str | None]  # what is wrong with a row, or None
State = TypeVar("State", bound=TrainState)


def find_algorithm(name: str) -> Algorithm:
    """The algorithm that --algorithm `name` selects."""
    return import_module(ALGORITHMS[name]).ALGORITHM


class Algorithm(Generic[State]):
    """The interface of an algorithm. Each module of `virft_fast.algorithms` ends with an instance.

    Attributes:
        name: its value of --algorithm.
        flags: the field of `RunConfig` that holds its own flags, if it has any.
        same_on_resume: flags that must not change when a run resumes, in addition to those that
            every algorithm fixes.
        draws: whether a step samples completions, which are then scored and recorded.
        preferences: whether rows hold pairs of answers instead of solutions to score.
        files: what it writes into --output_dir, in addition to what every run writes.
    """

    name: str
    flags: str = ""
    same_on_resume: Sequence[str] = ()
    draws: bool = False
    preferences: bool = False
    files: Sequence[str] = ()

    def without_effect(self, config: RunConfig) -> list[str]:
        """The flags that the user set but this algorithm ignores.

        Raises:
            UsageError: a flag has a different meaning for this algorithm.
        """
        groups = sorted({find_algorithm(name).flags for name in ALGORITHMS} - {self.flags, ""})
        given = [name for group in groups for name in given_flags(getattr(config, group))]
        return [name for name in given if name not in BESIDE_GRPO]

    def check_data(self, config: RunConfig, column_names: Sequence[str]) -> None:
        """Raise UsageError if rows with these columns can't be trained on."""

    def check_row(self, config: RunConfig, tokenizer: Tokenizer) -> Check | None:
        """The algorithm's own check of each row, if it has one."""
        return None

    def rolls_out(self, config: RunConfig) -> bool:
        """Whether the run samples completions, in steps or in evaluations before and after them."""
        return self.draws

    def uses_reference(self, config: RunConfig) -> bool:
        """Whether a step needs a reference's log-probs. The reference is a separate model, the
        policy with its adapter disabled, or the policy as it was at the start."""
        return False

    def may_use_reference(self, config: RunConfig) -> bool:
        """Whether a step could need a reference if flags changed. A resumed run may change them, so
        the reference's parameters must match."""
        return self.uses_reference(config)

    def make_state(self, config: RunConfig, **fields: Any) -> TrainState:
        return TrainState(config=config.grpo, **fields)

    def begin(self, config: RunConfig, state: State, data: Data, *, resumed: bool) -> None:
        """Work to do before the first step, after the model is loaded; all ranks call it."""

    def step(self, state: State, prompts: Sequence[Prompt]) -> tuple[Metrics, list[Row]]:
        """One step on this rank's B prompts.

        Returns:
            Metrics, the same on all ranks, and a record of each completion that this rank sampled.
        """
        raise NotImplementedError

    def evaluate(self, config: RunConfig, state: State, data: Data, num_rows: int) -> HeldOut:
        """Evaluate on the first held-out rows; all ranks call it."""
        with state.engine.whole_weights():
            pass  # all ranks gather here, before one of them can fail
        means, records = evaluate_rewards(
            with_own_history(state.rollout),
            data.held_out.load,
            range(num_rows),
            reward_funcs=data.reward_funcs,
            bad_rows=BadRows(config.data.max_bad_rows),
            task=data.task,
            batch_size=config.train.eval_batch_size,
            max_completion_length=config.grpo.max_completion_length,
            section=lambda what: state.section(what, None),
            reward_section=lambda what: state.section(what, state.reward_timeout),
        )
        state.engine.free_rollout_weights()
        answers = {str(r["index"]): r["completion"] for r in records[:NUM_SHOWN]}
        return {"means": means, "answers": answers, "num_samples": len(records)}

    def curve(self, reward_names: Sequence[str]) -> list[str]:
        """The metrics that show how training went, the main one first."""
        return ["loss"]

    def compare(self, before: HeldOut, after: HeldOut) -> tuple[str, Metrics, Metrics]:
        """A title for comparing two evaluations, and the means to show before and after."""
        title = f"held-out rewards, greedy, {after['num_samples']} samples"
        return title, before["means"], after["means"]

    def answers(self, sample: Sample) -> dict[str, str]:
        """A row's answers, name -> text."""
        return {"solution": sample.solution}
