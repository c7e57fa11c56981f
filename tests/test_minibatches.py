"""Which prompts a step uses, and in which update: dynamic sampling, curriculum, minibatches."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import fields

import pytest
import torch
from helpers import (
    CPU,
    largest_difference,
    letter_count,
    make_prompts,
    make_sample,
    make_state,
    parameters,
    read_jsonl,
)
from processes import run
from safetensors.torch import load_file
from trl.trainer.utils import RepeatSampler

from virft_fast.algorithms import grpo
from virft_fast.algorithms.groups import choose_groups, deal
from virft_fast.algorithms.grpo import train_step
from virft_fast.batch import Rollouts
from virft_fast.config import RunConfig
from virft_fast.data import PromptSampler
from virft_fast.data.demo import build_demo
from virft_fast.engine import PlainEngine
from virft_fast.rollout.records import join_groups
from virft_fast.rollout.weights import RolloutWeights
from virft_fast.train import main, parse_args
from virft_fast.train.rows import _schedule

SMALL = ["--max_completion_length", "12", "--num_generations", "4", "--learning_rate", "1e-3"]


@pytest.fixture(scope="module")
def many(processor):
    """Sixteen prompts with images of different sizes; the last of each four has none."""
    sizes = [[(56, 84)], [(84, 56)], [(56, 56), (84, 84)], []]
    return make_prompts(
        processor, *(make_sample(n, sizes[n % 4], f"Detect {n}.") for n in range(16))
    )


def equal_for(rows):
    """A reward that is the same for all completions of these rows."""

    def reward(prompts, completions, problem, **columns):
        values = letter_count(prompts, completions)
        numbers = [int(text.removeprefix("Detect ").removesuffix(".")) for text in problem]
        return [1.0 if n in rows else v for n, v in zip(numbers, values, strict=True)]

    return reward


def sampling_state(processor, prompts, rows, batch=4, config=(), **state):
    """A state that samples for `prompts`, whose `rows` get equal rewards, `batch` at a time."""
    options = {"dynamic_sampling": True, "temperature": 1.5} | dict(config)
    made = make_state(
        processor, config=options, reward=equal_for(rows), prompts_per_microbatch=2, **state
    )
    rounds = iter([prompts[n : n + batch] for n in range(0, len(prompts), batch)])
    made.more_prompts = lambda: next(rounds)
    return made


class Replay:
    """A rollout backend that returns what was sampled elsewhere."""

    def __init__(self, *rollouts):
        self.rollouts = iter(rollouts)

    def generate(self, *args, **kwargs):
        return next(self.rollouts)


def recorded(state):
    """The rollouts that the state samples, as they come."""
    generate, parts = state.rollout.generate, []

    def record(*args, **kwargs):
        parts.append(generate(*args, **kwargs))
        return parts[-1]

    state.rollout.generate = record
    return parts


def assert_same_rollouts(ours, theirs):
    for name in (entry.name for entry in fields(Rollouts)):
        one, other = getattr(ours, name), getattr(theirs, name)
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other), name
        elif name == "image_features" and one is not None:
            assert all(map(torch.equal, one, other))
        elif name == "prompts":
            assert [p.sample.index for p in one] == [p.sample.index for p in other]
        else:
            assert one == other, name


# --- Groups ------------------------------------------------------------------------------------


def test_first_groups_that_teach_are_chosen_then_the_first_of_the_others():
    """Two ranks with two prompts in a round. Order: rank 0's 0 1, rank 1's 2 3, then 4 5, 6 7."""
    rounds = [[[False, True], [False, False]], [[False, False], [True, False]]]
    # 1 and 6 teach; 0 and 2 are the first of the others. In order: 0 1 2 6.
    assert choose_groups(rounds, 0) == {0: 0, 1: 1}
    assert choose_groups(rounds, 1) == {0: 2, 2: 3}  # 2 is its first prompt, 6 its third
    # A rank may have none.
    assert choose_groups([[[False, False], [True, True]], [[False, False], [True, True]]], 0) == {}
    assert choose_groups([[[False, False], [False, False]]], 1) == {0: 2, 1: 3}


def test_choice_is_the_same_on_any_number_of_ranks():
    rng = random.Random(0)
    for _ in range(50):
        flat = [[rng.random() < 0.4 for _ in range(12)] for _ in range(rng.randint(1, 4))]
        alone = list(choose_groups([[groups] for groups in flat], 0))
        for world in (2, 3, 4):
            size = 12 // world
            rounds = [[row[r * size : (r + 1) * size] for r in range(world)] for row in flat]
            places = {}
            for rank in range(world):
                for index, place in choose_groups(rounds, rank).items():
                    which, within = divmod(index, size)
                    places[place] = which * 12 + rank * size + within
            assert [places[place] for place in range(12)] == alone
        chosen = [flat[n // 12][n % 12] for n in alone]
        assert sum(chosen) == min(12, sum(map(sum, flat))) and len(set(alone)) == 12


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_every_rank_deals_equally_many_and_all_ranks_deal_as_one(world):
    alone = deal(range(24), 4, (1, 2))
    size, together = 24 // world, [set() for _ in range(4)]
    for rank in range(world):
        places = range(rank * size, (rank + 1) * size)
        hands = deal(places, 4, (1, 2))
        assert {len(hand) for hand in hands} == {size // 4}
        for hand, total in zip(hands, together, strict=True):
            total |= {places[index] for index in hand}
    assert together == [set(hand) for hand in alone]
    assert sorted(itertools.chain(*alone)) == list(range(24))
    assert alone != deal(range(24), 4, (1, 3)) and deal(range(3), 1, (0,)) == [[0, 1, 2]]


@pytest.mark.parametrize("frozen", [False, True])
def test_joined_groups_are_what_their_rollouts_have(processor, many, frozen):
    state = make_state(processor)
    state.policy.vision_frozen = frozen
    options = grpo._sampling(state)
    parts = [state.rollout.generate(many[n : n + 2], 2, options, first_row=n) for n in (0, 2)]
    assert join_groups(parts[:1]) is parts[0] and join_groups(parts[:1], [0, 1]) is parts[0]
    joined = join_groups(parts, [3, 0])
    assert [p.sample.index for p in joined.prompts] == [3, 0]
    assert joined.texts == parts[1].texts[2:] + parts[0].texts[:2]
    assert (joined.image_features is not None) == frozen
    if frozen:
        assert torch.equal(joined.image_features[1], parts[0].image_features[0])
    for row, (part, old) in enumerate([(1, 2), (1, 3), (0, 0), (0, 1)]):
        mask = joined.completion_mask[row]
        length = int(parts[part].completion_mask[old].sum())
        assert mask.sum() == length and mask[:length].all()
        for name in ("completion_ids", "sampling_logps"):
            theirs = getattr(parts[part], name)[old, :length]
            assert torch.equal(getattr(joined, name)[row, :length], theirs)
        assert joined.truncated[row] == parts[part].truncated[old]
    nothing = join_groups(parts, [])
    assert nothing.num_sequences == len(nothing.texts) == len(nothing.completion_ids) == 0


# --- Dynamic sampling --------------------------------------------------------------------------


def test_equal_groups_are_replaced_and_the_update_is_that_of_the_chosen(processor, many):
    """Rows 0, 2, 5 are equal: 1 and 3 teach in the first round, 4 and 6 in the second, and 7 is
    left over. The update is that of a plain step on 1, 3, 4, 6."""
    state = sampling_state(processor, many[4:], {0, 2, 5}, config={"beta": 0.1})
    parts = recorded(state)
    metrics, records = train_step(state, many[:4])
    trained = [r["index"] for r in records if r["advantage"] is not None]
    assert [r["index"] for r in records] == [n for n in range(8) for _ in range(2)]
    assert trained == [1, 1, 3, 3, 4, 4, 6, 6]
    expected = {"sampling_rounds": 2, "prompts_used": 8, "prompts_wasted": 4}
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["frac_reward_zero_std"] == 3 / 8 and state.num_prompts == 8
    assert state.num_tokens == sum(int(part.completion_mask.sum()) for part in parts)

    plain = make_state(
        processor, config={"beta": 0.1, "temperature": 1.5}, prompts_per_microbatch=2
    )
    plain.rollout = Replay(join_groups(parts, [1, 3, 4, 6]))
    train_step(plain, [many[n] for n in (1, 3, 4, 6)])
    assert largest_difference(parameters(state.policy), parameters(plain.policy)) == 0
    start = make_state(processor).policy
    assert largest_difference(parameters(state.policy), parameters(start)) > 0


def test_a_later_round_draws_from_other_streams_and_repeats_itself(processor, many):
    def sampled():
        state = sampling_state(
            processor, many[:8], {0, 1, 2, 3}, config={"dynamic_sampling_max_rounds": 3}
        )
        parts = recorded(state)
        train_step(state, many[:4])
        return state, parts

    state, parts = sampled()
    assert len(parts) == 3 and parts[0].prompts == parts[1].prompts
    assert parts[0].texts != parts[1].texts
    again, same = sampled()
    assert [part.texts for part in parts] == [part.texts for part in same]
    assert largest_difference(parameters(state.policy), parameters(again.policy)) == 0
    fresh = make_state(processor, config={"temperature": 1.5})
    row = 4 * 2  # the second round's first row in the order of all
    expected = fresh.rollout.generate(many[:4], 2, grpo._sampling(fresh), first_row=row)
    assert_same_rollouts(parts[1], expected)


def test_rounds_end_and_equal_groups_fill_the_step(processor, many):
    options = {"dynamic_sampling_max_rounds": 3, "beta": 0.0}
    state = sampling_state(processor, many[4:], set(range(16)) - {6}, config=options)
    metrics, records = train_step(state, many[:4])
    assert metrics["sampling_rounds"] == 3 and metrics["prompts_wasted"] == 8
    trained = [r["index"] for r in records[::2] if r["advantage"] is not None]
    assert trained == [0, 1, 2, 6]
    assert metrics["dropped_fraction"] == 3 / 4  # nothing to learn without a KL term


def test_rows_without_rewards_are_neither_drawn_again_nor_equal(processor, many):
    """As when a server of rewards is down for a step."""
    noted = []
    state = sampling_state(processor, many[4:], (), config={"beta": 0.1}, note_equal=noted.append)
    state.reward_funcs = [("reward", lambda completions, **_: [None] * len(completions))]
    metrics, _ = train_step(state, many[:4])
    assert metrics["sampling_rounds"] == 1 and noted == [{}]


def test_a_full_step_needs_one_round(processor, many):
    """And is then a step without dynamic sampling, bit for bit."""
    one, other = (
        sampling_state(processor, [], (), config={"dynamic_sampling": on}) for on in (True, False)
    )
    ours, theirs = (train_step(state, many[:4])[0] for state in (one, other))
    assert ours["sampling_rounds"] == 1 and ours["prompts_wasted"] == 0
    assert all(ours[k] == v for k, v in theirs.items() if "time" not in k and "per_s" not in k)
    assert not {"sampling_rounds", "prompts_used", "prompts_wasted"} & theirs.keys()
    assert largest_difference(parameters(one.policy), parameters(other.policy)) == 0


def test_a_state_without_more_prompts_says_so(processor, many):
    state = make_state(
        processor,
        config={"dynamic_sampling": True},
        reward=equal_for({0}),
        prompts_per_microbatch=1,
    )
    with pytest.raises(ValueError, match="more_prompts: expected a source of prompts, got none"):
        train_step(state, many[:1])


# --- One rollout, several steps ----------------------------------------------------------------


def accumulating(processor, batch=1, accumulated=2, smooth=False, **config):
    """A state whose optimizer updates take two groups."""
    settings = {"epsilon": 1e-3, "learning_rate": 2e-3} if smooth else {}  # see test_grpo.SMOOTH
    return make_state(
        processor, config={"beta": 0.1, "temperature": 1.5} | config, settings=settings,
        prompts_per_microbatch=batch, gradient_accumulation_steps=accumulated,
    )  # fmt: skip


def test_a_rollout_of_one_step_is_what_it_is_without_the_flag(processor, many):
    one, other = accumulating(processor), accumulating(processor, steps_per_generation=2)
    for first in (0, 2):
        (ours, _), (theirs, _) = (train_step(s, many[first : first + 2]) for s in (one, other))
        assert ours.keys() == theirs.keys() and not other.pending
        assert all(theirs[k] == v for k, v in ours.items() if "time" not in k and "per_s" not in k)
    assert largest_difference(parameters(one.policy), parameters(other.policy)) == 0


def test_every_step_is_one_update_on_one_minibatch(processor, many):
    """Four prompts make two minibatches of two, and two iterations: four steps."""
    state = accumulating(processor, steps_per_generation=4, num_iterations=2)
    queue, clipped = [], []
    for number in range(4):
        before = parameters(state.policy)
        metrics, records = train_step(state, [] if number else many[:4])
        assert state.step == number + 1 and len(state.pending) == 3 - number
        # What belongs to the rollout is reported, recorded and counted once.
        assert ("reward" in metrics) == (len(records) == 8) == (number == 0)
        assert ("sampling_logp_difference" in metrics) == (number == 0)
        assert largest_difference(before, parameters(state.policy)) > 0
        queue = queue or state.pending[:]
        tokens = sum(int(batch.rollouts.completion_mask.sum()) for batch in queue[:2])
        assert metrics["num_tokens"] == state.num_tokens == tokens and state.num_prompts == 4
        clipped.append(metrics["clip_fraction_low"] + metrics["clip_fraction_high"])
    assert clipped[0] == 0 and max(clipped[1:]) > 0
    # The second iteration takes the minibatches of the first, which share no prompt.
    second, first, again = (batch.rollouts.prompts for batch in queue)
    assert again is second and len(first) == len(second) == 2
    assert {prompt.sample.index for prompt in (*first, *second)} == {0, 1, 2, 3}
    assert queue[0].microbatches is queue[2].microbatches


def test_a_step_on_a_minibatch_is_that_of_its_prompts_alone(processor, many):
    """The first minibatch: a plain step on its rollouts. The second: the same with the weights
    after the first, and the log-probs before it."""
    state = accumulating(processor, steps_per_generation=4)
    parts = recorded(state)
    minibatches = []
    fill = grpo._minibatches
    grpo._minibatches = lambda *args: minibatches.extend(fill(*args)) or minibatches[:]
    try:
        train_step(state, many[:4])
    finally:
        grpo._minibatches = fill
    old = [mb.old_logps.clone() for mb in minibatches[1].microbatches]
    plain = accumulating(processor)
    plain.rollout = Replay(minibatches[0].rollouts)
    train_step(plain, minibatches[0].rollouts.prompts)
    assert largest_difference(parameters(state.policy), parameters(plain.policy)) == 0
    start = accumulating(processor)
    with torch.no_grad():
        for mb, logps in zip(minibatches[1].microbatches, old, strict=True):
            before = start.engine.forward(mb.inputs, temperature=1.5)[0]
            now = state.engine.forward(mb.inputs, temperature=1.5)[0]
            assert torch.equal(before, logps) and (now - logps).abs().max() > 1e-4
    assert {p.sample.index for part in parts for p in part.prompts} == {0, 1, 2, 3}


def test_accumulation_within_minibatches_equals_whole_ones(processor, many):
    common = {"loss_type": "dapo", "num_iterations": 1}
    big = accumulating(processor, 2, 1, True, steps_per_generation=2, **common)
    small = accumulating(processor, 1, 2, True, steps_per_generation=4, **common)
    for number in range(2):
        (ours, _), (theirs, _) = (
            train_step(s, many[:4] if not number else []) for s in (big, small)
        )
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert largest_difference(parameters(big.policy), parameters(small.policy)) <= 1e-5


@pytest.mark.parametrize("size, accumulated, per_generation, iterations",
                         [(2, 1, 2, 1), (1, 2, 4, 2)])  # fmt: skip
def test_prompts_and_updates_are_scheduled_as_in_trl(
    processor, many, size, accumulated, per_generation, iterations, monkeypatch
):
    """TRL's sampler hands out a rollout's prompts once for each microbatch that uses the rollout.
    Its batch size counts completions, so that it is `size` prompts times the completions of each.
    """
    trl = RepeatSampler(
        range(12), mini_repeat_count=2, batch_size=size * per_generation,
        repeat_count=iterations * per_generation, shuffle=False,
    )  # fmt: skip
    rows = list(trl)
    load = size * per_generation * 2  # what its loader hands out for a microbatch
    microbatches = [sorted(set(rows[n : n + load])) for n in range(0, len(rows), load)]
    theirs = microbatches[::accumulated]  # the prompts of each update's rollout
    flags = ["--per_device_train_batch_size", size, "--gradient_accumulation_steps", accumulated,
             "--steps_per_generation", per_generation, "--num_iterations", iterations]  # fmt: skip
    num_prompts, num_steps = _schedule(parse_args([str(flag) for flag in flags]), 12)
    assert num_prompts == len(theirs[0]) and num_steps == len(theirs)

    monkeypatch.setattr(grpo, "update", lambda *args: True)  # which prompts, not how they train
    state = accumulating(
        processor, size, accumulated, steps_per_generation=per_generation,
        num_iterations=iterations, beta=0.0, max_completion_length=2,
    )  # fmt: skip
    fill, updates = grpo._minibatches, []
    monkeypatch.setattr(grpo, "_minibatches", lambda *args: updates.extend(fill(*args)) or
                        updates[-len(theirs) * num_prompts // 12 :])  # fmt: skip
    ours, first = [], 0
    for _ in range(num_steps):
        if not state.pending:
            drawn, first = list(range(first, first + num_prompts)), first + num_prompts
        train_step(state, [] if state.pending else [many[row] for row in drawn])
        ours.append(drawn)
    assert ours == theirs and not state.pending and first == 12
    trained = [[p.sample.index for p in update.rollouts.prompts] for update in updates]
    size = per_generation // accumulated  # updates of one iteration
    for number in range(0, num_steps, size):
        assert sorted(sum(trained[number : number + size], [])) == theirs[number]


# --- Curriculum --------------------------------------------------------------------------------


def epochs(sampler, count, equal):
    """The rows that the sampler hands out in each epoch, one at a time; `equal` ones teach
    nothing."""
    used = [[] for _ in range(count)]
    while True:
        (row,) = sampler.next_batch(lambda index: index, lambda v: [v], lambda *bad: None)
        epoch = sampler.state_dict()["epoch"]
        if epoch == count:
            return used
        used[epoch].append(row)
        sampler.note_equal({row: row in equal})


def test_rows_that_teach_nothing_come_less_and_less_often():
    """Row 4's count: 1 and 2 after epochs 0 and 1. With 2, it comes if (epoch + 4) % 2 == 0: in
    epoch 2. With 3, if % 3 == 0: in 5. With 4, if % 4 == 0: in 8. With 5, if % 5 == 0: in 11. Row
    5: with 2, in 3; with 3, in 4; with 4, in 7; with 5, in 10."""
    used = epochs(PromptSampler(6, 1, seed=3, curriculum=2), 12, {4, 5})
    assert all(sorted(rows)[:4] == [0, 1, 2, 3] for rows in used)
    assert [n for n, rows in enumerate(used) if 4 in rows] == [0, 1, 2, 5, 8, 11]
    assert [n for n, rows in enumerate(used) if 5 in rows] == [0, 1, 3, 4, 7, 10]


def test_a_row_that_teaches_again_is_used_as_before():
    sampler = PromptSampler(4, 1, seed=0, curriculum=1)
    sampler.note_equal({0: True, 1: True, 2: False})
    assert sampler.num_rarer == 2 and sampler.streaks() == [[0, 1], [1, 1]]
    sampler.note_equal({0: True, 1: False})
    assert sampler.streaks() == [[0, 2]]


def test_a_set_of_rows_that_all_teach_nothing_still_has_batches():
    used = epochs(PromptSampler(3, 1, seed=0, curriculum=1), 40, {0, 1, 2})
    assert all(sum(row in rows for rows in used) >= 6 for row in range(3))


def test_a_curriculum_resumes_where_it_was():
    whole, first = (PromptSampler(9, 2, seed=1, curriculum=1) for _ in range(2))

    def batches(sampler, count):
        made = []
        for _ in range(count):
            made.append(sampler.next_batch(lambda i: i, lambda v: [v], lambda *bad: None))
            sampler.note_equal({row: row % 3 == 0 for row in made[-1]})
        return made

    expected = batches(whole, 30)
    assert batches(first, 13) == expected[:13]
    state, streaks = json.loads(json.dumps([first.state_dict(), first.streaks()]))
    for upcoming in (True, False):
        second = PromptSampler(9, 2, seed=1, curriculum=1)
        second.load_state_dict(state)
        second.load_streaks(streaks)
        if upcoming:
            assert second.upcoming() == expected[13]
        assert batches(second, 17) == expected[13:]
    second.load_streaks([])  # as an earlier version's checkpoint has none
    plain = PromptSampler(9, 2, seed=1)
    plain.load_streaks(streaks)
    assert plain.num_rarer == 0 and plain.streaks() == []
    with pytest.raises(ValueError, match="curriculum: expected rows below 9, got 9"):
        second.load_streaks([[9, 1]])


# --- Whole runs --------------------------------------------------------------------------------

RUNS = {
    "dynamic": ["--dynamic_sampling", "--dynamic_sampling_max_rounds", "3", "--curriculum", "1"],
    "minibatches": ["--steps_per_generation", "3", "--num_iterations", "2"],
}
# Rewards, advantages and corrections of the sampler: each needs nothing of earlier steps.
FILTERED = ["--top_k=3", "--temperature=1.5", "--importance_sampling_correction",
            "--importance_sampling_clip_min=0.7", "--importance_sampling_mode"]  # fmt: skip
OPTIONS = {
    "rloo": ["--advantage_estimator", "rloo", "--reward_clip", "0.5", "1.7", *FILTERED,
             "token_truncate"],
    "reinforce_pp": ["--advantage_estimator", "reinforce_pp", *FILTERED, "sequence_truncate"],
    "gdpo": ["--multi_objective_aggregation", "normalize_then_sum", *FILTERED, "token_mask"],
    "bf16": ["--bf16", "--importance_sampling_clip_max", "1"],  # sequence_mask
}  # fmt: skip


def comparable(path):
    return [{k: v for k, v in record.items() if "time" not in k and "per_s" not in k}
            for record in read_jsonl(path)]  # fmt: skip


def resume_in_the_middle(digits, folder, *flags):
    """Run, and resume from its first checkpoint: same records and weights, bit for bit.

    Returns:
        The metrics, and the steps with checkpoints.
    """
    whole, rest = folder / "whole", folder / "rest"
    argv = ["--dataset_name", str(digits), *SMALL, *flags]
    assert main([*argv, "--output_dir", str(whole)]) == 0
    saved = sorted(int(path.name.split("-")[1]) for path in whole.glob("checkpoint-*"))
    middle = whole / f"checkpoint-{saved[0]}"
    again = [*argv, "--output_dir", str(rest), "--resume_from_checkpoint", str(middle)]
    assert main(again) == 0
    for records in ("metrics.jsonl", "completions.jsonl"):
        expected = [record for record in comparable(whole / records) if record["step"] > saved[0]]
        assert expected and comparable(rest / records) == expected
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (whole, rest))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    return comparable(whole / "metrics.jsonl"), saved


@pytest.mark.parametrize("name", RUNS)
def test_resumed_run_equals_the_uninterrupted_one(digits, tmp_path, name):
    flags = ["--max_steps", "8", "--save_steps", "4", "--reward_funcs", "accuracy", *RUNS[name]]
    metrics, saved = resume_in_the_middle(digits, tmp_path, *flags)
    # With six steps a rollout: the first rollout that ends at 4 or later. Step 8 is in the second.
    assert saved == ([4, 8] if name == "dynamic" else [6])
    if name == "dynamic":
        used = sum(record["prompts_used"] for record in metrics)
        assert metrics[-1]["epoch"] == used / 24 and used > 8 and metrics[-1]["rarer_rows"] > 0
        state = tmp_path / "whole/checkpoint-4/trainer_state.json"
        streaks = json.loads(state.read_text())["curriculum"]
        assert streaks and all(count >= 1 for _, count in streaks)
    else:
        rolled = [record["step"] for record in metrics if "reward" in record]
        assert rolled == [1, 7] and metrics[-1]["epoch"] == 6 / 24


@pytest.mark.parametrize("name", OPTIONS)
def test_resumed_run_with_the_options_equals_the_uninterrupted_one(
    digits, tmp_path, monkeypatch, name
):
    made = PlainEngine.__init__

    def with_copy(self, policy, *args, **options):
        made(self, policy, *args, **options)
        if self.bf16:  # as on a GPU
            self._copy = RolloutWeights(policy, device=CPU, dtype=torch.bfloat16)

    monkeypatch.setattr(PlainEngine, "__init__", with_copy)
    reward = tmp_path / "mine.py"
    reward.write_text(
        "def letters(completions, **columns):\n"
        "    return [len(set(c[0]['content'])) / 10 for c in completions]\n"
    )
    flags = ["--max_steps", "4", "--save_steps", "2", "--per_device_train_batch_size", "2",
             "--beta", "0", "--reward_funcs", "accuracy", f"{reward}:letters"]  # fmt: skip
    metrics, saved = resume_in_the_middle(digits, tmp_path, *flags, *OPTIONS[name])
    assert saved == [2, 4] and all(record["grad_norm"] > 0 for record in metrics)
    if name == "bf16":
        assert metrics[-1]["sampling_logp_difference"] > 1e-4
    else:
        assert 0.5 < metrics[-1]["sampling_kept_mass"] < 0.98


def test_two_processes_use_the_rows_of_a_curriculum_that_one_does(tmp_path):
    """Rows 0 to 5 in each epoch; from the second on, those whose answers got equal rewards rest in
    turns."""
    data = tmp_path / "data"
    build_demo("digits_classification", data, num_train=6, num_test=1)
    out = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        argv = ["--dataset_name", data, "--output_dir", folder, *SMALL, "--max_steps", 6,
                "--reward_funcs", "accuracy", "--curriculum", 1, "--save_steps", 6,
                "--adam_epsilon", 1e-3,
                "--per_device_train_batch_size", 2 // processes]  # fmt: skip
        if processes == 1:
            assert main([str(word) for word in argv]) == 0
        else:
            done = run(*argv, processes=processes)
            assert done.returncode == 0, done.stderr[-3000:]
        state = json.loads((folder / "checkpoint-6/trainer_state.json").read_text())
        out[processes] = (
            comparable(folder / "metrics.jsonl"), comparable(folder / "completions.jsonl"),
            load_file(folder / "model.safetensors"), state["curriculum"], state["sampler"],
        )  # fmt: skip
    for alone, together in zip(out[1][0], out[2][0], strict=True):
        assert together["rarer_rows"] == alone["rarer_rows"]
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-3, abs=1e-6)
    assert largest_difference(out[1][2], out[2][2]) <= 1e-5
    assert out[2][1] == out[1][1] and out[2][3:] == out[1][3:] and out[1][3]
    rows = [record["index"] for record in out[1][1][::4]]
    assert sorted(rows[:6]) == [*range(6)] != sorted(rows[6:])


def test_what_does_not_fit_is_named_and_an_epoch_has_whole_rollouts(capsys):
    flags = ["--gradient_accumulation_steps", "2", "--steps_per_generation"]
    with pytest.raises(
        ValueError, match="expected a multiple of --gradient_accumulation_steps 2, got 3"
    ):
        _schedule(parse_args([*flags, "3"]), 10)
    # 4 prompts a rollout and two steps: 10 rows are three rollouts.
    assert _schedule(parse_args([*flags, "4"]), 10) == (4, 6)
    assert _schedule(parse_args([*flags, "4", "--algorithm", "sft"]), 10) == (2, 5)
    assert _schedule(RunConfig(), 10) == (1, 10)
    assert main(["--generation_batch_size", "8"]) == 2
    assert "pass --steps_per_generation" in capsys.readouterr().err
