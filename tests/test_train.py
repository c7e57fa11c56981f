"""The training program as a user starts it: launch lines, resuming, and what bad input says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import datasets
import pytest
import torch
from helpers import command, environment, read_jsonl, run
from safetensors.torch import load_file
from transformers import Qwen2VLForConditionalGeneration

from virft_fast.data.demo import build_demo
from virft_fast.models.processing import load_processor
from virft_fast.models.tiny import TINY_PATH
from virft_fast.train import main, parse_args

ROOT = Path(__file__).parent.parent
TINY_WEIGHTS = TINY_PATH / "model.safetensors"
# Answers to digits have ten tokens, and four of them seldom agree: there is a gradient.
SMALL = ["--max_completion_length", "12", "--num_generations", "4", "--learning_rate", "1e-3"]


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A small demo data set on disk."""
    path = tmp_path_factory.mktemp("data") / "digits"
    build_demo("digits_classification", path, num_train=24, num_test=8)
    return path


def arguments(digits, output_dir, *more):
    return ["--dataset_name", digits, "--output_dir", output_dir, *SMALL, *map(str, more)]


def fails(capsys, *argv):
    """The error text of a call that can't start."""
    assert main([str(a) for a in argv]) == 2
    return capsys.readouterr().err


def comparable(path):
    """Records without what time measures."""
    return [
        {k: v for k, v in record.items() if not re.search(r"time|per_s", k)}
        for record in read_jsonl(path)
    ]


