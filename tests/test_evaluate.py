"""Held-out evaluation: same numbers on any number of ranks, and measures worked out by hand."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import read_jsonl, run

from virft_fast.data.demo import build_demo
from virft_fast.evaluate import main
from virft_fast.evaluation.scoring import average_precision, task_measures


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "shapes"
    build_demo("shapes_detection", path, num_train=2, num_test=5)
    return path


def evaluate(shapes, output, **options):
    argv = ["--dataset_name", shapes, "--output", output, "--batch_size", 2,
            "--max_completion_length", 48]  # fmt: skip
    return run(*argv, module="virft_fast.evaluate", **options)


def test_two_ranks_give_what_one_gives(shapes, tmp_path):
    for processes in (1, 2):
        done = evaluate(shapes, tmp_path / f"{processes}.jsonl", processes=processes)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "accuracy_iou" in done.stdout
    one, two = (read_jsonl(tmp_path / f"{n}.jsonl") for n in (1, 2))
    assert one == two and [record["index"] for record in one] == list(range(5))
    summary = json.loads((tmp_path / "1.summary.json").read_text())
    assert summary["num_samples"] == 5
    assert set(summary["means"]) >= {"accuracy_iou", "format", "mean_iou", "ap50"}


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--split", "dev"], "train, test"),
        (["--model_name_or_path", "nothing-here"], "--model_name_or_path"),
        (["--max_sample", "2"], "--max_samples"),
        (["--reward_funcs", "acuracy"], "accuracy"),
        (["--rollout_cache_tokens", "256"], "expected at most 256"),
    ],
)
def test_bad_arguments_say_what_was_expected(shapes, capsys, argv, text):
    assert main(["--dataset_name", str(shapes), *argv]) == 2
    assert text in capsys.readouterr().err


def answer(*boxes):
    items = [{"Position": box, "Confidence": confidence} for box, confidence in boxes]
    return f"<answer>{json.dumps(items)}</answer>"


def test_detection_measures_by_hand():
    """Two images with one true box each. Predictions by confidence: 0.9 hit, 0.8 miss, 0.7 hit:
    precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1. Interpolated: 1 up to recall 0.5 (51 of the 101
    points), 2/3 beyond (50 points)."""
    box, far = [0, 0, 100, 100], [500, 500, 600, 600]
    records = [
        {"completion": answer((box, 0.9), (far, 0.8)), "solution": answer((box, 1))},
        {"completion": answer((box, 0.7)), "solution": answer((box, 1))},
    ]
    measures = task_measures("detection", records)
    assert measures["ap50"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert measures["mean_iou"] == pytest.approx(1.0)
    assert set(task_measures("grounding", records)) == {"mean_iou"}
    assert task_measures("classification", records) == {}


def test_unreadable_answers_find_nothing():
    records = [{"completion": "what?", "solution": answer(([0, 0, 9, 9], 1))}]
    assert task_measures("detection", records) == {"ap50": 0.0, "mean_iou": 0.0}


def test_average_precision_of_nothing_is_zero():
    assert average_precision(torch.zeros(0), torch.zeros(0, dtype=torch.bool), 3) == 0
