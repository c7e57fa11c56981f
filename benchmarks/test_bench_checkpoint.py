"""Checkpoints with and without checksums, on a model of 100 MB (float32) and its optimizer state.

    pytest benchmarks/test_bench_checkpoint.py    half a minute

`share` is the fraction that checksums add to the time of a save. `gb_per_s` is how fast a file that
was just written is read and hashed. Both saves go to disk, in the folder for temporary files.
"""

from __future__ import annotations

import shutil
import time

import pytest
import torch
from measure import DEVICE
from vlm import SHAPES, make_model

from virft_fast import checkpoint
from virft_fast.engine import OptimizerSettings, PlainEngine
from virft_fast.models.processing import load_processor

MOST = 0.10  # of a save's time
SHAPES["100 MB"] = SHAPES["cpu"] | {"vocab_size": 80_000}


@pytest.mark.timeout(900)
def test_save(race, request, tmp_path, monkeypatch):
    size = request.config.getoption("--size")
    model = make_model("100 MB" if size == "cpu" else size).to(DEVICE)
    engine = PlainEngine(model, OptimizerSettings(learning_rate=1e-3), device=torch.device(DEVICE))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    engine.step(1e-3)
    processor = load_processor("tiny")

    def save():
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
        options = {"model": model, "processor": processor, "engine": engine, "state": {"step": 1}}
        assert checkpoint.save_checkpoint(tmp_path, 1, **options)

    def save_without():
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "checksum", lambda path: "")
            save()

    save()
    folder = tmp_path / "checkpoint-1"
    assert checkpoint.find_damage(folder) is None
    state = folder / "engine/state.pt"
    start = time.perf_counter()
    checkpoint.checksum(state)
    speed = state.stat().st_size / (time.perf_counter() - start) / 1e9
    notes = {"ours": {"gb_per_s": speed, "state_mb": state.stat().st_size / 1e6}}
    contenders = {"ours": save, "without checksums": save_without}
    ms = race(f"{size}: one checkpoint", contenders, ours="ours", notes=notes, rounds=7)
    if ms and size == "cpu":
        share = ms["ours"] / ms["without checksums"] - 1
        notes["ours"]["share"] = share
        assert share <= MOST, f"checksums take {share:.1%} of a save"
