"""MIA-DPO: multi-image preference pairs, selected by where the model looked.

A scene of several images is answered by the model itself, greedily. An answer is rejected, and its
row's truth chosen, where the share of attention on the target image is low: the model then spoke of
another one. Thresholds are MIA-DPO's (arXiv:2410.17637 and its code, a85c51a); length ratio and
edit distance, which the paper names without figures, are ours.

Answers are written down batch by batch as they come, so that a killed run goes on where it was.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from virft_fast import dist
from virft_fast.algorithms.sft import answer_ids
from virft_fast.batch import Prompt
from virft_fast.data import BadRow, SampleDataset
from virft_fast.data.drawing import contact_sheet
from virft_fast.data.mia import (
    BOX_TEXT,
    Layout,
    Plan,
    Scene,
    clean_question,
    compose,
    corrupted,
    digest,
    plan_scene,
)
from virft_fast.data.writing import written_aside
from virft_fast.evaluation.journal import Journal
from virft_fast.models.image_attention import attention_to_prompts, coverage, image_tokens
from virft_fast.models.processing import resized
from virft_fast.models.qwen_vl import Policy, control_tokens_in, encode_prompt
from virft_fast.rollout import Sampling
from virft_fast.rollout.native import NativeRollout
from virft_fast.rollout.observers import AttentionObserver

MAX_TRUTH_CHARACTERS = 512
# Small scenes are shown up to this size.
SHEET_PIXELS = 260

# Kind and number of images -> the largest share of attention on the target of a rejected answer,
# and whether the share itself still counts.
THRESHOLDS: dict[tuple[str, int], tuple[float, bool]] = {
    ("sequence", 2): (0.8, True),
    ("sequence", 3): (0.7, True),
    ("sequence", 4): (0.6, True),
    ("sequence", 5): (0.6, True),
    ("collage", 2): (0.7, False),
    ("collage", 3): (0.6, False),
    ("collage", 4): (0.5, False),
    ("collage", 6): (0.4, False),
    ("collage", 9): (0.3, False),
    ("pip", 2): (0.8, False),
}


@dataclass(frozen=True)
class Selection:
    """What a rejected answer has to be like.

    Attributes:
        thresholds: (kind, images) -> largest attention share, where it is not THRESHOLDS'.
        min_perplexity: of the answer to the model itself; it has to be above.
        max_length_ratio: of the longer to the shorter answer, in characters.
        min_edit_distance: Levenshtein distance to the truth, as a share of the longer text.
    """

    thresholds: Mapping[tuple[str, int], float] = field(default_factory=dict)
    min_perplexity: float = 1.1
    max_length_ratio: float = 10.0
    min_edit_distance: float = 0.05

    def __post_init__(self) -> None:
        unknown = [key for key in self.thresholds if key not in THRESHOLDS]
        if unknown:
            names = ", ".join(f"{kind}{count}" for kind, count in THRESHOLDS)
            raise ValueError(f"thresholds: expected some of {names}, got {unknown}")
        for name, expected, good in (
            ("thresholds", "finite numbers", all(map(math.isfinite, self.thresholds.values()))),
            ("min_perplexity", "a finite number", math.isfinite(self.min_perplexity)),
            ("max_length_ratio", "1 or more", self.max_length_ratio >= 1),
            ("min_edit_distance", "a share in [0, 1]", 0 <= self.min_edit_distance <= 1),
        ):
            if not good:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")

    def limit(self, answer: Answer) -> tuple[float, bool]:
        """As in THRESHOLDS."""
        key = (answer.kind, answer.num_images)
        limit, included = THRESHOLDS[key]
        return self.thresholds.get(key, limit), included


@dataclass(frozen=True)
class Answer:
    """What the model made of a scene.

    Attributes:
        truth: the row's own answer.
        ratio: share of attention on the target; None where no image got any.
        perplexity: exp of minus the mean log-prob of the answer's tokens, in the distribution they
            were drawn from: over the tokens that may be drawn.
        num_tokens: EOS included. truncated: no EOS came.
        problem: why there is no answer; its text and figures are empty then.
        digest: of what was asked, see `Scenes.digest`.
    """

    index: int
    kind: str = ""
    num_images: int = 0
    target: int = 0
    text: str = ""
    truth: str = ""
    ratio: float | None = None
    perplexity: float | None = None
    num_tokens: int = 0
    truncated: bool = False
    problem: str = ""
    digest: str = ""


# ---- selection -----------------------------------------------------------------------------------


def reasons_against(answer: Answer, selection: Selection) -> list[str]:
    """Why this answer makes no pair; empty where it does. Named without figures, to be counted."""
    if answer.problem:
        return [answer.problem]
    said, truth = answer.text.strip(), answer.truth.strip()
    reasons = []
    if not truth:
        return ["the row's own answer is empty"]
    if len(truth) >= MAX_TRUTH_CHARACTERS:
        reasons.append(f"the row's own answer has {MAX_TRUTH_CHARACTERS} characters or more")
    if not said:
        return [*reasons, "the model's answer is empty"]
    if said == truth:
        return [*reasons, "the model's answer is right"]
    if BOX_TEXT.search(truth):
        reasons.append("boxes in the text")
    if answer.ratio is None:
        reasons.append("no attention on any image")
    elif not looked_away(answer, selection):
        reasons.append(f"attention on the target: {answer.kind} of {answer.num_images}")
    if answer.perplexity is None or answer.perplexity <= selection.min_perplexity:
        reasons.append("perplexity")
    if max(len(said), len(truth)) > selection.max_length_ratio * min(len(said), len(truth)):
        reasons.append("length ratio")
    if edit_distance(said, truth) < selection.min_edit_distance:
        reasons.append("edit distance")
    return reasons


def looked_away(answer: Answer, selection: Selection) -> bool:
    """Whether the attention share of the target is as low as a rejected answer's has to be."""
    limit, included = selection.limit(answer)
    return answer.ratio <= limit if included else answer.ratio < limit


