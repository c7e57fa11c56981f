"""The algorithms, a module each, which reads top to bottom and ends in its `ALGORITHM`.

Another one is a file like them and a line in `config.ALGORITHMS`.
"""

from __future__ import annotations

from virft_fast.algorithms.base import Algorithm
from virft_fast.algorithms.base import find_algorithm as find_algorithm
from virft_fast.config import RunConfig


def algorithm_of(config: RunConfig) -> Algorithm:
    return find_algorithm(config.train.algorithm)
