"""The demo's tasks answered at length, and a model that our own SFT teaches to answer so.

An answer thinks in about a dozen sentences before it gives its box or digit: what is asked, where
the shape is, its edges, a subtraction for width and height, a doubt about one edge, a look for more
shapes. For a digit, it describes strokes and weighs a digit that looks similar. Each sentence is
one of several wordings, some are left out, and their order varies. The numbers come from the row.
For example:

    <think>Okay, I have to find every red shape and give its box. I scan the picture from the top
    left to the bottom right. There is a red shape in the middle left. Its left edge is at 120 and
    its right edge at 400. The top edge is near 320, the bottom edge near 640. The width is 400 -
    120 = 280, and the height is 640 - 320 = 320. So it is higher than wide. ...

The embedded model's tokenizer would spell most of these words in letters, which are easy to guess.
So it gets the words as tokens, as the tokenizers of large models have them.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from typing import Any

import torch
from measure import DEVICE
from tokenizers import Tokenizer

from virft_fast.algorithms import sft
from virft_fast.algorithms.step import StepStats, TrainState, update
from virft_fast.batch import Prompt, Row
from virft_fast.config import GRPOConfig
from virft_fast.data import SampleDataset
from virft_fast.data.demo import COLOURS, DEMO_DATASETS, WORDS, box_list
from virft_fast.engine import OptimizerSettings, PlainEngine
from virft_fast.models.processing import load_processor
from virft_fast.models.qwen_vl import Policy, encode_prompt, load_model

SURE = {"0.9": "I am quite sure", "0.7": "I am fairly sure", "0.5": "I am not sure about the edges"}
OPENINGS = (
    "Okay, I have to {task}.", "Let me think: I should {task}.", "The question is to {task}.",
    "So the user wants me to {task}.", "First, what is asked? I need to {task}.",
)  # fmt: skip
SCANS = (
    "I scan the picture from the top left to the bottom right.",
    "Let me go through the picture row by row.",
    "The background is dark and there is a little noise, which I can ignore.",
    "I look at the corners first and then at the middle.",
)
PLACES = (
    "There is a {c} shape in the {where}.", "In the {where} I can see something {c}.",
    "One {c} area stands out, it is in the {where}.", "I notice a {c} shape in the {where}.",
)  # fmt: skip
SIDES = (
    "Its left edge is at {x1} and its right edge at {x2}.",
    "From left to right it goes from {x1} to {x2}.",
    "It starts at {x1} on the left and ends at {x2} on the right.",
    "The left side is near {x1}, the right side is near {x2}.",
)
ENDS = (
    "The top edge is near {y1}, the bottom edge near {y2}.",
    "From top to bottom it goes from {y1} to {y2}.",
    "It begins at {y1} at the top and reaches down to {y2}.",
    "The top is at {y1} and the bottom is at {y2}.",
)
SIZES = (
    "The width is {x2} - {x1} = {w}, and the height is {y2} - {y1} = {h}.",
    "That makes it {w} wide and {h} high.",
    "So the width is {w} and the height is {h}, which means that it is {form}.",
    "It is {form}.",
)
CENTRES = (
    "Its center is at about ({cx}, {cy}).",
    "The middle of the shape should then be near {cx}, {cy}.",
)
DOUBTS = (
    "Wait, is the {side} edge really at {value}? It could also be {other}, but no, {value} fits.",
    "Hmm, the {side} edge might be at {other}. I look again, and {value} is better.",
    "Let me check the {side} edge again: {value} looks right to me.",
    "The {side} edge is a little blurred, so {value} may be off by a few pixels.",
)
OTHERS = (
    "Is there another {c} shape? I see none.", "Nothing else in the picture is {c}.",
    "The other colors don't count here.", "I look for more {c} shapes, but there is only this one.",
)  # fmt: skip
BOX_ENDINGS = (
    "So the answer is one box, [{x1}, {y1}, {x2}, {y2}]. {sure}.",
    "{sure}, so I answer with this box.", "I will give one box. {sure}.",
    "Putting it together, the box is [{x1}, {y1}, {x2}, {y2}], and {sure}.",
)  # fmt: skip

STROKES = {
    "zero": ("one closed loop", "an empty middle"), "one": ("one upright stroke", "no loop at all"),
    "two": ("a curve at the top", "a flat line at the bottom"),
    "three": ("two open bows on the right", "a small notch on the left"),
    "four": ("an upright stroke on the right", "a line that crosses it"),
    "five": ("a flat line at the top", "an open bow at the bottom"),
    "six": ("a loop at the bottom", "a long curve on the left"),
    "seven": ("a flat line at the top", "one slanted stroke"),
    "eight": ("two closed loops", "a narrow middle"),
    "nine": ("a loop at the top", "a stroke that goes down on the right"),
}  # fmt: skip
SIMILAR = dict(
    zip(
        WORDS,
        ("six", "seven", "seven", "eight", "nine", "six", "five", "one", "three", "four"),
        strict=True,
    )
)
INKS = (
    "The ink is {ink} and the background is dark.", "The digit is drawn in {ink} ink.",
    "I see {ink} strokes on a dark background.",
)  # fmt: skip
PARTS = (
    "I can see {stroke}.", "There is {stroke}.", "What stands out is {stroke}.",
    "Then I notice {stroke}.", "The picture shows {stroke}, which is a good hint.",
)  # fmt: skip
GUESSES = (
    "This looks like a {word}.", "My first guess is {word}.", "That would fit a {word}.",
    "I would say that it is a {word}.",
)  # fmt: skip
RIVALS = (
    "Could it be a {other}? A {other} would have {its}, and I don't see that.",
    "Wait, a {other} looks similar, but a {other} has {its}.",
    "Hmm, it might also be a {other}. For that I would expect {its}. No, {word} is better.",
    "Let me compare it with a {other}: there I would expect {its}, which is not here.",
)
RECHECKS = (
    "Let me check again: {stroke} and {second}, that is a {word}.",
    "I look once more at the strokes: {second} is clear, and {stroke} too.",
    "To be sure, I follow the line from the top to the bottom: {stroke}, then {second}.",
)
DIGIT_ENDINGS = (
    "So the answer is {word}.", "I am quite sure that it is {word}.",
    "All of this speaks for {word}, so that is my answer.", "I will answer {word}.",
)  # fmt: skip


def thought(row: Row, rng: random.Random) -> str:
    """An answer to a row of the demo, true but for its doubts and its confidence."""
    return _of_shape(row, rng) if "box" in row else _of_digit(row, rng)


def _of_shape(row: Row, rng: random.Random) -> str:
    x1, y1, x2, y2 = row["box"]
    width, height = x2 - x1, y2 - y1
    column = ("left", "middle", "right")[min(2, (x1 + x2) * 3 // 2000)]
    line = ("top", "middle", "bottom")[min(2, (y1 + y2) * 3 // 2000)]
    where = "middle" if column == line else f"{line} {column}"
    side, value = rng.choice([("left", x1), ("top", y1), ("right", x2), ("bottom", y2)])
    confidence = rng.choice([*SURE, "0.9"])
    facts = {
        "c": row["colour"], "x1": x1, "y1": y1, "x2": x2, "y2": y2, "w": width, "h": height,
        "task": f"find every {row['colour']} shape and give its box", "where": where,
        "form": "wider than high" if width > height else "higher than wide",
        "cx": (x1 + x2) // 20 * 10, "cy": (y1 + y2) // 20 * 10, "side": side, "value": value,
        "other": max(0, min(1000, value + rng.choice([-40, 40]))), "sure": SURE[confidence],
    }  # fmt: skip
    edges, sizes, checks = [SIDES, ENDS], [SIZES, CENTRES], [DOUBTS, OTHERS]
    for slots in (edges, sizes, checks):
        rng.shuffle(slots)
    slots = [OPENINGS, SCANS, PLACES, *edges, *sizes, DOUBTS, *checks, BOX_ENDINGS]
    box = box_list([row["box"]], confidence)
    return f"<think>{_sentences(slots, facts, rng)}</think><answer>{box}</answer>"


def _of_digit(row: Row, rng: random.Random) -> str:
    word = row["label"]
    other = SIMILAR[word] if rng.random() < 0.7 else rng.choice([w for w in WORDS if w != word])
    stroke, second = rng.sample(STROKES[word], 2)
    facts = {
        "task": "name the digit in the picture", "word": word, "other": other, "stroke": stroke,
        "second": second, "its": rng.choice(STROKES[other]), "ink": rng.choice([*COLOURS, "light"]),
    }  # fmt: skip
    checks = [RIVALS, RECHECKS]
    rng.shuffle(checks)
    text = _sentences([OPENINGS, SCANS, INKS, PARTS], facts, rng)
    text += " " + _sentences([PARTS], facts | {"stroke": second}, rng)
    text += " " + _sentences([GUESSES, *checks, RIVALS, RECHECKS, DIGIT_ENDINGS], facts, rng)
    return f"<think>{text}</think><answer>{word}</answer>"


def _sentences(slots: list[tuple[str, ...]], facts: Row, rng: random.Random) -> str:
    return " ".join(rng.choice(wordings).format(**facts) for wordings in slots)


def examples(task: str, split: str, count: int) -> list[Row]:
    """The first rows of a demo data set."""
    return list(itertools.islice(DEMO_DATASETS[task](split, 0), count))


def encode(processor: Any, rows: list[Row]) -> list[Prompt]:
    plain = [{key: row[key] for key in ("image", "problem", "solution")} for row in rows]
    samples = SampleDataset(plain)
    return [encode_prompt(processor, samples.get(index)) for index in range(len(rows))]


def add_words(tokenizer: Any, texts: list[str]) -> None:
    """Make every word of the texts one token; the ids of the other tokens stay."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    # Else added tokens would get new ids.
    vocabulary |= {token["content"]: token["id"] for token in content["added_tokens"]}
    free = itertools.count(max(tokenizer.get_vocab().values()) + 1)
    for word in sorted({word for text in texts for word in re.findall(r" ?[A-Za-z]+", text)}):
        pieces = tokenizer.backend_tokenizer.encode(word, add_special_tokens=False).tokens
        for count in range(1, len(pieces)):
            left, right = "".join(pieces[:count]), pieces[count]
            if left + right not in vocabulary:
                vocabulary[left + right] = next(free)
                merges.append([left, right])
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))


