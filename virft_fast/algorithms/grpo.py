"""GRPO: one step, readable top to bottom.

A step samples G completions per prompt, scores them, computes advantages within each group, and
trains on them with the clipped loss, `num_iterations` times. With `dynamic_sampling`, groups of
equal rewards are replaced by those of new prompts. With `steps_per_generation`, one rollout lasts
for several steps of one update each, over minibatches of its groups.

Unlike Visual-RFT's trainer, it keeps images with their prompts, handles truncated and unscorable
completions, and counts tokens over all microbatches and ranks before the first backward pass.
Unlike TRL's trainer, it sizes microbatches by prompts or tokens, so that a group stays together and
its prompt is read once. It also skips completions that cannot affect the gradient.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from virft_fast import dist
from virft_fast.algorithms.base import Algorithm, Data
from virft_fast.algorithms.groups import choose_groups, deal
from virft_fast.algorithms.step import (
    Metrics,
    Microbatch,
    Minibatch,
    StepStats,
    TooManyBadSteps,
    TrainState,
    finish,
    lay_out,
    loss_shares,
    reference_pass,
    update,
    with_entropy_items,
)
from virft_fast.batch import Json, Prompt, Rollouts, Row
from virft_fast.config import GRPOConfig, RunConfig
from virft_fast.kernels import GRPOLoss, LossArgs, group_advantages, normalize_then_sum
from virft_fast.rollout import Sampling
from virft_fast.rollout.native import NativeRollout
from virft_fast.rollout.records import completion_records, join_groups, reward_arguments
from virft_fast.rollout.speculation import History, Stats, answers_of
from virft_fast.tasks import RewardLog, score

if TYPE_CHECKING:
    from transformers import TrainerState

logger = logging.getLogger(__name__)

# Metric -> (limit above which a step teaches little, warning after IDLE_STEPS such steps).
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
        "more than 90%% of the completions were cut off at --max_completion_length in the last %d "
        "steps. Usual causes: a limit too low for the reasoning that the prompt asks for; a model "
        "that never ends its turn (a base model, or another chat template than it was trained "
        "with); a reward that length earns",
    ),
}


def train_step(state: TrainState, prompts: Sequence[Prompt]) -> tuple[Metrics, list[Row]]:
    """One GRPO step on this rank's B prompts.

    Args:
        prompts: not read while `state.pending` has minibatches of an earlier rollout.
    Returns:
        Metrics, the same on all ranks, and a record for each completion that this rank sampled.
    Raises:
        TooManyBadSteps: for `max_bad_steps` steps in a row, the update was skipped, or one reward
            function returned no finite value.
    """
    cfg, stats, start = state.config, StepStats(), time.perf_counter()
    torch.manual_seed(state.seed + state.step)
    log, draws, records = RewardLog(), list[Draw](), list[Row]()
    if not state.pending:
        draws, records = _roll_out(state, prompts, stats, log)
    count = 1 if cfg.steps_per_generation else cfg.num_iterations
    minibatches, state.pending = state.pending[:count], state.pending[count:]
    learning_rate, applied = state.learning_rate(state.step), True
    with stats.timed("train"):
        for batch in minibatches:

            def note(
                stats: StepStats, out: GRPOLoss, mb: Microbatch, loss: Tensor, fresh=batch.fresh
            ) -> None:
                _loss_stats(stats, out, mb, loss.double() / count)
                if fresh:  # later, the weights differ from the rollout's
                    _mismatch_stats(stats, out, mb)

            applied &= update(
                state, batch.microbatches, batch.shares, learning_rate, stats, note, cfg.temperature
            )
    if draws:
        _reported_stats(stats, state, log)
    for draw in draws:
        if state.history is not None and draw.guesses is not None:
            _remember(stats, state.history, draw.rollouts, draw.guesses)
    state.step += 1
    drawn = [draw.rollouts for draw in draws]
    trained = minibatches[0].rollouts
    metrics = finish(state, stats, trained, learning_rate, applied, start, drawn=drawn)
    if draws:
        _count_silent(state, metrics, [name for name, _ in state.reward_funcs])
        _count_idle(state, metrics)
    return metrics, records


@dataclass(frozen=True)
class Draw:
    """One round of sampling, scored: rewards (N, R), their sums (N,), advantages (N,), and what
    guessing saved."""

    rollouts: Rollouts
    by_function: Tensor
    rewards: Tensor
    advantages: Tensor
    guesses: Stats | None


def _roll_out(
    state: TrainState, prompts: Sequence[Prompt], stats: StepStats, log: RewardLog
) -> tuple[list[Draw], list[Row]]:
    """Sample and score completions, and divide those to train on into `state.pending`.

    Returns:
        The rounds of sampling, and a record of each completion.
    """
    size, names = state.config.num_generations, [name for name, _ in state.reward_funcs]
    draws, chosen = _draw_rounds(state, prompts, stats, log)
    rows, advantages = [g * size + i for g in chosen for i in range(size)], draws[0].advantages
    if len(draws) > 1:  # some depend on the rewards of all that is trained on
        by_function = torch.cat([draw.by_function for draw in draws])
        rewards = torch.cat([draw.rewards for draw in draws])
        advantages = _advantages(state, by_function[rows], rewards[rows])
    parts = [draw.rollouts for draw in draws]
    with stats.timed("train"):
        state.pending = _minibatches(state, parts, chosen, advantages, stats)
    records = [r for d in draws for r in completion_records(d.rollouts, names, d.by_function)]
    known = dict(zip(rows, advantages.tolist(), strict=True))
    for row, record in enumerate(records):
        record["advantage"] = known.get(row)
    for column, values in log.extra.items():
        for record, value in zip(records, values, strict=False):
            record.setdefault(column, _plain(value))
    return draws, records


def _draw_rounds(
    state: TrainState, prompts: Sequence[Prompt], stats: StepStats, log: RewardLog
) -> tuple[list[Draw], dict[int, int]]:
    """Sample and score completions. With `dynamic_sampling`, repeat it with new prompts until the
    ranks together have as many groups with advantages as prompts in a round.

    Returns:
        The rounds, and the groups to train on, as `choose_groups` returns them.
    """
    cfg, world, draws = state.config, dist.world_size(), list[Draw]()
    teaches: list[list[list[bool]]] = []
    equal: dict[int, bool] = {}
    asks = cfg.dynamic_sampling or state.note_equal is not None
    with stats.timed("rollout"), state.engine.whole_weights():
        pass  # all ranks gather the weights here, before one of them can fail below
    while True:
        draws.append(_draw(state, prompts, len(draws), stats, log))
        teach = (draws[-1].advantages.view(-1, cfg.num_generations) != 0).any(1).tolist()
        scores = draws[-1].rewards.view(-1, cfg.num_generations).isfinite().sum(1).tolist()
        rows = (prompt.sample.index for prompt in prompts)
        mine = list(zip(rows, teach, scores, strict=True))
        # Otherwise all groups are trained on, whatever the other ranks found.
        ranks = dist.all_gather_object(mine) if asks else [mine] * world
        teaches.append([[teaching for _, teaching, _ in of_rank] for of_rank in ranks])
        found = [group for of_rank in ranks for group in of_rank]
        for row, teaching, num_scores in found:
            if num_scores > 1:  # else nothing is known of its rewards
                equal[row] = equal.get(row, True) and not teaching
        if not any(num_scores for _, _, num_scores in found):
            break  # for example, a server of rewards is down
        enough = sum(sum(map(sum, of_round)) for of_round in teaches) >= world * len(prompts)
        if enough or not cfg.dynamic_sampling or len(draws) == cfg.dynamic_sampling_max_rounds:
            break
        prompts = state.more_prompts()
    state.engine.free_rollout_weights()
    if state.note_equal is not None:
        state.note_equal(equal)
    if cfg.dynamic_sampling:
        used = float(len(draws) * len(prompts) * world)
        stats.add_total("sampling_rounds", float(len(draws)))
        stats.add_total("prompts_used", used)
        stats.add_total("prompts_wasted", used - len(prompts) * world)
    return draws, choose_groups(teaches, dist.rank())


def _draw(
    state: TrainState, prompts: Sequence[Prompt], number: int, stats: StepStats, log: RewardLog
) -> Draw:
    """A round of sampling. Its rows follow those of earlier rounds, so they have other seeds."""
    size = state.config.num_generations
    first_row = (number * dist.world_size() + dist.rank()) * len(prompts) * size
    with dist.agreed():
        with stats.timed("rollout"), state.section("rollout", None):
            rollouts = state.rollout.generate(prompts, size, _sampling(state), first_row=first_row)
        with stats.timed("rewards"):
            by_function, rewards = score_rollouts(state, rollouts, log)
    advantages = _advantages(state, by_function, rewards)
    _rollout_stats(stats, state, rollouts, by_function, rewards, advantages)
    guesses = state.rollout.stats if isinstance(state.rollout, NativeRollout) else None
    return Draw(rollouts, by_function, rewards, advantages, guesses)


def _minibatches(
    state: TrainState,
    parts: Sequence[Rollouts],
    chosen: dict[int, int],
    advantages: Tensor,
    stats: StepStats,
) -> list[Minibatch]:
    """What each optimizer update trains on. With `num_iterations`, the minibatches come again, in
    the same order.

    Args:
        chosen: see `choose_groups`. advantages: of their rows.
    """
    cfg, groups, minibatches = state.config, list(chosen), list[Minibatch]()
    count = (cfg.steps_per_generation or 1) // state.gradient_accumulation_steps or 1
    by_group = advantages.view(-1, cfg.num_generations)
    for indices in deal(list(chosen.values()), count, (state.seed, state.step)):
        rollouts = join_groups(parts, [groups[index] for index in indices])
        microbatches = make_microbatches(state, rollouts, by_group[indices].flatten(), stats)
        shares = _shares(state, microbatches, rollouts)
        shares = _frozen_passes(state, microbatches, shares, count * cfg.num_iterations > 1)
        minibatches.append(Minibatch(rollouts, microbatches, shares))
    updates = enumerate(minibatches * cfg.num_iterations)
    return [replace(minibatch, fresh=number == 0) for number, minibatch in updates]


def _plain(value: object) -> Json:
    """A value reported by a reward function, or its repr if JSON can't represent it."""
    try:
        json.dumps(value)
        return value
    except (TypeError, ValueError, RecursionError):
        return repr(value)[:1000]


