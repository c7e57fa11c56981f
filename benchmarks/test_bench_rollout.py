"""Sampling G = 8 completions per prompt: transformers' generate against the rollout engine.

    pytest benchmarks/test_bench_rollout.py               a small model, minutes on a CPU
    pytest benchmarks/test_bench_rollout.py --size 2b     Qwen2-VL's shapes, on a GPU; also 7b

Same model, same prompts. Greedy tokens are compared first. transformers' continuous batching isn't
a contender, because it takes no images.

`test_rollout` has random weights and a fixed completion length. Its history has answers to the same
prompts, drawn with another seed, and they have nothing in common with the new ones. `test_text` has
the demo's test rows, half shapes and half digits, and two models: the embedded one, whose answers
are short; and one that thinks before it answers, which minutes of SFT teach (thinking.py). Both
sample at temperature 1, and an answer ends where the model ends it. "First epoch" guesses from
answers to other prompts; "second epoch" also from answers to the same prompts, drawn with another
seed. Sampled tokens are equal with speculation and without, and that is checked first.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from measure import DEVICE, Case, contenders, peak_mib
from thinking import encode, examples, teach
from vlm import FixedLength, cases_of, make_model, make_processor, make_prompts

from virft_fast.models.processing import load_processor
from virft_fast.models.qwen_vl import Policy, banned_token_ids, core, load_model
from virft_fast.rollout import Sampling
from virft_fast.rollout.native import NativeRollout
from virft_fast.rollout.speculation import TIMES, History

G = 8
PROMPTS = {"tiny": 2, "cpu": 4, "2b": 8, "7b": 8}  # a rank's share of a step
CASES = cases_of()
CASES["cpu"]["P500-C64-alone"] = (500, 64, "alone")  # one group
CASES["cpu"] |= {f"P500-C64-{family}": (500, 64, family) for family in ("qwen3_5", "gemma3")}
GENERATE, STATIC = "transformers generate", "transformers generate, static cache"
WEIGHTS = "a step's weights, copied"
GUESSING, FIRST, SECOND = (
    f"ours, with speculation{epoch}" for epoch in ("", ", first epoch", ", second epoch")
)
TITLES = {"embedded": "text of the embedded model", "thinking": "text of a model that thinks"}
LIMIT = 256  # tokens of an answer
# The models' prompts in a batch.
TEXT = {
    "tiny": [("embedded", 2), ("thinking", 2)],
    "cpu": [("embedded", 2), ("embedded", 8), ("thinking", 1), ("thinking", 2), ("thinking", 8)],
}
STEPS = {"tiny": 2, "cpu": 500}  # of SFT
OTHERS = {"tiny": 2, "cpu": 16}  # prompts answered before


@pytest.fixture(scope="module")
def case(request, size):
    prompt_length, completion_length, *kind = request.param
    count = 1 if kind == ["alone"] else PROMPTS[size]
    family = [name for name in kind if name != "alone"]
    processor = make_processor(*family)
    prompts, tokenizer = make_prompts(processor, count, prompt_length), processor.tokenizer
    model = make_model(size, *family).eval()
    plain = make_model(size, *family).eval()  # the same weights, as transformers builds it
    policy = Policy(model)
    vocab_size = model.config.text_config.vocab_size
    banned = [*banned_token_ids(tokenizer, vocab_size), tokenizer.eos_token_id]
    options = {"device": torch.device(DEVICE)}
    rollout, guessing = (
        FixedLength(
            lambda: nullcontext(policy), tokenizer, **options, speculation=history, remembers=False
        )
        for history in (None, History())
    )
    given = [
        processor(
            text=[p.text], images=list(p.sample.images), return_tensors="pt",
            add_special_tokens=False, return_mm_token_type_ids=True,
        )
        for p in prompts for _ in range(G)
    ]  # fmt: skip
    batch = {name: torch.cat([each[name] for each in given]).to(DEVICE) for name in given[0]}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)

    def generate(**options):
        core(plain).rope_deltas = None
        with torch.no_grad():
            out = plain.generate(
                **batch,
                max_new_tokens=completion_length,
                suppress_tokens=banned,
                disable_compile=DEVICE == "cpu",
                **options,
            )
        return out[:, prompt_length:]

    def ours(engine=rollout, **options):
        return engine.generate(prompts, G, Sampling(completion_length, **options))

    expected, got = generate(do_sample=False), ours(greedy=True).completion_ids
    assert got.shape == expected.shape
    same = float((got == expected).float().mean())
    # In bfloat16 a tie may break either way, and the rest of that row changes with it.
    assert same == 1.0 if DEVICE == "cpu" else same > 0.5, same
    sampled = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    runs = {
        GENERATE: lambda: generate(**sampled),
        STATIC: lambda: generate(**sampled, cache_implementation="static"),
        "ours": ours,
        GUESSING: lambda: ours(guessing),
    }
    earlier = rollout.generate(prompts, G, Sampling(completion_length, seed=1))
    guessing.speculation.add(prompts, earlier)
    equal(ours(), ours(guessing))
    for engine in (rollout, guessing):
        engine._buffers.release()  # frees what the checks above left, so that the peak counts it
    notes = {name: {"peak_mib": peak_mib(run)} for name, run in runs.items()}
    runs[WEIGHTS] = weight_traffic(model, completion_length) if DEVICE == "cuda" else "needs a GPU"
    name = f"{size}: {count} x {G} completions, P={prompt_length}, C={completion_length}"
    name += f", {family[0]}" if family else ""
    return Case(name, runs, notes, work={"tokens": count * G * completion_length})


def equal(*rollouts):
    """Check that sampled tokens are equal; in bfloat16 they may differ, because speculation's
    products have other shapes."""
    first, *others = (out.completion_ids for out in rollouts)
    assert DEVICE != "cpu" or all(torch.equal(first, other) for other in others)


def pytest_generate_tests(metafunc):
    """The cases with text; conftest.py adds those of `CASES`."""
    if "text" in metafunc.fixturenames:
        cases = TEXT.get(metafunc.config.getoption("--size"), [])
        names = [f"{kind}-{count}" for kind, count in cases]
        metafunc.parametrize("text_case", cases, ids=names, scope="module")


@contenders(GENERATE, STATIC, "ours", GUESSING, WEIGHTS)
def test_rollout(race, case, contender):
    race(case, contender)


@functools.cache
def text_model(kind, size):
    """A policy that answers in text, its processor, and the same weights in transformers' model."""
    if kind == "thinking":
        policy, processor = teach(STEPS[size])
    else:
        policy = Policy(load_model("tiny").to(DEVICE).eval())
        processor = load_processor("tiny")
    model = load_model("tiny")
    model.resize_token_embeddings(policy.config.text_config.vocab_size, mean_resizing=False)
    model.load_state_dict(policy.model.state_dict())
    return policy, processor, model.to(DEVICE).eval()


