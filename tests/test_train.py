"""The training program as a user starts it: launch lines, resuming, and what bad input says."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from helpers import read_jsonl
from PIL import Image
from processes import Program, environment, run
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration

from virft_fast import checkpoint
from virft_fast.algorithms import grpo
from virft_fast.config import DataConfig, EvalConfig, RunConfig
from virft_fast.evaluation.sources import of_dataset
from virft_fast.json_files import intact_lines
from virft_fast.metrics import MetricsWriter
from virft_fast.models import shared_prefix
from virft_fast.models.processing import load_processor
from virft_fast.models.qwen_vl import load_model
from virft_fast.models.tiny import TINY_PATH
from virft_fast.rollout.cache import cache_numbers
from virft_fast.train import main, parse_args, setup
from virft_fast.train.rows import prepare_data

ROOT = Path(__file__).parent.parent
TINY_WEIGHTS = TINY_PATH / "model.safetensors"
# Answers to digits have ten tokens, and four of them seldom agree: there is a gradient.
SMALL = ["--max_completion_length", "12", "--num_generations", "4", "--learning_rate", "1e-3"]


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
    out, few = tmp_path / "run", tmp_path / "few"
    rows = datasets.load_from_disk(digits)["train"].select(range(8))
    datasets.DatasetDict(train=rows).save_to_disk(few)
    argv = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
        "-m", "virft_fast.train",
        "--output_dir", out,
        "--model_name_or_path", "tiny",
        "--dataset_name", few,
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
    ]  # fmt: skip
    env = environment(TORCH_EXTENSIONS_DIR=str(tmp_path / "compiled"))
    done = subprocess.run([str(word) for word in argv], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "using sdpa instead" in done.stderr
    assert not (tmp_path / "compiled").exists()  # DeepSpeed's ops take minutes
    assert len(read_jsonl(out / "metrics.jsonl")) == 2  # 8 rows, 4 prompts a step
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
def test_killed_and_resumed_run_equals_the_uninterrupted_one(digits, tmp_path, processes):
    """kill -9 in the middle, resume from the last checkpoint: same records, same weights."""
    more = ["--max_steps", 6, "--save_steps", 2, "--logging_steps", 3, "--eval_samples", 4]
    if processes == 2:
        more += ["--deepspeed", ROOT / "configs/zero3.json"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = run(*arguments(digits, whole, *more), processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    child = Program(*arguments(digits, broken, *more), processes=processes)
    deadline = time.monotonic() + 300
    # Kill as soon as there is something to resume, most likely within step 3 or 4.
    while not (broken / "checkpoint-2").is_dir():
        assert child.running() and time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait().returncode == -signal.SIGKILL
    assert not (broken / "summary.json").exists()
    done = run(
        *arguments(digits, broken, *more, "--resume_from_checkpoint", "latest"),
        processes=processes,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed" in done.stderr
    for name in ("metrics.jsonl", "completions.jsonl"):
        assert comparable(whole / name) == comparable(broken / name)
    for name in ("model.safetensors", "checkpoint-6/model.safetensors"):
        a, b = load_file(whole / name), load_file(broken / name)
        assert all(torch.equal(a[key], b[key]) for key in a)
    start = load_file(TINY_WEIGHTS)
    assert a.keys() == start.keys()
    assert not all(torch.equal(a[key], start[key]) for key in a)  # there was something to repeat
    last = whole / "checkpoint-6"
    files = {p.relative_to(last).as_posix() for p in last.rglob("*") if p.is_file()}
    assert checkpoint.read_checksums(last).keys() == files - {"checksums.json"}
    if processes == 1:
        a, b = (torch.load(p / "checkpoint-6/engine/state.pt", weights_only=True)
                for p in (whole, broken))  # fmt: skip
        assert all(torch.equal(a["module"][key], b["module"][key]) for key in a["module"])
    summaries = [json.loads((p / "summary.json").read_text()) for p in (whole, broken)]
    assert summaries[0]["before"] == summaries[1]["before"]
    assert summaries[0]["after"] == summaries[1]["after"]


@pytest.mark.parametrize(
    ("number", "more"), [(signal.SIGTERM, ["--save_only_model"]), (signal.SIGUSR1, [])]
)
def test_signal_finishes_the_step_saves_and_exits_0(digits, tmp_path, number, more):
    out = tmp_path / "run"
    child = Program(*arguments(digits, out, "--max_steps", 10000, "--save_steps", 0, *more))
    deadline = time.monotonic() + 300
    while not (out / "metrics.jsonl").exists():
        assert child.running() and time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(number)
    done = child.wait()
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stopped by a signal" in done.stderr
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


def assert_lora_run_can_be_loaded(folder):
    """`load_model` merges: the base's weights plus the adapter's product, nowhere else."""
    merged, start = load_model(str(folder)).state_dict(), load_model("tiny").state_dict()
    moved = {name for name in start if not torch.equal(start[name], merged[name])}
    assert moved and all("_proj.weight" in name and "visual" not in name for name in moved)


@pytest.mark.parametrize(
    "flags",
    [
        ["--bf16"],
        ["--bf16", "--deepspeed", "zero0.json", "--loss_impl", "reference"],
        ["--bf16", "--use_peft", "--gradient_checkpointing", "--deepspeed", "configs/zero2.json"],
        ["--freeze_vision_tower", "--gradient_checkpointing", "--loss_type", "dr_grpo", "--beta",
         "0", "--num_iterations", "2", "--deepspeed", "configs/zero3.json"],
    ],
    ids=["bf16", "bf16-zero0", "bf16-lora-zero2", "frozen-tower-zero3"],
)  # fmt: skip
def test_combinations_train(digits, tmp_path, flags):
    out = tmp_path / "run"
    zero0 = tmp_path / "zero0.json"
    zero0.write_text(json.dumps({"zero_optimization": {"stage": 0}, "bf16": {"enabled": "auto"},
                                 "train_micro_batch_size_per_gpu": "auto"}))  # fmt: skip
    flags = [zero0 if flag == "zero0.json" else flag for flag in flags]
    flags = [ROOT / f if str(f).startswith("configs/") else f for f in flags]
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
        assert_lora_run_can_be_loaded(out)
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


def test_dry_run_says_why_no_row_can_be_used(digits, tmp_path, capsys):
    argv = arguments(digits, tmp_path / "o", "--dry_run", "--task", "detection")
    assert "expected boxes in the solution" in fails(capsys, *argv)
    argv = arguments(digits, tmp_path / "o", "--dry_run", "--lr_scheduler_type", "magic")
    assert "--lr_scheduler_type magic" in fails(capsys, *argv)


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


def test_dry_run_estimates_the_microbatch_that_a_run_would_take(
    digits, tmp_path, capsys, monkeypatch
):
    """On a GPU, that is what fits, whatever the default batch size."""
    argv = arguments(digits, tmp_path / "o", "--max_prompt_length", 100, "--dry_run")
    argv += ["--gradient_accumulation_steps", 3, "--max_completion_length", 25]
    for tokens, shown in ((None, 200), (500, 500), (5000, 600)):
        monkeypatch.setattr(setup, "microbatch_tokens", lambda *_, tokens=tokens: tokens)
        assert main([*map(str, argv)]) == 0
        text = capsys.readouterr().out
        assert f"activations of the language model, {shown} tokens" in text


def cache_of_dry_run(capsys, *argv):
    """(tokens, MiB) that --dry_run states for the keys and values of a rollout."""
    assert main([*map(str, argv), "--dry_run"]) == 0
    line = re.search(r"([\d,.]+) MiB  keys and values.*?([\d,]+) tokens", capsys.readouterr().out)
    return int(line[2].replace(",", "")), float(line[1].replace(",", ""))


def test_dry_run_counts_the_cache_as_it_is_allocated(digits, tmp_path, capsys):
    """Places of 20 tokens for completions of 12 and 8 guesses; the evaluation's batch where that is
    larger."""
    argv = arguments(digits, tmp_path / "o", "--max_prompt_length", 100)
    argv += ["--per_device_train_batch_size", 2]
    config = load_model("tiny", empty=True).config.text_config
    tokens, mib = cache_of_dry_run(capsys, *argv)
    assert tokens == 2 * (100 + 4 * 20)
    assert mib == pytest.approx(tokens * cache_numbers(config) * 4 / 2**20, abs=0.05)
    assert cache_of_dry_run(capsys, *argv, "--eval_samples", 8)[0] == 8 * (100 + 20)
    assert cache_of_dry_run(capsys, *argv, "--speculation", "off")[0] == 2 * (100 + 4 * 16)
    limited = [*argv, "--rollout_cache_tokens", 300]
    assert cache_of_dry_run(capsys, *limited)[0] == 300
    tokens, _ = cache_of_dry_run(capsys, *argv, "--rollout_backend", "hf")
    assert tokens == 2 * 4 * (100 + 12)  # a copy of the prompt for each row, nothing rounded up


# Bad input: what it says.


@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]])
def test_cache_that_is_too_small_is_named_before_anything_is_loaded(
    digits, tmp_path, capsys, dry_run
):
    """100 + 4 * 16 tokens, as they are allocated; guesses are left out where they don't fit."""
    argv = arguments(digits, tmp_path / "o", "--max_prompt_length", 100, *dry_run)
    said = fails(capsys, *argv, "--rollout_cache_tokens", 163)
    for text in ("--rollout_cache_tokens 163", "--max_prompt_length 100", "164 tokens",
                 "expected at most 163", "raise --rollout_cache_tokens"):  # fmt: skip
        assert text in said
    assert not (tmp_path / "o").exists()
    argv = arguments(digits, tmp_path / "o", *dry_run)
    assert "any prompt" in fails(capsys, *argv, "--rollout_cache_tokens", 64)


