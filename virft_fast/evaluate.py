"""`python -m virft_fast.evaluate`: greedy answers of a checkpoint to held-out rows, scored.

Prints the mean of each reward and the task's own measures (`virft_fast.evaluation.scoring`), and
writes one JSON line a sample. Under torchrun the samples are divided among the ranks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from virft_fast import dist, tasks
from virft_fast.config import (
    EvalConfig,
    UsageError,
    known_flags,
    unknown_flag_message,
    usage,
)
from virft_fast.data import (
    BadRow,
    BadRows,
    NoUsableRows,
    SampleDataset,
    TooManyBadRows,
    load_rows,
)
from virft_fast.data.prompts import PromptSource
from virft_fast.evaluation.scoring import Evaluation, evaluate_rewards
from virft_fast.metrics import null_for_nan
from virft_fast.models.processing import load_processor
from virft_fast.models.qwen_vl import Policy, load_model
from virft_fast.models.tiny import resolve_model_path
from virft_fast.rollout.backends import check_cache_limit, check_model, make_rollout


def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit status: 0, 2 for arguments that name nothing to evaluate, 1 for
    too many unusable rows."""
    from transformers import HfArgumentParser

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    parser = HfArgumentParser(EvalConfig, prog="python -m virft_fast.evaluate")
    parser.allow_abbrev = False
    argv = sys.argv[1:] if argv is None else argv
    try:
        with usage():
            config, unknown = parser.parse_args_into_dataclasses(
                argv, return_remaining_strings=True
            )
            if unknown:
                known = known_flags((EvalConfig,))
                raise ValueError("; ".join(unknown_flag_message(flag, known) for flag in unknown))
        with usage():
            device = dist.init()
            if dist.is_main():
                _check_output(output_path(config))
        return run(config, device)
    except UsageError as error:
        print(f"virft_fast.evaluate: error: {error}", file=sys.stderr)
        return 2
    except (TooManyBadRows, NoUsableRows) as error:
        print(f"virft_fast.evaluate: stopped: {error}", file=sys.stderr)
        return 1
    finally:
        dist.shutdown()


def run(config: EvalConfig, device: torch.device) -> int:
    """Load, answer, score, write."""
    from tqdm import tqdm

    with usage():
        check_cache_limit(
            config.rollout_backend,
            config.rollout_cache_tokens,
            num_generations=1,
            max_prompt_length=config.max_prompt_length,
            max_completion_length=config.max_completion_length,
            device=device,
        )
        path = resolve_model_path(config.model_name_or_path)
        processor = load_processor(
            path,
            revision=config.model_revision,
            min_pixels=config.min_pixels,
            max_pixels=config.max_pixels,
        )
        rows = load_rows(config.dataset_name, config.split, dataset_config=config.dataset_config)
        task = config.task if config.task != "auto" else tasks.detect_task(_solutions(rows))
        reward_funcs = tasks.load_reward_funcs(config.reward_funcs or tasks.DEFAULT_REWARDS[task])
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        dtype = dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        model = load_model(
            path,
            revision=config.model_revision,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
        )
        policy = Policy(model.to(device)).eval()
        check_model(config.rollout_backend, policy)
    samples = SampleDataset(rows, check_solution=partial(tasks.check_solution, task))
    source = PromptSource(samples, processor, max_prompt_length=config.max_prompt_length)
    count = min(config.max_samples or len(samples), len(samples))
    bad_rows = BadRows(config.max_bad_rows)
    share = len(range(count)[dist.rank() :: dist.world_size()])
    with tqdm(total=share, unit="sample", disable=not dist.is_main()) as bar:
        result = evaluate_rewards(
            make_rollout(
                config.rollout_backend,
                lambda: contextlib.nullcontext(policy),
                processor.tokenizer,
                device=device,
                max_cache_tokens=config.rollout_cache_tokens,
            ),
            source.load,
            range(count),
            reward_funcs=reward_funcs,
            bad_rows=bad_rows,
            task=task,
            batch_size=config.batch_size,
            max_completion_length=config.max_completion_length,
            progress=lambda done: bar.update(done - bar.n),
        )
    if dist.is_main():
        write(config, result, task, len(bad_rows))
    dist.barrier()
    return 0


def _solutions(rows: Any, most: int = 50) -> list[str]:
    samples = SampleDataset(rows)
    loaded = (samples.get(index) for index in range(min(len(samples), most)))
    return [sample.solution for sample in loaded if not isinstance(sample, BadRow)]


def write(config: EvalConfig, result: Evaluation, task: str, num_bad_rows: int) -> None:
    """Per-sample JSONL, a summary beside it, and the means on the terminal."""
    path = output_path(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.writelines(json.dumps(null_for_nan(record)) + "\n" for record in result.records)
    summary = {
        "means": result.means,
        "task": task,
        "num_samples": len(result.records),
        "bad_rows": num_bad_rows,
        "config": asdict(config),
    }
    summary_path = path.with_suffix(".summary.json")
    summary_path.write_text(json.dumps(null_for_nan(summary), indent=1) + "\n")
    print(f"{task}, {len(result.records)} samples of {config.dataset_name} ({config.split})")
    width = max(map(len, result.means), default=0)
    for name, value in result.means.items():
        print(f"{name:{width}}  {value:.4f}")
    if num_bad_rows:
        print(f"skipped {num_bad_rows} rows that can't be used")
    print(f"written: {path}, {summary_path}")


def _check_output(path: Path) -> None:
    """Better before the evaluation than after it."""
    if path.is_dir():
        raise ValueError(f"--output {path}: expected a file's name, got a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--output {path}: expected a place that can be written")


def output_path(config: EvalConfig) -> Path:
    """--output, or a file in the checkpoint's folder, or in runs/eval for a model without one."""
    if config.output:
        return Path(config.output)
    name = f"eval_{Path(config.dataset_name).stem}_{config.split}.jsonl"
    folder = Path(config.model_name_or_path)
    return (folder if folder.is_dir() else Path("runs/eval")) / name


if __name__ == "__main__":
    from virft_fast.train import end_process

    end_process(main())
