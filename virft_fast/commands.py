"""`virft-fast COMMAND`, or `python -m virft_fast COMMAND`: runs a command by its name.

Importing this module loads no command, so the list of commands appears at once.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
import threading

from virft_fast.console import unbreakable

# Name -> (module with a `main(argv) -> exit status`, what it does).
COMMANDS = {
    "train": ("virft_fast.train", "fine-tune a model with GRPO, SFT or DPO"),
    "evaluate": ("virft_fast.evaluate", "score a model's answers; compare several models"),
    "merge": ("virft_fast.merge", "write an adapter and its base as one whole model"),
    "data": ("virft_fast.data.__main__", "build, inspect and export data sets"),
    "demo": ("virft_fast.demo", "train the embedded model for two minutes, on any machine"),
    "try": ("virft_fast.try_model", "ask a model about one image, and draw its boxes"),
    "doctor": ("virft_fast.doctor", "check this machine, its packages and GPUs, and a run's flags"),
    "mia": ("virft_fast.mia.__main__", "make multi-image preference pairs for DPO"),
}


@unbreakable()
def main(argv: list[str] | None = None) -> int:
    """Run the command that `argv` starts with, or list all; returns the exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        return importlib.import_module(COMMANDS[name][0]).main(rest)
    if name not in ("-h", "--help", "help"):
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)}"
        print(f"virft-fast: error: unknown command {name!r}; {hint}", file=sys.stderr)
        return 2
    print("usage: virft-fast COMMAND [--flag value ...]\n\ncommands:")
    for command, (_, does) in COMMANDS.items():
        print(f"  {command:10}{does}")
    print("\nvirft-fast COMMAND --help lists the command's flags.")
    return 0


def end_process(status: int) -> None:
    """Exit; skip Python's own shutdown in two cases. With several processes, a collectives thread
    that needs the interpreter during the shutdown would abort a finished run. If threads still run,
    for example in a reward function that hangs, the shutdown would wait for them."""
    left = [t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
    if left or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # closed
                stream.flush()
        os._exit(status)
    sys.exit(status)


def script() -> None:
    """The entry point of the console script."""
    end_process(main())
