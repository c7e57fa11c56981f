"""Two ranks are one rank with twice the batch, with every engine; and nobody waits for anybody."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import largest_difference
from processes import run


def run_all(tmp_path, *runs, processes, batch):
    """Of each (stage, kind): parameters before and after, and what was noted of the steps."""
    out = tmp_path / str(processes)
    names = [f"{stage}:{kind}" for stage, kind in runs]
    done = run(out, batch, *names, module="two_ranks", processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {}
    for stage, kind in runs:
        saved = torch.load(f"{out}-{stage}-{kind}.pt", weights_only=True)
        noted = json.loads(Path(f"{out}-{stage}-{kind}.json").read_text())
        results[stage, kind] = (saved["start"], saved["end"], noted)
    return results


def steps(tmp_path, *, stage, processes, batch, kind="images"):
    """(parameters before, parameters after, metrics of each step)."""
    results = run_all(tmp_path, (stage, kind), processes=processes, batch=batch)
    start, end, noted = results[stage, kind]
    return start, end, noted["metrics"]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return steps(tmp_path_factory.mktemp("one"), stage=-1, processes=1, batch=8)


@pytest.mark.parametrize("stage", [-1, 0, 3])
def test_two_ranks_equal_one_rank_with_twice_the_batch(tmp_path, one_rank, stage):
    start, end, metrics = steps(tmp_path, stage=stage, processes=2, batch=4)
    _, expected, expected_metrics = one_rank
    assert largest_difference(start, end) > 1e-4
    assert largest_difference(end, expected) <= 1e-5
    for ours, theirs in zip(metrics, expected_metrics, strict=True):
        for name in ("loss", "reward", "kl", "entropy", "grad_norm", "num_tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def test_lora_under_zero3_equals_one_plain_rank(tmp_path):
    """With gradient checkpointing, and the model without its adapter as the reference."""
    one = steps(tmp_path, stage=-1, processes=1, batch=8, kind="lora")
    two = steps(tmp_path, stage=3, processes=2, batch=4, kind="lora")
    assert one[0].keys() == two[0].keys() and largest_difference(one[0], two[0]) == 0
    assert largest_difference(one[0], one[1]) > 1e-4
    assert largest_difference(one[1], two[1]) <= 1e-5
    for ours, theirs in zip(two[2], one[2], strict=True):
        for name in ("loss", "reward", "kl", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("stage", [3])
def test_a_rank_without_images_hangs_nobody(tmp_path, stage):
    start, end, _ = steps(tmp_path, stage=stage, processes=2, batch=4, kind="mixed")
    assert largest_difference(start, end) > 0


@pytest.mark.parametrize("stage", [0, 3])
def test_non_finite_loss_on_one_rank_skips_the_step_on_all(tmp_path, stage):
    start, end, metrics = steps(tmp_path, stage=stage, processes=2, batch=4, kind="nan")
    assert largest_difference(start, end) == 0
    assert [m["skipped_steps"] for m in metrics] == [1, 2, 3]


def test_ranks_with_unequal_microbatches_and_dropped_groups(tmp_path):
    """A rank with nothing to learn from, or less than the other one, goes along with empty
    microbatches: nobody hangs, and the parameters are one rank's with all the data."""
    one = run_all(tmp_path, (-1, "dropped"), (-1, "frozen"), processes=1, batch=8)
    runs = [(-1, "dropped"), (0, "dropped"), (2, "dropped"), (3, "dropped"), (3, "frozen")]
    two = run_all(tmp_path, *runs, processes=2, batch=4)
    for (stage, kind), (start, end, noted) in two.items():
        begin, expected, alone = one[-1, kind]
        assert largest_difference(start, begin) == 0
        assert largest_difference(end, expected) <= 1e-5, (stage, kind)
        moved = {name for name in end if not torch.equal(start[name], end[name])}
        assert moved and (kind == "frozen") != any("visual" in name for name in moved)
        for ours, theirs in zip(noted["metrics"], alone["metrics"], strict=True):
            for name in ("loss", "reward", "entropy", "grad_norm", "num_tokens",
                         "dropped_fraction"):  # fmt: skip
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
        own = [[rank[step][0] for rank in noted["plans"]] for step in range(3)]
        made = [[rank[step][1] for rank in noted["plans"]] for step in range(3)]
        assert own[0][1] == 0 and own[2][0] == 0 and 0 < own[1][1] < own[1][0]
        assert own[0][0] > 2 and made == [[max(step)] * 2 for step in own]


def test_fine_tuning_with_a_frozen_tower_and_unequal_microbatches_hangs_nobody(tmp_path):
    """Nobody knows the tower's features beforehand, so that the rank with fewer microbatches goes
    through the tower, too."""
    one = steps(tmp_path, stage=-1, processes=1, batch=8, kind="sft")
    start, end, metrics = steps(tmp_path, stage=3, processes=2, batch=4, kind="sft")
    assert largest_difference(start, end) > 1e-4
    assert largest_difference(end, one[1]) <= 1e-5
    for ours, theirs in zip(metrics, one[2], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3, abs=1e-5)
