"""What a run asks of its algorithm, and the rows that it hands to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from virft_fast.algorithms.step import TrainState
from virft_fast.batch import Prompt, Sample
from virft_fast.config import RunConfig
from virft_fast.data import BadRows
from virft_fast.data.prompt_source import PromptSource
from virft_fast.evaluation.scoring import evaluate_rewards


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


NUM_SHOWN = 5  # answers that are kept of an evaluation
# Of the held-out rows: `means` of measures, `answers` by row, `num_samples`; JSON.
HeldOut = dict[str, Any]


class Algorithm:
    """What a run asks of its algorithm. Each module of `virft_fast.algorithms` ends in one.

    Attributes:
        name: of --algorithm.
        draws: whether a step draws completions, which are scored and written down.
        preferences: whether rows hold pairs of answers, in the place of solutions and rewards.
        files: what it writes into --output_dir, beside what every run writes.
    """

    name: str
    draws: bool = False
    preferences: bool = False
    files: Sequence[str] = ()

    def without_effect(self, config: RunConfig) -> list[str]:
        """The flags of `config` that change nothing.

        Raises:
            UsageError: flags that mean something else here.
        """
        return []

    def check_data(self, config: RunConfig, column_names: Sequence[str]) -> None:
        """Raise UsageError if rows with these columns can't be trained on."""

    def check_row(self, config: RunConfig, tokenizer: Any) -> Callable[[Sample], str | None] | None:
        """What says what is wrong with a row, or None; None where nothing can be."""
        return None

    def rolls_out(self, config: RunConfig) -> bool:
        """Whether the model answers prompts, in steps or in the evaluation before and after."""
        return self.draws

    def uses_reference(self, config: RunConfig) -> bool:
        """Whether a step asks a reference for log-probs: a model of its own, or the policy with its
        adapter off or as it began."""
        return False

    def may_use_reference(self, config: RunConfig) -> bool:
        """Whether a run resumed with other flags could; its parameters must be the same."""
        return self.uses_reference(config)

    def make_state(self, config: RunConfig, **parts: Any) -> TrainState:
        return TrainState(config=config.grpo, **parts)

    def begin(self, config: RunConfig, state: Any, data: Data, *, resumed: bool) -> None:
        """What is done before the first step, once the model is there; all ranks call it."""

    def step(
        self, state: Any, prompts: Sequence[Prompt]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """One step on this rank's B prompts: metrics, the same on all ranks, and a record of each
        of its completions that was drawn."""
        raise NotImplementedError

    def evaluate(self, config: RunConfig, state: Any, data: Data, num_rows: int) -> HeldOut:
        """On the first held-out rows; all ranks call it."""
        with state.engine.whole_weights():
            pass  # gathered by all ranks, before anything can fail on one of them
        result = evaluate_rewards(
            state.rollout,
            data.test.load,
            range(num_rows),
            reward_funcs=data.reward_funcs,
            bad_rows=BadRows(config.data.max_bad_rows),
            task=data.task,
            batch_size=config.train.eval_batch_size,
            max_completion_length=config.grpo.max_completion_length,
            section=lambda what: state.section(what, None),
            reward_section=lambda what: state.section(what, state.reward_timeout),
        )
        answers = {str(r["index"]): r["completion"] for r in result.records[:NUM_SHOWN]}
        return {"means": result.means, "answers": answers, "num_samples": len(result.records)}

    def curve(self, reward_names: Sequence[str]) -> list[str]:
        """The metrics that tell how training went, the main one first."""
        return ["loss"]

    def compare(
        self, before: HeldOut, after: HeldOut
    ) -> tuple[str, dict[str, float], dict[str, float]]:
        """What is shown of two evaluations: a title, means before and after."""
        title = f"held-out rewards, greedy, {after['num_samples']} samples"
        return title, before["means"], after["means"]

    def answers(self, sample: Sample) -> dict[str, str]:
        """What a row teaches, by what it is called."""
        return {"solution": sample.solution}
