"""One whole GRPO step, rollout to optimizer: TRL's GRPOTrainer against ours.

    pytest benchmarks/test_bench_step.py               a small model, minutes on a CPU
    pytest benchmarks/test_bench_step.py --size 2b     Qwen2-VL's shapes, on a GPU; also 7b

Same model, same prompt and image, G = 8, fixed completion length, beta 0, AdamW, with everything
that a step does: image processing, sampling, rewards, loss, gradients, clipping, update. Loss and
gradient on TRL's own completions are compared first. "ours, training unshared" also uses our
rollout, which always shares prompts, but in training it reads the prompt once per completion.
"""

from __future__ import annotations

import statistics

import pytest
import torch
from measure import DEVICE, Case, contenders, peak_mib
from vlm import (
    FixedLength,
    FixedLengthHF,
    cases_of,
    make_model,
    make_processor,
    make_sample,
    prepare,
    update,
)

from virft_fast.algorithms.grpo import train_step
from virft_fast.algorithms.step import TrainState
from virft_fast.config import GRPOConfig
from virft_fast.engine import OptimizerSettings, PlainEngine
from virft_fast.kernels import LossArgs
from virft_fast.models.qwen_vl import Policy, encode_prompt

trl = pytest.importorskip("trl", reason="TRL: not installed; pip install trl")

G = 8
RATE = 1e-6
CASES = cases_of()
FAMILIES = ("qwen3_5", "gemma3", "glm46v")
CASES["cpu"] |= {f"P500-C64-{family}": (500, 64, family) for family in FAMILIES}


def reward(completions, **columns):
    """A reward that varies on any output, so that no group drops out."""
    return [sum(map(ord, c[0]["content"])) % 17 / 17 for c in completions]


def our_state(model, processor, completion_length, sharing):
    policy = Policy(model, prefix_sharing=sharing)
    device = torch.device(DEVICE)
    engine = PlainEngine(policy, OptimizerSettings(RATE), device=device)
    make_rollout = FixedLength if policy.unreachable is None else FixedLengthHF
    return TrainState(
        config=GRPOConfig(
            num_generations=G, max_completion_length=completion_length, beta=0.0, loss_type="dapo"
        ),
        policy=policy,
        engine=engine,
        reference=None,
        rollout=make_rollout(engine.whole_weights, processor.tokenizer, device=device),
        tokenizer=processor.tokenizer,
        reward_funcs=[("reward", reward)],
        reward_weights=[1.0],
        learning_rate=lambda step: RATE,
    )


def trl_trainer(model, processor, sample, completion_length, folder):
    from datasets import Dataset

    example = {
        "prompt": [{"role": "user", "content": sample.columns["problem"]}],
        "images": list(sample.images),
    }
    config = trl.GRPOConfig(
        output_dir=str(folder), use_cpu=DEVICE == "cpu", per_device_train_batch_size=G,
        num_generations=G, max_completion_length=completion_length, learning_rate=RATE,
        report_to="none", bf16=DEVICE == "cuda", beta=0.0, loss_type="dapo",
        gradient_checkpointing=False, temperature=1.0, max_steps=1000,
        generation_kwargs={"min_new_tokens": completion_length},
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=model, processing_class=processor, args=config, reward_funcs=[reward],
        train_dataset=Dataset.from_list([{"prompt": example["prompt"]}] * 2),
    )  # fmt: skip
    prepare(trainer)
    trainer.current_gradient_accumulation_steps = 1
    return trainer, [example] * G


class TRLStep:
    """The work of Trainer's loop in one step, without its dataloader and logging."""

    def __init__(self, trainer, examples):
        self.trainer, self.examples = trainer, examples

    def __call__(self):
        trainer = self.trainer
        trainer._buffered_inputs = None
        trainer.training_step(trainer.model, [dict(e) for e in self.examples], None)
        update(trainer)


class OurStep:
    def __init__(self, state, processor, sample):
        self.state, self.processor, self.sample = state, processor, sample
        self.metrics = []

    def __call__(self):
        metrics, _ = train_step(self.state, [encode_prompt(self.processor, self.sample)])
        self.metrics.append(metrics)

    def training(self):
        """Forward, backward and update only, on completions that were drawn before."""
        return min(m["time/train_s"] for m in self.metrics) * 1e3

    def rollout_share(self):
        return statistics.median(m["time/rollout_share"] for m in self.metrics)


def check(trainer, examples, states, processor, sample):
    """On TRL's completions and advantages, compare TRL's loss and gradient with ours, shared and
    not."""
    trainer._buffered_inputs = None
    inputs = trainer._prepare_inputs([dict(e) for e in examples])
    trainer._buffered_inputs = None
    trainer.model.zero_grad(set_to_none=True)
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    expected = flat_gradient(trainer.model)
    trainer.model.zero_grad(set_to_none=True)
    prompt = encode_prompt(processor, sample)
    ids, mask = inputs["completion_ids"].cpu(), inputs["completion_mask"].bool().cpu()
    assert mask.all()
    for state in states:
        collated = state.policy.collate(
            [prompt], [list(ids)], pad_token_id=0, device=state.engine.device
        )
        # TRL's own count of the tokens that it divides by.
        out = state.policy(
            collated,
            loss=LossArgs(
                advantages=inputs["advantages"],
                loss_type="dapo",
                num_items=float(inputs["num_items_in_batch"]),
            ),
            loss_mask=mask.flatten().to(DEVICE),
        )
        out[0].backward()
        gradient = flat_gradient(state.policy.model)
        state.policy.zero_grad(set_to_none=True)
        limit = 1e-5 if DEVICE == "cpu" else 5e-2
        assert abs(float(out[0].detach()) - float(loss)) < limit
        assert float((gradient - expected).norm() / expected.norm()) < limit


def flat_gradient(model):
    return torch.cat([p.grad.flatten().float() for _, p in sorted(model.named_parameters())])


@pytest.fixture(scope="module")
def case(request, size, tmp_path_factory):
    prompt_length, completion_length, *family = request.param
    processor = make_processor(*family)
    sample = make_sample(processor, 0, prompt_length)
    trainer, examples = trl_trainer(
        make_model(size, *family), processor, sample, completion_length,
        tmp_path_factory.mktemp("trl"),
    )  # fmt: skip
    shared, unshared = (
        our_state(make_model(size, *family), processor, completion_length, how)
        for how in ("auto", "off")
    )
    check(trainer, examples, (shared, unshared), processor, sample)
    steps = {
        "TRL": TRLStep(trainer, examples),
        "ours": OurStep(shared, processor, sample),
        "ours, training unshared": OurStep(unshared, processor, sample),
    }
    if shared.policy.unreachable is not None:
        steps["ours, training unshared"] = "the same as ours"
    notes = {n: {"peak_mib": peak_mib(step)} for n, step in steps.items() if callable(step)}
    for name, step in steps.items():
        if isinstance(step, OurStep):
            step.metrics.clear()
            notes[name] |= {"train_ms": step.training, "rollout_share": step.rollout_share}
    name = f"{size}: a step, G={G}, P={prompt_length}, C={completion_length}"
    name += f", {family[0]}" if family else ""
    return Case(name, steps, notes, work={"tokens": G * completion_length})


@contenders("TRL", "ours", "ours, training unshared")
def test_step(race, case, contender):
    race(case, contender)
