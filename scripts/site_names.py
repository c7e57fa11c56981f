"""A hook for mkdocstrings: a docstring's entry `a, b: text` becomes one entry per name."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

ENTRY = re.compile(r"^( {4,})(\w+(?:, \w+)+)(: .*)$")


class SharedEntries(Extension):
    """Repeats the text that names on one line share, so that each name gets its own table row."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the docstring of a module, class or function."""
        docstring = None if obj.is_alias else obj.docstring
        if docstring is not None:
            docstring.value = "\n".join(split_entries(docstring.value.split("\n")))


def split_entries(lines: list[str]) -> list[str]:
    """The docstring's lines, with an entry and its continuation lines repeated for every name."""
    result: list[str] = []
    position = 0
    while position < len(lines):
        entry = ENTRY.match(lines[position])
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
