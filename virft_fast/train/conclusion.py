"""The end of a run: prints a table and writes summary.json and report.png."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

from virft_fast.algorithms import algorithm_of
from virft_fast.algorithms.base import Data, HeldOut
from virft_fast.algorithms.step import TrainState
from virft_fast.batch import Row
from virft_fast.config import RunConfig
from virft_fast.data import BadRow
from virft_fast.json_files import intact_lines
from virft_fast.metrics import COMPLETIONS_FILE, METRICS_FILE
from virft_fast.report import format_table, write_report, write_summary
from virft_fast.train.setup import REPORT_FILE, SUMMARY_FILE

FEW_STEPS = 20  # a rule of thumb


def conclude(
    config: RunConfig,
    data: Data,
    state: TrainState,
    before: HeldOut | None,
    after: HeldOut | None,
    train_seconds: float,
) -> None:
    """Write summary.json and report.png; print what changed and where the files are.

    Args:
        before, after: evaluations before and after training; if one is missing, the first and the
            last tenth of the training metrics are compared instead.
    """
    output_dir = Path(config.train.output_dir)
    curve: list[Row] = []
    with contextlib.suppress(OSError):
        curve = [record for _, record in intact_lines(output_dir / METRICS_FILE)]
    algorithm = algorithm_of(config)
    if before is None or after is None:
        tenth = max(1, len(curve) // 10)
        keys = algorithm.curve([name for name, _ in data.reward_funcs])
        first = {key: _mean(curve[:tenth], key) for key in keys}
        shown = last = {key: _mean(curve[-tenth:], key) for key in keys}
        title, examples = f"training {keys[0]}, first and last {tenth} record(s)", []
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
    if state.step < FEW_STEPS:
        print(f"{state.step} steps are too few to tell a change from noise\n")
    write_report(
        output_dir / REPORT_FILE, curve=curve, before=first, after=shown, examples=examples
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


def _mean(records: Sequence[Row], key: str) -> float:
    values = [r[key] for r in records if r.get(key) is not None]
    return sum(values) / len(values) if values else math.nan


def _examples(data: Data, before: dict[str, str], after: dict[str, str]) -> list[dict[str, object]]:
    """Held-out samples with the answers before and after training, for report.png."""
    examples: list[dict[str, object]] = []
    for index, text in before.items():
        prompt = data.test.load(int(index)) if index in after and data.test else None
        if prompt is None or isinstance(prompt, BadRow) or not prompt.sample.images:
            continue
        sample = prompt.sample
        problem = str(sample.columns.get("problem", ""))
        examples.append({"image": sample.images[0], "problem": problem, "before": text,
                         "solution": sample.solution, "after": after[index]})  # fmt: skip
    return examples


def peak_rss_mib() -> float:
    """Peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
