"""Child of test_distributed.py: a few steps on this rank, then rank 0 saves the parameters.

    torchrun --nproc_per_node W -m two_ranks OUT BATCH STAGE:KIND [STAGE:KIND ...]

STAGE is a ZeRO stage, or -1 for the plain engine; BATCH is this rank's number of prompts; KIND is
`images`, `mixed` (rank 1 has text only), `nan` (rank 1 alone gets a loss that is not finite),
`lora` (an adapter is trained, with gradient checkpointing and the adapter off as the reference),
`4bit` (as `lora`, on a base in 4 bits and with the layers' inputs in CPU memory),
`dropped` (no KL term, microbatches by tokens, and groups of equal rewards: rank 1's in the first
step, most of rank 1's in the second, rank 0's in the third), `frozen` (as `dropped`, with the
vision tower frozen), `sft` (fine-tuning with the tower frozen, rank 1 with text only and fewer
microbatches), `rounds` (dynamic sampling, rollouts of two steps, and most groups of equal rewards
are rank 0's) or one of `OPTIONS`.
One run after another, each with a model of its own.
"""

from __future__ import annotations

import json
import sys

import torch
from helpers import CPU, letter_count, make_prompts, make_sample

from virft_fast import dist
from virft_fast.algorithms import sft
from virft_fast.algorithms import step as step_module
from virft_fast.algorithms.grpo import train_step
from virft_fast.algorithms.step import TrainState
from virft_fast.commands import end_process
from virft_fast.config import GRPOConfig
from virft_fast.engine import (
    DeepSpeedEngine,
    OptimizerSettings,
    PlainEngine,
    make_reference,
    prepare_deepspeed,
    resolve_deepspeed_config,
)
from virft_fast.models.processing import load_processor
from virft_fast.models.qwen_vl import (
    Policy,
    add_lora,
    base,
    checkpoint_layers,
    freeze_vision_tower,
    load_model,
)
from virft_fast.models.tiny import resolve_model_path
from virft_fast.rollout.backends import make_rollout
from virft_fast.rollout.records import join_groups
from virft_fast.rollout.weights import RolloutWeights

STEPS = 3


# The step's prompts whose completions all get the same reward.
EQUAL = [{4, 5, 6, 7}, {0, 4, 6, 7}, {0, 1, 2, 3}]
DROPPING = ("dropped", "frozen")
ADAPTED = ("lora", "4bit")
# Runs with two rewards and without a KL term. Some weights of the correction exceed its limit. The
# groups of `rloo` have equal rewards as those of `dropped`.
LIMITED = {"top_k": 3, "temperature": 1.5, "importance_sampling_correction": True,
           "importance_sampling_clip_min": 0.7}  # fmt: skip
OPTIONS = {
    "rloo": {"advantage_estimator": "rloo", "reward_clip": [1.2, 8.0],
             "importance_sampling_mode": "token_truncate", **LIMITED},
    "reinforce_pp": {"advantage_estimator": "reinforce_pp", "num_iterations": 2,
                     "importance_sampling_mode": "sequence_truncate", **LIMITED},
    "gdpo": {"multi_objective_aggregation": "normalize_then_sum", "reward_clip": [1.2, 24.0],
             "importance_sampling_mode": "token_mask", **LIMITED},
    "bf16": {"temperature": 1.5, "importance_sampling_clip_max": 1.0},  # `sequence_mask`
}  # fmt: skip
# Of a rollout's 16 prompts and the 16 of its second round; with two ranks, 0 to 7 and 16 to 23 are
# rank 0's. The first round has 11 groups that teach, 3 of them rank 0's. The next 5 are 22 to 26.
EQUAL_ROUNDS = {0, 1, 2, 3, 4, *range(16, 22)}


def make_engine(stage, policy, settings, config, kind):
    if stage < 0:
        engine = PlainEngine(policy, settings, device=CPU, bf16=kind == "bf16")
        if kind == "bf16":  # as on a GPU
            engine._copy = RolloutWeights(policy, device=CPU, dtype=torch.bfloat16)
        return engine
    return DeepSpeedEngine(policy, settings, config=config, device=CPU)