def edit_distance(one: str, other: str) -> float:
    """Levenshtein distance as a share of the longer text, in [0, 1]."""
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ValueError(
            "expected the package rapidfuzz for edit distances; pip install 'virft_fast[mia]'"
        ) from error
    return Levenshtein.normalized_distance(one, other)


# ---- attention -----------------------------------------------------------------------------------


def attention_ratio(
    attention: Tensor, prompt: Prompt, scene: Scene, kind: str, merge: int
) -> float | None:
    """Share of the attention on the images that lies on the target; None where there is none.

    Of a sequence, the target's mean over its tokens against the sum of all images' means; of one
    image, what lies in the target's box. A token that the box cuts counts by its area.

    Args:
        attention: (P,).
    """
    images = image_tokens(prompt, merge)
    if kind == "sequence":
        means = torch.stack([attention[positions].mean() for positions, _ in images])
        total, target = means.sum(), means[scene.target_image]
    else:
        positions, grid = images[scene.target_image]
        weights = coverage(scene.box, scene.images[scene.target_image].size, grid)
        inside = attention[positions]
        total, target = inside.sum(), (inside * weights).sum()
    return _finite(target / total) if total > 0 else None


def _finite(value: Tensor) -> float | None:
    return float(value) if math.isfinite(value) else None


