"""Sampling G = 8 completions per prompt: transformers' generate against the rollout engine.

    pytest benchmarks/test_bench_rollout.py               a small model, minutes on a CPU
    pytest benchmarks/test_bench_rollout.py --size 2b     Qwen2-VL's shapes, on a GPU; also 7b

Same model, same prompts, fixed completion length. Greedy tokens are compared first. transformers'
continuous batching isn't a contender, because it takes no images.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from measure import DEVICE, Case, contenders, peak_mib
from vlm import SHAPES, FixedLength, cases_of, make_model, make_processor, make_prompts

from virft_fast.models.qwen_vl import Policy, banned_token_ids, core
from virft_fast.rollout import Sampling

G = 8
PROMPTS = {"tiny": 2, "cpu": 4, "2b": 8, "7b": 8}  # a rank's share of a step
CASES = cases_of()
CASES["cpu"]["P500-C64-alone"] = (500, 64, "alone")  # one group
GENERATE, STATIC = "transformers generate", "transformers generate, static cache"
WEIGHTS = "a step's weights, copied"


@pytest.fixture(scope="module")
def case(request, size):
    prompt_length, completion_length, *alone = request.param
    count = 1 if alone else PROMPTS[size]
    prompts = make_prompts(make_processor(), count, prompt_length)
    tokenizer = make_processor().tokenizer
    model = make_model(size).eval()
    plain = make_model(size).eval()  # the same weights, as transformers builds it
    policy = Policy(model)
    banned = [*banned_token_ids(tokenizer, SHAPES[size]["vocab_size"]), tokenizer.eos_token_id]
    rollout = FixedLength(lambda: nullcontext(policy), tokenizer, device=torch.device(DEVICE))
    batch = {
        "input_ids": torch.stack([p.input_ids for p in prompts]).repeat_interleave(G, 0),
        "mm_token_type_ids": torch.stack([p.mm_token_type_ids for p in prompts]).repeat_interleave(
            G, 0
        ),
        "pixel_values": torch.cat([p.pixel_values for p in prompts for _ in range(G)]),
        "image_grid_thw": torch.cat([p.image_grid_thw for p in prompts for _ in range(G)]),
    }
    batch = {name: part.to(DEVICE) for name, part in batch.items()}
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

    def ours(**options):
        return rollout.generate(prompts, G, Sampling(completion_length, **options))

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
    }
    rollout._buffers.release()  # frees what the check above left, so that the peak counts it
    notes = {name: {"peak_mib": peak_mib(run)} for name, run in runs.items()}
    runs[WEIGHTS] = weight_traffic(model, completion_length) if DEVICE == "cuda" else "needs a GPU"
    name = f"{size}: {count} x {G} completions, P={prompt_length}, C={completion_length}"
    return Case(name, runs, notes, work={"tokens": count * G * completion_length})


@contenders(GENERATE, STATIC, "ours", WEIGHTS)
def test_rollout(race, case, contender):
    race(case, contender)


def weight_traffic(model, steps):
    """The least time to read all language weights once per token: the lower bound of decoding."""
    parts = [p for p in core(model).language_model.parameters() if p.ndim > 1]
    flat = torch.empty(sum(p.numel() for p in parts) // 2, dtype=model.dtype, device=DEVICE)
    other = torch.empty_like(flat)

    def copy():  # reads half of the bytes and writes the other half
        for _ in range(steps):
            other.copy_(flat)

    return copy
