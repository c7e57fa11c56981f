"""Chooses a tensor's implementation: the Triton kernels or the torch reference."""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor


def triton_for(tensor: Tensor) -> ModuleType | None:
    """`triton_rows` if it supports this tensor; None means to use the torch reference.

    Triton takes CUDA tensors, and CPU tensors under TRITON_INTERPRET=1. float64 always goes to the
    reference.
    """
    if tensor.dtype == torch.float64 or not (
        tensor.is_cuda or (_interpreted() and _on_cpu(tensor))
    ):
        return None
    return _module()


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def _module() -> ModuleType | None:
    try:
        import virft_fast.kernels.triton_rows as triton_rows
    except ImportError as error:
        warnings.warn(
            "virft_fast: no Triton, the torch reference computes the loss instead (same values, "
            f"more memory and time); `pip install triton` brings it: {error}",
            stacklevel=2,
        )
        return None
    return triton_rows
