"""Runs that speculate: they learn what they would without, and resume with their history."""

from __future__ import annotations

import re
import shutil
from contextlib import nullcontext

import pytest
import torch
from helpers import CPU, make_prompts, make_sample, read_jsonl
from processes import run
from safetensors.torch import load_file, save_file

from virft_fast import checkpoint, evaluate
from virft_fast.algorithms import step as step_module
from virft_fast.config import EvalConfig, GRPOConfig
from virft_fast.models.qwen_vl import Policy, load_model
from virft_fast.rollout import Sampling
from virft_fast.rollout.backends import make_rollout, with_own_history
from virft_fast.rollout.speculation import History
from virft_fast.tasks.scoring import RewardError
from virft_fast.train import main

SMALL = ["--max_completion_length", 12, "--num_generations", 4, "--learning_rate", 1e-3,
         "--per_device_train_batch_size", 4]  # fmt: skip
FIGURES = {"tokens_per_pass", "guessed_fraction", "passes_per_token"}


def train(digits, folder, *more, processes=1):
    """The metrics, completions and weights of some steps. The second epoch begins with step 7, or
    with step 4 on two processes."""
    argv = ["--dataset_name", digits, "--output_dir", folder, *SMALL, *more]
    argv += ["--max_steps", 8 if processes == 1 else 5]
    if processes == 1:
        assert main([str(word) for word in argv]) == 0
    else:
        done = run(*argv, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    records = [read_jsonl(folder / f"{name}.jsonl") for name in ("metrics", "completions")]
    return *records, load_file(folder / "model.safetensors")


def without(record, pattern):
    return {name: value for name, value in record.items() if not re.search(pattern, name)}


@pytest.fixture(scope="module")
def guessing(digits, tmp_path_factory):
    """A run that speculates, with a checkpoint after step 4."""
    folder = tmp_path_factory.mktemp("guessing") / "run"
    return folder, train(digits, folder, "--save_steps", 4)


def assert_same_run(one, other):
    changing = "time|per_s|sampling_|" + "|".join(FIGURES)
    assert one[1] == other[1]
    for mine, theirs in zip(one[0], other[0], strict=True):
        assert without(mine, changing) == without(theirs, changing)
        name = "sampling_logp_difference"
        assert mine[name] == pytest.approx(theirs[name], abs=1e-6)
    assert all(torch.equal(one[2][name], weight) for name, weight in other[2].items())


def test_a_run_learns_what_it_would_without(digits, tmp_path, guessing):
    plain = train(digits, tmp_path / "plain", "--speculation", "off", "--save_steps", 0)
    assert_same_run(guessing[1], plain)
    assert not any(FIGURES & set(record) for record in plain[0])
    last = guessing[1][0][-1]
    assert last["tokens_per_pass"] > 1 and 0 < last["guessed_fraction"] < 1
    assert 0 < last["passes_per_token"] < 1
    assert not list(tmp_path.rglob("history.safetensors"))


def test_two_processes_learn_what_they_would_without(digits, tmp_path):
    """And guess from each other's answers: rows change the process from epoch to epoch."""
    flags = ("auto", "off")
    one, other = (
        train(digits, tmp_path / flag, "--speculation", flag, "--save_steps", 5, processes=2)
        for flag in flags
    )
    assert_same_run(one, other)
    history = load_file(tmp_path / "auto/checkpoint-5" / checkpoint.HISTORY_FILE)
    assert sorted(history["rows"].tolist()) == list(range(24))
    assert history["lengths"].sum() == len(history["stored"]) > 24 * 4


def test_a_run_resumes_with_its_history(digits, tmp_path, guessing):
    """The records of guesses are equal as well."""
    shutil.copytree(guessing[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-8")
    more = ["--save_steps", 4, "--resume_from_checkpoint", "latest"]
    resumed = train(digits, tmp_path / "run", *more)
    assert resumed[0][-4:] != guessing[1][0][-4:]  # other times
    for mine, theirs in zip(resumed[0], guessing[1][0], strict=True):
        assert without(mine, "time|per_s") == without(theirs, "time|per_s")
    saved = load_file(guessing[0] / "checkpoint-8" / checkpoint.HISTORY_FILE)
    again = load_file(tmp_path / "run/checkpoint-8" / checkpoint.HISTORY_FILE)
    assert saved.keys() == again.keys() and all(torch.equal(saved[k], again[k]) for k in saved)
    assert len(saved["stored"]) > 100


@pytest.mark.parametrize("damage", ["missing", "no tensors", "other tensors", "other lengths"])
def test_a_history_that_is_missing_or_odd(digits, tmp_path, capsys, guessing, damage):
    """Without the file, as in checkpoints of earlier versions, the history starts empty."""
    shutil.copytree(guessing[0] / "checkpoint-4", folder := tmp_path / "run/checkpoint-4")
    (folder / checkpoint.CHECKSUMS_FILE).unlink()
    path = folder / checkpoint.HISTORY_FILE
    tensors = load_file(path)
    if damage == "missing":
        path.unlink()
        resumed = train(digits, tmp_path / "run", "--resume_from_checkpoint", "latest")
        assert resumed[0][-1]["loss"] == guessing[1][0][-1]["loss"]
        return
    if damage == "no tensors":
        path.write_bytes(b"\x80\x04.")  # a pickle
    elif damage == "other tensors":
        save_file({"recent": tensors["recent"]}, path)
    else:
        save_file(tensors | {"lengths": tensors["lengths"] + 1}, path)
    argv = ["--dataset_name", digits, "--output_dir", tmp_path / "run", *SMALL, "--max_steps", 8]
    assert main([*map(str, argv), "--resume_from_checkpoint", "latest"]) == 2
    said = capsys.readouterr().err
    assert "history" in said and "expected" in said and "earlier checkpoint" in said


def test_a_step_that_fails_leaves_no_trace(digits, tmp_path):
    """The checkpoint that it leaves has the history of the step before."""
    reward = tmp_path / "mine.py"
    reward.write_text(
        "calls = []\n"
        "def mine(completions, **columns):\n"
        "    calls.append(1)\n"
        "    return [len(set(c[0]['content'])) for c in completions] if len(calls) < 3 else 1 / 0\n"
    )
    argv = ["--dataset_name", digits, "--output_dir", tmp_path / "run", *SMALL]
    with pytest.raises(RewardError):
        main([*map(str, argv), "--reward_funcs", f"{reward}:mine"])
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    history = load_file(saved / checkpoint.HISTORY_FILE)
    assert saved.name == "checkpoint-2" and len(history["rows"]) == 8


def test_a_rollout_that_taught_nothing_leaves_no_trace(digits, tmp_path, monkeypatch):
    """Each rollout is for two steps. The first update of the second is skipped, and the run ends:
    its checkpoint is that of before the rollout, which the resumed run repeats."""
    flags = ["--dataset_name", digits, *SMALL, "--steps_per_generation", 2, "--max_steps", 6,
             "--save_steps", 6]  # fmt: skip
    argv = [*map(str, flags), "--output_dir"]
    backward = step_module.backward

    def spoiled(state, loss, *, last):
        return backward(state, loss * torch.nan if state.step == 2 else loss, last=last)

    with monkeypatch.context() as patch:
        patch.setattr(step_module, "backward", spoiled)
        assert main([*argv, str(tmp_path / "run"), "--max_bad_steps", "1"]) == 1
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    assert saved.name == "checkpoint-2"
    assert len(load_file(saved / checkpoint.HISTORY_FILE)["rows"]) == 8
    assert main([*argv, str(tmp_path / "run"), "--resume_from_checkpoint", "latest"]) == 0
    assert main([*argv, str(tmp_path / "whole")]) == 0
    ours, theirs = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("run", "whole"))
    for mine, other in zip(ours, theirs, strict=True):
        assert without(mine, "time|per_s") == without(other, "time|per_s")
    saved, again = (
        load_file(tmp_path / name / "checkpoint-6" / checkpoint.HISTORY_FILE)
        for name in ("run", "whole")
    )
    assert saved.keys() == again.keys() and all(torch.equal(saved[k], again[k]) for k in saved)


def test_an_evaluation_guesses_from_its_own_answers(processor):
    """The same memory serves both, and what training remembers stays as it is."""
    policy, history = Policy(load_model("tiny")).eval(), History()
    options = {"weights": lambda: nullcontext(policy), "tokenizer": processor.tokenizer}
    rollout = make_rollout("native", **options, device=CPU, speculation=history)
    plain = make_rollout("native", **options, device=CPU)
    assert with_own_history(plain) is plain
    own = with_own_history(rollout)
    assert own._buffers is rollout._buffers
    for number in (0, 1, 0):
        prompts = make_prompts(processor, make_sample(number))
        one, other = (each.generate(prompts, 1, Sampling(48, greedy=True)) for each in (own, plain))
        assert torch.equal(one.completion_ids, other.completion_ids)
    assert own.stats.passes < plain.stats.passes / 2
    assert set(own.speculation.stored) == {0, 1} and not history.stored


# Flags


def test_the_hf_backend_never_speculates(digits, tmp_path, capsys):
    assert not GRPOConfig(rollout_backend="hf").speculates and GRPOConfig().speculates
    assert not EvalConfig(speculation="off").speculates
    argv = ["--dataset_name", digits, "--output_dir", tmp_path / "run", *SMALL, "--dry_run"]
    argv = [*map(str, argv), "--rollout_backend", "hf"]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "speculation: 'off'" in shown and "earlier answers" not in shown
    for start, command in ((main, argv), (evaluate.main, ["--rollout_backend", "hf"])):
        assert start([*command, "--speculation", "auto"]) == 2
        said = capsys.readouterr().err
        assert "--speculation auto: expected --rollout_backend native, got hf" in said


def test_dry_run_states_the_memory(digits, tmp_path, capsys):
    argv = ["--dataset_name", digits, "--output_dir", tmp_path / "run", *SMALL, "--dry_run"]
    assert main(list(map(str, argv))) == 0
    shown = capsys.readouterr().out
    host = History().num_bytes() / 2**20
    assert f"{host:,.1f} MiB  of the host's memory" in shown and "to guess from" in shown
