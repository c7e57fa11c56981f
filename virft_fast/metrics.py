"""Reports a run's progress: one reduction per step, a progress bar or lines, JSONL, trackers.

Losing a record is better than losing a run: if the disk is full or a tracker fails, one error is
logged and the run continues.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TextIO

from torch import Tensor

from virft_fast.batch import Json, Row
from virft_fast.json_files import intact_lines, replace_text

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker as Tracker
    from tqdm import tqdm

logger = logging.getLogger(__name__)

Number = float | Tensor  # a tensor is 0-d
METRICS_FILE, COMPLETIONS_FILE = "metrics.jsonl", "completions.jsonl"
SHOWN_SAMPLES = 4


def reduce_metrics(
    sums: Mapping[str, tuple[Number, Number]],
    gather: Callable[[list[Number]], list[list[float]]],
    largest: Mapping[str, Number] = MappingProxyType({}),
) -> dict[str, float]:
    """Means and maxima over all ranks, with one collective.

    Args:
        sums: name -> (sum, count) on this rank; the same names on all ranks.
        gather: numbers -> each rank's, in rank order; see `dist.gather_numbers`.
        largest: name -> value on this rank; the same names on all ranks.
    Returns:
        name -> sum / count, NaN where nothing was counted, and name -> maximum.
    """
    names = sorted(sums)
    ranks = gather([number for name in names for number in sums[name]] + list(largest.values()))
    columns = list(zip(*ranks, strict=True))
    added = [sum(column) for column in columns[: 2 * len(names)]]
    means = _means(zip(names, zip(added[::2], added[1::2], strict=True), strict=True))
    return means | dict(zip(largest, map(max, columns[2 * len(names) :]), strict=True))


def _means(sums: Iterable[tuple[str, tuple[float, float]]]) -> dict[str, float]:
    return {name: total / count if count else math.nan for name, (total, count) in sums}


@dataclass(eq=False)
class MetricsWriter:
    """Writes a run's records. On ranks other than the main one its methods do nothing.

    Args:
        output_dir: where metrics.jsonl and completions.jsonl go.
        total_steps: number of steps of the whole run.
        report_to: names of accelerate's trackers, or none, or all.
        config: the run's settings, for the trackers.
        logging_steps: steps between two records; a record holds the means since the last one.
        log_completions_steps: steps between two tables of samples; 0: never.
        start_step: steps that were done before the run was resumed.
        stream: where bar, lines and tables go; standard error by default.
    Raises:
        ValueError: a tracker does not exist or is not installed.
    """

    output_dir: Path
    _: KW_ONLY
    total_steps: int
    report_to: list[str]
    run_name: str
    config: Row
    logging_steps: int = 1
    log_completions_steps: int = 0
    is_main: bool = True
    start_step: int = 0
    stream: TextIO = field(default_factory=lambda: sys.stderr)

    def __post_init__(self) -> None:
        self.window: dict[str, tuple[float, int]] = {}
        self._warned: set[str] = set()
        self._started = time.monotonic()
        names = check_trackers(self.report_to)
        self.trackers: list[Tracker] = []
        if self.is_main:
            self.trackers = _make_trackers(names, self.run_name, self.output_dir, self.config)
        self.bar = self._make_bar() if self.is_main else None

    def _make_bar(self) -> tqdm | None:
        if not self.stream.isatty():
            return None
        from tqdm import tqdm

        return tqdm(total=self.total_steps, initial=self.start_step, file=self.stream, unit="step")

    def start(self) -> None:
        """Start the clock for estimating the time left; called before the first step."""
        self._started = time.monotonic()
        if self.bar is not None:
            self.bar.unpause()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step; steps count from 1."""
        if not self.is_main:
            return
        for name, value in metrics.items():
            total, count = self.window.get(name, (0.0, 0))
            if math.isfinite(value):  # a skipped step must not spoil the mean
                total, count = total + value, count + 1
            self.window[name] = (total, count)
        if self.bar is not None:
            self._guarded("the progress bar", partial(_advance, self.bar, step, metrics))
        if step % self.logging_steps == 0 or step == self.total_steps:
            self._record(step)

    def _record(self, step: int) -> None:
        means, self.window = _means(self.window.items()), {}
        self._append(METRICS_FILE, [{"step": step, **means}])
        if self.bar is None:
            elapsed = (time.monotonic() - self._started) / max(step - self.start_step, 1)
            eta = _clock((self.total_steps - step) * elapsed)
            self._say(f"step {step}/{self.total_steps}  {_headline(means)}  ETA {eta}\n")
        finite = {name: v for name, v in means.items() if math.isfinite(v)}
        for tracker in self.trackers:
            self._guarded(_label(tracker), partial(tracker.log, finite, step=step))

    def completions(self, step: int, rows: list[Row]) -> None:
        """Append records of completions, and show some every `log_completions_steps`."""
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

        self._guarded("to the terminal", write)  # which may be a file on a full disk

    def _append(self, name: str, records: list[Row]) -> None:
        def write() -> None:
            lines = "".join(json.dumps(null_for_nan(record)) + "\n" for record in records)
            with (self.output_dir / name).open("a+b") as file:
                size = file.seek(0, os.SEEK_END)
                try:
                    file.write(lines.encode())
                    file.flush()
                except OSError:
                    # Otherwise the next record would continue the incomplete line.
                    os.ftruncate(file.fileno(), size)
                    raise

        self._guarded(name, write)

    def _guarded(self, what: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # a tracker's client may raise anything
            if what not in self._warned:
                self._warned.add(what)
                logger.error("COULD NOT WRITE %s: %s. The run continues without it.", what, error)

    def truncate_to(self, step: int) -> None:
        """Drop the records that a killed run wrote after its last checkpoint, at `step`."""
        if self.is_main:
            for name in (METRICS_FILE, COMPLETIONS_FILE):
                path = self.output_dir / name
                if path.is_file():
                    self._guarded(name, partial(_keep_up_to, path, step))

    def state_dict(self) -> Row:
        """Sums and counts since the last record, as JSON data."""
        return {"window": {name: list(pair) for name, pair in self.window.items()}}

    def load_state_dict(self, state: Row) -> None:
        self.window = {name: (total, count) for name, (total, count) in state["window"].items()}

    def close(self) -> None:
        """Close the bar and the trackers."""
        if self.bar is not None:
            self.bar.close()
        for tracker in self.trackers:
            self._guarded(_label(tracker), tracker.finish)


def null_for_nan(value: Json) -> Json:
    """`value` with None for each number that is not finite, because JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: null_for_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [null_for_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sample_table(step: int, rows: Iterable[Row], width: int) -> str:
    """A few completions as plain text, no line longer than `width`."""
    lines = [f"completions of step {step}"]
    for row in rows:
        rewards = "  ".join(
            f"{name} {'-' if value is None else format(value, '.2f')}"
            for name, value in row["rewards"].items()
        )
        lines.append(f"  row {row['index']}  advantage {row['advantage']:+.2f}  {rewards}")
        prompt = _one_line(row["prompt"])
        room = max(width - len("    prompt     ..."), 0)
        if len(prompt) > room:  # keep its end, where the question is
            prompt = f"...{prompt[-room:]}"
        lines += [f"    prompt     {prompt}", f"    completion {_one_line(row['completion'])}"]
        if row.get("solution") is not None:
            lines.append(f"    solution   {_one_line(row['solution'])}")
    return "\n".join(line if len(line) <= width else line[: width - 3] + "..." for line in lines)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _advance(bar: tqdm, step: int, metrics: dict[str, float]) -> None:
    bar.set_postfix_str(_headline(metrics), refresh=False)
    bar.update(step - bar.n)


def _headline(metrics: dict[str, float]) -> str:
    first = "reward" if "reward" in metrics else "loss"
    shown = {first: metrics.get(first, math.nan)}
    shown |= {n.split("/", 1)[1]: v for n, v in metrics.items() if n.startswith("rewards/")}
    text = "  ".join(f"{name} {value:.3f}" for name, value in shown.items())
    if "passes_per_token" in metrics:
        text += f"  {metrics['passes_per_token']:.2f} passes/tok"
    return f"{text}  {metrics.get('tokens_per_s', math.nan):,.0f} tok/s"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _keep_up_to(path: Path, step: int) -> None:
    kept = [line for line, record in intact_lines(path) if record["step"] <= step]
    replace_text(path, "".join(line + "\n" for line in kept))


def check_trackers(report_to: list[str]) -> list[str]:
    """The names of the trackers that --report_to selects.

    Raises:
        ValueError: one does not exist or is not installed.
    """
    entries = [name.strip() for entry in report_to for name in entry.split(",")]
    names = list(dict.fromkeys(name for name in entries if name))
    if len(names) > 1 and not {"all", "none"}.isdisjoint(names):
        raise ValueError(f"--report_to: expected all or none alone, got {' '.join(names)}")
    if names in ([], ["none"]):
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(tracker.value) for tracker in get_available_trackers()]
    if names == ["all"]:
        return available
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            choices = ", ".join([*LOGGER_TYPE_TO_CLASS, "all", "none"])
            raise ValueError(f"--report_to: expected one of {choices}, got {name!r}")
        if name not in available:
            raise ValueError(f"--report_to {name}: its package is not installed; pip install it")
    return names


def _make_trackers(names: list[str], run_name: str, output_dir: Path, config: Row) -> list[Tracker]:
    if not names:
        return []
    from accelerate import PartialState

    PartialState()  # the trackers ask it which process is the main one
    trackers = []
    for name in names:
        try:
            trackers.append(_start_tracker(name, run_name, output_dir, config))
        # Offline, for example; metrics.jsonl holds the same numbers.
        except Exception as error:
            logger.error("COULD NOT START %s: %s. The run continues without it.", name, error)
    return trackers


def _label(tracker: Tracker) -> str:
    return f"to {getattr(tracker, 'name', type(tracker).__name__)}"


def _start_tracker(name: str, run_name: str, output_dir: Path, config: Row) -> Tracker:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    cls = LOGGER_TYPE_TO_CLASS[name]
    folder = {"logging_dir": str(output_dir)} if cls.requires_logging_directory else {}
    tracker = cls(run_name, **folder)
    if hasattr(tracker, "start"):
        tracker.start()
    plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in config.items()}
    tracker.store_init_configuration(plain)
    return tracker
