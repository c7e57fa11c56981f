"""Flags of other trainers' launch lines (TRL, transformers, Visual-RFT, VLM-R1) that we don't have.

A value that changes nothing here is accepted; a warning says why. Any other value is an error that
says what to do instead. launch_lines.yaml holds the table; `docs/launch_lines.md` shows it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import yaml

logger = logging.getLogger("virft_fast")

# Values that mean the same as omitting the flag.
NOTHING = ("none", "null", "", "[]", "{}")
# Values of a switch; YAML turns `no` into False.
_SWITCH = {"true": 1.0, "yes": 1.0, "on": 1.0, "false": 0.0, "no": 0.0, "off": 0.0}


class Foreign(NamedTuple):
    """Flags that do nothing here.

    Attributes:
        flags: names, separated by spaces; `*` matches any ending.
        harmless: values that change nothing, separated by spaces, in addition to NOTHING; `*` is
            any value.
        why: why these have no effect.
        instead: what to do if another value is needed; empty: drop the flag, because of `why`.
    """

    flags: str
    harmless: str = ""
    why: str = ""
    instead: str = ""

    @property
    def advice(self) -> str:
        return self.instead or f"drop it: {self.why}"


TABLE = Path(__file__).with_name("launch_lines.yaml")
# BaseLoader keeps scalars as text: false, no and 0 are values of flags.
FOREIGN = tuple(Foreign(**entry) for entry in yaml.load(TABLE.read_text("utf-8"), yaml.BaseLoader))


def find(flag: str) -> Foreign | None:
    """The table's entry for a flag, given without dashes; None if it has none."""
    name = flag.replace("-", "_")
    fits = (f for f in FOREIGN if any(fnmatchcase(name, pattern) for pattern in f.flags.split()))
    return next(fits, None)


def set_aside(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """The words of a command line without the table's flags and their values. Each entry of the
    table that applies causes one warning.

    Args:
        names: our own flags, to which the table never applies.
    Raises:
        ValueError: values that would change the run; names all such flags.
    """
    kept: list[str] = []
    used: dict[Foreign, list[str]] = {}
    wrong: list[str] = []
    rest = list(words)
    while rest:
        flag, joined, value = rest.pop(0).partition("=")
        name = flag[2:].replace("-", "_")
        foreign = find(name) if flag.startswith("--") and name not in names else None
        if foreign is None:
            kept.append(flag + joined + value)
            continue
        values = [value] if joined else []
        while rest and not joined and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        said = " ".join(values) if values else "true"
        if _is_harmless(said, foreign):
            used.setdefault(foreign, []).append(f"--{name}")
        else:
            expected = " or ".join(foreign.harmless.split()) or "no such flag"
            wrong.append(f"--{name} {said}: expected {expected}; {foreign.advice}")
    if wrong:
        raise ValueError("; ".join(wrong))
    for foreign, flags in used.items():
        listed = ", ".join(dict.fromkeys(flags))
        logger.warning("without effect: %s; %s", listed, foreign.why or "it is not given")
    return kept


def _is_harmless(value: str, foreign: Foreign) -> bool:
    plain = _plain(value)
    return value.lower() in NOTHING or any(
        harmless == "*" or plain == _plain(harmless) for harmless in foreign.harmless.split()
    )


def _plain(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return _SWITCH.get(value.lower(), value.lower())
