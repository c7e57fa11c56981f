"""What the doctor looks at, and what it says where something is missing."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from virft_fast import doctor, versions
from virft_fast.config import UsageError
from virft_fast.deepspeed_config import offloads
from virft_fast.doctor import Finding
from virft_fast.train import dry_run, run

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
        (None, "problem", "missing for training: torch"),
    ],
)
def test_a_package_of_another_release_is_named_with_its_remedy(monkeypatch, installed, level, text):
    version = metadata.version

    def other(name):
        if name == "torch" and installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed if name == "torch" else version(name)

    monkeypatch.setattr(metadata, "version", other)
    (finding,) = [f for f in doctor._packages() if re.search(r"torch\b", f.what)]
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
    monkeypatch.setattr(doctor, "findings", lambda model: iter([Finding("ok", "torch"), bad]))
    assert doctor.main([]) == 1
    assert "problem no disk\n        -> buy one" in capsys.readouterr().out


def test_a_model_is_described(capsys):
    """What it gets; or why it can't be trained, as a problem."""
    (first, *rest) = doctor._model("tiny")
    assert first == Finding("ok", "model tiny: qwen2_vl") and {f.level for f in rest} == {"ok"}
    assert "LoRA: yes, on down_proj, gate_proj" in rest[-1].what
    assert doctor.main(["--model", "/nowhere"]) == 1
    shown = capsys.readouterr().out
    assert "expected a folder with config.json, a hub id or `tiny`, got '/nowhere'" in shown
    assert "docs/models.md lists what can be trained" in shown


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


def driver(monkeypatch, *, built, supports, present=True):
    """Pretend that torch was built for a CUDA release, and that a driver supports another."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(versions, "driver_version", lambda: supports)
    monkeypatch.setattr(versions.os.path, "exists", lambda path: present)


def test_the_drivers_version_is_asked_of_its_library(monkeypatch):
    class Library:
        def __init__(self, name):
            if name != "libcuda.so.1":
                raise OSError(name)

        def cuDriverGetVersion(self, pointer):
            pointer._obj.value = 12_020

    monkeypatch.setattr(versions.ctypes, "CDLL", Library)
    assert versions.driver_version() == 12_020


@pytest.mark.parametrize(
    ("built", "supports", "said"),
    [
        ("13.0", 12020, "it supports CUDA 12.2, and torch .* was built for CUDA 13.0"),
        ("12.8", 12020, None),  # newer releases of one major version run
        ("13.0", 13010, None),
        ("13.0", 0, None),  # no driver
        (None, 0, "was built without CUDA, but there is an NVIDIA driver"),
    ],
)
def test_a_driver_that_is_too_old_is_said_by_name(monkeypatch, caplog, built, supports, said):
    driver(monkeypatch, built=built, supports=supports)
    findings = list(doctor._gpus())
    run._check_versions(run.parse_args([]))
    if said is None:
        assert [finding.level for finding in findings] == ["note"] and not caplog.text
        return
    (finding,) = findings
    assert finding.level == "problem" and re.search(said, finding.what) and finding.remedy
    assert re.search(f"running on the CPU: .*{said}", caplog.text)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the CPU was asked for
    assert versions.unusable_driver() is None


def test_a_run_names_what_is_too_old(monkeypatch, capsys):
    monkeypatch.setattr(metadata, "version", lambda name: "2.9.1" if name == "torch" else "99")
    assert run.main(["--dataset_name", "shapes_detection", "--dry_run"]) == 2
    assert re.search("error: torch 2.9.1 is older than 2.11: pip", capsys.readouterr().err)


def test_bf16_on_a_gpu_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UsageError, match="--bf16: expected a GPU of sm_80 or later, got sm_75"):
        run._check_versions(run.parse_args(["--bf16"]))
    run._check_versions(run.parse_args([]))


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
