"""Child of test_distributed.py: a few steps on this rank, then rank 0 saves the parameters.

    torchrun --nproc_per_node W two_ranks.py OUT STAGE BATCH KIND

STAGE is a ZeRO stage, or -1 for the plain engine; BATCH is this rank's number of prompts; KIND is
`images`, `mixed` (rank 1 has text only), `nan` (rank 1 alone gets a loss that is not finite) or
`lora` (an adapter is trained, with gradient checkpointing and the adapter off as the reference).
"""

from __future__ import annotations

import json
import sys

import torch
from helpers import CPU, letter_count, make_prompts, make_sample

from virft_fast import dist
from virft_fast.config import GRPOConfig
from virft_fast.engine import (
    DeepSpeedEngine,
    OptimizerSettings,
    PlainEngine,
    make_reference,
    prepare_deepspeed,
    resolve_deepspeed_config,
)
from virft_fast.grpo import TrainState, train_step
from virft_fast.models.processing import load_processor
from virft_fast.models.qwen_vl import Policy, add_lora, load_model
from virft_fast.models.tiny import resolve_model_path
from virft_fast.rollout.backends import make_rollout
from virft_fast.train import end_process

STEPS = 3


def make_engine(stage, policy, settings):
    if stage < 0:
        return PlainEngine(policy, settings, device=CPU), None
    make_empty = lambda: make_policy(kind, empty=True)  # noqa: E731
    engine = DeepSpeedEngine(policy, settings, config=CONFIG, device=CPU, make_empty=make_empty)
    return engine, CONFIG


def all_prompts(processor, kind):
    """Eight prompts: the first half is rank 0's with two ranks, the others rank 1's."""
    sizes = [[(112, 112)], [(56, 84)], [(84, 84), (56, 56)], [(112, 56)]]
    second = [[] for _ in sizes] if kind == "mixed" else sizes
    return make_prompts(
        processor, *(make_sample(i, s, f"Detect {i}.") for i, s in enumerate([*sizes, *second]))
    )


def reward(prompts, completions, **columns):
    return letter_count(prompts, completions)


def make_policy(kind, empty=False):
    model = load_model("tiny", empty=empty).train()
    if kind == "lora":
        torch.manual_seed(0)  # of the adapter
        model = add_lora(model, r=4, alpha=8, target_modules=["q_proj", "down_proj"])
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    return Policy(model)


out, stage, batch, kind = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
dist.init()
processor = load_processor(resolve_model_path("tiny"))
# A large epsilon: see test_grpo.SMOOTH.
settings = OptimizerSettings(learning_rate=2e-3, epsilon=1e-3, max_grad_norm=0.05)
CONFIG, settings = resolve_deepspeed_config(
    {"zero_optimization": {"stage": max(stage, 0), "stage3_param_persistence_threshold": 0}},
    settings=settings,
    micro_batch_size=batch // 2,
    gradient_accumulation_steps=2,
    bf16=False,
    hidden_size=128,
    world_size=dist.world_size(),
)
alive = prepare_deepspeed(CONFIG, CPU) if stage >= 0 else None
policy = make_policy(kind)
reference = None if kind == "lora" else Policy(load_model("tiny"))
del alive
engine, config = make_engine(stage, policy, settings)
grpo = GRPOConfig(num_generations=2, max_completion_length=6, beta=0.1, loss_type="dapo")
state = TrainState(
    config=grpo,
    policy=policy,
    engine=engine,
    reference=make_reference(reference, engine, config) if reference else engine.forward,
    rollout=make_rollout("native", engine.whole_weights, processor.tokenizer, device=CPU),
    tokenizer=processor.tokenizer,
    reward_funcs=[("letters", reward)],
    reward_weights=[1.0],
    learning_rate=lambda step: settings.learning_rate,
    prompts_per_microbatch=batch // 2,
    gradient_accumulation_steps=2,
)
prompts = all_prompts(processor, kind)
mine = prompts[dist.rank() * batch : (dist.rank() + 1) * batch]
start = engine.model_state(policy.model, torch.float32)
if kind == "nan" and dist.rank() == dist.world_size() - 1:
    forward = engine.forward

    def spoiled(*args, **kwargs):
        fields = forward(*args, **kwargs)
        return (fields[0] * torch.nan, *fields[1:]) if kwargs.get("loss") else fields

    engine.forward = spoiled
metrics = [train_step(state, mine)[0] for _ in range(STEPS)]
saved = engine.model_state(policy.model, torch.float32)
if dist.is_main():
    torch.save({"start": start, "end": saved}, f"{out}.pt")
    with open(f"{out}.json", "w") as file:
        json.dump(metrics, file)
dist.barrier()
dist.shutdown()
end_process(0)
