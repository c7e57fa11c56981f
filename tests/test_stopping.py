"""What a run leaves behind when it is stopped or fails: the last whole step, if it can be saved."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import processes
import pytest
import torch
from helpers import read_jsonl
from safetensors.torch import load_file

from virft_fast import dist, train, watch
from virft_fast.algorithms import grpo
from virft_fast.data.demo import build_demo
from virft_fast.data.prompt_source import PromptSource
from virft_fast.tasks import RewardError
from virft_fast.train import main
from virft_fast.train.loop import is_given_up

FLAGS = ["--max_completion_length", "8", "--num_generations", "4", "--learning_rate", "1e-3",
         "--max_steps", "4", "--save_steps", "0"]  # fmt: skip
REWARD = """
import os, signal, time
calls = 0

def letters(completions, **_):
    return [len(set(c[0]["content"])) / 10 for c in completions]

def then(completions, **_):
    global calls
    calls += 1
    if calls == 3:
        {what}
    return [0.0] * len(completions)
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits"
    build_demo("digits_classification", path, num_train=16, num_test=4)
    return path


@pytest.fixture
def start(digits, tmp_path, monkeypatch):
    """Calls the program with a reward that does something in its third call."""
    monkeypatch.setattr(watch, "TICK", 0.05)
    monkeypatch.setattr(watch, "STOP_SECONDS", 0.3)

    def started(what, *more, out=tmp_path / "run"):
        file = tmp_path / "mine.py"
        file.write_text(REWARD.format(what=what))
        rewards = ["--reward_funcs", f"{file}:letters", f"{file}:then"]
        argv = ["--dataset_name", digits, "--output_dir", out, *FLAGS, *rewards, *more]
        return main([str(word) for word in argv])

    return started


def arguments(digits, tmp_path, file):
    """Of a run in tmp_path/run, with the two rewards of the file."""
    rewards = ["--reward_funcs", f"{file}:letters", f"{file}:then"]
    return ["--dataset_name", digits, "--output_dir", tmp_path / "run", *FLAGS, *rewards]


def saved(out):
    return sorted(path.name for path in out.glob("checkpoint-*"))


RAISES = "raise OSError('judge unreachable')"
HANGS = "while True: pass"


def test_an_error_in_the_last_evaluation_costs_no_report(start, tmp_path):
    with pytest.raises(RewardError):
        start(RAISES, "--eval_samples", "1", "--max_steps", "1")
    assert (tmp_path / "run/summary.json").is_file() and (tmp_path / "run/config.json").is_file()


@pytest.mark.parametrize("what", [RAISES, "raise SystemExit(3)"])
def test_a_reward_that_raises_loses_no_step(start, tmp_path, capsys, what):
    out = tmp_path / "run"
    with pytest.raises(RewardError):
        start(what)
    assert saved(out) == ["checkpoint-2"] and len(read_jsonl(out / "metrics.jsonl")) == 2
    assert "ended in step 3; saved is" in capsys.readouterr().err
    assert not (out / ".lock").exists()


def test_the_run_goes_on_from_there_bit_for_bit(start, tmp_path, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start("pass", out=whole) == 0
    with pytest.raises(RewardError):
        start(RAISES, out=broken)
    assert start("pass", "--resume_from_checkpoint", "latest", out=broken) == 0
    a, b = (load_file(out / "model.safetensors") for out in (whole, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)
    losses = [[r["loss"] for r in read_jsonl(out / "metrics.jsonl")] for out in (whole, broken)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_reward_that_hangs_ends_the_run_by_its_name(start, tmp_path, capsys):
    assert start(HANGS, "--reward_timeout", "0.5") == 1
    error = capsys.readouterr().err
    assert "reward function then took longer than 0.5 s (--reward_timeout)" in error
    assert saved(tmp_path / "run") == ["checkpoint-2"]


def test_an_async_reward_has_the_same_time(start, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        sys.modules[__name__], "REWARD", REWARD.replace("def then", "async def then")
    )
    what = "import asyncio; await asyncio.sleep(60)"
    assert start(what, "--reward_timeout", "0.5") == 1
    assert "reward function then took longer" in capsys.readouterr().err
    assert saved(tmp_path / "run") == ["checkpoint-2"]


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 0), ("SIGINT", 130), ("SIGHUP", 129)])
@pytest.mark.usefixtures("heard_signals")
def test_a_signal_lets_the_step_end_and_saves_it(start, tmp_path, capsys, number, status):
    assert start(f"os.kill(os.getpid(), signal.{number})") == status
    assert saved(tmp_path / "run") == ["checkpoint-3"]
    assert "stopped by a signal after step 3 of 4" in capsys.readouterr().err


def test_a_signal_during_a_reward_that_hangs_gives_the_step_up(start, tmp_path, capsys):
    assert start(f"os.kill(os.getpid(), signal.SIGTERM)\n        {HANGS}") == 0
    assert saved(tmp_path / "run") == ["checkpoint-2"]
    assert "stopped by a signal after step 2 of 4" in capsys.readouterr().err


