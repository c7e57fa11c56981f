"""Chooses a tensor's implementation: the Triton kernels or the torch reference."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

# Read once, as Triton does: a lookup takes as long as many an operation on a CPU.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def triton_for(tensor: Tensor, kernels: str = "triton_rows") -> ModuleType | None:
    """The module with Triton `kernels` if it supports this tensor; None means to use the torch
    reference.

    Triton takes CUDA tensors, and CPU tensors under TRITON_INTERPRET=1. float64 always goes to the
    reference.
    """
    if tensor.dtype == torch.float64 or not (tensor.is_cuda or (interpreted() and _on_cpu(tensor))):
        return None
    return _module(kernels)


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU instead of compiling them."""
    return _INTERPRETED


@functools.cache
def _module(kernels: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"virft_fast.kernels.{kernels}")
    except ImportError as error:
        warnings.warn(
            "virft_fast: no Triton, the torch reference computes instead (same values, more "
            f"memory and time); `pip install triton` brings it: {error}",
            stacklevel=2,
        )
        return None