def _count_silent(state: TrainState, metrics: Metrics, names: Sequence[str]) -> None:
    """Raise TooManyBadSteps if a reward function gave no score on any rank for too many steps."""
    for name in names:
        scored_some = math.isfinite(metrics.get(f"rewards/{name}", math.nan))
        state.silent_steps[name] = 0 if scored_some else state.silent_steps.get(name, 0) + 1
        if state.silent_steps[name] >= state.max_bad_steps:
            raise TooManyBadSteps(
                f"reward function {name} gave no finite value for any completion in "
                f"{state.silent_steps[name]} steps in a row, up to step {state.step}: expected "
                "finite numbers, and None for some completions at most; fix it, or leave it "
                f"out of --reward_funcs; --max_bad_steps sets the limit"
            )


def _count_idle(state: TrainState, metrics: Metrics) -> None:
    """Warn once after `IDLE_STEPS` steps in a row that taught little."""
    for name, (limit, text) in IDLE.items():
        state.idle_steps[name] = state.idle_steps.get(name, 0) + 1 if metrics[name] > limit else 0
        if state.idle_steps[name] == IDLE_STEPS:
            logger.warning(text, IDLE_STEPS)


def score_rollouts(state: TrainState, rollouts: Rollouts, log: RewardLog) -> tuple[Tensor, Tensor]:
    """Rewards (N, R), clipped, NaN where a function gave none, and their weighted sums (N,)."""
    shared = log.arguments(_trainer_state(state)) if _has_own_rewards(state) else {}
    arguments = reward_arguments(rollouts)
    return score(
        state.reward_funcs,
        state.reward_weights,
        *arguments,
        shared=shared,
        clip=state.config.reward_clip,
        section=lambda what: state.section(what, state.reward_timeout),
    )


