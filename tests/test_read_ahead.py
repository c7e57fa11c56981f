"""Rows are loaded one step ahead, in a thread, without changing which rows a run uses."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from helpers import make_sample, make_state, read_jsonl
from pretend_gpu import GPU, PretendGPU

from virft_fast import train
from virft_fast.data import PromptSampler
from virft_fast.data.prompt_source import PromptSource
from virft_fast.data.read_ahead import ReadAhead
from virft_fast.models.qwen_vl import encode_prompt

SHORT_RUN = [
    "--model_name_or_path", "tiny", "--dataset_name", "shapes_detection",
    "--per_device_train_batch_size", "2", "--num_generations", "2", "--max_completion_length", "4",
    "--save_steps", "0", "--report_to", "none",
]  # fmt: skip


def reader():
    (thread,) = (t for t in threading.enumerate() if t.name == "virft_fast reader")
    return thread


def test_the_sampler_knows_its_next_rows_and_stays_where_it_is():
    samplers = [PromptSampler(10, 2, seed=1, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(8):  # more than three epochs
        told = [sampler.upcoming() for sampler in samplers]
        before = [sampler.state_dict() for sampler in samplers]
        assert told == [sampler.upcoming() for sampler in samplers]
        assert before == [sampler.state_dict() for sampler in samplers]
        got = [s.next_batch(lambda index: index, lambda own: [own], print) for s in samplers]
        assert got == told


def test_the_sampler_has_nothing_to_announce_if_no_row_is_usable():
    sampler = PromptSampler(2, 1, seed=0)
    sampler._bad = {0: "bad", 1: "bad"}
    assert sampler.upcoming() == []


def test_rows_are_loaded_before_they_are_asked_for_and_once():
    calls, inside = [], []

    def load(index):
        inside.append(index)
        assert len(inside) == 1  # never two threads at the same time
        time.sleep(0.01)
        calls.append((index, threading.current_thread() is threading.main_thread()))
        inside.remove(index)
        return index * 10

    ahead = ReadAhead(load)
    ahead.start([4, 2, 7])
    assert ahead(9) == 90  # not announced: loaded here, in between
    assert [ahead(2), ahead(4)] == [20, 40]
    ahead._thread.join(5)  # may have ended
    assert [index for index, _ in calls if index != 9] == [4, 2, 7]
    assert {in_main for index, in_main in calls if index != 9} == {False}
    ahead.start([1])
    assert ahead(1) == 10 and ahead(7) == 70  # the old row 7 was dropped
    assert [index for index, _ in calls].count(7) == 2


def test_an_error_is_raised_where_the_row_is_asked_for():
    def load(index):
        if index == 2:
            raise OSError("the disk is gone")
        return index

    ahead = ReadAhead(load)
    ahead.start([1, 2, 3])
    assert ahead(1) == 1 and ahead(3) == 3
    with pytest.raises(OSError, match="the disk is gone"):
        ahead(2)
    ahead.start([2])  # a row that nobody asks for
    ahead.close()


def test_a_disk_that_does_not_answer_does_not_keep_a_run_from_ending(monkeypatch):
    monkeypatch.setattr("virft_fast.data.read_ahead.CLOSE_SECONDS", 0.1)
    answers = threading.Event()
    ahead = ReadAhead(lambda index: answers.wait(60))
    ahead.start([1, 2])
    assert reader().daemon
    started = time.monotonic()
    ahead.close()
    assert time.monotonic() - started < 5
    answers.set()
    ahead._thread.join(5)


def test_a_run_loads_the_next_steps_rows_while_a_step_computes(tmp_path, monkeypatch):
    """Every row is loaded in the thread but those of the first step, and none after the last."""
    by_thread, load = [], PromptSource.load
    step, seen = train.loop.algorithm_of, []

    def watched(source, index):
        by_thread.append(threading.current_thread() is threading.main_thread())
        return load(source, index)

    def algorithm_of(config):
        algorithm = step(config)
        inner = algorithm.step

        def train_step(state, prompts):
            seen.append([prompt.sample.index for prompt in prompts])
            return inner(state, prompts)

        monkeypatch.setattr(algorithm, "step", train_step, raising=False)
        return algorithm

    monkeypatch.setattr(PromptSource, "load", watched)
    monkeypatch.setattr(train.loop, "algorithm_of", algorithm_of)
    out = tmp_path / "run"
    assert train.main([*SHORT_RUN, "--max_steps", "3", "--output_dir", str(out)]) == 0
    assert by_thread[-6:] == [True, True, False, False, False, False]
    assert len(read_jsonl(out / "metrics.jsonl")) == 3
    assert len({row for rows in seen for row in rows}) == 6


def test_an_error_in_the_thread_ends_the_run_at_its_own_step(tmp_path, monkeypatch, capsys):
    load, loaded = PromptSource.load, []

    def failing(source, index):
        if threading.current_thread() is not threading.main_thread():
            loaded.append(index)
            if len(loaded) > 2:  # a row of step 3
                raise OSError("the disk is gone")
        return load(source, index)

    monkeypatch.setattr(PromptSource, "load", failing)
    argv = [*SHORT_RUN, "--max_steps", "5", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(OSError, match="the disk is gone"):
        train.main(argv)
    assert "ended in step 3; saved is" in capsys.readouterr().err
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 2


def test_pixels_are_moved_and_cast_once_a_step(processor):
    """All passes of a step read one copy, and the host waits for none."""
    state = make_state(processor)
    policy = state.policy.to(torch.bfloat16)
    prompt = encode_prompt(processor, make_sample(0))
    with PretendGPU() as gpu:
        gpu.adopt(policy)
        (placed,) = policy.place_images([prompt], GPU)
        assert placed.pixel_values.is_cuda and placed.pixel_values.dtype == torch.bfloat16
        for _ in range(2):
            inputs = policy.collate([placed], [[torch.tensor([5])]], pad_token_id=0, device=GPU)
            assert inputs.pixel_values.data_ptr() == placed.pixel_values.data_ptr()
        assert not gpu.waits
    assert torch.equal(placed.pixel_values, prompt.pixel_values.bfloat16())