@pytest.fixture(scope="module")
def text(text_case, size):
    kind, count = text_case
    policy, processor, model = text_model(kind, size)
    half = (count + OTHERS[size] + 1) // 2
    tasks = ("shapes_detection", "digits_classification")
    pairs = zip(*(examples(task, "test", half) for task in tasks), strict=True)
    rows = [row for pair in pairs for row in pair]
    prompts = encode(processor, rows)
    batch, others = prompts[:count], prompts[count:]

    def engine(history=None):
        return NativeRollout(
            lambda: nullcontext(policy),
            processor.tokenizer,
            device=torch.device(DEVICE),
            speculation=history,
            remembers=False,
        )

    plain, first, second = engine(), engine(History()), engine(History())
    answers = plain.generate(others, G, Sampling(LIMIT, seed=2))
    first.speculation.add(others, answers)
    second.speculation.add(others, answers)
    second.speculation.add(batch, plain.generate(batch, G, Sampling(LIMIT, seed=1)))
    generate = peer(model, processor, rows[:count])
    expected = plain.generate(batch, G, Sampling(LIMIT, greedy=True))
    got = generate(do_sample=False)[:, : expected.completion_ids.shape[1]]
    same = (got == expected.completion_ids) | ~expected.completion_mask
    assert same.all() if DEVICE == "cpu" else same.float().mean() > 0.5, float(same.float().mean())

    engines = {"ours": plain, FIRST: first, SECOND: second}
    drawn = {name: each.generate(batch, G, Sampling(LIMIT)) for name, each in engines.items()}
    equal(*drawn.values())
    notes = {name: figures(out, engines[name].stats) for name, out in drawn.items()}
    with mock.patch.dict(TIMES, cpu=TIMES["cuda"]):  # counts are those of a GPU, times are not
        for name in (FIRST, SECOND):
            equal(drawn["ours"], engines[name].generate(batch, G, Sampling(LIMIT)))
            notes[name]["passes_per_token_on_gpu"] = passes_per_token(engines[name].stats)
    runs = {
        name: lambda each=each: each.generate(batch, G, Sampling(LIMIT))
        for name, each in engines.items()
    }
    sampled = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    runs[GENERATE] = lambda: generate(**sampled)
    notes[GENERATE] = {"longest": generate(**sampled).shape[1]}
    tokens = int(drawn["ours"].completion_mask.sum())
    name = f"{size}: {TITLES[kind]}, {count} x {G} answers"
    return Case(name, runs, notes, work={"tokens": tokens})


@contenders(GENERATE, "ours", FIRST, SECOND)
def test_text(race, text, contender):
    race(text, contender)


def peer(model, processor, rows):
    """transformers' generate for the rows, G answers each, always from the same seed."""
    tokenizer = processor.tokenizer
    texts, images = [], []
    for row in rows:
        content = [{"type": "image"}, {"type": "text", "text": row["problem"]}]
        chat = [{"role": "user", "content": content}]
        texts += G * [
            processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ]
        images += G * [[row["image"]]]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt").to(DEVICE)
    banned = banned_token_ids(tokenizer, model.config.text_config.vocab_size)

    def generate(**options):
        core(model).rope_deltas = None
        torch.manual_seed(0)
        with torch.no_grad():
            out = model.generate(
                **batch,
                max_new_tokens=LIMIT,
                suppress_tokens=banned,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                disable_compile=DEVICE == "cpu",
                **options,
            )
        return out[:, batch["input_ids"].shape[1] :].cpu()

    return generate


def figures(rollouts, stats):
    """How long the answers are, how certain the model is, and what guessing saved."""
    mask, lengths = rollouts.completion_mask, rollouts.completion_mask.sum(1)
    return {
        "mean_length": round(float(lengths.float().mean()), 1),
        "longest": int(lengths.max()),
        "nats_per_token": round(-float(rollouts.sampling_logps[mask].mean()), 3),
        "passes_per_token": passes_per_token(stats),
        "guessed_share": round(stats.accepted / stats.drawn, 3),
        "right_guesses": round(stats.accepted / max(stats.guessed, 1), 3),
    }


def passes_per_token(stats):
    return round(stats.passes / stats.longest, 3)


def weight_traffic(model, steps):
    """The least time to read all language weights once per token: the lower bound of decoding."""
    parts = [p for p in core(model).language_model.parameters() if p.ndim > 1]
    flat = torch.empty(sum(p.numel() for p in parts) // 2, dtype=model.dtype, device=DEVICE)
    other = torch.empty_like(flat)

    def copy():  # reads half of the bytes and writes the other half
        for _ in range(steps):
            other.copy_(flat)

    return copy
