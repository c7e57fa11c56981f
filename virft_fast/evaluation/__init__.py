"""Scores of a model on held-out samples."""

from virft_fast import train_extra  # noqa: F401
