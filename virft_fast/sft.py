"""Supervised fine-tuning: the same data, engine and loss as GRPO, with the answers given.

The gradient of the cross entropy is the policy gradient of a completion whose advantage is 1, at a
ratio of 1 and averaged over tokens. So a step is GRPO's update on the data set's own answers: the
prompt is masked, logits are formed tile by tile, several samples share a row without padding, and
accumulation and ranks equal one big batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from virft_fast.batch import Prompt, Rollouts, Sample
from virft_fast.data.loading import taught_answer
from virft_fast.grpo import (
    Microbatch,
    StepStats,
    TrainState,
    finish,
    loss_weights,
    make_microbatches,
    update,
)
from virft_fast.kernels import GRPOLoss
from virft_fast.models.qwen_vl import control_tokens_in

# What makes GRPO's loss a mean cross entropy over tokens.
AS_CROSS_ENTROPY: dict[str, Any] = {
    "beta": 0.0,
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "num_iterations": 1,
    "temperature": 1.0,
    "mask_truncated_completions": False,
}


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

    Args:
        state: its `config` has to hold `AS_CROSS_ENTROPY`.
    Returns:
        metrics, the same on all ranks, `loss` the mean cross entropy of a token; and no records.
    Raises:
        TooManyBadSteps: `max_bad_steps` steps in a row had to be skipped.
    """
    stats, start = StepStats(), time.perf_counter()
    torch.manual_seed(state.seed + state.step)
    texts = [taught_answer(prompt.sample) for prompt in prompts]
    with stats.timed("train"):
        answers, microbatches, weights = prepare(state, prompts, texts, stats)
        learning_rate = state.learning_rate(state.step)
        applied = update(state, microbatches, weights, learning_rate, stats, note_cross_entropy)
    # The surrogate's value says nothing: at a ratio of 1 it is -1, whatever the model knows.
    del stats.totals["loss"]
    for name in ("clip_fraction_low", "clip_fraction_high", "dropped_fraction"):
        stats.sums.pop(name)
    lengths = answers.completion_mask.sum(1)
    stats.add("completion_length", float(lengths.sum()), len(lengths))
    state.step += 1
    return finish(state, stats, answers, learning_rate, applied, start), []


def prepare(
    state: TrainState, prompts: Sequence[Prompt], texts: Sequence[str], stats: StepStats
) -> tuple[Rollouts, list[Microbatch], list[dict[str, Any]]]:
    """Microbatches of prompts and their answers, and the weights that make their loss the mean
    cross entropy of a token; `grpo.update` takes both, of several data sets one after another
    too."""
    answers = given_answers(state.tokenizer, prompts, [[text] for text in texts])
    microbatches = make_microbatches(state, answers, torch.ones(len(prompts)), stats)
    return answers, microbatches, loss_weights(microbatches, answers, state.config)


def note_cross_entropy(stats: StepStats, out: GRPOLoss, mb: Microbatch) -> None:
    stats.add("loss", -float(out.logps.sum()), float(mb.loss_mask.sum()))


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
