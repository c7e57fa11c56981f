"""One model's evaluation from questions to measures: resumable, on any number of ranks.

Beside the records, `X.jsonl`, lie `X.journal` while it runs, and `X.summary.json` when it is done.
Answers that are there, in either, are not asked for again, as long as the settings on which they
depend are the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from virft_fast import dist, tasks
from virft_fast.batch import Rollouts, Sample
from virft_fast.config import EvalConfig, UsageError, usage
from virft_fast.data import BadRows, SampleDataset, first_solutions, load_rows
from virft_fast.data.coco import pick_categories, pick_names, read_annotations
from virft_fast.data.loading import IMAGE_COLUMNS, IMAGE_TAG
from virft_fast.data.prompts import PromptSource
from virft_fast.evaluation import grounding
from virft_fast.evaluation.answering import answer
from virft_fast.evaluation.classification import closed_set
from virft_fast.evaluation.detection import Truth, make_truth, need_coco_eval, truth_of_records
from virft_fast.evaluation.journal import Journal, Record, beside, check_settings, is_record
from virft_fast.evaluation.questions import (
    ExistsMap,
    Images,
    detection_rows,
    exists_of_answers,
    files_of,
    find_images,
    other_size,
    presence_rows,
    read_exists_map,
)
from virft_fast.evaluation.results import Result, measure
from virft_fast.evaluation.scoring import rescored, scored
from virft_fast.models.processing import load_processor, resized
from virft_fast.models.qwen_vl import Policy, load_model, read_config, weights_stamp
from virft_fast.models.tiny import resolve_model_path
from virft_fast.rollout import Rollout
from virft_fast.rollout.backends import check_cache_limit, check_model, make_rollout
from virft_fast.tasks.answers import ClosedSet
from virft_fast.tasks.coordinates import FAMILY_SPACE
from virft_fast.tasks.prompts import asked_category

logger = logging.getLogger(__name__)

# (what is counted, how many) -> told how many are done.
Progress = Callable[[str, int], Callable[[int], None]]
Value = TypeVar("Value")
_TEXT_COLUMNS = (
    "problem", "prompt", "conversations", "solution", "extent", "category", "image_id",
)  # fmt: skip
# What a record that is taken over must have.
_NEEDED = {
    "answer": ("prompt", "completion", "solution", "rewards"),
    "presence": ("image_id", "completion"),
    "mask": ("sam",),
}
# What an answer depends on. Batch size and number of ranks are not among it, but for rounding.
_SETTINGS = (
    "model_name_or_path", "model_revision", "dataset_name", "dataset_config", "split", "task",
    "annotations", "images", "categories", "exists_map", "ask_exists",
    "compat_prompt",
    "max_completion_length", "max_prompt_length", "rollout_backend", "dtype",
    "attn_implementation", "min_pixels", "max_pixels",
)  # fmt: skip


@dataclass
class Questions:
    """What is asked, and what is known of the answers.

    Attributes:
        rows: of `load_rows`, or made from annotations.
        task: detection, classification or grounding.
        indices: the rows that are asked about.
        digest: changes with the questions and their images; on the main process.
        check: sample -> what is wrong with it, or None.
        truth: what COCO's protocol measures against, where the annotations say it.
        labels: the closed set of a classification.
        image_ids: of each row of a data set, as whole numbers.
        counts: what was left out, by name. missing: files of images that are not there.
        compat_prompt: see `SampleDataset`.
    """

    rows: Any
    task: str
    indices: Sequence[int]
    digest: str
    check: Callable[[Sample], str | None] | None = None
    truth: Truth | None = None
    labels: ClosedSet | None = None
    image_ids: Sequence[int] | None = None
    counts: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    compat_prompt: bool = False

    def samples(self) -> SampleDataset:
        return SampleDataset(
            self.rows,
            check_solution=partial(tasks.check_solution, self.task),
            compat_prompt=self.compat_prompt,
        )


class Evaluation:
    """One model under evaluation.

    Args:
        config: `model_name_or_path` is the model.
        output: where the records go.
        progress: makes a progress bar, on the main process.
    Raises:
        UsageError: model, data or settings can't be used.
    """

    def __init__(
        self, config: EvalConfig, output: Path, device: torch.device, progress: Progress
    ) -> None:
        self.config, self.output, self.device, self.progress = config, output, device, progress
        self.bad_rows = BadRows(config.max_bad_rows)
        self.journal: Journal | None = None  # the main process's
        self._finished: dict[str, list[Record]] = {}
        with usage():
            check_cache_limit(
                config.rollout_backend,
                config.rollout_cache_tokens,
                num_generations=1,
                max_prompt_length=config.max_prompt_length,
                max_completion_length=config.max_completion_length,
                device=device,
            )
            self.path = resolve_model_path(config.model_name_or_path)
            self.processor = load_processor(
                self.path,
                revision=config.model_revision,
                min_pixels=config.min_pixels,
                max_pixels=config.max_pixels,
            )
            self.family = read_config(self.path, config.model_revision).model_type

    def run(self, exists: ExistsMap | None = None) -> tuple[Result | None, ExistsMap | None]:
        """Ask, then measure.

        Args:
            exists: which categories to ask about, where another model has said that already.
        Returns:
            The result, on the main process; and which categories were asked about, if not all.
        """
        config = self.config
        with usage():
            if config.task in ("coco", "lvis"):
                need_coco_eval()
            images = images_of(config) if config.annotations else None
        if images is not None:
            if config.exists_map:
                exists = images.exists
            elif config.ask_exists and exists is None:
                exists = self._ask_exists(images)
        with usage():
            if images is None:
                questions = of_dataset(config)
            else:
                questions = of_annotations(config, images, exists, self._extent_for())
            names = config.reward_funcs or tasks.DEFAULT_REWARDS[questions.task]
            reward_funcs = tasks.load_reward_funcs(names)
            sam = self._sam(questions) if config.sam_path else None
            stamp = _reward_stamp(names)
        # An image that could not be asked what is in it is not asked about any more.
        asked = images is not None and config.ask_exists
        unseen = sum(image not in exists for image in images.paths) if asked else 0
        samples = questions.samples()
        self.load_sample = samples.get
        self._check_space(questions)

        def describe(rollouts: Rollouts) -> list[Record]:
            return [record | {"scored_by": stamp} for record in scored(rollouts, reward_funcs)]

        records = self._stage("answer", questions, samples, describe)
        if dist.is_main():
            records = self._rescored(records, reward_funcs, stamp)
        if questions.image_ids is not None:
            ids = questions.image_ids
            records = [record | {"image_id": ids[record["index"]]} for record in records]
        if questions.task == "detection":
            records = [record | {"category": _category(record)} for record in records]
        if sam is not None:
            records = self._masks(questions, sam, records)
        if not dist.is_main():
            return None, exists
        truth = questions.truth
        if config.task in ("coco", "lvis") and truth is None:
            with usage():
                truth = truth_of_records(records)
        result = measure(
            config.model_name_or_path,
            questions.task,
            records,
            [name for name, _ in reward_funcs],
            truth=truth,
            federated=config.task == "lvis" and images is not None,
            labels=questions.labels,
            counts={
                "questions": len(questions.indices),
                "answers": len(records),
                **questions.counts,
                "rows that can't be used": len(self.bad_rows) + unseen,
            },
            num_draws=config.bootstrap,
            seed=config.seed,
        )
        result.missing = questions.missing
        return result, exists

    # The model

    @cached_property
    def rollout(self) -> Rollout:
        """Loaded when the first question is asked: an evaluation that is done needs none."""
        config = self.config
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        dtype = dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        with usage():
            model = load_model(
                self.path,
                revision=config.model_revision,
                dtype=dtype,
                attn_implementation=config.attn_implementation,
            )
            policy = Policy(model.to(self.device)).eval()
            check_model(config.rollout_backend, policy)
        return make_rollout(
            config.rollout_backend,
            lambda: contextlib.nullcontext(policy),
            self.processor.tokenizer,
            device=self.device,
            max_cache_tokens=config.rollout_cache_tokens,
        )

    def generate(self, *arguments: Any, **options: Any) -> Rollouts:
        """See `virft_fast.rollout.Rollout.generate`."""
        return self.rollout.generate(*arguments, **options)

    def _extent_for(self) -> Callable[[int, int], tuple[int, int]] | None:
        """The space in which the model's family counts boxes; None: 0..1000."""
        if FAMILY_SPACE[self.family] != "pixels":
            return None
        images = self.processor.image_processor
        return partial(
            resized,
            min_pixels=images.size["shortest_edge"],
            max_pixels=images.size["longest_edge"],
            factor=images.patch_size * images.merge_size,
        )

    def _check_space(self, questions: Questions) -> None:
        """Boxes asked for in a space that the model's family does not count in."""
        in_pixels = "extent" in questions.rows.column_names
        if questions.task == "classification" or not dist.is_main() or self.config.annotations:
            return
        if in_pixels != (FAMILY_SPACE[self.family] == "pixels"):
            logger.warning(
                "%s counts boxes in %s, but %s asks for %s; build it with another --model_family, "
                "unless the model was trained on such rows",
                self.family,
                "0..1000" if in_pixels else "pixels",
                self.config.dataset_name,
                "pixels" if in_pixels else "0..1000",
            )

    # Stages

    def _ask_exists(self, images: Images) -> ExistsMap:
        rows = presence_rows(images)
        questions = Questions(
            rows,
            "presence",
            range(len(rows)),
            _digest([*_images_stamp(self.config, images), images.names]),
            check=partial(other_size, images.annotations),
        )
        records = self._stage("presence", questions, SampleDataset(rows), _described)
        return exists_of_answers(records, images.names)

    def _stage(
        self,
        name: str,
        questions: Questions,
        samples: SampleDataset,
        describe: Callable[[Rollouts], list[Record]],
    ) -> list[Record]:
        """Answers to all questions, those that are there already included."""
        config = self.config
        source = PromptSource(
            samples,
            self.processor,
            max_prompt_length=config.max_prompt_length,
            check=questions.check,
        )
        return answer(
            self,
            source.load,
            questions.indices,
            describe,
            # A row is known by its number, and another stage has rows of its own.
            bad_rows=self.bad_rows if name == "answer" else BadRows(config.max_bad_rows),
            batch_size=config.batch_size,
            max_completion_length=config.max_completion_length,
            done=_on_main(lambda: self._done(name, questions)),
            keep=partial(self._keep, name),
            progress=self.progress(name, len(questions.indices)),
        )

    def _rescored(self, records: list[Record], reward_funcs: list[Any], stamp: str) -> list[Record]:
        """Answers are taken over, their rewards only where the functions are the same."""
        stale = [place for place, r in enumerate(records) if r.get("scored_by") != stamp]
        for first in range(0, len(stale), self.config.batch_size):
            places = stale[first : first + self.config.batch_size]
            part = [records[place] for place in places]
            samples = [self.load_sample(record["index"]) for record in part]
            new = rescored(part, samples, self.processor.tokenizer, reward_funcs)
            for place, record in zip(places, new, strict=True):
                records[place] = record | {"scored_by": stamp}
        return records

    def _sam(self, questions: Questions) -> grounding.MaskModel:
        """Loaded before the questions, so that a wrong path is not found out after them."""
        if questions.task != "grounding":
            raise ValueError(f"--sam_path: expected a grounding task, got {questions.task}")
        if "mask" not in questions.rows.column_names:
            raise ValueError(
                f"--sam_path: expected a column mask in {self.config.dataset_name}, it has "
                f"{', '.join(questions.rows.column_names)}; build the data set with python -m "
                "virft_fast.data build grounding"
            )
        return grounding.MaskModel(self.config.sam_path, self.device)

    def _masks(
        self, questions: Questions, sam: grounding.MaskModel, records: list[Record]
    ) -> list[Record]:
        """The records with SAM's masks measured against the true ones, where the row has one."""
        path = self.config.sam_path
        stamp = _on_main(
            lambda: _digest([path, weights_stamp(path), _content(questions.rows, ["mask"])])
        )
        done = _on_main(lambda: self._done("mask", questions))
        masks = {mask["index"]: mask for mask in done if mask["sam"] == stamp}
        todo = [record for record in records if record["index"] not in masks]
        mine = todo[dist.rank() :: dist.world_size()]
        told = self.progress("mask", len(records))
        rows = questions.rows.with_format("arrow")
        together = grounding.IMAGES_TOGETHER * dist.world_size()
        for first in range(0, len(todo), together):
            part = mine[first // dist.world_size() :][: grounding.IMAGES_TOGETHER]
            areas = grounding.mask_areas(
                sam,
                part,
                [self.load_sample(record["index"]) for record in part],
                [grounding.true_mask(rows[record["index"]].to_pylist()[0]) for record in part],
            )
            found = [
                {"index": record["index"], "sam": stamp, **area}
                for record, area in zip(part, areas, strict=True)
            ]
            new = [mask for part in dist.all_gather_object(found) for mask in part]
            self._keep("mask", new)
            masks |= {mask["index"]: mask for mask in new}
            told(len(records) - len(todo) + min(first + together, len(todo)))
        questions.counts["rows without a true mask"] = sum("union" not in m for m in masks.values())
        return [record | {"mask": masks[record["index"]]} for record in records]

    # The journal

    def _done(self, stage: str, questions: Questions) -> list[Record]:
        """What there is of a stage; the first one opens the journal."""
        if self.journal is None:
            settings = {name: getattr(self.config, name) for name in _SETTINGS}
            settings["weights"] = weights_stamp(self.path)
            settings["questions"] = questions.digest
            path, afresh = beside(self.output, ".journal"), self.config.overwrite
            journal = Journal(path, settings, overwrite=afresh)
            if not afresh:
                self._finished = read_finished(self.output, journal)
            self.journal = journal
        return self._there(stage)

    def _there(self, stage: str) -> list[Record]:
        assert self.journal is not None, "the main process has one once it has run"
        records = [*self._finished.get(stage, []), *self.journal.records.get(stage, [])]
        known = [record for record in records if is_record(record, _NEEDED[stage])]
        return list({record["index"]: record for record in known}.values())

    def _keep(self, stage: str, records: list[Record]) -> None:
        if self.journal is not None:
            self.journal.add(stage, records)

    def presence(self) -> list[Record]:
        """The answers to which categories there are, on the main process."""
        return self._there("presence")

    def keep_others(self, result: Result) -> bool:
        """Answers that are there and were not asked for this time, as with fewer --max_samples, go
        to the journal, where the next run finds them; returns whether there are any."""
        asked = {record["index"] for record in result.records}
        others = 0
        for stage in ("answer", "mask"):
            there = {record["index"] for record in self.journal.records.get(stage, [])}
            rest = [record for record in self._there(stage) if record["index"] not in asked]
            self._keep(stage, [record for record in rest if record["index"] not in there])
            others += len(rest)
        return others > 0


def read_finished(output: Path, journal: Journal) -> dict[str, list[Record]]:
    """The records of an evaluation that is done, by stage; none if they can't be read.

    Raises:
        ValueError: it was made under other settings, and not begun again with --overwrite since.
    """
    path = beside(output, ".summary.json")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    settings = summary.get("settings") if isinstance(summary, dict) else None
    if settings is None:
        return {}
    if not journal.records:
        check_settings(path, "is done", settings, journal.settings)
    elif settings != journal.settings:
        return {}
    records = _read_lines(output)
    masks = [record["mask"] for record in records if is_record(record.get("mask"))]
    presence = _read_lines(beside(output, ".presence.jsonl"))
    return {"answer": records, "mask": masks, "presence": presence}


def _read_lines(path: Path) -> list[Record]:
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError):
        return []
    return [record for record in found if is_record(record)]


