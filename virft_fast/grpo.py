"""GRPO: one step, and the loop around it, readable top to bottom.

What a step does: G completions for each prompt, a reward for each, advantages within the groups,
and `num_iterations` passes of the clipped loss over them. It differs from Visual-RFT's trainer in
what was broken there (images follow their prompts, truncated and unscorable completions are dealt
with, the token count spans all microbatches and ranks before the first backward) and from TRL's in
that a microbatch counts prompts or tokens, so that a group stays together and its prompt is read
once, and in that completions nothing can be learnt from are not read at all.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from virft_fast import dist, progress
from virft_fast.batch import Prompt, Rollouts, Sample
from virft_fast.config import GRPOConfig
from virft_fast.engine import DeepSpeedEngine, PlainEngine
from virft_fast.kernels import GRPOLoss, group_advantages
from virft_fast.metrics import null_for_nan, reduce_metrics
from virft_fast.models import adapters
from virft_fast.models.qwen_vl import ModelInputs, Policy
from virft_fast.rollout import Rollout, Sampling
from virft_fast.tasks import RewardLog, score

logger = logging.getLogger(__name__)

# Metric -> the value above which a step teaches little, and what to say after IDLE_STEPS of them.
IDLE_STEPS = 20
IDLE = {
    "frac_reward_zero_std": (
        0.999,
        "the completions of every group had equal rewards in the last %d steps, so that nothing is "
        "learnt. Usual causes: a reward that no answer earns, or every one (see completions.jsonl, "
        "and --dry_run, which scores the solutions); a prompt that asks for another form of answer "
        "than the reward reads; answers that hardly differ (distinct_fraction near 0: raise "
        "--temperature or --num_generations)",
    ),
    "truncated_fraction": (
        0.9,
        "more than 90 %% of the completions were cut off at --max_completion_length in the last %d "
        "steps. Usual causes: a limit too low for the reasoning that the prompt asks for; a model "
        "that never ends its turn (a base model, or another chat template than it was trained "
        "with); a reward that length earns",
    ),
}
# Loss types that are a mean over sequences; the others are a mean over tokens.
SEQUENCE_MEANS = ("grpo", "gspo", "dr_grpo")


def _any_time(what: str, limit: float | None) -> AbstractContextManager[Any]:
    return nullcontext()


class TooManyBadSteps(RuntimeError):
    """Step after step had no finite gradient, or a reward no finite value."""


@dataclass
class TrainState:
    """Everything a step works on.

    Attributes:
        reference: callable like the policy module, or None without a KL term; with LoRA the
            policy itself, called within `as_reference`.
        prompts_per_microbatch, gradient_accumulation_steps: their product is the number of prompts
            a step takes on this rank.
        max_tokens_per_microbatch: fill microbatches by the tokens the model reads instead.
        learning_rate: step -> rate.
        step: steps done.
        bad_steps: non-finite steps in a row, up to now.
        silent_steps: steps in a row without a finite value, by name of the reward function.
        idle_steps: steps in a row with little to learn from, by the metric of `IDLE` that says so.
        num_tokens: completion tokens drawn so far on all ranks, those nothing was learnt from too.
        base_weights: stamp of the weights the run began with.
        adapter: how its adapter began, a `LoraPlan.kind`; None without one.
        save_dtype: of saved weights; None keeps the dtype they are trained in.
        max_steps, num_rows: of the whole run and of its data set, for reward functions to know.
        section: (what, seconds or None) -> context of a part of the step that may be given up.
        reward_timeout: seconds that one call of a reward function may take; None: any time.
    """

    config: GRPOConfig
    policy: Policy
    engine: PlainEngine | DeepSpeedEngine
    reference: Callable[..., Any] | None
    rollout: Rollout
    tokenizer: Any
    reward_funcs: list[tuple[str, Callable[..., Any]]]
    reward_weights: list[float]
    learning_rate: Callable[[int], float]
    prompts_per_microbatch: int = 1
    gradient_accumulation_steps: int = 1
    max_tokens_per_microbatch: int | None = None
    seed: int = 42
    max_bad_steps: int = 10
    step: int = 0
    bad_steps: int = 0
    skipped_steps: int = 0
    num_tokens: int = 0
    silent_steps: dict[str, int] = field(default_factory=dict)
    idle_steps: dict[str, int] = field(default_factory=dict)
    base_weights: list[Any] | None = None
    adapter: str | None = None
    save_dtype: torch.dtype | None = None
    max_steps: int = 0
    num_rows: int = 0
    section: Callable[[str, float | None], AbstractContextManager[Any]] = _any_time
    reward_timeout: float | None = None

    @property
    def prompts_per_step(self) -> int:
        return self.prompts_per_microbatch * self.gradient_accumulation_steps


@dataclass
class Microbatch:
    """Completions that go through the model in one call; S tokens in all, packed as in `inputs`.

    Attributes:
        advantages: (n,). loss_mask: (S,) bool.
        sampling_logps, ref_logps, old_logps: (S,), or None.
        image_features: of a frozen tower.
    """

    inputs: ModelInputs
    advantages: Tensor
    loss_mask: Tensor
    sampling_logps: Tensor
    ref_logps: Tensor | None = None
    old_logps: Tensor | None = None
    image_features: Tensor | None = None


@dataclass
class StepStats:
    """What a step saw on this rank.

    Attributes:
        sums: (sum, count) of what is averaged over everything that was counted, on all ranks.
        totals: a sum over this rank's part of the step; its mean over ranks is meant.
        largest: of which the largest of all ranks is meant.
    """

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        old_total, old_count = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (old_total + total, old_count + count)

    def add_total(self, name: str, value: float) -> None:
        self.totals[name] = self.totals.get(name, 0.0) + value

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.add_total(f"time/{name}_s", time.perf_counter() - start)


def train_step(
    state: TrainState, prompts: Sequence[Prompt]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One GRPO step on this rank's B prompts.

    Returns:
        metrics, the same on all ranks, and a record of each of this rank's N completions.
    Raises:
        TooManyBadSteps: `max_bad_steps` steps in a row had to be skipped, or had no finite value
            of one of the reward functions.
    """
    cfg, stats, start = state.config, StepStats(), time.perf_counter()
    torch.manual_seed(state.seed + state.step)
    log = RewardLog()
    with stats.timed("rollout"), state.engine.whole_weights():
        pass  # gathered by all ranks, before anything here can fail on one of them
    with dist.agreed():
        with stats.timed("rollout"), state.section("rollout", None):
            rollouts = state.rollout.generate(
                prompts,
                cfg.num_generations,
                _sampling(state),
                first_row=dist.rank() * len(prompts) * cfg.num_generations,
            )
        with stats.timed("rewards"):
            rewards_per_func, rewards = score_rollouts(state, rollouts, log)  # (N, R), (N,)
    advantages = _advantages(rewards, cfg)  # (N,)
    with stats.timed("train"):
        microbatches = make_microbatches(state, rollouts, advantages, stats)
        weights = loss_weights(microbatches, rollouts, cfg)
        _frozen_passes(state, microbatches)
        learning_rate = state.learning_rate(state.step)
        applied = True
        for iteration in range(cfg.num_iterations):
            # Later the weights are no longer those that drew.
            note = _mismatch_stats if iteration == 0 else None
            applied &= update(state, microbatches, weights, learning_rate, stats, note)
    _rollout_stats(stats, state, rollouts, rewards_per_func, rewards)
    _reported_stats(stats, state, log)
    state.step += 1
    metrics = finish(state, stats, rollouts, learning_rate, applied, start)
    names = [name for name, _ in state.reward_funcs]
    _count_silent(state, metrics, names)
    _count_idle(state, metrics)
    records = completion_records(rollouts, names, rewards_per_func)
    for record, advantage in zip(records, advantages.tolist(), strict=True):
        record["advantage"] = advantage
    for column, values in log.extra.items():
        for record, value in zip(records, values, strict=False):
            record.setdefault(column, _plain(value))
    return metrics, records


