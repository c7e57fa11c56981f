"""The parts of a step that all algorithms share.

A step divides its sampled or given completions into microbatches, the same number on every rank. It
computes the loss's normalizer over all of them before the first backward pass, so that accumulation
and data parallelism equal one big batch. If a loss or gradient is not finite on any rank, all ranks
skip the update.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from virft_fast import dist, progress
from virft_fast.batch import Prompt, Rollouts, Sample
from virft_fast.config import GRPOConfig
from virft_fast.devices import to_device
from virft_fast.engine import Engine
from virft_fast.kernels import GRPOLoss, LossArgs
from virft_fast.metrics import Number, reduce_metrics
from virft_fast.models import adapters
from virft_fast.models.families import Tokenizer
from virft_fast.models.inputs import ModelInputs
from virft_fast.models.policy import Policy
from virft_fast.rollout import Rollout
from virft_fast.rollout.speculation import History

T = TypeVar("T")
Metrics = dict[str, float]


def _no_limit(what: str, limit: float | None) -> AbstractContextManager[object]:
    return nullcontext()


def _no_prompts() -> Sequence[Prompt]:
    raise ValueError("TrainState.more_prompts: expected a source of prompts, got none; set it")


class TooManyBadSteps(RuntimeError):
    """Too many steps in a row had no finite gradient, or no finite value from a reward function."""


@dataclass
class TrainState:
    """Everything a step works on.

    Attributes:
        reference: callable like the policy; with LoRA, the policy itself; None if no step needs it.
            Call it through `reference_pass`.
        prompts_per_microbatch, gradient_accumulation_steps: their product is the number of prompts
            per optimizer update on this rank.
        max_tokens_per_microbatch: limit on the tokens that the model reads in a microbatch; if set,
            it replaces the limit on prompts.
        learning_rate: step -> rate.
        step: number of completed steps.
        bad_steps: number of consecutive non-finite steps so far.
        silent_steps: reward function -> number of consecutive steps so far without a finite value.
        idle_steps: metric in `IDLE` -> number of consecutive steps so far above its limit.
        history: earlier answers, from which rollouts guess; None: they don't speculate.
        num_tokens: completion tokens so far, on all ranks, including those left out of the loss.
        num_prompts: prompts so far, on all ranks.
        pending: what is left of the last rollout, for the next steps; checkpoints don't store it.
        more_prompts: this rank's next prompts, as many as in the step; all ranks call it.
        note_equal: called in each step that samples with {row of the data set: whether all its
            completions got the same reward}, the same on all ranks.
        base_weights: `weights_stamp` of the weights that the run started with.
        adapter: how the policy's adapter started, a `LoraPlan.kind`; None without an adapter.
        save_dtype: dtype of saved weights; None: the dtype they are trained in.
        max_steps, num_rows: steps of the whole run and rows of its data set, for reward functions.
        section: (name, seconds or None) -> context that applies a time limit to a part of the step.
        reward_timeout: time limit per call of a reward function, in seconds; None: no limit.
    """

    config: GRPOConfig
    policy: Policy
    engine: Engine
    reference: Callable[..., tuple[Tensor, ...]] | None
    rollout: Rollout
    tokenizer: Tokenizer
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
    num_prompts: int = 0
    pending: list[Minibatch] = field(default_factory=list)
    more_prompts: Callable[[], Sequence[Prompt]] = _no_prompts
    note_equal: Callable[[dict[int, bool]], None] | None = None
    silent_steps: dict[str, int] = field(default_factory=dict)
    idle_steps: dict[str, int] = field(default_factory=dict)
    history: History | None = None
    base_weights: list[list[str | int]] | None = None
    adapter: str | None = None
    save_dtype: torch.dtype | None = None
    max_steps: int = 0
    num_rows: int = 0
    section: Callable[[str, float | None], AbstractContextManager[object]] = _no_limit
    reward_timeout: float | None = None


# Loss types that average over sequences; the others average over tokens.
SEQUENCE_MEANS = ("grpo", "gspo", "dr_grpo", "sapo", "luspo")


@dataclass
class Microbatch:
    """n completions that go through the model in one call, with S tokens in all.

    Attributes:
        advantages: (n,). loss_mask: (S,) bool; None: all tokens count.
        sampling_logps, ref_logps, old_logps: (S,), or None. plain_logps: see `Rollouts`.
        image_features: see `Policy.forward`; None: the tower computes them.
    """

    inputs: ModelInputs
    advantages: Tensor
    loss_mask: Tensor | None
    sampling_logps: Tensor
    plain_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    old_logps: Tensor | None = None
    image_features: Tensor | None = None

    @property
    def num_tokens(self) -> Number:
        """Tokens that count."""
        mask = self.loss_mask
        return len(self.inputs.completion_ids) if mask is None else mask.sum()


@dataclass(frozen=True)
class Minibatch:
    """What one optimizer update trains on.

    Attributes:
        rollouts: of its groups.
        shares: from `loss_shares`.
        fresh: whether the weights are those that sampled it.
    """

    rollouts: Rollouts
    microbatches: list[Microbatch]
    shares: list[tuple[LossArgs, float]]
    fresh: bool = True


@dataclass
class StepStats:
    """A step's measurements on this rank, by metric. Tensors, 0-d, stay on the device until
    `reduce` reads all of them at once.

    Attributes:
        sums: (sum, count); the metric is the sum over all ranks, divided by their count.
        totals: a sum over this rank's microbatches; the metric is its mean over the ranks.
        largest: the metric is the maximum over the ranks.
    """

    sums: dict[str, tuple[Number, Number]] = field(default_factory=dict)
    totals: dict[str, Number] = field(default_factory=dict)
    largest: dict[str, Number] = field(default_factory=dict)

    def add(self, name: str, total: Number, count: Number = 1.0) -> None:
        old_total, old_count = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (old_total + _exact(total), old_count + _exact(count))

    def add_total(self, name: str, value: Number) -> None:
        self.totals[name] = self.totals.get(name, 0.0) + _exact(value)

    def add_largest(self, name: str, value: Tensor) -> None:
        """Add a value that is not negative."""
        self.largest[name] = value.detach().double().clamp(min=self.largest.get(name, 0.0))

    def reduce(self, device: torch.device) -> Metrics:
        """The metrics, the same on all ranks, in one collective and one copy to the host."""
        sums = self.sums | {name: (total, 1.0) for name, total in self.totals.items()}
        return reduce_metrics(sums, partial(dist.gather_numbers, device=device), self.largest)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.add_total(f"time/{name}_s", time.perf_counter() - start)


def _exact(value: Number) -> Number:
    return value.detach().double() if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class Chunk:
    """Completions of one prompt that are read together.

    Attributes:
        prompt: the prompt's index on this rank. rows: the completions' rows in the rollouts.
    """

    prompt: int
    rows: tuple[int, ...]


def plan_microbatches(
    chunks: Sequence[Chunk],
    *,
    prompt_lengths: Sequence[int],
    lengths: Sequence[int],
    prompts_per_microbatch: int,
    max_tokens: int | None,
    shared: bool,
    split: bool = True,
) -> list[list[Chunk]]:
    """Divide groups, in order, into microbatches: by number of prompts, or by `max_tokens`.

    Args:
        chunks: whole groups.
        prompt_lengths: tokens of each prompt. lengths: tokens of each row's completion.
        shared: whether the model reads a prompt once per chunk or once per completion.
        split: whether a group may be split.
    Returns:
        The chunks of each microbatch. A group is split only if it exceeds `max_tokens` by itself. A
        single completion that exceeds the limit gets its own microbatch.
    """
    if max_tokens is None:
        size = prompts_per_microbatch
        return [list(chunks[i : i + size]) for i in range(0, len(chunks), size)]

    def tokens(chosen: Sequence[Chunk]) -> int:
        rows = [(prompt_lengths[c.prompt], lengths[row]) for c in chosen for row in c.rows]
        if shared:
            return sum(prompt_lengths[c.prompt] for c in chosen) + sum(n for _, n in rows)
        longest = max((p for p, _ in rows), default=0) + max((n for _, n in rows), default=0)
        return len(rows) * longest  # with its padding

    plan: list[list[Chunk]] = []
    for chunk in chunks:
        if split and tokens([chunk]) > max_tokens:
            rows: tuple[int, ...] = ()
            for row in chunk.rows:
                if rows and tokens([Chunk(chunk.prompt, (*rows, row))]) > max_tokens:
                    plan.append([Chunk(chunk.prompt, rows)])
                    rows = ()
                rows = (*rows, row)
            plan.append([Chunk(chunk.prompt, rows)])
        elif plan and tokens([*plan[-1], chunk]) <= max_tokens:
            plan[-1].append(chunk)
        else:
            plan.append([chunk])
    return plan


def lay_out(
    state: TrainState, rollouts: Rollouts, advantages: Tensor, mask: Tensor, split: bool = True
) -> list[Microbatch]:
    """Microbatches, in order, of the completions that have a token in the (N, T) `mask`: at least
    one, and the same number on every rank. For `split`, see `plan_microbatches`."""
    size, trains = rollouts.num_generations, mask.any(1).tolist()
    groups = [range(first, first + size) for first in range(0, len(trains), size)]
    rows = [tuple(row for row in group if trains[row]) for group in groups]
    plan = plan_microbatches(
        [Chunk(prompt, chosen) for prompt, chosen in enumerate(rows) if chosen],
        prompt_lengths=[len(prompt.input_ids) for prompt in rollouts.prompts],
        lengths=rollouts.completion_mask.sum(1).tolist(),
        prompts_per_microbatch=state.prompts_per_microbatch,
        max_tokens=state.max_tokens_per_microbatch,
        shared=state.policy.shares_prefix,
        split=split,
    )
    made = [microbatch(state, rollouts, chunks, advantages, mask) for chunks in plan]
    others = {"tower": rollouts.image_features is None, "plain": rollouts.plain_logps is not None}
    return equally_many(made, lambda: empty_microbatch(state, **others))


def microbatch(
    state: TrainState,
    rollouts: Rollouts,
    chunks: Sequence[Chunk],
    advantages: Tensor,
    loss_mask: Tensor,
) -> Microbatch:
    """A microbatch of the chunks' completions, on the device. `advantages` is (N,), `loss_mask` (N,
    T)."""
    device = state.engine.device
    ids, lengths = rollouts.completion_ids.cpu(), rollouts.completion_mask.sum(1).tolist()
    rows = torch.tensor([row for chunk in chunks for row in chunk.rows])
    real = rollouts.completion_mask[rows]
    inputs = state.policy.collate(
        [rollouts.prompts[chunk.prompt] for chunk in chunks],
        [[ids[row, : lengths[row]] for row in chunk.rows] for chunk in chunks],
        pad_token_id=state.tokenizer.pad_token_id,
        device=device,
    )
    features = None
    if rollouts.image_features is not None:
        features = torch.cat([rollouts.image_features[chunk.prompt] for chunk in chunks])
    counts = loss_mask[rows][real]
    return Microbatch(
        inputs,
        to_device(advantages[rows], device),
        None if bool(counts.all()) else to_device(counts, device),
        to_device(rollouts.sampling_logps[rows][real], device),
        None
        if rollouts.plain_logps is None
        else to_device(rollouts.plain_logps[rows][real], device),
        image_features=features,
    )


def empty_microbatch(state: TrainState, *, tower: bool, plain: bool = False) -> Microbatch:
    """A microbatch with one prompt and no completion token: under ZeRO-3, all ranks must make the
    same calls, and always count the same metrics.

    Args:
        tower: whether the other ranks call the vision tower. plain: whether they have
            `plain_logps`.
    """
    device = state.engine.device
    pad = torch.tensor([state.tokenizer.pad_token_id])
    nothing = Sample(-1, (), (), "")
    inputs = state.policy.collate(
        [Prompt(nothing, "", pad, torch.zeros_like(pad))],
        [[pad[:0]]],
        pad_token_id=state.tokenizer.pad_token_id,
        device=device,
    )
    zero = torch.zeros(1, device=device)
    features = None if tower else torch.zeros(0, 1, device=device)
    none = zero[:0]
    return Microbatch(inputs, zero, None, none, none if plain else None, image_features=features)


def reference_pass(state: TrainState, inputs: ModelInputs, **options: object) -> Tensor:
    """(S,) log-probs under the reference; for the options, see `Policy.forward`."""
    if state.reference is None:
        raise ValueError("TrainState.reference: expected a model, got None; this loss needs one")
    with adapters.as_reference(state.policy.model):
        return state.reference(inputs, **options)[0]


def equally_many(made: list[T], make_empty: Callable[[], T]) -> list[T]:
    """The microbatches, plus empty ones until every rank has the same number, at least one."""
    missing = max(1, *dist.all_gather_object(len(made))) - len(made)
    return made + [make_empty()] * missing if missing else made


def loss_shares(
    microbatches: list[Microbatch], counted: Tensor, loss: LossArgs
) -> list[tuple[LossArgs, float]]:
    """For each microbatch, the loss arguments and a factor. The factor turns its loss into its
    share of the loss of one big batch over all microbatches and ranks.

    Completions outside the microbatches count, too. The factor includes the number of ranks,
    because engines average gradients over them.

    Args:
        counted: (N, T) bool, the tokens on this rank that the loss averages over.
    """
    device = microbatches[0].advantages.device
    counts = [float(len(counted)), float(counted.sum())]
    num_sequences, num_tokens = dist.sum_numbers(counts, device)
    world = dist.world_size()
    items = max(num_tokens, 1.0) / world
    if loss.loss_type in SEQUENCE_MEANS:
        shares = [(loss, len(mb.advantages) * world / num_sequences) for mb in microbatches]
    else:
        shares = [(replace(loss, num_items=items), 1.0)] * len(microbatches)
    return with_entropy_items(shares, items)


def with_entropy_items(
    shares: list[tuple[LossArgs, float]], items: float, **changes: Any
) -> list[tuple[LossArgs, float]]:
    """The same shares, with the entropy bonus averaged over `items` and other loss arguments."""
    return [
        (replace(args, num_entropy_items=items * scale, **changes), scale) for args, scale in shares
    ]


def update(
    state: TrainState,
    microbatches: list[Microbatch],
    shares: list[tuple[LossArgs, float]],
    learning_rate: float,
    stats: StepStats,
    note: Callable[[StepStats, GRPOLoss, Microbatch, Tensor], None],
    temperature: float = 1.0,
) -> bool:
    """One optimizer update; returns False if all ranks skipped it.

    Args:
        shares: from `loss_shares`.
        note: called with each microbatch's result and share of the loss, a 0-d tensor. Nothing in
            it may wait for the device; `StepStats` takes tensors.
    """
    finite = torch.ones((), dtype=torch.bool, device=state.engine.device)
    for number, (mb, (args, scale)) in enumerate(zip(microbatches, shares, strict=True), 1):
        args = replace(args, advantages=mb.advantages, old_logps=mb.old_logps)
        if args.off_policy_mask_threshold is not None or args.importance_sampling_mode is not None:
            args = replace(args, sampling_logps=mb.sampling_logps)
        fields = state.engine.forward(
            mb.inputs,
            temperature=temperature,
            image_features=mb.image_features,
            loss=replace(args, ref_logps=mb.ref_logps),
            loss_mask=mb.loss_mask,
        )
        out = GRPOLoss(*fields)
        loss = out.loss * scale
        finite = finite & backward(state, loss, last=number == len(microbatches))
        note(stats, out, mb, loss.detach())
    return step_optimizer(state, finite, learning_rate, stats)


def backward(state: TrainState, loss: Tensor, *, last: bool) -> Tensor:
    """Add a microbatch's gradient; returns whether its loss was finite, a 0-d bool."""
    finite = torch.isfinite(loss.detach())
    state.engine.backward(loss, last=last)
    progress.mark("training")
    return finite


