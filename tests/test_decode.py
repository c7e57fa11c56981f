"""The kernels of a decoding step: the torch references here, the Triton kernels in a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decode_cases import *  # noqa: F403

CASES = Path(__file__).parent / "decode_cases.py"


def run_cases(path=CASES, **env):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
               "-W", "ignore", str(path)]  # fmt: skip
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_kernels_interpreted():
    run_cases(TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_the_gpu():
    run_cases(TRITON_INTERPRET="0", VIRFT_CASES="gpu")