def teach(steps: int, size: int = 8) -> tuple[Policy, Any]:
    """The embedded model after so many steps of SFT on `size` thoughts, and its processor."""
    rng, processor = random.Random(0), load_processor("tiny")
    rows = [
        row
        for task in ("shapes_detection", "digits_classification")
        for row in examples(task, "train", 64 * size)
    ]
    add_words(processor.tokenizer, [thought(rng.choice(rows), rng) for _ in range(2000)])
    torch.manual_seed(0)  # of the new words
    model = load_model("tiny")
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    policy = Policy(model.to(DEVICE).train())
    settings = OptimizerSettings(0.0, betas=(0.9, 0.98))
    engine = PlainEngine(policy, settings, device=torch.device(DEVICE))
    state = TrainState(
        config=GRPOConfig(),
        policy=policy,
        engine=engine,
        reference=None,
        rollout=None,
        tokenizer=processor.tokenizer,
        reward_funcs=[],
        reward_weights=[],
        learning_rate=lambda step: 0.0,
        prompts_per_microbatch=size,
    )
    prompts = encode(processor, rows)
    for step in range(steps):
        chosen = rng.sample(range(len(rows)), size)
        answers = [thought(rows[index], rng) for index in chosen]
        batch = policy.place_images([prompts[index] for index in chosen], torch.device(DEVICE))
        _, microbatches, shares = sft.prepare(state, batch, answers)
        rate = 3e-3 * min(1.0, (step + 1) / 20) * (1.0 - 0.95 * step / steps)
        update(state, microbatches, shares, rate, StepStats(), sft.note_cross_entropy)
    return policy.eval(), processor
