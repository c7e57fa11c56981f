"""The end of a run: table, summary and picture."""

from __future__ import annotations

import json
import logging
import math

import pytest
from PIL import Image

from virft_fast.report import format_table, write_curves, write_report, write_summary

BEFORE, AFTER = {"accuracy_iou": 0.25, "format": math.nan}, {"accuracy_iou": 0.5, "format": 1.0}
CURVE = [{"step": s, "reward": s / 30, "rewards/format": 1.0, "rewards/b": None} for s in range(30)]


BOX = "<answer>[{'Position': [100, 100, 500, 500], 'Confidence': 0.5}]</answer>"


def example(answer):
    return {"image": Image.new("RGB", (112, 112)), "problem": "Detect it", "solution": answer,
            "before": answer, "after": "nothing"}  # fmt: skip


def test_table_shows_the_change():
    lines = format_table(BEFORE, AFTER).splitlines()
    assert lines[1].split() == ["accuracy_iou", "0.2500", "0.5000", "+0.2500"]


def test_summary_has_null_for_nan_and_leaves_nothing_aside(tmp_path):
    path = tmp_path / "summary.json"
    write_summary(path, before=BEFORE, after=AFTER, train_seconds=1.234, peak_rss_mib=9.87, seed=1)
    assert json.loads(path.read_text()) == {
        "before": {"accuracy_iou": 0.25, "format": None},
        "after": {"accuracy_iou": 0.5, "format": 1.0},
        "train_seconds": 1.23,
        "peak_rss_mib": 9.9,
        "seed": 1,
    }
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("examples", [[], [example(BOX), example("<answer>$\\frac$</answer>")]])
def test_report_is_a_picture(tmp_path, examples):
    path = tmp_path / "report.png"
    write_report(path, curve=CURVE, before=BEFORE, after=AFTER, examples=examples)
    with Image.open(path) as image:
        assert image.width == 1400
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10


def test_report_of_an_empty_curve(tmp_path):
    write_report(tmp_path / "r.png", curve=[], before={}, after={}, examples=[])
    assert (tmp_path / "r.png").exists()


def test_curves_of_several_runs(tmp_path):
    write_curves(tmp_path / "c.png", {"seed 1": CURVE, "seed 2": CURVE})
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_disk_that_is_full_does_not_end_a_finished_run(tmp_path, caplog):
    path = tmp_path / "missing" / "summary.json"
    with caplog.at_level(logging.ERROR):
        write_summary(path, before={}, after={}, train_seconds=0, peak_rss_mib=0)
    assert "COULD NOT WRITE" in caplog.text


def test_report_that_can_not_be_drawn_does_not_end_a_finished_run(tmp_path, caplog, monkeypatch):
    def broken(text):
        raise RuntimeError("no boxes today")

    monkeypatch.setattr("virft_fast.report.parse_detection", broken)
    path, examples = tmp_path / "r.png", [example(BOX)]
    with caplog.at_level(logging.ERROR):
        write_report(path, curve=CURVE, before=BEFORE, after=AFTER, examples=examples)
    assert "no boxes today" in caplog.text and not (tmp_path / "r.png").exists()
