"""The native rollout engine: prefills each prompt once and decodes all completions together.

Every prompt of the rank goes through the vision tower and the language model once, in packed rows.
Its keys and values are stored once, and all its completions read them. One step decodes one token
of every completion. Attention to the prompt is computed for a whole group at once, then attention
to the completion itself, with one softmax over both. With speculation, a step also reads guesses of
the next tokens, and decodes as many as were right, and one. When enough completions have finished,
the batch shrinks to the others. On CUDA, a step is a captured graph. Lengths are in memory, so
there is one graph for each number of rows and padded length of the prompts (the key in
`Decoding._run_step`). The host checks for finished completions only every `CHECK_EVERY` tokens.
decoding.py contains the steps, speculation.py the guesses, shrinking.py chooses the rows that stay,
cache.py holds the memory, graphs.py the graphs.

Shapes: B prompts, G completions each, N = B*G; T completion tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from virft_fast.batch import Prompt, Rollouts
from virft_fast.kernels.speculation import MAX_READ
from virft_fast.models.decode_step import lay_out
from virft_fast.models.families import Tokenizer, core
from virft_fast.models.inputs import banned_token_ids
from virft_fast.models.policy import Policy
from virft_fast.rollout import Sampling, Weights, check_request, evaluating
from virft_fast.rollout.cache import Buffers, CachePlan, cache_numbers, state_tokens
from virft_fast.rollout.decoding import Decoding
from virft_fast.rollout.observers import Observer
from virft_fast.rollout.sampling import Sampler, make_rollouts
from virft_fast.rollout.speculation import History, Speculation, Stats


@dataclass(eq=False)
class NativeRollout:
    """Samples with the engine described above.

    Args:
        weights: context in which the policy has whole weights and may be called freely. If they
            have moved since the last call, graphs are captured again.
        tokenizer: the policy's. EOS ends a completion; no other control token is ever sampled.
        device: the policy's device.
        max_cache_tokens: how many prompt and completion tokens may have keys and values in memory
            at once; None: as many as fit into the GPU's free memory; no limit on a CPU. If not all
            prompts fit, they are decoded in several batches, with the same result.
        graphs: whether to capture steps as CUDA graphs; None: only on CUDA outside autocast. With
            graphs, a rollout's memory is kept for the next one if it is at most `KEPT_SHARE` of the
            GPU's; otherwise it is freed. A model whose pass may wait for the device has none.
        speculation: earlier answers to guess tokens from. The completions are the same as without,
            but for rounding: a pass multiplies more rows. None: don't guess.
        remembers: whether `generate` adds its answers to `speculation`; if not, the caller does.
    Attributes:
        stats: counts of the last call of `generate`.
    """

    weights: Weights
    tokenizer: Tokenizer
    _: KW_ONLY
    device: torch.device
    max_cache_tokens: int | None = None
    graphs: bool | None = None
    speculation: History | None = None
    remembers: bool = True

    def __post_init__(self) -> None:
        self._buffers, self.stats = Buffers(self.device), Stats()
        self._state = 0  # `CachePlan.state`; `_cache_limit` sets it

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        sampling: Sampling,
        *,
        first_row: int = 0,
        observer: Observer | None = None,
    ) -> Rollouts:
        """See `virft_fast.rollout.Rollout.generate`.

        Args:
            observer: receives the attention of the completions.
        """
        check_request(prompts, num_generations)
        features: list[Tensor] = []
        outputs, self.stats = [], Stats()
        if self.speculation is not None:
            self.stats.agreement = self.speculation.agreement.tolist()
        with evaluating(self.weights) as policy:
            check_reachable(policy)
            if not torch.is_autocast_enabled(self.device.type):  # it would cast them at every step
                lay_out(core(policy.model).get_decoder())
            self._buffers.graphs.use_weights([*policy.parameters(), *policy.buffers()])
            limit = self._cache_limit(policy)
            batches, extra = self._divide(limit, prompts, num_generations, sampling)
            try:
                for first, last in batches:
                    batch = prompts[first:last]
                    sampler = Sampler(
                        sampling,
                        vocab_size=policy.config.text_config.vocab_size,
                        banned=self.banned(policy),
                        first_row=first_row + first * num_generations,
                        prompts=[prompt for prompt in batch for _ in range(num_generations)],
                        device=self.device,
                        take=self._buffers.take,
                    )
                    decoding = Decoding(
                        policy,
                        self._buffers,
                        sampler,
                        plan=self._plan(batch, num_generations, sampling, limit, extra),
                        tokenizer=self.tokenizer,
                        graphs=self._with_graphs(),
                        observer=observer,
                        speculation=self._speculation(batch, num_generations, sampling, extra),
                        stats=self.stats,
                    )
                    features += decoding.prefill(batch)
                    outputs.append(decoding.run())
            finally:
                self._buffers.release(keep_small=self._with_graphs())
            kept = features if policy.vision_frozen else None
        tokens, logps, *plain = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        stops = (self.tokenizer.eos_token_id, *sampling.stop_token_ids)
        out = make_rollouts(
            prompts, num_generations, tokens, logps, stops, self.tokenizer, kept, *plain
        )
        lengths = out.completion_mask.sum(1)
        self.stats.drawn = int(lengths.sum())
        for first, last in batches:
            rows = lengths[first * num_generations : last * num_generations]
            self.stats.longest += int(rows.max())
        if self.speculation is not None and self.remembers:
            self.speculation.add(prompts, out)
            self.speculation.agreement = torch.tensor(self.stats.agreement, dtype=torch.float64)
        return out

    def _speculation(
        self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling, extra: int
    ) -> Speculation | None:
        if self.speculation is None or not extra:
            return None
        return Speculation(
            self.speculation,
            prompts,
            num_generations,
            sampling.max_completion_length,
            stats=self.stats,
            device=self.device,
            take=self._buffers.take,
        )

    def fits(self, prompt: Prompt, num_generations: int, sampling: Sampling) -> bool:
        """Whether the prompt and its completions fit into the cache; if not, `generate` raises."""
        with self.weights() as policy:
            limit = self._cache_limit(policy)
        return self._plan([prompt], num_generations, sampling, limit).num_tokens <= limit

    def _divide(
        self, limit: float, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling
    ) -> tuple[list[tuple[int, int]], int]:
        """The batches, and how many tokens a pass may read after a completion's end: 0, without
        guesses, if room for them would make it more batches, or for a model with recurrent layers,
        whose state couldn't be taken back after a wrong guess."""
        arguments = (limit, prompts, num_generations, sampling)
        batches = list(self._batches(*arguments))
        if self.speculation is not None and not self._state:
            with contextlib.suppress(ValueError):
                guessing = list(self._batches(*arguments, MAX_READ))
                if len(guessing) == len(batches):
                    return guessing, MAX_READ
        return batches, 0

    def _batches(
        self,
        limit: float,
        prompts: Sequence[Prompt],
        num_generations: int,
        sampling: Sampling,
        extra: int = 0,
    ) -> Iterator[tuple[int, int]]:
        """(first, last) of each batch of prompts that are decoded together.

        Raises:
            ValueError: not even one prompt and its completions fit.
        """
        first = 0
        for last, prompt in enumerate(prompts):
            what = f"rollout: row {prompt.sample.index} has a prompt of {len(prompt.input_ids)}"
            arguments = (num_generations, sampling, limit, extra)
            self._plan([prompt], *arguments).check(limit, f"{what} tokens")
            together = self._plan(prompts[first : last + 1], *arguments)
            if together.num_tokens > limit:
                yield first, last
                first = last
        yield first, len(prompts)

    def _plan(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        sampling: Sampling,
        limit: float = math.inf,
        extra: int = 0,
    ) -> CachePlan:
        longest = max(len(prompt.input_ids) for prompt in prompts)
        length, device = sampling.max_completion_length, self.device.type
        sizes = (len(prompts), num_generations, longest, length)
        return CachePlan.rounded(*sizes, device, limit, extra=extra, state=self._state)

    def _cache_limit(self, policy: Policy) -> float:
        text, size = policy.config.text_config, policy.head.weight.element_size()
        self._state = state_tokens(text, size)
        if self.max_cache_tokens is not None:
            return self.max_cache_tokens
        return self._buffers.capacity(cache_numbers(text) * size)

    def _with_graphs(self) -> bool:
        default = self.device.type == "cuda" and not torch.is_autocast_enabled("cuda")
        return default if self.graphs is None else self.graphs

    def banned(self, policy: Policy) -> list[int]:
        """Token ids that are never sampled."""
        return banned_token_ids(self.tokenizer, policy.config.text_config.vocab_size)


def check_reachable(policy: Policy) -> None:
    """Raise ValueError if this engine can't decode with the policy."""
    if policy.unreachable is not None:
        raise ValueError(
            f"--rollout_backend native: expected a model whose attention can be reached, but "
            f"{policy.unreachable}; pass --rollout_backend hf"
        )
