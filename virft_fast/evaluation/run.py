"""One model's evaluation from questions to measures: resumable, on any number of ranks.

While it runs, X.journal next to the records X.jsonl holds what has been answered. When it is done,
X.summary.json holds its settings. Answers in either are reused as long as the settings that they
depend on stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from tqdm import tqdm

from virft_fast import dist, tasks
from virft_fast.arguments import need_package
from virft_fast.batch import Rollouts, Row
from virft_fast.config import EvalConfig, usage
from virft_fast.data import BadRow, BadRows, SampleDataset
from virft_fast.data.prompt_source import PromptSource
from virft_fast.digests import digest_of, json_digest
from virft_fast.evaluation import grounding, sources
from virft_fast.evaluation.answering import answer
from virft_fast.evaluation.detection import truth_of_records
from virft_fast.evaluation.files import write_result
from virft_fast.evaluation.journal import Record, RecordStore
from virft_fast.evaluation.model import EvaluatedModel
from virft_fast.evaluation.questions import ExistsMap, Images, exists_of_answers
from virft_fast.evaluation.reading import marked
from virft_fast.evaluation.results import Result, measure
from virft_fast.evaluation.scoring import rescored, scored
from virft_fast.models.qwen_vl import weights_stamp
from virft_fast.tasks.scoring import RewardFunction, check_arguments

Value = TypeVar("Value")
# What an answer depends on. Batch size and number of ranks change nothing but rounding.
_SETTINGS = (
    "model_name_or_path", "model_revision", "dataset_name", "dataset_config", "split", "task",
    "annotations", "images", "categories", "exists_map", "ask_exists",
    "compat_prompt",
    "max_completion_length", "max_prompt_length", "rollout_backend", "dtype",
    "attn_implementation", "min_pixels", "max_pixels",
)  # fmt: skip


@dataclass(frozen=True)
class Scorer:
    """The rewards of an evaluation.

    Attributes:
        reward_funcs: names and functions.
        stamp: changes with the names and with the files that define the functions.
    """

    reward_funcs: list[tuple[str, RewardFunction]]
    stamp: str

    def describe(self, rollouts: Rollouts) -> list[Record]:
        """A scored record of each answer."""
        records = scored(rollouts, self.reward_funcs)
        return [record | {"scored_by": self.stamp} for record in records]


class ModelEvaluation:
    """The evaluation of one model.

    Args:
        config: `model_name_or_path` is the model.
        output: where the records go.
    Raises:
        UsageError: model, data or settings can't be used.
    """

    def __init__(self, config: EvalConfig, output: Path, device: torch.device) -> None:
        self.config, self.output, self.device = config, output, device
        self.bad_rows = BadRows(config.max_bad_rows)
        self.store: RecordStore | None = None  # on the main process, from the first stage on
        with usage():
            self.model = EvaluatedModel(config, device)
            self.reward_funcs = tasks.load_reward_funcs(config.reward_funcs)
            if config.task in ("coco", "lvis"):
                package = "faster-coco-eval"
                need_package("--task coco and lvis", "faster_coco_eval", package, "eval")

    def run(self, exists: ExistsMap | None = None) -> tuple[Result | None, ExistsMap | None]:
        """Ask, measure, and write records and summary.

        Args:
            exists: which categories to ask about, if another model has already been asked.
        Returns:
            The result, on the main process; and which categories were asked about, if not all.
        """
        config = self.config
        with usage():
            images = sources.images_of(config)
        if images is not None and config.exists_map:
            exists = images.exists
        elif images is not None and config.ask_exists and exists is None:
            exists = self._ask_exists(images)
        with usage():
            if images is None:
                questions = sources.of_dataset(config)
            else:
                extent_for = self.model.extent_for()
                questions = sources.of_annotations(config, images, exists, extent_for)
            scorer = self._scorer(questions)
            sam = self._load_sam(questions, config.sam_path) if config.sam_path else None
        samples = questions.samples()
        self.load_sample = samples.get
        if questions.task in tasks.BOX_TASKS and dist.is_main() and not config.annotations:
            self.model.warn_of_space(in_pixels="extent" in questions.rows.column_names)
        with usage():
            self._check_rewards(questions, scorer)
        records = self._stage("answer", questions, samples, scorer.describe)
        if dist.is_main():
            records = self._rescored(records, scorer)
        records = self._annotated(records, questions)
        if sam is not None:
            records = self._masks(questions, sam, records)
        if self.store is None:
            return None, exists
        result = self._measure(questions, scorer, records)
        if images is not None and config.ask_exists and exists is not None:
            # An image whose presence question failed was asked nothing else.
            unseen = sum(image not in exists for image in images.paths)
            result.counts["rows that can't be used"] += unseen
        self._save(self.store, result, exists)
        return result, exists

    def _scorer(self, questions: sources.Questions) -> Scorer:
        names = self.config.reward_funcs or tasks.DEFAULT_REWARDS[questions.task]
        functions = self.reward_funcs or tasks.load_reward_funcs(names)
        return Scorer(tasks.with_class_set(functions, questions.labels), _reward_stamp(names))

    def _load_sam(self, questions: sources.Questions, path: str) -> grounding.MaskModel:
        """SAM, loaded before the first question, so that a wrong path fails early."""
        if questions.task != "grounding":
            raise ValueError(f"--sam_path: expected a grounding task, got {questions.task}")
        if "mask" not in questions.rows.column_names:
            raise ValueError(
                f"--sam_path: expected a column mask in {self.config.dataset_name}, it has "
                f"{', '.join(questions.rows.column_names)}; build the data set with python -m "
                "virft_fast.data build grounding"
            )
        return grounding.MaskModel(path, self.device)

    def _check_rewards(self, questions: sources.Questions, scorer: Scorer) -> None:
        """Raise ValueError if a function can't be called with the columns of the first sample."""
        samples = map(self.load_sample, questions.indices)
        first = next((sample for sample in samples if not isinstance(sample, BadRow)), None)
        if first is not None:
            check_arguments(scorer.reward_funcs, first.columns)

    # Stages

    def _ask_exists(self, images: Images) -> ExistsMap:
        """Ask the model which of the categories each image has."""
        questions = sources.of_presence(images)
        samples = SampleDataset(questions.rows)
        records = self._stage("presence", questions, samples, _described)
        return exists_of_answers(records, images.names)

    def _stage(
        self,
        name: str,
        questions: sources.Questions,
        samples: SampleDataset,
        describe: Callable[[Rollouts], list[Record]],
    ) -> list[Record]:
        """Answers to all questions, earlier ones included."""
        config, limit = self.config, self.config.max_prompt_length
        source = PromptSource(
            samples, self.model.processor, max_prompt_length=limit, check=questions.check
        )
        with _bar(name, len(questions.indices)) as bar:
            return answer(
                self.model,
                source.load,
                questions.indices,
                describe,
                # Bad rows are identified by number, and each stage has its own numbering.
                bad_rows=self.bad_rows if name == "answer" else BadRows(config.max_bad_rows),
                batch_size=config.batch_size,
                max_completion_length=config.max_completion_length,
                done=_on_main(partial(self._earlier, name, questions.digest)),
                keep=partial(self._keep, name),
                progress=lambda done: bar.update(done - bar.n),
            )

    def _rescored(self, records: list[Record], scorer: Scorer) -> list[Record]:
        """Earlier answers, with new rewards for those that other functions scored."""
        stale = [n for n, record in enumerate(records) if record.get("scored_by") != scorer.stamp]
        for first in range(0, len(stale), self.config.batch_size):
            numbers = stale[first : first + self.config.batch_size]
            chunk = [records[n] for n in numbers]
            samples = [self.load_sample(record["index"]) for record in chunk]
            new = rescored(chunk, samples, self.model.processor.tokenizer, scorer.reward_funcs)
            for n, record in zip(numbers, new, strict=True):
                records[n] = record | {"scored_by": scorer.stamp}
        return records

    def _annotated(self, records: Sequence[Record], questions: sources.Questions) -> list[Record]:
        """The records, with the fields that the measures read besides answer and solution."""
        records = [marked(record, self.config.answers, questions.task) for record in records]
        if (ids := questions.image_ids) is not None:
            records = [record | {"image_id": ids[record["index"]]} for record in records]
        if questions.task == "detection":
            records = [record | {"category": sources.category_of(record)} for record in records]
        return records

    def _masks(
        self, questions: sources.Questions, sam: grounding.MaskModel, records: list[Record]
    ) -> list[Record]:
        """The records, with SAM's masks compared to the true masks of rows that have one."""

        def make_stamp() -> str:
            masks = sources.content_stamp(questions.rows, ["mask"])
            answers = self.config.answers  # parsed differently, they give SAM other boxes
            return json_digest([sam.path, answers, weights_stamp(sam.path), masks])

        stamp = _on_main(make_stamp)
        done = _on_main(partial(self._earlier, "mask", questions.digest))
        masks = {mask["index"]: mask for mask in done if mask["sam"] == stamp}
        todo = [record for record in records if record["index"] not in masks]
        todo_here = todo[dist.rank() :: dist.world_size()]
        step = grounding.BATCH_SIZE * dist.world_size()
        with _bar("mask", len(records), len(masks)) as bar:
            for first in range(0, len(todo), step):
                chunk = todo_here[first // dist.world_size() :][: grounding.BATCH_SIZE]
                indices = [record["index"] for record in chunk]
                samples = [self.load_sample(index) for index in indices]
                true_masks = grounding.true_masks(questions.rows, indices)
                areas = grounding.mask_areas(sam, chunk, samples, true_masks)
                mine = [
                    {"index": n, "sam": stamp, **area}
                    for n, area in zip(indices, areas, strict=True)
                ]
                new = [mask for of_rank in dist.all_gather_object(mine) for mask in of_rank]
                self._keep("mask", new)
                masks |= {mask["index"]: mask for mask in new}
                bar.update(min(step, len(todo) - first))
        questions.counts["rows without a true mask"] = sum("union" not in m for m in masks.values())
        return [record | {"mask": masks[record["index"]]} for record in records]

    # The end, on the main process

    def _measure(
        self, questions: sources.Questions, scorer: Scorer, records: list[Record]
    ) -> Result:
        config, truth = self.config, questions.truth
        if config.task in ("coco", "lvis") and truth is None:
            with usage():
                truth = truth_of_records(records)
        result = measure(
            config.model_name_or_path,
            questions.task,
            records,
            [name for name, _ in scorer.reward_funcs],
            truth=truth,
            federated=config.task == "lvis" and bool(config.annotations),
            labels=questions.labels,
            counts={
                "questions": len(questions.indices),
                "answers": len(records),
                **questions.counts,
                "rows that can't be used": len(self.bad_rows),
            },
            num_draws=config.bootstrap,
            seed=config.seed,
        )
        result.missing = questions.missing
        return result

    def _save(self, store: RecordStore, result: Result, exists: ExistsMap | None) -> None:
        """Write the result; the journal stays only if it holds answers that the result lacks."""
        unused = store.keep_unused(result.records)
        config = asdict(self.config)
        write_result(self.output, result, store=store, config=config, exists=exists)
        if not unused:
            store.journal.remove()

    # Records

    def _earlier(self, stage: str, digest: str) -> list[Record]:
        """Earlier records of a stage, on the main process; the first stage opens the store.

        Args:
            digest: of the questions.
        """
        if self.store is None:
            settings: Row = {name: getattr(self.config, name) for name in _SETTINGS}
            settings |= {"weights": self.model.source.stamp, "questions": digest}
            self.store = RecordStore(self.output, settings, overwrite=self.config.overwrite)
        return self.store.records(stage)

    def _keep(self, stage: str, records: list[Record]) -> None:
        if self.store is not None:
            self.store.journal.add(stage, records)


def _bar(what: str, total: int, initial: int = 0) -> tqdm[NoReturn]:
    """A progress bar over samples, on the main process."""
    return tqdm(total=total, initial=initial, desc=what, unit="sample", disable=not dist.is_main())


def _on_main(make: Callable[[], Value]) -> Value:
    """`dist.from_main`, with its errors as UsageError."""
    with usage():
        return dist.from_main(make)


def _described(rollouts: Rollouts) -> list[Record]:
    """A record of each answer to a presence question."""
    records = []
    for prompt, text in zip(rollouts.prompts, rollouts.texts, strict=True):
        sample = prompt.sample
        about = {"index": sample.index, "image_id": sample.columns["image_id"]}
        records.append({**about, "completion": text, "solution": sample.solution})
    return records


def _reward_stamp(names: Sequence[str]) -> str:
    """A stamp that changes with the functions' names and the files that define them."""
    files = [Path(name.rpartition(":")[0]) for name in names]  # a module's name isn't a file
    contents = [digest_of([file.read_bytes()]) for file in files if file.is_file()]
    return json_digest([list(names), contents])
