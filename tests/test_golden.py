"""The first losses of the tiny run, as they were when each completion computed its own prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from virft_fast import train
from virft_fast.rollout.sampling import make_rollouts

GOLDEN = Path(__file__).parent / "golden"
ARGUMENTS = ["--config", str(GOLDEN.parents[1] / "virft_fast/demo.yaml"), "--eval_samples", "8"]


class Replay:
    """A rollout that draws what was drawn when the losses were recorded."""

    def __init__(self, rollout, steps):
        self.rollout, self.steps = rollout, iter(steps)

    def generate(self, prompts, num_generations, sampling, *, first_row=0):
        if num_generations == 1:  # an evaluation
            return self.rollout.generate(prompts, num_generations, sampling, first_row=first_row)
        tokenizer = self.rollout.tokenizer
        rows = [torch.tensor(row) for row in next(self.steps)["completions"]]
        tokens = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=tokenizer.pad_token_id
        )
        stop_ids = [tokenizer.eos_token_id]
        logps = torch.zeros(tokens.shape)
        return make_rollouts(prompts, num_generations, tokens, logps, stop_ids, tokenizer, None)


@pytest.mark.parametrize("sharing", ["on", "off"])
def test_first_losses_of_the_tiny_run(monkeypatch, tmp_path, sharing):
    expected = json.loads((GOLDEN / "demo.json").read_text())
    make_rollout = train.model.make_rollout

    def replay(*args, **kwargs):
        return Replay(make_rollout(*args, **kwargs), expected)

    monkeypatch.setattr(train.model, "make_rollout", replay)
    argv = [*ARGUMENTS, "--max_steps", str(len(expected)), "--prefix_sharing", sharing]
    assert train.main([*argv, "--output_dir", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == len(expected)
    for got, step in zip(steps, expected, strict=True):
        assert got["reward"] == pytest.approx(step["reward"], abs=1e-6)
        assert got["loss"] == pytest.approx(step["loss"], abs=1e-6)
        assert got["kl"] == pytest.approx(step["kl"], abs=1e-6)
        assert got["entropy"] == pytest.approx(step["entropy"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-3)
