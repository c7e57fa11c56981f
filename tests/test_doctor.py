"""What the doctor looks at, and what it says where something is missing."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch

from virft_fast import dist, doctor
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


@pytest.mark.parametrize(
    "gib, status, verdict", [(80, 0, "left for activations"), (0.01, 1, "TOO LITTLE")]
)
def test_a_run_that_cannot_fit_is_a_problem(monkeypatch, capsys, gib, status, verdict):
    estimate = dry_run.memory_estimate

    def with_gpu(*arguments):  # only from here on: this machine may have none to load a model on
        monkeypatch.setattr(dist, "local_device", lambda: torch.device("cuda"))
        memory = (0, int(gib * 2**30))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: memory)
        return estimate(*arguments)

    monkeypatch.setattr(dry_run, "memory_estimate", with_gpu)
    run = ["--model_name_or_path", "tiny", "--dataset_name", "shapes_detection"]
    assert doctor.main([*run, "--output_dir", "unused"]) == status
    assert verdict in capsys.readouterr().out


def test_a_loss_that_fails_is_a_problem(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr("virft_fast.kernels.linear_grpo_loss", fail)
    finding = doctor._loss()
    assert finding.level == "problem" and "no kernel image" in finding.what and finding.remedy


def test_a_full_disk_is_noted_and_a_folder_that_cannot_be_written_is_a_problem(
    monkeypatch, tmp_path
):
    usage = type("Usage", (), {"free": 2**30})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    assert doctor._disk(tmp_path).level == "note"
    monkeypatch.setattr("os.access", lambda *_: False)
    assert doctor._disk(tmp_path).level == "problem"
