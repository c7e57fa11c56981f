"""What every algorithm's step is made of.

A step's completions, drawn or given, are laid out in microbatches, equally many on all ranks. What
the loss is divided by is counted over all of them before the first backward pass, so that
accumulation and data parallelism equal one big batch. A loss or gradient that is not finite on any
rank skips the update on all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from virft_fast import dist, progress
from virft_fast.batch import Prompt, Rollouts, Sample
from virft_fast.config import GRPOConfig
from virft_fast.engine import DeepSpeedEngine, PlainEngine
from virft_fast.kernels import GRPOLoss, LossArgs
from virft_fast.metrics import reduce_metrics
from virft_fast.models import adapters
from virft_fast.models.qwen_vl import ModelInputs, Policy
from virft_fast.rollout import Rollout


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


# Loss types that are a mean over sequences; the others are a mean over tokens.
SEQUENCE_MEANS = ("grpo", "gspo", "dr_grpo")


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


@dataclass(frozen=True)
class Part:
    """Completions of one prompt that are read together: the prompt's number on this rank and the
    rows of the rollouts."""

    prompt: int
    rows: tuple[int, ...]


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


def lay_out(
    state: TrainState, rollouts: Rollouts, advantages: Tensor, mask: Tensor
) -> list[Microbatch]:
    """The completions with a token of the (N, T) `mask`, in microbatches, equally many on all
    ranks, at least one."""
    size, trains = rollouts.num_generations, mask.any(1).tolist()
    parts = [
        Part(prompt, tuple(row for row in range(prompt * size, (prompt + 1) * size) if trains[row]))
        for prompt in range(len(rollouts.prompts))
    ]
    plan = plan_microbatches(
        [part for part in parts if part.rows],
        prompt_lengths=[len(prompt.input_ids) for prompt in rollouts.prompts],
        lengths=rollouts.completion_mask.sum(1).tolist(),
        prompts_per_microbatch=state.prompts_per_microbatch,
        max_tokens=state.max_tokens_per_microbatch,
        shared=state.policy.shares_prefix,
    )
    made = [microbatch(state, rollouts, parts, advantages, mask) for parts in plan]
    tower = rollouts.image_features is None
    return equally_many(made, lambda: empty_microbatch(state, tower=tower))


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


def as_reference(state: TrainState) -> Any:
    """Context in which a policy with an adapter computes as it did when the run began."""
    return adapters.as_reference(state.policy.model)


def equally_many(made: list[Any], make_empty: Callable[[], Any]) -> list[Any]:
    """The microbatches, with empty ones after them up to the number on the rank with the most, at
    least one."""
    missing = max(1, *dist.all_gather_object(len(made))) - len(made)
    return made + [make_empty()] * missing if missing else made


def loss_shares(
    microbatches: list[Microbatch], counted: Tensor, loss: LossArgs
) -> list[tuple[LossArgs, float]]:
    """What makes each microbatch's loss its share of one big batch, counted over all microbatches
    and ranks: its arguments, and a factor.

    Completions that were left out count like any other. Engines average gradients over ranks, hence
    the factor `world_size`.

    Args:
        counted: (N, T) bool, this rank's tokens that the loss is a mean over.
    """
    counts = torch.tensor(
        [len(counted), int(counted.sum())],
        dtype=torch.float64,
        device=microbatches[0].loss_mask.device,
    )
    num_sequences, num_tokens = dist.all_reduce_sum(counts).tolist()
    world = dist.world_size()
    if loss.loss_type in SEQUENCE_MEANS:
        return [(loss, len(mb.advantages) * world / num_sequences) for mb in microbatches]
    return [(replace(loss, num_items=max(num_tokens, 1.0) / world), 1.0)] * len(microbatches)


def update(
    state: TrainState,
    microbatches: list[Microbatch],
    shares: list[tuple[LossArgs, float]],
    learning_rate: float,
    stats: StepStats,
    note: Callable[[StepStats, GRPOLoss, Microbatch, float], None],
    temperature: float = 1.0,
) -> bool:
    """One optimizer update; False if it was skipped on all ranks.

    Args:
        shares: of `loss_shares`.
        note: told of each microbatch's outcome and share of the loss.
    """
    finite = True
    for number, (mb, (args, scale)) in enumerate(zip(microbatches, shares, strict=True), 1):
        fields = state.engine.forward(
            mb.inputs,
            temperature=temperature,
            image_features=mb.image_features,
            loss=replace(
                args, advantages=mb.advantages, old_logps=mb.old_logps, ref_logps=mb.ref_logps
            ),
            loss_mask=mb.loss_mask,
        )
        out = GRPOLoss(*fields)
        loss = out.loss * scale
        finite &= backward(state, loss, last=number == len(microbatches))
        note(stats, out, mb, float(loss.detach()))
    return step_optimizer(state, finite, learning_rate, stats)


def backward(state: TrainState, loss: Tensor, *, last: bool) -> bool:
    """Add a microbatch's gradient; returns whether its loss is finite."""
    finite = bool(torch.isfinite(loss.detach()))
    state.engine.backward(loss, last=last)
    progress.mark("training")
    return finite


def step_optimizer(state: TrainState, finite: bool, learning_rate: float, stats: StepStats) -> bool:
    """Update the weights, unless a loss of any rank was not finite."""
    veto = dist.any_rank(not finite, state.engine.device)
    result = state.engine.step(learning_rate, veto=veto)
    stats.add("grad_norm", result.grad_norm)
    return result.applied


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