def test_cache_limit_that_has_no_effect_is_named(digits, tmp_path, caplog, capsys):
    argv = arguments(digits, tmp_path / "o", "--dry_run", "--rollout_cache_tokens", 1)
    assert main([*map(str, argv), "--rollout_backend", "hf"]) == 0
    assert "--rollout_cache_tokens has no effect with --rollout_backend hf" in caplog.text


@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]])
def test_model_that_native_rollouts_cannot_reach_is_named_at_the_start(
    digits, tmp_path, capsys, monkeypatch, dry_run
):
    monkeypatch.setattr(shared_prefix, "unreachable", lambda model: "it is made of stone")
    steps = []
    monkeypatch.setattr(grpo.ALGORITHM, "step", lambda *a: steps.append(a))
    said = fails(capsys, *arguments(digits, tmp_path / "o", *dry_run))
    assert "made of stone; pass --rollout_backend hf" in said and not steps


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


def test_the_file_is_read_like_flags(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "report_to: none\nreward_funcs: format\nepsilon: 0.3\nuse_liger: true\nbeta: null\n"
        "reward_weights: [1.5]\nsave_only_model: false\n"
    )
    config = parse_args(["--config", str(path)])
    assert config.train.report_to == ["none"] and config.grpo.reward_funcs == ["format"]
    assert config.grpo.epsilon_low == 0.3 and config.model.use_liger_kernel is True
    assert config.grpo.beta == 0.04 and config.grpo.reward_weights == [1.5]


