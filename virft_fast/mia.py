"""MIA-DPO: multi-image preference pairs, selected by where the model looked.

A scene of several images is answered by the model itself, greedily. An answer is rejected, and its
row's truth chosen, where the share of attention on the target image is low: the model then spoke of
another one. Thresholds are MIA-DPO's (arXiv:2410.17637 and its code, a85c51a); length ratio and
edit distance, which the paper names without figures, are ours.

Answers are written down one by one as they come, so that a killed run goes on where it was.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from virft_fast import dist
from virft_fast.batch import Prompt
from virft_fast.data import BadRow, SampleDataset
from virft_fast.data.drawing import contact_sheet
from virft_fast.data.loading import IMAGE_COLUMNS
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
from virft_fast.models.image_attention import attention_to_prompts, coverage, image_tokens
from virft_fast.models.qwen_vl import Policy, encode_prompt
from virft_fast.rollout import Sampling
from virft_fast.rollout.native import NativeRollout, token_chunks

# Tokens that are read together to measure attention.
ATTENTION_TOKENS = 8_192
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

    def limit(self, answer: Answer) -> tuple[float, bool]:
        """As in THRESHOLDS."""
        key = (answer.kind, answer.num_images)
        limit, included = THRESHOLDS[key]
        return self.thresholds.get(key, limit), included


@dataclass(frozen=True)
class Answer:
    """What the model made of a scene.

    Attributes:
        ratio: share of attention on the target; None where no image got any.
        perplexity: exp of minus the mean log-prob of the answer's tokens.
        num_tokens: EOS included. truncated: no EOS came.
        problem: why there is no answer; everything else is empty then.
    """

    index: int
    kind: str = ""
    num_images: int = 0
    target: int = 0
    text: str = ""
    ratio: float | None = None
    perplexity: float = 0.0
    num_tokens: int = 0
    truncated: bool = False
    problem: str = ""


# ---- selection -----------------------------------------------------------------------------------


def reasons_against(answer: Answer, truth: str, selection: Selection) -> list[str]:
    """Why this answer makes no pair; empty where it does. Named without figures, to be counted."""
    if answer.problem:
        return [answer.problem]
    said, truth = answer.text.strip(), truth.strip()
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
    if answer.ratio is None or not math.isfinite(answer.ratio):
        reasons.append("no attention on any image")
    elif not looked_away(answer, selection):
        reasons.append(f"attention on the target: {answer.kind} of {answer.num_images}")
    if not answer.perplexity > selection.min_perplexity:
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
    ratio = float(target / total) if total > 0 else math.nan
    return ratio if math.isfinite(ratio) else None


def measure(
    policy: Policy,
    prompts: Sequence[Prompt],
    answers: Sequence[Tensor],
    *,
    layer: int,
    pad_token_id: int,
    device: torch.device,
    image_features: Sequence[Tensor] | None = None,
) -> Iterator[Tensor]:
    """(P,) attention on each prompt's tokens, on the CPU, several prompts read together.

    Args:
        answers: (C,) int64 tokens of each, on the CPU.
        image_features: of each prompt, where a rollout has computed them already: the vision tower
            costs more than the layers up to the measured one.
    """
    lengths = [len(p.input_ids) + len(a) for p, a in zip(prompts, answers, strict=True)]
    for first, last in token_chunks(lengths, ATTENTION_TOKENS):
        inputs = policy.collate(
            prompts[first:last],
            [[answer] for answer in answers[first:last]],
            pad_token_id=pad_token_id,
            device=device,
            packed=True,
        )
        known = None
        if image_features is not None and inputs.pixel_values is not None:
            known = torch.cat(list(image_features[first:last]))
        for attention in attention_to_prompts(policy, inputs, layer, known):
            yield attention.cpu()


# ---- scenes and answers --------------------------------------------------------------------------


class Scenes:
    """The scenes of a data set with one image a row.

    Args:
        rows: of `load_rows`.
        groups: name of each row's source; companions come from the same one. None: one source.
        noise: whether scenes are corrupted, as `data.mia.corrupted` does.
    """

    def __init__(
        self,
        rows: Any,
        layout: Layout,
        *,
        seed: int,
        noise: bool,
        groups: Sequence[str] | None = None,
    ) -> None:
        self.samples = SampleDataset(rows)
        # The same rows without their images, which need not be decoded to read a text.
        images = [name for name in IMAGE_COLUMNS if name in getattr(rows, "column_names", ())]
        self._texts = SampleDataset(rows.remove_columns(images)) if images else self.samples
        self.layout, self.seed, self.noise = layout, seed, noise
        self._unwrap = "conversations" in getattr(rows, "column_names", ())
        names = groups or [""] * len(self.samples)
        self._pools: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            self._pools.setdefault(name, []).append(index)
        self._names = names
        self._digests: dict[int, str | None] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def truth(self, index: int) -> str:
        """The row's own answer."""
        sample = self._texts.get(index)
        text = "" if isinstance(sample, BadRow) else sample.solution
        # Conversations are given the tags of the tasks on loading.
        if self._unwrap and text.startswith("<answer> ") and text.endswith(" </answer>"):
            text = text.removeprefix("<answer> ").removesuffix(" </answer>")
        return text

    def plan(self, index: int) -> Plan | str:
        sample = self.samples.get(index)
        if isinstance(sample, BadRow):
            return _named(sample.reason)
        if len(sample.images) != 1:
            return f"expected one image, got {len(sample.images)}"
        question = clean_question(sample.columns["problem"])
        if not question:
            return "the question is empty"
        if BOX_TEXT.search(question):
            return "boxes in the text"
        return plan_scene(
            index, self._pools[self._names[index]], self.layout, self.seed, self._same
        )

    def scene(self, plan: Plan, *, clean: bool = False) -> Scene:
        """The scene of a plan; `clean` without noise, as it is trained on."""
        loaded = [self.samples.get(row) for row in plan.order]
        images = [sample.images[0] for sample in loaded]
        question = clean_question(loaded[plan.target].columns["problem"])
        scene = compose(plan, images, question, self.layout)
        if self.noise and not clean:
            scene = corrupted(scene, plan.kind, self.seed, plan.index)
        return scene

    def _same(self, one: int, other: int) -> bool:
        """A row without one usable image is the same as any other: never a companion."""
        one_digest, other_digest = self._digest(one), self._digest(other)
        return one_digest is None or other_digest is None or one_digest == other_digest

    def _digest(self, index: int) -> str | None:
        if index not in self._digests:
            sample = self.samples.get(index)
            usable = not isinstance(sample, BadRow) and len(sample.images) == 1
            self._digests[index] = digest(sample.images[0]) if usable else None
        return self._digests[index]


