"""Checkpoints: a folder that `from_pretrained` loads, with all that a run needs to resume
bit-for-bit.

    checkpoint-100/
      config.json, model.safetensors, tokenizer and processor files    the model, or its adapter
      trainer_state.json       step, data order, metric sums, the flags of the run
      engine/                  weights in full precision and optimizer state, written by the engine;
                               earlier answers, from which rollouts guess
      checksums.json           size and checksum of each of these files, to detect bit rot

A checkpoint is written under another name and renamed once all of it is on disk. It is also renamed
before it is deleted. A kill at any moment therefore leaves the last good checkpoint intact.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import time
import traceback
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from virft_fast import dist, progress
from virft_fast.arguments import expecting
from virft_fast.batch import Row
from virft_fast.engine import Engine
from virft_fast.json_files import COUNT, MEAN, NUMBER, misfit, parse_json
from virft_fast.models.adapters import BASE_FOLDER
from virft_fast.models.families import Processor
from virft_fast.models.qwen_vl import save_model

logger = logging.getLogger(__name__)

STATE_FILE, CHECKSUMS_FILE = "trainer_state.json", "checksums.json"
HISTORY_FILE = "engine/history.safetensors"
ALGORITHM = "xxh3_128"  # as fast as memory; detects bit rot, but not an attacker
Seals = dict[str, tuple[int, str]]  # file name -> size in bytes, checksum
_NAME = re.compile(r"checkpoint-(\d+)")
_ASIDE = ".writing"
_OF_A_RUN = rf"(?:checkpoint-\d+|{BASE_FOLDER})"
# What a killed run may leave next to its checkpoints.
LEFTOVER = re.compile(
    rf"deleting-{_OF_A_RUN}-\d+|replaced-({_OF_A_RUN})-\d+"
    rf"|(?:{_OF_A_RUN}|model|metrics|completions|summary|reference_logps)\{_ASIDE}"
    rf"|\.(?:metrics|completions|summary|reference_logps)\.jsonl?\{_ASIDE}"
)
# Files by which transformers or peft recognize a folder as a model or an adapter.
MODEL_FILES = re.compile(
    r"(adapter_|pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|adapter_config\.json"
)


def save_checkpoint(
    output_dir: Path,
    step: int,
    *,
    model: nn.Module,
    processor: Processor,
    engine: Engine,
    state: Row,
    history: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    only_model: bool = False,
    total_limit: int | None = None,
) -> Path | None:
    """Write `output_dir/checkpoint-{step}`; all ranks must call.

    Args:
        state: plain JSON data, the same on every rank.
        history: `History.state_dict`, the same on every rank; None: there is none.
        dtype: of the saved weights; None keeps the training dtype.
        only_model: omit the engine's state and the history; such a checkpoint can't be resumed.
        total_limit: afterwards keep only this many latest checkpoints.
    Returns:
        The folder, or None if it could not be written, for example because the disk is full. In
        that case an error has been logged, and earlier checkpoints are intact.
    """
    final = output_dir / f"checkpoint-{step}"
    aside = output_dir / f"{final.name}{_ASIDE}"
    written: list[Path] = []  # by this rank
    weights = engine.model_state(model, dtype)  # None except on the main process
    try:
        dist.on_main(lambda: _make_empty(aside))
        with dist.agreed(), progress.busy("saving"):
            if weights is not None:
                save_model(model, weights, processor, aside)
                (aside / STATE_FILE).write_text(json.dumps(state, indent=1))
                written += [path for path in aside.iterdir() if path.is_file()]
        if not only_model:
            with dist.agreed():  # DeepSpeed passes its barriers on all ranks, even if a write fails
                written += engine.save_state(aside / "engine")
        with dist.agreed(), progress.busy("saving"):
            if history is not None and dist.is_main() and not only_model:
                save_file(dict(history), aside / HISTORY_FILE)
                written.append(aside / HISTORY_FILE)
            seals = _seal(aside, written)
        every_rank = dist.all_gather_object(seals)
        dist.on_main(lambda: _publish_listed(aside, final, every_rank))
    except Exception as error:
        _give_up(final, aside, error, "The run continues; earlier checkpoints are intact")
        return None
    if dist.is_main():
        with contextlib.suppress(OSError):
            _rotate(output_dir, total_limit)
    dist.barrier()
    return final


def write_final_model(
    folder: Path,
    *,
    model: nn.Module,
    processor: Processor,
    engine: Engine,
    dtype: torch.dtype | None = None,
) -> bool:
    """Write only the model into `folder`, which may hold other files; all ranks must call. Weights
    of another model in `folder` are deleted, because a loader might take them for this one's.

    Returns:
        False if it could not be written; then an error has been logged.
    """
    weights = engine.model_state(model, dtype)  # None except on the main process
    aside = folder / f"model{_ASIDE}"
    try:
        with dist.agreed():
            if weights is not None:
                shutil.rmtree(aside, ignore_errors=True)
                save_model(model, weights, processor, aside)
                written = {path.name for path in aside.iterdir()}
                for path in folder.iterdir():
                    if MODEL_FILES.fullmatch(path.name) and path.name not in written:
                        path.unlink()
                # config.json comes last: a loader that finds it also finds the rest.
                for path in sorted(aside.iterdir(), key=lambda path: "config.json" in path.name):
                    _flush(path)
                    os.replace(path, folder / path.name)
                aside.rmdir()
    except Exception as error:
        _give_up(folder, aside, error, "Checkpoints are intact")
        return False
    return True


def write_whole_model(folder: Path, model: nn.Module, processor: Processor) -> None:
    """Write this process's whole model into `folder`, replacing the folder if it exists; a kill
    leaves either the old folder or the new one."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    aside = folder.with_name(f"{folder.name}{_ASIDE}")
    shutil.rmtree(aside, ignore_errors=True)
    save_model(model, weights, processor, aside)
    for path in aside.iterdir():
        _flush(path)
    _publish(aside, folder)


