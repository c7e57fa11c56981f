"""Checkpoints: a folder that `from_pretrained` loads and, beside the model, all that a resumed run
needs to go on bit for bit.

    checkpoint-100/
      config.json, model.safetensors, tokenizer and processor files    the model, or its adapter
      trainer_state.json       step, data order, metric sums, what the run was started with
      engine/                  weights in full precision and optimizer state, by the engine
      checksums.json           size and checksum of each of these files, against bit rot

A checkpoint is written under another name and renamed when all of it is on disk, and renamed before
it is deleted, so a kill at any moment leaves the last good one.
"""

from __future__ import annotations

import json
import logging
import os
import re
import reprlib
import shutil
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from virft_fast import dist, progress
from virft_fast.engine import Engine
from virft_fast.models.adapters import BASE_FOLDER
from virft_fast.models.qwen_vl import save_model

logger = logging.getLogger(__name__)

STATE_FILE, CHECKSUMS_FILE = "trainer_state.json", "checksums.json"
ALGORITHM = "xxh3_128"  # finds bit rot at the speed of memory; an attacker could forge it
_NAME = re.compile(r"checkpoint-(\d+)")
_ASIDE = ".writing"
_OF_A_RUN = rf"(?:checkpoint-\d+|{BASE_FOLDER})"
# What a killed run may leave of its own beside its checkpoints.
LEFTOVER = re.compile(
    rf"deleting-{_OF_A_RUN}-\d+|replaced-({_OF_A_RUN})-\d+"
    rf"|(?:{_OF_A_RUN}|model|metrics|completions|summary|reference_logps)\{_ASIDE}"
)
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
    engine: Engine,
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
    written: list[Path] = []  # by this rank
    checksums: dict[str, Any] = {}
    error = _on_main(lambda: _make_empty(aside))
    dist.barrier()
    weights = engine.model_state(model, dtype)
    if error is None and dist.is_main():
        options = (model, weights, processor, aside, state)
        with progress.busy("saving"):
            error = _attempt(lambda: written.extend(_write_model(*options)))
    # Every rank joins in the engine's collectives even if the main process has failed by now.
    if not only_model:
        engine_error = _attempt(lambda: written.extend(engine.save_state(aside / "engine")))
        error = error or engine_error
    with progress.busy("saving"):
        error = error or _attempt(lambda: checksums.update(_seal(aside, written)))
    failed = dist.any_rank(error is not None, engine.device)
    if not failed:
        parts = dist.all_gather_object(checksums)
        error = _on_main(lambda: _publish_listed(aside, final, parts))
        failed = dist.any_rank(error is not None, engine.device)
    if failed:
        _report_failure(final, error)
        _on_main(lambda: shutil.rmtree(aside, ignore_errors=True))
        return None
    _on_main(lambda: _rotate(output_dir, total_limit))
    dist.barrier()
    return final


