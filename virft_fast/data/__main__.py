"""`python -m virft_fast.data`: build, inspect and export data sets.

build coco|lvis|yolo|voc|openimages       training rows from detection annotations
build refcoco|grounding|classification    training rows for grounding and classification
mia                                       same as `python -m virft_fast.mia`
inspect                                   statistics, bad rows and a contact sheet
export llamafactory                       files for supervised fine-tuning elsewhere
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from virft_fast.cli import Parser, exit_status, output_arguments, positive, share
from virft_fast.commands import end_process
from virft_fast.config import BOX_SPACES, TASKS, column_names
from virft_fast.console import unbreakable
from virft_fast.data import ParquetRows, load_rows
from virft_fast.data.accounts import Built, dataset_card
from virft_fast.data.coco import pick_categories, plan_detection, same_categories, usable_images
from virft_fast.data.export import check_export, export_llamafactory
from virft_fast.data.inspection import check_picture, inspect
from virft_fast.data.instances import Annotations, read_annotations
from virft_fast.data.labelled_images import READERS, plan_classification, read_csv
from virft_fast.data.lisa import Instruction, plan_grounding, read_lisa
from virft_fast.data.loading import FILE_SUFFIXES
from virft_fast.data.openimages import read_openimages
from virft_fast.data.refcoco import read_refcoco
from virft_fast.data.samples import open_samples
from virft_fast.data.survey import open_space, survey
from virft_fast.data.voc import read_voc
from virft_fast.data.writing import ExtentFor, Plan, check_new_dataset, drop_missing, write_dataset
from virft_fast.data.yolo import read_yolo
from virft_fast.tasks import check_solution
from virft_fast.tasks.coordinates import FAMILY_SPACE
from virft_fast.tasks.prompts import CLASSIFICATION_SETS

if TYPE_CHECKING:
    import datasets

T = TypeVar("T")
Add = Callable[..., argparse.Action]  # a parser's add_argument
Command = Callable[[argparse.Namespace], None]
MAX_ROWS_HELP = "maximum number of rows per split, chosen at random; default: all"


@unbreakable()
def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 2 for unusable input, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["mia"]:
        from virft_fast.mia.__main__ import main as mia_main  # its imports take seconds

        return mia_main(argv[1:])
    arguments = make_parser().parse_args(argv)
    return exit_status("data", partial(arguments.run, arguments))


def make_parser() -> argparse.ArgumentParser:
    """The parser for all commands."""
    parser = Parser(prog="python -m virft_fast.data")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("build", help="make a data set")
    command.set_defaults(run=_build)
    build = command.add_subparsers(required=True, metavar="kind")
    files, folder = [_boxes, _annotations, _choices], [_boxes, _folder, _choices]
    kinds: dict[str, tuple[str, Command, Sequence[Callable[[Add], None]]]] = {
        "coco": ("COCO's instances files", _build_detection, files),
        "lvis": ("LVIS's instances files", _build_detection, files),
        "yolo": ("a folder in Ultralytics' layout", _build_folder, folder),
        "voc": ("a folder in Pascal VOC's layout", _build_folder, folder),
        "openimages": ("a folder in Open Images' layout", _build_folder, [*folder, _openimages]),
        "classification": ("labeled images", _build_classification, [_labeled]),
        "grounding": ("LISA's ReasonSeg folders", _build_grounding, [_boxes, _reason_seg]),
        "refcoco": ("RefCOCO, RefCOCO+ or RefCOCOg", _build_refcoco, [_boxes, _references]),
    }
    for kind, (source, run, groups) in kinds.items():
        command = build.add_parser(kind, help=f"from {source}")
        output_arguments(command)
        for group in (_common, *groups):
            group(command.add_argument)
        command.set_defaults(build=run, **({"kind": kind} if _choices in groups else {}))
    commands.add_parser("mia", add_help=False, help="the same as python -m virft_fast.mia")
    _inspect_arguments(commands.add_parser("inspect", help="count and draw a data set's rows"))
    command = commands.add_parser("export", help="write a data set for another trainer")
    export = command.add_subparsers(required=True, metavar="trainer")
    _export_arguments(export.add_parser("llamafactory", help="sharegpt JSON and dataset_info.json"))
    return parser


def _common(add: Add) -> None:
    add("--allow_missing", action="store_true", help="skip rows whose image is missing")
    add("--seed", type=int, default=0, help="seed of every random choice")
    add("--test_share", type=share, default=0.0, help="share of images held out as split test")


def _boxes(add: Add) -> None:
    add("--model_family", choices=sorted(FAMILY_SPACE), default="qwen2_vl",
        help="unit of boxes: 0 to 1000; qwen2_5_vl: pixels of the resized image")  # fmt: skip
    purpose = "that of the training run; matters for boxes in pixels"
    add("--min_pixels", type=positive, default=3136, help=purpose)
    add("--max_pixels", type=positive, default=401_408, help=purpose)


def _annotations(add: Add) -> None:
    add("--annotations", type=Path, required=True, help="instances file of the training images")
    add("--images", type=Path, required=True, help="folder of the training images")
    add("--test_annotations", type=Path, help="instances file of the test images")
    add("--test_images", type=Path, help="folder of the test images; default: --images")


def _folder(add: Add) -> None:
    add("--source", type=Path, required=True, help="folder to read, or for yolo its data.yaml")


def _openimages(add: Add) -> None:
    add("--images", type=Path, required=True, help="folder of the images; others are not read")


def _choices(add: Add) -> None:
    add("--categories", default="all",
        help="all, names separated by commas, or base65, novel15, few8 (COCO), lvis13, lvis6"
    )  # fmt: skip
    add("--shots", type=positive, help="maximum training images per category; default: all")
    add("--max_rows", type=positive, help=MAX_ROWS_HELP)
    add("--negatives", type=share, default=0.0, help="rows about absent categories, per other row")


def _labeled(add: Add) -> None:
    add("--source", type=Path, required=True, help="folder, or with --reader csv a CSV file")
    add("--reader", choices=sorted(READERS), default="folder", help="layout of --source")
    add("--images", type=Path, help="folder where paths in a CSV file start; default: the file's")
    add("--shots", type=positive, help="maximum training images per class; default: all")
    add("--thing", help='what the images show: plant in "an image containing a plant"')
    add("--kind", help='what to answer with: species in "the species of the plant"')


def _reason_seg(add: Add) -> None:
    add("--source", type=Path, required=True, help="ReasonSeg folder, or one of train, val, test")
    add("--first_only", action="store_true", help="first instruction and polygon of each image")
    add("--compat_prompt", action="store_true", help="use Visual-RFT's exact prompt")


def _references(add: Add) -> None:
    add("--max_rows", type=positive, help=MAX_ROWS_HELP)
    add("--source", type=Path, required=True,
        help="folder of instances.json and refs(...).p, or one of several refs files")  # fmt: skip
    add("--images", type=Path, required=True, help="COCO's folder train2014 or train2017")
    add("--compat_prompt", action="store_true", help="use Visual-RFT's exact prompt")


def _dataset(add: Add) -> None:
    add("--dataset_name", required=True, help="as in training")
    add("--dataset_config", help="as in training")
    add("--dataset_streaming", action="store_true", help="as in training")
    add("--split", default="train", help="split to read")
    add("--task", choices=TASKS, default="auto", help="as in training")
    add("--columns", nargs="+", default=[], help="as in training")
    add("--box_space", choices=BOX_SPACES, default="auto", help="as in training")


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _dataset(add)
    add("--output", type=Path, default=Path("inspect.png"), help="PNG of images with their boxes")
    add("--pictures", type=positive, default=20, help="number of images in the PNG")
    parser.set_defaults(run=_inspect)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _dataset(add)
    add("--output", type=Path, required=True, help="LLaMA-Factory's data folder, or a new one")
    add("--name", help="name of the data set there; default: the source's")
    add("--overwrite", action="store_true", help="replace a data set of that name")
    add("--compat_prompt", action="store_true", help="as in training")
    parser.set_defaults(run=_export)


def _progress(items: Iterable[T], total: int | None = None) -> Iterable[T]:
    from tqdm import tqdm

    return tqdm(items, total=total, unit="row")


# --- Building --------------------------------------------------------------------------------


def _build(arguments: argparse.Namespace) -> None:
    names = ("source", "annotations", "images", "test_annotations", "test_images")
    sources = [getattr(arguments, name, None) for name in names]
    check_new_dataset(arguments.output, arguments.overwrite, sources)
    arguments.build(arguments)


def _build_detection(arguments: argparse.Namespace) -> None:
    if arguments.test_share and arguments.test_annotations:
        raise ValueError("--test_share: expected no --test_annotations with it; leave one out")
    if arguments.test_images and not arguments.test_annotations:
        raise ValueError("--test_images: expected only with --test_annotations; pass both")
    sources = {"train": read_annotations(arguments.annotations, arguments.kind, arguments.images)}
    if arguments.test_annotations:
        sources["test"] = read_annotations(
            arguments.test_annotations, arguments.kind, arguments.test_images or arguments.images
        )
    _write_detection(arguments, sources, arguments.kind)


def _build_folder(arguments: argparse.Namespace) -> None:
    source, negatives = arguments.source, arguments.negatives > 0
    if arguments.kind == "openimages":
        sources = read_openimages(source, arguments.images, negatives=negatives)
    else:
        sources = {"yolo": read_yolo, "voc": read_voc}[arguments.kind](source)
    if arguments.test_share and "test" in sources:
        raise ValueError("--test_share: the source has a split test of its own; leave it out")
    _write_detection(arguments, sources, "coco")


def _write_detection(
    arguments: argparse.Namespace, sources: Mapping[str, Annotations], kind: str
) -> None:
    """Write the rows of each split. All splits use the categories of the first one."""
    first = next(iter(sources.values()))
    categories = pick_categories(first, kind, arguments.categories)
    names = [first.categories[number] for number in categories]
    built, splits = Built(), {}
    for split, source in sources.items():
        chosen = categories if source is first else same_categories(names, source, built, split)
        images = usable_images(source, chosen, built, allow_missing=arguments.allow_missing)
        plan = partial(
            plan_detection, source, categories=chosen, seed=arguments.seed,
            max_rows=arguments.max_rows, negatives=arguments.negatives,
            extent_for=_extent_for(arguments),
        )  # fmt: skip
        held_out: set[int] = set()
        if arguments.test_share and source is first:
            ids = sorted(source.images)
            number = round(arguments.test_share * len(ids))
            held_out = set(random.Random(arguments.seed).sample(ids, number))
            splits["test"] = plan(images={i: p for i, p in images.items() if i in held_out})
        kept = {i: p for i, p in images.items() if i not in held_out}
        shots = {"shots": arguments.shots, "built": built} if source is first else {}
        splits[split] = plan(images=kept, **shots)
    splits = {split: splits[split] for split in sorted(splits, key=lambda s: s != "train")}
    title = f"{arguments.kind.upper()} detection"
    _write(arguments, splits, built, title, "detection", category="string", image_id="int64")


def _build_classification(arguments: argparse.Namespace) -> None:
    reader = READERS[arguments.reader]
    if not arguments.source.exists():
        raise FileNotFoundError(f"--source {arguments.source}: no such file or folder")
    if arguments.source.is_dir() == (arguments.reader == "csv"):
        expected = "a CSV file" if arguments.reader == "csv" else "a folder"
        raise ValueError(f"--source {arguments.source}: expected {expected}; see --reader")
    if arguments.images and arguments.reader != "csv":
        raise ValueError(f"--images: expected only with --reader csv, got {arguments.reader}")
    if arguments.images:
        reader = partial(read_csv, images=arguments.images)
    built = Built()
    rows = reader(arguments.source, built)
    if arguments.allow_missing:  # before rows are sampled
        rows = drop_missing({"": rows}, built, allow_missing=True)[""]
    thing, kind = CLASSIFICATION_SETS.get(arguments.reader, ("object", "class"))
    splits = plan_classification(
        rows, thing=arguments.thing or thing, kind=arguments.kind or kind, seed=arguments.seed,
        shots=arguments.shots, test_share=arguments.test_share, built=built,
    )  # fmt: skip
    title = f"{arguments.reader} classification"
    _write(arguments, splits, built, title, "classification", label="string")


def _build_grounding(arguments: argparse.Namespace) -> None:
    source, built = arguments.source, Built()
    if not source.is_dir():
        raise ValueError(f"--source {source}: expected a folder, got none")
    folders = {"train": source / "train", "validation": source / "val", "test": source / "test"}
    folders = {split: folder for split, folder in folders.items() if folder.is_dir()}
    rows = {
        split: read_lisa(folder, built, first_only=arguments.first_only)
        for split, folder in (folders or {"train": source}).items()
    }
    _write_grounding(arguments, rows, built, "LISA grounding")


def _build_refcoco(arguments: argparse.Namespace) -> None:
    built = Built()
    rows = read_refcoco(arguments.source, arguments.images, built)
    if arguments.allow_missing:  # before rows are sampled
        rows = drop_missing(rows, built, allow_missing=True)
    if arguments.max_rows:
        rng = random.Random(arguments.seed)
        rows = {s: rng.sample(r, min(len(r), arguments.max_rows)) for s, r in rows.items()}
    _write_grounding(arguments, rows, built, "RefCOCO grounding", masks=False)


def _write_grounding(
    arguments: argparse.Namespace,
    rows: Mapping[str, Sequence[Instruction]],
    built: Built,
    title: str,
    *,
    masks: bool = True,
) -> None:
    extent_for, compat = _extent_for(arguments), arguments.compat_prompt
    plan = partial(plan_grounding, compat=compat, extent_for=extent_for, masks=masks)
    splits = {split: list(map(plan, of_split)) for split, of_split in rows.items()}
    if arguments.test_share:
        if set(splits) != {"train"}:
            raise ValueError("--test_share: the source has splits of its own; leave it out")
        splits = _hold_out(splits["train"], arguments.test_share, arguments.seed)
    columns = {"image_id": "int64"} | ({"mask": "image"} if masks else {})
    _write(arguments, splits, built, title, "grounding", **columns)


def _hold_out(plans: Sequence[Plan], share: float, seed: int) -> dict[str, list[Plan]]:
    """Split the rows by image, so that no image is in both splits."""
    images = sorted({plan.image for plan in plans})
    test = set(random.Random(seed).sample(images, round(share * len(images))))
    splits: dict[str, list[Plan]] = {"train": [], "test": []}
    for plan in plans:
        splits["test" if plan.image in test else "train"].append(plan)
    return splits


def _extent_for(arguments: argparse.Namespace) -> ExtentFor | None:
    if FAMILY_SPACE[arguments.model_family] != "pixels":
        return None
    low, high = arguments.min_pixels, arguments.max_pixels
    if low > high:
        raise ValueError(f"--min_pixels {low}: expected at most --max_pixels {high}")
    from virft_fast.models.processing import resized

    return partial(resized, min_pixels=low, max_pixels=high)


def _write(
    arguments: argparse.Namespace,
    splits: Mapping[str, Sequence[Plan]],
    built: Built,
    title: str,
    task: str,
    **columns: str,
) -> None:
    import datasets

    columns = {"problem": "string", "solution": "string", **columns}
    features = {
        name: datasets.Image() if kind == "image" else datasets.Value(kind)
        for name, kind in columns.items()
    }
    if getattr(arguments, "model_family", "") and _extent_for(arguments):
        features["extent"] = datasets.List(datasets.Value("int64"))
    splits = drop_missing(splits, built, allow_missing=arguments.allow_missing)
    write_dataset(
        arguments.output, splits, features, built, progress=_progress,
        card=lambda built: dataset_card(title, built, vars(arguments)),
        check=lambda row: check_solution(task, row["solution"], row.get("extent")),
    )  # fmt: skip
    print("\n".join(built.lines()))
    print(f"written: {arguments.output}")


# --- Looking and exporting -------------------------------------------------------------------


def _load(arguments: argparse.Namespace) -> datasets.Dataset | ParquetRows:
    return load_rows(
        arguments.dataset_name, arguments.split, dataset_config=arguments.dataset_config,
        streaming=arguments.dataset_streaming, columns=column_names(arguments.columns),
    )  # fmt: skip


def _inspect(arguments: argparse.Namespace) -> None:
    check_picture(arguments.output)
    rows = _load(arguments)
    result = inspect(
        rows, task=arguments.task, pictures=arguments.pictures, progress=_progress,
        box_space=arguments.box_space,
    )  # fmt: skip
    print("\n".join(result.lines()))
    if result.pictures:
        done = "replaced" if arguments.output.exists() else "written"
        result.sheet().save(arguments.output)
        print(f"{done}: {arguments.output}")


def _export(arguments: argparse.Namespace) -> None:
    source = Path(arguments.dataset_name).expanduser().resolve()
    name = source.stem if source.suffix in FILE_SUFFIXES else source.name
    name = name if arguments.name is None else arguments.name
    check_export(arguments.output, name, overwrite=arguments.overwrite)
    if source in [(arguments.output / file).resolve() for file in (name, f"{name}.json")]:
        raise ValueError(f"--name {name}: the source {source} would be replaced; pass another")
    rows = _load(arguments)
    space = arguments.box_space
    samples, task = open_samples(rows, arguments.task, space, compat_prompt=arguments.compat_prompt)
    surveyed = survey(samples, boxes=open_space(task, space))
    surveyed.settle_boxes()
    print("\n".join(surveyed.lines(arguments.split)))
    count, bad = export_llamafactory(
        samples, arguments.output, name, overwrite=arguments.overwrite, progress=_progress
    )
    for row in bad[:10]:
        print(f"row {row.index} left out: {row.reason}")
    print(f"{count} rows, {len(bad)} left out")
    print(f"written: {arguments.output / name}.json, {arguments.output / 'dataset_info.json'}")


if __name__ == "__main__":
    end_process(main())
