"""Which groups of a rollout are trained on, and in which update.

Groups are counted over all ranks in one order: by round of sampling, then rank, then index. The
ranks decide nothing by themselves, so their number changes neither which groups are trained on nor
which of them share an update.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Rounds = Sequence[Sequence[Sequence[bool]]]  # [round][rank][group]: whether it can teach


def choose_groups(teaches: Rounds, rank: int) -> dict[int, int]:
    """As many groups as a round has: the first that can teach, then the first of the others.

    Returns:
        For each chosen group of this rank, in order: its index in the rank's rollouts, all rounds
        joined, and its place among the chosen groups of all ranks.
    Source: Yu et al. 2025, arXiv:2503.14476, section 3.2. There, sampling never gives up.
    """
    order = [(n, r, i) for n, of_round in enumerate(teaches) for r, groups in enumerate(of_round)
             for i in range(len(groups))]  # fmt: skip
    size, of_rank = len(order) // len(teaches), len(teaches[0][rank])
    chosen = sorted(sorted(order, key=lambda g: not teaches[g[0]][g[1]][g[2]])[:size])
    return {n * of_rank + i: place for place, (n, r, i) in enumerate(chosen) if r == rank}


def deal(places: Sequence[int], count: int, seed: Sequence[int]) -> list[list[int]]:
    """Deal groups out to `count` minibatches: of every `count` consecutive groups of all ranks,
    each goes to another one, in random order. So every rank that has whole runs of them gets
    equally many for each minibatch.

    Args:
        places: of this rank's groups in the order of all ranks.
    Returns:
        For each minibatch, the indices into `places`.
    """
    minibatches: list[list[int]] = [[] for _ in range(count)]
    for index, place in enumerate(places):
        run, within = divmod(place, count)
        order = np.random.default_rng((*seed, run)).permutation(count)
        minibatches[order[within]].append(index)
    return minibatches
