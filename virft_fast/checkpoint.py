"""Checkpoints: a folder that `from_pretrained` loads and, beside the model, all that a resumed run
needs to go on bit for bit.

    checkpoint-100/
      config.json, model.safetensors, tokenizer and processor files    the model, or its adapter
      trainer_state.json       step, data order, metric sums, what the run was started with
      engine/                  weights in full precision and optimizer state, by the engine

A checkpoint is written under another name and renamed when all of it is on disk, so a kill at any
moment leaves the last good one.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from virft_fast import dist
from virft_fast.engine import DeepSpeedEngine, PlainEngine
from virft_fast.models.qwen_vl import save_model

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_ASIDE = ".writing"
# What makes a folder a model or an adapter to transformers and peft.
MODEL_FILES = re.compile(
    r"(adapter_|pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|adapter_config\.json"
)


def save_checkpoint(
    output_dir: Path,
    step: int,
    *,
    model: nn.Module,
    processor: Any,
    engine: PlainEngine | DeepSpeedEngine,
    state: dict[str, Any],
    dtype: torch.dtype | None = None,
    only_model: bool = False,
    total_limit: int | None = None,
) -> Path | None:
    """Write `output_dir/checkpoint-{step}`; all ranks call.

    Args:
        state: plain JSON data, the same on every rank.
        dtype: of the stored weights; None keeps the one they are trained in.
        only_model: leave the engine's state out; such a checkpoint can't be resumed.
        total_limit: afterwards keep only this many latest checkpoints.
    Returns:
        The folder, or None if it could not be written (a full disk, say): then a loud warning
        has been given, and earlier checkpoints are as they were.
    """
    final = output_dir / f"checkpoint-{step}"
    aside = output_dir / f"{final.name}{_ASIDE}"
    error = _on_main(lambda: _make_empty(aside))
    dist.barrier()
    weights = engine.model_state(model, dtype)
    if error is None and dist.is_main():
        error = _attempt(lambda: _write_model(model, weights, processor, aside, state))
    # Every rank joins in the engine's collectives even if the main process has failed by now.
    engine_error = None if only_model else _attempt(lambda: engine.save_state(aside / "engine"))
    failed = dist.any_rank(error is not None or engine_error is not None, engine.device)
    if failed:
        _report_failure(final, error or engine_error)
        _on_main(lambda: shutil.rmtree(aside, ignore_errors=True))
        return None
    publish_error = _on_main(lambda: _publish(aside, final))
    if dist.any_rank(publish_error is not None, engine.device):
        _report_failure(final, publish_error)
        return None
    _on_main(lambda: _rotate(output_dir, total_limit))
    dist.barrier()
    return final


def write_final_model(
    folder: Path,
    *,
    model: nn.Module,
    processor: Any,
    engine: PlainEngine | DeepSpeedEngine,
    dtype: torch.dtype | None = None,
) -> bool:
    """Write the model alone into `folder`, beside what is there; all ranks call. Weights of
    another model in `folder` are deleted, because a loader might take them for this one's."""
    weights = engine.model_state(model, dtype)
    aside = folder / f"model{_ASIDE}"

    def write() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        save_model(model, weights, processor, aside)
        written = {path.name for path in aside.iterdir()}
        for path in folder.iterdir():
            if MODEL_FILES.fullmatch(path.name) and path.name not in written:
                path.unlink()
        for path in sorted(aside.iterdir()):
            _flush(path)
            os.replace(path, folder / path.name)
        aside.rmdir()

    error = _on_main(write)
    if error is not None:
        shutil.rmtree(aside, ignore_errors=True)
    failed = dist.any_rank(error is not None, engine.device)
    if failed:
        _report_failure(folder, error, "Checkpoints are intact")
    return not failed


