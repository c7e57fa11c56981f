"""The model's own answers to scenes, and where it looked while answering.

Each batch of answers is written to a journal immediately, so that a killed run can resume.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from virft_fast import dist
from virft_fast.batch import Prompt, Row
from virft_fast.evaluation.journal import Journal
from virft_fast.mia.scenes import Scene, ScenePlan, Scenes, without_details
from virft_fast.models.image_attention import coverage, image_tokens
from virft_fast.models.qwen_vl import Policy, control_tokens_in, encode_prompt
from virft_fast.rollout import Sampling
from virft_fast.rollout.native import NativeRollout
from virft_fast.rollout.observers import AttentionObserver


@dataclass(frozen=True)
class Answer:
    """The model's answer to one scene.

    Attributes:
        text: the model's answer. truth: the row's own answer.
        ratio: share of attention on the target; None if no image got any attention.
        perplexity: exp of the mean negative log-prob of the answer's tokens, under the distribution
            they were sampled from, in which control tokens have probability 0.
        num_tokens: includes EOS. truncated: whether EOS is missing.
        problem: why there is no answer. In that case, texts and numbers are empty.
        digest: the scene's digest, from `Scenes.digest`.
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


@dataclass
class Answering:
    """A model that answers scenes greedily.

    Attributes:
        layer: the layer whose attention is measured, from 0; MIA-DPO uses the 16th of 32.
        max_completion_length, max_prompt_length: in tokens. Longer prompts are not answered.
    """

    policy: Policy
    rollout: NativeRollout
    processor: Any
    layer: int
    max_completion_length: int
    device: torch.device
    max_prompt_length: int | None = None

    @property
    def merge(self) -> int:
        """The number of image patches per side that become one token."""
        return self.processor.image_processor.merge_size

    @property
    def sampling(self) -> Sampling:
        return Sampling(max_completion_length=self.max_completion_length, greedy=True)

    def special(self, text: str) -> bool:
        """Whether the text contains control tokens. In a prompt they would end a turn, and DPO
        rejects answers that contain them."""
        return bool(control_tokens_in(self.processor.tokenizer, text))

    def prompt(self, index: int, scene: Scene) -> Prompt | str:
        """The scene as model input, or the reason why it can't be used."""
        if any(self.special(item.get("text", "")) for item in scene.content):
            return "special tokens in the question"
        try:
            prompt = encode_prompt(self.processor, scene.sample(index))
        except ValueError as error:
            return without_details(str(error))
        limit = self.max_prompt_length
        if limit is not None and len(prompt.input_ids) > limit:
            return f"a prompt of more than {limit} tokens"
        return prompt

    @torch.no_grad()
    def answers(self, plans: Sequence[ScenePlan], scenes: Sequence[Scene]) -> list[Answer]:
        """The answers to a batch of scenes, in their order."""
        answers = {plan.index: Answer(plan.index, plan.kind, plan.num_images) for plan in plans}
        readable: list[tuple[ScenePlan, Scene, Prompt]] = []
        for plan, scene in zip(plans, scenes, strict=True):
            prompt = self.prompt(plan.index, scene)
            if isinstance(prompt, Prompt) and not self.rollout.fits(prompt, 1, self.sampling):
                prompt = "more tokens than the rollout holds (--rollout_cache_tokens)"
            if isinstance(prompt, str):
                answers[plan.index] = replace(answers[plan.index], problem=prompt)
            else:
                readable.append((plan, scene, prompt))
        answers |= {answer.index: answer for answer in self._generate(readable)}
        return list(answers.values())

    def _generate(self, batch: Sequence[tuple[ScenePlan, Scene, Prompt]]) -> Iterator[Answer]:
        if not batch:
            return
        prompts = [prompt for _, _, prompt in batch]
        observer = AttentionObserver(self.layer)
        rollouts = self.rollout.generate(prompts, 1, self.sampling, observer=observer)
        lengths = rollouts.completion_mask.sum(1).tolist()
        mean_logps = rollouts.sampling_logps.sum(1).cpu() / torch.tensor(lengths)
        for number, (plan, scene, prompt) in enumerate(batch):
            answer = Answer(plan.index, plan.kind, plan.num_images)
            text, attention = rollouts.texts[number], observer.attention[number].cpu()
            if self.special(text):  # spelled out in ordinary tokens
                yield replace(answer, problem="special tokens in the model's answer")
                continue
            yield replace(
                answer,
                target=plan.target,
                text=text,
                ratio=attention_ratio(attention, prompt, scene, plan.kind, self.merge),
                perplexity=_finite((-mean_logps[number]).exp()),
                num_tokens=lengths[number],
                truncated=bool(rollouts.truncated[number]),
            )


