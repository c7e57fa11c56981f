"""Rollout with transformers' `generate`: slow, obvious, and the oracle for faster ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from virft_fast.batch import Prompt, Rollouts
from virft_fast.models.qwen_vl import Policy, banned_token_ids, base
from virft_fast.rollout import Sampling


class HFRollout:
    """Completions from the policy's own weights, gathered once a call under ZeRO-3.

    Args:
        policy: the module being trained.
        tokenizer: its tokenizer; EOS ends a completion, no other special token is ever drawn.
        gathered: context in which `policy` holds whole weights and may be called freely.
        device: where the policy computes.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        *,
        device: torch.device,
        gathered: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.device = device
        self.gathered = gathered
        self.banned = banned_token_ids(tokenizer, policy.config.text_config.vocab_size)

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
        training = self.policy.training
        self.policy.eval()
        try:
            with self.gathered():
                ids = self._generate(prompts, num_generations, sampling, first_row)
        finally:
            self.policy.train(training)
        return self._rollouts(prompts, num_generations, ids, sampling)

    def _generate(
        self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling, first_row: int
    ) -> Tensor:
        """(N, <=T) completion tokens."""
        from transformers import GenerationConfig

        num_rows = len(prompts) * num_generations
        nothing = torch.zeros(num_rows, 0, dtype=torch.long)
        inputs = self.policy.collate(
            prompts,
            nothing,
            nothing.bool(),
            num_generations=num_generations,
            pad_token_id=self.tokenizer.pad_token_id,
            device=self.device,
        )
        # The images are encoded here, once a prompt; `generate` gets embeddings in their place.
        features = self.policy(inputs, only_images=True)
        embeds = self.policy.embed(inputs, features)
        text_positions = (inputs.attention_mask.cumsum(-1) - 1).clamp(min=0)
        config = GenerationConfig(
            max_new_tokens=sampling.max_completion_length,
            do_sample=False,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return base(self.policy.model).generate(
            inputs_embeds=embeds,
            attention_mask=inputs.attention_mask,
            position_ids=torch.cat([text_positions[None], inputs.position_ids]),  # (4, N, P)
            generation_config=config,
            logits_processor=self._processors(sampling, first_row, num_rows),
        )

    def _processors(self, sampling: Sampling, first_row: int, num_rows: int) -> Any:
        import transformers as hf

        processors = hf.LogitsProcessorList()
        if self.banned:
            processors.append(_Banned(self.banned))
        if sampling.greedy:
            return processors
        if sampling.temperature != 1.0:
            processors.append(hf.TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k > 0:
            processors.append(hf.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            processors.append(hf.TopPLogitsWarper(sampling.top_p))
        processors.append(_RowGumbel(sampling.seed, first_row, num_rows, self.device))
        return processors

    def _rollouts(
        self, prompts: Sequence[Prompt], num_generations: int, ids: Tensor, sampling: Sampling
    ) -> Rollouts:
        is_eos = ids == self.tokenizer.eos_token_id  # (N, T)
        ended = is_eos.any(1)
        length = torch.where(ended, is_eos.int().argmax(1) + 1, ids.shape[1])
        mask = torch.arange(ids.shape[1], device=ids.device) < length[:, None]
        ids = ids.masked_fill(~mask, self.tokenizer.pad_token_id)
        rows = [row[:n] for row, n in zip(ids.tolist(), length.tolist(), strict=True)]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return Rollouts(
            prompts=tuple(prompts),
            num_generations=num_generations,
            completion_ids=ids,
            completion_mask=mask,
            truncated=~ended,
            texts=tuple(texts),
        )


class _Banned:
    """Gives some tokens no chance."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = torch.tensor(token_ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, self.token_ids.to(scores.device), -torch.inf)


class _RowGumbel:
    """Turns the argmax of (N, V) scores into a draw from their softmax, with one random stream a
    row: argmax(z + Gumbel noise) is distributed as softmax(z).

    A row's draws depend on (seed, row in the global batch) only. So two ranks draw what one rank
    with the whole batch draws, and a resumed run what the uninterrupted one would have.
    """

    def __init__(self, seed: int, first_row: int, num_rows: int, device: torch.device) -> None:
        self.generators = [
            torch.Generator(device).manual_seed(_mix(seed, first_row + row))
            for row in range(num_rows)
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        # An exponential of exactly 0 would make the noise infinite.
        return scores.float() - noise.clamp(min=torch.finfo(torch.float32).tiny).log()


def _mix(seed: int, row: int) -> int:
    """A 63-bit seed from two numbers (splitmix64), so that neighbours share no stream."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + row * 0xD1B54A32D192ED03 + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1
