"""How an evaluation reads answers: as the rewards do, or as the original's evaluation does.

Ground truths are always read as the rewards read them. A record itself says, in `answers`, if its
answer is read otherwise, so that all measures of it agree.
"""

from __future__ import annotations

from virft_fast.evaluation.journal import Record
from virft_fast.tasks import parse_detection
from virft_fast.tasks.answers import Detection, in_thousand
from virft_fast.tasks.labels import ClosedSet
from virft_fast.tasks.visual_rft import names_label, read_detection, read_grounding

_VISUAL_RFT = {"detection": read_detection, "grounding": read_grounding}


def marked(record: Record, answers: str, task: str) -> Record:
    """The record with how its answer is read (--answers)."""
    rest = {key: value for key, value in record.items() if key != "answers"}
    return rest if answers == "lenient" else rest | {"answers": f"{answers} {task}"}


def predicted_boxes(record: Record) -> Detection | None:
    """The answer's, in 0..1000; None if it holds none."""
    name, _, task = record.get("answers", "").partition(" ")
    if name == "visual_rft" and task in _VISUAL_RFT:
        return in_thousand(_VISUAL_RFT[task](record["completion"]), record.get("extent"))
    return parse_detection(record["completion"], record.get("extent"))


def true_boxes(record: Record) -> Detection | None:
    """The solution's, in 0..1000."""
    return parse_detection(record["solution"], record.get("extent"))


def predicted_label(record: Record, labels: ClosedSet) -> str | None:
    """The label of the set that the answer gives. By the original's rule it is the true one if
    answer or label is a part of the other, and only then."""
    given = labels(record["completion"])
    if "answers" not in record:
        return given
    true = labels(record["solution"])
    if names_label(record["completion"], record["solution"]):
        return true
    return given if given != true else None