def write_final_model(
    folder: Path,
    *,
    model: nn.Module,
    processor: Any,
    engine: Engine,
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
        # Where a loader finds the configuration, the rest is there.
        for path in sorted(aside.iterdir(), key=lambda path: "config.json" in path.name):
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


def write_whole_model(folder: Path, model: nn.Module, processor: Any) -> None:
    """Write a whole model of this process into a folder of its own, which replaces what is there;
    a kill leaves the old folder or the new one."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    aside = folder.with_name(f"{folder.name}{_ASIDE}")
    shutil.rmtree(aside, ignore_errors=True)
    save_model(model, weights, processor, aside)
    for path in aside.iterdir():
        _flush(path)
    _publish(aside, folder)


def find_checkpoint(output_dir: Path, name: str, *, dry_run: bool = False) -> Path | None:
    """The folder that --resume_from_checkpoint means, its files as they were written; all ranks
    call, and each reads its share of the files.

    Args:
        name: a checkpoint's folder, or "latest" (or "true") for the newest in `output_dir` that is
            whole. Damaged ones, newer than that, are renamed `damaged-checkpoint-*`.
        dry_run: leave the damaged ones where they are.
    Returns:
        The folder; None for "true" where there is no checkpoint.
    Raises:
        FileNotFoundError, ValueError: there is none, it holds no engine state or is damaged.
    """
    if not dry_run:
        _on_main(lambda: _take_back_replaced(output_dir))
    dist.barrier()
    if name.lower() in ("latest", "true"):
        return _find_latest(output_dir, name, dry_run)
    path = Path(name)
    if not path.is_dir():
        raise FileNotFoundError(
            f"--resume_from_checkpoint: expected a checkpoint folder or `latest`, got {name!r}: "
            f"no such folder"
        )
    problem = find_damage(path)
    if problem:
        raise ValueError(
            f"--resume_from_checkpoint {name}: expected its files as they were written, got "
            f"{problem}; resume an earlier one, or with `latest` the newest that is whole; if you "
            f"changed it on purpose, delete {path / CHECKSUMS_FILE}"
        )
    if not (path / "engine").is_dir() or not (path / STATE_FILE).is_file():
        raise ValueError(
            f"--resume_from_checkpoint {name}: it holds a model but no engine state (saved with "
            f"--save_only_model?); pass it as --model_name_or_path to start a new run from it"
        )
    return path


def _find_latest(output_dir: Path, name: str, dry_run: bool) -> Path | None:
    # The main process's list, because it renames some of them on the way.
    found = dist.all_gather_object(list_checkpoints(output_dir))[0]
    if not found and name.lower() == "true":
        return None
    damaged = []
    for path in reversed([path for path in found if _has_engine(path)]):
        problem = find_damage(path)
        if problem is None:
            return path
        damaged.append(f"{path.name}: {problem}")
        if dist.is_main() and not dry_run:
            aside = path.rename(path.with_name(f"damaged-{path.name}-{time.time_ns()}"))
            logger.warning("%s is damaged (%s); it is now %s", path, problem, aside.name)
    raise FileNotFoundError(
        f"--resume_from_checkpoint {name}: expected checkpoint-* folders with engine state in "
        f"{output_dir}, got {'only damaged ones: ' + '; '.join(damaged) if damaged else 'none'}"
    )


def _has_engine(checkpoint: Path) -> bool:
    """Also of a checkpoint that has lost it."""
    try:
        listed = read_checksums(checkpoint) or {}
    except (OSError, ValueError):
        listed = {}
    return (checkpoint / "engine").is_dir() or any(name.startswith("engine/") for name in listed)


def read_checksums(checkpoint: Path) -> dict[str, tuple[int, str]] | None:
    """Name -> size in bytes and checksum of the files of a checkpoint; None of one without a list.

    Raises:
        OSError, ValueError: the list can't be read.
    """
    path = checkpoint / CHECKSUMS_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: expected JSON, got {error}") from error
    form = {"algorithm": str, "files": {str: (COUNT, str)}}
    problem = misfit(content, form)
    if problem is None and content["algorithm"] != ALGORITHM:
        problem = f"algorithm: expected {ALGORITHM}, got {content['algorithm']!r:.40}"
    if problem:
        raise ValueError(f"{path.name}: {problem}")
    return content["files"]


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with one of a checkpoint's files, the same on every rank; None: nothing."""
    return next(filter(None, dist.all_gather_object(_damage_of_share(checkpoint))), None)


def _damage_of_share(checkpoint: Path) -> str | None:
    name = CHECKSUMS_FILE
    try:
        listed = read_checksums(checkpoint)
        if listed is None:
            logger.warning(
                "%s has no %s, an older version wrote it or somebody deleted it: its files are "
                "taken as they are", checkpoint, CHECKSUMS_FILE,
            )  # fmt: skip
            return None
        for name, (size, _) in listed.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name}: no such file"
            if path.stat().st_size != size:
                return f"{name}: {path.stat().st_size} bytes instead of {size}"
        by_size = sorted(listed, key=lambda name: -listed[name][0])
        for name in by_size[dist.rank() :: dist.world_size()]:
            if checksum(checkpoint / name) != listed[name][1]:
                return f"{name}: another checksum than when it was written"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{name}: can't be read ({error})"
    return None


