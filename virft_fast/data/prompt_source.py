"""Turn a row into an encoded prompt, or into the reason why it can't be used."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

from virft_fast.batch import Prompt, Sample
from virft_fast.data.samples import BadRow, SampleDataset
from virft_fast.models.families import Processor, family_of
from virft_fast.models.qwen_vl import encode_prompt

FIRST_PROMPT_SECONDS = 15.0


@dataclass(eq=False)
class PromptSource:
    """Encodes the samples of a data set as prompts.

    Args:
        processor: the model's processor.
        max_prompt_length: in tokens, including images. A longer prompt is a bad row, because
            truncation would cut through its image.
        check: sample -> what else is wrong with it, or None.
    """

    samples: SampleDataset
    processor: Processor
    _: KW_ONLY
    max_prompt_length: int | None = None
    check: Callable[[Sample], str | None] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> Prompt | BadRow:
        """Row `index` as a prompt, or as a `BadRow` with the reason."""
        sample = self.samples.get(index)
        if isinstance(sample, BadRow):
            return sample
        try:
            prompt = encode_prompt(self.processor, sample)
        except ValueError as error:
            return BadRow(index, str(error))
        patch = getattr(self.processor.image_processor, "patch_size", 0)
        wrong = _other_space(sample, prompt, patch)
        wrong = wrong or (self.check(sample) if self.check else None)
        if wrong:
            return BadRow(index, wrong)
        length, limit = len(prompt.input_ids), self.max_prompt_length
        if limit is None or length <= limit:
            return prompt
        reason = f"the prompt has {length} tokens with its images, more than --max_prompt_length"
        is_qwen = family_of(self.processor.model_type).is_qwen  # others don't have that flag
        advice = "raise it or lower --max_pixels" if is_qwen else "raise it"
        return BadRow(index, f"{reason} {limit}; {advice}")

    def first(self) -> Prompt:
        """The prompt of the first usable row.

        Raises:
            ValueError: no row is usable, or none was found within FIRST_PROMPT_SECONDS.
        """
        reasons, started = [], time.monotonic()
        for prompt in map(self.load, range(len(self))):
            if not isinstance(prompt, BadRow):
                return prompt
            reasons.append(f"row {prompt.index}: {prompt.reason}")
            if time.monotonic() - started > FIRST_PROMPT_SECONDS:
                break
        first = "; ".join(reasons[:3])
        raise ValueError(f"expected at least one usable row of {len(reasons)}, got none: {first}")


def _other_space(sample: Sample, prompt: Prompt, patch: int) -> str | None:
    """Why boxes in pixels don't fit the image as resized for the model, or None.

    Args:
        patch: side of an image patch in pixels.
    """
    extent = sample.columns.get("extent")
    if extent is None or prompt.image_grid_thw is None or len(sample.images) != 1:
        return None
    _, high, wide = prompt.image_grid_thw[0].tolist()
    if list(extent) == [wide * patch, high * patch]:
        return None
    return (
        f"its boxes are in pixels of an image of {extent[0]}x{extent[1]}, but the processor makes "
        f"it {wide * patch}x{high * patch}; pass the --min_pixels and --max_pixels that the data "
        "set was built with, or build it again"
    )
