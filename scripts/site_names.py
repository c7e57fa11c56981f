"""mkdocstrings calls this: an entry `a, b: text` of a docstring becomes one entry each."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

ENTRY = re.compile(r"^( {4,})(\w+(?:, \w+)+)(: .*)$")


class SharedEntries(Extension):
    """Repeats what names of one line share, so that each gets its own row in the page's table."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the docstring of a module, class or function."""
        docstring = None if obj.is_alias else obj.docstring
        if docstring is not None:
            docstring.value = "\n".join(split_entries(docstring.value.split("\n")))


def split_entries(lines: list[str]) -> list[str]:
    """The docstring's lines with an entry, and the lines that continue it, for every name."""
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
