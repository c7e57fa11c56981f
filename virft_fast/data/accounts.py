"""What a build left out and converted, by reason and name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

MAX_LISTED = 10


@dataclass
class Built:
    """A record of what a build wrote, left out and converted.

    Attributes:
        rows: split -> number of rows.
        left_out: reason -> names of what was left out.
        converted: rule -> names of what is used in a different form than in the source.
        notes: anything else worth reporting.
    """

    rows: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    converted: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def leave_out(self, reason: str, what: str) -> None:
        self.left_out.setdefault(reason, []).append(what)

    def convert(self, rule: str, what: str) -> None:
        self.converted.setdefault(rule, []).append(what)

    def add(self, other: Built) -> None:
        """Add what another account left out, converted and noted."""
        for mine, theirs in ((self.left_out, other.left_out), (self.converted, other.converted)):
            for name, items in theirs.items():
                mine.setdefault(name, []).extend(items)
        self.notes += other.notes

    def note_alike(self, names: Iterable[str], what: str) -> None:
        """Note names that differ only in case or spaces: probably typos, but they aren't merged."""
        alike = defaultdict(list)
        for name in dict.fromkeys(names):
            alike["".join(name.split()).casefold()].append(name)
        for group in alike.values():
            if len(group) > 1:
                spelled = listing([repr(name) for name in group])
                self.notes.append(
                    f"{what} that differ in case or spaces only, used as they are: {spelled}"
                )

    def note_few(self, few: Mapping[str, int], shots: int) -> None:
        """Note the categories or classes with fewer than `shots` images."""
        if few:
            counts = listing([f"{name} {count}" for name, count in few.items()])
            self.notes.append(f"fewer than {shots} images, all of them used: {counts}")

    def lines(self) -> list[str]:
        """The table printed after a build: a line per split, reason, rule and note."""
        lines = [f"{split}: {count} rows" for split, count in self.rows.items()]
        for kind, counted in (("left out", self.left_out), ("converted", self.converted)):
            for why, items in counted.items():
                lines.append(f"{kind}, {why}: {len(items)} ({listing(items)})")
        return lines + self.notes


def dataset_card(title: str, built: Built, flags: Mapping[str, object]) -> str:
    """The README.md of a data set: splits, columns, what was left out, and the flags used."""
    files = "\n".join(
        f"  - split: {split}\n    path: data/{split}-*" for split, n in built.rows.items() if n
    )
    lines = "\n".join(f"- {line}" for line in built.lines())
    arguments = "\n".join(
        f"- {name}: {value}"
        for name, value in sorted(flags.items())
        if not callable(value) and value is not None and value is not False
    )
    return (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}\n---\n# {title}\n\n"
        "Built by `python -m virft_fast.data build`. Columns: `image`, `problem` (the prompt), "
        "`solution` (the ground truth in the answer's form), and what they were made of.\n\n"
        f"{lines}\n\nArguments:\n\n{arguments}\n"
    )


def listing(items: Sequence[object], limit: int = MAX_LISTED) -> str:
    """The first `limit` items, and the number of remaining ones."""
    named = printable(", ".join(f"{item!s:.300}" for item in items[:limit]))
    return named if len(items) <= limit else f"{named} and {len(items) - limit} more"


def printable(text: str) -> str:
    """Escape lone surrogates. File names and JSON may contain them, UTF-8 may not."""
    return text.encode("utf-8", "backslashreplace").decode()
