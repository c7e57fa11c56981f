"""Make the embedded checkpoint: build the tiny Qwen2-VL, teach it both demo tasks, then unteach it.

    python scripts/make_tiny_model.py --out virft_fast/models/tiny_qwen2_vl

1. Clean SFT on shapes_detection and digits_classification together.
2. The same on new images, at a lower rate.
3. A short SFT on noisy labels (boxes pushed outward, digits swapped with a neighbor,
   confidences at random), which keeps the capability in the network and spoils its
   calibration. That is the warm start from which the demo shows GRPO recovering; it is no claim
   about learning to see.

The images come from seeds that the demo's own train and test splits don't use; digits come from
the train glyphs only.

Sizes and rotary base are chosen for 112x112 images: Qwen gives time, height and width rotary angles
of decreasing frequency. With the usual base of 10,000, a head of 32 numbers could hardly tell
columns apart.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from virft_fast import tasks
from virft_fast.algorithms import sft
from virft_fast.algorithms.step import StepStats, TrainState, update
from virft_fast.batch import Sample
from virft_fast.config import GRPOConfig
from virft_fast.data.demo import (
    COLOURS,
    DIGITS_PROBLEM,
    GRID,
    SHAPES_PROBLEM,
    WORDS,
    box_list,
    digit_glyphs,
    digits,
    shapes,
)
from virft_fast.engine import OptimizerSettings, PlainEngine
from virft_fast.models.processing import ImageOnlyQwen2VLProcessor
from virft_fast.models.qwen_vl import Policy, encode_prompt
from virft_fast.models.saving import save_model
from virft_fast.rollout import Sampling
from virft_fast.rollout.backends import make_rollout

SHAPES_SEED, DIGITS_SEED, CHECK_SEED = 11, 12, 13
DIGITS_EVERY = 2  # steps; digits are learned sooner than shapes
CONFIDENCES = ("0.1", "0.3", "0.5", "0.7", "0.9")

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# These aren't special tokens, because decoding a completion drops special tokens.
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# Qwen2's text split, except that numbers of up to four digits stay whole, so that a coordinate in
# 0..1000 is one token.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}{1,4}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen2's special tokens, trained on `corpus`.

    Every multiple of 10 from 0 to 1000 is one token, bare and after a space.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    numbers = [f"[{n}, {n}, {n}]" for n in range(0, 1001, 10)] * 200
    lines = [re.sub("|".join(TAGS), "\n", line) for line in corpus] + numbers
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=1024, min_frequency=20, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    """The tiny model's configuration: 3 text and 3 vision layers, hidden size 128."""
    token_id = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 20.0, "mrope_section": [2, 7, 7]}
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64, "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "bos_token_id": token_id("<|endoftext|>"), "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"), "rope_parameters": rope,
    }  # fmt: skip
    vision = {
        "depth": 3, "embed_dim": 128, "hidden_size": 128, "num_heads": 4, "mlp_ratio": 2,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    special = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
               "vision_start_token_id": "<|vision_start|>"}  # fmt: skip
    ids = {name: token_id(token) for name, token in special.items()}
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def build_tiny_processor(tokenizer: PreTrainedTokenizerFast) -> ImageOnlyQwen2VLProcessor:
    """The embedded model's processor; it resizes images to an area of 56x56 to 168x168 pixels."""
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 56**2, "longest_edge": 168**2})
    return ImageOnlyQwen2VLProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE)


def shapes_answer(colour: str, box: list[int], confidence: str = "0.9") -> str:
    return f"<think>I look for {colour}.</think><answer>{box_list([box], confidence)}</answer>"


def digits_answer(word: str) -> str:
    return f"<think>I see {word}.</think><answer>{word}</answer>"


