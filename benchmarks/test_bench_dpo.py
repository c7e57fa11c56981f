"""A DPO step: prompt and images read once for both answers, or once for each.

What TRL 1.16's DPOTrainer does is "each answer with its own prompt and images": its collator
repeats both. In between lies our own `--prefix_sharing off`, which reads prompts twice and images
once.

    pytest benchmarks/test_bench_dpo.py               a small model, minutes on a CPU
    pytest benchmarks/test_bench_dpo.py --size 2b     Qwen2-VL's shapes, on a GPU; also 7b

Same weights, same pairs, the reference's log-probs known; losses and gradients are compared first.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from measure import DEVICE, peak_memory, synchronised
from vlm import make_model, make_processor, make_sample

from virft_fast import dpo
from virft_fast.config import DPOConfig, GRPOConfig
from virft_fast.dpo import DPOState
from virft_fast.engine import OptimizerSettings, PlainEngine
from virft_fast.models.qwen_vl import Policy, encode_prompt

ROUNDS = 5
PAIRS = 4
LENGTHS = [(650, 100), (500, 64), (130, 256)]


def make_pairs(processor, prompt_length, completion_length):
    words = "red blue green one two three four five".split()
    for index in range(PAIRS):
        sample = make_sample(processor, index, prompt_length)
        texts = []
        for shift in (0, 3):
            text = ""
            number = 0
            while True:
                longer = f"{text} {words[(number + shift + index) % len(words)]}"
                if len(dpo.answer_ids(processor.tokenizer, longer)) > completion_length:
                    break
                text, number = longer, number + 1
            texts.append(text)
        columns = {**sample.columns, "chosen": texts[0], "rejected": texts[1]}
        yield encode_prompt(processor, replace(sample, columns=columns))


class ReadsImagesTwice(Policy):
    """Images go through the tower with each answer."""

    def collate(self, prompts, completions, **options):
        inputs = super().collate(prompts, completions, **options)
        if inputs.pixel_values is None:
            return inputs
        pixels = torch.cat([prompt.pixel_values for prompt in prompts for _ in range(2)])
        grid = torch.cat([prompt.image_grid_thw for prompt in prompts for _ in range(2)])
        return replace(
            inputs,
            pixel_values=pixels.to(inputs.input_ids.device),
            image_grid_thw=grid.to(inputs.input_ids.device),
            image_copies=tuple((n, 1) for n, _ in inputs.image_copies for _ in range(2)),
        )


def make_state(size, tokenizer, sharing, kind=Policy):
    policy = kind(make_model(size), prefix_sharing=sharing)
    settings = OptimizerSettings(learning_rate=0.0)
    return DPOState(
        config=GRPOConfig(beta=0.0),
        policy=policy,
        engine=PlainEngine(policy, settings, device=torch.device(DEVICE)),
        reference=None,
        rollout=None,
        tokenizer=tokenizer,
        reward_funcs=[],
        reward_weights=[],
        learning_rate=lambda step: 0.0,
        prompts_per_microbatch=PAIRS if DEVICE == "cpu" else 1,
        gradient_accumulation_steps=1 if DEVICE == "cpu" else PAIRS,
        dpo=DPOConfig(),
        ref_logps={index: (-100.0, -100.0) for index in range(PAIRS)},
    )


def gradients(state, prompts):
    """Of one step, before it is taken; and the step's loss."""
    seen = {}
    step = state.engine.step

    def look(learning_rate, *, veto=False):
        for name, parameter in state.policy.named_parameters():
            if parameter.grad is not None:
                seen[name] = parameter.grad.detach().float().cpu().clone()
        return step(learning_rate, veto=veto)

    state.engine.step = look
    try:
        metrics, _ = dpo.train_step(state, prompts)
    finally:
        state.engine.step = step
    return metrics["loss"], seen


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_dpo_step(race, request, lengths):
    size = request.config.getoption("--size")
    lengths = (60, 8) if size == "tiny" else lengths
    processor = make_processor()
    prompts = list(make_pairs(processor, *lengths))
    states = {
        "each answer with its own prompt and images": make_state(
            size, processor.tokenizer, "off", ReadsImagesTwice
        ),
        "each answer with its own prompt": make_state(size, processor.tokenizer, "off"),
        "ours": make_state(size, processor.tokenizer, "on"),
    }
    own, grads = gradients(states["ours"], prompts)
    for name in [*states][:2]:
        loss, wanted = gradients(states[name], prompts)
        assert abs(loss - own) < (1e-4 if DEVICE == "cpu" else 0.5), (loss, own)
        difference = sum((grads[n] - wanted[n]).norm() ** 2 for n in wanted) ** 0.5
        total = sum(wanted[n].norm() ** 2 for n in wanted) ** 0.5
        assert difference < (1e-4 if DEVICE == "cpu" else 0.1) * total, float(difference / total)
    runs = {
        name: synchronised(lambda state=state: dpo.train_step(state, prompts))
        for name, state in states.items()
    }
    notes = {name: {"peak_mib": peak_memory(run) / 2**20} for name, run in runs.items()}
    case = f"{size}: {PAIRS} pairs, P={lengths[0]}, C={lengths[1]}"
    race(case, runs, ours="ours", notes=notes, rounds=ROUNDS)
