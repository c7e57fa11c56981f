"""Data sets as samples and prompts: loading, bad rows, the order of training."""

from virft_fast.data.loading import (
    BadRow,
    BadRows,
    NoUsableRows,
    PromptSampler,
    SampleDataset,
    TooManyBadRows,
    load_rows,
)

__all__ = [
    "BadRow",
    "BadRows",
    "NoUsableRows",
    "PromptSampler",
    "SampleDataset",
    "TooManyBadRows",
    "load_rows",
]