def attention_ratio(
    attention: Tensor, prompt: Prompt, scene: Scene, kind: str, merge: int
) -> float | None:
    """The target's share of the attention on all images; None if no image got any attention.

    For a sequence, the mean over the target's tokens divided by the sum of all images' means. For a
    single image, the share inside the target's box, where tokens on its edge count by area.

    Args:
        attention: (P,).
        merge: patches per side of a token.
    """
    images = image_tokens(prompt, merge)
    if kind == "sequence":
        means = torch.stack([attention[positions].mean() for positions, _ in images])
        total, target = means.sum(), means[scene.target_image]
    else:
        positions, grid = images[scene.target_image]
        weights = coverage(scene.box, scene.images[scene.target_image].size, grid)
        on_image = attention[positions]
        total, target = on_image.sum(), (on_image * weights).sum()
    return _finite(target / total) if total > 0 else None


def _finite(value: Tensor) -> float | None:
    return float(value) if math.isfinite(value) else None


def open_journal(path: Path, settings: Row, *, overwrite: bool) -> Journal | None:
    """The journal of answers on the main process, None on the others.

    Args:
        settings: what answers depend on, except their scenes: answers store their digests.
        overwrite: delete answers from a run with other settings.
    Raises:
        ValueError: on all ranks, if the journal can't be used; see `Journal`.
    """
    journals: list[Journal] = []

    def open_it() -> None:
        try:
            journals.append(Journal(path, settings))
        except (ValueError, OSError):
            if not overwrite:
                raise
            journals.append(Journal(path, settings, overwrite=True))

    dist.from_main(open_it)
    return journals[0] if journals else None


def answer_all(
    scenes: Scenes,
    answering: Answering,
    journal: Journal | None,
    indices: Sequence[int],
    *,
    batch_size: int,
    progress: Callable[[int], object] = lambda rows: None,
) -> dict[int, Answer]:
    """Row -> answer, for all `indices` on the main process. Other ranks get only the new answers.

    Answers in the journal are reused if their scenes are unchanged. Rows without an answer are not
    journaled, so that the next run, which may have their images or more memory, tries them again.
    """
    records = journal.records.get("answer", []) if journal is not None else []
    journaled = {record["index"]: Answer(**record) for record in records}
    digests = dist.all_gather_object({i: answer.digest for i, answer in journaled.items()})[0]
    mine = indices[dist.rank() :: dist.world_size()]
    answers: dict[int, Answer] = {}
    # All ranks need the same number of rounds, because they exchange answers after each one.
    for first in range(0, -(-len(indices) // dist.world_size()), batch_size):
        batch = mine[first : first + batch_size]
        for new, reused in dist.all_gather_object(answer_batch(scenes, answering, batch, digests)):
            if journal is not None:
                journal.add("answer", [asdict(answer) for answer in new if not answer.problem])
            answers |= {answer.index: answer for answer in new}
            answers |= {index: journaled[index] for index in reused if index in journaled}
            progress(len(new) + len(reused))
    return {index: answers[index] for index in indices if index in answers}


def answer_batch(
    scenes: Scenes, answering: Answering, batch: Sequence[int], digests: Mapping[int, str]
) -> tuple[list[Answer], list[int]]:
    """New answers for rows of the batch, and the rows whose answer in the journal is still valid.

    Args:
        digests: row -> digest of the scene that the journal's answer is about.
    """
    new: list[Answer] = []
    reused: list[int] = []
    built: list[tuple[ScenePlan, Scene]] = []
    for index in batch:
        plan = scenes.plan(index)
        if isinstance(plan, str):
            new.append(Answer(index, problem=plan))
        elif digests.get(index) == scenes.digest(plan):
            reused.append(index)
        elif isinstance(scene := scenes.scene(plan), str):
            new.append(Answer(index, problem=scene))
        elif answering.special(scenes.truth(index)):
            new.append(Answer(index, problem="special tokens in the row's own answer"))
        else:
            built.append((plan, scene))
    answers = answering.answers([plan for plan, _ in built], [scene for _, scene in built])
    for (plan, _), answer in zip(built, answers, strict=True):
        truth = scenes.truth(plan.index)
        new.append(replace(answer, truth=truth, digest=scenes.digest(plan)))
    return new, reused
