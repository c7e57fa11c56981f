"""Supervised fine-tuning: GRPO's engine and loss, applied to the data set's own answers.

The gradient of the cross entropy is the policy gradient with advantage 1 and ratio 1, averaged over
tokens. So a step is GRPO's update on given completions: the loss excludes the prompt, logits are
computed tile by tile, several samples share a row without padding, and gradient accumulation and
data parallelism give the result of one big batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from virft_fast.algorithms import step
from virft_fast.algorithms.base import Algorithm, Check
from virft_fast.algorithms.step import Metrics, Microbatch, StepStats, TrainState
from virft_fast.batch import Prompt, Rollouts, Row, Sample
from virft_fast.config import RunConfig
from virft_fast.data.loading import taught_answer
from virft_fast.kernels import GRPOLoss, LossArgs
from virft_fast.models.families import Tokenizer
from virft_fast.models.inputs import control_tokens_in

# With advantage 1, its gradient equals that of the mean cross entropy over tokens.
CROSS_ENTROPY = LossArgs(loss_type="dapo")


def answer_ids(tokenizer: Tokenizer, text: str) -> Tensor:
    """(C,) int64 tokens of an answer, EOS included."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return torch.tensor([*ids, tokenizer.eos_token_id])


def check_answer(tokenizer: Tokenizer, limit: int, sample: Sample) -> str | None:
    """What is wrong with a row's answer, or None.

    Args:
        limit: maximum length in tokens, EOS included.
    """
    text = taught_answer(sample)
    if control := control_tokens_in(tokenizer, text):
        return f"the answer holds the special token {control[0]}; remove it from the text"
    count = len(answer_ids(tokenizer, text))
    if count > limit:
        return f"the answer has {count} tokens, more than --max_completion_length {limit}; raise it"
    return None


def train_step(state: TrainState, prompts: Sequence[Prompt]) -> tuple[Metrics, list[Row]]:
    """One SFT step on this rank's B prompts and the answers in their rows.

    Returns:
        Metrics, the same on all ranks; `loss` is the mean cross entropy per token. No records.
    Raises:
        TooManyBadSteps: `max_bad_steps` steps in a row were skipped.
    """
    stats, start = StepStats(), time.perf_counter()
    torch.manual_seed(state.seed + state.step)
    texts = [taught_answer(prompt.sample) for prompt in prompts]
    with stats.timed("train"):
        answers, microbatches, shares = prepare(state, prompts, texts)
        learning_rate = state.learning_rate(state.step)
        applied = step.update(state, microbatches, shares, learning_rate, stats, note_cross_entropy)
    lengths = answers.completion_mask.sum(1)
    stats.add("completion_length", float(lengths.sum()), len(lengths))
    state.step += 1
    return step.finish(state, stats, answers, learning_rate, applied, start), []


def prepare(
    state: TrainState, prompts: Sequence[Prompt], texts: Sequence[str]
) -> tuple[Rollouts, list[Microbatch], list[tuple[LossArgs, float]]]:
    """The answers, plus the microbatches and `loss_shares` for `step.update` to minimize their mean
    cross entropy per token."""
    answers = given_answers(state.tokenizer, prompts, [[text] for text in texts])
    mask = answers.completion_mask
    microbatches = step.lay_out(state, answers, torch.ones(len(prompts)), mask)
    return answers, microbatches, step.loss_shares(microbatches, mask, CROSS_ENTROPY)


def note_cross_entropy(stats: StepStats, out: GRPOLoss, mb: Microbatch, loss: Tensor) -> None:
    """Report the cross entropy as the loss, because the surrogate is always -1 at ratio 1."""
    stats.add("entropy", out.entropy.sum(), mb.num_tokens)
    stats.add("loss", -out.logps.sum(), mb.num_tokens)


def given_answers(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]]
) -> Rollouts:
    """The given answers, the same number for each prompt, as if they had been sampled; `texts` are
    as given."""
    flat = [text for answers in texts for text in answers]
    rows = [
        answer_ids(tokenizer, prompt.continued(text))
        for prompt, answers in zip(prompts, texts, strict=True)
        for text in answers
    ]
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
        scored = config.train.eval_samples > 0  # the evaluation uses the reward functions
        unused = super().without_effect(config)
        return [name for name in unused if not (scored and name.startswith("reward_"))]

    def check_row(self, config: RunConfig, tokenizer: Tokenizer) -> Check:
        return partial(check_answer, tokenizer, config.grpo.max_completion_length)

    def rolls_out(self, config: RunConfig) -> bool:
        return config.train.eval_samples > 0


ALGORITHM = SFT()
