"""The evaluated model. Its processor loads at once, its weights with the first question."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from functools import cached_property, partial

import torch

from virft_fast.batch import Prompt, Rollouts
from virft_fast.config import EvalConfig, usage
from virft_fast.evaluation.questions import ExtentFor
from virft_fast.models.families import why_plain
from virft_fast.models.processing import load_processor, resized
from virft_fast.models.source import find_model
from virft_fast.rollout import Rollout, Sampling
from virft_fast.rollout.backends import check_cache_limit, load_policy, make_rollout
from virft_fast.rollout.speculation import History
from virft_fast.tasks.coordinates import space_of

logger = logging.getLogger(__name__)


class EvaluatedModel:
    """The model that the flags name; it is also a `Rollout`.

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
        self.source = find_model(config.model_name_or_path, config.model_revision)
        config.settle_backend(why_plain(self.source.config.model_type))
        self.processor = load_processor(
            self.source, min_pixels=config.min_pixels, max_pixels=config.max_pixels
        )
        self._load_policy = partial(
            load_policy,
            self.source,
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
            backend=config.rollout_backend,
            device=device,
        )
        self._load_policy(empty=True)  # raises if the model can't be used
        self.family: str = self.source.config.model_type

    @cached_property
    def rollout(self) -> Rollout:
        """Loaded when the first question is asked: a finished evaluation needs none."""
        with usage():
            policy = self._load_policy()
        return make_rollout(
            self.config.rollout_backend,
            lambda: contextlib.nullcontext(policy),
            self.processor.tokenizer,
            device=self.device,
            max_cache_tokens=self.config.rollout_cache_tokens,
            speculation=History() if self.config.speculates and not policy.recurrent else None,
            remembers=True,
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
        """The coordinate space of boxes in the model's family; None: 0..1000."""
        if space_of(self.family) != "pixels":
            return None
        images = self.processor.image_processor
        low, high = images.size["shortest_edge"], images.size["longest_edge"]
        factor = images.patch_size * images.merge_size
        return partial(resized, min_pixels=low, max_pixels=high, factor=factor)

    def warn_of_space(self, *, in_pixels: bool) -> None:
        """Warn if boxes of the data set and of the model's family differ in coordinate space."""
        if in_pixels != (space_of(self.family) == "pixels"):
            own, other = ("0..1000", "pixels") if in_pixels else ("pixels", "0..1000")
            logger.warning(
                f"{self.family} answers with boxes in {own}, but {self.config.dataset_name} has "
                f"boxes in {other}; build it with another --model_family, unless the model was "
                "trained on such rows"
            )
