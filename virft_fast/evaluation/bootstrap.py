"""How sure a measure is: its spread over resampled images.

A measure is a function of how often each image is counted. The bootstrap draws as many images as
there are, with replacement, and takes the measure again; the interval is where 95 % of the draws
lie. With one seed two models see the same draws, so their difference has an interval of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# (R, U) counts of U images in R draws -> (R,) values by name, NaN where there is nothing to measure
Measures = Callable[[Array], Mapping[str, Array]]
Interval = tuple[float, float]
CHUNK = 2**22  # counts held at once: 32 MiB


class Ratios:
    """Sums over images divided by others: means, shares, cumulated ratios.

    Args:
        units: image -> its number.
    """

    def __init__(self, units: Mapping[Hashable, int]) -> None:
        self.units = units
        self._sums: dict[str, Array] = {}  # name -> (U, 2)

    def add(self, name: str, parts: Iterable[tuple[Hashable, float, float]]) -> None:
        """A ratio by its (image, what it adds above, what it adds below)."""
        sums = self._sums[name] = np.zeros((len(self.units), 2))
        for image, above, below in parts:
            sums[self.units[image]] += (above, below)

    def __call__(self, counts: Array) -> dict[str, Array]:
        found = {}
        for name, sums in self._sums.items():
            above, below = (counts @ sums).T
            found[name] = np.divide(above, below, out=np.full(len(counts), np.nan), where=below > 0)
        return found


def values(measures: Sequence[Measures], num_units: int) -> dict[str, float]:
    """With every image counted once."""
    once = np.ones((1, num_units))
    return {name: float(found[0]) for part in measures for name, found in part(once).items()}


def draws(measures: Sequence[Measures], num_units: int, count: int, seed: int) -> dict[str, Array]:
    """(count,) values of each measure over resampled images, the same images for all of them."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[Array]] = {}
    most = max(1, CHUNK // max(num_units, 1))
    for first in range(0, count, most):
        picked = rng.integers(num_units, size=(min(most, count - first), num_units))
        counts = np.stack([np.bincount(row, minlength=num_units) for row in picked]).astype(float)
        for part in measures:
            for name, drawn in part(counts).items():
                found.setdefault(name, []).append(drawn)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def interval(drawn: Array, share: float = 0.95) -> Interval | None:
    """The middle `share` of the draws; None if fewer than half of them have a value."""
    usable = drawn[np.isfinite(drawn)]
    if not len(usable) or len(usable) < len(drawn) / 2:
        return None
    low, high = np.quantile(usable, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)
