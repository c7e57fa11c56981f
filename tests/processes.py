"""Programs in processes of their own, which start warm.

Importing torch, transformers and DeepSpeed takes longer than what most tests run, so processes are
forked from one that has imported the libraries and nothing of this package.
What depends on how the libraries are imported has to start Python itself.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from unittest import mock

import torch

LIBRARIES = ["datasets", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer",
             "matplotlib.pyplot", "peft", "scipy.optimize",
             "sklearn.datasets", "torch.utils.tensorboard",
             "transformers.integrations.deepspeed",
             "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
             "transformers.models.qwen2_vl.modeling_qwen2_vl",
             "transformers.models.qwen2_vl.processing_qwen2_vl"]  # fmt: skip


def environment(**extra: str) -> dict[str, str]:
    """One thread a process: several of them share the machine, and sums keep their order."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    # A process that asked for the GPU must not fork.
    context.set_forkserver_preload([] if torch.cuda.is_available() else LIBRARIES)
    # A rank that ends by os._exit leaves its semaphores to the tracker.
    more = {"DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore:resource_tracker"}
    with mock.patch.dict(os.environ, environment(**more)):
        forkserver.ensure_running()
    return context


def _main(program: str, argv: list[str], env: dict[str, str], output: list[str]) -> None:
    for number, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [program, *argv]
    try:
        if "\n" in program:
            exec(program, {"__name__": "__main__"})
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


class Program:
    """`python -m MODULE ARGUMENTS`, in one process or as the ranks that torchrun starts.

    Args:
        module: of a program, or a program's text of several lines.
    """

    def __init__(
        self, *arguments: Any, processes: int = 1, module: str = "virft_fast.train"
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._output = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        for path in self._output:
            path.touch()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        argv, context = [str(argument) for argument in arguments], _context()
        self.ranks = []
        for rank in range(processes):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, **launcher} if processes > 1 else {}
            env = environment(**{name: str(value) for name, value in numbers.items()})
            args = (module, argv, env, [str(path) for path in self._output])
            self.ranks.append(context.Process(target=_main, args=args))
            self.ranks[-1].start()

    def running(self) -> bool:
        return all(rank.is_alive() for rank in self.ranks)

    def send_signal(self, number: int) -> None:
        for rank in self.ranks:
            if rank.is_alive():
                os.kill(rank.pid, number)

    def wait(self, timeout: float = 300) -> CompletedProcess[str]:
        """The end of all ranks, with the status of the first that fails; the others are killed."""
        deadline, status = time.monotonic() + timeout, 0
        left = {rank.sentinel: rank for rank in self.ranks}
        while left and not status:
            for sentinel in wait(left, deadline - time.monotonic()) or [None]:
                if sentinel is None:
                    status = "timeout"
                else:
                    rank = left.pop(sentinel)
                    rank.join()
                    status = status or rank.exitcode
        for rank in self.ranks:
            rank.kill()
            rank.join()
        out, err = (path.read_text(errors="replace") for path in self._output)
        self._folder.cleanup()
        return CompletedProcess(self.ranks, status, out, err)


def run(*arguments: Any, **options: Any) -> CompletedProcess[str]:
    """Run a program to its end; its output is in the result."""
    return Program(*arguments, **options).wait()
