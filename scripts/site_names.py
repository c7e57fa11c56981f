"""A hook for mkdocstrings: a docstring's entry `a, b: text` becomes one entry per name, a section
such as `Raises:` needs no blank line above it, and a function that takes LossArgs' fields shows
them. It reads the source only, so that the site is built without torch."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Parameter, ParameterKind

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

    def on_package(self, *, pkg: Any, **_: Any) -> None:
        """Show LossArgs' fields in the signatures of functions with `@takes_loss_args`."""
        attributes = pkg["kernels.loss_args.LossArgs"].attributes.values()
        fields = [each for each in attributes if "property" not in each.labels]
        for module in pkg["kernels"].modules.values():
            for function in module.functions.values():
                if "takes_loss_args" in (str(x.value) for x in function.decorators):
                    del function.parameters[function.parameters[-1].name]  # **loss
                    for field in fields:
                        function.parameters.add(
                            Parameter(
                                field.name,
                                annotation=field.annotation,
                                kind=ParameterKind.keyword_only,
                                default=field.value,
                            )
                        )


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
