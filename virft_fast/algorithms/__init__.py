"""The algorithms, one module each. A module reads top to bottom and ends with its `ALGORITHM`.

To add one, write such a module and add a line to `config.ALGORITHMS`.
"""

from __future__ import annotations

from virft_fast.algorithms.base import Algorithm
from virft_fast.algorithms.base import find_algorithm as find_algorithm
from virft_fast.config import RunConfig


def algorithm_of(config: RunConfig) -> Algorithm:
    return find_algorithm(config.train.algorithm)
