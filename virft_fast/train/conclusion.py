"""What a run says at its end: a table, summary.json and report.png."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

from virft_fast import tasks
from virft_fast.algorithms import algorithm_of
from virft_fast.algorithms.base import Data
from virft_fast.algorithms.step import TrainState
from virft_fast.config import RunConfig
from virft_fast.data import BadRow
from virft_fast.metrics import COMPLETIONS_FILE, METRICS_FILE
from virft_fast.report import format_table, write_report, write_summary
from virft_fast.train.setup import REPORT_FILE, SUMMARY_FILE


def conclude(
    config: RunConfig,
    data: Data,
    state: TrainState,
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
    train_seconds: float,
) -> None:
    """Tell where things are and what changed; write summary.json and report.png."""
    output_dir = Path(config.train.output_dir)
    curve = _read_curve(output_dir / METRICS_FILE)
    algorithm = algorithm_of(config)
    if before is None or after is None:
        tenth = max(1, len(curve) // 10)
        keys = algorithm.curve([name for name, _ in data.reward_funcs])
        first, last = (
            {k: _mean(part, k) for k in keys} for part in (curve[:tenth], curve[-tenth:])
        )
        title = f"training {keys[0]}, first and last {tenth} records"
        examples = []
        shown = last
    else:
        title, first, shown = algorithm.compare(before, after)
        last = after["means"]
        examples = _examples(data, before["answers"], after["answers"])
    write_summary(
        output_dir / SUMMARY_FILE,
        before=first,
        after=last,
        train_seconds=train_seconds,
        peak_rss_mib=peak_rss_mib(),
        steps=state.step,
        skipped_steps=state.skipped_steps,
        bad_rows=len(data.bad_rows),
        measured=title,
        seed=config.train.seed,
    )
    print(f"\n{title}\n{format_table(first, shown)}\n")
    write_report(
        output_dir / REPORT_FILE,
        curve=curve,
        before=first,
        after=shown,
        examples=examples,
        parse_boxes=_boxes_with_confidence,
    )
    print(f"model and processor  {output_dir}")
    print(f"metrics              {output_dir / METRICS_FILE}")
    if algorithm.draws:
        print(f"completions          {output_dir / COMPLETIONS_FILE}")
    print(f"report               {output_dir / REPORT_FILE}, {output_dir / SUMMARY_FILE}")
    print(f"trained {state.step} steps in {train_seconds:.0f} s; peak memory of this process "
          f"{peak_rss_mib():.0f} MiB")  # fmt: skip
    if state.skipped_steps or len(data.bad_rows):
        print(f"skipped: {state.skipped_steps} non-finite steps, {len(data.bad_rows)} bad rows")


def _read_curve(path: Path) -> list[dict[str, Any]]:
    """The records that could be written: a full disk may have lost some, or cut one off."""
    records = []
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


def _mean(records: list[dict[str, Any]], key: str) -> float:
    values = [r[key] for r in records if r.get(key) is not None]
    return sum(values) / len(values) if values else math.nan


def _examples(data: Data, before: dict[str, str], after: dict[str, str]) -> list[dict[str, Any]]:
    examples = []
    for index, text in before.items():
        prompt = data.test.load(int(index)) if index in after and data.test else None
        if prompt is None or isinstance(prompt, BadRow) or not prompt.sample.images:
            continue
        sample = prompt.sample
        examples.append(
            {
                "image": sample.images[0],
                "problem": str(sample.columns.get("problem", "")),
                "solution": sample.solution,
                "before": text,
                "after": after[index],
            }
        )
    return examples


def _boxes_with_confidence(text: str) -> list[tuple[list[float], float | None]]:
    detection = tasks.parse_detection(text)
    if detection is None:
        return []
    pairs = zip(detection.boxes, detection.confidences, strict=True)
    return [(list(box), confidence) for box, confidence in pairs]


def peak_rss_mib() -> float:
    """Peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
