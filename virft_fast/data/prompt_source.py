"""From a row to a prompt the model can read, or to the reason why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from virft_fast.batch import Prompt, Sample
from virft_fast.data.loading import BadRow, SampleDataset
from virft_fast.models.qwen_vl import encode_prompt


class PromptSource:
    """Encodes the samples of a dataset; a row that can't be used comes back as `BadRow`.

    Args:
        samples: rows as samples.
        processor: of the model.
        max_prompt_length: in tokens, images included; a longer prompt is a bad row, because cutting
            it would cut through its image.
        check: sample -> what else is wrong with it, or None.
    """

    def __init__(
        self,
        samples: SampleDataset,
        processor: Any,
        *,
        max_prompt_length: int | None = None,
        check: Callable[[Sample], str | None] | None = None,
    ) -> None:
        self.samples = samples
        self.processor = processor
        self.max_prompt_length = max_prompt_length
        self.check = check

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> Prompt | BadRow:
        sample = self.samples.get(index)
        if isinstance(sample, BadRow):
            return sample
        try:
            prompt = encode_prompt(self.processor, sample)
        except ValueError as error:
            return BadRow(index, str(error))
        wrong = _other_space(sample, prompt, self.processor.image_processor)
        wrong = wrong or (self.check(sample) if self.check else None)
        if wrong:
            return BadRow(index, wrong)
        limit = self.max_prompt_length
        if limit is not None and len(prompt.input_ids) > limit:
            return BadRow(
                index,
                f"the prompt has {len(prompt.input_ids)} tokens with its images, more than "
                f"--max_prompt_length {limit}; raise it or lower --max_pixels",
            )
        return prompt


def _other_space(sample: Sample, prompt: Prompt, image_processor: Any) -> str | None:
    """Boxes in pixels are of one size of the image alone, the one the model sees."""
    extent = sample.columns.get("extent")
    if extent is None or prompt.image_grid_thw is None or len(sample.images) != 1:
        return None
    patch = image_processor.patch_size
    _, high, wide = prompt.image_grid_thw[0].tolist()
    if list(extent) == [wide * patch, high * patch]:
        return None
    return (
        f"its boxes are in pixels of an image of {extent[0]}x{extent[1]}, but the processor makes "
        f"it {wide * patch}x{high * patch}; pass the --min_pixels and --max_pixels that the data "
        "set was built with, or build it again"
    )
