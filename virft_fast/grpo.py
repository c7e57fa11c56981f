"""GRPO: one step, and the loop around it, readable top to bottom.

What a step does: G completions for each prompt, a reward for each, advantages within the groups,
and `num_iterations` passes of the clipped loss over them. It differs from Visual-RFT's trainer in
what was broken there (images follow their prompts, truncated and unscorable completions are dealt
with, the token count spans all microbatches and ranks before the first backward) and from TRL's in
that a microbatch counts prompts, so that a group is never split.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from virft_fast import dist
from virft_fast.batch import Prompt, Rollouts
from virft_fast.config import GRPOConfig
from virft_fast.engine import DeepSpeedEngine, PlainEngine
from virft_fast.kernels import GRPOLoss, group_advantages
from virft_fast.metrics import null_for_nan, reduce_metrics
from virft_fast.models.qwen_vl import ModelInputs, Policy
from virft_fast.rollout import Rollout, Sampling
from virft_fast.tasks import score

# Loss types that are a mean over sequences; the others are a mean over tokens.
SEQUENCE_MEANS = ("grpo", "gspo", "dr_grpo")


class TooManyBadSteps(RuntimeError):
    """Step after step had no finite gradient."""


@dataclass
class TrainState:
    """Everything a step works on.

    Attributes:
        reference: callable like the policy module, or None without a KL term; with LoRA the
            policy itself, called with its adapter off.
        prompts_per_microbatch, gradient_accumulation_steps: their product is the number of prompts
            a step takes on this rank.
        learning_rate: step -> rate.
        step: steps done.
        bad_steps: non-finite steps in a row, up to now.
        num_tokens: completion tokens trained on, all ranks.
    """

    config: GRPOConfig
    policy: Policy
    engine: PlainEngine | DeepSpeedEngine
    reference: Callable[..., Any] | None
    rollout: Rollout
    pad_token_id: int
    reward_funcs: list[tuple[str, Callable[..., Any]]]
    reward_weights: list[float]
    learning_rate: Callable[[int], float]
    prompts_per_microbatch: int = 1
    gradient_accumulation_steps: int = 1
    seed: int = 42
    max_bad_steps: int = 10
    step: int = 0
    bad_steps: int = 0
    skipped_steps: int = 0
    num_tokens: int = 0

    @property
    def prompts_per_step(self) -> int:
        return self.prompts_per_microbatch * self.gradient_accumulation_steps


@dataclass
class Microbatch:
    """Whole groups that go through the model in one call; (n,) or (n, T) rows each."""

    inputs: ModelInputs
    advantages: Tensor
    loss_mask: Tensor
    ref_logps: Tensor | None = None
    old_logps: Tensor | None = None
    image_features: Tensor | None = None


@dataclass
class StepStats:
    """Sums and counts of what a step saw on this rank."""

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        old_total, old_count = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (old_total + total, old_count + count)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.add(f"time/{name}_s", time.perf_counter() - start, 0.0)


def train_step(
    state: TrainState, prompts: Sequence[Prompt]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One GRPO step on this rank's B prompts.

    Returns:
        metrics, the same on all ranks, and a record of each of this rank's N completions.
    Raises:
        TooManyBadSteps: `max_bad_steps` steps in a row had to be skipped.
    """
    cfg, stats, start = state.config, StepStats(), time.perf_counter()
    torch.manual_seed(state.seed + state.step)
    with stats.timed("rollout"):
        rollouts = state.rollout.generate(
            prompts,
            cfg.num_generations,
            _sampling(state),
            first_row=dist.rank() * len(prompts) * cfg.num_generations,
        )
    with stats.timed("rewards"):
        rewards_per_func, rewards = score_rollouts(state, rollouts)  # (N, R), (N,)
        advantages = _advantages(rewards, cfg)  # (N,)
    with stats.timed("train"):
        microbatches = _microbatches(state, rollouts, advantages)
        weights = _loss_weights(microbatches, cfg)
        _frozen_passes(state, microbatches)
        learning_rate = state.learning_rate(state.step)
        applied = True
        for _ in range(cfg.num_iterations):
            applied &= _update(state, microbatches, weights, learning_rate, stats)
    _rollout_stats(stats, state, rollouts, rewards_per_func, rewards)
    state.step += 1
    metrics = _finish(state, stats, rollouts, learning_rate, applied, start)
    names = [name for name, _ in state.reward_funcs]
    records = completion_records(rollouts, names, rewards_per_func)
    for record, advantage in zip(records, advantages.tolist(), strict=True):
        record["advantage"] = advantage
    return metrics, records