# ---- scenes and answers --------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What is known of a row without opening its image again.

    Attributes:
        digest: of its image; empty where it has none that can be shown.
        problem: why it is no target; its image may still be a companion.
    """

    digest: str = ""
    question: str = ""
    truth: str = ""
    problem: str = ""


class Scenes:
    """The scenes of a data set with one image a row.

    Args:
        rows: of `load_rows`.
        groups: name of each row's source; companions come from the same one. None: one source.
        noise: whether scenes are corrupted, as `data.mia.corrupted` does.
        test_share: of the images; no scene has images of both splits.
    """

    def __init__(
        self,
        rows: Any,
        layout: Layout,
        *,
        seed: int,
        noise: bool,
        groups: Sequence[str] | None = None,
        test_share: float = 0.0,
    ) -> None:
        self.samples = SampleDataset(rows, first_exchange=True)
        self.layout, self.seed, self.noise, self.test_share = layout, seed, noise, test_share
        self._unwrap = "conversations" in getattr(rows, "column_names", ())
        names = groups or [""] * len(self.samples)
        self._pools: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            self._pools.setdefault(name, []).append(index)
        self._names = names
        self._rows: dict[int, Row] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def truth(self, index: int) -> str:
        """The row's own answer."""
        return self._row(index).truth

    def held_out(self, index: int) -> bool:
        """Whether the row is of the split test; its image decides, whatever else there is."""
        drawn = hashlib.sha1(f"{self.seed} {self._row(index).digest}".encode()).digest()[:4]
        return int.from_bytes(drawn, "big") < self.test_share * 2**32

    def plan(self, index: int) -> Plan | str:
        problem = self._row(index).problem
        pool = self._pools[self._names[index]]
        return problem or plan_scene(index, pool, self.layout, self.seed, self._apart)

    def digest(self, plan: Plan) -> str:
        """Changes with the images and texts of a scene, and how they are put together."""
        target = self._row(plan.index)
        images = [self._row(row).digest for row in plan.order]
        told = repr((plan, target.question, target.truth, images))
        return hashlib.sha1(told.encode()).hexdigest()[:16]

    def scene(self, plan: Plan, *, clean: bool = False) -> Scene | str:
        """The scene of a plan, or which fault has come over its images since; `clean` without
        noise, as it is trained on."""
        loaded = [self.samples.get(row) for row in plan.order]
        for sample in loaded:
            if isinstance(sample, BadRow):
                return _named(sample.reason)
        images = [sample.images[0] for sample in loaded]
        scene = compose(plan, images, self._row(plan.index).question, self.layout)
        if self.noise and not clean:
            scene = corrupted(scene, plan.kind, self.seed, plan.index)
        return scene

    def _apart(self, one: int, other: int) -> bool:
        """Whether two rows can't be in one scene; a row without one usable image is in none."""
        digests = {self._row(one).digest, self._row(other).digest}
        return "" in digests or len(digests) == 1 or self.held_out(one) != self.held_out(other)

    def _row(self, index: int) -> Row:
        if index not in self._rows:
            self._rows[index] = self._read(index)
        return self._rows[index]

    def _read(self, index: int) -> Row:
        sample = self.samples.get(index)
        if isinstance(sample, BadRow):
            return Row(problem=_named(sample.reason))
        if len(sample.images) != 1:
            return Row(problem=f"expected one image, got {len(sample.images)}")
        try:
            resized(*sample.images[0].size, min_pixels=1, max_pixels=2**40)
        except ValueError:  # no companion either: it would cost other rows their scenes
            return Row(problem="image too narrow for the processor")
        question, truth = clean_question(sample.columns["problem"]), sample.solution
        # Conversations are given the tags of the tasks on loading.
        if self._unwrap and truth.startswith("<answer> ") and truth.endswith(" </answer>"):
            truth = truth.removeprefix("<answer> ").removesuffix(" </answer>")
        problem = "boxes in the text" if BOX_TEXT.search(question) else ""
        problem = problem if question else "the question is empty"
        return Row(digest(sample.images[0]), question, truth, problem)


def _named(reason: str) -> str:
    """A row's fault without what is particular to it, so that faults can be counted."""
    return "image can't be read" if reason.startswith("image") else reason.split(", got")[0]


