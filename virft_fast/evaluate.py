"""`python -m virft_fast.evaluate`: greedy answers of a checkpoint to held-out rows, scored.

Prints the rewards' means and the task's own measures with their 95 % intervals, and writes one JSON
line a sample, a summary, a report and a page with pictures. `--compare` puts several models side by
side. Under torchrun the samples are divided among the ranks; an evaluation that was killed goes on
where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from virft_fast import dist
from virft_fast.cli import parse
from virft_fast.commands import end_process
from virft_fast.config import EvalConfig, UsageError, usage
from virft_fast.console import unbreakable
from virft_fast.data import NoUsableRows, TooManyBadRows
from virft_fast.data.accounts import listing
from virft_fast.data.inspection import subject
from virft_fast.evaluation import files
from virft_fast.evaluation.journal import beside
from virft_fast.evaluation.pages import Table
from virft_fast.evaluation.results import Result
from virft_fast.evaluation.run import Evaluation

# What of the counts is also said in the terminal.
_LEFT_OUT = ("that can't be used", "without a true mask", "that are unknown")


@unbreakable()
def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit status: 0, 2 for arguments that name nothing to evaluate, 1 for
    too many unusable rows, 130 after Ctrl-C."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    try:
        config = parse_args(sys.argv[1:] if argv is None else argv)
        with usage():
            device = dist.init()
            if dist.is_main():
                read = (config.dataset_name, config.annotations, config.exists_map)
                files.check_output(
                    output_path(config), config.compare, read, overwrite=config.overwrite
                )
        return run(config, device)
    except UsageError as error:
        print(f"virft_fast.evaluate: error: {error}", file=sys.stderr)
        return 2
    except (TooManyBadRows, NoUsableRows) as error:
        print(f"virft_fast.evaluate: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "virft_fast.evaluate: interrupted; the same command goes on from here", file=sys.stderr
        )
        return 130
    finally:
        dist.shutdown()


def parse_args(argv: list[str]) -> EvalConfig:
    """Flags -> configuration.

    Raises:
        UsageError: an unknown or misspelt flag, or a value out of range.
    """
    (config,) = parse((EvalConfig,), argv, "python -m virft_fast.evaluate")
    return config


def run(config: EvalConfig, device: torch.device) -> int:
    """Every model, one after another, then the report of them all."""
    output, several = output_path(config), len(config.compare) > 1
    results: list[Result] = []
    exists, load = None, None
    models = config.compare or [config.model_name_or_path]
    places = files.of_models(output, models) if several else [output]
    todo = []
    for model, place in zip(models, places, strict=True):  # a wrong name is said before any work
        one, bars = replace(config, model_name_or_path=model, compare=[]), contextlib.ExitStack()
        todo.append((Evaluation(one, place, device, partial(_bar, bars)), bars))
    while todo:
        evaluation, bars = todo.pop(0)
        with bars:
            # What the first model says is there, the others are asked about too.
            result, exists = evaluation.run(exists)
        load = evaluation.load_sample
        if result is not None:
            others = evaluation.keep_others(result)
            files.write_result(
                evaluation.output,
                result,
                settings=evaluation.journal.settings,
                config=asdict(evaluation.config),
                presence=evaluation.presence(),
                exists=exists,
            )
            if not others:
                evaluation.journal.remove()
            results.append(result)
        del evaluation  # and its model, before the next one is loaded
    if dist.is_main():
        if several:
            files.write_comparison(beside(output, ".summary.json"), results)
        title = f"{', '.join(r.model for r in results)} on {_source(config)}"
        tables = files.write_report(
            output,
            title,
            results,
            num_pictures=config.pictures,
            load=load,
            question=lambda sample: subject(sample, results[0].task),
        )
        _show(config, results, tables[0])
        print(f"written: {beside(output, '')}.* (summary.json, md, html, ...)")
    dist.barrier()
    return 0


def _bar(bars: contextlib.ExitStack, what: str, total: int) -> Callable[[int], None]:
    from tqdm import tqdm

    bar = bars.enter_context(
        tqdm(total=total, desc=what, unit="sample", disable=not dist.is_main())
    )
    return lambda done: bar.update(done - bar.n)


def _source(config: EvalConfig) -> str:
    source = config.annotations or f"{config.dataset_name} ({config.split})"
    return source if config.answers == "lenient" else f"{source}, answers read as {config.answers}"


def _show(config: EvalConfig, results: list[Result], table: Table) -> None:
    first = results[0]
    print(f"{first.task}, {len(first.records)} samples of {_source(config)}")
    rows: list[list[Any]] = [table.header, *table.rows] if len(results) > 1 else table.rows
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = zip(row, widths, strict=True)
        print("  ".join(f"{cell:{width}}" for cell, width in cells).rstrip())
    for result in results:
        left_out = {n: c for n, c in result.counts.items() if c and n.endswith(_LEFT_OUT)}
        for name, count in left_out.items():
            print(f"{result.model}: {count} {name}")
    if first.missing:
        named = listing(first.missing).encode("utf-8", "replace").decode()
        print(f"without {len(first.missing)} images that are missing: {named}")


def output_path(config: EvalConfig) -> Path:
    """--output, or a file in the checkpoint's folder, or in runs/eval for a model without one, and
    for several. Other questions have another name."""
    if config.output:
        return Path(config.output)
    source, given = config.annotations or config.dataset_name, config.exists_map
    folder = Path(config.model_name_or_path)
    beside_model = folder.is_dir() and not config.compare
    model = [] if beside_model or config.compare else [config.model_name_or_path]
    parts = [
        "compare" if config.compare else "eval",
        *model,
        Path(source).stem,
        "" if config.annotations else config.split,
        "" if config.task == "auto" else config.task,
        "" if config.categories == "all" else config.categories,
        "ask" if config.ask_exists else Path(given).stem if given else "",
    ]
    name = "_".join(re.sub(r"[^\w-]+", "-", part)[:40].strip("-") for part in parts if part)
    # Of what is cut off or replaced in the name, and of sources with the same stem.
    exact = [parts, _resolved(source), given and _resolved(given), config.dataset_config]
    digest = hashlib.sha256(json.dumps(exact).encode()).hexdigest()
    return (folder if beside_model else Path("runs/eval")) / f"{name}_{digest[:6]}.jsonl"


def _resolved(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


if __name__ == "__main__":
    end_process(main())