def _on_main(make: Callable[[], Value]) -> Value:
    """What the main process makes, on all ranks, and its error as well."""
    found = error = None
    if dist.is_main():
        try:
            found = make()
        except (ValueError, OSError) as caught:
            error = str(caught)
    found, error = dist.all_gather_object((found, error))[0]
    if error is not None:
        raise UsageError(error)
    return found


def _described(rollouts: Rollouts) -> list[Record]:
    return [
        {
            "index": prompt.sample.index,
            "image_id": prompt.sample.columns["image_id"],
            "completion": text,
            "solution": prompt.sample.solution,
        }
        for prompt, text in zip(rollouts.prompts, rollouts.texts, strict=True)
    ]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _category(record: Record) -> str:
    """Also where the rows don't name it."""
    asked = str(record.get("problem") or record.get("prompt"))
    return str(record.get("category") or asked_category(asked) or "object")


def _reward_stamp(names: Sequence[str]) -> str:
    """Changes with the functions and the files they are from."""
    files = [name.rpartition(":")[0] for name in names]
    contents = [file and hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]
    return _digest([list(names), contents])


def _plain(part: Any) -> list[Record]:
    """The rows of an arrow table; one that can't be read, such as of text that is not in UTF-8, is
    empty, and a bad one when it is asked about."""
    try:
        return part.to_pylist()
    except (ValueError, OverflowError):
        if len(part) == 1:
            return [{}]
        return [row for at in range(len(part)) for row in _plain(part.slice(at, 1))]


