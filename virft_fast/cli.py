"""Command lines: one parser for every command, its help, and flags from a YAML file."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from virft_fast.config import UsageError, known_flags, unknown_flag_message, usage
from virft_fast.launch_lines import find, set_aside

METAVARS = {int: "N", float: "X", Path: "PATH", string_to_bool: "true|false"}


class HelpFormatter(argparse.HelpFormatter):
    """One spelling a flag, its kind of value, its default; a percent sign stands for itself."""

    def __init__(self, prog: str, **more: Any) -> None:
        super().__init__(prog, max_help_position=32, **more)

    def _expand_help(self, action: argparse.Action) -> str:
        default = action.default
        text = action.help or ""
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
    """Flags of dataclasses (one group of the help each), or plain argparse's without them."""

    def __init__(self, groups: Sequence[type] = (), **more: Any) -> None:
        more = {"formatter_class": HelpFormatter, "allow_abbrev": False} | more
        super().__init__(list(groups), **more)
        for action in self._actions:
            if action.choices is not None:  # shown here, checked by the dataclass
                action.metavar = f"{{{','.join(action.choices)}}}"
                action.choices = None


def parse(
    groups: Sequence[type], argv: Sequence[str], prog: str, *, launch_lines: bool = False
) -> tuple[Any, ...]:
    """One object of each of these dataclasses; a `--config` file's flags come before the others.

    Args:
        launch_lines: accept other trainers' flags whose values change nothing.
    Raises:
        UsageError: an unknown or misspelt flag or key, or a value out of range.
    """
    known = known_flags(tuple(groups))
    with usage():
        path = _config_path(argv) if "config" in known else None
        if path is not None:
            argv = [*_read_yaml(path, known), *argv]  # the later of two flags wins
        if launch_lines:
            argv = set_aside(argv, known)
    parser = Parser(groups, prog=prog, usage=f"{prog} [--flag value ...]", exit_on_error=False)
    try:
        *configs, unknown = parser.parse_args_into_dataclasses(
            list(argv), return_remaining_strings=True, look_for_args_file=False
        )
    except argparse.ArgumentError as error:
        raise UsageError(f"{error.argument_name.split('/')[0]}: {error.message}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    flags = [word.split("=")[0] for word in unknown if word.startswith("--")]
    if flags:
        raise UsageError("; ".join(unknown_flag_message(flag, known) for flag in flags))
    if unknown:
        raise UsageError(f"expected a flag, got {unknown[0]!r}")
    return tuple(configs)


def exit_status(command: str, action: Callable[[], None], interrupted: str = "") -> int:
    """Run a command; returns 0, 2 for input that can't be used, or 130 after Ctrl-C.

    Args:
        interrupted: what to add to the message after Ctrl-C.
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
    """The flags of a command that writes a data set."""
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder to write; new, or empty")
    add("--overwrite", action="store_true", help="replace a data set once the new one is whole")


def share(text: str) -> float:
    """An argument's type: a number in [0, 1)."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a share in [0, 1), got {text!r}")


def positive(text: str) -> int:
    """An argument's type: an integer, 1 or more."""
    return natural(text, least=1)


def natural(text: str, least: int = 0) -> int:
    """An argument's type: an integer, 0 or more."""
    with contextlib.suppress(ValueError):
        if int(text) >= least:
            return int(text)
    raise argparse.ArgumentTypeError(f"expected a number, {least} or more, got {text!r}")


def _config_path(argv: Sequence[str]) -> str | None:
    found = [word.split("=", 1)[1] for word in argv if word.startswith("--config=")]
    found += [path for word, path in zip(argv, argv[1:], strict=False) if word == "--config"]
    if len(found) > 1:
        raise UsageError(f"--config: expected one file, got {', '.join(found)}; join them")
    return found[0] if found else None


def _read_yaml(path: str, known: list[str]) -> list[str]:
    """The file's flags as words of a command line, so that one parser checks them all."""
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
    written = [str(key.value) for key, _ in tree.value] if values else []
    double = sorted({key for key in written if written.count(key) > 1})
    if double:  # YAML would take the last
        raise UsageError(
            f"--config {path}: expected every flag once, got {', '.join(double)} again"
        )
    if values.get("config") is not None:
        raise UsageError(f"--config {path}: config: expected no file in the file; join them")
    foreign = [key for key in values if key not in known and find(str(key))]
    unknown = [str(key) for key in values if key not in known and key not in foreign]
    if unknown:
        raise UsageError("; ".join(unknown_flag_message(key, known) for key in unknown))
    words = []
    for key, value in values.items():
        if value is None or (value == [] and key in known):  # as if the flag were not there
            continue
        parts = value if isinstance(value, list) and key not in foreign else [value]
        if key in known and any(isinstance(part, (dict, list, type(None))) for part in parts):
            raise UsageError(f"--config {path}: {key}: expected a value or a list, got {value!r}")
        parts = [str(part) for part in parts]
        words += [f"--{key}={parts[0]}"] if len(parts) == 1 else [f"--{key}", *parts]
    return words