def checksum(path: Path) -> str:
    """A file's XXH3 checksum of 128 bits, as hexadecimal digits."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(2**20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _seal(folder: Path, paths: Iterable[Path]) -> dict[str, tuple[int, str]]:
    """Put files of `folder` on disk, and read them meanwhile, for they are still in memory:
    name -> size and checksum."""
    paths = list(paths)
    with ThreadPoolExecutor(1) as other:
        flushed = other.map(_flush, paths)
        sums = {
            path.relative_to(folder).as_posix(): (path.stat().st_size, checksum(path))
            for path in paths
        }
        list(flushed)  # raises what one of them has raised
    return sums


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
        state = json.loads(path.read_text())
        if not isinstance(state, dict):
            raise ValueError(f"a {type(state).__name__}")
        return state
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected the state of a run, got {error}; resume an earlier checkpoint"
        ) from error


COUNT, NUMBER, MEAN = "a whole number from 0 to 2**63 - 1", "a finite number", "a number or NaN"
_ROWS = [(COUNT, str)]
_STATE: dict[str, Any] = {
    **dict.fromkeys(("step", "bad_steps", "skipped_steps", "num_tokens", "world_size"), COUNT),
    "sampler": {
        **dict.fromkeys(("num_rows", "seed", "epoch", "position", "order"), COUNT),
        "bad": _ROWS,
    },
    "bad_rows": {"rows": _ROWS},
    "writer": {"window": {str: (NUMBER, COUNT)}},
}
# May be missing, in what earlier versions wrote, or null.
_MAY_BE_MISSING: dict[str, Any] = {
    "silent_steps": {str: COUNT},
    "idle_steps": {str: COUNT},
    "before": {"means": {str: MEAN}, "answers": {str: str}, "num_samples": COUNT},
    "config": dict,
    "weights": [(str, COUNT, COUNT)],
    "adapter": str,
}


def check_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Check that a run can go on with what `read_state` has read, whoever wrote it.

    Raises:
        ValueError: a value is missing or not of its kind.
    """
    optional = {k: v for k, v in _MAY_BE_MISSING.items() if state.get(k) is not None}
    problem = misfit(state, _STATE | optional)
    name = _NAME.fullmatch(checkpoint.resolve().name)
    if problem is None and name and int(name.group(1)) != state["step"]:
        problem = f"step: expected {name.group(1)}, as the folder's name says, got {state['step']}"
    if problem:
        raise ValueError(
            f"{checkpoint / STATE_FILE}: {problem}; undo what was changed by hand, or resume an "
            "earlier checkpoint"
        )


def misfit(value: Any, form: Any, where: str = "") -> str | None:
    """The first part of JSON data that is not of `form`, what was expected there and what came.

    Args:
        form: `COUNT`, `NUMBER`, `MEAN`, a type; [form of the items]; (form of each item); {str:
            form of the values}; {key: form}, where other keys may be there too.
    """
    parts: list[tuple[Any, Any, str]] = []
    if form == COUNT:
        expected, fits = form, type(value) is int and 0 <= value < 2**63
    elif form in (NUMBER, MEAN):  # NaN is not below anything
        expected, fits = form, type(value) in (int, float)
        fits = fits and (abs(value) < 1e300 or (form == MEAN and value != value))
    elif isinstance(form, type):
        expected, fits = f"a {form.__name__}", type(value) is form
    elif isinstance(form, dict):
        expected, fits = "a dict", type(value) is dict
        if fits:
            keys = value if str in form else form
            parts = [(value.get(k), form.get(str, form.get(k)), f".{k}") for k in keys]
    else:
        fixed = len(form) if isinstance(form, tuple) else None
        expected = "a list" if fixed is None else f"a list of {fixed}"
        fits = type(value) is list and fixed in (None, len(value))
        if fits:
            forms = form * len(value) if fixed is None else form
            parts = [(v, f, f"[{i}]") for i, (v, f) in enumerate(zip(value, forms, strict=True))]
    if not fits:
        return f"{where.removeprefix('.')}: expected {expected}, got {reprlib.repr(value)}"
    return next(filter(None, (misfit(v, f, where + at) for v, f, at in parts)), None)