def _content(rows: Any, names: Sequence[str]) -> str:
    """Changes with the images in these columns, stored or in files."""
    names = [name for name in names if name in rows.column_names]
    digest = hashlib.sha256()
    # Few at a time: images may be large.
    for part in rows.select_columns(names).with_format("arrow").iter(100) if names else ():
        for row in _plain(part):
            digest.update(json.dumps([_image_stamp(image) for image in row.values()]).encode())
    return digest.hexdigest()


def _image_stamp(image: Any) -> Any:
    if isinstance(image, Mapping):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, list):
        return [_image_stamp(one) for one in image]
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    return _file_stamp(image) if isinstance(image, str) else str(image)


def _file_stamp(path: str | Path) -> list[Any]:
    try:
        stat = Path(path).stat()
    except (OSError, ValueError):  # there is no such file, or no such name
        return [str(path)]
    return [str(path), stat.st_size, stat.st_mtime_ns]


def _images_stamp(config: EvalConfig, images: Images) -> list[Any]:
    """Changes with the annotations, and with the images and categories that are asked about."""
    file = hashlib.sha256(Path(config.annotations).read_bytes()).hexdigest()
    stamps = [[number, *_file_stamp(path)] for number, path in images.paths.items()]
    return [file, stamps, list(images.categories)]


