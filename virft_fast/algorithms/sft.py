"""Supervised fine-tuning: the same data, engine and loss as GRPO, with the answers given.

The gradient of the cross entropy is the policy gradient of a completion whose advantage is 1, at a
ratio of 1 and averaged over tokens. So a step is GRPO's update on the data set's own answers: the
prompt is masked, logits are formed tile by tile, several samples share a row without padding, and
accumulation and ranks equal one big batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from virft_fast.algorithms.base import Algorithm
from virft_fast.algorithms.step import (
    Microbatch,
    StepStats,
    TrainState,
    finish,
    lay_out,
    loss_shares,
    update,
)
from virft_fast.batch import Prompt, Rollouts, Sample
from virft_fast.config import BESIDE_GRPO, RunConfig, given_flags
from virft_fast.data.loading import taught_answer
from virft_fast.kernels import GRPOLoss, LossArgs
from virft_fast.models.qwen_vl import control_tokens_in

# With advantages of 1 the gradient of a mean cross entropy over tokens.
CROSS_ENTROPY = LossArgs(loss_type="dapo")


def answer_ids(tokenizer: Any, text: str) -> Tensor:
    """(C,) tokens of an answer, EOS included."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return torch.tensor([*ids, tokenizer.eos_token_id])


def check_answer(tokenizer: Any, most: int, sample: Sample) -> str | None:
    """What is wrong with the answer of a row, or None.

    Args:
        most: tokens, EOS included.
    """
    text = taught_answer(sample)
    if control := control_tokens_in(tokenizer, text):
        return f"the answer holds the special token {control[0]}; remove it from the text"
    count = len(answer_ids(tokenizer, text))
    if count > most:
        return f"the answer has {count} tokens, more than --max_completion_length {most}; raise it"
    return None


def train_step(
    state: TrainState, prompts: Sequence[Prompt]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One step on this rank's B prompts and the answers their rows hold.

    Returns:
        metrics, the same on all ranks, `loss` the mean cross entropy of a token; and no records.
    Raises:
        TooManyBadSteps: `max_bad_steps` steps in a row had to be skipped.
    """
    stats, start = StepStats(), time.perf_counter()
    torch.manual_seed(state.seed + state.step)
    texts = [taught_answer(prompt.sample) for prompt in prompts]
    with stats.timed("train"):
        answers, microbatches, shares = prepare(state, prompts, texts)
        learning_rate = state.learning_rate(state.step)
        applied = update(state, microbatches, shares, learning_rate, stats, note_cross_entropy)
    lengths = answers.completion_mask.sum(1)
    stats.add("completion_length", float(lengths.sum()), len(lengths))
    state.step += 1
    return finish(state, stats, answers, learning_rate, applied, start), []


def prepare(
    state: TrainState, prompts: Sequence[Prompt], texts: Sequence[str]
) -> tuple[Rollouts, list[Microbatch], list[tuple[LossArgs, float]]]:
    """Microbatches of prompts and their answers, and what makes their loss the mean cross entropy
    of a token; `step.update` takes both, of several data sets one after another too."""
    answers = given_answers(state.tokenizer, prompts, [[text] for text in texts])
    mask = answers.completion_mask
    microbatches = lay_out(state, answers, torch.ones(len(prompts)), mask)
    return answers, microbatches, loss_shares(microbatches, mask, CROSS_ENTROPY)


def note_cross_entropy(stats: StepStats, out: GRPOLoss, mb: Microbatch, loss: float) -> None:
    """The surrogate's value says nothing: at a ratio of 1 it is -1, whatever the model knows."""
    tokens = float(mb.loss_mask.sum())
    stats.add("entropy", float(out.entropy.sum()), tokens)
    stats.add("loss", -float(out.logps.sum()), tokens)


def given_answers(
    tokenizer: Any, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]]
) -> Rollouts:
    """Answers that are given, equally many to each prompt, in the place of sampled ones."""
    flat = [text for answers in texts for text in answers]
    rows = [answer_ids(tokenizer, text) for text in flat]
    pad = tokenizer.pad_token_id
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return Rollouts(
        prompts=tuple(prompts),
        num_generations=len(texts[0]),
        completion_ids=ids,
        completion_mask=mask,
        truncated=torch.zeros(len(rows), dtype=torch.bool),
        texts=tuple(flat),
        sampling_logps=torch.zeros(ids.shape),
    )


class SFT(Algorithm):
    name = "sft"
    step = staticmethod(train_step)

    def without_effect(self, config: RunConfig) -> list[str]:
        unused = [name for name in given_flags(config.grpo) if name not in BESIDE_GRPO]
        if config.train.eval_samples:  # its evaluation scores answers
            unused = [name for name in unused if not name.startswith("reward_")]
        return given_flags(config.dpo) + unused

    def check_row(self, config: RunConfig, tokenizer: Any) -> Callable[[Sample], str | None]:
        return partial(check_answer, tokenizer, config.grpo.max_completion_length)

    def rolls_out(self, config: RunConfig) -> bool:
        return config.train.eval_samples > 0


ALGORITHM = SFT()
