"""How an evaluation parses answers: as the rewards do, or as Visual-RFT's evaluation does.

Ground truth is always parsed as the rewards do. If an answer is parsed the other way, its record
says so in `answers`, so that all of its measures agree.
"""

from __future__ import annotations

from virft_fast.evaluation.journal import Record
from virft_fast.tasks import parse_detection
from virft_fast.tasks.answers import Detection, in_thousand
from virft_fast.tasks.labels import ClosedSet
from virft_fast.tasks.visual_rft import names_label, read_detection, read_grounding

_VISUAL_RFT = {"detection": read_detection, "grounding": read_grounding}


def marked(record: Record, answers: str, task: str) -> Record:
    """The record, marked with how its answer is parsed (--answers)."""
    rest = {key: value for key, value in record.items() if key != "answers"}
    return rest if answers == "lenient" else rest | {"answers": f"{answers} {task}"}


def predicted_boxes(record: Record) -> Detection | None:
    """The answer's boxes in 0..1000; None if it can't be parsed."""
    name, _, task = record.get("answers", "").partition(" ")
    if name == "visual_rft" and task in _VISUAL_RFT:
        return in_thousand(_VISUAL_RFT[task](record["completion"]), record.get("extent"))
    return parse_detection(record["completion"], record.get("extent"))


def scores_of(read: Detection) -> list[float]:
    """The confidences of its boxes; 0 for one that is missing or outside [0, 1]."""
    return [c if c is not None and 0 <= c <= 1 else 0.0 for c in read.confidences]


def true_boxes(record: Record) -> Detection | None:
    """The solution's boxes in 0..1000."""
    return parse_detection(record["solution"], record.get("extent"))


def predicted_label(record: Record, labels: ClosedSet) -> str | None:
    """The label of the set that the answer names. As Visual-RFT parses answers, it is the true
    label if and only if the answer contains the label or the label contains the answer."""
    given = labels(record["completion"])
    if "answers" not in record:
        return given
    true = labels(record["solution"])
    if names_label(record["completion"], record["solution"]):
        return true
    return given if given != true else None
