"""A hook for mkdocstrings: a docstring's entry `a, b: text` becomes one entry per name, and a
section such as `Raises:` needs no blank line above it."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields):$")
ENTRY = re.compile(r"^( {4,})(\w+(?:, \w+)+)(: .*)$")


class SharedEntries(Extension):
    """Repeats the text that names on one line share, so that each name gets its own table row."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the docstring of a module, class or function."""
        docstring = None if obj.is_alias else obj.docstring
        if docstring is not None:
            lines = split_entries(docstring.value.split("\n"))
            docstring.value = "\n".join(separate_sections(lines))


def split_entries(lines: list[str]) -> list[str]:
    """The docstring's lines, with an entry and its continuation lines repeated for every name."""
    result: list[str] = []
    position, section = 0, ""
    while position < len(lines):
        if heading := SECTION.match(lines[position]):
            section = heading[1]
        entry = ENTRY.match(lines[position]) if section in ("Args", "Attributes") else None
        end = position + 1
        if entry is None:
            result.append(lines[position])
        else:
            deeper = entry[1] + " "
            while end < len(lines) and lines[end].startswith(deeper):
                end += 1
            for name in entry[2].split(", "):
                result += [f"{entry[1]}{name}{entry[3]}", *lines[position + 1 : end]]
        position = end
    return result


def separate_sections(lines: list[str]) -> list[str]:
    """The docstring's lines, with a blank line above and below each section."""
    result: list[str] = []
    inside = False
    for line in lines:
        starts = SECTION.match(line) is not None
        ends = inside and line.strip() and not line.startswith(" ")
        if (starts or ends) and result and result[-1].strip():
            result.append("")
        inside = starts or (inside and not ends)
        result.append(line)
    return result