def _named(reason: str) -> str:
    """A row's fault without what is particular to it, so that faults can be counted."""
    return "image can't be read" if reason.startswith("image") else reason.split(":")[0]


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

    def prompt(self, index: int, scene: Scene) -> Prompt | str:
        """The scene as the model reads it, or why it can't be."""
        try:
            prompt = encode_prompt(self.processor, scene.sample(index))
        except ValueError as error:
            return str(error).split(":")[0]
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
        drawn = self.rollout.generate(prompts, 1, self.sampling)
        lengths = drawn.completion_mask.sum(1).tolist()
        ids = [row[:n].cpu() for row, n in zip(drawn.completion_ids, lengths, strict=True)]
        attentions = measure(
            self.policy,
            prompts,
            ids,
            layer=self.layer,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            device=self.device,
            image_features=drawn.image_features,
        )
        means = drawn.sampling_logps.sum(1).cpu() / torch.tensor(lengths)
        for number, ((plan, scene, prompt), attention) in enumerate(
            zip(kept, attentions, strict=True)
        ):
            yield Answer(
                index=plan.index,
                kind=plan.kind,
                num_images=plan.num_images,
                target=plan.target,
                text=drawn.texts[number],
                ratio=attention_ratio(attention, prompt, scene, plan.kind, self.merge),
                perplexity=float((-means[number]).exp()),
                num_tokens=lengths[number],
                truncated=bool(drawn.truncated[number]),
            )


# ---- the journal ---------------------------------------------------------------------------------


