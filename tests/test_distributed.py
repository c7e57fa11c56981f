"""Two ranks are one rank with twice the batch, with every engine; and nobody waits for anybody."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import largest_difference
from processes import run

OPTIONS = ("rloo", "reinforce_pp", "gdpo", "bf16")
# (ZeRO stage, kind of run), see two_ranks.py, by the number of processes.
RUNS = {
    1: [(-1, kind) for kind in ("images", "lora", "4bit", "dropped", "frozen", "sft", "rounds",
                                *OPTIONS)],
    # ZeRO-3 replaces torch's linear layers until the process ends, which rounds bfloat16 otherwise.
    2: [*((-1, kind) for kind in OPTIONS), (-1, "images"), (-1, "4bit"), (0, "images"),
        (3, "images"), (3, "lora"), (3, "mixed"), (0, "nan"), (3, "nan"), (-1, "dropped"),
        (0, "dropped"), (2, "dropped"), (3, "dropped"), (3, "frozen"), (3, "sft"), (-1, "rounds"),
        (3, "rounds")],
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By the number of processes, of each run: parameters before and after, and what was noted of
    the steps. All of them in one start of that many processes."""
    folder, results = tmp_path_factory.mktemp("ranks"), {}
    for processes, runs in RUNS.items():
        out = folder / str(processes)
        names = [f"{stage}:{kind}" for stage, kind in runs]
        done = run(out, 8 // processes, *names, module="two_ranks", processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        for stage, kind in runs:
            saved = torch.load(f"{out}-{stage}-{kind}.pt", weights_only=True)
            noted = json.loads(Path(f"{out}-{stage}-{kind}.json").read_text())
            results[processes, stage, kind] = (saved["start"], saved["end"], noted)
    return results


def assert_metrics_equal(ours, theirs, *names):
    for one, other in zip(ours["metrics"], theirs["metrics"], strict=True):
        for name in names:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("stage", [-1, 0, 3])
def test_two_ranks_equal_one_rank_with_twice_the_batch(results, stage):
    start, end, noted = results[2, stage, "images"]
    _, expected, alone = results[1, -1, "images"]
    assert largest_difference(start, end) > 1e-4
    assert largest_difference(end, expected) <= 1e-5
    names = ("loss", "reward", "kl", "entropy", "grad_norm", "num_tokens")
    assert_metrics_equal(noted, alone, *names)


@pytest.mark.parametrize(("stage", "kind"), [(3, "lora"), (-1, "4bit")])
def test_two_ranks_train_an_adapter_as_one_plain_rank(results, stage, kind):
    """With gradient checkpointing, and the model without its adapter as the reference."""
    one, two = results[1, -1, kind], results[2, stage, kind]
    assert one[0].keys() == two[0].keys() and largest_difference(one[0], two[0]) == 0
    assert largest_difference(one[0], one[1]) > 1e-4
    assert largest_difference(one[1], two[1]) <= 1e-5
    assert_metrics_equal(two[2], one[2], "loss", "reward", "kl", "grad_norm")


def test_a_rank_without_images_hangs_nobody(results):
    start, end, _ = results[2, 3, "mixed"]
    assert largest_difference(start, end) > 0


@pytest.mark.parametrize("stage", [0, 3])
def test_non_finite_loss_on_one_rank_skips_the_step_on_all(results, stage):
    start, end, noted = results[2, stage, "nan"]
    assert largest_difference(start, end) == 0
    assert [m["skipped_steps"] for m in noted["metrics"]] == [1, 2, 3]


@pytest.mark.parametrize(
    "stage, kind", [(-1, "dropped"), (0, "dropped"), (2, "dropped"), (3, "dropped"), (3, "frozen")]
)
def test_ranks_with_unequal_microbatches_and_dropped_groups(results, stage, kind):
    """A rank with nothing to learn from, or less than the other one, goes along with empty
    microbatches: nobody hangs, and the parameters are one rank's with all the data."""
    start, end, noted = results[2, stage, kind]
    begin, expected, alone = results[1, -1, kind]
    assert largest_difference(start, begin) == 0
    assert largest_difference(end, expected) <= 1e-5
    moved = {name for name in end if not torch.equal(start[name], end[name])}
    assert moved and (kind == "frozen") != any("visual" in name for name in moved)
    names = ("loss", "reward", "entropy", "grad_norm", "num_tokens", "dropped_fraction")
    assert_metrics_equal(noted, alone, *names)
    own = [[rank[step][0] for rank in noted["plans"]] for step in range(3)]
    made = [[rank[step][1] for rank in noted["plans"]] for step in range(3)]
    assert own[0][1] == 0 and own[2][0] == 0 and 0 < own[1][1] < own[1][0]
    assert own[0][0] > 2 and made == [[max(step)] * 2 for step in own]


@pytest.mark.parametrize("stage", [-1, 3])
def test_rounds_and_minibatches_of_two_ranks_are_those_of_one(results, stage):
    """Three of rank 0's groups of the first round teach, and all eight of rank 1's; of the second
    round, the first five that teach: two of rank 0's and three of rank 1's."""
    start, end, noted = results[2, stage, "rounds"]
    _, expected, alone = results[1, -1, "rounds"]
    assert largest_difference(start, end) > 1e-4
    assert largest_difference(end, expected) <= 1e-5
    assert_metrics_equal(noted, alone, "loss", "grad_norm", "num_tokens")
    assert_metrics_equal(
        {"metrics": noted["metrics"][::2]}, {"metrics": alone["metrics"][::2]},
        "reward", "frac_reward_zero_std", "sampling_rounds", "prompts_used", "prompts_wasted",
    )  # fmt: skip
    assert [m["sampling_rounds"] for m in noted["metrics"][::2]] == [2, 2]
    rows = sorted(alone["chosen"][0][0])
    assert rows == sorted(sum((rank[0] for rank in noted["chosen"]), []))
    assert noted["chosen"][0][0] == [5, 6, 7, 22, 23]
    assert noted["chosen"][1][0] == [*range(8, 16), 24, 25, 26]


@pytest.mark.parametrize("kind", OPTIONS)
def test_two_ranks_take_the_same_steps_with_the_options(results, kind):
    """Estimators of advantages, whose std is over all ranks; clipped rewards; the correction in its
    four modes, of filtered draws and of draws in bfloat16."""
    start, end, noted = results[2, -1, kind]
    begin, expected, alone = results[1, -1, kind]
    assert largest_difference(start, begin) == 0 and largest_difference(start, end) > 1e-4
    assert largest_difference(end, expected) <= 1e-5
    names = ("loss", "reward", "rewards/letters", "rewards/length", "entropy", "grad_norm",
             "num_tokens", "sampling_logp_difference", "sampling_ratio_max")  # fmt: skip
    assert_metrics_equal(noted, alone, *names)
    last = noted["metrics"][-1]
    if kind == "bf16":
        assert last["sampling_logp_difference"] > 1e-4
    else:
        assert_metrics_equal(noted, alone, "sampling_kept_mass")
        assert 0.2 < last["sampling_kept_mass"] < 0.9


def test_fine_tuning_with_a_frozen_tower_and_unequal_microbatches_hangs_nobody(results):
    """Nobody knows the tower's features beforehand, so that the rank with fewer microbatches goes
    through the tower, too."""
    start, end, noted = results[2, 3, "sft"]
    _, expected, alone = results[1, -1, "sft"]
    assert largest_difference(start, end) > 1e-4
    assert largest_difference(end, expected) <= 1e-5
    assert_metrics_equal(noted, alone, "loss")