def test_visual_rft_launch_line_on_two_ranks_with_zero3(digits, tmp_path):
    """Visual-RFT's own flags, only the program replaced; on the CPU, so without bf16 kernels."""
    out = tmp_path / "run"
    done = run(
        "--output_dir", out,
        "--model_name_or_path", "tiny",
        "--dataset_name", digits,
        "--deepspeed", ROOT / "configs/zero3.json",
        "--max_prompt_length", 1024,
        "--per_device_train_batch_size", 1,
        "--gradient_accumulation_steps", 2,
        "--logging_steps", 1,
        "--bf16",
        "--report_to", "none",
        "--gradient_checkpointing", "false",
        "--attn_implementation", "flash_attention_2",
        "--max_pixels", 401408,
        "--num_train_epochs", 1,
        "--run_name", "Qwen2-VL-2B_GRPO_coco_base65cate_6k",
        "--save_steps", 100,
        "--save_only_model", "true",
        "--num_generations", 8,
        "--max_completion_length", 12,
        processes=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "using sdpa instead" in done.stderr
    assert len(read_jsonl(out / "metrics.jsonl")) == 6  # 24 rows, 4 prompts a step
    model, loading = Qwen2VLForConditionalGeneration.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert all(p.isfinite().all() for p in model.parameters())
    # The names of Qwen's own checkpoints, which other programs expect.
    assert load_file(out / "model.safetensors").keys() == load_file(TINY_WEIGHTS).keys()
    processor = load_processor(str(out))
    assert processor.tokenizer.padding_side == "left"
    assert processor.image_processor.size["longest_edge"] == 401408


@pytest.mark.parametrize("processes", [1, 2])
def test_b14_killed_and_resumed_run_equals_the_uninterrupted_one(digits, tmp_path, processes):
    """kill -9 in the middle, resume from the last checkpoint: same records, same weights."""
    more = ["--max_steps", 8, "--save_steps", 2, "--logging_steps", 3, "--eval_samples", 4]
    if processes == 2:
        more += ["--deepspeed", ROOT / "configs/zero3.json"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = run(*arguments(digits, whole, *more), processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    child = subprocess.Popen(
        command(*arguments(digits, broken, *more), processes=processes),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    # Kill as soon as there is something to resume, most likely within step 3 or 4.
    while not (broken / "checkpoint-2").is_dir():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not (broken / "summary.json").exists()
    done = run(
        *arguments(digits, broken, *more, "--resume_from_checkpoint", "latest"),
        processes=processes,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed" in done.stderr
    for name in ("metrics.jsonl", "completions.jsonl"):
        assert comparable(whole / name) == comparable(broken / name)
    for name in ("model.safetensors", "checkpoint-8/model.safetensors"):
        a, b = load_file(whole / name), load_file(broken / name)
        assert all(torch.equal(a[key], b[key]) for key in a)
    start = load_file(TINY_WEIGHTS)
    assert a.keys() == start.keys()
    assert not all(torch.equal(a[key], start[key]) for key in a)  # there was something to repeat
    if processes == 1:
        a, b = (torch.load(p / "checkpoint-8/engine/state.pt", weights_only=True)
                for p in (whole, broken))  # fmt: skip
        assert all(torch.equal(a["module"][key], b["module"][key]) for key in a["module"])
    summaries = [json.loads((p / "summary.json").read_text()) for p in (whole, broken)]
    assert summaries[0]["before"] == summaries[1]["before"]
    assert summaries[0]["after"] == summaries[1]["after"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_finishes_the_step_saves_and_exits_0(digits, tmp_path, number):
    out = tmp_path / "run"
    child = subprocess.Popen(
        command(*arguments(digits, out, "--max_steps", 10000, "--save_steps", 0)),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not (out / "metrics.jsonl").exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(number)
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 0, errors[-3000:]
    assert "stopped by a signal" in errors
    (saved,) = out.glob("checkpoint-*")
    step = int(saved.name.split("-")[1])
    assert read_jsonl(out / "metrics.jsonl")[-1]["step"] == step
    assert (saved / "engine/state.pt").is_file()


def test_lora_with_tensorboard_and_custom_reward(digits, tmp_path, capsys):
    reward = tmp_path / "mine.py"
    reward.write_text(
        "def short(prompts, completions, solution, **columns):\n"
        "    assert len(prompts) == len(completions) == len(solution)\n"
        "    return [-len(c[0]['content']) / 100 for c in completions]\n"
    )
    out = tmp_path / "run"
    argv = arguments(
        digits, out, "--max_steps", 2, "--use_peft", "--report_to", "tensorboard",
        "--reward_funcs", "format", f"{reward}:short", "--reward_weights", 1, 0.5,
        "--log_completions_steps", 1, "--freeze_vision_tower",
    )  # fmt: skip
    assert main([str(a) for a in argv]) == 0
    records = read_jsonl(out / "metrics.jsonl")
    assert set(records[0]) >= {"rewards/format", "rewards/short", "kl"}
    assert records[0]["reward"] == pytest.approx(
        records[0]["rewards/format"] + 0.5 * records[0]["rewards/short"], rel=1e-5
    )
    assert (out / "adapter_model.safetensors").is_file()
    assert list(out.rglob("events.out.tfevents.*"))
    shown = capsys.readouterr()
    assert "completions of step 1" in shown.err and "metrics.jsonl" in shown.out
    assert Qwen2VLForConditionalGeneration.from_pretrained(out) is not None


@pytest.mark.parametrize(
    "flags",
    [
        ["--bf16"],
        ["--bf16", "--use_peft", "--gradient_checkpointing", "--deepspeed", "configs/zero2.json"],
        ["--freeze_vision_tower", "--gradient_checkpointing", "--loss_type", "dr_grpo", "--beta",
         "0", "--num_iterations", "2", "--deepspeed", "configs/zero3.json"],
    ],
    ids=["bf16", "bf16-lora-zero2", "frozen-tower-zero3"],
)  # fmt: skip
def test_combinations_train(digits, tmp_path, flags):
    out = tmp_path / "run"
    flags = [ROOT / flag if flag.startswith("configs/") else flag for flag in flags]
    more = ["--max_steps", 2, "--per_device_train_batch_size", 4, "--report_to", "tensorboard"]
    done = run(*arguments(digits, out, *more, *flags))
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(out.rglob("events.out.tfevents.*"))
    records = read_jsonl(out / "metrics.jsonl")
    assert len(records) == 2 and records[-1]["skipped_steps"] == 0
    assert all(record["loss"] is not None and record["grad_norm"] > 0 for record in records)
    if "--use_peft" in flags:
        adapter = load_file(out / "adapter_model.safetensors")
        assert all(b.any() for name, b in adapter.items() if "lora_B" in name)  # they start at 0
        return
    trained, start = load_file(out / "model.safetensors"), load_file(TINY_WEIGHTS)
    moved = {name for name in start if not torch.equal(start[name], trained[name])}
    assert "model.embed_tokens.weight" in moved
    if "--freeze_vision_tower" in flags:
        assert not any("visual" in name for name in moved)


def test_reward_that_raises_stops_the_run_with_its_traceback(digits, tmp_path):
    reward = tmp_path / "mine.py"
    reward.write_text("def broken(completions, **columns):\n    return [1 / 0]\n")
    argv = arguments(digits, tmp_path / "run", "--max_steps", 1)
    done = run(*argv, "--reward_funcs", f"{reward}:broken")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr and "return [1 / 0]" in done.stderr
    assert "the sample is" in done.stderr


def test_dry_run_prints_and_writes_nothing(digits, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([str(a) for a in arguments(digits, out, "--dry_run")]) == 0
    shown = capsys.readouterr().out
    for text in ("learning_rate", "vision tower", "MiB", "<|im_start|>user", "0 problems"):
        assert text in shown
    assert not out.exists()


def test_dry_run_names_rows_whose_solution_is_not_the_maximum(tmp_path, capsys):
    """A ground truth with a confidence of 0.5 can't be answered perfectly."""
    answer = "<answer>[{{'Position': [1,2,3,4], 'Confidence': {}}}]</answer>"
    rows = [{"problem": "p", "solution": answer.format(c)} for c in (1, 0.5)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    assert (
        main(["--dataset_name", str(path), "--output_dir", str(tmp_path / "o"), "--dry_run"]) == 1
    )
    shown = capsys.readouterr().out
    assert "1 problems" in shown and "row 1: accuracy_confidence" in shown


# Bad input: what it says.


def test_unknown_flag_names_the_closest(capsys):
    assert "--learning_rate" in fails(capsys, "--learning_rat", "1e-3")


def test_unknown_key_in_the_file_names_the_closest(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("num_generation: 4\n")
    assert "--num_generations" in fails(capsys, "--config", path)


def test_flags_win_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-3\nbeta: 0.5\nreward_funcs: [format]\nbf16: true\n")
    config = parse_args(["--config", str(path), "--beta", "0.1"])
    assert config.grpo.beta == 0.1 and config.train.learning_rate == 1e-3
    assert config.grpo.reward_funcs == ["format"] and config.train.bf16 is True


@pytest.mark.parametrize("name", ["demo", "visual_rft_2b", "visual_rft_7b"])
def test_shipped_configs_parse(name):
    config = parse_args(["--config", str(ROOT / f"configs/{name}.yaml")])
    assert config.grpo.beta == 0.04


def test_fewer_than_two_generations(capsys):
    assert "at least 2" in fails(capsys, "--num_generations", 1)


@pytest.mark.parametrize("funcs", [[], ["--reward_funcs", "accuracy", "format"]])
def test_weights_that_do_not_match_the_reward_functions(digits, tmp_path, capsys, funcs):
    argv = arguments(digits, tmp_path / "o", *funcs, "--reward_weights", 1, 2, 3)
    text = fails(capsys, *argv)
    assert "--reward_weights: expected 2 weights" in text and "'accuracy'" in text


def test_missing_model(digits, tmp_path, capsys):
    argv = arguments(digits, tmp_path / "o", "--model_name_or_path", tmp_path / "nothing")
    text = fails(capsys, *argv)
    assert "--model_name_or_path" in text and "expected" in text


def test_missing_dataset(tmp_path, capsys):
    text = fails(capsys, "--dataset_name", tmp_path / "nothing", "--output_dir", tmp_path / "o")
    assert "save_to_disk" in text


def test_missing_column_and_empty_dataset(tmp_path, capsys):
    datasets.Dataset.from_dict({"problem": ["p"], "answer": ["a"]}).save_to_disk(tmp_path / "c")
    text = fails(capsys, "--dataset_name", tmp_path / "c", "--output_dir", tmp_path / "o")
    assert "solution" in text and "answer" in text
    datasets.Dataset.from_dict({"problem": [], "solution": []}).save_to_disk(tmp_path / "e")
    assert "empty" in fails(
        capsys, "--dataset_name", tmp_path / "e", "--output_dir", tmp_path / "o"
    )


def test_output_dir_with_a_run_is_refused_then_overwritten(digits, tmp_path, capsys):
    argv = arguments(digits, tmp_path / "run", "--max_steps", 1)
    kept = tmp_path / "run" / "notes.txt"
    assert main([str(a) for a in argv]) == 0
    kept.write_text("mine")
    before = (tmp_path / "run/metrics.jsonl").read_text()
    capsys.readouterr()
    assert "already holds a run" in fails(capsys, *argv)
    assert (tmp_path / "run/metrics.jsonl").read_text() == before
    assert main([str(a) for a in [*argv, "--overwrite_output_dir"]]) == 0
    assert len(read_jsonl(tmp_path / "run/metrics.jsonl")) == 1
    assert kept.read_text() == "mine"


def test_nothing_to_resume(digits, tmp_path, capsys):
    argv = arguments(digits, tmp_path / "o", "--resume_from_checkpoint", "latest")
    assert "got none" in fails(capsys, *argv)


def test_resume_with_other_flags_is_refused(digits, tmp_path, capsys):
    argv = arguments(digits, tmp_path / "run", "--max_steps", 1, "--save_steps", 1)
    assert main([str(a) for a in argv]) == 0
    capsys.readouterr()
    more = ["--resume_from_checkpoint", "latest", "--per_device_train_batch_size", 2]
    assert "per_device_train_batch_size" in fails(capsys, *argv, *more)


def test_bad_rows_are_skipped_counted_and_named(tmp_path, caplog):
    """A malformed solution, a missing image, an over-long prompt; then past the limit."""
    good = {"problem": "p", "solution": "<answer>[{'Position': [1,2,3,4],'Confidence':1}]</answer>"}
    rows = [good] * 3 + [
        {**good, "solution": "<answer>[{'Position': [9,9,3,4],'Confidence':1}]</answer>"},
        {**good, "image_path": "missing.png"},
        {**good, "problem": "long " * 200},
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    argv = ["--dataset_name", path, "--output_dir", tmp_path / "o", *SMALL, "--max_steps", 4,
            "--max_prompt_length", 100]  # fmt: skip
    assert main([str(a) for a in argv]) == 0
    for text in ("row 3", "x1 < x2", "row 4", "missing.png", "row 5", "--max_prompt_length 100"):
        assert text in caplog.text
    assert read_jsonl(tmp_path / "o/metrics.jsonl")[-1]["bad_rows"] == 3
    argv = [*argv, "--overwrite_output_dir", "--max_bad_rows", 1]
    assert main([str(a) for a in argv]) == 1
