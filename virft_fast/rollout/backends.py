"""A rollout backend by its name."""

from __future__ import annotations

from typing import Any

import torch

from virft_fast.config import ROLLOUT_BACKENDS
from virft_fast.rollout import Rollout, Weights
from virft_fast.rollout.hf import HFRollout
from virft_fast.rollout.native import NativeRollout


def make_rollout(
    backend: str,
    weights: Weights,
    tokenizer: Any,
    *,
    device: torch.device,
    max_cache_tokens: int | None = None,
) -> Rollout:
    """`native` (see `NativeRollout`) or `hf`: transformers' generate."""
    if backend == "hf":
        return HFRollout(weights, tokenizer, device=device)
    if backend != "native":
        raise ValueError(f"backend: expected one of {ROLLOUT_BACKENDS}, got {backend!r}")
    return NativeRollout(weights, tokenizer, device=device, max_cache_tokens=max_cache_tokens)
