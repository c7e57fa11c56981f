"""Rollout with transformers' `generate`: slow, simple, and the test oracle for the native one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from virft_fast.batch import Prompt, Rollouts, Row
from virft_fast.models.families import Tokenizer, base
from virft_fast.models.inputs import ModelInputs, banned_token_ids
from virft_fast.models.plain import features_given, row_inputs
from virft_fast.models.policy import Policy
from virft_fast.rollout import Sampling, Weights, check_request, evaluating
from virft_fast.rollout.sampling import Sampler, make_rollouts


@dataclass(eq=False)
class HFRollout:
    """Samples with transformers' `generate`; every row holds its own copy of the prompt.

    Args:
        weights: context in which the policy has whole weights and may be called freely.
        tokenizer: the policy's. EOS ends a completion; no other control token is ever sampled.
        device: the policy's device.
    """

    weights: Weights
    tokenizer: Tokenizer
    _: KW_ONLY
    device: torch.device

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
        from transformers import GenerationConfig, LogitsProcessorList

        check_request(prompts, num_generations)
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        stops = [eos, *sampling.stop_token_ids]
        empty = [[torch.zeros(0, dtype=torch.long)] * num_generations for _ in prompts]
        with evaluating(self.weights) as policy:
            check_embeds(policy)
            inputs = policy.collate(
                prompts, empty, pad_token_id=pad, device=self.device, packed=False
            )
            # Encode the images here, once per prompt; `generate` gets embeddings instead.
            features = policy.image_features(inputs)
            sampler = Sampler(
                sampling,
                vocab_size=policy.config.get_text_config().vocab_size,
                banned=self.banned(policy),
                first_row=first_row,
                prompts=[prompt for prompt in prompts for _ in range(num_generations)],
                device=self.device,
            )
            draws = _Draws(sampler)
            is_qwen = policy.family.is_qwen
            given = (_embedded if is_qwen else _as_made)(policy, inputs, features)
            images = (
                contextlib.nullcontext()
                if is_qwen
                else features_given(policy.model, inputs, features)
            )
            limits = {"max_new_tokens": sampling.max_completion_length, "eos_token_id": stops}
            config = GenerationConfig(do_sample=False, pad_token_id=pad, **limits)
            with images:
                tokens = base(policy.model).generate(
                    **given,
                    generation_config=config,
                    logits_processor=LogitsProcessorList([draws]),
                )
            tokens = tokens[:, -len(draws.logps) :]  # without the prompts
            kept = inputs.per_prompt(features) if policy.vision_frozen else None
        logps = torch.stack(draws.logps, 1)
        plain = torch.stack(draws.plain, 1) if draws.plain else None
        return make_rollouts(
            prompts, num_generations, tokens, logps, stops, self.tokenizer, kept, plain
        )

    def banned(self, policy: Policy) -> list[int]:
        """Token ids that are never sampled."""
        return banned_token_ids(self.tokenizer, policy.config.get_text_config().vocab_size)


def check_embeds(policy: Policy) -> None:
    """Raise ValueError if `generate` needs more than embeddings of the images."""
    if policy.family.deepstack:
        raise ValueError(
            "--rollout_backend hf: expected a family whose images enter as embeddings alone, got "
            f"{policy.config.model_type}; leave the flag out"
        )


def _embedded(policy: Policy, inputs: ModelInputs, features: Tensor) -> Row:
    """What `generate` reads of a Qwen-VL's rows: embeddings, with the images in place."""
    return {
        "inputs_embeds": policy.embed(inputs, features)[0],
        "attention_mask": inputs.attention_mask,
        "position_ids": _with_text_positions(inputs),
    }


def _as_made(policy: Policy, inputs: ModelInputs, features: Tensor) -> Row:
    """What `generate` reads of another family's rows: the processor's own tensors."""
    rows = row_inputs(base(policy.model), inputs)
    multimodal = len(inputs.position_ids) > 1
    return rows | ({"position_ids": _with_text_positions(inputs)} if multimodal else {})


def _with_text_positions(inputs: ModelInputs) -> Tensor:
    """(4, N, P): the tokens' numbers, then their multimodal positions."""
    mask = inputs.attention_mask
    assert mask is not None, "rows that are not packed have an attention mask"
    text_positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return torch.cat([text_positions[None], inputs.position_ids])


@dataclass
class _Draws:
    """Replaces (N, V) scores so that the argmax that `generate` takes is the sampled token."""

    sampler: Sampler
    logps: list[Tensor] = field(default_factory=list)
    plain: list[Tensor] = field(default_factory=list)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = torch.full((), len(self.logps), device=scores.device)
        tokens, logps, plain = self.sampler(scores.float(), position)
        self.logps.append(logps)
        if plain is not None:
            self.plain.append(plain)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
