"""Invariants of a GRPO step: accumulation, normalisation, skipped steps, excluded rewards."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    largest_difference,
    letter_count,
    make_prompts,
    make_sample,
    make_state,
    parameters,
)

from virft_fast.algorithms import grpo
from virft_fast.algorithms.grpo import train_step
from virft_fast.algorithms.step import TooManyBadSteps
from virft_fast.config import GRPOConfig
from virft_fast.kernels import linear

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo"]


# Adam divides a gradient by its own size, so with the usual epsilon of 1e-8 rounding noise in a
# gradient near zero moves a parameter as far as a real one would. Equality needs a larger epsilon.
SMOOTH = {"epsilon": 1e-3, "learning_rate": 2e-3}


def steps(state, prompts, count=3):
    return [train_step(state, prompts)[0] for _ in range(count)]


# A bonus alone gets 0.1. With 0.3, weights that differ by rounding (1e-7) move a draw of the third
# rollout across the border between two tokens; with equal weights, the draws are equal.
ENTROPY = {"entropy_coef": 0.3, "top_entropy_quantile": 0.4}


@pytest.mark.parametrize(
    "options",
    [*({"loss_type": name} for name in LOSS_TYPES), {"entropy_coef": 0.1},
     {"loss_type": "dapo", "use_bias_correction_kl": True, "num_iterations": 2} | ENTROPY,
     {"loss_type": "luspo", "off_policy_mask_threshold": 0.01, "beta": 0.0} | ENTROPY],
    ids=[*LOSS_TYPES, "bonus", "quantile", "mask"],
)  # fmt: skip
def test_accumulation_equals_one_big_batch(processor, prompts, options):
    config = {"beta": 0.1} | options
    big = make_state(processor, config=config, settings=SMOOTH, prompts_per_microbatch=4)
    small = make_state(processor, config=config, settings=SMOOTH, gradient_accumulation_steps=4)
    start = parameters(big.policy)
    one, many = steps(big, prompts), steps(small, prompts)
    assert largest_difference(parameters(big.policy), start) > 1e-4
    assert largest_difference(parameters(big.policy), parameters(small.policy)) <= 1e-5
    for a, b in zip(one, many, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a.get("kl") == pytest.approx(b.get("kl"), abs=1e-5)


def test_step_moves_the_policy_and_reports(processor, prompts):
    state = make_state(processor, prompts_per_microbatch=4)
    before = parameters(state.policy)
    metrics, records = train_step(state, prompts)
    assert largest_difference(before, parameters(state.policy)) > 0
    assert len(records) == 8
    assert set(records[0]) == {
        "index", "prompt", "completion", "solution", "rewards", "advantage",
    }  # fmt: skip
    assert metrics["reward"] == pytest.approx(
        sum(r["rewards"]["reward"] for r in records) / len(records), rel=1e-5
    )
    for name in ("loss", "kl", "entropy", "grad_norm", "tokens_per_s", "time/rollout_s"):
        assert math.isfinite(metrics[name])


def test_same_seed_same_steps(processor, prompts):
    runs = [make_state(processor, prompts_per_microbatch=4) for _ in range(2)]
    for state in runs:
        steps(state, prompts, 2)
    assert largest_difference(*(parameters(state.policy) for state in runs)) == 0


def test_zero_spread_leaves_the_policy_where_it_is_without_kl(processor, prompts):
    state = make_state(
        processor,
        config={"beta": 0.0},
        reward=lambda prompts, completions, **columns: [1.0] * len(completions),
        prompts_per_microbatch=4,
    )
    before = parameters(state.policy)
    metrics = steps(state, prompts, 1)[0]
    assert metrics["frac_reward_zero_std"] == 1
    assert "kl" not in metrics
    assert largest_difference(before, parameters(state.policy)) == 0


@pytest.mark.parametrize("bad", [math.nan, None, math.inf, -math.inf])
def test_reward_that_is_not_finite_never_reaches_the_loss(processor, prompts, bad):
    def reward(prompts, completions, **columns):
        return [bad, *letter_count(prompts, completions)[1:]]

    state = make_state(processor, reward=reward, prompts_per_microbatch=4)
    metrics, records = train_step(state, prompts)
    assert math.isfinite(metrics["loss"]) and math.isfinite(metrics["reward"])
    assert records[0]["rewards"]["reward"] is None
    assert records[0]["advantage"] == 0
    assert all(p.isfinite().all() for p in state.policy.parameters())


def test_non_finite_step_is_skipped_counted_and_ends_the_run(processor, prompts):
    state = make_state(processor, prompts_per_microbatch=4, max_bad_steps=3)
    with torch.no_grad():
        state.policy.model.lm_head.weight[300] = torch.nan
    before = parameters(state.policy)
    metrics = steps(state, prompts, 2)[-1]
    assert metrics["skipped_steps"] == 2
    for name, value in parameters(state.policy).items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num())
    assert not state.engine.optimizer.state
    with pytest.raises(TooManyBadSteps, match="3 steps in a row.*learning_rate"):
        steps(state, prompts, 1)


def test_several_iterations_clip_and_differ_from_one(processor, prompts):
    one = make_state(processor, prompts_per_microbatch=4, settings={"learning_rate": 1e-2})
    four = make_state(
        processor,
        config={"num_iterations": 4},
        settings={"learning_rate": 1e-2},
        prompts_per_microbatch=4,
    )
    first, fourth = steps(one, prompts, 1)[0], steps(four, prompts, 1)[0]
    assert first["clip_fraction_low"] == first["clip_fraction_high"] == 0
    assert fourth["clip_fraction_low"] + fourth["clip_fraction_high"] > 0
    assert largest_difference(parameters(one.policy), parameters(four.policy)) > 0


def test_truncated_completions_leave_the_loss_but_not_the_log(processor, prompts):
    """Three tokens are too few for an answer: all are cut off, so nothing is left to learn."""
    state = make_state(
        processor,
        config={"mask_truncated_completions": True, "max_completion_length": 3, "beta": 0.0},
        prompts_per_microbatch=4,
    )
    before = parameters(state.policy)
    metrics = steps(state, prompts, 1)[0]
    assert metrics["truncated_fraction"] == 1
    assert metrics["loss"] == 0
    assert largest_difference(before, parameters(state.policy)) == 0


def test_the_text_that_is_rewarded_is_the_tokens_that_were_drawn(processor, prompts):
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(c[0]["content"] for c in completions)
        return letter_count(prompts, completions)

    state = make_state(processor, reward=reward, prompts_per_microbatch=4)
    rollouts = []
    generate = state.rollout.generate
    state.rollout.generate = lambda *a, **k: rollouts.append(generate(*a, **k)) or rollouts[-1]
    train_step(state, prompts)
    (drawn,) = rollouts
    for text, ids, mask in zip(seen, drawn.completion_ids, drawn.completion_mask, strict=True):
        assert processor.tokenizer.decode(ids[mask], skip_special_tokens=True) == text


def test_each_completion_is_scored_against_its_own_solution(processor, prompts):
    seen = []

    def reward(prompts, completions, solution, **columns):
        seen.extend(zip((p[0]["content"][-1]["text"] for p in prompts), solution, strict=True))
        return letter_count(prompts, completions)

    state = make_state(processor, reward=reward, prompts_per_microbatch=2,
                       gradient_accumulation_steps=2)  # fmt: skip
    train_step(state, prompts)
    expected = [
        (prompt.sample.columns["problem"], prompt.sample.solution)
        for prompt in prompts
        for _ in range(2)
    ]
    assert seen == expected


@pytest.mark.parametrize("backend", ["native", "hf"])
def test_frozen_tower_runs_once_an_image_and_step(processor, backend):
    """In the rollout; reference, old and training passes use what came out."""
    prompts = make_prompts(processor, make_sample(0), make_sample(1))
    state = make_state(
        processor,
        config={"num_iterations": 3, "beta": 0.1},
        prompts_per_microbatch=2,
        backend=backend,
    )
    visual = state.policy.model.model.visual
    for parameter in visual.parameters():
        parameter.requires_grad_(False)
    state.policy.vision_frozen = True
    calls = []
    visual.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    train_step(state, prompts)
    assert calls == [sum(len(p.pixel_values) for p in prompts)]


def test_reward_weights_scale_the_sum(processor, prompts):
    state = make_state(processor, prompts_per_microbatch=4)
    state.reward_weights = [0.5]
    metrics, records = train_step(state, prompts)
    assert metrics["reward"] == pytest.approx(0.5 * metrics["rewards/reward"], rel=1e-5)


ADVANTAGES = [
    {"scale_rewards": "batch"}, {"advantage_estimator": "rloo"},
    {"advantage_estimator": "reinforce_pp"},
    {"multi_objective_aggregation": "normalize_then_sum"},
]  # fmt: skip


@pytest.mark.parametrize("options", ADVANTAGES, ids=lambda options: "-".join(options.values()))
def test_two_ranks_have_the_advantages_of_one_big_batch(monkeypatch, options):
    config = GRPOConfig(num_generations=4, **options)
    state = SimpleNamespace(config=config, reward_weights=[1.0, 0.5])
    by_function = torch.rand(16, 2, generator=torch.Generator().manual_seed(0))
    by_function[8:] *= 10
    by_function[3, 1], by_function[9] = math.nan, math.nan
    rewards = (by_function * torch.tensor([1.0, 0.5])).nansum(1)
    rewards[9] = math.nan
    whole = grpo._advantages(state, by_function, rewards)
    assert whole[9] == 0 and whole[8] != 0
    for rank in range(2):
        mine = slice(8 * rank, 8 * rank + 8)
        monkeypatch.setattr(grpo.dist, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(
            grpo.dist, "all_gather_object",
            lambda own: list((rewards if own.ndim == 1 else by_function).split(8)),
        )  # fmt: skip
        own = grpo._advantages(state, by_function[mine], rewards[mine])
        assert torch.equal(own, whole[mine])


def test_a_step_takes_the_estimator_and_clips_each_reward(processor, prompts):
    """Clipped, two rewards are 0.25 and 2, or 1 and 0.5. With weights 2 and 1, all sums are 2.5:
    only normalized one by one, they teach."""

    def place(completions, **columns):
        return [float(i % 2) for i in range(len(completions))]

    def other(completions, **columns):
        return [0.5 if value else 3.0 for value in place(completions)]

    config = {"reward_clip": [0.25, 2.0], "beta": 0.0}
    for aggregation, silent in (("sum_then_normalize", 1.0), ("normalize_then_sum", 0.0)):
        given = config | {"multi_objective_aggregation": aggregation}
        state = make_state(processor, config=given, prompts_per_microbatch=4)
        state.reward_funcs = [("place", place), ("other", other)]
        state.reward_weights = [2.0, 1.0]
        metrics, records = train_step(state, prompts)
        assert metrics["frac_reward_zero_std"] == silent
        assert [list(r["rewards"].values()) for r in records[:2]] == [[0.25, 2.0], [1.0, 0.5]]
        assert (records[1]["advantage"] > 0) is not bool(silent)


@pytest.mark.parametrize("value", [float("nan"), None, 1e308, float("-inf")], ids=str)
def test_a_reward_that_scores_nothing_stops_the_run_by_its_name(processor, prompts, value):
    state = make_state(
        processor, reward=lambda completions, **_: [value] * len(completions), max_bad_steps=3
    )
    for _ in range(2):
        train_step(state, prompts[:1])
    assert state.silent_steps == {"reward": 2}
    with pytest.raises(TooManyBadSteps, match="reward function reward gave no finite value"):
        train_step(state, prompts[:1])


def test_a_reward_that_scores_some_is_not_silent(processor, prompts):
    state = make_state(
        processor, reward=lambda completions, **_: [1.0, *[None] * (len(completions) - 1)],
        max_bad_steps=1,
    )  # fmt: skip
    train_step(state, prompts[:1])
    assert state.silent_steps == {"reward": 0}


def test_rewards_see_and_report_what_they_do_in_trl(processor, prompts):
    seen = {}

    def reward(completions, image_grid_thw, trainer_state, log_extra, log_metric, **columns):
        seen.update(grids=image_grid_thw, state=trainer_state)
        log_extra("length", [len(c[0]["content"]) for c in completions])
        log_metric("mine", 2.0)
        log_metric("mine", 4.0)
        log_metric("reward", 99.0)  # a name of ours
        return [1.0] * len(completions)

    state = make_state(processor, reward=reward, max_steps=7, num_rows=4)
    metrics, records = train_step(state, prompts[:3])
    assert metrics["mine"] == 3.0 and metrics["reward"] == 1.0
    assert [r["length"] for r in records] == [len(r["completion"]) for r in records]
    assert (seen["state"].global_step, seen["state"].max_steps, seen["state"].epoch) == (0, 7, 0)
    assert seen["grids"] == [None if p.image_grid_thw is None else p.image_grid_thw.tolist()
                             for p in prompts[:3] for _ in range(2)]  # fmt: skip


def test_a_reward_gets_only_the_shared_arguments_that_it_takes(processor, prompts):
    def reward(prompts, completions, problem, solution, completion_ids, image_grid_thw):
        return [1.0] * len(completions)

    train_step(make_state(processor, reward=reward), prompts[:1])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_shares_of_two_ranks_are_one_big_batch(processor, prompts, monkeypatch, loss_type):
    """Weights of this rank's microbatches if the other rank has as much: a token or a sequence
    counts half of what it does alone, and averaging gradients over ranks halves it once more."""
    state = make_state(processor, config={"loss_type": loss_type, "beta": 0.1})
    rollouts = state.rollout.generate(prompts, 2, grpo._sampling(state))
    advantages = torch.linspace(-1, 1, len(rollouts.texts))
    microbatches = grpo.make_microbatches(state, rollouts, advantages, grpo.StepStats())
    alone = grpo._shares(state, microbatches, rollouts)
    monkeypatch.setattr(grpo.dist, "world_size", lambda: 2)
    monkeypatch.setattr(grpo.dist, "all_reduce_sum", lambda counts: counts * 2)
    shared = grpo._shares(state, microbatches, rollouts)
    # Averaged over two ranks, 2 * (scale / num_items) / 2 has to be half of what it is alone.
    for (one, scale), (two, shared_scale) in zip(alone, shared, strict=True):
        factor = shared_scale / (two.num_items or 1) / 2
        assert factor == pytest.approx(scale / (one.num_items or 1) / 2)
    if alone[0][0].num_items is None:
        assert sum(scale for _, scale in alone) == pytest.approx(1)
    else:
        assert alone[0][0].num_items == int(rollouts.completion_mask.sum())


def test_truncated_completions_are_not_counted_where_they_are_masked(processor, prompts):
    config = {"mask_truncated_completions": True, "loss_type": "dapo"}
    state = make_state(processor, config=config)
    rollouts = state.rollout.generate(prompts, 2, grpo._sampling(state))
    rollouts = replace(rollouts, truncated=torch.arange(len(rollouts.texts)) % 2 == 0)
    microbatches = grpo.make_microbatches(
        state, rollouts, torch.ones(len(rollouts.texts)), grpo.StepStats()
    )
    ((args, _), *_) = grpo._shares(state, microbatches, rollouts)
    kept = rollouts.completion_mask[1::2]
    assert args.num_items == int(kept.sum()) < int(rollouts.completion_mask.sum())


def test_tokens_of_truncated_completions_are_counted_as_drawn(processor, prompts):
    config = {"max_completion_length": 3, "mask_truncated_completions": True, "beta": 0.0}
    state = make_state(processor, config=config, prompts_per_microbatch=4)
    metrics, _ = train_step(state, prompts)
    assert metrics["truncated_fraction"] == 1
    assert metrics["num_tokens"] == state.num_tokens == 3 * 8


def test_a_long_gradient_is_shortened(processor, prompts, monkeypatch):
    state = make_state(processor, prompts_per_microbatch=4, settings={"max_grad_norm": 1e-3})
    optimizer, lengths = state.engine.optimizer, []
    step = optimizer.step

    def measured():
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        lengths.append(float(torch.nn.utils.get_total_norm([g for g in grads if g is not None])))
        step()

    monkeypatch.setattr(optimizer, "step", measured)
    metrics, _ = train_step(state, prompts)
    assert metrics["grad_norm"] > 1e-2 and lengths == [pytest.approx(1e-3, rel=1e-3)]


def test_every_step_draws_anew(processor, prompts, monkeypatch):
    state = make_state(processor, prompts_per_microbatch=4)
    generate, seeds = state.rollout.generate, []

    def noted(prompts, num_generations, sampling, **more):
        seeds.append(sampling.seed)
        return generate(prompts, num_generations, sampling, **more)

    monkeypatch.setattr(state.rollout, "generate", noted)
    for _ in range(3):
        train_step(state, prompts)
    assert len(set(seeds)) == 3


def test_a_gradient_that_is_not_finite_is_never_applied(processor, prompts):
    """The loss is finite, its gradient is not."""
    state = make_state(processor, prompts_per_microbatch=4)
    weight = state.policy.model.lm_head.weight
    hook = weight.register_hook(lambda gradient: gradient * math.inf)
    before = parameters(state.policy)
    metrics, _ = train_step(state, prompts)
    assert math.isfinite(metrics["loss"]) and metrics["skipped_steps"] == 1
    assert largest_difference(before, parameters(state.policy)) == 0
    hook.remove()
    train_step(state, prompts)
    assert largest_difference(before, parameters(state.policy)) > 0


def test_another_ranks_loss_that_is_not_finite_skips_the_step(processor, prompts, monkeypatch):
    state = make_state(processor, prompts_per_microbatch=4)
    before, asked = parameters(state.policy), []

    def any_rank(flag, device="cpu"):
        asked.append(flag)
        return True

    monkeypatch.setattr(grpo.dist, "any_rank", any_rank)
    metrics, _ = train_step(state, prompts)
    assert asked == [False] and metrics["skipped_steps"] == 1
    assert largest_difference(before, parameters(state.policy)) == 0


def test_a_good_step_ends_a_row_of_bad_ones(processor, prompts):
    state = make_state(processor, prompts_per_microbatch=4, max_bad_steps=2)
    weight = state.policy.model.lm_head.weight
    for _ in range(3):
        hook = weight.register_hook(lambda gradient: gradient * math.inf)
        train_step(state, prompts)
        assert state.bad_steps == 1
        hook.remove()
        train_step(state, prompts)
        assert state.bad_steps == 0
    assert state.skipped_steps == 3


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("frac_reward_zero_std", 1.0, "equal rewards in the last 20 steps"),
        ("truncated_fraction", 0.95, "more than 90% of the completions"),
    ],
)
def test_steps_that_teach_nothing_are_warned_about(processor, caplog, metric, value, text):
    state = make_state(processor)
    quiet = {"frac_reward_zero_std": 0.75, "truncated_fraction": 0.9}
    for _ in range(19):
        grpo._count_idle(state, quiet | {metric: value})
    grpo._count_idle(state, quiet)  # one that does begins the count anew
    for _ in range(19):
        grpo._count_idle(state, quiet | {metric: value})
    assert not caplog.records
    for _ in range(30):
        grpo._count_idle(state, quiet | {metric: value})
    assert [text in record.getMessage() for record in caplog.records] == [True]
    for _ in range(40):
        grpo._count_idle(state, quiet)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("tokens", "expected"), [(16_384, 1), (60, 4)])
def test_a_step_that_fits_one_microbatch_has_one_gradient_of_the_head(
    processor, prompts, monkeypatch, tokens, expected
):
    """`--max_tokens_per_microbatch` decides; on CUDA its default is what fits, 16,384 at most."""
    buffers = []

    class Counted(linear._Head):
        def __init__(self, *args):
            super().__init__(*args)
            buffers.append(self.grad_weight)

    monkeypatch.setattr(linear, "_Head", Counted)
    state = make_state(processor, max_tokens_per_microbatch=tokens)
    train_step(state, prompts)
    assert sum(buffer is not None for buffer in buffers) == expected
