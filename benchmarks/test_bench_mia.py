"""MIA-DPO's selection: answers and where the model looked, in the original's way and in ours.

    pytest benchmarks/test_bench_mia.py               a small model, minutes on a CPU
    pytest benchmarks/test_bench_mia.py --size 2b     Qwen2-VL's shapes, on a GPU; also 7b

The original answers one sample at a time with transformers' generate, which returns all attention
maps, and assembles those of one layer into a whole map per head. Model, scenes and number of tokens
are the same for both. On a CPU, answers and attention ratios are compared first.

That loop is measured twice. Attention maps need transformers' eager attention. The documented
switch (`attn_implementation="eager"`) makes the vision tower eager as well. So was all of the
original's attention: LLaVA 1.5 pins releases of transformers (4.31, 4.37) that offer nothing else
for its tower (huggingface/transformers#31940). But LLaVA's tower reads a collage as 577 tokens.
Qwen2-VL's reads this one as 10,608 patches, where eager attention takes most of the loop's time.
The second form therefore uses SDPA in the tower, like ours, and maps in the language model only.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from measure import DEVICE, Case, contenders, peak_mib
from PIL import Image
from vlm import SHAPES, FixedLength, make_model, make_processor

from virft_fast.mia import SceneLayout, ScenePlan, attention_ratio, compose
from virft_fast.models.qwen_vl import Policy, banned_token_ids, core, encode_prompt
from virft_fast.rollout import Sampling
from virft_fast.rollout.observers import AttentionObserver

# kind, images, side of an image in pixels, scenes, tokens of an answer
FULL = {"collage": ("collage", 9, 448, 8, 64), "sequence": ("sequence", 3, 224, 16, 64)}
TINY = {"collage": ("collage", 9, 56, 2, 4), "sequence": ("sequence", 3, 56, 2, 4)}
CASES = {"tiny": TINY, "cpu": FULL, "2b": FULL, "7b": FULL}
EAGER, SDPA = "transformers' maps, all attention eager", "transformers' maps, SDPA in the tower"


def make_scenes(kind, count, side, number):
    layout, rng = SceneLayout(cell=side), np.random.default_rng(0)
    for index in range(number):
        pixels = rng.integers(0, 255, (count, side // 14, side // 14, 3)).astype("u1")
        images = [Image.fromarray(p).resize((side, side)) for p in pixels]
        target = index % count
        plan = ScenePlan(index, kind, tuple(range(count)), target, f"In Image{target + 1},")
        yield compose(plan, images, "Which digit is this?", layout)


@pytest.fixture(scope="module")
def case(request, size):
    kind, count, side, number, length = request.param
    processor = make_processor()
    tokenizer = processor.tokenizer
    scenes = list(make_scenes(kind, count, side, number))
    processor.image_processor.size["longest_edge"] = 28 * 28 * 4000
    prompts = [encode_prompt(processor, scene.sample(i)) for i, scene in enumerate(scenes)]
    model = make_model(size).eval()
    plain = make_model(size).eval()  # the same weights, as transformers builds it
    policy, device = Policy(model), torch.device(DEVICE)
    layer = SHAPES[size]["num_hidden_layers"] // 2
    heads = SHAPES[size]["num_attention_heads"]
    banned = [*banned_token_ids(tokenizer, SHAPES[size]["vocab_size"]), tokenizer.eos_token_id]
    rollout = FixedLength(lambda: nullcontext(policy), tokenizer, device=device)

    def full_map(prompt, scene):
        """Answer and ratio of one sample, from maps of all layers and heads."""
        core(plain).rope_deltas = None
        with torch.no_grad():
            out = plain.generate(
                input_ids=prompt.input_ids[None].to(device),
                attention_mask=torch.ones_like(prompt.input_ids[None]).to(device),
                mm_token_type_ids=prompt.mm_token_type_ids[None].to(device),
                pixel_values=prompt.pixel_values.to(device, plain.dtype),
                image_grid_thw=prompt.image_grid_thw.to(device),
                max_new_tokens=length,
                do_sample=False,
                suppress_tokens=banned,
                output_attentions=True,
                return_dict_in_generate=True,
            )
        read = len(prompt.input_ids)
        whole = torch.zeros(heads, read + length - 1, read + length - 1, device=device)
        for step, maps in enumerate(out.attentions):
            rows = maps[layer][0].float()  # (heads, P or 1, keys)
            first = 0 if step == 0 else read + step - 1
            whole[:, first : first + rows.shape[1], : rows.shape[2]] = rows
        attention = whole.mean(0)[read:, :read].mean(0).cpu()
        return out.sequences[0, read:].cpu(), attention_ratio(attention, prompt, scene, kind, 2)

    def full_maps(tower):
        """All samples, one after another."""
        plain.set_attn_implementation({"text_config": "eager", "vision_config": tower})
        assert plain.config.text_config._attn_implementation == "eager"
        assert plain.config.vision_config._attn_implementation == tower
        return [full_map(*pair) for pair in zip(prompts, scenes, strict=True)]

    def ours():
        sampling = Sampling(max_completion_length=length, greedy=True)
        observer = AttentionObserver(layer)
        drawn = rollout.generate(prompts, 1, sampling, observer=observer)
        answers = zip(drawn.completion_ids.cpu(), observer.attention, prompts, scenes, strict=True)
        return [
            (row, attention_ratio(attention.cpu(), prompt, scene, kind, 2))
            for row, attention, prompt, scene in answers
        ]

    runs = {EAGER: partial(full_maps, "eager"), SDPA: partial(full_maps, "sdpa"), "ours": ours}
    found = ours()
    for loop in (runs[EAGER], runs[SDPA]):
        for (expected, ratio), (got, own) in zip(loop(), found, strict=True):
            if DEVICE == "cpu":  # in bfloat16 a tie may break either way
                assert torch.equal(got, expected)
                assert abs(own - ratio) < 1e-5, (own, ratio)
    rollout._buffers.release()  # frees what graphs keep, so that the peak counts it
    notes = {name: {"peak_mib": peak_mib(run)} for name, run in runs.items()}
    tokens = max(len(prompt.input_ids) for prompt in prompts)
    name = f"{size}: {number} scenes, {kind} of {count}, P={tokens}, C={length}"
    return Case(name, runs, notes, work={"scenes": number})


@pytest.mark.timeout(3600)  # takes ten minutes on two threads
@pytest.mark.benchmark(min_rounds=3)
@contenders(EAGER, SDPA, "ours")
def test_selection(race, case, contender):
    race(case, contender)
