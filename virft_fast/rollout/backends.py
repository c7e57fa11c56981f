"""Creates rollout backends by name, and checks whether they can run before they are used."""

from __future__ import annotations

import copy
import logging

import torch

from virft_fast.config import ROLLOUT_BACKENDS
from virft_fast.models.families import Tokenizer
from virft_fast.models.policy import Policy
from virft_fast.models.qwen_vl import load_model
from virft_fast.models.source import ModelSource
from virft_fast.rollout import Rollout, Weights
from virft_fast.rollout.cache import CachePlan
from virft_fast.rollout.hf import HFRollout, check_embeds
from virft_fast.rollout.native import NativeRollout, check_reachable
from virft_fast.rollout.speculation import History

logger = logging.getLogger(__name__)


def make_rollout(
    backend: str,
    weights: Weights,
    tokenizer: Tokenizer,
    *,
    device: torch.device,
    max_cache_tokens: int | None = None,
    speculation: History | None = None,
    remembers: bool = False,
) -> Rollout:
    """`native` (see `NativeRollout`) or `hf`: transformers' generate, which never speculates.

    Args:
        speculation: earlier answers to guess from; None: don't guess.
        remembers: add the answers to them; False: the caller does.
    """
    if backend == "hf":
        return HFRollout(weights, tokenizer, device=device)
    if backend != "native":
        raise ValueError(f"backend: expected one of {ROLLOUT_BACKENDS}, got {backend!r}")
    return NativeRollout(
        weights,
        tokenizer,
        device=device,
        max_cache_tokens=max_cache_tokens,
        speculation=speculation,
        remembers=remembers,
    )


def with_own_history(rollout: Rollout) -> Rollout:
    """The same engine for an evaluation: it guesses from its own earlier answers alone, because the
    rows of an evaluation aren't those of training."""
    if not isinstance(rollout, NativeRollout) or rollout.speculation is None:
        return rollout
    own = copy.copy(rollout)
    own.speculation, own.remembers = History(), True
    return own


def load_policy(
    source: ModelSource,
    *,
    dtype: str,
    attn_implementation: str = "sdpa",
    backend: str = "native",
    device: torch.device,
    empty: bool = False,
) -> Policy:
    """A policy on `device` for inference only.

    Args:
        dtype: the weights' dtype by its torch name; "auto": bfloat16 on a GPU, float32 elsewhere.
        empty: create the model without weights, on the meta device.
    Raises:
        ValueError, FileNotFoundError: as `load_model`. ValueError also if the backend can't run the
            model.
    """
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    model = load_model(
        source,
        dtype=getattr(torch, dtype),
        attn_implementation=attn_implementation,
        empty=empty,
    )
    policy = Policy(model if empty else model.to(device)).eval()
    check_model(backend, policy)
    return policy


def check_model(backend: str, policy: Policy) -> None:
    """Raise ValueError if the backend can't run this model."""
    (check_reachable if backend == "native" else check_embeds)(policy)


def check_cache_limit(
    backend: str,
    limit: int | None,
    *,
    num_generations: int,
    max_prompt_length: int | None,
    max_completion_length: int,
    device: torch.device,
) -> None:
    """Raise ValueError if the longest prompt that the flags allow and its completions exceed
    `limit` tokens (--rollout_cache_tokens)."""
    if limit is None:
        return
    if backend != "native":
        logger.warning("--rollout_cache_tokens has no effect with --rollout_backend %s", backend)
        return
    sizes = (1, num_generations, max_prompt_length or 1, max_completion_length)
    plan = CachePlan.rounded(*sizes, device.type, limit)
    length = max_prompt_length
    what = "any prompt" if length is None else f"a prompt of --max_prompt_length {length} tokens"
    plan.check(limit, f"--rollout_cache_tokens {limit}: {what}")