def find_checkpoint(output_dir: Path, name: str, *, dry_run: bool = False) -> Path | None:
    """The folder that --resume_from_checkpoint names, once its files are verified; all ranks must
    call, and each reads its share of the files.

    Args:
        name: a checkpoint folder, or "latest" (or "true") for the newest intact one in
            `output_dir`. Newer, damaged ones are renamed to `damaged-checkpoint-*`.
        dry_run: don't rename damaged ones.
    Returns:
        The folder; None for "true" if there is no checkpoint.
    Raises:
        FileNotFoundError, ValueError: no such checkpoint exists, or it has no engine state or is
            damaged.
    """
    if dist.is_main() and not dry_run:
        with contextlib.suppress(OSError):
            _take_back_replaced(output_dir)
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
            f"{problem}; resume an earlier one, or pass `latest` for the newest intact one; if you "
            f"changed it on purpose, delete {path / CHECKSUMS_FILE}"
        )
    if not (path / "engine").is_dir() or not (path / STATE_FILE).is_file():
        raise ValueError(
            f"--resume_from_checkpoint {name}: it holds a model but no engine state (saved with "
            f"--save_only_model?); pass it as --model_name_or_path to start a new run from it"
        )
    return path


def _find_latest(output_dir: Path, name: str, dry_run: bool) -> Path | None:
    # Only the main process lists the folder, because it renames some of its entries below.
    checkpoints = dist.all_gather_object(list_checkpoints(output_dir))[0]
    if not checkpoints and name.lower() == "true":
        return None
    damaged = []
    for path in reversed([path for path in checkpoints if _has_engine(path)]):
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
    """Whether a checkpoint has engine state, or had it when it was written."""
    try:
        listed = read_checksums(checkpoint) or {}
    except (OSError, ValueError):
        listed = {}
    return (checkpoint / "engine").is_dir() or any(name.startswith("engine/") for name in listed)