@pytest.mark.parametrize("line", ["beta: {a: 1}", "beta: [[1]]", "reward_weights: [1, null]"])
def test_a_value_of_no_flag_is_named(tmp_path, capsys, line):
    path = tmp_path / "run.yaml"
    path.write_text(line)
    key = line.split(":")[0]
    assert f"{key}: expected a value or a list" in fails(capsys, "--config", path)


@pytest.mark.parametrize(
    "flag", [("--seed", -1), ("--temperature", "inf"), ("--num_train_epochs", "inf"),
             ("--learning_rate", "nan"), ("--reward_weights", "nan")]
)  # fmt: skip
def test_numbers_out_of_range_are_named(capsys, flag):
    assert f"{flag[0]}: expected" in fails(capsys, *flag)


@pytest.mark.parametrize(
    "name", ["virft_fast/demo", "configs/visual_rft_2b", "configs/visual_rft_7b"]
)
def test_shipped_configs_parse(name):
    config = parse_args(["--config", str(ROOT / f"{name}.yaml")])
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
    datasets.Dataset.from_dict({"problem": ["p"], "reply": ["a"]}).save_to_disk(tmp_path / "c")
    text = fails(capsys, "--dataset_name", tmp_path / "c", "--output_dir", tmp_path / "o")
    assert "solution" in text and "reply" in text
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


def test_true_starts_again_what_was_killed_before_its_first_checkpoint(digits, tmp_path, capsys):
    out = tmp_path / "run"
    argv = [str(a) for a in arguments(digits, out, "--max_steps", 1)]
    argv += ["--resume_from_checkpoint", "true"]
    assert main(argv) == 0
    first = read_jsonl(out / "metrics.jsonl")
    assert "already holds a run" in fails(capsys, *argv)  # it is done: its model is there
    (out / "config.json").unlink()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss"')
    assert main(argv) == 0
    again = read_jsonl(out / "metrics.jsonl")
    assert [record["step"] for record in again] == [1] and again[0]["loss"] == first[0]["loss"]
    (out / "config.json").unlink()
    (out / "damaged-checkpoint-1-5").mkdir()
    assert "already holds a run" in fails(capsys, *argv)