def _has_own_rewards(state: TrainState) -> bool:
    """Whether any reward function is the user's or reports values. Built-in ones neither read the
    run's state nor, but for a judge, report any."""
    return not all(
        getattr(function, "__module__", "").startswith("virft_fast.")
        and not getattr(function, "reports", False)
        for _, function in state.reward_funcs
    )


def _trainer_state(state: TrainState) -> TrainerState:
    from transformers import TrainerState

    epoch = state.num_prompts / max(state.num_rows, 1)
    return TrainerState(global_step=state.step, max_steps=state.max_steps, epoch=epoch)


def _reported_stats(stats: StepStats, state: TrainState, log: RewardLog) -> None:
    """Add the metrics that reward functions reported on any rank, unless the name is taken."""
    if not _has_own_rewards(state):
        return
    names = dist.all_gather_object(list(log.metrics))
    for name in sorted({name for of_rank in names for name in of_rank}):
        values = log.metrics.get(name, [])
        if name not in stats.sums:
            stats.add(name, sum(values), len(values))


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


def _advantages(state: TrainState, by_function: Tensor, rewards: Tensor) -> Tensor:
    """(N,) advantages. Some scale by the spread in the whole batch, so they need all ranks'
    rewards."""
    cfg = state.config
    separate = cfg.multi_objective_aggregation == "normalize_then_sum"
    ranks = dist.all_gather_object(by_function if separate else rewards)
    if separate:
        gathered = torch.cat(ranks)  # (N of all ranks, R)
        advantages = normalize_then_sum(gathered, state.reward_weights, cfg.num_generations)
    else:
        advantages = group_advantages(
            torch.cat(ranks),
            cfg.num_generations,
            scale_rewards=cfg.scale_rewards,
            advantage_estimator=cfg.advantage_estimator,
        )
    first = sum(map(len, ranks[: dist.rank()]))
    return advantages[first : first + len(rewards)]


