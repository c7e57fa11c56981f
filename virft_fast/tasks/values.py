"""Answers that are no class names: an option's letter, a number, a formula.

As with labels, an answer is read as a whole, maybe after a lead-in; one that names two is none.
"""

from __future__ import annotations

import re
import threading
from fractions import Fraction
from typing import Any

from virft_fast.tasks.labels import answer_text, fold, peel, readings

LETTERS = "abcdefghij"
MAX_FORMULA = 200  # characters
_OPTION = re.compile(
    rf"(?:(?:option|choice|answer)(?: is)? ?:? ?)?[(\[]?([{LETTERS}])[)\]]?(?:[.:)\]] ?(.+))?"
)
_ANOTHER = re.compile(rf"(?:^|[\s(\[/,])[{LETTERS}](?:[.:)\]]|\s*$)|\b(?:or|and|not|no)\b")
_NUMBER = re.compile(
    r"(?P<sign>[-+]?) ?(?P<currency>[$€£¥₹]?) ?(?P<whole>\d{1,3}(?:,\d{3})+|\d{1,60})?"
    r"(?P<decimals>\.\d{1,60})?(?:e(?P<power>[-+]?\d{1,2}))?(?: ?/ ?(?P<below>\d{1,60}))?"
    r" ?(?P<unit>%|°?[^\W\d_]{0,12})"
)
# Towers of powers and factorials take longer to work out than there is time.
_ENDLESS = re.compile(r"\^\{?-?\d{3,}|\^[^+*/=,]*\^|\d{5,}!|!!|\\(?:sum|prod|int|lim)")


def choice_letter(text: str) -> str | None:
    """The option of an answer, "a" to "j": "B", "(b)", "option B", "B. a cat". None if it is none,
    or several; the article "a" before a word is no option."""
    for reading in readings(answer_text(text)[:2000]):
        found = _OPTION.fullmatch(reading)
        if found and not (found[2] and _ANOTHER.search(found[2])):
            return found[1]
    return None


def number_of(text: str) -> tuple[Fraction, str] | None:
    """The number of an answer, exactly, and its unit: "-5", "3.50", "1,234", "1/2", "2e3", "$5",
    "80%", "5 cm". None if it is none, or several."""
    for reading in readings(answer_text(text)[:500]):
        found = _NUMBER.fullmatch(reading.replace("−", "-"))
        if not found or not (found["whole"] or found["decimals"]):
            continue
        below = Fraction(found["below"] or 1)
        if not below:
            continue
        value = Fraction((found["whole"] or "0").replace(",", "") + (found["decimals"] or ""))
        value = value * Fraction(10) ** int(found["power"] or 0) / below
        return (-value if found["sign"] == "-" else value), found["currency"] + found["unit"]
    return None


def import_math_verify() -> Any:
    """The package.

    Raises:
        ValueError: it is not installed; says how to get it.
    """
    try:
        import math_verify
    except ImportError as error:
        raise ValueError(
            "accuracy_math: expected the package math-verify; pip install 'virft_fast[math]'"
        ) from error
    return math_verify


def same_formula(answer: str, truth: str) -> bool:
    """Whether two formulas are equal, by math-verify. The answer counts as a whole, so that one
    right number among several is none.

    Raises:
        ValueError: math-verify is not installed.
    """
    math_verify = import_math_verify()
    if len(answer_text(answer)) > MAX_FORMULA:
        return False
    given, wanted = (peel(answer_text(text).strip()) for text in (answer, truth))
    if not given or _ENDLESS.search(given):
        return False
    if fold(given) == fold(wanted):
        return True
    # Its timeouts are signals, which only the main thread gets.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    try:
        read = [
            math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=seconds)
            for text in (wanted, given)
        ]
        return bool(all(read) and math_verify.verify(*read, timeout_seconds=seconds))
    # What a model writes is data, and the parser's errors share no base.
    except Exception:
        return False
