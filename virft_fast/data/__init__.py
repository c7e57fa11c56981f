"""Data sets as samples and prompts: loading, unusable rows, training order."""

from virft_fast import train_extra  # noqa: F401
from virft_fast.data.loading import BadRow, SampleDataset, first_solutions, load_rows
from virft_fast.data.order import BadRows, NoUsableRows, PromptSampler, TooManyBadRows
from virft_fast.data.streaming import ParquetRows

__all__ = [
    "BadRow", "BadRows", "NoUsableRows", "ParquetRows", "PromptSampler", "SampleDataset",
    "TooManyBadRows", "first_solutions", "load_rows",
]  # fmt: skip