# --- Questions -------------------------------------------------------------------------------


def images_of(config: EvalConfig) -> Images:
    """The images that an annotation file names."""
    annotations = read_annotations(Path(config.annotations), config.task)
    odd = [name for name in annotations.categories.values() if not _is_utf8(name)]
    if odd:
        raise ValueError(
            f"--annotations {config.annotations}: expected names in UTF-8, got {odd[0]!a}; "
            "rename the category"
        )
    categories = pick_categories(annotations, config.task, config.categories)
    exists, unknown = None, {}
    if config.exists_map:
        exists, unknown = read_exists_map(
            Path(config.exists_map), files_of(annotations), annotations.categories.values()
        )
    found = find_images(
        annotations,
        Path(config.images),
        categories,
        only=exists,
        allow_missing=config.allow_missing,
    )
    return replace(found, exists=exists, counts=unknown)


def _is_utf8(name: str) -> bool:
    """JSON may hold half a character, which no tokenizer takes."""
    return name.encode("utf-8", "replace").decode() == name


def of_annotations(
    config: EvalConfig, images: Images, exists: ExistsMap | None, extent_for: Any
) -> Questions:
    """About the images of an annotation file. The truth is all of its images but the missing."""
    annotations = images.annotations
    rows = detection_rows(images, exists=exists, extent_for=extent_for)
    if not len(rows) and config.exists_map:
        raise ValueError(
            f"--exists_map {config.exists_map}: expected some of the chosen categories in it "
            f"({', '.join(images.names[:5])}, ...), got none; without a question there is no answer"
        )
    chosen = {number: annotations.categories[number] for number in images.categories}
    there = {
        number: {**record, "id": number}
        for number, record in annotations.images.items()
        if number not in images.missing
    }
    indices = range(len(rows))
    if 0 < config.max_samples < len(rows):
        # Nothing is missed in images that were not asked about, or about half of them.
        indices = range(_whole_images(rows, config.max_samples))
        asked = {rows[index]["image_id"] for index in indices}
        there = {number: record for number, record in there.items() if number in asked}
    said = None if exists is None else sorted((key, list(value)) for key, value in exists.items())
    return Questions(
        rows,
        "detection",
        indices,
        _digest([*_images_stamp(config, images), said]),
        check=partial(other_size, annotations),
        truth=make_truth(there, chosen, annotations.records),
        counts={
            "images": len(there),
            "images missing": len(images.missing),
            "boxes that can't be used": annotations.bad_boxes,
            **images.counts,
        },
        missing=[str(path) for path in images.missing.values()],
    )


