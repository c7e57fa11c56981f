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
from measure import DEVICE, peak_memory, synchronised
from PIL import Image
from vlm import SHAPES, make_model, make_processor

from virft_fast.mia import SceneLayout, ScenePlan, attention_ratio, compose
from virft_fast.models.qwen_vl import Policy, banned_token_ids, core, encode_prompt
from virft_fast.rollout import Sampling
from virft_fast.rollout.native import NativeRollout
from virft_fast.rollout.observers import AttentionObserver

ROUNDS = 3
# kind, images, side of an image in pixels, scenes, tokens of an answer
CASES = [("collage", 9, 448, 8, 64), ("sequence", 3, 224, 16, 64)]


class FixedLength(NativeRollout):
    """A rollout that never draws EOS."""

    def banned(self, policy):
        return [*super().banned(policy), self.tokenizer.eos_token_id]


def make_scenes(kind, count, side, number):
    layout, rng = SceneLayout(cell=side), np.random.default_rng(0)
    for index in range(number):
        pixels = rng.integers(0, 255, (count, side // 14, side // 14, 3)).astype("u1")
        images = [Image.fromarray(p).resize((side, side)) for p in pixels]
        target = index % count
        plan = ScenePlan(index, kind, tuple(range(count)), target, f"In Image{target + 1},")
        yield compose(plan, images, "Which digit is this?", layout)


@pytest.mark.timeout(3600)  # takes ten minutes on two threads
@pytest.mark.parametrize("kind, count, side, number, length", CASES, ids=str)
def test_selection(race, request, kind, count, side, number, length):
    size = request.config.getoption("--size")
    side, number, length = (56, 2, 4) if size == "tiny" else (side, number, length)
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

    runs = {
        "full maps, all attention eager": partial(full_maps, "eager"),
        "full maps, SDPA in the tower": partial(full_maps, "sdpa"),
    }
    found = ours()
    for loop in runs.values():
        for (expected, ratio), (got, own) in zip(loop(), found, strict=True):
            if DEVICE == "cpu":  # in bfloat16 a tie may break either way
                assert torch.equal(got, expected)
                assert abs(own - ratio) < 1e-5, (own, ratio)
    runs = {name: synchronised(run) for name, run in {**runs, "ours": ours}.items()}
    rollout._buffers.release()  # frees what graphs keep, so that the peak counts it
    notes = {name: {"peak_mib": peak_memory(run) / 2**20} for name, run in runs.items()}
    tokens = max(len(prompt.input_ids) for prompt in prompts)
    case = f"{size}: {number} scenes, {kind} of {count}, P={tokens}, C={length}"
    ms = race(case, runs, ours="ours", notes=notes, rounds=ROUNDS)
    for name, note in notes.items():
        if ms:
            note["scenes_per_s"] = number / ms[name] * 1e3