def read_checksums(checkpoint: Path) -> Seals | None:
    """Sizes and checksums of a checkpoint's files; None if it has no list of them.

    Raises:
        OSError, ValueError: the list can't be read.
    """
    path = checkpoint / CHECKSUMS_FILE
    if not path.exists():
        return None
    content = parse_json(path.read_bytes(), path.name)
    form = {"algorithm": str, "files": {str: (COUNT, str)}}
    problem = misfit(content, form)
    if problem is None and content["algorithm"] != ALGORITHM:
        problem = f"algorithm: expected {ALGORITHM}, got {content['algorithm']!r:.40}"
    if problem:
        raise ValueError(f"{path.name}: {problem}")
    return content["files"]


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, the same on every rank; None if they are intact."""
    return next(filter(None, dist.all_gather_object(_damage_of_share(checkpoint))), None)


def _damage_of_share(checkpoint: Path) -> str | None:
    name = CHECKSUMS_FILE
    try:
        listed = read_checksums(checkpoint)
        if listed is None:
            logger.warning(
                "%s has no %s (written by an older version, or deleted), so its files are not "
                "checked", checkpoint, CHECKSUMS_FILE,
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
    """A file's 128-bit XXH3 checksum, as hexadecimal digits."""
    import xxhash

    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(2**20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _seal(folder: Path, paths: Iterable[Path]) -> Seals:
    """Flush files of `folder` to disk; returns their sizes and checksums, which are computed during
    the flush, while the files are still cached in memory."""
    paths = list(paths)
    with ThreadPoolExecutor(1) as other:
        flushed = other.map(_flush, paths)
        sums = {
            path.relative_to(folder).as_posix(): (path.stat().st_size, checksum(path))
            for path in paths
        }
        list(flushed)  # raises the error of a failed flush
    return sums


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return [path for _, path in _numbered(output_dir)]


def _numbered(output_dir: Path) -> list[tuple[int, Path]]:
    """The step of each complete checkpoint and its folder, oldest first."""
    paths = output_dir.iterdir() if output_dir.is_dir() else ()
    return sorted((int(name[1]), path) for path in paths if (name := _NAME.fullmatch(path.name)))


def read_state(checkpoint: Path) -> Row:
    """The JSON state written with a checkpoint.

    Raises:
        ValueError: the file can't be read.
    """
    path = checkpoint / STATE_FILE
    with expecting(f"{path}: expected the state of a run", hint="; resume an earlier checkpoint"):
        state = json.loads(path.read_text())
        if not isinstance(state, dict):
            raise ValueError(f"a {type(state).__name__}")
        return state


def read_history(checkpoint: Path) -> dict[str, Tensor] | None:
    """What was saved as `history`; None if there is none, as in checkpoints of earlier versions.

    Raises:
        ValueError: the file can't be read.
    """
    path = checkpoint / HISTORY_FILE
    if not path.is_file():
        return None
    with expecting(f"{path}: expected tensors", (SafetensorError, OSError)):
        return load_file(path)


_ROWS = [(COUNT, str)]
_STATE: Row = {
    **dict.fromkeys(("step", "bad_steps", "skipped_steps", "num_tokens", "world_size"), COUNT),
    "sampler": {
        **dict.fromkeys(("num_rows", "seed", "epoch", "position", "order"), COUNT),
        "bad": _ROWS,
    },
    "bad_rows": {"rows": _ROWS},
    "writer": {"window": {str: (NUMBER, COUNT)}},
}
# Entries that may be null, or missing from a state that an earlier version wrote.
_MAY_BE_MISSING: Row = {
    "silent_steps": {str: COUNT},
    "idle_steps": {str: COUNT},
    "num_prompts": COUNT,
    "curriculum": [(COUNT, COUNT)],
    "before": {"means": {str: MEAN}, "answers": {str: str}, "num_samples": COUNT},
    "config": dict,
    "weights": [(str, COUNT, COUNT)],
    "adapter": str,
}


def check_state(checkpoint: Path, state: Row) -> None:
    """Check that a run can resume from what `read_state` returned.

    Raises:
        ValueError: a value is missing or has the wrong type.
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


def set_later_aside(output_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, because a run resumed there writes them again."""
    later = [path for number, path in _numbered(output_dir) if number > step]
    return [p.rename(p.with_name(f"abandoned-{p.name}-{time.time_ns()}")) for p in later]


def delete(path: Path) -> None:
    """Rename one of our files or folders and delete it, so that a kill leaves nothing incomplete
    under its name. A failure is logged once for each path."""
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
    """Delete what a killed run left incomplete, and checkpoints beyond `total_limit`."""
    for path in output_dir.iterdir():
        if LEFTOVER.fullmatch(path.name):
            delete(path)
    _rotate(output_dir, total_limit)


def _take_back_replaced(output_dir: Path) -> None:
    """Undo the first of `_publish`'s two renames if a kill prevented the second."""
    for path in output_dir.iterdir():
        name = LEFTOVER.fullmatch(path.name)
        if name and name[1] and not (output_dir / name[1]).exists():
            path.rename(output_dir / name[1])


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "engine").mkdir(parents=True)


def _publish_listed(aside: Path, final: Path, every_rank: list[Seals]) -> None:
    """Publish with a list of checksums: each rank's, and those of files that no rank reported."""
    listed = {name: seal for seals in every_rank for name, seal in seals.items()}
    others = (p for p in aside.rglob("*") if p.relative_to(aside).as_posix() not in listed)
    listed |= _seal(aside, filter(Path.is_file, others))
    content = {"algorithm": ALGORITHM, "files": listed}
    (aside / CHECKSUMS_FILE).write_text(json.dumps(content, indent=1, sort_keys=True))
    _flush(aside / CHECKSUMS_FILE)
    _publish(aside, final)


def _publish(aside: Path, final: Path) -> None:
    """Rename a folder, whose files must be on disk, to its final name."""
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
    """Flush to disk, so that a renamed file or folder keeps its content after a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rotate(output_dir: Path, total_limit: int | None) -> None:
    if total_limit is not None:
        for path in list_checkpoints(output_dir)[:-total_limit]:
            delete(path)


def _give_up(target: Path, aside: Path, error: Exception, reassurance: str) -> None:
    """Delete `aside` and log the error on the ranks that had it; raise it instead if the other
    ranks don't know about it.

    On a full or broken disk torch raises RuntimeError, safetensors an error of its own, tokenizers
    a bare Exception.
    """
    if not dist.is_agreed(error):
        raise error
    if not isinstance(error, dist.RankFailed):
        text = "".join(traceback.format_exception_only(error)).strip()
        logger.error("COULD NOT SAVE %s: %s. %s. Free some disk.", target, text, reassurance)
    if dist.is_main():
        shutil.rmtree(aside, ignore_errors=True)