def _plain(value: Any) -> Any:
    """What a reward function reports, as JSON can hold it."""
    try:
        json.dumps(value)
        return value
    except (TypeError, ValueError, RecursionError):
        return repr(value)[:1000]


def _count_silent(state: TrainState, metrics: dict[str, float], names: Sequence[str]) -> None:
    """Stop where a reward function has scored nothing for too long, on any rank."""
    for name in names:
        scored_some = math.isfinite(metrics.get(f"rewards/{name}", math.nan))
        state.silent_steps[name] = 0 if scored_some else state.silent_steps.get(name, 0) + 1
        if state.silent_steps[name] >= state.max_bad_steps:
            raise TooManyBadSteps(
                f"reward function {name} gave no finite value for any completion in "
                f"{state.silent_steps[name]} steps in a row, up to step {state.step}: expected "
                f"numbers of float32, with None for some completions at most; mend it, or leave it "
                f"out of --reward_funcs; --max_bad_steps sets the limit"
            )


def _count_idle(state: TrainState, metrics: dict[str, float]) -> None:
    """Warn where steps have taught little for long, once until one does teach."""
    for name, (limit, text) in IDLE.items():
        state.idle_steps[name] = state.idle_steps.get(name, 0) + 1 if metrics[name] > limit else 0
        if state.idle_steps[name] == IDLE_STEPS:
            logger.warning(text, IDLE_STEPS)


