"""`python -m virft_fast.mia`: multi-image preference pairs from questions about single images.

Under torchrun, the ranks share the scenes. A killed run resumes from its journal.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from virft_fast import dist
from virft_fast.cli import Parser, exit_status, natural, output_arguments, positive, share
from virft_fast.commands import end_process
from virft_fast.console import unbreakable
from virft_fast.data import load_rows
from virft_fast.data.writing import check_new_dataset
from virft_fast.mia.answering import Answering, answer_all, open_journal
from virft_fast.mia.pairs import write_pairs
from virft_fast.mia.scenes import SceneLayout, Scenes, source_groups
from virft_fast.mia.selection import Selection, edit_distance, reasons_against, table
from virft_fast.mia.sheet import attention_sheet
from virft_fast.models.families import family_of
from virft_fast.models.processing import load_processor
from virft_fast.models.source import ModelSource, find_model
from virft_fast.rollout.backends import check_cache_limit, load_policy
from virft_fast.rollout.native import NativeRollout

# Flags that don't affect answers. A run may resume with different values of these only.
_FREE_FLAGS = {
    "output", "overwrite", "max_rows", "batch_size", "rollout_cache_tokens", "thresholds",
    "min_perplexity", "max_length_ratio", "min_edit_distance", "pictures",
}  # fmt: skip


@unbreakable()
def main(argv: list[str] | None = None) -> int:
    """Make pairs; returns the exit status: 0, 2 for unusable input, 130 after Ctrl-C."""
    arguments = make_parser().parse_args(argv)
    again = "; the same command resumes it"
    try:
        return exit_status("mia", lambda: run(arguments, dist.init()), again)
    finally:
        dist.shutdown()


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m virft_fast.mia")
    _data_arguments(parser)
    _scene_arguments(parser.add_argument_group("scenes").add_argument)
    _answer_arguments(parser.add_argument_group("answers").add_argument)
    _selection_arguments(parser.add_argument_group("selection").add_argument)
    return parser


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dataset_name", required=True, help="data set of questions about one image each, "
        "as in training; LLaVA's JSON also works")  # fmt: skip
    add("--dataset_config", help="as in training")
    add("--split", default="train", help="split to read")
    add("--images", type=Path, help="folder where paths in a JSON file start; default: the file's")
    add("--model_name_or_path", required=True, help="model that answers, as in training")
    output_arguments(parser)
    add("--seed", type=natural, default=0, help="seed of every random choice")
    add("--max_rows", type=positive, help="use only this many rows, from the first; default: all")
    add("--test_share", type=share, default=0.0,
        help="approximate share of images whose scenes go into split test")  # fmt: skip


def _scene_arguments(add: Callable[..., argparse.Action]) -> None:
    add("--shares", type=_weights, default="sequence=15.1,collage=9.3,pip=4.5",
        help="how often each kind of scene is made")  # fmt: skip
    add("--sequence_images", type=_numbers, default="2,3,4,5",
        help="images per sequence, drawn from this list; 2,2,3: twice as often 2 as 3")  # fmt: skip
    add("--collage_images", type=_numbers, default="2,3,4,6,9", help="cells per collage, likewise")
    add("--companions", choices=("source", "all"), default="source",
        help="where a scene's other images come from: the row's source (its column source, or the "
        "first folder in which paths differ), or any row")  # fmt: skip
    add("--cell", type=positive, default=448, help="side of a collage's cell, in pixels")
    add("--gutter", type=natural, default=40,
        help="space between cells, and height of the strip of labels, in pixels")  # fmt: skip
    add("--label_size", type=positive, default=36, help="font size of the labels, in pixels")


def _answer_arguments(add: Callable[..., argparse.Action]) -> None:
    add("--mode", choices=("corrupted", "clean"), default="corrupted", help="corrupted: "
        "noise on the target in collages and pictures in pictures, as in MIA-DPO")  # fmt: skip
    add("--layer", type=int, help="layer to measure attention at, from 0; default: the middle one")
    add("--batch_size", type=positive, default=16, help="scenes per batch")
    add("--max_completion_length", type=positive, default=512, help="maximum tokens in an answer")
    add("--max_prompt_length", type=positive, help="leave out scenes with more tokens")
    add("--rollout_cache_tokens", type=positive, help="as in training")
    add("--min_pixels", type=int, help="as in training")
    add("--max_pixels", type=int, help="as in training; for each image of a scene")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
        help="weights; auto: bfloat16 on a GPU, else float32")  # fmt: skip


def _selection_arguments(add: Callable[..., argparse.Action]) -> None:
    add("--thresholds", type=_weights, default="", help="limits on attention, where they should "
        "differ from MIA-DPO's: sequence2=0.7,pip2=0.9")  # fmt: skip
    add("--min_perplexity", type=float, default=1.1, help="an answer's perplexity must be higher")
    add("--max_length_ratio", type=float, default=10.0,
        help="drop pairs whose lengths in characters differ by more than this factor")  # fmt: skip
    add("--min_edit_distance", type=float, default=0.05,
        help="drop pairs whose edit distance is below this share of the longer answer")  # fmt: skip
    add("--pictures", type=natural, default=12,
        help="number of scenes drawn into OUTPUT.png; 0: no picture")  # fmt: skip


def _weights(text: str) -> dict[str, float]:
    with contextlib.suppress(ValueError):
        pairs = [pair.split("=") for pair in text.split(",") if pair.strip()]
        weights = {name.strip(): float(value) for name, value in pairs}
        if len(weights) < len(pairs):
            raise argparse.ArgumentTypeError(f"expected each name once, got {text!r}")
        return weights
    raise argparse.ArgumentTypeError(f"expected name=number,..., got {text!r}")


def _numbers(text: str) -> tuple[int, ...]:
    with contextlib.suppress(ValueError):
        return tuple(int(word) for word in text.split(","))
    raise argparse.ArgumentTypeError(f"expected numbers, got {text!r}")


def run(arguments: argparse.Namespace, device: torch.device) -> None:
    """Answer every scene, then write the kept pairs and report what was dropped.

    Raises:
        ValueError, OSError: flags, data or model can't be used, or no pair was kept.
    """
    out = arguments.output
    sheet = _check_files(arguments)
    edit_distance("", "")  # report a missing package now, not after all the answers
    selection, scenes = _selection(arguments), _scenes(arguments)
    source = find_model(arguments.model_name_or_path)
    answering = _answering(arguments, source, device)
    settings = {k: value for k, value in vars(arguments).items() if k not in _FREE_FLAGS}
    settings |= {"images": str(arguments.images), "weights": source.stamp}
    journal_path = out.with_name(f".{out.name}.answers.jsonl")
    journal = open_journal(journal_path, settings, overwrite=arguments.overwrite)
    indices = range(len(scenes))[: arguments.max_rows]
    with tqdm(total=len(indices), unit="scene", disable=not dist.is_main()) as bar:
        answers = answer_all(
            scenes, answering, journal, indices, batch_size=arguments.batch_size,
            progress=bar.update,
        )  # fmt: skip
    if journal is None:
        return
    reasons = {index: reasons_against(a, selection) for index, a in answers.items()}
    print("\n".join(table(answers, reasons)))
    counts = write_pairs(
        out, scenes, answers, reasons, selection, progress=partial(tqdm, unit="row"),
        card=lambda: _card(arguments, table(answers, reasons)),
    )  # fmt: skip
    print(", ".join(f"{split}: {count} pairs" for split, count in counts.items()))
    print(f"written: {out}")
    if picture := attention_sheet(scenes, answering, answers, reasons, arguments.pictures):
        picture.save(sheet)
        print(f"written: {sheet}")
    journal.remove()


def _check_files(arguments: argparse.Namespace) -> Path:
    """Check inputs and outputs before the work starts. Returns the path of the sheet."""
    out = arguments.output
    sources = (arguments.dataset_name, arguments.images, arguments.model_name_or_path)
    check_new_dataset(out, arguments.overwrite, sources)
    sheet = out.with_name(f"{out.name}.png")
    if arguments.pictures and sheet.exists() and not arguments.overwrite:
        raise ValueError(f"{sheet}: exists already; pass --overwrite, --pictures 0 or another name")
    if arguments.images and not arguments.images.is_dir():
        raise ValueError(f"--images {arguments.images}: expected a folder, got none")
    return sheet


def _selection(arguments: argparse.Namespace) -> Selection:
    thresholds = {_scene_key(name): limit for name, limit in arguments.thresholds.items()}
    names = ("min_perplexity", "max_length_ratio", "min_edit_distance")
    return Selection(thresholds, *(getattr(arguments, name) for name in names))


def _scene_key(name: str) -> tuple[str, int]:
    kind = name.rstrip("0123456789")
    number = name[len(kind) :] or ("2" if kind == "pip" else "0")
    return kind, int(number)


def _scenes(arguments: argparse.Namespace) -> Scenes:
    rows = load_rows(
        arguments.dataset_name, arguments.split, dataset_config=arguments.dataset_config,
        image_folder=arguments.images,
    )  # fmt: skip
    names = ("shares", "sequence_images", "collage_images", "cell", "gutter", "label_size")
    sizes = {name: getattr(arguments, name) for name in names}
    layout = SceneLayout(**sizes, label_indent=arguments.gutter // 2)
    groups = source_groups(rows) if arguments.companions == "source" else None
    return Scenes(
        rows, layout, seed=arguments.seed, noise=arguments.mode == "corrupted", groups=groups,
        test_share=arguments.test_share,
    )  # fmt: skip


def _answering(
    arguments: argparse.Namespace, source: ModelSource, device: torch.device
) -> Answering:
    pixels = {"min_pixels": arguments.min_pixels, "max_pixels": arguments.max_pixels}
    if not family_of(source.config.model_type).is_qwen:
        raise ValueError(
            f"{source.name!r}: expected a Qwen-VL, whose images are a grid of patches, to measure "
            f"attention, got {source.config.model_type}; answer with another model"
        )
    processor = load_processor(source, **pixels)
    limits = {n: getattr(arguments, n) for n in ("max_completion_length", "max_prompt_length")}
    cache = arguments.rollout_cache_tokens
    check_cache_limit("native", cache, num_generations=1, device=device, **limits)
    layers = source.config.text_config.num_hidden_layers
    layer = layers // 2 if arguments.layer is None else arguments.layer
    if not 0 <= layer < layers:
        raise ValueError(f"--layer: expected 0 to {layers - 1}, got {layer}")
    policy = load_policy(source, dtype=arguments.dtype, device=device)
    weights = lambda: contextlib.nullcontext(policy)  # noqa: E731
    tokenizer = processor.tokenizer
    rollout = NativeRollout(weights, tokenizer, device=device, max_cache_tokens=cache)
    return Answering(policy, rollout, processor, layer, device=device, **limits)


def _card(arguments: argparse.Namespace, lines: Sequence[str]) -> str:
    counts = "\n".join(f"    {line}" for line in lines)
    given = {k: v for k, v in sorted(vars(arguments).items()) if v is not None}
    flags = "\n".join(f"- {name}: {value}" for name, value in given.items())
    return (
        "# Multi-image preference pairs (MIA-DPO)\n\n"
        "Made by `python -m virft_fast.mia`. Columns as TRL's DPOTrainer takes them: "
        "`images`, `prompt`, `chosen` (the row's own answer), `rejected` (the model's), and "
        "why the pair was kept. `selection.jsonl` has every row, kept or not.\n\n"
        f"{counts}\n\n{flags}\n"
    )


if __name__ == "__main__":
    end_process(main())
