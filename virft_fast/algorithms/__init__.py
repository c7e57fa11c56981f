"""The algorithms: a module for each, which reads top to bottom and ends in its `ALGORITHM`.

Another one is a file like them and a line in `config.ALGORITHMS`.
"""

from __future__ import annotations

from importlib import import_module

from virft_fast.algorithms.base import Algorithm
from virft_fast.config import ALGORITHMS, RunConfig


def find_algorithm(name: str) -> Algorithm:
    """The algorithm of --algorithm `name`."""
    return import_module(ALGORITHMS[name]).ALGORITHM


def algorithm_of(config: RunConfig) -> Algorithm:
    return find_algorithm(config.train.algorithm)