def _whole_images(rows: Any, most: int) -> int:
    """How many of the first rows to ask so that every image is asked about as a whole: at most so
    many, but for the first image."""
    count = most
    while count and rows[count]["image_id"] == rows[count - 1]["image_id"]:
        count -= 1
    while not count or (count < len(rows) and rows[count]["image_id"] == rows[0]["image_id"]):
        count += 1
    return count


def of_dataset(config: EvalConfig) -> Questions:
    """About the rows of a data set."""
    rows = load_rows(config.dataset_name, config.split, dataset_config=config.dataset_config)
    task = "detection" if config.task in ("coco", "lvis") else config.task
    samples = SampleDataset(rows, compat_prompt=config.compat_prompt)  # refuses other columns
    if task == "auto":
        task = tasks.detect_task(first_solutions(samples))
    texts = [name for name in _TEXT_COLUMNS if name in rows.column_names]
    table = rows.select_columns(texts).with_format("arrow")
    digest, records = hashlib.sha256(), []
    for part in table.iter(1000):
        plain = _plain(part)
        records += plain
        digest.update(json.dumps(plain, default=str).encode())
    if dist.is_main():
        tagged = [_file_stamp(path) for record in records for path in _tagged_images(record)]
        digest.update(json.dumps([tagged, _content(rows, IMAGE_COLUMNS)]).encode())
    labels = None
    if task == "classification":
        known = [record.get("solution") for record in records]
        labels = closed_set(s for s in known if isinstance(s, str)) if any(known) else None
    indices, unknown = range(len(rows)), {}
    if config.categories != "all" or config.exists_map:
        indices, unknown = _chosen(config, records)
    return Questions(
        rows,
        task,
        _first(indices, config),
        digest.hexdigest()[:16],
        labels=labels,
        compat_prompt=config.compat_prompt,
        image_ids=_image_ids(records),
        counts=unknown,
    )


