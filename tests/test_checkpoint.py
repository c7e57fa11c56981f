"""Checkpoints are whole or not there, load with plain from_pretrained, and outlive a full disk."""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
from types import SimpleNamespace

import pytest
import torch
from helpers import make_state, parameters
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from virft_fast import checkpoint
from virft_fast.algorithms.grpo import train_step
from virft_fast.checkpoint import (
    find_checkpoint,
    find_damage,
    list_checkpoints,
    read_checksums,
    read_state,
    save_checkpoint,
)
from virft_fast.config import UsageError, usage
from virft_fast.data.order import BadRows, PromptSampler
from virft_fast.metrics import MetricsWriter
from virft_fast.train import parse_args
from virft_fast.train.resume import load_checkpoint, read_resumed


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


def listed(folder):
    return set(read_checksums(folder))


def files_of(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_every_file_has_a_checksum_and_each_kind_of_damage_is_found(state, processor, tmp_path):
    folder = save(state, processor, tmp_path, 1)
    assert {"engine/state.pt", "model.safetensors", "trainer_state.json"} <= listed(folder)
    assert listed(folder) == files_of(folder) - {"checksums.json"}
    assert find_damage(folder) is None
    for name in sorted(files_of(folder)):
        path = folder / name
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 0x40
        for content in (bytes(flipped), whole[:-1], b""):
            path.write_bytes(content)
            assert name in find_damage(folder) or name == "checksums.json"
            assert find_damage(folder)
        path.unlink()
        assert name == "checksums.json" or f"{name}: no such file" in find_damage(folder)
        path.write_bytes(whole)
    assert find_damage(folder) is None


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"files": {}}', '{"algorithm": "md5", "files": {}}', "[" * 100_000,
     '{"algorithm": "xxh3_128", "files": {"config.json": [-1, "0"]}}',
     '{"algorithm": "xxh3_128", "files": {"config.json": ["1", null]}}',
     '{"algorithm": "xxh3_128", "files": {"../other": [0, "0"]}}'],
)  # fmt: skip
def test_a_list_of_checksums_that_can_not_be_read_is_damage(tmp_path, content):
    (tmp_path / "checksums.json").write_text(content)
    assert find_damage(tmp_path)