def test_a_model_of_another_program_is_not_overwritten(digits, tmp_path, capsys):
    out = tmp_path / "model"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "model-00001-of-00002.safetensors").touch()
    argv = arguments(digits, out, "--max_steps", 1)
    assert "already holds a run or a model" in fails(capsys, *argv)
    assert (out / "model-00001-of-00002.safetensors").is_file()


def test_a_checkpoint_that_is_a_link_is_resumed(digits, tmp_path):
    out = tmp_path / "run"
    argv = [str(a) for a in arguments(digits, out, "--save_steps", 1, "--max_steps", 1)]
    assert main(argv) == 0
    (out / "checkpoint-1").rename(tmp_path / "elsewhere")
    (out / "checkpoint-1").symlink_to(tmp_path / "elsewhere")
    assert main([*argv, "--resume_from_checkpoint", "latest", "--max_steps", "2"]) == 0
    assert [record["step"] for record in read_jsonl(out / "metrics.jsonl")] == [1, 2]


def test_overwriting_clears_the_folder_for_a_checkpoint_of_another(digits, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for out in (first, second):
        argv = [str(a) for a in arguments(digits, out, "--save_steps", 1, "--max_steps", 3)]
        assert main(argv) == 0
    more = ["--resume_from_checkpoint", str(first / "checkpoint-1"), "--overwrite_output_dir"]
    assert main([*argv, *more, "--max_steps", "2"]) == 0
    assert [path.name for path in second.glob("checkpoint-*")] == ["checkpoint-2"]
    assert len(list(first.glob("checkpoint-*"))) == 3


def test_overwriting_loses_nothing_before_the_new_run_can_start(digits, tmp_path, capsys):
    out = tmp_path / "run"
    argv = [str(a) for a in arguments(digits, out, "--max_steps", 1, "--save_steps", 1)]
    assert main(argv) == 0
    (out / "checkpoint-best").mkdir()
    mistyped = [*argv, "--overwrite_output_dir", "--dataset_name", tmp_path / "nothing"]
    assert "save_to_disk" in fails(capsys, *mistyped)
    own = [*argv, "--overwrite_output_dir", "--model_name_or_path", out / "checkpoint-1"]
    assert "would delete" in fails(capsys, *own)
    assert (out / "checkpoint-1/model.safetensors").is_file() and (out / "summary.json").is_file()
    assert main([*argv, "--overwrite_output_dir", "--save_steps", "0"]) == 0
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-best"]


def test_latest_goes_on_from_the_newest_whole_checkpoint(digits, tmp_path, capsys):
    out = tmp_path / "run"
    argv = [str(a) for a in arguments(digits, out, "--max_steps", 2, "--save_steps", 1)]
    assert main(argv) == 0
    (out / "deleting-checkpoint-1-12").mkdir()
    (out / "checkpoint-7.writing").mkdir()
    engine = out / "checkpoint-2/engine/state.pt"
    engine.write_bytes(engine.read_bytes()[:1000])
    named = [*argv, "--resume_from_checkpoint", str(out / "checkpoint-2")]
    assert "got engine/state.pt: 1000 bytes instead of" in fails(capsys, *named)
    argv += ["--resume_from_checkpoint", "latest"]
    assert main(argv) == 0
    assert "resumed" in (shown := capsys.readouterr().err) and "checkpoint-1 at step 1" in shown
    assert [record["step"] for record in read_jsonl(out / "metrics.jsonl")] == [1, 2]
    left = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert left[:2] == ["checkpoint-1", "checkpoint-2"] and len(left) == 3
    assert left[2].startswith("damaged-checkpoint-2-")


def test_damaged_state_of_an_older_version_names_its_file(digits, tmp_path, capsys):
    out = tmp_path / "run"
    argv = arguments(digits, out, "--max_steps", 1, "--save_steps", 1)
    assert main([str(a) for a in argv]) == 0
    (out / "checkpoint-1/checksums.json").unlink()
    capsys.readouterr()
    argv = [*argv, "--resume_from_checkpoint", "latest"]
    engine = out / "checkpoint-1/engine/state.pt"
    engine.write_bytes(engine.read_bytes()[:1000])
    assert "engine/state.pt: expected the engine state" in fails(capsys, *argv)
    (out / "checkpoint-1/trainer_state.json").write_text("{")
    assert "trainer_state.json: expected the state of a run" in fails(capsys, *argv)


def test_a_run_that_could_not_write_one_checkpoint_ends_with_1(
    digits, tmp_path, monkeypatch, capsys
):
    out, save_model = tmp_path / "run", checkpoint.save_model

    def full_at_first(model, weights, processor, folder):
        if folder.name == "checkpoint-1.writing":
            raise Exception("No space left on device")  # as tokenizers does
        save_model(model, weights, processor, folder)

    monkeypatch.setattr(checkpoint, "save_model", full_at_first)
    argv = arguments(digits, out, "--max_steps", 2, "--save_steps", 1)
    assert main([str(a) for a in argv]) == 1
    assert "not all checkpoints could be written" in capsys.readouterr().err
    assert (out / "summary.json").is_file() and (out / "model.safetensors").is_file()
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]