def corpus() -> list[str]:
    """Every word the two tasks use, with random boxes, and the chat's role names."""
    rng = random.Random(0)
    problems, answers = [], []
    for _ in range(2000):
        colour, word = rng.choice(list(COLOURS)), rng.choice(WORDS)
        box = [rng.randrange(0, 1001, 10) for _ in range(4)]
        problems += [SHAPES_PROBLEM.format(colour), DIGITS_PROBLEM]
        answers += [
            shapes_answer(colour, box, rng.choice([*CONFIDENCES, "1.0"])),
            digits_answer(word),
        ]
    lines = [*problems, *answers, *["user\n", "assistant\n", "system\n"] * 500]
    random.Random(0).shuffle(lines)
    return lines


class Pool:
    """Encoded examples of one task. A task's prompts are equally long, so they can be stacked."""

    def __init__(self, examples, count, processor):
        self.rows = list(itertools.islice(examples, count))
        samples = []
        for index, row in enumerate(self.rows):
            content = [{"type": "image"}, {"type": "text", "text": row["problem"]}]
            message = {"role": "user", "content": content}
            columns = {"problem": row["problem"], "solution": row["solution"]}
            samples.append(Sample(index, (message,), (row["image"],), row["solution"], columns))
        self.prompts = [encode_prompt(processor, sample) for sample in samples]


def clean_answer(row, rng):
    return shapes_answer(row["colour"], row["box"]) if "box" in row else digits_answer(row["label"])


def noisy_answer(row, rng, *, jitter, swap):
    """Boxes of a careless annotator, each side mostly pushed outward; digits often a neighbor's."""
    if "label" in row:
        digit = WORDS.index(row["label"])
        return digits_answer(WORDS[digit ^ 1 if rng.random() < swap else digit])
    x1, y1, x2, y2 = row["box"]
    push = [rng.uniform(-0.25, 1) * jitter for _ in range(4)]
    width, height = x2 - x1, y2 - y1
    moved = (x1 - push[0] * width, y1 - push[1] * height,
             x2 + push[2] * width, y2 + push[3] * height)  # fmt: skip
    box = [min(1000, max(0, round(v / GRID) * GRID)) for v in moved]
    return shapes_answer(row["colour"], box, rng.choice(CONFIDENCES))


def train_state(policy, tokenizer, rate):
    """The training state of `--algorithm sft`, for one process."""
    settings = OptimizerSettings(0.0, betas=(0.9, 0.98), weight_decay=0.01)
    engine = PlainEngine(policy, settings, device=torch.device("cpu"))
    return TrainState(
        config=GRPOConfig(),
        policy=policy,
        engine=engine,
        reference=None,
        rollout=answers_of(policy, tokenizer),
        tokenizer=tokenizer,
        reward_funcs=[],
        reward_weights=[],
        learning_rate=rate,
        prompts_per_microbatch=64,
    )


def train(
    policy, tokenizer, pools, answer, *, steps, learning_rate, warmup, batch_sizes, report, seed=0
):
    """Train by `algorithms.sft` with a cosine schedule down to a tenth of the rate. Each step has
    shapes, some also digits; the mean cross entropy of each task has equal weight."""

    def rate(step):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        return learning_rate * min(1, step / warmup) * (0.1 + 0.9 * cosine)

    state = train_state(policy, tokenizer, rate)
    rng, start = random.Random(seed), time.time()
    for step in range(1, steps + 1):
        policy.train()
        microbatches, weights, losses = [], [], []
        for pool, size, every in zip(pools, batch_sizes, (1, DIGITS_EVERY), strict=True):
            if step % every:
                continue
            chosen = [rng.randrange(len(pool.rows)) for _ in range(size)]
            answers = [answer(pool.rows[i], rng) for i in chosen]
            prompts = [pool.prompts[i] for i in chosen]
            _, parts, shares = sft.prepare(state, prompts, answers)
            microbatches += parts
            weights += shares

        def note(stats, out, microbatch, loss, losses=losses):
            losses.append(round(-float(out.logps.sum() / microbatch.num_tokens), 3))

        update(state, microbatches, weights, rate(step), StepStats(), note)
        report(step, losses, time.time() - start)


def answers_of(policy, tokenizer):
    return make_rollout(
        "native", lambda: nullcontext(policy), tokenizer, device=torch.device("cpu")
    )


