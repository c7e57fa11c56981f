"""Rollouts on the Triton kernels, interpreted in a process of its own."""

from pathlib import Path

from test_decode import run_cases


def test_rollouts_interpreted():
    run_cases(Path(__file__).parent / "rollout_cases.py", TRITON_INTERPRET="1")