def make_microbatches(
    state: TrainState, rollouts: Rollouts, advantages: Tensor, stats: StepStats
) -> list[Microbatch]:
    """Microbatches of the completions that can affect the gradient."""
    mask = _loss_mask(state, rollouts, advantages)
    trains = mask.any(1).tolist()
    stats.add("dropped_fraction", trains.count(False), len(trains))
    return lay_out(state, rollouts, advantages, mask)


def _loss_mask(state: TrainState, rollouts: Rollouts, advantages: Tensor) -> Tensor:
    """(N, T) bool, the tokens in the loss. With the policy term alone, tokens with advantage 0 add
    nothing to the loss or gradient. So groups with equal rewards are left out, and the model
    doesn't read them."""
    mask = _counted(rollouts, state.config)
    if not state.config.equal_rewards_train:
        mask = mask & (advantages != 0).to(mask.device)[:, None]
    return mask


def _counted(rollouts: Rollouts, cfg: GRPOConfig) -> Tensor:
    """(N, T) bool, the tokens that the loss averages over."""
    if cfg.mask_truncated_completions:
        return rollouts.completion_mask & ~rollouts.truncated[:, None]
    return rollouts.completion_mask


def _shares(
    state: TrainState, microbatches: list[Microbatch], rollouts: Rollouts
) -> list[tuple[LossArgs, float]]:
    """`loss_shares` with the loss arguments from the flags."""
    return loss_shares(microbatches, _counted(rollouts, state.config), _loss_args(state))


def _loss_args(state: TrainState) -> LossArgs:
    """In 16 bits, sampling rounds differently from training, even with the same weights."""
    narrow = getattr(state.engine, "bf16", False) or state.policy.head.weight.element_size() == 2
    return state.config.loss_args(differs=narrow)


@torch.no_grad()
def _frozen_passes(
    state: TrainState,
    microbatches: list[Microbatch],
    shares: list[tuple[LossArgs, float]],
    several: bool,
) -> list[tuple[LossArgs, float]]:
    """Add what stays fixed after the rollout: the reference's log-probs, the policy's own if there
    are `several` updates, and the entropy that selects the minibatch's tokens."""
    cfg, entropies = state.config, []
    for mb in microbatches:
        shared = {"temperature": cfg.temperature, "image_features": mb.image_features}
        if cfg.beta > 0:
            mb.ref_logps = reference_pass(state, mb.inputs, **shared)
        if several or cfg.top_entropy_quantile < 1:
            logps, entropy = state.engine.forward(mb.inputs, **shared)
            mb.old_logps = logps if several else None
            entropies.append(entropy if mb.loss_mask is None else entropy[mb.loss_mask])
    if cfg.top_entropy_quantile == 1:
        return shares
    gathered = torch.cat(dist.all_gather_object(torch.cat(entropies).cpu()))
    if not len(gathered):
        return shares
    threshold = torch.quantile(gathered, 1 - cfg.top_entropy_quantile).item()
    selected = int((gathered >= threshold).sum()) / dist.world_size()
    changes = {"top_entropy_quantile": 1.0, "entropy_threshold": threshold}
    return with_entropy_items(shares, selected, **changes)


def _loss_stats(stats: StepStats, out: GRPOLoss, mb: Microbatch, loss: Tensor) -> None:
    tokens = mb.num_tokens
    stats.add_total("loss", loss)
    stats.add("entropy", out.entropy.sum(), tokens)
    if mb.ref_logps is not None:
        stats.add("kl", out.kl.sum(), tokens)
    stats.add("clip_fraction_low", out.clip_fraction_low.double() * tokens, tokens)
    stats.add("clip_fraction_high", out.clip_fraction_high.double() * tokens, tokens)