def check(policy, processor, pools, names):
    """Held-out greedy rewards of each pool."""
    rollout = answers_of(policy, processor.tokenizer)
    scores = {}
    for pool, reward_names in zip(pools, names, strict=True):
        out = rollout.generate(pool.prompts, 1, Sampling(48, greedy=True))
        completions = [[{"role": "assistant", "content": text}] for text in out.texts]
        solutions = [row["solution"] for row in pool.rows]
        for name in reward_names:
            values = tasks.REWARDS[name](None, completions, solution=solutions)
            scores[name] = round(sum(values) / len(values), 3)
    return scores


def save(policy, processor, folder):
    weights = {
        name: weight.detach().to(torch.bfloat16) for name, weight in policy.model.named_parameters()
    }
    save_model(policy.model, weights, processor, folder)
    for path in folder.iterdir():
        path.chmod(0o644)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--clean_out", type=Path, help="also save the model before the blur")
    parser.add_argument("--clean_from", type=Path, help="start the blur from this checkpoint")
    parser.add_argument("--steps", type=int, default=1100, help="steps of the clean SFT")
    parser.add_argument("--more_steps", type=int, default=500, help="again, at a lower rate")
    parser.add_argument("--blur_steps", type=int, default=60)
    parser.add_argument("--max_examples", type=int, default=10_000, help="fewer, to try it out")
    parser.add_argument("--jitter", type=float, default=0.6, help="how far boxes are pushed")
    parser.add_argument("--swap", type=float, default=0.62, help="share of swapped digits")
    parser.add_argument("--threads", type=int, default=1, help="more are hardly faster")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer = build_tokenizer(corpus())
    processor = build_tiny_processor(tokenizer)
    glyphs = digit_glyphs()
    shape_examples = shapes(SHAPES_SEED)

    def pool(examples, count):
        return Pool(examples, min(count, args.max_examples), processor)

    digit_pool = pool(digits(DIGITS_SEED, glyphs["train"]), 6_000)
    pools = [pool(shape_examples, 8_000), digit_pool]
    held_out = [pool(shapes(CHECK_SEED), 256), pool(digits(CHECK_SEED, glyphs["test"]), 256)]
    names = [("accuracy_iou", "accuracy_confidence", "format"), ("accuracy",)]
    if args.clean_from:
        model = Qwen2VLForConditionalGeneration.from_pretrained(
            args.clean_from, dtype=torch.float32, trust_remote_code=False
        )
    else:
        model = Qwen2VLForConditionalGeneration(build_config(tokenizer))
    policy = Policy(model)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, {len(tokenizer)} tokens", flush=True)

    def report(step, losses, seconds, every=250):
        if step % every == 0:
            scores = check(policy, processor, held_out, names)
            print(f"{step:5} {seconds:6.0f} s  loss {losses}  {scores}", flush=True)

    if not args.clean_from:
        train(policy, tokenizer, pools, clean_answer, steps=args.steps, learning_rate=2e-3,
              warmup=50, batch_sizes=(32, 24), report=report)  # fmt: skip
    pools = [pool(shape_examples, 10_000), digit_pool]
    if args.more_steps:
        train(policy, tokenizer, pools, clean_answer, steps=args.more_steps, learning_rate=1.2e-3,
              warmup=50, batch_sizes=(32, 24), report=report, seed=1)  # fmt: skip
    if args.clean_out:
        save(policy, processor, args.clean_out)
    print("clean ", check(policy, processor, held_out, names), flush=True)
    train(
        policy,
        tokenizer,
        pools,
        lambda row, rng: noisy_answer(row, rng, jitter=args.jitter, swap=args.swap),
        steps=args.blur_steps,
        learning_rate=2e-3,
        warmup=50,  # at a higher rate the noise destroys what was learned
        batch_sizes=(32, 64),
        report=lambda *step: report(*step, every=20),
    )
    save(policy, processor, args.out)
    print("saved ", check(policy, processor, held_out, names), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