def score_rollouts(state: TrainState, rollouts: Rollouts, log: RewardLog) -> tuple[Tensor, Tensor]:
    """Rewards (N, R), NaN where a function abstains, and their weighted sums (N,)."""
    shared = log.arguments(_trainer_state(state)) if _has_own_rewards(state) else {}
    arguments = reward_arguments(rollouts)
    return score(
        state.reward_funcs,
        state.reward_weights,
        *arguments,
        shared=shared,
        section=lambda what: state.section(what, state.reward_timeout),
    )


def _has_own_rewards(state: TrainState) -> bool:
    """Whether a reward function is the user's; ours neither look at the run nor report of it."""
    modules = (getattr(function, "__module__", "") for _, function in state.reward_funcs)
    return not all(module.startswith("virft_fast.") for module in modules)


def _trainer_state(state: TrainState) -> Any:
    from transformers import TrainerState

    done = state.step * state.prompts_per_step * dist.world_size()
    return TrainerState(
        global_step=state.step, max_steps=state.max_steps, epoch=done / max(state.num_rows, 1)
    )


def _reported_stats(stats: StepStats, state: TrainState, log: RewardLog) -> None:
    """Metrics that reward functions reported, on any rank; never under the name of one of ours."""
    if not _has_own_rewards(state):
        return
    parts = dist.all_gather_object(list(log.metrics))
    for name in sorted({name for part in parts for name in part}):
        values = log.metrics.get(name, [])
        if name not in stats.sums:
            stats.add(name, sum(values), len(values))


def reward_arguments(rollouts: Rollouts) -> tuple[list[Any], list[Any], dict[str, list[Any]]]:
    """Prompts, completions and columns as TRL hands them to a reward function, N long each."""
    repeated = [p.sample for p in rollouts.prompts for _ in range(rollouts.num_generations)]
    names = {name for sample in repeated for name in sample.columns}
    columns = {name: [sample.columns.get(name) for sample in repeated] for name in sorted(names)}
    grids = [p.image_grid_thw for p in rollouts.prompts for _ in range(rollouts.num_generations)]
    columns["image_grid_thw"] = [None if grid is None else grid.tolist() for grid in grids]
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
        min_p=cfg.min_p,
        repetition_penalty=cfg.repetition_penalty,
        seed=state.seed * 1_000_003 + state.step,
    )


def _advantages(rewards: Tensor, cfg: GRPOConfig) -> Tensor:
    """(N,) advantages; "batch" scales by the spread over all ranks' rewards."""
    gathered = torch.tensor([r for part in dist.all_gather_object(rewards.tolist()) for r in part])
    advantages = group_advantages(gathered, cfg.num_generations, scale_rewards=cfg.scale_rewards)
    first = dist.rank() * len(rewards)
    return advantages[first : first + len(rewards)]


@dataclass(frozen=True)
class Part:
    """Completions of one prompt that are read together: the prompt's number on this rank and the
    rows of the rollouts."""

    prompt: int
    rows: tuple[int, ...]


def make_microbatches(
    state: TrainState, rollouts: Rollouts, advantages: Tensor, stats: StepStats
) -> list[Microbatch]:
    """The step's completions in microbatches, equally many on all ranks, at least one."""
    mask = _loss_mask(state, rollouts, advantages)
    lengths = rollouts.completion_mask.sum(1).tolist()
    trains = mask.any(1).tolist()
    stats.add("dropped_fraction", trains.count(False), len(trains))
    size = rollouts.num_generations
    parts = [
        Part(prompt, tuple(row for row in range(prompt * size, (prompt + 1) * size) if trains[row]))
        for prompt in range(len(rollouts.prompts))
    ]
    plan = plan_microbatches(
        [part for part in parts if part.rows],
        prompt_lengths=[len(prompt.input_ids) for prompt in rollouts.prompts],
        lengths=lengths,
        prompts_per_microbatch=state.prompts_per_microbatch,
        max_tokens=state.max_tokens_per_microbatch,
        shared=state.policy.shares_prefix,
    )
    most = max(1, *dist.all_gather_object(len(plan)))
    made = [microbatch(state, rollouts, parts, advantages, mask) for parts in plan]
    known = rollouts.image_features is not None
    return made + [empty_microbatch(state, tower=not known)] * (most - len(plan))


