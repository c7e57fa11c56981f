"""Child of test_families.py: two steps of GRPO on several families; rank 0 saves the parameters.

    torchrun --nproc_per_node W -m family_ranks OUT BATCH FOLDER:STAGE [FOLDER:STAGE ...]

STAGE is a ZeRO stage, or -1 for the plain engine; BATCH is this rank's number of prompts. The
second half of the prompts has no images: with two ranks, they are rank 1's. PaliGemma needs one.
"""

from __future__ import annotations

import copy
import gc
import sys
from pathlib import Path

import torch
from helpers import CPU, letter_count, make_prompts, make_sample

from virft_fast import dist
from virft_fast.algorithms.grpo import train_step
from virft_fast.algorithms.step import TrainState
from virft_fast.commands import end_process
from virft_fast.config import GRPOConfig
from virft_fast.engine import (
    DeepSpeedEngine,
    OptimizerSettings,
    PlainEngine,
    prepare_deepspeed,
    resolve_deepspeed_config,
)
from virft_fast.models.processing import load_processor
from virft_fast.models.qwen_vl import Policy, load_model, save_model
from virft_fast.rollout.backends import make_rollout


def take_steps(out, batch, folder, stage):
    processor = load_processor(folder)
    # A large epsilon: see test_grpo.SMOOTH.
    settings = OptimizerSettings(learning_rate=2e-3, epsilon=1e-3, max_grad_norm=0.05)
    config, settings = resolve_deepspeed_config(
        {"zero_optimization": {"stage": max(stage, 0), "stage3_param_persistence_threshold": 0}},
        settings=settings, micro_batch_size=batch, gradient_accumulation_steps=1, bf16=False,
        hidden_size=32, world_size=dist.world_size(),
    )  # fmt: skip
    alive = prepare_deepspeed(config, CPU) if stage >= 0 else None
    policy = Policy(load_model(folder).train())
    del alive
    engine = (
        PlainEngine(policy, settings, device=CPU)
        if stage < 0
        else DeepSpeedEngine(policy, settings, config=config, device=CPU)
    )
    backend = "native" if policy.family.shares else "hf"
    state = TrainState(
        config=GRPOConfig(num_generations=2, max_completion_length=6, beta=0.0, loss_type="dapo"),
        policy=policy,
        engine=engine,
        reference=None,
        rollout=make_rollout(backend, engine.whole_weights, processor.tokenizer, device=CPU),
        tokenizer=processor.tokenizer,
        reward_funcs=[("letters", letter_count)],
        reward_weights=[1.0],
        learning_rate=lambda step: settings.learning_rate,
        prompts_per_microbatch=batch,
    )
    last = [(56, 56)] * (policy.config.model_type == "paligemma")
    sizes = [[(112, 60)], [(56, 84), (112, 56)], last, last]
    samples = [make_sample(n, own, f"Detect {n}.") for n, own in enumerate(sizes)]
    mine = slice(dist.rank() * batch, (dist.rank() + 1) * batch)
    prompts = make_prompts(processor, *samples)[mine]
    start = copy.deepcopy(engine.model_state(policy.model, torch.float32))
    steps = [train_step(state, prompts)[0] for _ in range(2)]
    metrics = [{name: step[name] for name in ("loss", "grad_norm", "num_tokens")} for step in steps]
    end = engine.model_state(policy.model, torch.float32)
    if dist.is_main():
        name = f"{out}-{Path(folder).name}-{stage}.pt"
        torch.save({"start": start, "end": end, "metrics": metrics}, name)
        if stage == 3:
            save_model(policy.model, end, processor, Path(name.removesuffix(".pt")))
    dist.barrier()


torch.set_num_threads(1)
gc.freeze()  # ZeRO-3 collects garbage while it starts, and the libraries are not
dist.init()
for run in sys.argv[3:]:
    folder, stage = run.split(":")
    take_steps(sys.argv[1], int(sys.argv[2]), folder, int(stage))
dist.shutdown()
end_process(0)
