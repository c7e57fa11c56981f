"""Decides which answers become the rejected answer of a pair, and why others don't.

Attention limits are from MIA-DPO (arXiv:2410.17637, code at a85c51a). The paper mentions length
ratio and edit distance without numbers, so their limits are ours.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from virft_fast.arguments import need_package
from virft_fast.mia.answering import Answer
from virft_fast.mia.scenes import BOX_TEXT

MAX_TRUTH_CHARACTERS = 512
# Kind and number of images -> share of attention on the target. Answers with a lower share are
# rejected. For sequences, so are answers with exactly this share.
THRESHOLDS = {
    ("sequence", 2): 0.8, ("sequence", 3): 0.7, ("sequence", 4): 0.6, ("sequence", 5): 0.6,
    ("collage", 2): 0.7, ("collage", 3): 0.6, ("collage", 4): 0.5, ("collage", 6): 0.4,
    ("collage", 9): 0.3, ("pip", 2): 0.8,
}  # fmt: skip


@dataclass(frozen=True)
class Selection:
    """The limits that a rejected answer must meet.

    Attributes:
        thresholds: (kind, number of images) -> attention share, if it differs from THRESHOLDS.
        min_perplexity: the answer's perplexity must be higher.
        max_length_ratio: ratio of the longer to the shorter answer, in characters.
        min_edit_distance: Levenshtein distance to the truth, as a share of the longer text.
    """

    thresholds: Mapping[tuple[str, int], float] = field(default_factory=dict)
    min_perplexity: float = 1.1
    max_length_ratio: float = 10.0
    min_edit_distance: float = 0.05

    def __post_init__(self) -> None:
        unknown = [key for key in self.thresholds if key not in THRESHOLDS]
        if unknown:
            names = ", ".join(f"{kind}{count}" for kind, count in THRESHOLDS)
            raise ValueError(f"thresholds: expected some of {names}, got {unknown}")
        for name, expected, good in (
            ("thresholds", "finite numbers", all(map(math.isfinite, self.thresholds.values()))),
            ("min_perplexity", "a finite number", math.isfinite(self.min_perplexity)),
            ("max_length_ratio", "1 or more", self.max_length_ratio >= 1),
            ("min_edit_distance", "a share in [0, 1]", 0 <= self.min_edit_distance <= 1),
        ):
            if not good:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")

    def limit(self, answer: Answer) -> float:
        """The share of attention on the target below which this answer is rejected."""
        return {**THRESHOLDS, **self.thresholds}[answer.kind, answer.num_images]

    def looked_away(self, answer: Answer) -> bool:
        """Whether the share of attention on the target is low enough. False if it is unknown."""
        limit, ratio = self.limit(answer), math.inf if answer.ratio is None else answer.ratio
        return ratio <= limit if answer.kind == "sequence" else ratio < limit


def reasons_against(answer: Answer, selection: Selection) -> list[str]:
    """Why this answer makes no pair; empty if it makes one. Reasons contain no numbers, so that
    equal ones can be counted."""
    if answer.problem:
        return [answer.problem]
    text, truth = answer.text.strip(), answer.truth.strip()
    reasons = []
    if not truth:
        return ["the row's own answer is empty"]
    if len(truth) >= MAX_TRUTH_CHARACTERS:
        reasons.append(f"the row's own answer has {MAX_TRUTH_CHARACTERS} characters or more")
    if not text:
        return [*reasons, "the model's answer is empty"]
    if text == truth:
        return [*reasons, "the model's answer is right"]
    if BOX_TEXT.search(truth):
        reasons.append("boxes in the text")
    if answer.ratio is None:
        reasons.append("no attention on any image")
    elif not selection.looked_away(answer):
        reasons.append(f"attention on the target: {answer.kind} of {answer.num_images}")
    if answer.perplexity is None or answer.perplexity <= selection.min_perplexity:
        reasons.append("perplexity")
    if max(len(text), len(truth)) > selection.max_length_ratio * min(len(text), len(truth)):
        reasons.append("length ratio")
    if edit_distance(text, truth) < selection.min_edit_distance:
        reasons.append("edit distance")
    return reasons


def edit_distance(one: str, other: str) -> float:
    """Levenshtein distance as a share of the longer text, in [0, 1]."""
    module = "rapidfuzz.distance"
    distance = need_package("the selection's edit distances", module, "rapidfuzz", "mia")
    return distance.Levenshtein.normalized_distance(one, other)


def table(answers: Mapping[int, Answer], reasons: Mapping[int, Sequence[str]]) -> list[str]:
    """The number of kept and dropped rows, as lines by kind of scene and by reason.

    A row that is dropped for two reasons counts for both.
    """
    answered = Counter((a.kind, a.num_images) for a in answers.values() if not a.problem)
    kept = Counter((a.kind, a.num_images) for index, a in answers.items() if not reasons[index])
    ratios: dict[tuple[str, int], list[float]] = defaultdict(list)
    for answer in answers.values():
        if answer.ratio is not None:
            ratios[answer.kind, answer.num_images].append(answer.ratio)
    lines = [f"{'scene':14} {'answered':>8} {'kept':>6} {'mean attention on the target':>30}"]
    for key, count in sorted(answered.items()):
        mean = f"{sum(ratios[key]) / len(ratios[key]):.3f}" if ratios[key] else ""
        lines.append(f"{key[0]:10} {key[1]:3} {count:8} {kept[key]:6} {mean:>30}")
    lines.append(f"{'all':14} {sum(answered.values()):8} {sum(kept.values()):6}")
    dropped = Counter(reason for row in reasons.values() for reason in set(row))
    lines += ["", f"{'dropped because of':60} {'rows':>6}"] if dropped else []
    return lines + [f"{reason:60} {count:6}" for reason, count in dropped.most_common()]
