"""The model that an evaluation asks: its processor at once, its weights with the first question."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from functools import cached_property, partial

import torch

from virft_fast.batch import Prompt, Rollouts
from virft_fast.config import EvalConfig, usage
from virft_fast.evaluation.questions import ExtentFor
from virft_fast.models.processing import load_processor, resized
from virft_fast.models.qwen_vl import Policy, load_model, read_config
from virft_fast.models.tiny import resolve_model_path
from virft_fast.rollout import Rollout, Sampling
from virft_fast.rollout.backends import check_cache_limit, check_model, load_policy, make_rollout
from virft_fast.tasks.coordinates import FAMILY_SPACE

logger = logging.getLogger(__name__)


class EvaluatedModel:
    """A model by its flags. Also a `Rollout`.

    Raises:
        ValueError, FileNotFoundError: the flags name no model, or one that can't be used.
    """

    def __init__(self, config: EvalConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        check_cache_limit(
            config.rollout_backend,
            config.rollout_cache_tokens,
            num_generations=1,
            max_prompt_length=config.max_prompt_length,
            max_completion_length=config.max_completion_length,
            device=device,
        )
        self.path = resolve_model_path(config.model_name_or_path)
        self.processor = load_processor(
            self.path,
            revision=config.model_revision,
            min_pixels=config.min_pixels,
            max_pixels=config.max_pixels,
        )
        empty = load_model(
            self.path,
            revision=config.model_revision,
            attn_implementation=config.attn_implementation,
            empty=True,
        )
        check_model(config.rollout_backend, Policy(empty))
        self.family: str = read_config(self.path, config.model_revision).model_type

    @cached_property
    def rollout(self) -> Rollout:
        """Loaded when the first question is asked: a finished evaluation needs none."""
        config = self.config
        with usage():
            policy = load_policy(
                self.path,
                revision=config.model_revision,
                dtype=config.dtype,
                attn_implementation=config.attn_implementation,
                backend=config.rollout_backend,
                device=self.device,
            )
        return make_rollout(
            config.rollout_backend,
            lambda: contextlib.nullcontext(policy),
            self.processor.tokenizer,
            device=self.device,
            max_cache_tokens=config.rollout_cache_tokens,
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        sampling: Sampling,
        *,
        first_row: int = 0,
    ) -> Rollouts:
        """See `virft_fast.rollout.Rollout.generate`."""
        return self.rollout.generate(prompts, num_generations, sampling, first_row=first_row)

    def extent_for(self) -> ExtentFor | None:
        """The space in which the model's family counts boxes; None: 0..1000."""
        if FAMILY_SPACE[self.family] != "pixels":
            return None
        images = self.processor.image_processor
        return partial(
            resized,
            min_pixels=images.size["shortest_edge"],
            max_pixels=images.size["longest_edge"],
            factor=images.patch_size * images.merge_size,
        )

    def warn_of_space(self, *, in_pixels: bool) -> None:
        """Warn if the data set counts boxes in another space than the model's family."""
        if in_pixels != (FAMILY_SPACE[self.family] == "pixels"):
            logger.warning(
                "%s counts boxes in %s, but %s asks for %s; build it with another --model_family, "
                "unless the model was trained on such rows",
                self.family,
                "0..1000" if in_pixels else "pixels",
                self.config.dataset_name,
                "pixels" if in_pixels else "0..1000",
            )
