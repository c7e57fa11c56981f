"""Command lines: the parser of every command, its help, and flags from a YAML file."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from virft_fast import train_extra  # noqa: F401

# isort: split
from transformers import HfArgumentParser
from transformers.hf_argparser import DataClassType, string_to_bool

from virft_fast.arguments import (
    Arguments,
    UsageError,
    flag_names,
    note_given,
    unknown_flag_message,
    usage,
)
from virft_fast.launch_lines import find, set_aside

METAVARS = {int: "N", float: "X", Path: "PATH", string_to_bool: "true|false"}


class HelpFormatter(argparse.HelpFormatter):
    """Shows one spelling of each flag, its type and its default; "%" needs no escape."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _expand_help(self, action: argparse.Action) -> str:
        default, text = action.default, action.help or ""
        if not action.option_strings or default in (None, argparse.SUPPRESS, [], ""):
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        return f"{text} (default: {shown})"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        flag = action.option_strings[-1 if "--help" in action.option_strings else 0]
        if action.nargs == 0:
            return flag
        return f"{flag} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return METAVARS.get(action.type, "VALUE")


class Parser(HfArgumentParser):
    """A parser whose flags are dataclass fields, one help group per class; flags can be added."""

    def __init__(self, groups: Sequence[type[Arguments]] = (), **options: object) -> None:
        options = {"formatter_class": HelpFormatter, "allow_abbrev": False} | options
        super().__init__([DataClassType(group) for group in groups], **options)
        for action in self._actions:
            if action.choices is not None:  # shown here; the dataclass checks them
                action.metavar = f"{{{','.join(action.choices)}}}"
                action.choices = None
            if action.type is string_to_bool:  # the base class forgets it if the default is None
                action.nargs, action.const = "?", True


def parse(
    groups: Sequence[type[Arguments]], argv: Sequence[str], prog: str, *, launch_lines: bool = False
) -> tuple[Any, ...]:
    """An instance of each of these dataclasses; flags override those of a `--config` file.

    Args:
        launch_lines: accept other trainers' flags if their values change nothing.
    Raises:
        UsageError: an unknown or misspelled flag or key, or a value out of range.
    """
    names = flag_names(groups)
    with usage():
        path = _config_path(argv) if "config" in names else None
        if path is not None:
            argv = [*_read_yaml(path, names), *argv]  # the later of two flags wins
        if launch_lines:
            argv = set_aside(argv, names)
    parser = Parser(groups, prog=prog, usage=f"{prog} [--flag value ...]", exit_on_error=False)
    try:
        *configs, unknown = parser.parse_args_into_dataclasses(
            list(argv), return_remaining_strings=True, look_for_args_file=False
        )
    except argparse.ArgumentError as error:
        flag = (error.argument_name or prog).split("/")[0]
        raise UsageError(f"{flag}: {error.message}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    flags = [word.split("=")[0] for word in unknown if word.startswith("--")]
    if flags:
        raise UsageError("; ".join(unknown_flag_message(flag, names) for flag in flags))
    if unknown:
        raise UsageError(f"expected a flag, got {unknown[0]!r}")
    for config in configs:
        note_given(config, argv)
    return tuple(configs)


def exit_status(command: str, action: Callable[[], None], interrupted: str = "") -> int:
    """Run a command; returns 0, or 2 for input that can't be used, or 130 after Ctrl-C.

    Args:
        interrupted: added to the message after Ctrl-C.
    """
    try:
        with usage():
            action()
    except UsageError as error:
        print(f"virft_fast.{command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"virft_fast.{command}: interrupted{interrupted}", file=sys.stderr)
        return 130
    return 0


def output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a command that writes a data set."""
    add = parser.add_argument
    add("--output", type=Path, required=True, help="new or empty folder for the result")
    add("--overwrite", action="store_true", help="replace a data set, once the new one is complete")


def share(text: str) -> float:
    """Argument type: a number in [0, 1)."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a share in [0, 1), got {text!r}")


def positive(text: str) -> int:
    """Argument type: an integer, at least 1."""
    return natural(text, least=1)


def natural(text: str, least: int = 0) -> int:
    """Argument type: an integer, at least `least`."""
    with contextlib.suppress(ValueError):
        if int(text) >= least:
            return int(text)
    raise argparse.ArgumentTypeError(f"expected a number, {least} or more, got {text!r}")


def _config_path(argv: Sequence[str]) -> str | None:
    paths = [word.split("=", 1)[1] for word in argv if word.startswith("--config=")]
    paths += [path for word, path in zip(argv, argv[1:], strict=False) if word == "--config"]
    if len(paths) > 1:
        raise UsageError(f"--config: expected one file, got {', '.join(paths)}; join them")
    return paths[0] if paths else None


def _read_yaml(path: str, names: list[str]) -> list[str]:
    """The file's flags as words of a command line, so that the same parser checks them."""
    import yaml

    if not Path(path).is_file():
        raise UsageError(f"--config: expected a YAML file, got {path!r}: no such file")
    try:
        text = Path(path).read_text(encoding="utf-8")
        values, tree = yaml.safe_load(text) or {}, yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"--config {path}: expected YAML, got {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: expected a mapping of flags to values")
    written = [str(k.value) for k, _ in tree.value] if isinstance(tree, yaml.MappingNode) else []
    double = ", ".join(sorted({key for key in written if written.count(key) > 1}))
    if double:  # YAML would silently use the last
        raise UsageError(f"--config {path}: expected each flag once, got {double} twice")
    if values.get("config") is not None:
        raise UsageError(f"--config {path}: config: the file can't name another; join them")
    foreign = [key for key in values if key not in names and find(str(key))]
    unknown = [str(key) for key in values if key not in names and key not in foreign]
    if unknown:
        raise UsageError("; ".join(unknown_flag_message(key, names) for key in unknown))
    words = []
    for key, value in values.items():
        if value is None or (value == [] and key in names):  # as if the flag were not given
            continue
        items = value if isinstance(value, list) and key not in foreign else [value]
        if key in names and any(isinstance(item, (dict, list, type(None))) for item in items):
            raise UsageError(f"--config {path}: {key}: expected a value or a list, got {value!r}")
        items = [str(item) for item in items]
        words += [f"--{key}={items[0]}"] if len(items) == 1 else [f"--{key}", *items]
    return words