def all_prompts(processor, kind):
    """Eight prompts: the first half is rank 0's with two ranks, the others rank 1's."""
    sizes = [[(112, 112)], [(56, 84)], [(84, 84), (56, 56)], [(112, 56)]]
    second = [[] for _ in sizes] if kind in ("mixed", "sft") else sizes
    return make_prompts(
        processor, *(make_sample(i, s, f"Detect {i}.") for i, s in enumerate([*sizes, *second]))
    )


def make_policy(kind):
    model = load_model("tiny", load_in_4bit=kind == "4bit").train()
    if kind in ADAPTED:
        torch.manual_seed(0)  # of the adapter
        model = add_lora(model, r=4, alpha=8, target_modules=["q_proj", "down_proj"])
        checkpoint_layers(base(model), offload=kind == "4bit")
        model.train()
    if kind in ("frozen", "sft"):
        freeze_vision_tower(model)
    return Policy(model)


def prepare(stage, batch, kind, processor):
    """The state of a run, its metrics still to come."""
    # A large epsilon: see test_grpo.SMOOTH.
    settings = OptimizerSettings(learning_rate=2e-3, epsilon=1e-3, max_grad_norm=0.05)
    config, settings = resolve_deepspeed_config(
        {"zero_optimization": {"stage": max(stage, 0), "stage3_param_persistence_threshold": 0}},
        settings=settings,
        micro_batch_size=batch // 2,
        gradient_accumulation_steps=2,
        bf16=False,
        hidden_size=128,
        world_size=dist.world_size(),
    )
    alive = prepare_deepspeed(config, CPU) if stage >= 0 else None
    policy = make_policy(kind)
    on_policy = kind in (*DROPPING, *OPTIONS)
    reference = None if on_policy or kind in ("sft", *ADAPTED) else Policy(load_model("tiny"))
    del alive
    engine = make_engine(stage, policy, settings, config, kind)
    call_reference = make_reference(reference, engine, config) if reference else engine.forward

    def equalized(values, problem):
        equal = EQUAL_ROUNDS if kind == "rounds" else ()
        equal = EQUAL[state.step] if kind in (*DROPPING, "rloo") else equal
        return [
            1.0 if index_of(text) in equal else value
            for text, value in zip(problem, values, strict=True)
        ]

    def reward(prompts, completions, problem, **columns):
        values = letter_count(prompts, completions)
        if kind == "rounds":  # the two completions of a prompt differ
            values = [value + 0.01 * (n % 2) for n, value in enumerate(values)]
        return equalized(values, problem)

    def length(prompts, completions, problem, **columns):
        return equalized([float(len(c[0]["content"])) for c in completions], problem)

    beta = 0.0 if on_policy else 0.1
    settings_of = {
        "num_generations": 2, "max_completion_length": 6, "beta": beta, "loss_type": "dapo"
    }  # fmt: skip
    if kind == "rounds":
        settings_of |= {"dynamic_sampling": True, "steps_per_generation": 4, "temperature": 1.5}
    settings_of |= OPTIONS.get(kind, {})
    rewards = [("letters", reward), ("length", length)][: 2 if kind in OPTIONS else 1]
    state = TrainState(
        config=GRPOConfig(**settings_of),
        policy=policy,
        engine=engine,
        reference=call_reference,
        rollout=make_rollout("native", engine.whole_weights, processor.tokenizer, device=CPU),
        tokenizer=processor.tokenizer,
        reward_funcs=rewards,
        reward_weights=[1.0, 0.1][: len(rewards)],
        learning_rate=lambda step: settings.learning_rate,
        prompts_per_microbatch=2 if kind == "bf16" else batch // 2,
        gradient_accumulation_steps=2,
        # The longest group is split; of the short ones two fit.
        max_tokens_per_microbatch=60 if kind in ("sft", *DROPPING) else None,
    )
    if kind == "bf16":
        state.rollout.generate = one_by_one(state.rollout.generate)
    return state