def _mismatch_stats(stats: StepStats, out: GRPOLoss, mb: Microbatch) -> None:
    """Add how far the rollout's log-probs differ from training's under the same weights."""
    plain = mb.sampling_logps if mb.plain_logps is None else mb.plain_logps
    if mb.plain_logps is not None:
        kept = (plain - mb.sampling_logps).exp()
        kept = kept if mb.loss_mask is None else torch.where(mb.loss_mask, kept, 0.0)
        stats.add("sampling_kept_mass", kept.sum(), mb.num_tokens)
    difference = out.logps - plain
    largest = difference
    if mb.loss_mask is not None:
        difference = torch.where(mb.loss_mask, difference, 0.0)
        largest = difference.masked_fill(~mb.loss_mask, -torch.inf)
    stats.add("sampling_logp_difference", difference.abs().sum(), mb.num_tokens)
    ratio = largest.max().exp() if len(largest) else largest.new_zeros(())
    stats.add_largest("sampling_ratio_max", ratio)


def _rollout_stats(
    stats: StepStats,
    state: TrainState,
    rollouts: Rollouts,
    by_function: Tensor,
    rewards: Tensor,
    advantages: Tensor,
) -> None:
    groups = rewards.view(-1, state.config.num_generations)  # (B, G)
    scored = rewards[~rewards.isnan()]
    stats.add("reward", float(scored.sum()), len(scored))
    for (name, _), column in zip(state.reward_funcs, by_function.T, strict=True):
        valid = column[~column.isnan()]
        stats.add(f"rewards/{name}", float(valid.sum()), len(valid))
    spread = [float(g[~g.isnan()].std()) if (~g.isnan()).sum() > 1 else 0.0 for g in groups]
    stats.add("reward_std", sum(spread), len(spread))
    equal = (advantages.view_as(groups) == 0).all(1)
    stats.add("frac_reward_zero_std", float(equal.sum()), len(equal))
    stats.add("unscored_fraction", float(rewards.isnan().sum()), len(rewards))
    lengths = rollouts.completion_mask.sum(1)
    stats.add("completion_length", float(lengths.sum()), len(lengths))
    stats.add("truncated_fraction", float(rollouts.truncated.sum()), len(lengths))
    size = state.config.num_generations
    texts = [rollouts.texts[i : i + size] for i in range(0, len(rollouts.texts), size)]
    stats.add("distinct_fraction", sum(len(set(t)) / size for t in texts), len(texts))


def _remember(stats: StepStats, history: History, rollouts: Rollouts, counts: Stats) -> None:
    """Report what guessing saved, and add the answers of all ranks to the history, so that it is
    the same on all of them. Called when the step is complete: a step that fails leaves no trace."""
    drawn = counts.drawn - len(rollouts.texts)  # reading the prompts draws the first tokens
    stats.add("tokens_per_pass", drawn, drawn - counts.accepted)
    stats.add("guessed_fraction", counts.accepted, counts.drawn)
    stats.add("passes_per_token", counts.passes, counts.longest)
    mine = answers_of(rollouts.prompts, rollouts), counts.agreement
    ranks = dist.all_gather_object(mine)
    history.extend([answer for answers, _ in ranks for answer in answers])
    agreements = torch.tensor([agreement for _, agreement in ranks], dtype=torch.float64)
    history.agreement = agreements.mean(0)


class GRPO(Algorithm):
    name = flags = "grpo"
    step = staticmethod(train_step)
    draws = True

    def begin(self, config: RunConfig, state: TrainState, data: Data, *, resumed: bool) -> None:
        if _sampling(state).filtered and _loss_args(state).importance_sampling_mode is None:
            logger.warning(
                "--top_p, --top_k, --min_p and --repetition_penalty change what is sampled, but "
                "the loss takes it as drawn from the whole distribution; "
                "--importance_sampling_correction weights completions by the difference"
            )

    def uses_reference(self, config: RunConfig) -> bool:
        return config.grpo.beta > 0

    def may_use_reference(self, config: RunConfig) -> bool:
        return True  # if --beta is above 0

    def curve(self, reward_names: Sequence[str]) -> list[str]:
        return ["reward", *(f"rewards/{name}" for name in reward_names)]


ALGORITHM = GRPO()