def _tagged_images(record: Record) -> list[str]:
    turns = record.get("conversations")
    turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return [path.strip() for turn in turns for path in IMAGE_TAG.findall(str(turn.get("value")))]


def _image_ids(records: Sequence[Record]) -> list[int]:
    """The rows' own where all are whole numbers, as in COCO; else new ones, and for a row without
    one that of no other."""
    given = [record.get("image_id") for record in records]
    if all(type(image) is int for image in given):
        return given
    known: dict[Any, int] = {}
    keys = [(n,) if image is None else repr(image) for n, image in enumerate(given)]
    return [known.setdefault(key, len(known)) for key in keys]


def _chosen(config: EvalConfig, records: Sequence[Record]) -> tuple[list[int], dict[str, int]]:
    """The rows about the chosen categories, or what is said to exist of them; and what the map has
    beside."""
    names = [_category(record) if record else None for record in records]
    known = sorted({name for name in names if name is not None})
    wanted = pick_names(known, known, config.task, config.categories)
    exists, unknown = None, {}
    ids = [record.get("image_id") for record in records]
    images = [image if isinstance(image, (int, str)) else None for image in ids]
    if config.exists_map:
        numbers = {image for image, record in zip(images, records, strict=True) if record}
        if not numbers or None in numbers:
            raise ValueError(
                f"--exists_map: expected an image_id in every row of {config.dataset_name}; "
                "build it with python -m virft_fast.data build, or pass --annotations"
            )
        files = {number: str(number) for number in numbers}
        exists, unknown = read_exists_map(Path(config.exists_map), files, known)
    chosen = [
        index
        for index, (name, image) in enumerate(zip(names, images, strict=True))
        if name is None  # unreadable: asked about, and so counted
        or (name in wanted and (exists is None or name in exists.get(image, ())))
    ]
    if not chosen:
        raise ValueError(
            f"--exists_map {config.exists_map}: expected some of what the rows ask about in it "
            f"({', '.join(wanted[:5])}, ...), got none; without a question there is no answer"
        )
    return chosen, unknown


def _first(indices: Sequence[int], config: EvalConfig) -> Sequence[int]:
    return indices[: config.max_samples or len(indices)]