@dataclass
class Answering:
    """A model that answers scenes and tells where it looked.

    Attributes:
        layer: where attention is measured; MIA-DPO took the 16th of 32.
        path: of the model's folder.
    """

    policy: Policy
    rollout: NativeRollout
    processor: Any
    layer: int
    max_completion_length: int
    device: torch.device
    max_prompt_length: int | None = None
    path: str = ""

    @property
    def merge(self) -> int:
        return self.processor.image_processor.merge_size

    @property
    def sampling(self) -> Sampling:
        return Sampling(max_completion_length=self.max_completion_length, greedy=True)

    def special(self, text: str) -> bool:
        """Whether the text holds control tokens, which end a turn in a prompt and which DPO
        refuses in an answer."""
        return bool(control_tokens_in(self.processor.tokenizer, text))

    def prompt(self, index: int, scene: Scene) -> Prompt | str:
        """The scene as the model reads it, or why it can't be."""
        if any(self.special(part.get("text", "")) for part in scene.content):
            return "special tokens in the question"
        try:
            prompt = encode_prompt(self.processor, scene.sample(index))
        except ValueError as error:
            return _named(str(error))
        most = self.max_prompt_length
        if most is not None and len(prompt.input_ids) > most:
            return f"a prompt of more than {most} tokens"
        return prompt

    @torch.no_grad()
    def answers(self, plans: Sequence[Plan], scenes: Sequence[Scene]) -> list[Answer]:
        """Greedy answers to a batch of scenes, in their order."""
        found: dict[int, Answer] = {}
        kept: list[tuple[Plan, Scene, Prompt]] = []
        for plan, scene in zip(plans, scenes, strict=True):
            prompt = self.prompt(plan.index, scene)
            if isinstance(prompt, Prompt) and not self.rollout.fits(prompt, 1, self.sampling):
                prompt = "more tokens than the rollout holds (--rollout_cache_tokens)"
            if isinstance(prompt, str):
                found[plan.index] = Answer(plan.index, plan.kind, plan.num_images, problem=prompt)
            else:
                kept.append((plan, scene, prompt))
        if kept:
            for answer in self._answers(kept):
                found[answer.index] = answer
        return [found[plan.index] for plan in plans]

    def _answers(self, kept: Sequence[tuple[Plan, Scene, Prompt]]) -> Iterator[Answer]:
        prompts = [prompt for _, _, prompt in kept]
        observer = AttentionObserver(self.layer)
        drawn = self.rollout.generate(prompts, 1, self.sampling, observer=observer)
        lengths = drawn.completion_mask.sum(1).tolist()
        means = drawn.sampling_logps.sum(1).cpu() / torch.tensor(lengths)
        for number, ((plan, scene, prompt), attention) in enumerate(
            zip(kept, observer.attention, strict=True)
        ):
            if self.special(drawn.texts[number]):  # spelled out
                problem = "special tokens in the model's answer"
                yield Answer(plan.index, plan.kind, plan.num_images, problem=problem)
                continue
            yield Answer(
                index=plan.index,
                kind=plan.kind,
                num_images=plan.num_images,
                target=plan.target,
                text=drawn.texts[number],
                ratio=attention_ratio(attention.cpu(), prompt, scene, plan.kind, self.merge),
                perplexity=_finite((-means[number]).exp()),
                num_tokens=lengths[number],
                truncated=bool(drawn.truncated[number]),
            )


# ---- the journal ---------------------------------------------------------------------------------


def open_journal(path: Path, settings: Mapping[str, Any], *, overwrite: bool) -> Journal | None:
    """The journal of answers, on the main process; None on the others.

    Args:
        settings: all that answers depend on but their scenes, whose digests are in the answers.
        overwrite: start again where answers were made under other settings.
    Raises:
        ValueError: on all ranks, as `Journal` raises it.
    """
    journal, error = None, ""
    if dist.is_main():
        try:
            journal = Journal(path, settings)
        except (ValueError, OSError) as caught:
            error = "" if overwrite else str(caught)
            journal = Journal(path, settings, overwrite=True) if overwrite else None
    error = dist.all_gather_object(error)[0]
    if error:
        raise ValueError(error)
    return journal


