"""Classification over a closed set: accuracy, and which classes are taken for which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from virft_fast.evaluation.bootstrap import Array, Ratios
from virft_fast.evaluation.journal import Record
from virft_fast.evaluation.reading import predicted_label
from virft_fast.tasks.labels import ClosedSet

NO_LABEL = "(none of the labels)"


def name_labels(records: Iterable[Record], labels: ClosedSet) -> list[Record]:
    """The records with `true_label` and `predicted_label`, NO_LABEL where an answer gives none."""
    return [
        {
            **record,
            "true_label": labels(record["solution"]) or NO_LABEL,
            "predicted_label": predicted_label(record, labels) or NO_LABEL,
        }
        for record in records
    ]


def add_measures(ratios: Ratios, records: Sequence[Record], units: Sequence[Any]) -> None:
    """`closed_set_accuracy`, and `no_label`: the share of answers that give no label of the set.

    Args:
        records: of `name_labels`. units: the image of each.
    """
    right = [float(record["predicted_label"] == record["true_label"]) for record in records]
    none = [float(record["predicted_label"] == NO_LABEL) for record in records]
    ratios.add("closed_set_accuracy", [(u, r, 1.0) for u, r in zip(units, right, strict=True)])
    ratios.add("no_label", [(u, n, 1.0) for u, n in zip(units, none, strict=True)])


class ClassMean:
    """`mean_class_accuracy`: every class counts the same, however many images it has."""

    def __init__(self, records: Sequence[Record], units: Sequence[Any], numbers: Any) -> None:
        by_class: dict[str, list[tuple[Any, float, float]]] = {}
        for record, unit in zip(records, units, strict=True):
            right = float(record["predicted_label"] == record["true_label"])
            by_class.setdefault(record["true_label"], []).append((unit, right, 1.0))
        self.ratios = Ratios(numbers)
        for label, parts in by_class.items():
            self.ratios.add(label, parts)

    def __call__(self, counts: Array) -> dict[str, Array]:
        import numpy as np

        together = np.stack(list(self.ratios(counts).values()))  # (classes, R)
        known = ~np.isnan(together)
        return {"mean_class_accuracy": np.where(known, together, 0).sum(0) / known.sum(0)}


def confusions(records: Iterable[Record], most: int = 20) -> list[dict[str, Any]]:
    """The commonest mistakes: `true`, `predicted`, `count`, and the `share` of the true class."""
    records = list(records)
    of_class = Counter(record["true_label"] for record in records)
    pairs = Counter(
        (record["true_label"], record["predicted_label"])
        for record in records
        if record["true_label"] != record["predicted_label"]
    )
    return [
        {"true": true, "predicted": predicted, "count": n, "share": n / of_class[true]}
        for (true, predicted), n in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[
            :most
        ]
    ]