def score_rollouts(state: TrainState, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Rewards (N, R), NaN where a function abstains, and their weighted sums (N,)."""
    return score(
        state.reward_funcs,
        state.reward_weights,
        *reward_arguments(rollouts),
    )


def reward_arguments(rollouts: Rollouts) -> tuple[list[Any], list[Any], dict[str, list[Any]]]:
    """Prompts, completions and columns as TRL hands them to a reward function, N long each."""
    repeated = [p.sample for p in rollouts.prompts for _ in range(rollouts.num_generations)]
    names = {name for sample in repeated for name in sample.columns}
    columns = {name: [sample.columns.get(name) for sample in repeated] for name in sorted(names)}
    columns["completion_ids"] = [
        ids[mask].tolist()
        for ids, mask in zip(rollouts.completion_ids, rollouts.completion_mask, strict=True)
    ]
    completions = [[{"role": "assistant", "content": text}] for text in rollouts.texts]
    return [list(sample.messages) for sample in repeated], completions, columns


def _sampling(state: TrainState) -> Sampling:
    cfg = state.config
    return Sampling(
        max_completion_length=cfg.max_completion_length,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        top_k=cfg.top_k,
        seed=state.seed * 1_000_003 + state.step,
    )


def _advantages(rewards: Tensor, cfg: GRPOConfig) -> Tensor:
    """(N,) advantages; "batch" scales by the spread over all ranks' rewards."""
    gathered = torch.tensor([r for part in dist.all_gather_object(rewards.tolist()) for r in part])
    advantages = group_advantages(gathered, cfg.num_generations, scale_rewards=cfg.scale_rewards)
    first = dist.rank() * len(rewards)
    return advantages[first : first + len(rewards)]


def _microbatches(state: TrainState, rollouts: Rollouts, advantages: Tensor) -> list[Microbatch]:
    groups, size = state.config.num_generations, state.prompts_per_microbatch
    device = rollouts.completion_ids.device
    loss_mask = rollouts.completion_mask
    if state.config.mask_truncated_completions:
        loss_mask = loss_mask & ~rollouts.truncated[:, None]
    microbatches = []
    for first in range(0, len(rollouts.prompts), size):
        rows = slice(first * groups, (first + size) * groups)
        mask = rollouts.completion_mask[rows]
        longest = int(mask.sum(1).max())  # rows are shorter than the batch's padding
        inputs = state.policy.collate(
            rollouts.prompts[first : first + size],
            rollouts.completion_ids[rows, :longest],
            mask[:, :longest],
            num_generations=groups,
            pad_token_id=state.pad_token_id,
            device=device,
        )
        microbatches.append(
            Microbatch(inputs, advantages[rows].to(device), loss_mask[rows, :longest])
        )
    return microbatches


def _loss_weights(microbatches: list[Microbatch], cfg: GRPOConfig) -> list[dict[str, Any]]:
    """What makes each microbatch's loss its share of one big batch, counted before any backward.

    Engines average gradients over ranks, hence the factor `world_size`.
    """
    counts = torch.tensor(
        [
            sum(len(mb.advantages) for mb in microbatches),
            int(sum(mb.loss_mask.sum() for mb in microbatches)),
        ],
        dtype=torch.float64,
        device=microbatches[0].loss_mask.device,
    )
    num_sequences, num_tokens = dist.all_reduce_sum(counts).tolist()
    world = dist.world_size()
    if cfg.loss_type in SEQUENCE_MEANS:
        scales = [len(mb.advantages) * world / num_sequences for mb in microbatches]
        return [{"scale": scale, "num_items": None} for scale in scales]
    return [{"scale": 1.0, "num_items": max(num_tokens, 1.0) / world} for _ in microbatches]


@torch.no_grad()
def _frozen_passes(state: TrainState, microbatches: list[Microbatch]) -> None:
    """Log-probs that stay fixed during the step: the reference's and, if the policy is going to
    move under the same rollouts, its own. A frozen vision tower runs here, once an image."""
    cfg = state.config
    passes = 1 + int(cfg.beta > 0) + int(cfg.num_iterations > 1)
    temperature = cfg.temperature
    for mb in microbatches:
        if state.policy.vision_frozen and passes + cfg.num_iterations > 2:
            mb.image_features = state.engine.forward(mb.inputs, only_images=True)
        shared = {"temperature": temperature, "image_features": mb.image_features}
        if cfg.beta > 0:
            with _as_reference(state):
                mb.ref_logps, _ = state.reference(mb.inputs, **shared)
        if cfg.num_iterations > 1:
            mb.old_logps, _ = state.engine.forward(mb.inputs, **shared)


def _as_reference(state: TrainState) -> Any:
    model = state.policy.model
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()


def _update(
    state: TrainState,
    microbatches: list[Microbatch],
    weights: list[dict[str, Any]],
    learning_rate: float,
    stats: StepStats,
) -> bool:
    """One optimizer update; False if it was skipped on all ranks."""
    cfg, finite = state.config, True
    for mb, weight in zip(microbatches, weights, strict=True):
        inputs = mb.inputs
        fields = state.engine.forward(
            inputs,
            temperature=cfg.temperature,
            image_features=mb.image_features,
            loss={
                "loss_mask": mb.loss_mask,
                "advantages": mb.advantages,
                "old_logps": mb.old_logps,
                "ref_logps": mb.ref_logps,
                "beta": cfg.beta,
                "epsilon_low": cfg.epsilon_low,
                "epsilon_high": cfg.epsilon_high,
                "delta": cfg.delta,
                "loss_type": cfg.loss_type,
                "importance_sampling_level": cfg.importance_sampling_level,
                "max_completion_length": cfg.max_completion_length,
                "num_items": weight["num_items"],
            },
        )
        out = GRPOLoss(*fields)
        loss = out.loss * weight["scale"]
        finite &= bool(torch.isfinite(loss.detach()))
        state.engine.backward(loss)
        _loss_stats(stats, out, mb, float(loss.detach()) / cfg.num_iterations)
    veto = dist.any_rank(not finite, state.engine.device)
    result = state.engine.step(learning_rate, veto=veto)
    stats.add("grad_norm", result.grad_norm)
    return result.applied


def _loss_stats(stats: StepStats, out: Any, mb: Microbatch, loss: float) -> None:
    tokens = float(mb.loss_mask.sum())
    stats.add("loss", loss, 0.0)
    stats.add("entropy", float(out.entropy.sum()), tokens)
    if mb.ref_logps is not None:
        stats.add("kl", float(out.kl.sum()), tokens)
    stats.add("clip_fraction_low", float(out.clip_fraction_low) * tokens, tokens)
    stats.add("clip_fraction_high", float(out.clip_fraction_high) * tokens, tokens)


def _rollout_stats(
    stats: StepStats,
    state: TrainState,
    rollouts: Rollouts,
    rewards_per_func: Tensor,
    rewards: Tensor,
) -> None:
    groups = rewards.view(-1, state.config.num_generations)  # (B, G)
    scored = rewards[~rewards.isnan()]
    stats.add("reward", float(scored.sum()), len(scored))
    for (name, _), column in zip(state.reward_funcs, rewards_per_func.T, strict=True):
        valid = column[~column.isnan()]
        stats.add(f"rewards/{name}", float(valid.sum()), len(valid))
    spread = [float(g[~g.isnan()].std()) if (~g.isnan()).sum() > 1 else 0.0 for g in groups]
    stats.add("reward_std", sum(spread), len(spread))
    stats.add("frac_reward_zero_std", sum(s < 1e-8 for s in spread), len(spread))
    stats.add("unscored_fraction", float(rewards.isnan().sum()), len(rewards))
    lengths = rollouts.completion_mask.sum(1)
    stats.add("completion_length", float(lengths.sum()), len(lengths))
    stats.add("truncated_fraction", float(rollouts.truncated.sum()), len(lengths))
    size = state.config.num_generations
    texts = [rollouts.texts[i : i + size] for i in range(0, len(rollouts.texts), size)]
    stats.add("distinct_fraction", sum(len(set(t)) / size for t in texts), len(texts))


def _finish(
    state: TrainState,
    stats: StepStats,
    rollouts: Rollouts,
    learning_rate: float,
    applied: bool,
    start: float,
) -> dict[str, float]:
    """Reduce over ranks, keep the books, and stop a run that can't go on."""
    world = dist.world_size()
    sums = {  # count 0 marks a sum over this rank's microbatches: the mean over ranks is meant
        name: (total, count or 1.0) for name, (total, count) in stats.sums.items()
    }
    sums["num_tokens"] = (float(rollouts.completion_mask.sum()) * world, 1.0)
    device = state.engine.device
    # NCCL reduces tensors of its own device only.
    metrics = reduce_metrics(sums, lambda t: dist.all_reduce_sum(t.to(device)).to(t.device))
    state.num_tokens += round(metrics.pop("num_tokens"))
    state.bad_steps = 0 if applied else state.bad_steps + 1
    state.skipped_steps += 0 if applied else 1
    step_time_s = time.perf_counter() - start
    step_tokens = metrics["completion_length"] * len(rollouts.texts) * world
    metrics |= {
        "learning_rate": learning_rate,
        "num_tokens": float(state.num_tokens),
        "skipped_steps": float(state.skipped_steps),
        "step_time_s": step_time_s,
        "tokens_per_s": step_tokens / step_time_s,
    }
    if state.bad_steps >= state.max_bad_steps:
        raise TooManyBadSteps(
            f"{state.bad_steps} steps in a row had a non-finite loss or gradient (last: loss "
            f"{metrics['loss']}, grad_norm {metrics['grad_norm']}); nothing was applied in them. "
            f"Try a lower --learning_rate, or float32 instead of --bf16; --max_bad_steps sets the "
            f"limit"
        )
    return metrics


def completion_records(
    rollouts: Rollouts, names: Sequence[str], rewards: Tensor
) -> list[dict[str, Any]]:
    """What is written down of each of the N completions; `rewards` (N, len(names)), NaN as None."""
    records = []
    for row, (text, values) in enumerate(zip(rollouts.texts, rewards.tolist(), strict=True)):
        prompt = rollouts.prompts[row // rollouts.num_generations]
        records.append(
            {
                "index": prompt.sample.index,
                "prompt": prompt.text,
                "completion": text,
                "solution": prompt.sample.solution,
                "rewards": null_for_nan(dict(zip(names, values, strict=True))),
            }
        )
    return records
