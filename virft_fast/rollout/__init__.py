"""Sampling groups of completions for prompts. `Rollout` is the interface of the backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from virft_fast.arguments import LIMITS
from virft_fast.batch import Prompt, Rollouts
from virft_fast.models.policy import Policy

_LIMITS = {
    "max_completion_length": "at least 1", "temperature": "a number above 0",
    "top_p": "a number in (0, 1]", "top_k": "0 (off) or more", "min_p": "a number in [0, 1)",
    "repetition_penalty": "a number above 0",
}  # fmt: skip
# A context in which the policy has whole weights and may be called outside the engine's `forward`.
Weights = Callable[[], AbstractContextManager[Policy]]


@dataclass(frozen=True)
class Sampling:
    """How to sample completions.

    Attributes:
        max_completion_length: maximum length of a completion, in tokens.
        temperature, top_p, top_k, min_p: the usual parameters; top_k 0, top_p 1 and min_p 0 are
            off.
        repetition_penalty: applies to tokens already in the prompt or the completion: divides their
            positive logits and multiplies their negative ones; 1 is off.
        greedy: take the most likely token instead of sampling.
        stop_token_ids: tokens that end a completion, in addition to the tokenizer's EOS.
        seed: together with a row's index in the global batch, determines every draw, no matter how
            the batch is split or where a run resumes.
    """

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    greedy: bool = False
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0

    @property
    def filtered(self) -> bool:
        """Whether tokens are drawn from another distribution than the policy's at this
        temperature."""
        filters = self.top_k or self.top_p < 1 or self.min_p or self.repetition_penalty != 1
        return bool(filters) and not self.greedy

    def __post_init__(self) -> None:
        for name, expected in _LIMITS.items():
            if not LIMITS[expected](getattr(self, name)):
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")


def check_request(prompts: Sequence[Prompt], num_generations: int) -> None:
    """Raise ValueError if there is nothing to sample."""
    if not len(prompts) or num_generations < 1:
        raise ValueError(
            f"expected prompts and at least one completion of each, got {len(prompts)} prompts and "
            f"num_generations={num_generations}"
        )


@contextmanager
def evaluating(weights: Weights) -> Iterator[Policy]:
    """The policy with whole weights, in evaluation mode; restores its mode afterwards."""
    with weights() as policy:
        training = policy.training
        policy.eval()
        try:
            yield policy
        finally:
            policy.train(training)


class Rollout(Protocol):
    """The interface through which algorithms use a backend."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        sampling: Sampling,
        *,
        first_row: int = 0,
    ) -> Rollouts:
        """Sample `num_generations` completions for each prompt, prompt-major.

        Args:
            first_row: index of this rank's first row in the global batch.
        Raises:
            ValueError: a prompt and its completions don't fit into the cache, or there is nothing
                to sample. Raised before generation starts.
        """
        ...