def answer_all(
    scenes: Scenes,
    answering: Answering,
    journal: Journal | None,
    indices: Sequence[int],
    *,
    batch_size: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[int, Answer]:
    """Answers to all of the rows, on the main process; the others know but what is new.

    Those of the journal are taken where the scene is still the one they are about. Rows without an
    answer are not written down: they are tried again by the next run, which may have their images,
    or more room.
    """
    written = journal.records.get("answer", []) if journal is not None else []
    done = {record["index"]: Answer(**record) for record in written}
    digests = dist.all_gather_object({index: a.digest for index, a in done.items()})[0]
    mine = indices[dist.rank() :: dist.world_size()]
    found: dict[int, Answer] = {}
    # Equally many rounds on all ranks, which meet at the end of each.
    for first in range(0, -(-len(indices) // dist.world_size()), batch_size):
        batch = mine[first : first + batch_size]
        for new, there in dist.all_gather_object(_answer(scenes, answering, batch, digests)):
            if journal is not None:
                journal.add("answer", [asdict(answer) for answer in new if not answer.problem])
            found |= {answer.index: answer for answer in new}
            found |= {index: done[index] for index in there if index in done}
            progress(len(new) + len(there))
    return {index: found[index] for index in indices if index in found}


def _answer(
    scenes: Scenes, answering: Answering, batch: Sequence[int], digests: Mapping[int, str]
) -> tuple[list[Answer], list[int]]:
    """New answers to rows of the batch, and the rows whose answer is there already.

    Args:
        digests: of the scenes that answers are there to.
    """
    found, there, asked = [], [], []
    for index in batch:
        plan = scenes.plan(index)
        if isinstance(plan, Plan) and digests.get(index) == scenes.digest(plan):
            there.append(index)
            continue
        scene = scenes.scene(plan) if isinstance(plan, Plan) else plan
        if not isinstance(scene, str) and answering.special(scenes.truth(index)):
            scene = "special tokens in the row's own answer"
        if isinstance(scene, str):
            found.append(Answer(index, problem=scene))
        else:
            asked.append((plan, scene))
    answers = answering.answers([plan for plan, _ in asked], [scene for _, scene in asked])
    for (plan, _), answer in zip(asked, answers, strict=True):
        truth = scenes.truth(plan.index)
        found.append(replace(answer, truth=truth, digest=scenes.digest(plan)))
    return found, there


def source_groups(rows: Any) -> list[str] | None:
    """Where rows come from: their column `source`, or the first folder in which their images'
    paths differ; None where neither tells."""
    names = list(getattr(rows, "column_names", ()))
    if "source" in names:
        return [str(value) for value in rows["source"]]
    column = next((name for name in ("image", "images", "image_path") if name in names), None)
    if column is None or hasattr(getattr(rows, "features", {}).get(column), "decode"):
        return None
    paths = []
    for value in rows.with_format(None)[column] if hasattr(rows, "with_format") else rows[column]:
        value = value[0] if isinstance(value, list) and value else value
        if value and not isinstance(value, str):
            return None
        paths.append(Path(value).parts[:-1] if value else None)
    known = [parts for parts in paths if parts is not None]
    common = 0
    while known and all(len(p) > common and p[common] == known[0][common] for p in known):
        common += 1
    # A row without an image is of no source.
    return [p[common] if p is not None and len(p) > common else "" for p in paths]


def table(answers: Mapping[int, Answer], reasons: Mapping[int, Sequence[str]]) -> list[str]:
    """Kept and dropped rows, by kind and by reason; a row with two reasons counts for both."""
    kinds = Counter((a.kind, a.num_images) for a in answers.values() if not a.problem)
    kept = Counter((a.kind, a.num_images) for index, a in answers.items() if not reasons[index])
    ratios: dict[tuple[str, int], list[float]] = {}
    for answer in answers.values():
        if answer.ratio is not None:
            ratios.setdefault((answer.kind, answer.num_images), []).append(answer.ratio)
    lines = [f"{'scene':14} {'answered':>8} {'kept':>6} {'mean attention on the target':>30}"]
    for key, count in sorted(kinds.items()):
        mean = sum(ratios.get(key, [])) / max(1, len(ratios.get(key, [])))
        shown = f"{mean:.3f}" if key in ratios else ""
        lines.append(f"{key[0]:10} {key[1]:3} {count:8} {kept[key]:6} {shown:>30}")
    lines.append(f"{'all':14} {sum(kinds.values()):8} {sum(kept.values()):6}")
    dropped = Counter(reason for found in reasons.values() for reason in set(found))
    lines += ["", f"{'dropped because of':60} {'rows':>6}"] if dropped else []
    lines += [f"{reason:60} {count:6}" for reason, count in dropped.most_common()]
    return lines


# ---- what is written -----------------------------------------------------------------------------


def write_pairs(
    out: Path,
    scenes: Scenes,
    answers: Mapping[int, Answer],
    reasons: dict[int, list[str]],
    selection: Selection,
    *,
    card: Callable[[], str],
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda rows: rows,
) -> dict[str, int]:
    """Kept pairs as a data set in TRL's form, and selection.jsonl with every row's reasons.

    Args:
        reasons: completed here, where an image can't be read any more.
        card: of README.md, once everything is known.
    Returns:
        rows of each split.
    Raises:
        ValueError: nothing was kept.
    """
    import datasets

    kept = [index for index in answers if not reasons[index]]
    if not kept:
        raise ValueError("no pair was kept; nothing is written, see the reasons above")
    text, number = datasets.Value("string"), datasets.Value("int64")
    parts = datasets.List({"type": text, "text": text})
    features = datasets.Features(
        images=datasets.List(datasets.Image()),
        prompt=datasets.List({"role": text, "content": parts}),
        chosen=datasets.List({"role": text, "content": text}),
        rejected=datasets.List({"role": text, "content": text}),
        kind=text,
        num_images=number,
        target=number,
        target_image=number,
        target_box=datasets.List(number),
        attention_ratio=datasets.Value("float64"),
        perplexity=datasets.Value("float64"),
        reasons=datasets.List(text),
        source_row=number,
    )
    splits = ["train", "test"] if scenes.test_share else ["train"]
    with written_aside(out, splits, features) as writers:
        for index in progress(kept):
            row = _pair(scenes, answers[index], selection)
            if isinstance(row, str):
                reasons[index].append(row)
                continue
            size = sum(len(image["bytes"]) for image in row["images"])
            writers["test" if scenes.held_out(index) else "train"].add(row, size)
        counts = {name: writer.close() for name, writer in writers.items()}
        if not sum(counts.values()):
            raise ValueError("no pair could be written: the images can't be read any more")
        folder = writers.folder.parent
        (folder / "README.md").write_text(card(), encoding="utf-8")
        with (folder / "selection.jsonl").open("w") as file:
            for index, answer in answers.items():
                record = asdict(answer) | {"kept": not reasons[index], "dropped": reasons[index]}
                file.write(json.dumps(record) + "\n")
    return counts


def _pair(scenes: Scenes, answer: Answer, selection: Selection) -> dict[str, Any] | str:
    plan = scenes.plan(answer.index)
    scene = scenes.scene(plan, clean=True) if isinstance(plan, Plan) else plan
    if isinstance(scene, str):
        return scene
    limit, _ = selection.limit(answer)
    content = [{"type": part["type"], "text": part.get("text")} for part in scene.content]
    turn = lambda role, said: [{"role": role, "content": said}]  # noqa: E731
    return {
        "images": [_encoded(image) for image in scene.images],
        "prompt": turn("user", content),
        "chosen": turn("assistant", answer.truth),
        "rejected": turn("assistant", answer.text),
        "kind": answer.kind,
        "num_images": answer.num_images,
        "target": answer.target + 1,
        "target_image": scene.target_image,
        "target_box": list(scene.box),
        "attention_ratio": answer.ratio,
        "perplexity": answer.perplexity,
        "reasons": [f"attention on the target {answer.ratio:.3f}, limit {limit}"],
        "source_row": answer.index,
    }


def _encoded(image: Image.Image) -> dict[str, Any]:
    """As JPEG where that is nearly the same picture; what is small stays exact."""
    data = io.BytesIO()
    if image.width * image.height <= 256 * 256:
        image.save(data, "PNG")
        return {"bytes": data.getvalue(), "path": "scene.png"}
    image.save(data, "JPEG", quality=95, subsampling=0)
    return {"bytes": data.getvalue(), "path": "scene.jpg"}


def attention_sheet(
    scenes: Scenes,
    answering: Answering,
    answers: Mapping[int, Answer],
    reasons: Mapping[int, Sequence[str]],
    most: int,
) -> Image.Image | None:
    """A contact sheet of kept and dropped answers: each scene under its answer's attention, the
    target framed; None where nothing was answered."""
    cells = []
    for answer in on_sheet(answers, reasons, most):
        plan = scenes.plan(answer.index)
        scene = scenes.scene(plan) if isinstance(plan, Plan) else plan
        if isinstance(scene, str):
            continue
        prompt = answering.prompt(answer.index, scene)
        attention = attention_again(answering, prompt, answer)
        images = image_tokens(prompt, answering.merge)
        strongest = max(float(attention[positions].max()) for positions, _ in images)
        shown = [
            overlay(image, attention[positions], grid, strongest)
            for image, (positions, grid) in zip(scene.images, images, strict=True)
        ]
        target = shown[scene.target_image]
        left, top, right, bottom = scene.box  # PIL's own boxes hold their last pixel
        ImageDraw.Draw(target).rectangle(
            (left, top, right - 1, bottom - 1),
            outline=(0, 160, 0),
            width=max(2, max(target.size) // 100),
        )
        verdict = "kept" if not reasons[answer.index] else "; ".join(reasons[answer.index])
        caption = (
            f"{verdict}; {answer.ratio or 0.0:.2f} on the target. {plan.prefix} true: "
            f"{answer.truth} said: {answer.text}"
        )
        cells.append((_side_by_side(shown), caption))
    return contact_sheet(cells, columns=4) if cells else None


def on_sheet(
    answers: Mapping[int, Answer], reasons: Mapping[int, Sequence[str]], most: int
) -> list[Answer]:
    """The first answers that were kept, then those dropped, half and half where there are both."""
    answered = [answer for answer in answers.values() if not answer.problem]
    kept = [answer for answer in answered if not reasons[answer.index]]
    dropped = [answer for answer in answered if reasons[answer.index]]
    kept = kept[: max(-(-most // 2), most - len(dropped))]
    return kept + dropped[: most - len(kept)]


def attention_again(answering: Answering, prompt: Prompt, answer: Answer) -> Tensor:
    """(P,) attention of an answer that is known by its text."""
    tokenizer = answering.processor.tokenizer
    ids = answer_ids(tokenizer, answer.text)
    inputs = answering.policy.collate(
        [prompt],
        [[ids[:-1] if answer.truncated and len(ids) > 1 else ids]],
        pad_token_id=tokenizer.pad_token_id,
        device=answering.device,
        packed=True,
    )
    (attention,) = attention_to_prompts(answering.policy, inputs, answering.layer)
    return attention.cpu()


def overlay(
    image: Image.Image, attention: Tensor, grid: tuple[int, int], strongest: float
) -> Image.Image:
    """The image with its tokens' attention over it in red; `strongest` is the deepest."""
    rows, columns = grid
    strength = (attention / max(strongest, 1e-12)).view(rows, columns)
    mask = Image.fromarray((200 * strength).byte().numpy())
    mask = mask.resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", image.size, (255, 0, 0)), image, mask)


def _side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    gap = max(2, images[0].width // 20)
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    whole = Image.new("RGB", (width, max(image.height for image in images)), "white")
    left = 0
    for image in images:
        whole.paste(image, (left, 0))
        left += image.width + gap
    factor = max(1, SHEET_PIXELS // max(whole.size))
    return whole.resize((factor * whole.width, factor * whole.height), Image.Resampling.NEAREST)
