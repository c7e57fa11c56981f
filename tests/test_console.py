"""Standard streams that can't be written cost neither a run's files nor its exit status."""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import sys

import pytest
from processes import environment
from tqdm import tqdm

from virft_fast import commands
from virft_fast.console import unbreakable
from virft_fast.train import main

BROKEN = [
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("I/O operation on closed file."),
]


class Broken(io.StringIO):
    """A stream that can't be written from the first word on."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


@pytest.mark.parametrize("error", BROKEN, ids=str)
def test_whatever_writes_goes_on(monkeypatch, error):
    monkeypatch.setattr("sys.stdout", out := Broken(error))
    monkeypatch.setattr("sys.stderr", err := Broken(error))
    with unbreakable():
        print("text", flush=True)
        assert [*tqdm([1, 2], mininterval=0)] == [1, 2]
        handler = logging.StreamHandler()
        handler.handle(logging.makeLogRecord({"msg": "text"}))
    assert (sys.stdout, sys.stderr) == (out, err)
    assert commands.main([]) == 0 and commands.main(["trian"]) == 2


def test_what_can_be_written_is_written(capsys, monkeypatch):
    with unbreakable():
        print("out")
        print("err", file=sys.stderr)
    assert capsys.readouterr() == ("out\n", "err\n")
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", narrow)
    with unbreakable():
        print("Größe")
    assert narrow.buffer.getvalue() == b"Gr\\xf6\\xdfe\n"


def test_a_run_without_its_streams_ends_as_any_other(tmp_path, monkeypatch):
    out = tmp_path / "run"
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", Broken(BROKEN[1]))
    status = main(
        ["--model_name_or_path", "tiny", "--dataset_name", "shapes_detection", "--max_steps", "1",
         "--output_dir", str(out), "--num_generations", "2", "--max_completion_length", "4"]
    )  # fmt: skip
    assert status == 0
    written = {path.name for path in out.iterdir()}
    assert {"summary.json", "report.png", "metrics.jsonl", "model.safetensors"} <= written


@pytest.mark.parametrize("where", ["pipe", "full", "closed"])
@pytest.mark.parametrize(("arguments", "status"), [([], 0), (["trian"], 2)])
def test_the_exit_status_of_a_process_stays(where, arguments, status):
    """`commands` alone: it loads nothing heavy. Python itself would end with 120 or 1."""
    command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh"] if where == "closed" else []
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") if where == "full" else open(write, "w", closefd=False) as stream:
        done = subprocess.run(
            [*command, sys.executable, "-m", "virft_fast", *arguments],
            env=environment(), stdout=stream, stderr=stream,
        )  # fmt: skip
    os.close(write)
    assert done.returncode == status
