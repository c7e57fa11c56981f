"""Kill training runs at chosen file operations, resume them, compare them with a run never killed.

    python scripts/crash_campaign.py --kills 300 --journal campaign.jsonl
    python scripts/crash_campaign.py --full_disk 100 --journal disk.jsonl

Each round picks a setting, a rank and one file operation in the run's output folder: an open for
writing, a write (the file may be left half-written), fsync, rename, mkdir, chmod, unlink, rmdir or
rmtree. The rank is killed by SIGKILL just before that operation. Half of the resumed runs are
killed, too.

    lost        a checkpoint that was published before the kill is gone, or a run can't resume
    half        an incomplete folder under a checkpoint's final name
    unequal     weights, optimizer state, records or file names differ from the unkilled run
    hung        a run did not end within TIMEOUT_S

With --full_disk, runs write to a small tmpfs instead (root only; otherwise the size of files is
limited). `wrong` counts runs that end with a traceback, with exit status 0 although a checkpoint
could not be written, or with an incomplete checkpoint.

The journal has one line per round; with the same seed, the same command continues it.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import importlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import datasets
import safetensors.torch
import torch

from virft_fast import checkpoint, train
from virft_fast.data.demo import build_demo

TIMEOUT_S = 180
LIMIT = 2  # --save_total_limit
LAST = "checkpoint-4"
MAX_KILLS = 3  # of one run, including those that resume it
ZERO3 = Path(__file__).parent.parent / "configs/zero3.json"
SETTINGS = {  # algorithm, ranks, further flags
    "grpo-1": ("grpo", 1, []),
    "sft-1": ("sft", 1, []),
    "dpo-1": ("dpo", 1, []),
    "grpo-2": ("grpo", 2, []),
    "sft-2-zero3": ("sft", 2, ["--deepspeed", str(ZERO3)]),
    "dpo-2": ("dpo", 2, []),
}
FAULTS = ("lost", "half", "unequal", "hung", "wrong")
WARM = {"virft_fast", "torch", "transformers", "datasets", "deepspeed", "safetensors", "accelerate"}
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class Watch:
    """Reports file operations below `folder` on a descriptor, each before it happens, and kills
    this process at number `kill_at`. `torn`: a write is then left half done."""

    def __init__(self, folder: Path, report: int, kill_at: int | None, torn: bool) -> None:
        self.folder, self.report, self.kill_at, self.torn = str(folder), report, kill_at, torn
        self.count = 0

    def install(self) -> None:
        sys.addaudithook(self._audit)
        fsync, save, serialize = os.fsync, torch.save, safetensors.torch.serialize_file
        opened = io.open

        def watched_fsync(descriptor: int) -> None:
            self.point("fsync", _of_descriptor(descriptor))
            fsync(descriptor)

        def watched_save(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            self.point("write", file, lambda: _halve(file, save, value, file, *args, **kwargs))
            save(value, file, *args, **kwargs)

        def watched_serialize(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            half = lambda: _halve(file, serialize, value, file, *args, **kwargs)  # noqa: E731
            self.point("write", file, half)
            serialize(value, file, *args, **kwargs)

        def watched_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            made = opened(file, mode, *args, **kwargs)
            return made if mode[0] == "r" or isinstance(file, int) else File(made, file, self)

        os.fsync, torch.save, safetensors.torch.serialize_file = (
            watched_fsync, watched_save, watched_serialize
        )  # fmt: skip
        io.open = builtins.open = watched_open

    def point(
        self, kind: str, path: Any, half: Callable[[], Any] | None = None, to: Any = ""
    ) -> None:
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path).startswith(self.folder):
            return
        where = [os.path.relpath(os.fspath(p), self.folder) if p else "" for p in (path, to)]
        os.write(self.report, (json.dumps([kind, *where]) + "\n").encode())
        if self.count == self.kill_at:
            if half is not None and self.torn:
                self.kill_at = None
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[2], int):
            if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.point("open", args[0])
        elif event == "os.rename":
            self.point("rename", args[0], to=os.fspath(args[1]))
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree"):
            folder = args[-1] if event != "shutil.rmtree" else -1
            path = args[0]
            if isinstance(folder, int) and folder >= 0:
                path = os.path.join(_of_descriptor(folder), os.fspath(path))
            self.point(event.split(".")[1], path)


class File:
    """A file whose writes are watched."""

    def __init__(self, file: Any, path: Any, watch: Watch) -> None:
        self._file, self._path, self._watch = file, path, watch

    def write(self, data: Any) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._watch.point("write", self._path, half)
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> File:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __iter__(self) -> Any:
        return iter(self._file)


def _of_descriptor(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _halve(path: Any, write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    write(*args, **kwargs)
    os.truncate(path, os.path.getsize(path) // 2)


class Campaign:
    """Starts runs as forks of this process, which has imported what they need."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.data = {"dpo": work / "pairs", "grpo": work / "digits", "sft": work / "digits"}
        self.references: dict[str, tuple[dict[str, Any], list[list[Any]]]] = {}
        digits = build_demo("digits_classification", self.data["grpo"], num_train=16, num_test=2)
        rows = [
            {"images": [row["image"]], "prompt": row["problem"], "chosen": row["solution"],
             "rejected": "<answer>none</answer>"} for row in digits["train"]
        ]  # fmt: skip
        pairs = datasets.Dataset.from_list(rows)
        pairs = pairs.cast_column("images", datasets.List(datasets.Image()))
        datasets.DatasetDict(train=pairs).save_to_disk(str(self.data["dpo"]))

    def arguments(self, setting: str, out: Path, more: list[str]) -> list[str]:
        algorithm, _, flags = SETTINGS[setting]
        short = ["--num_generations", "2"] if algorithm == "grpo" else []
        return [
            "--algorithm", algorithm, "--dataset_name", str(self.data[algorithm]),
            "--output_dir", str(out), "--max_steps", "4", "--save_steps", "1",
            "--save_total_limit", str(LIMIT), "--learning_rate", "1e-3",
            "--max_completion_length", "12", "--ddp_timeout", str(TIMEOUT_S), *short, *flags, *more,
        ]  # fmt: skip

    def run(
        self, setting: str, out: Path, *more: str, rank: int = 0, kill_at: int | None = None,
        torn: bool = False, before: Callable[[], Any] = lambda: None,
    ) -> tuple[list[int | None], list[list[list[str]]], str]:  # fmt: skip
        """Exit statuses (None: hung), operations and output of a run that is killed on `rank`."""
        ranks = SETTINGS[setting][1]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = {}
        for number in range(ranks):
            pid = os.fork()
            if pid == 0:
                at = kill_at if number == rank else None
                self._child(setting, out, list(more), number, port, at, torn, before)
            children[pid] = number
        statuses = self._wait(children)
        trace = [_lines(self.work / f"operations-{number}") for number in range(ranks)]
        output = "".join(
            (self.work / f"output-{number}").read_text(errors="replace") for number in range(ranks)
        )
        return [statuses.get(number) for number in range(ranks)], trace, output

    def _child(
        self, setting: str, out: Path, more: list[str], rank: int, port: int, kill_at: int | None,
        torn: bool, before: Callable[[], Any],
    ) -> None:  # fmt: skip
        status = 70
        try:
            output = os.open(self.work / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            report = os.open(
                self.work / f"operations-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            )
            if SETTINGS[setting][1] > 1:
                world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": SETTINGS[setting][1]}
                os.environ |= {name: str(value) for name, value in world.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            # Drawing the picture takes a second.
            train.conclusion.write_report = lambda *args, **kwargs: None
            Watch(out, report, kill_at, torn).install()
            before()
            status = train.main(self.arguments(setting, out, more))
            modules = [name for name in sys.modules if name.split(".")[0] in WARM]
            (self.work / f"modules-{rank}").write_text("\n".join(modules))
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    @staticmethod
    def _wait(children: dict[int, int]) -> dict[int, int]:
        """Wait as a launcher does: if one rank fails, the others are killed."""
        left, statuses, deadline = dict(children), {}, time.monotonic() + TIMEOUT_S
        while left:
            for pid in list(left):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[left.pop(pid)] = os.waitstatus_to_exitcode(status)
            late = time.monotonic() > deadline
            if left and (late or any(statuses.values())):
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                    _, status = os.waitpid(pid, 0)
                    if not late:
                        statuses[left[pid]] = os.waitstatus_to_exitcode(status)
                break
            time.sleep(0.005)
        return statuses

    def reference(self, setting: str) -> tuple[dict[str, Any], list[list[list[str]]]]:
        """The final state of a run that is never killed, and its operations on each rank."""
        if setting not in self.references:
            out = self.work / f"whole-{setting}"
            shutil.rmtree(out, ignore_errors=True)
            statuses, trace, output = self.run(setting, out)
            whole = [path.name for path in checkpoint.list_checkpoints(out)][-1:] == [LAST]
            if any(statuses) or None in statuses or not whole:
                raise RuntimeError(f"{setting}: expected to reach {LAST}, got {output[-3000:]}")
            # Import what that run imported, so that later forks don't have to.
            for name in (self.work / "modules-0").read_text().splitlines():
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
            self.references[setting] = fingerprint(out), trace
        return self.references[setting]

    def kill_and_resume(self, setting: str, rng: random.Random) -> dict[str, Any]:
        """One round; returns its findings as a line of the journal."""
        expected, reference = self.reference(setting)
        out = self.work / f"killed-{setting}"
        shutil.rmtree(out, ignore_errors=True)
        rank = rng.choice([number for number, part in enumerate(reference) if part])
        kinds: dict[str, list[int]] = {}
        for number, (kind, *_) in enumerate(reference[rank]):
            kinds.setdefault(kind, []).append(number)
        kill_at, torn = rng.choice(kinds[rng.choice(sorted(kinds))]), rng.random() < 0.5
        entry: dict[str, Any] = {"setting": setting, "rank": rank, "kills": []}
        entry |= dict.fromkeys(FAULTS, 0) | {"notes": []}
        published: list[int] = []
        more: list[str] = []
        while True:
            statuses, trace, output = self.run(
                setting, out, *more, rank=rank, kill_at=kill_at, torn=torn
            )
            self._replay(trace[0], published, entry)
            self._inspect(out, published, entry)
            if None in statuses:
                entry["hung"] += 1
            if statuses[rank] != -signal.SIGKILL or len(trace[rank]) - 1 != kill_at:
                break
            entry["kills"].append([*trace[rank][-1], kill_at, torn])
            more = ["--resume_from_checkpoint", "latest"]
            if not published:
                more = ["--overwrite_output_dir"]
            kill_at, torn = None, rng.random() < 0.5
            if len(entry["kills"]) < MAX_KILLS and rng.random() < 0.5:
                kill_at = int(len(reference[rank]) * rng.random() ** 2)
        if any(statuses):
            entry["lost"] += 1
            entry["notes"].append(output[-1500:])
        elif None not in statuses:
            found = fingerprint(out)
            differing = [k for k in expected.keys() | found if expected.get(k) != found.get(k)]
            if differing:
                entry["unequal"] += 1
                entry["notes"].append(f"differs: {sorted(differing)[:10]}")
        return entry

    @staticmethod
    def _replay(trace: list[list[str]], published: list[int], entry: dict[str, Any]) -> None:
        """Find the checkpoints that are published after these operations of the main process, the
        last of which may have been cut off."""
        for number, (kind, source, target) in enumerate(trace):
            gone, come = CHECKPOINT.fullmatch(source), CHECKPOINT.fullmatch(target)
            if kind == "rename" and gone and int(gone.group(1)) in published:
                step = int(gone.group(1))
                published.remove(step)
                if sum(other > step for other in published) < LIMIT:
                    entry["lost"] += 1
                    entry["notes"].append(f"{source} became {target}")
            if kind == "rename" and come and number < len(trace) - 1:
                published.append(int(come.group(1)))

    @staticmethod
    def _inspect(out: Path, published: list[int], entry: dict[str, Any]) -> None:
        for path in checkpoint.list_checkpoints(out):
            problem = damage(path)
            if problem:
                entry["half"] += 1
                entry["notes"].append(f"{path.name}: {problem}")
        for step in published:
            if not (out / f"checkpoint-{step}").is_dir():
                entry["lost"] += 1
                entry["notes"].append(f"checkpoint-{step} is gone")

    def fill_disk(self, setting: str, rng: random.Random, sizes: dict[str, int]) -> dict[str, Any]:
        """A run whose disk fills up at some byte; returns the findings as a line of the journal."""
        if setting not in sizes:
            self.reference(setting)
            whole = self.work / f"whole-{setting}"
            checkpoints = checkpoint.list_checkpoints(whole)
            size = sum(p.stat().st_size for p in checkpoints[-1].rglob("*") if p.is_file())
            sizes[setting] = size
        disk, room = self.work / "disk", int(sizes[setting] * rng.uniform(0.0, LIMIT + 2.5))
        disk.mkdir(exist_ok=True)
        entry: dict[str, Any] = {"setting": setting, "bytes": room, "kills": [], "notes": []}
        entry |= dict.fromkeys(FAULTS, 0)
        mounted = mount(disk, max(room, 2**16))
        limit = lambda: resource.setrlimit(  # noqa: E731
            resource.RLIMIT_FSIZE, (room // 4, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
        try:
            out = disk / "run"
            shutil.rmtree(out, ignore_errors=True)
            statuses, _, output = self.run(
                setting, out, before=(lambda: None) if mounted else limit
            )
            self._inspect(out, [], entry)
            entry["hung"] += None in statuses
            said = "COULD NOT SAVE" in output
            right = statuses == [int(said)] * len(statuses)
            entry |= {"tmpfs": mounted, "statuses": statuses, "failed": said}
            if "Traceback" in output or not right:
                entry["wrong"] += 1
                entry["notes"].append(output[-3000:])
        finally:
            if mounted:
                subprocess.run(["umount", disk], check=True)
        return entry


def mount(folder: Path, size: int) -> bool:
    """Mount a tmpfs of `size` bytes at `folder`; returns whether that worked."""
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    return subprocess.run(words, capture_output=True).returncode == 0


def damage(path: Path) -> str | None:
    """Why a checkpoint can't be resumed; None if it can."""
    if checkpoint.read_checksums(path) is None:
        return "no checksums"
    listed = checkpoint.read_checksums(path)
    if checkpoint.STATE_FILE not in listed or not any(n.startswith("engine/") for n in listed):
        return f"only {sorted(listed)}"
    return checkpoint.find_damage(path)


def fingerprint(out: Path) -> dict[str, Any]:
    """What must be equal: file name -> checksum, or its content without measured times."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if not path.is_file() or path.name == checkpoint.CHECKSUMS_FILE:
            continue
        if path.suffix == ".jsonl":
            records = map(json.loads, path.read_text().splitlines())
            found[name] = [
                {k: v for k, v in record.items() if not re.search("time|per_s", k)}
                for record in records
            ]
        elif path.name == checkpoint.STATE_FILE:
            found[name] = json.loads(path.read_text()) | {"config": None}  # differs on resume
        elif path.name == "summary.json":
            found[name] = None
        else:
            found[name] = checkpoint.checksum(path)
    return found


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(entries: list[dict[str, Any]]) -> str:
    """Counts by setting and, of kills, by kind of operation."""
    lines = [f"{'':14}{'rounds':>8}{'kills':>8}" + "".join(f"{fault:>9}" for fault in FAULTS)]
    settings = [name for name in SETTINGS if any(e["setting"] == name for e in entries)]
    for name in [*settings, "all"]:
        part = [entry for entry in entries if name in (entry["setting"], "all")]
        counts = [sum(entry[fault] for entry in part) for fault in FAULTS]
        kills = sum(len(entry["kills"]) for entry in part)
        lines.append(f"{name:14}{len(part):8}{kills:8}" + "".join(f"{n:9}" for n in counts))
    kinds = Counter(
        kind + " (half)" * (torn and kind == "write")
        for entry in entries
        for kind, _, _, _, torn in entry["kills"]
    )
    if kinds:
        lines.append("kills at  " + ", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items())))
    if any("failed" in entry for entry in entries):
        failed = sum(entry.get("failed", False) for entry in entries)
        lines.append(f"full disk in {failed} of {len(entries)} runs")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300, help="stop after this many")
    parser.add_argument("--full_disk", type=int, default=0, help="runs on a small disk, no kills")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="or after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--journal", type=Path, help="default: none is kept")
    arguments = parser.parse_args()
    started, entries, sizes = time.monotonic(), [], {}
    if arguments.journal and arguments.journal.exists():
        entries = _lines(arguments.journal)

    def enough() -> bool:
        if arguments.full_disk:
            return len(entries) >= arguments.full_disk
        return sum(len(entry["kills"]) for entry in entries) >= arguments.kills

    with tempfile.TemporaryDirectory(prefix="crash-campaign-") as work:
        campaign = Campaign(Path(work))
        while not enough() and time.monotonic() - started < arguments.seconds:
            rng = random.Random(f"{arguments.seed}-{len(entries)}")
            setting = arguments.settings[len(entries) % len(arguments.settings)]
            if arguments.full_disk:
                entry = campaign.fill_disk(setting, rng, sizes)
            else:
                entry = campaign.kill_and_resume(setting, rng)
            entries.append(entry)
            if arguments.journal:
                with arguments.journal.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
    print(table(entries))
    return int(any(entry[fault] for entry in entries for fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