def test_a_signal_during_the_rollout_gives_the_step_up(start, tmp_path, capsys, monkeypatch):
    generate, calls = train.model.make_rollout, []

    def made(*args, **kwargs):
        rollout = generate(*args, **kwargs)
        inner = rollout.generate

        def slow(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            return inner(*args, **kwargs)

        rollout.generate = slow
        return rollout

    monkeypatch.setattr(train.model, "make_rollout", made)
    assert start("pass") == 0
    assert saved(tmp_path / "run") == ["checkpoint-1"]


def test_a_signal_during_the_evaluation_gives_it_up(start, tmp_path, capsys):
    """The first call of a reward is the evaluation's before training."""
    what = f"os.kill(os.getpid(), signal.SIGTERM)\n        {HANGS}"
    assert start(what.replace("calls == 3", "calls == 1"), "--eval_samples", "4",
                 "--eval_batch_size", "1") == 0  # fmt: skip
    assert saved(tmp_path / "run") == []
    assert "stopped by a signal before the first step" in capsys.readouterr().err


def test_after_the_last_step_only_the_evaluation_is_given_up(start, tmp_path, capsys):
    """Four calls before training, four of the steps; the ninth is the evaluation's after it."""
    what = (
        f"pass\n    if calls == 9:\n        os.kill(os.getpid(), signal.SIGTERM)\n        {HANGS}"
    )
    assert start(what, "--eval_samples", "4", "--eval_batch_size", "1") == 0
    out = tmp_path / "run"
    assert (out / "model.safetensors").is_file() and (out / "summary.json").is_file()
    assert "the evaluation after training was given up" in capsys.readouterr().err


def test_an_error_before_the_first_step_saves_nothing(start, tmp_path, capsys):
    with pytest.raises(RewardError):
        start("pass\n    raise OSError('judge unreachable')")
    assert saved(tmp_path / "run") == []
    assert "no step was saved" in capsys.readouterr().err


def test_no_step_is_saved_whose_update_had_begun(start, tmp_path, capsys, monkeypatch):
    step = grpo.ALGORITHM.step

    def half(state, prompts):
        result = step(state, prompts)
        if state.step == 3:
            raise OSError("after the update")
        return result

    monkeypatch.setattr(grpo.ALGORITHM, "step", half)
    with pytest.raises(OSError, match="after the update"):
        start("pass", "--save_steps", "2")
    assert saved(tmp_path / "run") == ["checkpoint-2"]
    assert "checkpoint-2; resume with" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
     RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["cuda", "python", "cpu"],
)  # fmt: skip
def test_out_of_memory_names_the_flags_to_lower(start, tmp_path, capsys, monkeypatch, error):
    step = grpo.ALGORITHM.step

    def full(state, prompts):
        if state.step == 1:
            raise error
        return step(state, prompts)

    monkeypatch.setattr(grpo.ALGORITHM, "step", full)
    assert start("pass") == 1
    shown = capsys.readouterr().err
    assert "out of memory; lower --per_device_train_batch_size" in shown and "--max_pixels" in shown
    assert saved(tmp_path / "run") == ["checkpoint-1"]


def test_rows_that_can_not_be_loaded_lose_no_step(start, tmp_path, capsys, monkeypatch):
    load, calls = PromptSource.load, []

    def gone(self, index):
        calls.append(index)
        if len(calls) == 4:  # one is loaded before the model, to see that there is one
            raise OSError("Input/output error")
        return load(self, index)

    monkeypatch.setattr(PromptSource, "load", gone)
    with pytest.raises(OSError, match="Input/output"):
        start("pass")
    assert saved(tmp_path / "run") == ["checkpoint-2"]


@pytest.mark.parametrize("swallow", ["bare", "executor"])
def test_a_reward_that_swallows_its_timeout_or_hangs_in_threads(
    digits, tmp_path, start, capsys, swallow
):
    """Neither its junk is learnt from, nor are its threads waited for."""
    indent = "\n        "
    what = indent.join(
        ["try:", "    time.sleep(60)", "except BaseException:", "    return [9.0] * 4"]
    )
    if swallow == "executor":
        pool = "concurrent.futures.ThreadPoolExecutor(1)"
        what = f"import concurrent.futures; {pool}.submit(time.sleep, 600).result()"
        file = tmp_path / "mine.py"
        file.write_text(REWARD.format(what=what))
        argv = [*arguments(digits, tmp_path, file), "--reward_timeout", "1"]
        done = processes.run(*argv)
        assert done.returncode == 1 and "reward function then took longer" in done.stderr
    else:
        assert start(what, "--reward_timeout", "0.5") == 1
        assert "reward function then took longer" in capsys.readouterr().err
    assert saved(tmp_path / "run") == ["checkpoint-2"]


def test_a_reward_that_is_silent_too_long_loses_no_step(start, tmp_path, capsys):
    what = "pass\n    return [None] * len(completions)"
    assert start(what, "--max_bad_steps", "3") == 1
    assert "reward function then gave no finite value" in capsys.readouterr().err
    assert saved(tmp_path / "run") == ["checkpoint-3"]


