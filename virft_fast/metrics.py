"""What a person sees of a run: one reduction a step, a progress bar or lines, JSONL, trackers.

Losing a record is better than losing a run: a full disk or a tracker that fails is warned about
once and the run goes on.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

METRICS_FILE, COMPLETIONS_FILE = "metrics.jsonl", "completions.jsonl"
SHOWN_SAMPLES = 4


def reduce_metrics(
    values: dict[str, tuple[float, float]], all_reduce_sum: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Means over all ranks in one reduction.

    Args:
        values: name -> (sum, count) on this rank; the same names on all ranks.
        all_reduce_sum: sums a float64 tensor over the ranks.
    Returns:
        name -> sum / count, NaN where nothing was counted.
    """
    names = sorted(values)
    flat = torch.tensor([values[name] for name in names], dtype=torch.float64)  # (names, 2)
    flat = all_reduce_sum(flat)
    return {
        name: total / count if count else math.nan
        for name, (total, count) in zip(names, flat.tolist(), strict=True)
    }


class MetricsWriter:
    """Writes a run's records; on ranks other than the main one everything does nothing.

    Args:
        output_dir: where metrics.jsonl and completions.jsonl go.
        total_steps: of the whole run.
        report_to: names of accelerate's trackers, or none or all.
        config: what the trackers show as the run's settings.
        logging_steps: steps between two records; each has the means of the steps since the last.
        log_completions_steps: steps between two tables of samples; 0 is never.
        start_step: steps done before, in a resumed run.
        stream: where bar, lines and tables go; standard error by default.
    Raises:
        ValueError: a tracker is not known or not installed.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        total_steps: int,
        report_to: list[str],
        run_name: str,
        config: dict[str, Any],
        logging_steps: int = 1,
        log_completions_steps: int = 0,
        is_main: bool = True,
        start_step: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.total_steps = total_steps
        self.logging_steps = logging_steps
        self.log_completions_steps = log_completions_steps
        self.is_main = is_main
        self.stream = stream or sys.stderr
        self.window: dict[str, tuple[float, int]] = {}
        self._warned: set[str] = set()
        self._started, self._start_step = time.monotonic(), start_step
        names = check_trackers(report_to)
        self.trackers = _make_trackers(names, run_name, self.output_dir, config) if is_main else []
        self.bar = self._make_bar(start_step) if is_main else None

    def _make_bar(self, start_step: int) -> Any:
        if not self.stream.isatty():
            return None
        from tqdm import tqdm

        return tqdm(total=self.total_steps, initial=start_step, file=self.stream, unit="step")

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Take the metrics of a step, counted from 1."""
        if not self.is_main:
            return
        for name, value in metrics.items():
            total, count = self.window.get(name, (0.0, 0))
            if math.isfinite(value):  # one skipped step does not blank the others
                total, count = total + value, count + 1
            self.window[name] = (total, count)
        if self.bar is not None:
            self._guarded("the progress bar", lambda: self._advance(step, metrics))
        if step % self.logging_steps == 0 or step == self.total_steps:
            self._record(step)

    def _advance(self, step: int, metrics: dict[str, float]) -> None:
        self.bar.set_postfix_str(_headline(metrics), refresh=False)
        self.bar.update(step - self.bar.n)

    def _record(self, step: int) -> None:
        means = {
            name: total / count if count else math.nan
            for name, (total, count) in self.window.items()
        }
        self.window = {}
        self._append(METRICS_FILE, [{"step": step, **means}])
        if self.bar is None:
            elapsed = (time.monotonic() - self._started) / max(step - self._start_step, 1)
            eta = _clock((self.total_steps - step) * elapsed)
            self._say(f"step {step}/{self.total_steps}  {_headline(means)}  ETA {eta}\n")
        finite = {name: v for name, v in means.items() if math.isfinite(v)}
        for tracker in self.trackers:
            self._guarded(_label(tracker), lambda t=tracker, f=finite: t.log(f, step=step))

    def completions(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Append records of completions; every log_completions_steps also show some."""
        if not self.is_main:
            return
        self._append(COMPLETIONS_FILE, [{"step": step, **row} for row in rows])
        if self.log_completions_steps and step % self.log_completions_steps == 0:
            width = shutil.get_terminal_size((120, 40)).columns
            self._say(sample_table(step, rows[:SHOWN_SAMPLES], width) + "\n")

    def _say(self, text: str) -> None:
        def write() -> None:
            if self.bar is not None:
                self.bar.write(text.rstrip("\n"), file=self.stream)
            else:
                self.stream.write(text)
                self.stream.flush()

        self._guarded("to the terminal", write)  # it may be a file on a full disk

    def _append(self, name: str, records: list[dict[str, Any]]) -> None:
        def write() -> None:
            lines = "".join(json.dumps(null_for_nan(record)) + "\n" for record in records)
            with (self.output_dir / name).open("a+b") as file:
                size = file.seek(0, os.SEEK_END)
                try:
                    file.write(lines.encode())
                    file.flush()
                except OSError:
                    # Half a line would spoil the next one.
                    os.ftruncate(file.fileno(), size)
                    raise

        self._guarded(name, write)

    def _guarded(self, what: str, action: Callable[[], Any]) -> None:
        try:
            action()
        # A tracker's client may raise anything; none of it is worth the run.
        except Exception as error:
            if what not in self._warned:
                self._warned.add(what)
                logger.error("COULD NOT WRITE %s: %s. The run goes on without.", what, error)

    def truncate_to(self, step: int) -> None:
        """Drop what a killed run wrote after its last checkpoint, at `step`."""
        if self.is_main:
            for name in (METRICS_FILE, COMPLETIONS_FILE):
                path = self.output_dir / name
                if path.is_file():
                    self._guarded(name, lambda path=path: _keep_up_to(path, step))

    def state_dict(self) -> dict[str, Any]:
        """The unfinished window's sums, as plain data."""
        return {"window": {name: list(pair) for name, pair in self.window.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.window = {name: (total, count) for name, (total, count) in state["window"].items()}

    def close(self) -> None:
        """End the bar and the trackers."""
        if self.bar is not None:
            self.bar.close()
        for tracker in self.trackers:
            self._guarded(_label(tracker), tracker.finish)


def null_for_nan(value: Any) -> Any:
    """`value` with None for each number that is not finite, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: null_for_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [null_for_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sample_table(step: int, rows: list[dict[str, Any]], width: int) -> str:
    """A few completions as plain text, no line longer than `width`."""
    lines = [f"completions of step {step}"]
    for row in rows:
        rewards = "  ".join(
            f"{name} {'-' if value is None else format(value, '.2f')}"
            for name, value in row["rewards"].items()
        )
        lines.append(f"  row {row['index']}  advantage {row['advantage']:+.2f}  {rewards}")
        prompt = _one_line(row["prompt"])
        room = max(width - len("    prompt     ..."), 0)  # a prompt's end says what was asked
        lines.append(
            "    prompt     " + (prompt if len(prompt) <= room else f"...{prompt[-room:]}")
        )
        lines.append("    completion " + _one_line(row["completion"]))
        if row.get("solution") is not None:
            lines.append("    solution   " + _one_line(row["solution"]))
    return "\n".join(line if len(line) <= width else line[: width - 3] + "..." for line in lines)


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())


def _headline(metrics: dict[str, float]) -> str:
    first = "reward" if "reward" in metrics else "loss"
    shown = {first: metrics.get(first, math.nan)}
    shown |= {
        name.split("/", 1)[1]: value
        for name, value in metrics.items()
        if name.startswith("rewards/")
    }
    text = "  ".join(f"{name} {value:.3f}" for name, value in shown.items())
    return f"{text}  {metrics.get('tokens_per_s', math.nan):,.0f} tok/s"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _keep_up_to(path: Path, step: int) -> None:
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the last line of a killed run may be cut
            continue
        if record["step"] <= step:
            kept.append(line)
    aside = path.with_suffix(".writing")
    aside.write_text("".join(line + "\n" for line in kept))
    os.replace(aside, path)


def _tracker_names(report_to: list[str]) -> list[str]:
    entries = [name.strip() for entry in report_to for name in entry.split(",")]
    names = list(dict.fromkeys(name for name in entries if name))
    if len(names) > 1 and not {"all", "none"}.isdisjoint(names):
        raise ValueError(f"--report_to: expected all or none alone, got {' '.join(names)}")
    return [] if names == ["none"] else names


def check_trackers(report_to: list[str]) -> list[str]:
    """Names of the trackers that --report_to means.

    Raises:
        ValueError: one is not known or not installed.
    """
    names = _tracker_names(report_to)
    if not names:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(tracker.value) for tracker in get_available_trackers()]
    if names == ["all"]:
        return available
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join([*LOGGER_TYPE_TO_CLASS, "all", "none"])
            raise ValueError(f"--report_to: expected one of {known}, got {name!r}")
        if name not in available:
            raise ValueError(
                f"--report_to {name}: its package is not installed; pip install "
                f"'virft_fast[loggers]' or pip install {name}"
            )
    return names


def _make_trackers(
    names: list[str], run_name: str, output_dir: Path, config: dict[str, Any]
) -> list[Any]:
    if not names:
        return []
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # the trackers ask it which process is the main one
    trackers = []
    for name in names:
        try:
            cls = LOGGER_TYPE_TO_CLASS[name]
            trackers.append(_start_tracker(cls, run_name, output_dir, config))
        # Its client may raise anything, offline for one; metrics.jsonl has it all anyway.
        except Exception as error:
            logger.error("COULD NOT START %s: %s. The run goes on without.", name, error)
    return trackers


def _label(tracker: Any) -> str:
    return f"to {getattr(tracker, 'name', type(tracker).__name__)}"


def _start_tracker(cls: Any, run_name: str, output_dir: Path, config: dict[str, Any]) -> Any:
    folder = {"logging_dir": str(output_dir)} if cls.requires_logging_directory else {}
    tracker = cls(run_name, **folder)
    if hasattr(tracker, "start"):
        tracker.start()
    plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in config.items()}
    tracker.store_init_configuration(plain)
    return tracker
