"""`python -m virft_fast.data`: build, inspect and export data sets.

build coco|lvis|yolo|voc|openimages       detection: from what you have to what training reads
build refcoco|grounding, classification   likewise for grounding and classification
mia                                       multi-image preference pairs by attention, for DPO
inspect                                   numbers, bad rows and a sheet of pictures
export llamafactory                       for supervised fine-tuning elsewhere
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from virft_fast.cli import Parser
from virft_fast.commands import end_process
from virft_fast.config import BOX_SPACES, TASKS, UsageError, column_names, usage
from virft_fast.console import unbreakable
from virft_fast.data import SampleDataset, first_solutions, load_rows
from virft_fast.data.accounts import Built
from virft_fast.data.classification import READERS, plan_classification, read_csv
from virft_fast.data.coco import pick_categories, plan_detection, usable_images
from virft_fast.data.export import check_export, export_llamafactory
from virft_fast.data.inspection import check_picture, inspect
from virft_fast.data.instances import Annotations, read_annotations
from virft_fast.data.lisa import Asked, plan_grounding, read_lisa
from virft_fast.data.loading import FILE_SUFFIXES
from virft_fast.data.mia import Layout
from virft_fast.data.openimages import read_openimages
from virft_fast.data.refcoco import read_refcoco
from virft_fast.data.survey import open_space, survey
from virft_fast.data.voc import read_voc
from virft_fast.data.writing import Plan, check_output, drop_missing, write_dataset
from virft_fast.data.yolo import read_yolo
from virft_fast.tasks import check_solution, detect_task
from virft_fast.tasks.coordinates import FAMILY_SPACE, Extent
from virft_fast.tasks.prompts import CLASSIFICATION_SETS


@unbreakable()
def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for input that can't be used, 130 for Ctrl-C."""
    arguments = make_parser().parse_args(argv)
    try:
        with usage():
            arguments.run(arguments)
    except UsageError as error:
        print(f"virft_fast.data: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        more = "; the same command goes on where it was" if arguments.run is _mia else ""
        print(f"virft_fast.data: interrupted{more}", file=sys.stderr)
        return 130
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Of all commands."""
    parser = Parser(prog="python -m virft_fast.data")
    commands = parser.add_subparsers(required=True, metavar="command")
    build = commands.add_parser("build", help="make a data set").add_subparsers(
        required=True, metavar="kind"
    )
    for kind in ("coco", "lvis"):
        _detection_arguments(build.add_parser(kind, help=f"from {kind.upper()}'s instances files"))
        build.choices[kind].set_defaults(run=_build_detection, kind=kind)
    layouts = {"yolo": "Ultralytics'", "voc": "Pascal VOC's", "openimages": "Open Images'"}
    for kind, whose in layouts.items():
        _folder_arguments(build.add_parser(kind, help=f"from a folder in {whose} layout"))
        build.choices[kind].set_defaults(run=_build_folder, kind=kind)
    build.choices["openimages"].add_argument(
        "--images", type=Path, required=True, help="folder of the images; others are not read"
    )
    _classification_arguments(build.add_parser("classification", help="from labelled images"))
    _grounding_arguments(build.add_parser("grounding", help="from LISA's ReasonSeg folders"))
    _refcoco_arguments(build.add_parser("refcoco", help="from RefCOCO, RefCOCO+ or RefCOCOg"))
    _mia_arguments(
        commands.add_parser("mia", help="multi-image preference pairs, by the model's attention")
    )
    _inspect_arguments(commands.add_parser("inspect", help="look at a data set"))
    export = commands.add_parser("export", help="write a data set for another trainer")
    _export_arguments(
        export.add_subparsers(required=True, metavar="trainer").add_parser(
            "llamafactory", help="sharegpt JSON and dataset_info.json"
        )
    )
    return parser


def _output_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder to write; new, or empty")
    add("--overwrite", action="store_true", help="replace a data set once the new one is whole")


def _common(parser: argparse.ArgumentParser) -> None:
    _output_arguments(parser)
    add = parser.add_argument
    add("--allow_missing", action="store_true", help="leave out rows whose image is missing")
    add("--seed", type=int, default=0, help="of every choice")
    add("--test_share", type=_share, default=0.0, help="of the images, held out as split test")


def _space_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model_family",
        choices=sorted(FAMILY_SPACE),
        default="qwen2_vl",
        help="whose boxes: 0..1000, or pixels of the resized image (qwen2_5_vl)",
    )
    add("--min_pixels", type=_positive, default=3136, help="of the processor, for boxes in pixels")
    add(
        "--max_pixels",
        type=_positive,
        default=401_408,
        help="of the processor, for boxes in pixels",
    )


def _detection_arguments(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    _space_arguments(parser)
    add = parser.add_argument
    add("--annotations", type=Path, required=True, help="instances file of the training images")
    add("--images", type=Path, required=True, help="folder of the training images")
    add("--test_annotations", type=Path, help="instances file of the test images")
    add("--test_images", type=Path, help="folder of the test images; default: --images")
    _choice_arguments(parser)


def _folder_arguments(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    _space_arguments(parser)
    parser.add_argument(
        "--source", type=Path, required=True, help="the folder, or for yolo its data.yaml"
    )
    _choice_arguments(parser)


def _rows_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max_rows", type=_positive, help="rows of a split, chosen by the seed; default: all"
    )


def _choice_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--categories",
        default="all",
        help="all, names separated by commas, or base65, novel15, few8 (COCO), lvis13, lvis6",
    )
    add("--shots", type=_positive, help="images of each category in train, at most; default: all")
    _rows_arguments(parser)
    add("--negatives", type=_share, default=0.0, help="rows without objects, a share of the others")


def _classification_arguments(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    add = parser.add_argument
    add("--source", type=Path, required=True, help="folder or CSV file")
    add("--reader", choices=sorted(READERS), default="folder", help="layout of the source")
    add("--images", type=Path, help="where the paths of a CSV file start; default: its folder")
    add("--shots", type=_positive, help="images of each class in train, at most; default: all")
    add("--thing", help='what the images show, as in "an image containing a plant"')
    add("--kind", help='what is asked for, as in "the species of the plant"')
    parser.set_defaults(run=_build_classification)


def _grounding_arguments(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    _space_arguments(parser)
    add = parser.add_argument
    add("--source", type=Path, required=True, help="a ReasonSeg folder, or one with train, val ...")
    add("--first_only", action="store_true", help="an image's first instruction and polygon only")
    add("--compat_prompt", action="store_true", help="the original's prompt to the letter")
    parser.set_defaults(run=_build_grounding)


def _refcoco_arguments(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    _space_arguments(parser)
    _rows_arguments(parser)
    add = parser.add_argument
    add("--source", type=Path, required=True,
        help="folder of instances.json and refs(...).p, or one of several such files")  # fmt: skip
    add("--images", type=Path, required=True, help="COCO's train2014 or train2017")
    add("--compat_prompt", action="store_true", help="the original's prompt to the letter")
    parser.set_defaults(run=_build_refcoco)


def _dataset_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dataset_name", required=True, help="as in training")
    add("--dataset_config", help="configuration of a hub data set, or of a folder like one")
    add("--dataset_streaming", action="store_true", help="read parquet in parts, as in training")
    add("--split", default="train")
    add("--task", choices=TASKS, default="auto")
    add("--columns", nargs="+", default=[], help="columns of other names, as in training")
    add("--box_space", choices=BOX_SPACES, default="auto", help="as in training")


def _mia_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dataset_name", required=True, help="questions about one image each, as in training; "
        "also LLaVA's JSON")  # fmt: skip
    add("--dataset_config", help="configuration of a hub data set, or of a folder with a README.md")
    add("--split", default="train")
    add("--images", type=Path, help="where image paths of a JSON file start; default: its folder")
    add("--model_name_or_path", required=True, help="the model that answers, as in training")
    _output_arguments(parser)
    add("--seed", type=_natural, default=0, help="of every choice")
    add("--max_rows", type=_positive, help="take the first so many rows; default: all")
    add("--test_share", type=_share, default=0.0,
        help="of the images, about, whose scenes are the split test")  # fmt: skip
    scenes = parser.add_argument_group("scenes")
    add = scenes.add_argument
    add("--shares", type=_weights, default="sequence=15.1,collage=9.3,pip=4.5",
        help="weights of the kinds of scenes")  # fmt: skip
    add("--sequence_images", type=_numbers, default="2,3,4,5",
        help="numbers of images, each as likely; 2,2,3: twice as often 2 as 3")  # fmt: skip
    add("--collage_images", type=_numbers, default="2,3,4,6,9", help="numbers of cells, likewise")
    add("--companions", choices=("source", "all"), default="source",
        help="other images of a scene: of the row's source (its column source, or the first folder "
        "in which paths differ), or of any")  # fmt: skip
    add("--cell", type=_positive, default=448, help="side of a collage's cell in pixels")
    add(
        "--gutter",
        type=_natural,
        default=40,
        help="between cells, and of the labels' strip, in pixels",
    )
    add("--label_size", type=_positive, default=36, help="of the labels, in pixels")
    answers = parser.add_argument_group("answers")
    add = answers.add_argument
    add(
        "--mode",
        choices=("corrupted", "clean"),
        default="corrupted",
        help="noise on the target of collages and pictures in pictures, as MIA-DPO, or none",
    )
    add("--layer", type=int, help="where attention is measured, from 0; default: the middle one")
    add("--batch_size", type=_positive, default=16, help="scenes answered together")
    add("--max_completion_length", type=_positive, default=512, help="longest answer in tokens")
    add("--max_prompt_length", type=_positive, help="a longer scene is left out")
    add("--rollout_cache_tokens", type=_positive, help="as in training")
    add("--min_pixels", type=int, help="as in training")
    add("--max_pixels", type=int, help="as in training; of each image")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
        help="auto: bfloat16 on a GPU, else float32")  # fmt: skip
    chosen = parser.add_argument_group("selection")
    add = chosen.add_argument
    add(
        "--thresholds",
        type=_weights,
        default="",
        help="attention limits that differ from MIA-DPO's, such as sequence2=0.7,pip2=0.9",
    )
    add("--min_perplexity", type=float, default=1.1, help="of an answer; it has to be above")
    add("--max_length_ratio", type=float, default=10.0, help="of the two answers, in characters")
    add("--min_edit_distance", type=float, default=0.05, help="of the two, share of the longer")
    add("--pictures", type=_natural, default=12,
        help="kept and dropped scenes on the sheet OUTPUT.png; 0: no sheet")  # fmt: skip
    parser.set_defaults(run=_mia)


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    _dataset_arguments(parser)
    add = parser.add_argument
    add("--output", type=Path, default=Path("inspect.png"), help="sheet of pictures")
    add("--pictures", type=_positive, default=20, help="on the sheet")
    parser.set_defaults(run=_inspect)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    _dataset_arguments(parser)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="LLaMA-Factory's data folder, or a new one")
    add("--name", help="of the data set there; default: the source's name")
    add("--overwrite", action="store_true", help="replace a data set of that name")
    add("--compat_prompt", action="store_true", help="as in training")
    parser.set_defaults(run=_export)


def _weights(text: str) -> dict[str, float]:
    try:
        pairs = [part.split("=") for part in text.split(",") if part.strip()]
        weights = {name.strip(): float(value) for name, value in pairs}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected name=number,..., got {text!r}") from error
    if len(weights) < len(pairs):
        raise argparse.ArgumentTypeError(f"expected each name once, got {text!r}")
    return weights


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers, got {text!r}") from error


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a share in [0, 1), got {text!r}")


def _positive(text: str) -> int:
    return _natural(text, least=1)


def _natural(text: str, least: int = 0) -> int:
    with contextlib.suppress(ValueError):
        if int(text) >= least:
            return int(text)
    raise argparse.ArgumentTypeError(f"expected a number, {least} or more, got {text!r}")


def _progress(items: Any, total: int | None = None) -> Any:
    from tqdm import tqdm

    return tqdm(items, total=total, unit="row")


# --- Building --------------------------------------------------------------------------------


def _build_detection(arguments: argparse.Namespace) -> None:
    sources = (arguments.annotations, arguments.images, arguments.test_annotations,
               arguments.test_images)  # fmt: skip
    check_output(arguments.output, arguments.overwrite, sources)
    if arguments.test_share and arguments.test_annotations:
        raise ValueError("--test_share: expected no --test_annotations beside it; leave one out")
    if arguments.test_images and not arguments.test_annotations:
        raise ValueError("--test_images: expected --test_annotations with it; pass both")
    sources = {"train": read_annotations(arguments.annotations, arguments.kind, arguments.images)}
    if arguments.test_annotations:
        sources["test"] = read_annotations(
            arguments.test_annotations, arguments.kind, arguments.test_images or arguments.images
        )
    _write_detection(arguments, sources, arguments.kind)


def _build_folder(arguments: argparse.Namespace) -> None:
    source, images = arguments.source, getattr(arguments, "images", None)
    check_output(arguments.output, arguments.overwrite, (source, images))
    if arguments.kind == "openimages":
        sources = read_openimages(source, images, negatives=arguments.negatives > 0)
    else:
        sources = {"yolo": read_yolo, "voc": read_voc}[arguments.kind](source)
    if arguments.test_share and "test" in sources:
        raise ValueError("--test_share: the source has a split test of its own; leave it out")
    _write_detection(arguments, sources, "coco")


def _write_detection(
    arguments: argparse.Namespace, sources: Mapping[str, Annotations], kind: str
) -> None:
    """Rows about the boxes of each split; the first split says which categories there are."""
    first = next(iter(sources.values()))
    categories = pick_categories(first, kind, arguments.categories)
    built, splits, extent_for = Built(), {}, _extent_for(arguments)
    for split, source in sources.items():
        chosen = categories
        if source is not first:
            chosen = _same_categories(first, categories, source, built, split)
        images = usable_images(source, chosen, built, allow_missing=arguments.allow_missing)
        plan = partial(
            plan_detection,
            source,
            categories=chosen,
            seed=arguments.seed,
            max_rows=arguments.max_rows,
            negatives=arguments.negatives,
            extent_for=extent_for,
        )
        held_out: set[int] = set()
        if arguments.test_share and source is first:
            ids = sorted(source.images)
            number = round(arguments.test_share * len(ids))
            held_out = set(random.Random(arguments.seed).sample(ids, number))
            splits["test"] = plan(images={i: p for i, p in images.items() if i in held_out})
        kept = {i: p for i, p in images.items() if i not in held_out}
        shots = {"shots": arguments.shots, "built": built} if source is first else {}
        splits[split] = plan(images=kept, **shots)
    columns = {"problem": "string", "solution": "string", "category": "string", "image_id": "int64"}
    splits = {split: splits[split] for split in sorted(splits, key=lambda s: s != "train")}
    _write(arguments, splits, columns, built, f"{arguments.kind.upper()} detection", "detection")


def _same_categories(
    annotations: Annotations,
    categories: Sequence[int],
    other: Annotations,
    built: Built,
    split: str,
) -> list[int]:
    """The categories by their names in another split, without those of which it has no box."""
    numbers = {name: number for number, name in other.categories.items()}
    seen = {number for _, number in other.boxes}
    chosen = []
    for name in (annotations.categories[number] for number in categories):
        if numbers.get(name) in seen:
            chosen.append(numbers[name])
        else:
            built.leave_out(f"category without a box in the {split} annotations", name)
    if not chosen:
        raise ValueError(f"{split} annotations: not a single box of the chosen categories")
    return chosen


def _build_classification(arguments: argparse.Namespace) -> None:
    check_output(arguments.output, arguments.overwrite, (arguments.source, arguments.images))
    reader = READERS[arguments.reader]
    if not arguments.source.exists():
        raise FileNotFoundError(f"--source {arguments.source}: no such file or folder")
    if arguments.source.is_dir() == (arguments.reader == "csv"):
        expected = "a CSV file" if arguments.reader == "csv" else "a folder"
        raise ValueError(f"--source {arguments.source}: expected {expected}; see --reader")
    if arguments.images and arguments.reader != "csv":
        raise ValueError(f"--images: expected --reader csv with it, got {arguments.reader}")
    if arguments.images:
        reader = partial(read_csv, images=arguments.images)
    built = Built()
    rows = reader(arguments.source, built)
    if arguments.allow_missing:  # before so many of them are drawn
        rows = drop_missing({"": rows}, built, allow_missing=True)[""]
    thing, kind = CLASSIFICATION_SETS.get(arguments.reader, ("object", "class"))
    splits = plan_classification(
        rows,
        thing=arguments.thing or thing,
        kind=arguments.kind or kind,
        seed=arguments.seed,
        shots=arguments.shots,
        test_share=arguments.test_share,
        built=built,
    )
    columns = {"problem": "string", "solution": "string", "label": "string"}
    title = f"{arguments.reader} classification"
    _write(arguments, splits, columns, built, title, "classification")


def _build_grounding(arguments: argparse.Namespace) -> None:
    check_output(arguments.output, arguments.overwrite, (arguments.source,))
    if not arguments.source.is_dir():
        raise ValueError(f"--source {arguments.source}: expected a folder, got none")
    built = Built()
    names = {"train": "train", "val": "validation", "test": "test"}
    folders = {
        split: arguments.source / name
        for name, split in names.items()
        if (arguments.source / name).is_dir()
    }
    rows = {
        split: read_lisa(folder, built, first_only=arguments.first_only)
        for split, folder in (folders or {"train": arguments.source}).items()
    }
    _write_grounding(arguments, rows, built, "LISA grounding")


def _build_refcoco(arguments: argparse.Namespace) -> None:
    check_output(arguments.output, arguments.overwrite, (arguments.source, arguments.images))
    built = Built()
    rows = read_refcoco(arguments.source, arguments.images, built)
    if arguments.allow_missing:  # before so many of them are drawn
        rows = drop_missing(rows, built, allow_missing=True)
    if arguments.max_rows:
        rng = random.Random(arguments.seed)
        rows = {s: rng.sample(part, min(len(part), arguments.max_rows)) for s, part in rows.items()}
    _write_grounding(arguments, rows, built, "RefCOCO grounding", masks=False)


def _write_grounding(
    arguments: argparse.Namespace,
    rows: Mapping[str, Sequence[Asked]],
    built: Built,
    title: str,
    *,
    masks: bool = True,
) -> None:
    import datasets

    splits = {
        split: plan_grounding(
            asked,
            compat=arguments.compat_prompt,
            extent_for=_extent_for(arguments),
            masks=masks,
        )
        for split, asked in rows.items()
    }
    if arguments.test_share:
        if set(splits) != {"train"}:
            raise ValueError("--test_share: the source has splits of its own; leave it out")
        splits = _hold_out(splits["train"], arguments.test_share, arguments.seed)
    columns: dict[str, Any] = {"problem": "string", "solution": "string", "image_id": "int64"}
    if masks:
        columns["mask"] = datasets.Image()
    _write(arguments, splits, columns, built, title, "grounding")


def _hold_out(plans: Sequence[Plan], share: float, seed: int) -> dict[str, list[Plan]]:
    """By image: no image is in both splits."""
    images = sorted({plan.image for plan in plans})
    test = set(random.Random(seed).sample(images, round(share * len(images))))
    return {
        "train": [plan for plan in plans if plan.image not in test],
        "test": [plan for plan in plans if plan.image in test],
    }


def _extent_for(arguments: argparse.Namespace) -> Callable[[int, int], Extent] | None:
    if FAMILY_SPACE[arguments.model_family] != "pixels":
        return None
    if arguments.min_pixels > arguments.max_pixels:
        raise ValueError(
            f"--min_pixels {arguments.min_pixels}: expected at most --max_pixels "
            f"{arguments.max_pixels}"
        )
    from virft_fast.models.processing import resized

    def extent(width: int, height: int) -> Extent:
        return resized(
            width, height, min_pixels=arguments.min_pixels, max_pixels=arguments.max_pixels
        )

    return extent


def _write(
    arguments: argparse.Namespace,
    splits: Mapping[str, Sequence[Plan]],
    columns: Mapping[str, Any],
    built: Built,
    title: str,
    task: str,
) -> None:
    import datasets

    features = {
        name: datasets.Value(kind) if isinstance(kind, str) else kind
        for name, kind in columns.items()
    }
    if getattr(arguments, "model_family", "") and _extent_for(arguments):
        features["extent"] = datasets.List(datasets.Value("int64"))
    splits = drop_missing(splits, built, allow_missing=arguments.allow_missing)
    write_dataset(
        arguments.output,
        splits,
        features,
        built,
        card=lambda built: _card(arguments, title, built),
        check=lambda row: check_solution(task, row["solution"], row.get("extent")),
        progress=_progress,
    )
    print("\n".join(built.lines()))
    print(f"written: {arguments.output}")


def _card(arguments: argparse.Namespace, title: str, built: Built) -> str:
    files = "\n".join(
        f"  - split: {split}\n    path: data/{split}-*" for split, n in built.rows.items() if n
    )
    given = {
        name: value
        for name, value in sorted(vars(arguments).items())
        if name != "run" and value is not None and value is not False
    }
    return "\n".join(
        [
            "---",
            f"configs:\n- config_name: default\n  data_files:\n{files}",
            "---",
            f"# {title}",
            "",
            "Built by `python -m virft_fast.data build`. Columns: `image`, `problem` (the prompt), "
            "`solution` (the ground truth in the answer's form), and what they were made of.",
            "",
            *(f"- {line}" for line in built.lines()),
            "",
            "Arguments:",
            "",
            *(f"- {name}: {value}" for name, value in given.items()),
            "",
        ]
    )


# --- Preference pairs ------------------------------------------------------------------------


def _mia(arguments: argparse.Namespace) -> None:
    from virft_fast import dist, mia

    device = dist.init()
    try:
        _mia_on_each_rank(arguments, device, mia, dist)
    finally:
        dist.shutdown()


def _mia_on_each_rank(arguments: argparse.Namespace, device: Any, mia: Any, dist: Any) -> None:
    from tqdm import tqdm

    from virft_fast.models.qwen_vl import weights_stamp

    out = arguments.output
    sources = (arguments.dataset_name, arguments.images, arguments.model_name_or_path)
    check_output(out, arguments.overwrite, sources)
    sheet = out.with_name(f"{out.name}.png")
    if arguments.pictures and sheet.exists() and not arguments.overwrite:
        raise ValueError(f"{sheet}: exists already; pass --overwrite, --pictures 0 or another name")
    if arguments.images and not arguments.images.is_dir():
        raise ValueError(f"--images {arguments.images}: expected a folder, got none")
    mia.edit_distance("", "")  # better without its package now than after the answers
    rows = load_rows(
        arguments.dataset_name,
        arguments.split,
        dataset_config=arguments.dataset_config,
        image_folder=arguments.images,
    )
    selection = mia.Selection(
        {_scene_key(name): value for name, value in arguments.thresholds.items()},
        arguments.min_perplexity,
        arguments.max_length_ratio,
        arguments.min_edit_distance,
    )
    layout = Layout(
        arguments.shares,
        arguments.sequence_images,
        arguments.collage_images,
        arguments.cell,
        arguments.gutter,
        arguments.label_size,
        label_indent=arguments.gutter // 2,
    )
    scenes = mia.Scenes(
        rows,
        layout,
        seed=arguments.seed,
        noise=arguments.mode == "corrupted",
        groups=mia.source_groups(rows) if arguments.companions == "source" else None,
        test_share=arguments.test_share,
    )
    answering = _answering(arguments, device, mia)
    # All that an answer depends on but its scene; how answers are selected may change.
    asked = ("dataset_name", "dataset_config", "split", "images", "model_name_or_path", "seed",
             "shares", "sequence_images", "collage_images", "cell", "gutter", "label_size", "mode",
             "layer", "max_completion_length", "max_prompt_length", "min_pixels", "max_pixels",
             "dtype", "test_share", "companions")  # fmt: skip
    settings = {name: getattr(arguments, name) for name in asked}
    settings |= {"images": str(arguments.images), "weights": weights_stamp(answering.path)}
    journal = mia.open_journal(
        out.with_name(f".{out.name}.answers.jsonl"), settings, overwrite=arguments.overwrite
    )
    indices = range(min(len(rows), arguments.max_rows or len(rows)))
    with tqdm(total=len(indices), unit="scene", disable=not dist.is_main()) as bar:
        answers = mia.answer_all(
            scenes, answering, journal, indices, batch_size=arguments.batch_size,
            progress=bar.update,
        )  # fmt: skip
    if journal is None:
        return
    reasons = {index: mia.reasons_against(a, selection) for index, a in answers.items()}
    print("\n".join(mia.table(answers, reasons)))
    counts = mia.write_pairs(
        out, scenes, answers, reasons, selection, progress=_progress,
        card=lambda: _mia_card(arguments, mia.table(answers, reasons)),
    )  # fmt: skip
    print(", ".join(f"{split}: {count} pairs" for split, count in counts.items()))
    print(f"written: {out}")
    if picture := mia.attention_sheet(scenes, answering, answers, reasons, arguments.pictures):
        picture.save(sheet)
        print(f"written: {sheet}")
    journal.remove()


def _answering(arguments: argparse.Namespace, device: Any, mia: Any) -> Any:
    import torch

    from virft_fast.models.processing import load_processor
    from virft_fast.models.qwen_vl import Policy, load_model, read_config
    from virft_fast.models.tiny import resolve_model_path
    from virft_fast.rollout.backends import check_cache_limit, make_rollout

    path = resolve_model_path(arguments.model_name_or_path)
    processor = load_processor(
        path, min_pixels=arguments.min_pixels, max_pixels=arguments.max_pixels
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if arguments.dtype != "auto":
        dtype = getattr(torch, arguments.dtype)
    check_cache_limit(
        "native",
        arguments.rollout_cache_tokens,
        num_generations=1,
        max_prompt_length=arguments.max_prompt_length,
        max_completion_length=arguments.max_completion_length,
        device=device,
    )
    layers = read_config(path).text_config.num_hidden_layers
    layer = layers // 2 if arguments.layer is None else arguments.layer
    if not 0 <= layer < layers:
        raise ValueError(f"--layer: expected 0 to {layers - 1}, got {layer}")
    policy = Policy(load_model(path, dtype=dtype).to(device)).eval()
    rollout = make_rollout(
        "native",
        lambda: contextlib.nullcontext(policy),
        processor.tokenizer,
        device=device,
        max_cache_tokens=arguments.rollout_cache_tokens,
    )
    return mia.Answering(
        policy,
        rollout,
        processor,
        layer,
        arguments.max_completion_length,
        device,
        arguments.max_prompt_length,
        path=str(path),
    )


def _scene_key(name: str) -> tuple[str, int]:
    kind = name.rstrip("0123456789")
    number = name[len(kind) :] or ("2" if kind == "pip" else "0")
    return kind, int(number)


def _mia_card(arguments: argparse.Namespace, lines: Sequence[str]) -> str:
    given = {k: v for k, v in sorted(vars(arguments).items()) if k != "run" and v is not None}
    return "\n".join(
        [
            "# Multi-image preference pairs (MIA-DPO)",
            "",
            "Made by `python -m virft_fast.data mia`. Columns as TRL's DPOTrainer takes them: "
            "`images`, `prompt`, `chosen` (the row's own answer), `rejected` (the model's), and "
            "why the pair was kept. `selection.jsonl` has every row, kept or not.",
            "",
            *(f"    {line}" for line in lines),
            "",
            *(f"- {name}: {value}" for name, value in given.items()),
            "",
        ]
    )


# --- Looking and exporting -------------------------------------------------------------------


def _load(arguments: argparse.Namespace) -> Any:
    return load_rows(
        arguments.dataset_name,
        arguments.split,
        dataset_config=arguments.dataset_config,
        streaming=arguments.dataset_streaming,
        columns=column_names(arguments.columns),
    )


def _inspect(arguments: argparse.Namespace) -> None:
    check_picture(arguments.output)
    rows = _load(arguments)
    found = inspect(
        rows,
        task=arguments.task,
        pictures=arguments.pictures,
        progress=_progress,
        box_space=arguments.box_space,
    )
    print("\n".join(found.lines()))
    if found.pictures:
        found.sheet().save(arguments.output)
        print(f"written: {arguments.output}")


def _export(arguments: argparse.Namespace) -> None:
    source = Path(arguments.dataset_name).expanduser().resolve()
    known = source.suffix in FILE_SUFFIXES
    name = arguments.name if arguments.name is not None else source.stem if known else source.name
    check_export(arguments.output, name, overwrite=arguments.overwrite)
    if source in [(arguments.output / file).resolve() for file in (name, f"{name}.json")]:
        raise ValueError(f"--name {name}: the source {source} would be replaced; pass another")
    rows = _load(arguments)
    task, space = arguments.task, arguments.box_space
    options = {
        "compat_prompt": arguments.compat_prompt,
        "box_space": "thousandths" if space == "auto" else space,
    }
    if task == "auto":
        task = detect_task(first_solutions(SampleDataset(rows, **options)))
    samples = SampleDataset(rows, check_solution=partial(check_solution, task), **options)
    found = survey(samples, boxes=open_space(task, space))
    warned = found.settle_boxes()
    print("\n".join([*found.lines(arguments.split), *([f"  warning: {warned}"] if warned else [])]))
    count, bad = export_llamafactory(
        samples, arguments.output, name, overwrite=arguments.overwrite, progress=_progress
    )
    for row in bad[:10]:
        print(f"row {row.index} left out: {row.reason}")
    print(f"{count} rows, {len(bad)} left out")
    print(f"written: {arguments.output / name}.json, {arguments.output / 'dataset_info.json'}")


if __name__ == "__main__":
    end_process(main())
