"""Two ranks are one rank with twice the batch, with every engine; and nobody waits for anybody."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import environment, largest_difference

CHILD = Path(__file__).parent / "two_ranks.py"


def steps(tmp_path, *, stage, processes, batch, kind="images"):
    """(parameters before, parameters after, metrics of each step)."""
    out = tmp_path / f"{stage}-{processes}-{kind}"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launcher, str(CHILD), str(out), str(stage), str(batch), kind],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    saved = torch.load(f"{out}.pt", weights_only=True)
    return saved["start"], saved["end"], json.loads(Path(f"{out}.json").read_text())


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
