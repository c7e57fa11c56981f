"""A run knows of its algorithm what `Algorithm` says, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from helpers import read_jsonl

from virft_fast import config
from virft_fast.algorithms import Algorithm, find_algorithm, step
from virft_fast.algorithms.base import Data
from virft_fast.train import main


@pytest.mark.parametrize("name", config.ALGORITHMS)
def test_every_algorithm_has_its_name(name):
    algorithm = find_algorithm(name)
    assert isinstance(algorithm, Algorithm) and algorithm.name == name


def test_an_algorithm_from_outside_is_a_file_and_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(config.ALGORITHMS, "toy", "toy_algorithm")
    argv = ["--algorithm", "toy", "--model_name_or_path", "tiny", "--max_steps", "3"]
    argv += ["--dataset_name", "digits_classification", "--learning_rate", "1e-3"]
    argv += ["--per_device_train_batch_size", "2", "--output_dir", str(tmp_path)]
    assert main([*argv, "--dry_run"]) == 0
    assert "solution: <answer>" in capsys.readouterr().out
    assert main(argv) == 0
    losses = [record["loss"] for record in read_jsonl(tmp_path / "metrics.jsonl")]
    assert losses[2] < losses[0]
    assert "training loss, first and last" in capsys.readouterr().out
    assert main([*argv[:1], "tor", *argv[2:]]) == 2
    assert "--algorithm: expected one of grpo, sft, dpo, toy, got 'tor'; did you mean toy?" in (
        capsys.readouterr().err
    )


def test_an_algorithm_names_its_own_flags_and_ignores_the_others():
    run = config.RunConfig(dpo=config.DPOConfig(dpo_beta=0.3), grpo=config.GRPOConfig(top_k=5))
    ignored = {name: find_algorithm(name).without_effect(run) for name in config.ALGORITHMS}
    assert ignored == {"grpo": ["dpo_beta"], "sft": ["dpo_beta", "top_k"], "dpo": ["top_k"]}
    kept = [flag for name in config.ALGORITHMS for flag in find_algorithm(name).same_on_resume]
    assert "dpo_beta" in kept and set(kept) <= run.flat().keys()


def test_what_a_loss_or_an_evaluation_needs_and_has_not_is_named():
    with pytest.raises(ValueError, match=r"reference: expected a model, got None"):
        step.reference_pass(SimpleNamespace(reference=None), None)
    data = Data(None, None, "auto", [], [], None, 1, 1)
    with pytest.raises(config.UsageError, match="expected a data set with held-out rows"):
        data.held_out  # noqa: B018
