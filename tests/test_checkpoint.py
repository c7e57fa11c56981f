"""Checkpoints are whole or not there, load with plain from_pretrained, and outlive a full disk."""

from __future__ import annotations

import errno
import logging
import shutil

import pytest
import torch
from helpers import make_state, parameters
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from virft_fast import checkpoint
from virft_fast.checkpoint import find_checkpoint, list_checkpoints, read_state, save_checkpoint
from virft_fast.grpo import train_step


@pytest.fixture
def state(processor):
    return make_state(processor, config={"beta": 0.0}, prompts_per_microbatch=4)


def save(state, processor, folder, step, **options):
    return save_checkpoint(
        folder, step, model=state.policy.model, processor=processor, engine=state.engine,
        state={"step": step}, **options,
    )  # fmt: skip


def test_checkpoint_loads_with_plain_from_pretrained(state, processor, tmp_path):
    folder = save(state, processor, tmp_path, 1)
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    for name, value in parameters(model).items():
        expected = dict(state.policy.model.named_parameters())[name]
        assert torch.equal(value, expected.detach().bfloat16().float())
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"
    assert read_state(folder) == {"step": 1}


def test_engine_state_comes_back_bit_for_bit(state, processor, prompts, tmp_path):
    train_step(state, prompts)
    folder = save(state, processor, tmp_path, 1)
    expected = [train_step(state, prompts)[0]["loss"] for _ in range(2)]
    other = make_state(processor, config={"beta": 0.0}, prompts_per_microbatch=4)
    other.engine.load_state(folder / "engine")
    other.step = 1
    assert [train_step(other, prompts)[0]["loss"] for _ in range(2)] == expected


def test_only_the_latest_are_kept(state, processor, tmp_path):
    for step in (2, 10, 9):
        save(state, processor, tmp_path, step, only_model=True, total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


def test_half_written_checkpoint_is_not_one(state, processor, tmp_path):
    done = save(state, processor, tmp_path, 1)
    shutil.copytree(done, tmp_path / "checkpoint-2.writing")
    assert list_checkpoints(tmp_path) == [done]
    assert find_checkpoint(tmp_path, "latest") == done


@pytest.mark.parametrize("where", ["save_model", "engine"])
def test_full_disk_warns_and_leaves_what_was_there(
    state, processor, tmp_path, monkeypatch, caplog, where
):
    first = save(state, processor, tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "engine":
        monkeypatch.setattr(state.engine, "save_state", full)
    else:
        monkeypatch.setattr(checkpoint, "save_model", full)
    with caplog.at_level(logging.ERROR):
        assert save(state, processor, tmp_path, 2) is None
    assert "No space left" in caplog.text and "COULD NOT SAVE" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    state.engine.load_state(first / "engine")


def test_model_only_checkpoint_can_not_be_resumed(state, processor, tmp_path):
    folder = save(state, processor, tmp_path, 1, only_model=True)
    assert not (folder / "engine").exists()
    with pytest.raises(ValueError, match="no engine state"):
        find_checkpoint(tmp_path, str(folder))
    with pytest.raises(FileNotFoundError, match="got none"):
        find_checkpoint(tmp_path, "latest")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_checkpoint(tmp_path, str(tmp_path / "other"))


def test_state_that_would_run_code_is_not_loaded(state, processor, tmp_path):
    folder = save(state, processor, tmp_path, 1)

    class Harm:
        def __reduce__(self):
            return print, ("harm",)

    torch.save({"module": Harm()}, folder / "engine/state.pt")
    with pytest.raises(Exception, match="[Ww]eights"):
        state.engine.load_state(folder / "engine")