def test_broken_weights_are_named(digits, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(TINY_WEIGHTS.parent, folder)
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    argv = arguments(digits, tmp_path / "o", "--model_name_or_path", folder)
    assert "expected the weights of a model" in fails(capsys, *argv)


def test_a_run_whose_records_could_not_be_written_ends_well(digits, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(MetricsWriter, "_append", lambda self, name, records: None)
    assert main([str(a) for a in arguments(digits, out, "--max_steps", 1)]) == 0
    assert json.loads((out / "summary.json").read_text())["steps"] == 1
    (out / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    records = [record for _, record in intact_lines(out / "metrics.jsonl")]
    assert records == [{"step": 1, "reward": 0.5}]


def test_resuming_an_earlier_checkpoint_keeps_the_later_one_aside(digits, tmp_path):
    out = tmp_path / "run"
    argv = [str(a) for a in arguments(digits, out, "--save_steps", 1)]
    assert main([*argv, "--max_steps", "2"]) == 0
    earlier = ["--resume_from_checkpoint", str(out / "checkpoint-1"), "--save_total_limit", "1"]
    assert main([*argv, "--max_steps", "2", *earlier]) == 0
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    (aside,) = out.glob("abandoned-checkpoint-2-*")
    assert (aside / "model.safetensors").is_file()


def test_a_checkpoint_of_another_folder_is_resumed_into_a_new_one(digits, tmp_path, capsys):
    first, second = tmp_path / "a", tmp_path / "b"
    argv = [str(a) for a in arguments(digits, first, "--save_steps", 1, "--max_steps", 2)]
    assert main(argv) == 0
    more = ["--resume_from_checkpoint", str(first / "checkpoint-1"), "--output_dir", str(second)]
    assert main([*argv, *more]) == 0
    assert len(list(first.glob("checkpoint-*"))) == 2
    assert [record["step"] for record in read_jsonl(second / "metrics.jsonl")] == [2]
    assert "already holds a run" in fails(capsys, *argv, *more)


def test_the_model_is_not_overwritten_nor_trained_without_its_weights(digits, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(TINY_WEIGHTS.parent, folder)
    argv = arguments(digits, folder, "--model_name_or_path", folder)
    assert "expected a folder other than --model_name_or_path" in fails(capsys, *argv)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    argv = arguments(digits, tmp_path / "o", "--model_name_or_path", folder)
    assert "1 are missing" in fails(capsys, *argv)


def test_a_model_that_could_not_be_written_is_no_success(digits, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_model", full)
    argv = [str(a) for a in arguments(digits, tmp_path / "run", "--max_steps", 1)]
    assert main(argv) == 1
    assert "could NOT be written" in capsys.readouterr().err


def test_no_usable_row_stops_with_the_reason(digits, tmp_path, capsys):
    argv = arguments(digits, tmp_path / "o", "--max_prompt_length", 3, "--max_steps", 1)
    assert "--max_prompt_length 3" in fails(capsys, *argv)


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a number"),
        ({"WORLD_SIZE": "2", "RANK": "5", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "less than"),
    ],
)
def test_a_launcher_that_contradicts_itself(digits, tmp_path, capsys, monkeypatch, variables, text):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert text in fails(capsys, *arguments(digits, tmp_path / "o"))


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


def test_compat_prompt_reaches_training_and_evaluation(tmp_path, processor):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    talk = [{"from": "user", "value": "<img>a.png</img>Where?"},
            {"from": "assistant", "value": "(1,2),(300,400)"}]  # fmt: skip
    path = tmp_path / "lisa.json"
    path.write_text(json.dumps([{"conversations": talk}]))
    for compat in (False, True):
        config = RunConfig(data=DataConfig(dataset_name=str(path), compat_prompt=compat))
        asked = prepare_data(config, processor).train.load(0).sample.columns["problem"]
        questions = of_dataset(
            EvalConfig(dataset_name=str(path), split="train", compat_prompt=compat)
        )
        assert questions.samples().get(0).columns["problem"] == asked
        assert ("your grouding box" in asked) is compat
