"""The frozen records that all modules exchange, and the shape legend of the whole project.

    B  prompts on this rank            G  completions per prompt (`num_generations`)
    N  = B*G sequences, prompt-major: completion g of prompt b is row b*G + g
    P  prompt tokens                   T  completion tokens, padded
    S  packed tokens                   V  vocabulary
    D  hidden size                     R  reward functions
    K  predicted, M true boxes, padded; their counts are `num_pred`, `num_gt`

Where prompts or images must be repeated, use `repeat_interleave(G)`. Never modify a field of these
records in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Json: TypeAlias = Any  # a value from JSON, YAML or a dataset: check its type where it is used
Row: TypeAlias = dict[str, Json]  # a dataset's row or a JSON object


@dataclass(frozen=True)
class Sample:
    """One usable row of a dataset.

    Attributes:
        index: the row in the dataset as loaded; names the sample in logs and errors.
        messages: chat turns; content is a string or a list of {"type": "image"} and
            {"type": "text", "text": ...} parts, images in the order of `images`.
        images: decoded RGB images, maybe none.
        solution: the ground truth as the dataset has it, e.g. `<answer>...</answer>`.
        columns: every non-image column of the row, `solution` included; reward functions get these.
    """

    index: int
    messages: tuple[Row, ...]
    images: tuple[Image, ...]
    solution: str
    columns: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """A sample as the model reads it: unpadded tokens and images, all on the CPU.

    Attributes:
        sample: the sample that it was made from.
        text: the rendered chat, one placeholder per image.
        input_ids: (P,) int64, image placeholders expanded.
        mm_token_type_ids: (P,) int64, 1 at image tokens, else 0.
        pixel_values: (patches of all images, patch size) float32, or the shape that another
            family's processor makes; None without images. In a step of training, they are on the
            model's device, in the vision tower's dtype.
        image_grid_thw: (images, 3) int64, or None.
        image_inputs: what else the processor makes of the images, such as `image_sizes`.
        token_inputs: (P,) each, what else it makes of the tokens, such as `token_type_ids`.
    """

    sample: Sample
    text: str
    input_ids: Tensor
    mm_token_type_ids: Tensor
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None
    image_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    token_inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def opened(self) -> str:
        """The tag of thoughts at the prompt's end if the chat template opens it, as Qwen3.5's does,
        with the space behind it, or else ""."""
        _, tag, space = self.text.rpartition("<think>")
        return tag + space if tag and not space.strip() else ""

    def continued(self, answer: str) -> str:
        """A given answer as it continues the prompt: without the tag that is open already. One
        without thoughts closes it first, as Qwen3.5's template does for an answer without any."""
        if not self.opened:
            return answer
        text = answer.lstrip()
        if text.startswith("<think>"):
            return text.removeprefix(self.opened if text.startswith(self.opened) else "<think>")
        continues = "</think>" in answer and "<think>" not in answer
        return answer if continues else f"\n</think>\n\n{answer}"


@dataclass(frozen=True)
class Rollouts:
    """G sampled completions for each of B prompts.

    Attributes:
        prompts: B prompts.
        num_generations: G.
        completion_ids: (N, T) int64, padded after the end.
        completion_mask: (N, T) bool, true up to and including EOS.
        truncated: (N,) bool, true where no EOS came within the length limit.
        texts: N completions without control tokens, but with markers such as `<|box_start|>`, and
            with the tag that the prompt opens (`Prompt.opened`) in front.
        sampling_logps: (N, T) float32, log-prob of each token in the distribution it was drawn
            from; 0 where masked.
        plain_logps: the same under temperature alone; None: no filter or penalty applied, so both
            are equal.
        image_features: for each prompt, (its image tokens, features); None if the vision tower may
            have changed since.
    """

    prompts: tuple[Prompt, ...]
    num_generations: int
    completion_ids: Tensor
    completion_mask: Tensor
    truncated: Tensor
    texts: tuple[str, ...]
    sampling_logps: Tensor
    image_features: tuple[Tensor, ...] | None = None
    plain_logps: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.num_generations