def set_later_aside(output_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, which a run resumed there is about to write again."""
    moved = []
    for path in list_checkpoints(output_dir):
        if int(_NAME.fullmatch(path.name).group(1)) > step:
            target = path.with_name(f"abandoned-{path.name}-{time.time_ns()}")
            path.rename(target)
            moved.append(target)
    return moved


def delete(path: Path) -> None:
    """Delete what is ours, under another name, so that a kill leaves nothing half under this one;
    where that fails it is logged, once."""
    try:
        if not LEFTOVER.fullmatch(path.name):
            path = path.rename(path.with_name(f"deleting-{path.name}-{time.time_ns()}"))
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        if path not in _undeletable:
            _undeletable.add(path)
            logger.error("COULD NOT DELETE %s: %s. Delete it by hand.", path, error)


_undeletable: set[Path] = set()


def delete_leftovers(output_dir: Path, total_limit: int | None) -> None:
    """Delete what a killed run left half-written or half-deleted, or had no time to delete."""
    for path in output_dir.iterdir():
        if LEFTOVER.fullmatch(path.name):
            delete(path)
    _rotate(output_dir, total_limit)


def _take_back_replaced(output_dir: Path) -> None:
    """Undo the first of `_publish`'s two renames where a kill came between them."""
    for path in output_dir.iterdir():
        match = LEFTOVER.fullmatch(path.name)
        if match and match.group(1) and not (output_dir / match.group(1)).exists():
            path.rename(output_dir / match.group(1))


def _write_model(
    model: nn.Module, weights: Any, processor: Any, folder: Path, state: dict[str, Any]
) -> list[Path]:
    save_model(model, weights, processor, folder)
    (folder / STATE_FILE).write_text(json.dumps(state, indent=1))
    return [path for path in folder.iterdir() if path.is_file()]


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "engine").mkdir(parents=True)


def _publish_listed(aside: Path, final: Path, parts: list[dict[str, Any]]) -> None:
    """Write the list of checksums, from those of each rank, and publish."""
    listed = {name: seal for part in parts for name, seal in part.items()}
    others = (p for p in aside.rglob("*") if p.relative_to(aside).as_posix() not in listed)
    listed |= _seal(aside, filter(Path.is_file, others))
    content = {"algorithm": ALGORITHM, "files": listed}
    (aside / CHECKSUMS_FILE).write_text(json.dumps(content, indent=1, sort_keys=True))
    _flush(aside / CHECKSUMS_FILE)
    _publish(aside, final)


def _publish(aside: Path, final: Path) -> None:
    """Rename a folder whose files are on disk."""
    engine = aside / "engine"
    if engine.is_dir() and not any(engine.iterdir()):
        engine.rmdir()
    for path in (*filter(Path.is_dir, aside.rglob("*")), aside):
        _flush(path)
    replaced = None
    if final.exists():
        replaced = final.rename(final.with_name(f"replaced-{final.name}-{time.time_ns()}"))
    os.rename(aside, final)
    _flush(final.parent)
    if replaced is not None:
        delete(replaced)


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
            delete(path)


def _on_main(action: Callable[[], Any]) -> Exception | None:
    return _attempt(action) if dist.is_main() else None


def _attempt(action: Callable[[], Any]) -> Exception | None:
    """Run `action`; an error comes back instead of rising: on a full or broken disk torch raises
    RuntimeError, safetensors its own kind, tokenizers a bare Exception."""
    try:
        action()
    except Exception as error:
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
    logger.error("COULD NOT SAVE %s: %s. %s. Free some disk.", target, text, comfort)
