"""Rollout with transformers' `generate`: slow, obvious, and the oracle for the native one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from virft_fast.batch import Prompt, Rollouts
from virft_fast.models.qwen_vl import Policy, banned_token_ids, base
from virft_fast.rollout import Sampling, Weights, check_request
from virft_fast.rollout.sampling import Sampler, make_rollouts


class HFRollout:
    """Completions by transformers' `generate`, every row with a copy of its prompt.

    Args:
        weights: context in which the policy holds whole weights and may be called freely.
        tokenizer: its tokenizer; EOS ends a completion, no other control token is ever drawn.
        device: where the policy computes.
    """

    def __init__(self, weights: Weights, tokenizer: Any, *, device: torch.device) -> None:
        self.weights = weights
        self.tokenizer = tokenizer
        self.device = device

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        sampling: Sampling,
        *,
        first_row: int = 0,
    ) -> Rollouts:
        """See `virft_fast.rollout.Rollout.generate`."""
        check_request(prompts, num_generations)
        with self.weights() as policy:
            training = policy.training
            policy.eval()
            try:
                tokens, logps, features = self._generate(
                    policy, prompts, num_generations, sampling, first_row
                )
            finally:
                policy.train(training)
        stop_ids = (self.tokenizer.eos_token_id, *sampling.stop_token_ids)
        return make_rollouts(
            prompts, num_generations, tokens, logps, stop_ids, self.tokenizer, features
        )

    def _generate(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        num_generations: int,
        sampling: Sampling,
        first_row: int,
    ) -> tuple[Tensor, Tensor, Sequence[Tensor] | None]:
        """(N, <=T) completion tokens and their log-probs; the features of a frozen tower."""
        from transformers import GenerationConfig, LogitsProcessorList

        nothing = torch.zeros(0, dtype=torch.long)
        inputs = policy.collate(
            prompts,
            [[nothing] * num_generations for _ in prompts],
            pad_token_id=self.tokenizer.pad_token_id,
            device=self.device,
            packed=False,
        )
        # The images are encoded here, once a prompt; `generate` gets embeddings in their place.
        features = policy.image_features(inputs)
        vocab_size = policy.config.text_config.vocab_size
        draws = _Draws(
            Sampler(
                sampling,
                vocab_size=vocab_size,
                banned=banned_token_ids(self.tokenizer, vocab_size),
                first_row=first_row,
                prompts=[prompt for prompt in prompts for _ in range(num_generations)],
                device=self.device,
            )
        )
        embeds, deepstack = policy.embed(inputs, features)
        if deepstack is not None:
            raise ValueError(
                f"--rollout_backend hf: expected a family whose images enter as embeddings alone, "
                f"got {policy.config.model_type}; use the native backend"
            )
        text_positions = (inputs.attention_mask.cumsum(-1) - 1).clamp(min=0)
        config = GenerationConfig(
            max_new_tokens=sampling.max_completion_length,
            do_sample=False,
            eos_token_id=[self.tokenizer.eos_token_id, *sampling.stop_token_ids],
            pad_token_id=self.tokenizer.pad_token_id,
        )
        tokens = base(policy.model).generate(
            inputs_embeds=embeds,
            attention_mask=inputs.attention_mask,
            position_ids=torch.cat([text_positions[None], inputs.position_ids]),  # (4, N, P)
            generation_config=config,
            logits_processor=LogitsProcessorList([draws]),
        )
        kept = inputs.per_prompt(features) if policy.vision_frozen else None
        return tokens, torch.stack(draws.logps, 1), kept


class _Draws:
    """Makes the argmax of (N, V) scores, which `generate` takes, the token that was drawn."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = torch.tensor(len(self.logps), device=scores.device)
        tokens, logps = self.sampler(scores.float(), position)
        self.logps.append(logps)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
