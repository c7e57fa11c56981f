"""`python -m virft_fast.merge ADAPTER OUT`: an adapter and its base model as one whole model."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from virft_fast import train_extra  # noqa: F401
from virft_fast.checkpoint import write_whole_model
from virft_fast.cli import exit_status
from virft_fast.commands import end_process
from virft_fast.config import SAVE_DTYPES
from virft_fast.console import log_warnings, unbreakable
from virft_fast.data.writing import make_folder
from virft_fast.models.adapters import merge_adapter
from virft_fast.models.processing import load_processor
from virft_fast.models.qwen_vl import cast_parameters, load_model
from virft_fast.models.source import find_model


@unbreakable()
def main(argv: list[str] | None = None) -> int:
    """Merge; returns the exit status: 0, or 2 for input that can't be used."""
    log_warnings()
    arguments = make_parser().parse_args(argv)

    def run() -> None:
        dtype = merge(arguments.adapter, arguments.out, arguments.base, arguments.dtype)
        print(f"written: {arguments.out}, a whole model in {str(dtype).removeprefix('torch.')}")

    return exit_status("merge", run)


def merge(adapter: str, out: str, base: str | None = None, dtype: str = "auto") -> torch.dtype:
    """Write an adapter and its base as one model; returns the dtype in which it is stored.

    Args:
        base: a model to use instead of the base that the adapter names.
        dtype: "auto" is the base model's. The weights are added in float32.
    Raises:
        ValueError, OSError: there is no adapter that can be merged, or `out` is not empty.
    """
    folder = Path(out)
    make_folder(folder, "OUT", make=False)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"OUT {out}: expected a new or an empty folder, got one with files in it")
    source = find_model(adapter)
    if source.adapter is None:
        raise ValueError(f"ADAPTER {adapter!r}: expected a folder with adapter_config.json")
    source.check_weights()
    whole = find_model(base) if base else source
    stored = getattr(torch, dtype) if dtype != "auto" else whole.config.dtype
    stored, processor = stored or torch.float32, load_processor(source, renders=False)
    model = merge_adapter(load_model(whole), adapter) if base else load_model(whole)
    cast_parameters(model, stored)
    write_whole_model(folder.resolve(), model, processor)
    return stored


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m virft_fast.merge", description=__doc__)
    parser.add_argument("adapter", help="Folder with adapter_config.json.")
    parser.add_argument("out", help="New folder for the whole model.")
    parser.add_argument("--base", help="Base model to use instead of the one named in the adapter.")
    parser.add_argument(
        "--dtype", choices=SAVE_DTYPES, default="auto", help="Weights; auto: the base's."
    )
    return parser


if __name__ == "__main__":
    end_process(main())
