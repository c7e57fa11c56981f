"""Building blocks of the dataclasses in `virft_fast.config`: fields with a help text, checks, and
the error for arguments that can't be used."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from copy import copy
from dataclasses import Field, field, fields
from types import ModuleType
from typing import ClassVar, Protocol, TypeVar

Value = TypeVar("Value")
_GIVEN = "_given"
TRAIN_REMEDY = "pip install '.[train]' in a checkout, or 'FILE.whl[train]' for a wheel"


class UsageError(ValueError):
    """The arguments don't describe a run that can start; shown to the user without a traceback."""


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """Turn a ValueError or OSError of the body, which the user can fix, into a UsageError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


class Arguments(Protocol):
    """A dataclass of arguments, one group of a command's help."""

    __dataclass_fields__: ClassVar[dict[str, Field[object]]]


def arg(default: Value, help: str, *aliases: str, choices: Collection[str] = ()) -> Value:
    """A dataclass field with a help text, aliases of its flag, and the allowed values if few."""
    metadata: dict[str, object] = {"help": help}
    if choices:
        metadata["choices"] = choices
    if aliases:
        metadata["aliases"] = [f"--{alias}" for alias in aliases]
    if isinstance(default, list):
        return field(default_factory=lambda: copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def given_flags(config: Arguments) -> list[str]:
    """The flags of a group whose values differ from the defaults."""
    default = type(config)()
    return [f.name for f in fields(config) if getattr(config, f.name) != getattr(default, f.name)]


def note_given(config: Arguments, argv: Sequence[str]) -> None:
    """Remember which flags of the group are in `argv`, for `was_given`."""
    words = [word.split("=")[0] for word in argv if word.startswith("--")]
    given = set()
    for entry in fields(config):
        flags = [f"--{entry.name}", *entry.metadata.get("aliases", [])]
        # argparse also accepts the beginning of a flag.
        if any(flag.startswith(word) for flag in flags for word in words if word != "--"):
            given.add(entry.name)
    vars(config)[_GIVEN] = given


def was_given(config: Arguments, name: str) -> bool:
    """Whether the user chose a flag's value, be it the default's; without a command line, whether
    the value differs from it."""
    return name in vars(config).get(_GIVEN, given_flags(config))


def flag_names(groups: Sequence[type[Arguments]]) -> list[str]:
    """The flags of these groups, aliases included, without dashes."""
    names = []
    for entry in (entry for group in groups for entry in fields(group)):
        names.append(entry.name)
        names += [alias.lstrip("-") for alias in entry.metadata.get("aliases", [])]
    return names


def unknown_flag_message(flag: str, names: list[str]) -> str:
    """The error text for a flag that does not exist; suggests similar ones of `names`."""
    close = difflib.get_close_matches(flag.lstrip("-"), names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join('--' + name for name in close)}?" if close else ""
    return f"unknown flag --{flag.lstrip('-')}{hint}"


# Limits on the value of a flag: in words, and as a test.
@contextlib.contextmanager
def expecting(
    expected: str, errors: tuple[type[BaseException], ...] = (Exception,), *, hint: str = ""
) -> Iterator[None]:
    """Turn errors of the body into a ValueError that says what was expected, and got the error.

    Args:
        errors: their kinds; by default all, because unexpected files can raise anything.
        hint: the end of the message.
    """
    try:
        yield
    except errors as error:
        got = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{expected}, got {got}{hint}") from error


def need_package(what: str, module: str, package: str, extra: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        what: names the flag or feature that needs it.
        extra: our extra that installs it.
    Raises:
        ValueError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{what}: expected the package {package}; pip install {package}, or '.[{extra}]' in a "
            "checkout"
        ) from error


LIMITS: dict[str, Callable[[float], bool]] = {
    "a positive number": lambda v: 0 < v < math.inf,
    "a positive number of pixels": lambda v: 0 < v < math.inf,
    "a number above 0": lambda v: 0 < v < math.inf,
    "seconds above 0": lambda v: 0 < v < 1e9,
    "a ratio above 1": lambda v: v > 1,
    "0 or more": lambda v: v >= 0,
    "0 (off) or more": lambda v: v >= 0,
    "a number, 0 or more": lambda v: 0 <= v < math.inf,
    "at least 1": lambda v: v >= 1,
    "at least 2 (an advantage compares the completions of one prompt)": lambda v: v >= 2,
    "a number in [0, 1)": lambda v: 0 <= v < 1,
    "a number in (0, 1]": lambda v: 0 < v <= 1,
    "a number in [0, 2^32)": lambda v: 0 <= v < 2**32,
    "a share in [0, 0.5)": lambda v: 0 <= v < 0.5,
    "a share in [0, 1)": lambda v: 0 <= v < 1,
    "a share in [0, 1]": lambda v: 0 <= v <= 1,
    "a number of steps, or -1: --num_train_epochs": lambda v: v >= -1,
}


def require(ok: bool, flag: str, expected: str, got: object) -> None:
    """Raise ValueError about a flag unless `ok`."""
    if not ok:
        raise ValueError(f"--{flag}: expected {expected}, got {got!r}")


def check_limit(config: Arguments, expected: str, flags: str) -> None:
    """Raise ValueError if one of these flags, separated by spaces, breaks the limit `expected` of
    `LIMITS`. None is allowed where it is the default."""
    for flag in flags.split():
        value = getattr(config, flag)
        if value is not None or getattr(type(config), flag) is not None:
            require(LIMITS[expected](value), flag, expected, value)


def check_choices(config: Arguments) -> None:
    """Raise ValueError if a flag with `choices` has another value."""
    for entry in fields(config):
        choices, value = entry.metadata.get("choices"), getattr(config, entry.name)
        if choices and value not in choices:
            close = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"--{entry.name}: expected one of {', '.join(choices)}, got {value!r}{hint}"
            )
