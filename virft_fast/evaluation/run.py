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
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from virft_fast import dist, tasks
from virft_fast.batch import Rollouts
from virft_fast.config import EvalConfig, UsageError, usage
from virft_fast.data import BadRow, BadRows, SampleDataset
from virft_fast.data.prompt_source import PromptSource
from virft_fast.evaluation import grounding
from virft_fast.evaluation.answering import answer
from virft_fast.evaluation.detection import need_coco_eval, truth_of_records
from virft_fast.evaluation.journal import Journal, Record, beside, check_settings, is_record
from virft_fast.evaluation.questions import (
    ExistsMap,
    Images,
    exists_of_answers,
    other_size,
    presence_rows,
)
from virft_fast.evaluation.reading import marked
from virft_fast.evaluation.results import Result, measure
from virft_fast.evaluation.scoring import rescored, scored
from virft_fast.evaluation.sources import (
    Questions,
    category_of,
    content_stamp,
    digest_of,
    images_of,
    images_stamp,
    of_annotations,
    of_dataset,
)
from virft_fast.models.processing import load_processor, resized
from virft_fast.models.qwen_vl import Policy, load_model, weights_stamp
from virft_fast.models.tiny import resolve_model_path
from virft_fast.rollout import Rollout
from virft_fast.rollout.backends import check_cache_limit, check_model, make_rollout
from virft_fast.tasks.coordinates import FAMILY_SPACE
from virft_fast.tasks.scoring import check_arguments

logger = logging.getLogger(__name__)

# (what is counted, how many) -> told how many are done.
Progress = Callable[[str, int], Callable[[int], None]]
Value = TypeVar("Value")
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
            empty = load_model(
                self.path,
                revision=config.model_revision,
                attn_implementation=config.attn_implementation,
                empty=True,
            )
            check_model(config.rollout_backend, Policy(empty))
            self.family = empty.config.model_type
            self.rewards = tasks.load_reward_funcs(config.reward_funcs)
            if config.task in ("coco", "lvis"):
                need_coco_eval()

    def run(self, exists: ExistsMap | None = None) -> tuple[Result | None, ExistsMap | None]:
        """Ask, then measure.

        Args:
            exists: which categories to ask about, where another model has said that already.
        Returns:
            The result, on the main process; and which categories were asked about, if not all.
        """
        config = self.config
        with usage():
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
            reward_funcs = tasks.with_class_set(
                self.rewards or tasks.load_reward_funcs(names), questions.labels
            )
            sam = self._sam(questions) if config.sam_path else None
            stamp = _reward_stamp(names)
        # An image that could not be asked what is in it is not asked about any more.
        asked = images is not None and config.ask_exists
        unseen = sum(image not in exists for image in images.paths) if asked else 0
        samples = questions.samples()
        self.load_sample = samples.get
        self._check_space(questions)
        with usage():
            self._check_rewards(questions, samples, reward_funcs)

        def describe(rollouts: Rollouts) -> list[Record]:
            return [record | {"scored_by": stamp} for record in scored(rollouts, reward_funcs)]

        records = self._stage("answer", questions, samples, describe)
        if dist.is_main():
            records = self._rescored(records, reward_funcs, stamp)
        records = [marked(record, config.answers, questions.task) for record in records]
        if questions.image_ids is not None:
            ids = questions.image_ids
            records = [record | {"image_id": ids[record["index"]]} for record in records]
        if questions.task == "detection":
            records = [record | {"category": category_of(record)} for record in records]
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

    def _check_rewards(
        self, questions: Questions, samples: SampleDataset, reward_funcs: list[Any]
    ) -> None:
        found = map(samples.get, questions.indices)
        first = next((sample for sample in found if not isinstance(sample, BadRow)), None)
        if first is not None:
            check_arguments(reward_funcs, first.columns)

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
        if questions.task not in tasks.BOX_TASKS or not dist.is_main() or self.config.annotations:
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
            digest_of([*images_stamp(self.config, images), images.names]),
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
        asked = [path, self.config.answers]  # another reading gives SAM another box
        true = partial(content_stamp, questions.rows, ["mask"])
        stamp = _on_main(lambda: digest_of([*asked, weights_stamp(path), true()]))
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


def _reward_stamp(names: Sequence[str]) -> str:
    """Changes with the functions and the files they are from."""
    files = [name.rpartition(":")[0] for name in names]
    known = [Path(file) for file in files if Path(file).is_file()]  # others name a module
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in known]
    return digest_of([list(names), contents])