class Journal:
    """Answers on disk, one line each, a file a rank; what is there is not answered again.

    Args:
        folder: of the files.
        settings: all that answers depend on.
    Raises:
        ValueError: the folder holds answers made with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._begun = False
        text = json.dumps(settings, sort_keys=True, default=str)
        mark = folder / "settings.json"
        folder.mkdir(parents=True, exist_ok=True)
        if dist.is_main() and not mark.is_file():
            aside = mark.with_suffix(".writing")
            aside.write_text(text)
            aside.replace(mark)
        dist.barrier()
        if mark.read_text() != text:
            raise ValueError(
                f"{folder}: expected answers made with these settings from this data and model, "
                "got others; delete it to start again"
            )

    def read(self) -> dict[int, Answer]:
        """Row -> answer, of all files; a line that was cut off is none."""
        found = {}
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    answer = Answer(**json.loads(line))
                except (ValueError, TypeError):
                    continue
                found[answer.index] = answer
        return found

    def write(self, answers: Iterable[Answer]) -> None:
        path = self.folder / f"answers-{dist.rank()}.jsonl"
        with path.open("a") as file:
            # Behind a line that a kill has cut off; an empty one is none.
            file.write("" if self._begun else "\n")
            self._begun = True
            file.writelines(json.dumps(asdict(answer)) + "\n" for answer in answers)


def answer_all(
    scenes: Scenes,
    answering: Answering,
    journal: Journal,
    indices: Sequence[int],
    *,
    batch_size: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[int, Answer]:
    """Answers to all of the rows, those of the journal included; the same on all ranks."""
    done = journal.read()
    dist.barrier()  # nobody writes before all have read
    todo = [index for index in indices if index not in done]
    progress(len(indices) - len(todo))
    mine = todo[dist.rank() :: dist.world_size()]
    for first in range(0, len(mine), batch_size):
        batch = mine[first : first + batch_size]
        planned = [scenes.plan(index) for index in batch]
        bad = [
            Answer(index, problem=plan)
            for index, plan in zip(batch, planned, strict=True)
            if isinstance(plan, str)
        ]
        plans = [plan for plan in planned if isinstance(plan, Plan)]
        answers = answering.answers(plans, [scenes.scene(plan) for plan in plans])
        journal.write([*bad, *answers])
        progress(len(batch) * dist.world_size())
    dist.barrier()
    found = journal.read()
    return {index: found[index] for index in indices}


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


def text_digest(rows: Any) -> str:
    """Changes with the rows: their number, their texts, and where their images are."""
    found = hashlib.sha1(str(len(rows)).encode())
    features = getattr(rows, "features", None) or {}
    for name in rows.column_names:
        if not hasattr(features.get(name), "decode") and "Image" not in str(features.get(name)):
            for value in rows[name]:
                found.update(repr(value).encode("utf-8", "replace"))
    return found.hexdigest()


def table(answers: Mapping[int, Answer], reasons: Mapping[int, Sequence[str]]) -> list[str]:
    """Kept and dropped rows, by kind and by reason; a row with two reasons counts for both."""
    kinds = Counter((a.kind or "none", a.num_images) for a in answers.values())
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
    reasons: Mapping[int, Sequence[str]],
    selection: Selection,
    *,
    test: Sequence[int],
    card: str,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda rows: rows,
) -> dict[str, int]:
    """Kept pairs as a data set in TRL's form, and selection.jsonl with every row's reasons.

    Args:
        test: rows that go into the split test.
        card: of README.md.
    Returns:
        rows of each split.
    Raises:
        ValueError: nothing was kept.
    """
    import datasets

    kept = [index for index in answers if not reasons[index]]
    if not kept:
        raise ValueError("no pair was kept; nothing is written, see the reasons above")
    held_out = set(test)
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
    splits = ["train", *(["test"] if held_out & set(kept) else [])]
    counts = {}
    with written_aside(out, splits, features) as writers:
        for index in progress(kept):
            row = _pair(scenes, answers[index], selection)
            size = sum(len(image["bytes"]) for image in row["images"])
            writers["test" if index in held_out else "train"].add(row, size)
        counts = {name: writer.close() for name, writer in writers.items()}
        folder = writers.folder.parent
        (folder / "README.md").write_text(card, encoding="utf-8")
        with (folder / "selection.jsonl").open("w") as file:
            for index, answer in answers.items():
                record = asdict(answer) | {"kept": not reasons[index], "dropped": reasons[index]}
                file.write(json.dumps(record) + "\n")
    return counts


def _pair(scenes: Scenes, answer: Answer, selection: Selection) -> dict[str, Any]:
    plan = scenes.plan(answer.index)
    scene = scenes.scene(plan, clean=True)
    limit, _ = selection.limit(answer)
    content = [{"type": part["type"], "text": part.get("text")} for part in scene.content]
    turn = lambda role, said: [{"role": role, "content": said}]  # noqa: E731
    return {
        "images": [_encoded(image) for image in scene.images],
        "prompt": turn("user", content),
        "chosen": turn("assistant", scenes.truth(answer.index)),
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
    answers: Sequence[Answer],
    reasons: Mapping[int, Sequence[str]],
) -> Image.Image:
    """A contact sheet: each scene under its answer's attention, the target framed."""
    cells = []
    tokenizer = answering.processor.tokenizer
    for answer in answers:
        plan = scenes.plan(answer.index)
        scene = scenes.scene(plan)
        prompt = answering.prompt(answer.index, scene)
        ids = torch.tensor(
            [*tokenizer(answer.text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        )
        (attention,) = measure(
            answering.policy,
            [prompt],
            [ids],
            layer=answering.layer,
            pad_token_id=tokenizer.pad_token_id,
            device=answering.device,
        )
        images = image_tokens(prompt, answering.merge)
        strongest = max(float(attention[positions].max()) for positions, _ in images)
        shown = [
            overlay(image, attention[positions], grid, strongest)
            for image, (positions, grid) in zip(scene.images, images, strict=True)
        ]
        target = shown[scene.target_image]
        frame = max(2, max(target.size) // 100)
        ImageDraw.Draw(target).rectangle(scene.box, outline=(0, 160, 0), width=frame)
        verdict = "kept" if not reasons[answer.index] else "; ".join(reasons[answer.index])
        caption = (
            f"{verdict}; {answer.ratio or 0.0:.2f} on the target. {plan.prefix} true: "
            f"{scenes.truth(answer.index)} said: {answer.text}"
        )
        cells.append((_side_by_side(shown), caption))
    return contact_sheet(cells, columns=4)


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