def _loss_mask(state: TrainState, rollouts: Rollouts, advantages: Tensor) -> Tensor:
    """(N, T) bool. Without a KL term a token whose advantage is 0 adds nothing to loss or
    gradient: groups of equal rewards drop out here, before the model reads them."""
    mask = rollouts.completion_mask
    if state.config.mask_truncated_completions:
        mask = mask & ~rollouts.truncated[:, None]
    if state.config.beta == 0:
        mask = mask & (advantages != 0).to(mask.device)[:, None]
    return mask


def plan_microbatches(
    parts: Sequence[Part],
    *,
    prompt_lengths: Sequence[int],
    lengths: Sequence[int],
    prompts_per_microbatch: int,
    max_tokens: int | None,
    shared: bool,
    split: bool = True,
) -> list[list[Part]]:
    """Whole groups in their order, by number or, with `max_tokens`, as many as fit.

    Args:
        prompt_lengths: tokens of each prompt. lengths: tokens of each row's completion.
        shared: whether the prompt is read once, or by every completion.
        split: whether a group may be.
    Returns:
        The parts of each microbatch. A group is split only where it is too long by itself, and one
        completion that is too long stands alone.
    """
    if max_tokens is None:
        size = prompts_per_microbatch
        return [list(parts[i : i + size]) for i in range(0, len(parts), size)]

    def tokens(chosen: Sequence[Part]) -> int:
        rows = [(prompt_lengths[part.prompt], lengths[row]) for part in chosen for row in part.rows]
        if shared:
            return sum(prompt_lengths[part.prompt] for part in chosen) + sum(c for _, c in rows)
        longest = max((p for p, _ in rows), default=0) + max((c for _, c in rows), default=0)
        return len(rows) * longest  # with its padding

    plan: list[list[Part]] = []
    for part in parts:
        if split and tokens([part]) > max_tokens:
            pieces, rows = [], ()
            for row in part.rows:
                if rows and tokens([Part(part.prompt, (*rows, row))]) > max_tokens:
                    pieces.append([Part(part.prompt, rows)])
                    rows = ()
                rows = (*rows, row)
            plan += [*pieces, [Part(part.prompt, rows)]]
        elif plan and tokens([*plan[-1], part]) <= max_tokens:
            plan[-1].append(part)
        else:
            plan.append([part])
    return plan


def microbatch(
    state: TrainState,
    rollouts: Rollouts,
    parts: Sequence[Part],
    advantages: Tensor,
    loss_mask: Tensor,
) -> Microbatch:
    """The parts' completions, their (N,) advantages and (N, T) loss mask on the device."""
    device = state.engine.device
    ids, lengths = rollouts.completion_ids.cpu(), rollouts.completion_mask.sum(1).tolist()
    rows = torch.tensor([row for part in parts for row in part.rows])
    real = rollouts.completion_mask[rows]
    inputs = state.policy.collate(
        [rollouts.prompts[part.prompt] for part in parts],
        [[ids[row, : lengths[row]] for row in part.rows] for part in parts],
        pad_token_id=state.tokenizer.pad_token_id,
        device=device,
    )
    features = None
    if rollouts.image_features is not None:
        features = torch.cat([rollouts.image_features[part.prompt] for part in parts])
    return Microbatch(
        inputs,
        advantages[rows].to(device),
        loss_mask[rows][real].to(device),
        rollouts.sampling_logps[rows][real].to(device),
        image_features=features,
    )


def empty_microbatch(state: TrainState, *, tower: bool) -> Microbatch:
    """A token that counts for nothing: under ZeRO-3 every rank has to make the same calls, the
    vision tower's among them where the others' features are not known (`tower`)."""
    device = state.engine.device
    pad = torch.tensor([state.tokenizer.pad_token_id])
    nothing = Sample(-1, (), (), "")
    inputs = state.policy.collate(
        [Prompt(nothing, "", pad, torch.zeros_like(pad))],
        [[pad]],
        pad_token_id=state.tokenizer.pad_token_id,
        device=device,
    )
    zero = torch.zeros(1, device=device)
    features = None if tower else torch.zeros(0, 1, device=device)
    return Microbatch(inputs, zero, zero.bool(), zero, image_features=features)


