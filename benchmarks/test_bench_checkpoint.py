"""Checkpoints with and without checksums, on a model of 100 MB (float32) and its optimizer state.

    pytest benchmarks/test_bench_checkpoint.py    half a minute

`gb_per_s` is how fast a file that was just written is read and hashed. Both saves go to disk, in
the folder for temporary files.
"""

from __future__ import annotations

import shutil
import time

import pytest
import torch
from measure import DEVICE, Case, contenders
from vlm import SHAPES, make_model

from virft_fast import checkpoint
from virft_fast.engine import OptimizerSettings, PlainEngine
from virft_fast.models.processing import load_processor

MOST = 0.10  # of a save's time, for checksums
SHAPES["100 MB"] = SHAPES["cpu"] | {"vocab_size": 80_000}


@pytest.fixture(scope="module")
def case(size, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("saves")
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
        with pytest.MonkeyPatch.context() as patch:
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
    runs = {"ours": save, "ours, without checksums": save_without}
    return Case(f"{size}: one checkpoint", runs, notes)


@pytest.mark.timeout(900)
@contenders("ours", "ours, without checksums")
def test_save(race, size, case, contender):
    race(case, contender)
    if size == "cpu" and len(case.seconds) == 2:
        share = min(case.seconds["ours"]) / min(case.seconds["ours, without checksums"]) - 1
        assert share <= MOST, f"checksums take {share:.1%} of a save"
