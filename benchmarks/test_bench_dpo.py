"""A DPO step, forward to optimizer: TRL's DPOTrainer against ours.

    pytest benchmarks/test_bench_dpo.py               a small model, minutes on a CPU
    pytest benchmarks/test_bench_dpo.py --size 2b     Qwen2-VL's shapes, on a GPU; also 7b

Same weights, same pairs, the images processed beforehand, a frozen copy of the model as reference.
Losses and gradients are compared first. TRL reads prompt and images once for each answer. Ours,
"each answer with its own prompt and images", does the same, which shows the effect of sharing
alone. Our own `--prefix_sharing off` is in between: it reads prompts twice and
images once.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from measure import DEVICE, Case, contenders, peak_mib
from vlm import cases_of, make_model, make_processor, make_sample, prepare, update

from virft_fast.algorithms import dpo
from virft_fast.algorithms.dpo import DPOState
from virft_fast.config import DPOConfig, GRPOConfig
from virft_fast.engine import OptimizerSettings, PlainEngine, make_reference
from virft_fast.models.families import core
from virft_fast.models.qwen_vl import Policy, encode_prompt
from virft_fast.models.vision_metadata import vision_metadata

trl = pytest.importorskip("trl", reason="TRL: not installed; pip install trl")

PAIRS = 4
CASES = cases_of([(650, 100), (500, 64), (130, 256)])
UNSHARED = "ours, each answer with its own prompt"


def make_samples(processor, prompt_length, completion_length):
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
        yield replace(sample, columns={**sample.columns, "chosen": texts[0], "rejected": texts[1]})


class ReadsImagesTwice(Policy):
    """A policy that runs the images through the vision tower again for each answer."""

    def collate(self, prompts, completions, **options):
        inputs = super().collate(prompts, completions, **options)
        if inputs.pixel_values is None:
            return inputs
        pixels = torch.cat([prompt.pixel_values for prompt in prompts for _ in range(2)])
        grid = torch.cat([prompt.image_grid_thw for prompt in prompts for _ in range(2)])
        return replace(
            inputs,
            pixel_values=pixels.to(inputs.input_ids.device),
            image_grid_thw=grid,
            vision=vision_metadata(core(self.model).visual, grid, inputs.input_ids.device),
            image_copies=tuple((n, 1) for n, _ in inputs.image_copies for _ in range(2)),
        )


def make_reference_model(size):
    """A model that differs from the policy, so that the loss depends on the weights."""
    model = make_model(size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.95)
    return model


class OurStep:
    def __init__(self, size, processor, samples, sharing, kind=Policy):
        policy = kind(make_model(size), prefix_sharing=sharing)
        engine = PlainEngine(
            policy, OptimizerSettings(learning_rate=0.0), device=torch.device(DEVICE)
        )
        reference = kind(make_reference_model(size), prefix_sharing=sharing)
        self.prompts = [encode_prompt(processor, sample) for sample in samples]
        self.state = DPOState(
            config=GRPOConfig(beta=0.0),
            policy=policy,
            engine=engine,
            reference=make_reference(reference, engine, None),
            rollout=None,
            tokenizer=processor.tokenizer,
            reward_funcs=[],
            reward_weights=[],
            learning_rate=lambda step: 0.0,
            prompts_per_microbatch=PAIRS if DEVICE == "cpu" else 1,
            gradient_accumulation_steps=1 if DEVICE == "cpu" else PAIRS,
            dpo=DPOConfig(),
        )

    def __call__(self):
        metrics, _ = dpo.train_step(self.state, self.prompts)
        return metrics["loss"]

    def gradients(self):
        """The gradients of one step before the update, and the step's loss."""
        seen = {}
        step = self.state.engine.step

        def look(learning_rate, *, veto=False):
            for name, parameter in self.state.policy.model.named_parameters():
                if parameter.grad is not None:
                    seen[name] = parameter.grad.detach().float().cpu().clone()
            return step(learning_rate, veto=veto)

        self.state.engine.step = look
        try:
            loss = self()
        finally:
            self.state.engine.step = step
        return loss, seen


class TRLStep:
    """The work of Trainer's loop in one step, without its dataloader and logging."""

    def __init__(self, size, processor, samples, folder):
        from datasets import Dataset

        tokenizer = processor.tokenizer
        config = trl.DPOConfig(
            output_dir=str(folder), use_cpu=DEVICE == "cpu", learning_rate=0.0, report_to="none",
            bf16=DEVICE == "cuda", beta=DPOConfig().dpo_beta, gradient_checkpointing=False,
            per_device_train_batch_size=PAIRS, max_length=None,
        )  # fmt: skip
        examples = [
            {
                "images": list(sample.images),
                # Plain texts, because the chat template would put a line break after the answer.
                "prompt": processor.apply_chat_template(
                    sample.messages, tokenize=False, add_generation_prompt=True
                ),
                "chosen": sample.columns["chosen"] + tokenizer.eos_token,
                "rejected": sample.columns["rejected"] + tokenizer.eos_token,
            }
            for sample in samples
        ]
        self.trainer = trl.DPOTrainer(
            model=make_model(size), ref_model=make_reference_model(size), args=config,
            processing_class=processor,
            train_dataset=Dataset.from_list([{**examples[0], "images": []}]),
        )  # fmt: skip
        prepare(self.trainer)
        size = PAIRS if DEVICE == "cpu" else 1
        self.batches = [
            self.trainer.data_collator([dict(e) for e in examples[first : first + size]])
            for first in range(0, PAIRS, size)
        ]
        self.trainer.current_gradient_accumulation_steps = len(self.batches)

    def forward_backward(self):
        trainer = self.trainer
        losses = [trainer.training_step(trainer.model, dict(batch)) for batch in self.batches]
        return float(sum(losses))

    def __call__(self):
        loss = self.forward_backward()
        update(self.trainer)
        return loss

    def gradients(self):
        loss = self.forward_backward()
        model = self.trainer.model
        seen = {n: p.grad.float().cpu().clone() for n, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        return loss, seen


@pytest.fixture(scope="module")
def case(request, size, tmp_path_factory):
    lengths = request.param
    processor = make_processor()
    samples = list(make_samples(processor, *lengths))
    steps = {
        "TRL": TRLStep(size, processor, samples, tmp_path_factory.mktemp("trl")),
        f"{UNSHARED} and images": OurStep(size, processor, samples, "off", ReadsImagesTwice),
        UNSHARED: OurStep(size, processor, samples, "off"),
        "ours": OurStep(size, processor, samples, "on"),
    }
    own, grads = steps["ours"].gradients()
    for name in [*steps][:-1]:
        loss, wanted = steps[name].gradients()
        assert abs(loss - own) < (1e-4 if DEVICE == "cpu" else 0.5), (name, loss, own)
        difference = sum((grads[n] - wanted[n]).norm() ** 2 for n in wanted) ** 0.5
        total = sum(wanted[n].norm() ** 2 for n in wanted) ** 0.5
        limit = 1e-4 if DEVICE == "cpu" else 0.1
        assert difference < limit * total, (name, float(difference / total))
    notes = {name: {"peak_mib": peak_mib(step)} for name, step in steps.items()}
    return Case(f"{size}: {PAIRS} pairs, P={lengths[0]}, C={lengths[1]}", steps, notes)


@contenders("TRL", "ours", UNSHARED, f"{UNSHARED} and images")
def test_dpo_step(race, case, contender):
    race(case, contender)