def step_optimizer(
    state: TrainState, finite: Tensor, learning_rate: float, stats: StepStats
) -> bool:
    """Update the weights if the loss was finite on every rank; returns whether it did. The host
    waits here for the losses and the gradient's norm, for the first time since the rollout."""
    veto = dist.any_rank(~finite, state.engine.device)
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
    *,
    drawn: Sequence[Rollouts] | None = None,
) -> Metrics:
    """The step's metrics, reduced over the ranks; also counts prompts, tokens and bad steps in
    `state`.

    Args:
        rollouts: what the step trained on.
        drawn: what it sampled or read for the first time, maybe nothing; None: `rollouts`.
    Raises:
        TooManyBadSteps: `max_bad_steps` steps in a row were skipped.
    """
    world = dist.world_size()
    drawn = [rollouts] if drawn is None else drawn
    tokens_drawn = sum(float(part.completion_mask.sum()) for part in drawn)
    stats.add_total("num_tokens", tokens_drawn * world)
    stats.add_total("trained", float(rollouts.completion_mask.sum()) * world)
    metrics = stats.reduce(state.engine.device)
    tokens = {"rollout": metrics.pop("num_tokens"), "train": metrics.pop("trained")}
    state.num_prompts += sum(len(part.prompts) for part in drawn) * world
    state.num_tokens += round(tokens["rollout"])
    state.bad_steps = 0 if applied else state.bad_steps + 1
    state.skipped_steps += 0 if applied else 1
    step_time_s = time.perf_counter() - start
    for phase, count in tokens.items():
        if f"time/{phase}_s" in metrics:  # not every step has a rollout
            seconds = max(metrics[f"time/{phase}_s"], 1e-9)
            metrics[f"{phase}_tokens_per_s"] = count / seconds
            metrics[f"time/{phase}_share"] = seconds / step_time_s
    metrics |= {
        "learning_rate": learning_rate,
        "num_tokens": float(state.num_tokens),
        "skipped_steps": float(state.skipped_steps),
        "step_time_s": step_time_s,
        "tokens_per_s": tokens["train"] / step_time_s,
    }
    if state.bad_steps >= state.max_bad_steps:
        raise TooManyBadSteps(
            f"{state.bad_steps} steps in a row had a non-finite loss or gradient (last: loss "
            f"{metrics['loss']}, grad_norm {metrics['grad_norm']}); nothing was applied in them. "
            f"Try a lower --learning_rate, or float32 instead of --bf16; --max_bad_steps sets the "
            f"limit"
        )
    return metrics