def one_by_one(generate):
    """Sample for one prompt after another: in bfloat16, a batch of another size may round in
    another way. For the same reason, microbatches are equally large on any number of ranks."""

    def generate_each(prompts, size, sampling, *, first_row=0):
        rows = range(first_row, first_row + len(prompts) * size, size)
        return join_groups(
            [generate([p], size, sampling, first_row=n) for p, n in zip(prompts, rows, strict=True)]
        )

    return generate_each


def take_rounds(state, batch, processor):
    """The metrics of some steps. Each rollout is of the same 16 prompts, then of 16 others."""
    size, rank = 2 * batch, dist.rank()
    sizes = [[(56, 84)], [(84, 56)], [(56, 56), (84, 84)], []]
    samples = [make_sample(n, sizes[n % 4], f"Detect {n}.") for n in range(32)]
    prompts = make_prompts(processor, *samples)
    first, second = (prompts[n + rank * size : n + (rank + 1) * size] for n in (0, 16))
    state.more_prompts = lambda: second
    metrics, chosen = [], []
    for _ in range(STEPS):
        ours, records = train_step(state, [] if state.pending else first)
        metrics.append(ours)
        chosen.append([r["index"] for r in records[::2] if r["advantage"] is not None])
    return metrics, dist.all_gather_object(chosen)


def index_of(problem):
    return int(problem.removeprefix("Detect ").removesuffix("."))


def spoil(engine):
    """Make the loss NaN on the last rank."""
    forward = engine.forward

    def spoiled(*args, **kwargs):
        fields = forward(*args, **kwargs)
        return (fields[0] * torch.nan, *fields[1:]) if kwargs.get("loss") else fields

    if dist.rank() == dist.world_size() - 1:
        engine.forward = spoiled


def count_plans(engine):
    """Of each step: how many microbatches this rank had itself, and how many it went through."""
    plans, plan, backward = [], step_module.plan_microbatches, engine.backward

    def planned(*args, **kwargs):
        made = plan(*args, **kwargs)
        plans.append([len(made), 0])
        return made

    def counted(*args, **kwargs):
        plans[-1][1] += 1
        return backward(*args, **kwargs)

    step_module.plan_microbatches, engine.backward = planned, counted
    return plans


def take_steps(out, stage, batch, kind, processor):
    state = prepare(stage, batch, kind, processor)
    engine, model = state.engine, state.policy.model
    mine = all_prompts(processor, kind)[dist.rank() * batch : (dist.rank() + 1) * batch]
    start = engine.model_state(model, torch.float32)
    if kind == "nan":
        spoil(engine)
    original = step_module.plan_microbatches
    plans = count_plans(engine)
    step, chosen = sft.train_step if kind == "sft" else train_step, []
    if kind == "rounds":
        metrics, chosen = take_rounds(state, batch, processor)
    else:
        # After an update, weights that differ by 1e-8 may round to other numbers in bfloat16.
        metrics = [step(state, mine)[0] for _ in range(1 if kind == "bf16" else STEPS)]
    step_module.plan_microbatches = original
    plans = dist.all_gather_object(plans)
    end = engine.model_state(model, torch.float32)
    if dist.is_main():
        torch.save({"start": start, "end": end}, f"{out}-{stage}-{kind}.pt")
        with open(f"{out}-{stage}-{kind}.json", "w") as file:
            json.dump({"metrics": metrics, "plans": plans, "chosen": chosen}, file)
    dist.barrier()


torch.set_num_threads(1)
dist.init()
processor = load_processor(resolve_model_path("tiny"))
for run in sys.argv[3:]:
    stage, kind = run.split(":")
    take_steps(sys.argv[1], int(stage), int(sys.argv[2]), kind, processor)
dist.shutdown()
end_process(0)
