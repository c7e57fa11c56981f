"""Confidence intervals of measures, by resampling the images.

A measure is a function of how often each image counts. The bootstrap draws as many images as there
are, with replacement, and computes the measure on them; the interval holds the middle 95% of these
values. With the same seed two models get the same draws, so their difference has an interval, too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# (R, U) counts of U images in R draws -> (R,) values by name, NaN if there is nothing to measure
Measures = Callable[[Array], Mapping[str, Array]]
Interval = tuple[float, float]
CHUNK = 2**22  # counts in memory at once: 32 MiB


class Ratios:
    """Measures that divide one sum over images by another: means and shares.

    Args:
        units: image -> its column in the counts.
    """

    def __init__(self, units: Mapping[Hashable, int]) -> None:
        self.units = units
        self._sums: dict[str, Array] = {}  # name -> (U, 2)

    def add(self, name: str, terms: Iterable[tuple[Hashable, float, float]]) -> None:
        """Add a ratio; each term is (image, summand of the numerator, of the denominator)."""
        sums = self._sums[name] = np.zeros((len(self.units), 2))
        for image, above, below in terms:
            sums[self.units[image]] += (above, below)

    def __call__(self, counts: Array) -> dict[str, Array]:
        ratios = {}
        for name, sums in self._sums.items():
            above, below = (counts @ sums).T
            nan = np.full(len(counts), np.nan)
            ratios[name] = np.divide(above, below, out=nan, where=below > 0)
        return ratios


def values(measures: Sequence[Measures], num_units: int) -> dict[str, float]:
    """The value of each measure on all images, each counted once."""
    once = np.ones((1, num_units))
    return {name: float(value[0]) for measure in measures for name, value in measure(once).items()}


def draws(measures: Sequence[Measures], num_units: int, count: int, seed: int) -> dict[str, Array]:
    """(count,) values of each measure over resampled images, the same images for all of them."""
    rng = np.random.default_rng(seed)
    chunks: dict[str, list[Array]] = {}
    size = max(1, CHUNK // max(num_units, 1))
    for first in range(0, count, size):
        picked = rng.integers(num_units, size=(min(size, count - first), num_units))
        counts = np.stack([np.bincount(row, minlength=num_units) for row in picked]).astype(float)
        for measure in measures:
            for name, drawn in measure(counts).items():
                chunks.setdefault(name, []).append(drawn)
    return {name: np.concatenate(drawn) for name, drawn in chunks.items()}


def interval(drawn: Array, share: float = 0.95) -> Interval | None:
    """The middle `share` of the draws; None if fewer than half of them have a value."""
    usable = drawn[np.isfinite(drawn)]
    if not len(usable) or len(usable) < len(drawn) / 2:
        return None
    low, high = np.quantile(usable, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)
