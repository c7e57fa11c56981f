"""Records survive kills and resumes, and a failing disk or tracker does not end a run."""

from __future__ import annotations

import io
import json
import logging
import math

import pytest
import torch
from helpers import read_jsonl

from virft_fast.metrics import MetricsWriter, reduce_metrics, sample_table

ROW = {
    "index": 3, "prompt": "p", "completion": "a\nb " * 100, "solution": "s",
    "rewards": {"format": 1.0, "other": None}, "advantage": -0.5,
}  # fmt: skip


def writer(folder, **options):
    given = {"total_steps": 6, "report_to": ["none"], "run_name": "r", "config": {}, **options}
    return MetricsWriter(folder, stream=given.pop("stream", io.StringIO()), **given)


def test_the_time_left_is_that_of_steps_alone(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("virft_fast.metrics.time.monotonic", lambda: now[0])
    lines = io.StringIO()
    log = writer(tmp_path, stream=lines)
    now[0] = 600.0  # an evaluation before the first step
    log.start()
    now[0] = 602.0
    log.step(1, {"reward": 1.0})
    assert lines.getvalue().rstrip().endswith("ETA 0:10")


def test_means_and_maxima_over_ranks_in_one_collective():
    calls = []

    def two_ranks(numbers):
        calls.append(numbers)
        return [[float(number) for number in numbers], [2.0, 0.0, 6.0, 1.0, 9.0]]

    sums = {"b": (6.0, torch.tensor(3.0)), "a": (1.0, 0.0)}
    means = reduce_metrics(sums, two_ranks, {"top": torch.tensor(7.0)})
    assert means["b"] == 3.0 and math.isnan(means["a"]) and means["top"] == 9.0
    assert len(calls) == 1


def test_a_record_has_the_means_since_the_last(tmp_path):
    out = writer(tmp_path, logging_steps=2, total_steps=3)
    for step, value in enumerate((1.0, 3.0, 5.0), start=1):
        out.step(step, {"reward": value})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [
        {"step": 2, "reward": 2.0},
        {"step": 3, "reward": 5.0},
    ]


def test_what_is_not_finite_becomes_null(tmp_path):
    writer(tmp_path).step(1, {"reward": math.nan, "loss": math.inf})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "reward": None, "loss": None}]


def test_a_step_without_a_loss_does_not_blank_the_record(tmp_path):
    out = writer(tmp_path, logging_steps=2)
    out.step(1, {"loss": math.nan})
    out.step(2, {"loss": 3.0})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 2, "loss": 3.0}]


def test_completions_hold_no_nan(tmp_path):
    rewards = {"format": math.nan, "other": 1.0}
    writer(tmp_path).completions(1, [ROW | {"rewards": rewards, "advantage": -math.inf}])
    text = (tmp_path / "completions.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    record = json.loads(text)
    assert record["rewards"] == {"format": None, "other": 1.0} and record["advantage"] is None


@pytest.mark.parametrize("names", [["all", "none"], ["none,tensorboard"]])
def test_all_and_none_go_alone(tmp_path, names):
    with pytest.raises(ValueError, match="expected all or none alone"):
        writer(tmp_path, report_to=names)


def test_trackers_are_warned_about_one_by_one(tmp_path, caplog):
    class Failing:
        def __init__(self, name):
            self.name = name

        def log(self, values, step):
            raise RuntimeError(self.name)

    out = writer(tmp_path)
    out.trackers = [Failing("first"), Failing("second")]
    with caplog.at_level(logging.ERROR):
        out.step(1, {"reward": 1.0})
        out.step(2, {"reward": 1.0})
    assert [r.args[0] for r in caplog.records] == ["to first", "to second"]


def test_resumed_writer_goes_on_where_the_state_was_saved(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = writer(tmp_path / "a", logging_steps=4)
    for step in range(1, 7):
        whole.step(step, {"reward": step / 7})
        whole.completions(step, [ROW])
    killed = writer(tmp_path / "b", logging_steps=4)
    for step in (1, 2, 3, 4):
        killed.step(step, {"reward": step / 7})
        killed.completions(step, [ROW])
        if step == 2:
            state = json.loads(json.dumps(killed.state_dict()))
    with (tmp_path / "b/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # cut by the kill
    resumed = writer(tmp_path / "b", logging_steps=4, start_step=2)
    resumed.truncate_to(2)
    resumed.load_state_dict(state)
    for step in range(3, 7):
        resumed.step(step, {"reward": step / 7})
        resumed.completions(step, [ROW])
    for name in ("metrics.jsonl", "completions.jsonl"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()


def test_other_ranks_write_nothing(tmp_path):
    out = writer(tmp_path, is_main=False)
    out.step(1, {"reward": 1.0})
    out.completions(1, [ROW])
    out.truncate_to(0)
    out.close()
    assert list(tmp_path.iterdir()) == []


def test_lines_without_a_terminal_and_a_bar_on_one(tmp_path):
    lines = io.StringIO()
    metrics = {"reward": 1.5, "rewards/format": 0.25, "tokens_per_s": 1234.0}
    writer(tmp_path, stream=lines).step(1, metrics)
    assert lines.getvalue().startswith("step 1/6  reward 1.500  format 0.250  1,234 tok/s  ETA ")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    out = writer(tmp_path, stream=terminal, log_completions_steps=1)
    out.step(1, metrics)
    out.completions(1, [ROW])
    out.close()
    assert "1/6" in terminal.getvalue() and "completions of step 1" in terminal.getvalue()


def test_table_keeps_to_the_width():
    table = sample_table(7, [ROW], 60)
    assert all(len(line) <= 60 for line in table.splitlines())
    assert "format 1.00" in table and "other -" in table and "-0.50" in table


def test_full_disk_warns_once_and_the_run_goes_on(tmp_path, caplog):
    out = writer(tmp_path / "missing")
    with caplog.at_level(logging.ERROR):
        out.step(1, {"reward": 1.0})
        out.step(2, {"reward": 1.0})
    assert caplog.text.count("COULD NOT WRITE metrics.jsonl") == 1


def test_failing_tracker_warns_once(tmp_path, caplog):
    class Broken:
        def log(self, *args, **kwargs):
            raise ConnectionError("no network")

        finish = log

    out = writer(tmp_path)
    out.trackers = [Broken()]
    with caplog.at_level(logging.ERROR):
        out.step(1, {"reward": 1.0})
        out.step(2, {"reward": 1.0})
        out.close()
    assert caplog.text.count("no network") == 1
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2


def test_terminal_that_is_a_full_disk_does_not_end_the_run(tmp_path, caplog):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    out = writer(tmp_path, stream=Full())
    with caplog.at_level(logging.ERROR):
        out.step(1, {"reward": 1.0})
    assert "No space left" in caplog.text
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1


def test_tracker_that_can_not_start_is_left_out(tmp_path, monkeypatch, caplog):
    from accelerate.tracking import TensorBoardTracker

    def offline(self):
        raise ConnectionError("offline")

    monkeypatch.setattr(TensorBoardTracker, "start", offline)
    with caplog.at_level(logging.ERROR):
        out = writer(tmp_path, report_to=["tensorboard"])
    assert out.trackers == [] and "offline" in caplog.text


def test_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected one of.*tensorboard"):
        writer(tmp_path, report_to=["tensorbord"])
