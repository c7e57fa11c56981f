"""`python -m virft_fast.evaluate`: score a checkpoint's greedy answers to held-out rows.

Prints the rewards' means and the task's measures with their 95% intervals. Writes a JSON line per
sample, a summary, a report and a page with pictures. `--compare` puts several models side by side.
torchrun divides the samples among the ranks. A killed evaluation resumes where it stopped.
"""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import torch

from virft_fast import dist
from virft_fast.cli import parse
from virft_fast.commands import end_process
from virft_fast.config import EvalConfig, UsageError, usage
from virft_fast.console import log_warnings, unbreakable
from virft_fast.data import NoUsableRows, TooManyBadRows
from virft_fast.data.accounts import listing
from virft_fast.data.inspection import subject
from virft_fast.digests import json_digest
from virft_fast.evaluation import files
from virft_fast.evaluation.journal import companion
from virft_fast.evaluation.pages import Table
from virft_fast.evaluation.results import Result
from virft_fast.evaluation.run import ModelEvaluation

# Counts whose names end like this are also printed.
_LEFT_OUT = ("that can't be used", "without a true mask", "that are unknown")


@unbreakable()
def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit status: 0, 2 for arguments that name nothing to evaluate, 1 for
    too many unusable rows, 130 after Ctrl-C."""
    log_warnings()
    try:
        config = parse_args(sys.argv[1:] if argv is None else argv)
        with usage():
            device = dist.init()
            if dist.is_main():
                read = (config.dataset_name, config.annotations, config.exists_map)
                output = output_path(config)
                files.check_result_files(output, config.compare, read, overwrite=config.overwrite)
        return run(config, device)
    except UsageError as error:
        print(f"virft_fast.evaluate: error: {error}", file=sys.stderr)
        return 2
    except (TooManyBadRows, NoUsableRows) as error:
        print(f"virft_fast.evaluate: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("virft_fast.evaluate: interrupted; the same command resumes it", file=sys.stderr)
        return 130
    finally:
        dist.shutdown()


def parse_args(argv: list[str]) -> EvalConfig:
    """The configuration that the flags describe.

    Raises:
        UsageError: an unknown or misspelled flag, or a value out of range.
    """
    (config,) = parse((EvalConfig,), argv, "python -m virft_fast.evaluate")
    config.settle_speculation()
    return config


def run(config: EvalConfig, device: torch.device) -> int:
    """Evaluate the models one after another, then write one report of all."""
    output, several = output_path(config), len(config.compare) > 1
    results: list[Result] = []
    exists = None
    models = config.compare or [config.model_name_or_path]
    outputs = files.of_models(output, models) if several else [output]
    todo = []
    for model, path in zip(models, outputs, strict=True):  # finds wrong names before any work
        one = copy.copy(config)  # with the memory of which flags were given
        one.model_name_or_path, one.compare = model, []
        todo.append(ModelEvaluation(one, path, device))
    while todo:
        evaluation = todo.pop(0)
        # The first model's answer to which categories exist holds for the others, too.
        result, exists = evaluation.run(exists)
        load = evaluation.load_sample
        if result is not None:
            results.append(result)
        del evaluation  # frees its model before the next one is loaded
    if dist.is_main():
        if several:
            files.write_comparison(companion(output, ".summary.json"), results)
        title = f"{', '.join(r.model for r in results)} on {_source(config)}"
        tables = files.write_pages(
            output,
            title,
            results,
            num_pictures=config.pictures,
            load=load,
            question=lambda sample: subject(sample, results[0].task),
        )
        _show(config, results, tables[0])
        print(f"written: {companion(output, '')}.* (summary.json, md, html, ...)")
    dist.barrier()
    return 0


def _source(config: EvalConfig) -> str:
    source = config.annotations or f"{config.dataset_name} ({config.split})"
    return source if config.answers == "lenient" else f"{source}, answers read as {config.answers}"


def _show(config: EvalConfig, results: list[Result], table: Table) -> None:
    first = results[0]
    print(f"{first.task}, {len(first.records)} samples of {_source(config)}")
    rows = [table.header, *table.rows] if len(results) > 1 else table.rows
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
        print(f"left out {len(first.missing)} missing images: {named}")


def output_path(config: EvalConfig) -> Path:
    """--output; else a file in the checkpoint's folder, or in runs/eval for several models or one
    without a folder. Its name depends on the questions."""
    if config.output:
        return Path(config.output)
    source, given = config.source, config.exists_map
    folder = Path(config.model_name_or_path)
    in_folder = folder.is_dir() and not config.compare
    model = [] if in_folder or config.compare else [config.model_name_or_path]
    words = [
        "compare" if config.compare else "eval",
        *model,
        Path(source).stem,
        "" if config.annotations else config.split,
        "" if config.task == "auto" else config.task,
        "" if config.categories == "all" else config.categories,
        "ask" if config.ask_exists else Path(given).stem if given else "",
    ]
    name = "_".join(re.sub(r"[^\w-]+", "-", word)[:40].strip("-") for word in words if word)
    # The digest distinguishes names that are shortened alike, and sources with the same stem.
    exact = [words, _resolved(source), given and _resolved(given), config.dataset_config]
    return (folder if in_folder else Path("runs/eval")) / f"{name}_{json_digest(exact)[:6]}.jsonl"


def _resolved(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


if __name__ == "__main__":
    end_process(main())
