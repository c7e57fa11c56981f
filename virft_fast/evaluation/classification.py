"""Classification over a closed set: accuracy, and which classes are confused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypedDict

import numpy as np

from virft_fast.evaluation.bootstrap import Array, Ratios
from virft_fast.evaluation.journal import Record
from virft_fast.evaluation.reading import predicted_label
from virft_fast.tasks.labels import ClosedSet

NO_LABEL = "(none of the labels)"


def name_labels(records: Iterable[Record], labels: ClosedSet) -> list[Record]:
    """The records with `true_label` and `predicted_label`; NO_LABEL where a text names none."""
    named = []
    for record in records:
        true, predicted = labels(record["solution"]), predicted_label(record, labels)
        both = {"true_label": true or NO_LABEL, "predicted_label": predicted or NO_LABEL}
        named.append({**record, **both})
    return named


def add_measures(ratios: Ratios, records: Sequence[Record], units: Sequence[Hashable]) -> None:
    """Add `closed_set_accuracy` and `no_label`, the share of answers that name no label of the set.

    Args:
        records: from `name_labels`. units: the image of each record.
    """
    right = [float(record["predicted_label"] == record["true_label"]) for record in records]
    none = [float(record["predicted_label"] == NO_LABEL) for record in records]
    for name, values in (("closed_set_accuracy", right), ("no_label", none)):
        ratios.add(name, [(unit, value, 1.0) for unit, value in zip(units, values, strict=True)])


class ClassMean:
    """`mean_class_accuracy`: the mean of the per-class accuracies, each class weighted equally."""

    def __init__(
        self, records: Sequence[Record], units: Sequence[Hashable], numbers: Mapping[Hashable, int]
    ) -> None:
        by_class: dict[str, list[tuple[Hashable, float, float]]] = {}
        for record, unit in zip(records, units, strict=True):
            right = float(record["predicted_label"] == record["true_label"])
            by_class.setdefault(record["true_label"], []).append((unit, right, 1.0))
        self.ratios = Ratios(numbers)
        for label, terms in by_class.items():
            self.ratios.add(label, terms)

    def __call__(self, counts: Array) -> dict[str, Array]:
        accuracies = np.stack(list(self.ratios(counts).values()))  # (classes, R)
        drawn = ~np.isnan(accuracies)
        return {"mean_class_accuracy": np.where(drawn, accuracies, 0).sum(0) / drawn.sum(0)}


class Confusion(TypedDict):
    """How often one class is mistaken for another: a `count`, and a `share` of the true class."""

    true: str
    predicted: str
    count: int
    share: float


def confusions(records: Sequence[Record], limit: int = 20) -> list[Confusion]:
    """The most frequent confusions, at most `limit`."""
    sizes = Counter(record["true_label"] for record in records)
    pairs = Counter((record["true_label"], record["predicted_label"]) for record in records)
    wrong = [(pair, n) for pair, n in pairs.items() if pair[0] != pair[1]]
    wrong.sort(key=lambda item: (-item[1], item[0]))
    return [
        {"true": true, "predicted": predicted, "count": n, "share": n / sizes[true]}
        for (true, predicted), n in wrong[:limit]
    ]