def test_ranks_share_the_reading(state, processor, tmp_path, monkeypatch):
    folder = save(state, processor, tmp_path, 1)
    read = []
    original = checkpoint.checksum
    monkeypatch.setattr(checkpoint, "checksum", lambda path: (read.append(path), original(path))[1])
    monkeypatch.setattr(checkpoint.dist, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(checkpoint.dist, "rank", lambda rank=rank: rank)
        assert checkpoint._damage_of_share(folder) is None
    assert sorted(read) == sorted(folder / name for name in listed(folder))


def test_latest_sets_damaged_checkpoints_aside_and_takes_the_one_before(
    state, processor, tmp_path, caplog
):
    good, *bad = (save(state, processor, tmp_path, step) for step in (1, 2, 3))
    (bad[0] / "model.safetensors").unlink()
    shutil.rmtree(bad[1] / "engine")
    before = {path.name for path in tmp_path.iterdir()}
    assert find_checkpoint(tmp_path, "latest", dry_run=True) == good
    assert {path.name for path in tmp_path.iterdir()} == before
    assert find_checkpoint(tmp_path, "latest") == good
    assert "model.safetensors: no such file" in caplog.text and "engine/state.pt" in caplog.text
    assert list_checkpoints(tmp_path) == [good]
    assert len(list(tmp_path.glob("damaged-checkpoint-[23]-*"))) == 2
    (good / "trainer_state.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="only damaged ones: checkpoint-1: trainer_state"):
        find_checkpoint(tmp_path, "latest")
    assert find_checkpoint(tmp_path, "true") is None


def test_a_named_damaged_checkpoint_is_refused_unless_its_list_is_deleted(
    state, processor, tmp_path, caplog
):
    folder = save(state, processor, tmp_path, 1)
    (folder / "trainer_state.json").write_text('{"step": 1, "mine": true}')
    with pytest.raises(ValueError, match="trainer_state.json: .* delete .*checksums.json"):
        find_checkpoint(tmp_path, str(folder))
    assert folder.is_dir()
    (folder / "checksums.json").unlink()
    assert find_checkpoint(tmp_path, str(folder)) == folder
    assert "has no checksums.json" in caplog.text


def test_every_file_is_on_disk_before_the_folder_has_its_name(
    state, processor, tmp_path, monkeypatch
):
    flushed, renamed = set(), []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor):
        fsync(descriptor)
        flushed.add(os.stat(descriptor).st_ino)

    def noted_rename(source, target):
        inside = [source, *source.rglob("*")]
        renamed.append({path.name for path in inside if path.stat().st_ino not in flushed})
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    save(state, processor, tmp_path, 1)
    assert renamed == [set()] and tmp_path.stat().st_ino in flushed


def test_an_existing_final_folder_is_replaced_and_survives_a_kill_in_between(
    state, processor, tmp_path, monkeypatch
):
    folder = save(state, processor, tmp_path, 1, only_model=True)
    rename = os.rename

    def killed(source, target):
        if source.name.endswith(".writing"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save(state, processor, tmp_path, 1)
    monkeypatch.setattr(os, "rename", rename)
    assert list_checkpoints(tmp_path) == []
    assert find_checkpoint(tmp_path, "true", dry_run=True) is None
    with pytest.raises(FileNotFoundError):  # it is back, but without engine state
        find_checkpoint(tmp_path, "latest")
    assert list_checkpoints(tmp_path) == [folder] and find_damage(folder) is None
    (folder / "mine").touch()
    assert save(state, processor, tmp_path, 1) == folder
    assert (folder / "engine/state.pt").is_file() and not (folder / "mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_rotation_renames_first_and_says_what_it_could_not_delete(
    state, processor, tmp_path, monkeypatch, caplog
):
    rmtree = shutil.rmtree

    def stuck(path, *args, **kwargs):
        if "writing" in str(path):
            return rmtree(path, *args, **kwargs)
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", stuck)
    for step in (1, 2, 3):
        save(state, processor, tmp_path, step, only_model=True, total_limit=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert caplog.text.count("COULD NOT DELETE") == 2
    checkpoint.delete_leftovers(tmp_path, None)  # fails again, which has been said
    assert caplog.text.count("COULD NOT DELETE") == 2
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    theirs = ("deleting-checkpoint-x-1", "checkpoint-4.writing.bak", "my.writing", "damaged-1")
    ours = ("checkpoint-4.writing", "base_model.writing", "replaced-base_model-12")
    for name in (*theirs, *ours):
        (tmp_path / name).mkdir()
    for name in ("metrics", ".metrics.jsonl", "reference_logps", ".summary.json"):
        (tmp_path / f"{name}.writing").touch()
    checkpoint.delete_leftovers(tmp_path, None)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", *theirs}
    save(state, processor, tmp_path, 4, only_model=True)  # killed before it could rotate
    checkpoint.delete_leftovers(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", *theirs}


@pytest.mark.usefixtures("heard_signals")
def test_an_error_of_any_kind_costs_one_checkpoint_and_ctrl_c_passes(
    state, processor, tmp_path, monkeypatch
):
    """tokenizers raises a bare Exception where the disk is full."""
    for error in (Exception("No space left on device"), TypeError("x")):
        monkeypatch.setattr(checkpoint, "save_model", lambda *a, e=error: exec("raise e", {"e": e}))
        assert save(state, processor, tmp_path, 1) is None
    monkeypatch.setattr(checkpoint, "save_model", lambda *a: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        save(state, processor, tmp_path, 1)


@contextlib.contextmanager
def small_disk(folder, size):
    """A full disk at `size` bytes: a tmpfs for root, else a limit on the size of files."""
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and not subprocess.run(words, capture_output=True).returncode
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 4, hard))
    try:
        yield mounted
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if mounted:
            # Lazily: torch may keep a file open that it could not write.
            subprocess.run(["umount", "-l", str(folder)], check=True)


def test_wherever_the_disk_gets_full_earlier_checkpoints_stay_whole(
    state, processor, tmp_path, caplog
):
    first = save(state, processor, tmp_path / "first", 1)
    pages = sum(-(-(first / name).stat().st_size // 4096) for name in files_of(first))
    disk = tmp_path / "disk"
    disk.mkdir()
    for share in (0.02, 0.1, 0.2, 0.3, 0.6, 0.95):
        with small_disk(disk, int(4096 * pages * (1 + share))) as mounted:
            if mounted:
                shutil.copytree(first, disk / "checkpoint-1")
            assert save(state, processor, disk, 2) is None, share
            left = ["checkpoint-1"] if mounted else []
            assert [path.name for path in disk.iterdir()] == left
            assert not mounted or find_damage(disk / "checkpoint-1") is None
    assert caplog.text.count("COULD NOT SAVE") == 6


SAVED = {
    "step": 3, "bad_steps": 0, "silent_steps": {"format": 1}, "skipped_steps": 1,
    "num_tokens": 100, "world_size": 1, "sampler": None, "bad_rows": {"rows": [[2, "no image"]]},
    "writer": {"window": {"loss": [0.5, 1]}},
    "before": {"means": {"reward": 0.5}, "answers": {"0": "a"}, "num_samples": 1},
    "config": {"seed": 42}, "weights": [["model.safetensors", 10, 20]], "adapter": None,
}  # fmt: skip
ODD = ["null", "true", "-1", "1e400", "NaN", "9" * 400, '"x"', "[[[]]]", '{"a": [{}]}',
       "[" * 300 + "]" * 300, "1.5", '[["x", "y"]]', '{"rows": 3}']  # fmt: skip


def odd_states():
    """Each value of a run's state in turn, at any depth, missing or replaced by odd JSON."""
    sampler = PromptSampler(8, 2, seed=42)
    sampler.next_batch(int, lambda bad: [bad], print)
    whole = SAVED | {"sampler": sampler.state_dict() | {"bad": [[2, "no image"]]}}

    def paths(value, at=()):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield (*at, key)
            if isinstance(inner, (dict, list)):
                yield from paths(inner, (*at, key))

    yield None, None, json.dumps(whole)
    for path in paths(whole):
        for odd in [None, *ODD]:
            changed = copy.deepcopy(whole)
            *above, last = path
            parent = functools.reduce(lambda value, key: value[key], above, changed)
            if odd is None:
                del parent[last]
            else:
                parent[last] = "@"
            yield path, odd, json.dumps(changed).replace('"@"', odd or "")


def test_odd_values_in_a_state_are_usage_errors_never_tracebacks(tmp_path):
    source = SimpleNamespace(stamp=SAVED["weights"])
    config = parse_args(["--output_dir", str(tmp_path)])
    folder = tmp_path / "checkpoint-3"
    (folder / "engine").mkdir(parents=True)
    (folder / "engine/state.pt").touch()
    refused, accepted = 0, set()
    for path, odd, text in odd_states():
        (folder / "trainer_state.json").write_text(text)
        state = SimpleNamespace(
            engine=SimpleNamespace(load_state=lambda folder: None),
            adapter=None,
            base_weights=SAVED["weights"],
            history=None,
            prompts_per_microbatch=2,
            gradient_accumulation_steps=1,
        )
        data = SimpleNamespace(bad_rows=BadRows(10))
        writer = MetricsWriter(tmp_path, total_steps=4, report_to=["none"], run_name="", config={})
        try:
            with usage():
                saved = read_resumed(folder, config, source, None)
            load_checkpoint(folder, saved, state, PromptSampler(8, 2, seed=42), data, config)
            writer.load_state_dict(saved["writer"])
            accepted.add((path, odd))
        except UsageError as error:
            assert "checkpoint-3" in str(error)
            refused += 1
    assert (None, None) in accepted
    # Names and texts may be anything, and the settings are compared, not used.
    fitting = {(("silent_steps",), '{"rows": 3}')}
    fitting |= {(("writer", "window", "loss", 0), number) for number in ("-1", "1.5")}
    for path, odd in accepted - fitting - {(None, None)}:
        assert odd in (None, "null", '"x"') or path[0] in ("config", "before"), (path, odd)
    assert refused > 400


def test_prompts_so_far_of_a_checkpoint_that_does_not_have_them(tmp_path):
    """As of an earlier version, whose steps used the prompts of one update; the run that resumes
    may use 12 for a rollout."""
    folder = tmp_path / "checkpoint-3"
    (folder / "engine").mkdir(parents=True)
    argv = ["--output_dir", str(tmp_path), "--per_device_train_batch_size", "2",
            "--gradient_accumulation_steps", "3", "--steps_per_generation", "6"]  # fmt: skip
    state = SimpleNamespace(
        engine=SimpleNamespace(load_state=lambda folder: None),
        base_weights=SAVED["weights"],
        history=None,
        prompts_per_microbatch=2,
        gradient_accumulation_steps=3,
    )
    sampler = PromptSampler(24, 12, seed=42)
    data = SimpleNamespace(bad_rows=BadRows(10), prompts_per_step=12)
    for number, known in ((18, {}), (18, {"num_prompts": None}), (40, {"num_prompts": 40})):
        saved = SAVED | {"sampler": sampler.state_dict()} | known
        load_checkpoint(folder, saved, state, sampler, data, parse_args(argv))
        assert state.num_prompts == number


@pytest.mark.parametrize("text", ["", "[]", "3", '"x"', "[[1, 2]]", "{" * 10_000, "\0", "{}"])
def test_a_state_that_is_no_object_is_a_usage_error(tmp_path, text):
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(ValueError, match="trainer_state.json"):
        checkpoint.check_state(tmp_path, read_state(tmp_path))
