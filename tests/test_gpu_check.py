"""scripts/gpu_check.py at toy sizes, and the page that its results become."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from processes import run

from virft_fast import report

ROOT = Path(__file__).parent.parent
# Neither is in the smallest installation.
MISSING = ("deepspeed", "flash_attn", "liger_kernel", "trl", "pytest")
PROGRAM = f"""
import runpy, sys
for name in {MISSING}:
    sys.modules[name] = None
runpy.run_path({str(ROOT / "scripts/gpu_check.py")!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts/gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


def test_every_stage_runs_at_toy_size_with_few_packages(tmp_path, script):
    done = run("--out", tmp_path, "--cpu", module=PROGRAM)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for name in script.STAGES:
        result = json.loads((tmp_path / f"{name}.json").read_text())
        assert result["status"] == "ok" and result["toy"], result
        assert result["figures"] or name == "extension"
        assert all(figure["value"] >= 0 for figure in result["figures"])
        assert not any(note.startswith("WRONG") for note in result["notes"])
    for figure in ("copy", "decoding step, tiny", "training pass, tiny", "materialized logits"):
        assert figure in done.stdout
    assert report.main(["gpu", str(tmp_path), "--page", str(tmp_path / "gpu.md")]) == 2  # toy


def stages(monkeypatch, script, **functions):
    limits = {name: (0.5 if name == "slow" else 30, make) for name, make in functions.items()}
    monkeypatch.setattr(script, "STAGES", limits)


def test_a_stage_that_fails_ends_alone_and_leaves_its_figures(
    monkeypatch, tmp_path, capsys, script
):
    def slow(results):
        results.add("early", 2.5, "ms")
        time.sleep(60)

    def raises(results):
        results.note("before")
        raise ValueError("no kernel image")

    def crashes(results):
        results.add("first", 1, "ms")
        os.kill(os.getpid(), signal.SIGKILL)

    def good(results):
        results.require(True, "all is well")
        results.add("rate", 3.0, "TB/s", 4.8)

    stages(monkeypatch, script, slow=slow, raises=raises, crashes=crashes, good=good)
    names = ["slow", "raises", "crashes", "good"]
    start = time.monotonic()
    assert script.main(["--out", str(tmp_path), "--cpu"]) == 1
    assert time.monotonic() - start < 30
    results = {n: json.loads((tmp_path / f"{n}.json").read_text()) for n in names}
    assert [results[n]["status"] for n in names] == ["timed out", "failed", "failed", "ok"]
    assert results["slow"]["figures"][0]["value"] == 2.5
    assert results["raises"]["error"] == "ValueError: no kernel image"
    assert results["raises"]["notes"] == ["before"]
    assert "ValueError: no kernel image" in (tmp_path / "raises.log").read_text()
    assert results["crashes"]["figures"] and "exit status -9" in results["crashes"]["error"]
    shown = capsys.readouterr().out
    assert "raises      FAILED: ValueError: no kernel image" in shown and "early" in shown


def test_a_check_that_does_not_hold_fails_its_stage(monkeypatch, tmp_path, script):
    def wrong(results):
        results.require(False, "1 is 2")

    stages(monkeypatch, script, wrong=wrong)
    assert script.main(["--out", str(tmp_path), "--cpu"]) == 1
    result = json.loads((tmp_path / "wrong.json").read_text())
    assert result["notes"] == ["WRONG: 1 is 2"] and result["error"] == "AssertionError: 1 is 2"


@pytest.mark.parametrize("tool", [None, "/usr/bin/tool"])
def test_the_extension_is_built_in_a_copy(monkeypatch, tmp_path, script, tool):
    """A build deletes the module in its folder, which an editable installation imports."""
    gpu_stages, folders = script.gpu_stages, []

    def run(command, *, limit, folder=ROOT, **environ):
        assert (folder / "virft_fast/matching/solver.py").exists()
        assert (folder / "csrc/module.cpp").exists() and (folder / "CMakeLists.txt").exists()
        folders.append(folder)
        return 0

    monkeypatch.setattr(gpu_stages, "_run", run)
    monkeypatch.setattr(gpu_stages, "is_native", lambda device: False)
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: tool)
    monkeypatch.setattr(gpu_stages.importlib.util, "find_spec", lambda name: tool)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", "/usr/local/cuda")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    results = gpu_stages.Results(tmp_path / "extension.json", "extension", False)
    gpu_stages.extension(results)
    assert len(folders) == (2 if tool else 0) and ROOT not in folders
    if not tool:
        assert results.notes == ["the extension was not built, for lack of cmake, ninja, pybind11"]


def test_limits_fit_into_the_whole_time(script):
    assert sum(limit for limit, _ in script.STAGES.values()) <= script.TOTAL_S


RESULTS = [
    {"stage": "environment", "status": "ok", "error": "", "toy": False, "notes": ["torch 2.13.0"],
     "figures": [{"name": "copy", "value": 4.1, "unit": "TB/s", "floor": 4.8}]},
    {"stage": "decode", "status": "failed", "error": "ValueError: no", "toy": False, "notes": [],
     "figures": [{"name": "decoding step, 2b", "value": 1.6212, "unit": "ms", "floor": 0.81},
                 {"name": "tokens per second", "value": 39_476.2, "unit": "tokens/s",
                  "floor": None}]},
]  # fmt: skip


def test_results_become_a_page_and_a_plot(monkeypatch, tmp_path, capsys):
    for number, result in enumerate(RESULTS):
        path = tmp_path / f"{result['stage']}.json"
        path.write_text(json.dumps(result))
        os.utime(path, (number, number))
    page, bars = tmp_path / "gpu.md", {}
    shutil.copy(ROOT / "docs/gpu.md", page)
    from matplotlib.axes import Axes

    barh = Axes.barh
    monkeypatch.setattr(
        Axes, "barh", lambda axis, names, ratios, **o: (
            bars.update(zip(names, ratios, strict=True)), barh(axis, names, ratios, **o))[1],
    )  # fmt: skip
    assert report.main(["gpu", str(tmp_path), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("# On a GPU") and "Nothing has been measured" not in text
    assert "| copy | 4.1 | 4.8 | TB/s |" in text and "torch 2.13.0" in text
    assert "| decoding step, 2b | 1.621 | 0.81 | ms |" in text
    assert "| tokens per second | 3.948e+04 |  | tokens/s |" in text
    assert text.index("## Environment") < text.index("## Decode") and "failed: ValueError" in text
    assert (tmp_path / "gpu.png").stat().st_size > 1000 and "gpu.png" in text
    assert bars["copy"] == pytest.approx(4.8 / 4.1)  # of a rate
    assert bars["decoding step, 2b"] == pytest.approx(1.6212 / 0.81)  # of a time


def test_a_folder_without_results_is_named(tmp_path, capsys):
    assert report.main(["gpu", str(tmp_path)]) == 2
    assert "expected what scripts/gpu_check.py wrote on a GPU" in capsys.readouterr().err


def test_a_page_without_a_place_for_figures_stays(tmp_path, capsys):
    (tmp_path / "environment.json").write_text(json.dumps(RESULTS[0]))
    page = tmp_path / "mine.md"
    page.write_text("my text")
    assert report.main(["gpu", str(tmp_path), "--page", str(page)]) == 2
    assert "mine.md: expected the line <!-- begin" in capsys.readouterr().err
    assert page.read_text() == "my text"
