"""Groups of completions for prompts. A rollout is anything with the `generate` of `Rollout`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from virft_fast.batch import Prompt, Rollouts


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        max_completion_length: longest completion in tokens.
        temperature, top_p, top_k: as usual; top_k 0 and top_p 1 are off.
        greedy: take the likeliest token instead of drawing one.
        seed: with a row's number in the global batch it fixes every draw, whatever the batch is
            split into and wherever a run was resumed.
    """

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False
    seed: int = 0


class Rollout(Protocol):
    """What the algorithms ask of a rollout backend."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        sampling: Sampling,
        *,
        first_row: int = 0,
    ) -> Rollouts:
        """Draw `num_generations` completions for each prompt, prompt-major.

        Args:
            first_row: number of this rank's first row in the global batch.
        """
        ...