def loss_weights(
    microbatches: list[Microbatch], rollouts: Rollouts, cfg: GRPOConfig
) -> list[dict[str, Any]]:
    """What makes each microbatch's loss its share of one big batch, counted before any backward.

    Completions that were dropped count like any other. Engines average gradients over ranks, hence
    the factor `world_size`.
    """
    counted = rollouts.completion_mask
    if cfg.mask_truncated_completions:
        counted = counted & ~rollouts.truncated[:, None]
    counts = torch.tensor(
        [len(counted), int(counted.sum())],
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
    move under the same rollouts, its own."""
    cfg = state.config
    for mb in microbatches:
        shared = {"temperature": cfg.temperature, "image_features": mb.image_features}
        if cfg.beta > 0:
            with as_reference(state):
                mb.ref_logps, _ = state.reference(mb.inputs, **shared)
        if cfg.num_iterations > 1:
            mb.old_logps, _ = state.engine.forward(mb.inputs, **shared)


def as_reference(state: TrainState) -> Any:
    """Context in which a policy with an adapter computes as it did when the run began."""
    return adapters.as_reference(state.policy.model)


def update(
    state: TrainState,
    microbatches: list[Microbatch],
    weights: list[dict[str, Any]],
    learning_rate: float,
    stats: StepStats,
    note: Callable[[StepStats, GRPOLoss, Microbatch], None] | None = None,
) -> bool:
    """One optimizer update; False if it was skipped on all ranks.

    Args:
        note: told of each microbatch's outcome.
    """
    cfg, finite = state.config, True
    for number, (mb, weight) in enumerate(zip(microbatches, weights, strict=True), 1):
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
        state.engine.backward(loss, last=number == len(microbatches))
        progress.mark("training")
        _loss_stats(stats, out, mb, float(loss.detach()) / cfg.num_iterations)
        if note is not None:
            note(stats, out, mb)
    veto = dist.any_rank(not finite, state.engine.device)
    result = state.engine.step(learning_rate, veto=veto)
    stats.add("grad_norm", result.grad_norm)
    return result.applied


def _loss_stats(stats: StepStats, out: Any, mb: Microbatch, loss: float) -> None:
    tokens = float(mb.loss_mask.sum())
    stats.add_total("loss", loss)
    stats.add("entropy", float(out.entropy.sum()), tokens)
    if mb.ref_logps is not None:
        stats.add("kl", float(out.kl.sum()), tokens)
    stats.add("clip_fraction_low", float(out.clip_fraction_low) * tokens, tokens)
    stats.add("clip_fraction_high", float(out.clip_fraction_high) * tokens, tokens)


def _mismatch_stats(stats: StepStats, out: GRPOLoss, mb: Microbatch) -> None:
    """How far training and rollout disagree about the same tokens under the same weights."""
    difference = (out.logps - mb.sampling_logps)[mb.loss_mask]
    stats.add("sampling_logp_difference", float(difference.abs().sum()), difference.numel())
    ratio = float(difference.max().exp()) if difference.numel() else 0.0
    stats.largest["sampling_ratio_max"] = max(ratio, stats.largest.get("sampling_ratio_max", 0.0))


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


def finish(
    state: TrainState,
    stats: StepStats,
    rollouts: Rollouts,
    learning_rate: float,
    applied: bool,
    start: float,
) -> dict[str, float]:
    """Reduce over ranks, keep the books, and stop a run that can't go on."""
    world = dist.world_size()
    sums = stats.sums | {name: (total, 1.0) for name, total in stats.totals.items()}
    sums["num_tokens"] = (float(rollouts.completion_mask.sum()) * world, 1.0)
    device = state.engine.device
    # NCCL reduces tensors of its own device only.
    metrics = reduce_metrics(sums, lambda t: dist.all_reduce_sum(t.to(device)).to(t.device))
    state.num_tokens += round(metrics.pop("num_tokens"))
    state.bad_steps = 0 if applied else state.bad_steps + 1
    state.skipped_steps += 0 if applied else 1
    step_time_s = time.perf_counter() - start
    step_tokens = metrics["completion_length"] * len(rollouts.texts) * world
    for name, value in stats.largest.items():
        metrics[name] = max(dist.all_gather_object(value))
    for part in ("rollout", "train"):
        if f"time/{part}_s" not in metrics:  # fine-tuning samples nothing
            continue
        seconds = max(metrics[f"time/{part}_s"], 1e-9)
        metrics[f"{part}_tokens_per_s"] = step_tokens / seconds
        metrics[f"time/{part}_share"] = seconds / step_time_s
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
        record = {
            "index": prompt.sample.index,
            "prompt": prompt.text,
            "completion": text,
            "solution": prompt.sample.solution,
            "rewards": null_for_nan(dict(zip(names, values, strict=True))),
        }
        extent = prompt.sample.columns.get("extent")
        records.append(record if extent is None else record | {"extent": list(extent)})
    return records