def test_what_a_reward_reports_need_not_be_json(start, tmp_path):
    what = "_['log_extra']('odd', [object(), {1, 2}, lambda: 1, 'text'])"
    assert start(what) == 0
    odd = [r["odd"] for r in read_jsonl(tmp_path / "run/completions.jsonl") if "odd" in r]
    assert len(odd) == 4 and all(isinstance(value, str) for value in odd) and odd[3] == "text"


def test_a_second_run_in_the_folder_is_refused(start, tmp_path, capsys):
    out = tmp_path / "run"
    inner = f"import virft_fast.train as t; code = t.main(['--output_dir', {str(out)!r}])"
    assert start(f"{inner}; open({str(tmp_path / 'code')!r}, 'w').write(str(code))") == 0
    assert (tmp_path / "code").read_text() == "2"
    error = capsys.readouterr().err
    assert f"another run, process {os.getpid()}" in error
    assert len(read_jsonl(out / "metrics.jsonl")) == 4


def test_a_run_stops_with_another_rank_that_is_asked_to(start, tmp_path, capsys, monkeypatch):
    asked = []

    def any_rank(flag, device="cpu"):
        asked.append(flag)
        return flag or len(asked) == 10  # an even one is the question whether to stop

    monkeypatch.setattr(dist, "any_rank", any_rank)
    assert start("pass", "--max_steps", "50") == 0
    assert True not in asked and "stopped by a signal" in capsys.readouterr().err
    assert len(saved(tmp_path / "run")) == 1


def test_every_rank_gets_what_the_main_process_computes(monkeypatch):
    assert dist.on_main(lambda: 3) == 3
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "is_main", lambda: False)
    others = iter([None, [5]])  # the main process's error, then its result
    monkeypatch.setattr(dist, "all_gather_object", lambda mine: [next(others), mine])
    assert dist.on_main(lambda: pytest.fail("another rank computes it, too")) == 5


def test_what_fails_on_one_rank_is_agreed_upon(monkeypatch):
    with pytest.raises(OSError, match="here") as failed, dist.agreed():
        raise OSError("here")
    assert dist.is_agreed(failed.value)
    monkeypatch.setattr(dist, "world_size", lambda: 3)
    monkeypatch.setattr(dist, "is_main", lambda: False)
    monkeypatch.setattr(
        dist, "all_gather_object", lambda mine: [mine, None, ("SectionStopped", "given up")]
    )
    with pytest.raises(dist.RankFailed, match="rank 2: SectionStopped: given up") as failed:
        with dist.agreed():
            pass
    assert dist.is_agreed(failed.value) and is_given_up(failed.value)
    with pytest.raises(OSError, match="here") as failed, dist.agreed():
        raise OSError("here")
    assert dist.is_agreed(failed.value) and not dist.is_agreed(OSError("elsewhere"))
    with pytest.raises(dist.RankFailed):
        dist.on_main(lambda: pytest.fail("this is not the main process"))


# --- Two ranks -------------------------------------------------------------------------------

LAUNCH = """
from virft_fast import watch
watch.TICK, watch.STOP_SECONDS, watch.STALL_SECONDS = 0.05, 0.5, 1.0
from virft_fast.commands import end_process
from virft_fast.train import main
end_process(main())
"""


def two_ranks(digits, tmp_path, what, *more):
    """The end of two processes whose reward does `what` in rank 1's third call."""
    file = tmp_path / "mine.py"
    head, tail = REWARD.split("def then")
    file.write_text(head + f"def act():\n    {what}\n\ndef then" + tail.format(
        what="os.environ['RANK'] == '1' and act()"))  # fmt: skip
    argv = [*arguments(digits, tmp_path, file), *more]
    return processes.Program(*argv, module=LAUNCH, processes=2)


def test_one_ranks_hanging_reward_ends_all_and_the_last_step_is_saved(digits, tmp_path):
    program = two_ranks(digits, tmp_path, HANGS, "--reward_timeout", "2")
    for rank in program.ranks:
        rank.join(120)
    error = program.wait().stderr
    assert [rank.exitcode for rank in program.ranks] == [1, 1], error
    text = "reward function then took longer than 2 s"
    of_rank_0 = f"rank 1: SectionTimeout: {text}"
    assert of_rank_0 in error and text in error.replace(of_rank_0, "")
    assert saved(tmp_path / "run") == ["checkpoint-2"]
    state = json.loads((tmp_path / "run/checkpoint-2/trainer_state.json").read_text())
    assert state["step"] == 2


def test_a_stopped_rank_is_waited_for_no_longer_than_the_time_limit(digits, tmp_path):
    stop = "os.kill(os.getpid(), signal.SIGSTOP)"
    program = two_ranks(digits, tmp_path, stop, "--ddp_timeout", "8", "--save_steps", "1")
    done = program.wait(120)  # kills the stopped rank when the other has ended
    statuses = [rank.exitcode for rank in program.ranks]
    assert statuses == [1, -signal.SIGKILL], done.stderr
    report = (tmp_path / "run/stalled-rank-0.txt").read_text()
    assert "waiting in all_gather" in report and "train_step" in report
    assert "checkpoint-2; resume with" in done.stderr
