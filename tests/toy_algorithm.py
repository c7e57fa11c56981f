"""An algorithm from outside the package: cross entropy of the answers, half as strong."""

import time
from dataclasses import replace

import torch

from virft_fast.algorithms import base, sft, step


class Toy(base.Algorithm):
    name = "toy"

    def step(self, state, prompts):
        stats, start = step.StepStats(), time.perf_counter()
        rate = state.learning_rate(state.step)
        answers = sft.given_answers(state.tokenizer, prompts, [["yes"] for _ in prompts])
        mask = answers.completion_mask
        made = step.lay_out(state, answers, torch.full((len(prompts),), 0.5), mask)
        shares = step.loss_shares(made, mask, replace(sft.CROSS_ENTROPY, loss_type="bnpo"))
        applied = step.update(state, made, shares, rate, stats, sft.note_cross_entropy)
        stats.add("completion_length", float(mask.sum()), len(mask))
        state.step += 1
        return step.finish(state, stats, answers, rate, applied, start), []


ALGORITHM = Toy()
