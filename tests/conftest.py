"""Fixtures that are costly to make, made once."""

from __future__ import annotations

import os

# Before torch is imported anywhere: the tests run side by side with their own child processes.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from helpers import make_prompts, make_sample

from virft_fast.models.processing import load_processor
from virft_fast.models.tiny import resolve_model_path


@pytest.fixture(scope="session")
def processor():
    return load_processor(resolve_model_path("tiny"))


@pytest.fixture(scope="session")
def prompts(processor):
    """Four prompts: one image, two of different sizes, none, and one of another size."""
    return make_prompts(
        processor,
        make_sample(0, [(112, 112)]),
        make_sample(1, [(56, 84), (112, 56)], "Which one is larger?"),
        make_sample(2, [], "Detect every blue. Think, then answer."),
        make_sample(3, [(84, 84)]),
    )