def write_whole_model(
    folder: Path, model: nn.Module, processor: Any, dtype: torch.dtype | None = None
) -> None:
    """Write a whole model of this process into a folder of its own, which replaces what is there;
    a kill leaves the old folder or the new one."""
    weights = {
        name: parameter.detach().to(dtype or parameter.dtype)
        for name, parameter in model.named_parameters()
    }
    aside = folder.with_name(f"{folder.name}{_ASIDE}")
    shutil.rmtree(aside, ignore_errors=True)
    save_model(model, weights, processor, aside)
    _publish(aside, folder)


def find_checkpoint(output_dir: Path, name: str) -> Path:
    """The folder that --resume_from_checkpoint means.

    Args:
        name: a checkpoint's folder, or "latest" (or "true") for the newest in `output_dir`.
    Raises:
        FileNotFoundError, ValueError: there is none, or it holds no engine state.
    """
    if name.lower() in ("latest", "true"):
        steps = [path for path in list_checkpoints(output_dir) if (path / "engine").is_dir()]
        if not steps:
            raise FileNotFoundError(
                f"--resume_from_checkpoint {name}: expected checkpoint-* folders with engine state "
                f"in {output_dir}, got none"
            )
        return steps[-1]
    path = Path(name)
    if not path.is_dir():
        raise FileNotFoundError(
            f"--resume_from_checkpoint: expected a checkpoint folder or `latest`, got {name!r}: "
            f"no such folder"
        )
    if not (path / "engine").is_dir() or not (path / STATE_FILE).is_file():
        raise ValueError(
            f"--resume_from_checkpoint {name}: it holds a model but no engine state (saved with "
            f"--save_only_model?); pass it as --model_name_or_path to start a new run from it"
        )
    return path


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not output_dir.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in output_dir.iterdir()]
    return [path for match, path in sorted(
        ((m, p) for m, p in found if m), key=lambda pair: int(pair[0].group(1))
    )]  # fmt: skip


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON state written with a checkpoint.

    Raises:
        ValueError: the file can't be read.
    """
    path = checkpoint / STATE_FILE
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the state of a run, got {error}; resume an earlier checkpoint"
        ) from error


def set_later_aside(output_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, which a run resumed there is about to write again."""
    moved = []
    for path in list_checkpoints(output_dir):
        if int(_NAME.fullmatch(path.name).group(1)) > step:
            target = path.with_name(f"abandoned-{path.name}-{time.time_ns()}")
            path.rename(target)
            moved.append(target)
    return moved


def _write_model(
    model: nn.Module, weights: Any, processor: Any, folder: Path, state: dict[str, Any]
) -> None:
    save_model(model, weights, processor, folder)
    (folder / STATE_FILE).write_text(json.dumps(state, indent=1))


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "engine").mkdir(parents=True)


def _publish(aside: Path, final: Path) -> None:
    engine = aside / "engine"
    if engine.is_dir() and not any(engine.iterdir()):
        engine.rmdir()
    for path in sorted(aside.rglob("*")):
        if path.is_file():
            _flush(path)
    if final.exists():
        shutil.rmtree(final)
    os.rename(aside, final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    """To disk, so that the rename can't survive a crash that its content doesn't."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rotate(output_dir: Path, total_limit: int | None) -> None:
    if total_limit is not None:
        for path in list_checkpoints(output_dir)[:-total_limit]:
            shutil.rmtree(path, ignore_errors=True)


def _on_main(action: Callable[[], Any]) -> Exception | None:
    return _attempt(action) if dist.is_main() else None


def _attempt(action: Callable[[], Any]) -> Exception | None:
    """Run `action`; an error that a full or broken disk causes comes back instead of rising."""
    from safetensors import SafetensorError

    try:
        action()
    # torch.save reports a failed write as RuntimeError.
    except (OSError, RuntimeError, SafetensorError) as error:
        return error
    return None


def _report_failure(
    target: Path,
    error: Exception | None,
    comfort: str = "The run goes on; earlier checkpoints are intact",
) -> None:
    if error is None:
        return
    text = "".join(traceback.format_exception_only(error)).strip()
    logger.error(
        "COULD NOT SAVE %s: %s. %s. Free some disk.",
        target,
        text,
        comfort,
    )
