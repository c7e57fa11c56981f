"""`--algorithm sft`: the cross entropy of the rows' own answers, by the engine of GRPO."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import CPU, largest_difference, make_state, parameters
from torch.nn import functional as F

from virft_fast.algorithms import sft
from virft_fast.batch import Sample
from virft_fast.data.loading import taught_answer
from virft_fast.rollout.sampling import make_rollouts
from virft_fast.train import main


@pytest.mark.parametrize(
    "columns, expected",
    [
        ({}, "<answer>cat</answer>"),
        ({"completion": "It is a cat."}, "It is a cat."),
        ({"completion": [{"role": "assistant", "content": "A cat."}]}, "A cat."),
        ({"completion": ""}, "<answer>cat</answer>"),
        ({"completion": [3]}, "<answer>cat</answer>"),
    ],
)
def test_what_is_learnt(columns, expected):
    assert taught_answer(Sample(0, (), (), "<answer>cat</answer>", columns)) == expected


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_loss_and_gradient_are_those_of_plain_cross_entropy(processor, prompts, monkeypatch):
    """Against transformers' own logits, sample by sample, prompt masked."""
    state = make_state(processor, prompts_per_microbatch=4)
    model = state.policy.model
    total, count = 0.0, 0
    for prompt in prompts:
        answer = sft.answer_ids(processor.tokenizer, taught_answer(prompt.sample))
        inputs = state.policy.collate(
            [prompt], [[answer]], pad_token_id=0, device=CPU, packed=False
        )
        hidden = state.policy._completion_hidden(inputs, state.policy.image_features(inputs))
        total = total + F.cross_entropy(model.lm_head(hidden), answer, reduction="sum")
        count += len(answer)
    (total / count).backward()
    expected = gradients(state.policy)
    state.policy.zero_grad(set_to_none=True)
    seen = {}

    def stop(learning_rate, *, veto=False):
        seen.update(gradients(state.policy))
        return step(learning_rate, veto=veto)

    step = state.engine.step
    monkeypatch.setattr(state.engine, "step", stop)
    metrics, records = sft.train_step(state, prompts)
    assert records == []
    assert metrics["loss"] == pytest.approx(float(total) / count, abs=1e-5)
    assert metrics["num_tokens"] == count
    assert seen.keys() == expected.keys()
    together = torch.cat([seen[n].flatten() - expected[n].flatten() for n in seen])
    assert together.norm() / torch.cat([g.flatten() for g in expected.values()]).norm() <= 1e-5


def test_accumulation_equals_one_big_batch(processor, prompts):
    settings = {"epsilon": 1e-3, "learning_rate": 2e-3}
    big = make_state(processor, settings=settings, prompts_per_microbatch=4)
    small = make_state(processor, settings=settings, gradient_accumulation_steps=4)
    losses = [[sft.train_step(s, prompts)[0]["loss"] for _ in range(3)] for s in (big, small)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] < losses[0][0]
    assert largest_difference(parameters(big.policy), parameters(small.policy)) <= 1e-5


def sft_run(digits, out, *more):
    """The status of a run."""
    argv = [
        "--algorithm", "sft", "--dataset_name", digits, "--max_completion_length", 64,
        "--per_device_train_batch_size", 8, "--learning_rate", 1e-3, "--lr_scheduler_type",
        "constant", "--output_dir", out, *more,
    ]  # fmt: skip
    return main([str(word) for word in argv])


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_fine_tuning_then_grpo_from_its_checkpoint(digits, tmp_path, capsys):
    out = tmp_path / "sft"
    assert sft_run(digits, out, "--max_steps", 6) == 0
    losses = [record["loss"] for record in read_metrics(out)]
    assert len(losses) == 6 and losses[-1] < 0.5 * losses[0]
    shown = capsys.readouterr().out
    assert "training loss, first and last 1 record(s)\n" in shown
    assert "6 steps are too few to tell a change from noise" in shown
    assert (out / "report.png").is_file()
    more = ["--dataset_name", str(digits), "--max_steps", "1", "--num_generations", "2"]
    after = tmp_path / "grpo"
    argv = ["--model_name_or_path", str(out), *more, "--max_completion_length", "48"]
    assert main([*argv, "--output_dir", str(after)]) == 0
    assert "reward" in read_metrics(after)[0]


def test_resume_goes_on_bit_for_bit(digits, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    steps = ["--save_steps", 2, "--max_steps"]
    assert sft_run(digits, whole, *steps, 4) == 0
    assert sft_run(digits, halves, *steps, 2) == 0
    assert sft_run(digits, halves, *steps, 4, "--resume_from_checkpoint", "latest") == 0
    one, two = ([(r["loss"], r["grad_norm"]) for r in read_metrics(f)] for f in (whole, halves))
    assert one == two


@pytest.mark.parametrize("token", ["<|im_end|>", "<|endoftext|>", "<|image_pad|>"])
def test_an_answer_with_a_control_token_is_a_bad_row(processor, token):
    for solution, columns in ((f"<answer>a{token}</answer>", {}), ("a", {"completion": token})):
        reason = sft.check_answer(processor.tokenizer, 64, Sample(0, (), (), solution, columns))
        assert f"holds the special token {token}" in reason


def test_text_markers_are_taught_and_read_back(processor, prompts):
    """What is taught is what a rollout of the same tokens gives to rewards and records."""
    text = "<answer><|box_start|>(1,2),(30,40)<|box_end|></answer>"
    tokenizer = processor.tokenizer
    assert sft.check_answer(tokenizer, 64, Sample(0, (), (), text, {})) is None
    ids = sft.answer_ids(tokenizer, text)[None]
    logps = torch.zeros(ids.shape)
    drawn = make_rollouts(prompts[:1], 1, ids, logps, [tokenizer.eos_token_id], tokenizer, None)
    assert drawn.texts == (text,)


def test_an_answer_that_does_not_fit_is_a_bad_row(digits, tmp_path, capsys):
    more = ["--max_completion_length", 2, "--max_steps", 1, "--max_bad_rows", 3]
    assert sft_run(digits, tmp_path / "out", *more) == 2  # before the model is loaded
    assert "more than --max_completion_length N; raise it" in capsys.readouterr().err
