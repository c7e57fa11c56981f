"""What the doctor looks at, and what it says where something is missing."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from virft_fast import doctor
from virft_fast.deepspeed_config import offloads
from virft_fast.doctor import Finding
from virft_fast.train import dry_run

ROOT = Path(__file__).parent.parent


def test_the_tested_releases_are_those_of_the_set_up():
    lines = [line.split(";")[0].strip() for line in (ROOT / "constraints.txt").open()]
    for name, version in doctor.TESTED.items():
        assert f"{name}=={version}" in lines or f"{name}<={version}" in lines


def test_this_environment_has_no_problem(capsys):
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    assert "ok      torch" in shown and "fused loss on cpu" in shown and "no problems" in shown


@pytest.mark.parametrize(
    "installed, level, text",
    [
        ("2.10.0", "problem", "torch 2.10.0 is older than 2.11"),
        ("2.13.0+cu130", "ok", "torch 2.13.0+cu130"),
        ("3.0.1", "note", "torch 3.0.1"),
        (None, "problem", "torch is missing"),
    ],
)
def test_a_package_of_another_release_is_named_with_its_remedy(monkeypatch, installed, level, text):
    version = metadata.version

    def other(name):
        if name == "torch" and installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed if name == "torch" else version(name)

    monkeypatch.setattr(metadata, "version", other)
    (finding,) = [f for f in doctor._packages() if f.what.startswith("torch ")]
    assert (finding.level, finding.what) == (level, text)
    assert bool(finding.remedy) == (level != "ok")


def test_an_installed_package_that_cannot_be_imported_is_a_problem(monkeypatch):
    """As after an update of torch: flash-attn's compiled part misses a symbol."""
    monkeypatch.setattr(metadata, "version", lambda name: "2.8.0")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    found = [f for f in doctor._optional_packages() if f.what.startswith("flash-attn")]
    assert [f.level for f in found] == ["problem"]
    assert found[0].what.startswith("flash-attn 2.8.0 can't be imported: ModuleNotFoundError")


def test_a_problem_is_the_exit_status(monkeypatch, capsys):
    bad = Finding("problem", "no disk", "buy one")
    monkeypatch.setattr(doctor, "findings", lambda: iter([Finding("ok", "torch"), bad]))
    assert doctor.main([]) == 1
    assert "problem no disk\n        -> buy one" in capsys.readouterr().out


def test_a_run_is_checked_with_its_flags(capsys):
    run = ["--model_name_or_path", "tiny", "--dataset_name", "shapes_detection"]
    assert doctor.main([*run, "--output_dir", "unused"]) == 0
    assert "memory of one process" in capsys.readouterr().out
    assert doctor.main(["--model_name_or_path", "tiny", "--no_such_flag", "1"]) == 2


@pytest.mark.parametrize("gib, verdict", [(80, "left for keys"), (0.01, "TOO LITTLE")])
def test_a_run_on_a_gpu_is_told_what_is_left(monkeypatch, gib, verdict):
    sizes = {"weights": 30 * 2**20, "keys and values of a rollout, 9 tokens": 2**40}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, int(gib * 2**30)))
    line = dry_run._room_on_gpu(sizes, 8)
    assert verdict in line and ("with 8 processes" in line) == (gib < 1)


def test_what_deepspeed_offloads_needs_no_gpu_memory():
    blocks = {"offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": None}
    config = {"zero_optimization": blocks}
    assert offloads(config, "offload_optimizer") and not offloads(config, "offload_param")
    blocks["offload_optimizer"] = {"device": "none"}
    assert not offloads(config, "offload_optimizer") and not offloads(None, "offload_param")


def test_a_check_that_fails_is_a_problem_and_the_others_go_on(monkeypatch, capsys):
    def broken():
        raise OSError("libcudart.so: cannot open shared object file")
        yield

    monkeypatch.setattr(doctor, "_matcher", broken)
    assert doctor.main([]) == 1
    shown = capsys.readouterr().out
    assert "problem the matcher can't be checked: OSError: libcudart.so" in shown
    assert "fused loss on cpu" in shown


def test_a_checkout_that_is_not_installed_is_said(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert "virft_fast is not installed" in [finding.what for finding in doctor._packages()]


def test_a_loss_that_fails_is_a_problem(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr("virft_fast.kernels.linear_grpo_loss", fail)
    (finding,) = doctor._loss()
    assert finding.level == "problem" and "no kernel image" in finding.what and finding.remedy


def test_a_full_disk_is_noted_and_a_folder_that_cannot_be_written_is_a_problem(
    monkeypatch, tmp_path
):
    usage = type("Usage", (), {"free": 2**30})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    assert [f.level for f in doctor._disk(tmp_path)] == ["note"]
    monkeypatch.setattr("os.access", lambda *_: False)
    assert [f.level for f in doctor._disk(tmp_path)] == ["problem"]
