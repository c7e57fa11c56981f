"""MIA-DPO's pairs: the scenes pixel by pixel, attention against full maps, selection, runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections import Counter
from contextlib import nullcontext, suppress
from functools import partial

import numpy as np
import pytest
import torch
from datasets import load_dataset
from helpers import CPU
from PIL import Image
from processes import run

from virft_fast import commands, dist
from virft_fast.data import SampleDataset, load_rows
from virft_fast.data.__main__ import main as data_main
from virft_fast.mia import (
    Answer,
    Answering,
    SceneLayout,
    ScenePlan,
    Scenes,
    Selection,
    attention_ratio,
    compose,
    reasons_against,
    source_groups,
)
from virft_fast.mia import __main__ as mia_command
from virft_fast.mia import answering as answering_module
from virft_fast.mia import sheet as sheet_module
from virft_fast.mia.__main__ import main
from virft_fast.mia.scenes import (
    GRIDS,
    PIP_PREFIXES,
    clean_question,
    collage,
    corrupted,
    image_digest,
    picture_in_picture,
    plan_scene,
    without_details,
)
from virft_fast.mia.selection import table
from virft_fast.mia.sheet import attention_again, attention_sheet, on_sheet, overlay
from virft_fast.models.image_attention import attention_to_prompts, coverage, image_tokens
from virft_fast.models.qwen_vl import (
    Policy,
    banned_token_ids,
    encode_prompt,
    load_model,
    weights_stamp,
)
from virft_fast.rollout.backends import make_rollout
from virft_fast.rollout.sampling import make_rollouts

COLOURS = [(10 * n, 250 - 10 * n, 5 * n) for n in range(1, 10)]
WHITE = (255, 255, 255)


def flat(number, size=(56, 56)):
    return Image.new("RGB", size, COLOURS[number])


def different(one, other):
    return one == other


# ---- scenes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", sorted(GRIDS))
def test_collage_pixel_by_pixel(count):
    """448-pixel cells, 40 between them, a strip of 40 above each row."""
    rows, columns = GRIDS[count]
    image, boxes = collage([flat(n) for n in range(count)], SceneLayout())
    assert image.size == (columns * 448 + (columns - 1) * 40, rows * 488)
    pixels, seen = np.asarray(image), np.zeros((image.height, image.width), bool)
    for number, (left, top, right, bottom) in enumerate(boxes):
        assert (left, top) == (number % columns * 488, number // columns * 488 + 40)
        assert (right - left, bottom - top) == (448, 448)
        assert (pixels[top:bottom, left:right] == COLOURS[number]).all()
        seen[top:bottom, left:right] = True
        label = pixels[top - 40 : top, left : left + 448].min(-1)
        inked = np.argwhere(label < 128)
        assert len(inked) and 20 <= inked[:, 1].min() < 30  # written 20 pixels in
        seen[top - 40 : top, left : left + 448] = True
    assert (pixels[~seen] == WHITE).all()


def test_a_cell_keeps_proportions_at_the_top_left():
    image, boxes = collage([flat(0, (200, 100)), flat(1, (50, 100))], SceneLayout())
    pixels = np.asarray(image)
    left, top, right, bottom = boxes[0]
    assert (pixels[top : top + 224, left:right] == COLOURS[0]).all()
    assert (pixels[top + 224 : bottom, left:right] == WHITE).all()
    left, top, right, bottom = boxes[1]
    assert (pixels[top:bottom, left : left + 224] == COLOURS[1]).all()
    assert (pixels[top:bottom, left + 224 : right] == WHITE).all()


@pytest.mark.parametrize("target", [(56, 56), (300, 100), (20, 90)])
def test_picture_in_picture_pixel_by_pixel(target):
    image, box = picture_in_picture(flat(0, target), flat(1, (200, 100)))
    left, top, right, bottom = box
    scale = min(140 / target[0], 70 / target[1])
    assert (right - left, bottom - top) == (round(scale * target[0]), round(scale * target[1]))
    assert abs(left - (200 - right)) <= 1 and abs(top - (100 - bottom)) <= 1
    pixels = np.asarray(image)
    inside = np.zeros(pixels.shape[:2], bool)
    inside[top:bottom, left:right] = True
    assert (pixels[inside] == COLOURS[0]).all() and (pixels[~inside] == COLOURS[1]).all()


def test_words_of_each_kind():
    images = [flat(0), flat(1), flat(2)]
    plan = ScenePlan(0, "sequence", (5, 0, 7), 1, "In Image2,")
    scene = compose(plan, images, "Which digit is this?", SceneLayout())
    shown = "".join(part.get("text", "<image>") for part in scene.content)
    assert (
        shown == "Image1:<image>\nImage2:<image>\nImage3:<image>\nIn Image2, which digit is this?"
    )
    assert scene.target_image == 1 and scene.box == (0, 0, 56, 56) and len(scene.images) == 3
    plan = ScenePlan(0, "collage", (5, 0, 7), 1, "In Image2,")
    scene = compose(plan, images, "Which digit is this?", SceneLayout())
    assert scene.content[-1]["text"] == "\nIn Image2, which digit is this?"
    assert scene.target_image == 0 and scene.box == (488, 40, 936, 488)
    plan = ScenePlan(0, "pip", (0, 5), 0, PIP_PREFIXES[0])
    scene = compose(plan, images[:2], "Which digit is this?", SceneLayout())
    assert scene.content[-1]["text"] == f"\n{PIP_PREFIXES[0]} which digit is this?"
    assert clean_question("<image>\nWhat is it?") == clean_question("What is it?\n<image>")


def test_noise_lies_where_the_original_puts_it():
    images = [flat(0), flat(1)]
    plan = ScenePlan(3, "collage", (3, 1), 0, "In Image1,")
    scene = compose(plan, images, "What?", SceneLayout())
    noisy = corrupted(scene, "collage", 0, 3)
    before, after = (np.asarray(s.images[0]).astype(int) for s in (scene, noisy))
    left, top, right, bottom = scene.box
    changed = (before != after).any(-1)
    outside = changed.copy()
    outside[top:bottom, left:right] = False
    assert not outside.any() and changed[top:bottom, left:right].mean() > 0.95
    # The noise itself, modulo 256: sigma 225 is nearly uniform there, sigma 49 is not.
    difference = (after - before)[top:bottom, left:right] % 256
    assert np.histogram(difference, 16, (0, 256))[0].min() > 0.03 * difference.size
    plan = ScenePlan(3, "pip", (3, 1), 0, "x")
    scene = compose(plan, [flat(0), flat(1, (400, 400))], "What?", SceneLayout())
    noisy = corrupted(scene, "pip", 0, 3)
    before, after = (np.asarray(s.images[0]).astype(int) for s in (scene, noisy))
    difference = (after - before + 128) % 256 - 128
    assert abs(difference.std() - 49) < 1.5 and abs(difference.mean()) < 1.0
    scene = compose(
        ScenePlan(0, "sequence", (0, 1), 0, "In Image1,"), images, "What?", SceneLayout()
    )
    assert corrupted(scene, "sequence", 0, 0) is scene


def test_plans_depend_on_seed_and_row_alone():
    layout = SceneLayout()
    plans = [plan_scene(i, range(100), layout, 0, different) for i in range(400)]
    again = [plan_scene(i, range(100), layout, 0, different) for i in reversed(range(400))]
    assert plans == again[::-1]
    assert plans != [plan_scene(i, range(100), layout, 1, different) for i in range(400)]
    kinds = Counter(plan.kind for plan in plans)
    assert abs(kinds["sequence"] / 400 - 15.1 / 28.9) < 0.08
    targets = Counter(p.target for p in plans if p.kind == "sequence" and p.num_images == 5)
    assert set(targets) == set(range(5))
    for plan in plans:
        assert len(set(plan.order)) == plan.num_images and plan.order[plan.target] == plan.index


def test_companions_never_show_the_same_image():
    layout = SceneLayout({"collage": 1}, collage_images=(4,))
    same = lambda one, other: one % 5 == other % 5  # noqa: E731
    for index in range(50):
        plan = plan_scene(index, range(50), layout, 0, same)
        assert len({row % 5 for row in plan.order}) == 4
    layout = SceneLayout({"collage": 1}, collage_images=(6,))
    assert "fewer images than asked: collage of 6, only 5" in plan_scene(
        0, range(50), layout, 0, same
    )
    layout = SceneLayout({"pip": 1})
    assert "only 1 go together" in plan_scene(0, [0, 5], layout, 0, same)
    reason = "fewer images than asked: its source has less than 2 rows; see --companions"
    assert plan_scene(0, [0], layout, 0, same) == reason


def test_layouts_that_make_no_sense_are_named():
    for options, message in (
        ({"shares": {"stack": 1.0}}, "shares: expected"),
        ({"shares": {"pip": 0.0}}, "shares: expected"),
        ({"sequence_images": (7,)}, "sequence_images: expected"),
        ({"collage_images": (5,)}, "collage_images: expected"),
        ({"shares": {"pip": math.inf}}, "shares: expected"),
        ({"shares": {"pip": math.nan}}, "shares: expected"),
        ({"cell": 0}, "cell, gutter: expected"),
        ({"cell": 4000}, "collages of at most .* pixels, .* got 12080x12120"),
    ):
        with pytest.raises(ValueError, match=message):
            SceneLayout(**options)
    for fine in ({"collage_images": (4,)}, {"shares": {"pip": 1.0}}):
        SceneLayout(cell=4000, **fine)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"thresholds": {("sequence", 9): 0.5}}, "thresholds: expected some of sequence2"),
        ({"thresholds": {("pip", 2): math.nan}}, "thresholds: expected finite numbers"),
        ({"min_perplexity": math.inf}, "min_perplexity: expected a finite number, got inf"),
        ({"max_length_ratio": 0.9}, "max_length_ratio: expected 1 or more, got 0.9"),
        ({"max_length_ratio": math.nan}, "max_length_ratio: expected 1 or more"),
        ({"min_edit_distance": 1.1}, "min_edit_distance: expected a share"),
        ({"min_edit_distance": -0.1}, "min_edit_distance: expected a share"),
    ],
)
def test_selections_that_make_no_sense_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Selection(**options)
    Selection(max_length_ratio=1.0, min_edit_distance=1.0)


# ---- attention -----------------------------------------------------------------------------------


def test_coverage_by_hand():
    """Of a 2 x 2 grid on 4 x 4 pixels, the box of columns 1..3 and rows 0..2."""
    assert coverage((1, 0, 3, 2), (4, 4), (2, 2)).tolist() == [0.5, 0.5, 0.0, 0.0]
    assert coverage((0, 0, 4, 4), (4, 4), (2, 3)).tolist() == [1.0] * 6
    assert coverage((3, 3, 4, 4), (4, 4), (2, 2)).tolist() == [0, 0, 0, 0.25]


SCENES = {
    "sequence": ScenePlan(2, "sequence", (0, 1, 2), 2, "In Image3,"),
    "collage": ScenePlan(1, "collage", (0, 1, 2), 1, "In Image2,"),
    "pip": ScenePlan(0, "pip", (0, 1), 0, PIP_PREFIXES[0]),
}
SMALL = SceneLayout(cell=64, gutter=20, label_size=12)


def noisy(number, size):
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def scenes(processor):
    """Images of different sizes: kind -> (plan, scene, prompt)."""
    sizes = [(56, 84), (112, 56), (84, 84)]
    images = [noisy(n, size) for n, size in enumerate(sizes)]
    made = {}
    for kind, plan in SCENES.items():
        scene = compose(plan, images[: plan.num_images], "Which digit is this?", SMALL)
        made[kind] = plan, scene, encode_prompt(processor, scene.sample(0))
    return made


def full_map(prompt, answer, layer):
    """(P,) by transformers' own eager attention: all maps of all layers, as the original does."""
    model = load_model("tiny", attn_implementation="eager").eval()
    ids = torch.cat([prompt.input_ids, answer[:-1]])[None]
    kinds = torch.nn.functional.pad(prompt.mm_token_type_ids, (0, len(answer) - 1))[None]
    with torch.no_grad():
        outputs = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds,
            pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw,
            output_attentions=True,
        )  # fmt: skip
    first = len(prompt.input_ids) if len(answer) > 1 else len(prompt.input_ids) - 1
    rows = outputs.attentions[layer][0].mean(0)[first:]
    return rows[:, : len(prompt.input_ids)].mean(0)


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_equals_full_maps_of_eager_attention(processor, scenes, layer):
    """All scenes in one packed row, answers of one token and of several."""
    policy = Policy(load_model("tiny")).eval()
    prompts = [prompt for _, _, prompt in scenes.values()] * 2
    g = torch.Generator().manual_seed(0)
    answers = [torch.randint(20, 200, (n,), generator=g) for n in (4, 9, 2, 1, 3, 6)]
    inputs = policy.collate(
        prompts, [[a] for a in answers], pad_token_id=0, device=CPU, packed=True
    )
    found = attention_to_prompts(policy, inputs, layer)
    kinds = [*scenes, *scenes]
    for kind, prompt, answer, attention in zip(kinds, prompts, answers, found, strict=True):
        expected = full_map(prompt, answer, layer)
        torch.testing.assert_close(attention, expected, atol=1e-5, rtol=0)
        plan, scene, _ = scenes[kind]
        ratio = attention_ratio(attention, prompt, scene, plan.kind, 2)
        assert ratio == pytest.approx(brute_ratio(expected, prompt, scene, plan), abs=1e-5)


def test_a_scene_is_read_once_for_its_answer_and_where_it_looked(processor, scenes, monkeypatch):
    plans, made, _ = zip(*scenes.values(), strict=True)
    passes = []
    image_features = Policy.image_features
    monkeypatch.setattr(
        Policy, "image_features", lambda *given: passes.append(1) or image_features(*given)
    )

    policy = Policy(load_model("tiny")).eval()
    rollout = make_rollout("native", partial(nullcontext, policy), processor.tokenizer, device=CPU)
    answering = Answering(policy, rollout, processor, 1, 12, CPU)
    found = answering.answers(plans, made)
    assert len(passes) == 1
    for answer, (plan, scene, prompt) in zip(found, scenes.values(), strict=True):
        attention = attention_again(answering, prompt, answer)
        ratio = attention_ratio(attention, prompt, scene, plan.kind, 2)
        assert answer.ratio == pytest.approx(ratio, abs=1e-5)


@pytest.fixture(scope="module")
def answering(processor):
    policy = Policy(load_model("tiny").requires_grad_(False)).eval()
    weights = partial(nullcontext, policy)
    rollout = make_rollout("native", weights, processor.tokenizer, device=CPU)
    return Answering(policy, rollout, processor, 1, 12, CPU)


def test_perplexity_and_tokens_equal_an_eager_forward(answering, scenes):
    """Over the tokens that may be drawn, of which the likeliest are."""
    plans, made, prompts = zip(*scenes.values(), strict=True)
    drawn = answering.rollout.generate(prompts, 1, answering.sampling)
    model = load_model("tiny", attn_implementation="eager").eval()
    vocabulary = model.config.text_config.vocab_size
    banned = banned_token_ids(answering.processor.tokenizer, vocabulary)
    for number, answer in enumerate(answering.answers(plans, made)):
        prompt, length = prompts[number], int(drawn.completion_mask[number].sum())
        tokens = drawn.completion_ids[number, :length]
        ids = torch.cat([prompt.input_ids, tokens])[None]
        kinds = torch.nn.functional.pad(prompt.mm_token_type_ids, (0, length))[None]
        with torch.no_grad():
            logits = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds,
                pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw,
            ).logits[0, len(prompt.input_ids) - 1 : -1]  # fmt: skip
        logps = logits.index_fill(1, torch.tensor(banned), -math.inf).log_softmax(-1)
        assert torch.equal(logps.argmax(-1), tokens)
        expected = math.exp(-float(logps.max(-1).values.mean()))
        assert answer.perplexity == pytest.approx(expected, rel=1e-4) and expected > 1.01
        assert answer.num_tokens == length and answer.text == drawn.texts[number]


def test_attention_lies_over_the_image_where_it_is():
    """1 x 2 tokens over 4 x 2 pixels, the left one half as strong as the strongest of all."""
    shown = np.asarray(overlay(flat(4, (4, 2)), torch.tensor([0.2, 0.1]), (1, 2), 0.4))
    red, under = np.array([255, 0, 0]), np.array(COLOURS[4])
    for column, strength in ((0, 100 / 255), (2, 50 / 255)):
        mixed = strength * red + (1 - strength) * under
        assert np.abs(shown[:, column : column + 2] - mixed).max() <= 1


@pytest.mark.parametrize("truncated", [True, False])
def test_the_sheet_shows_the_measured_attention(answering, scenes, monkeypatch, truncated):
    """An answer that was cut off has no EOS there either; the frame is the box's edge."""
    (plan, scene, prompt), asked, shown = scenes["collage"], [], []
    again = sheet_module.attention_to_prompts
    monkeypatch.setattr(
        sheet_module,
        "attention_to_prompts",
        lambda policy, inputs, layer: (
            asked.append(inputs.completion_ids) or again(policy, inputs, layer)
        ),
    )
    (answer,) = answering.answers([plan], [scene])
    assert answer.truncated
    asked.append(answering.rollout.generate([prompt], 1, answering.sampling).completion_ids[0])
    eos = answering.processor.tokenizer.eos_token_id
    if not truncated:
        answer = dataclasses.replace(answer, truncated=False)
        asked[0] = torch.tensor([*asked[0], eos])
    attention = attention_again(answering, prompt, answer)
    assert torch.equal(asked[0], asked[1])
    if truncated:
        ratio = attention_ratio(attention, prompt, scene, plan.kind, 2)
        assert ratio == pytest.approx(answer.ratio, abs=1e-6)

    class One:
        build = staticmethod(lambda index: (plan, scene))

    monkeypatch.setattr(sheet_module, "contact_sheet", lambda cells, columns: shown.extend(cells))
    monkeypatch.setattr(sheet_module, "SHEET_PIXELS", 1)
    attention_sheet(One, answering, {1: answer}, {1: ["perplexity"]}, 1)
    ((picture, caption),) = shown
    with monkeypatch.context() as patched:  # an image has changed since
        patched.setattr(answering, "prompt", lambda index, scene: "a longer prompt")
        assert attention_sheet(One, answering, {1: answer}, {1: ["perplexity"]}, 1) is None
    assert caption.startswith("perplexity; ") and caption.endswith(f"said: {answer.text}")
    green = (np.asarray(picture) == (0, 160, 0)).all(-1)
    left, top, right, bottom = scene.box
    assert green[top:bottom, left].all() and green[top:bottom, right - 1].all()
    assert green[top, left:right].all() and green[bottom - 1, left:right].all()
    edge = np.zeros_like(green)
    edge[top:bottom, left:right] = True
    edge[top + 2 : bottom - 2, left + 2 : right - 2] = False
    assert (green == edge).all()
    ((positions, grid),) = image_tokens(prompt, 2)
    under = overlay(scene.images[0], attention[positions], grid, attention[positions].max())
    assert (np.asarray(picture)[~edge] == np.asarray(under)[~edge]).all()


def brute_ratio(attention, prompt, scene, plan):
    """Pixel by pixel: every pixel of a token has its share of the token's attention."""
    images = image_tokens(prompt, 2)
    values = []
    for image, (positions, (rows, columns)) in zip(scene.images, images, strict=True):
        # So fine that the box ends between two of these pixels.
        fine = np.ones((image.height, image.width))
        grid = attention[positions].view(rows, columns).double().numpy()
        pixels = np.kron(grid, fine) / fine.size
        values.append((pixels, image.size))
    if plan.kind == "sequence":
        means = [pixels.sum() / images[n][0].numel() for n, (pixels, _) in enumerate(values)]
        return means[plan.target] / sum(means)
    pixels, (width, height) = values[0]
    left, top, right, bottom = scene.box
    x = (np.arange(pixels.shape[1]) + 0.5) / pixels.shape[1] * width
    y = (np.arange(pixels.shape[0]) + 0.5) / pixels.shape[0] * height
    inside = ((y > top) & (y < bottom))[:, None] & ((x > left) & (x < right))[None]
    return (pixels * inside).sum() / pixels.sum()


def test_tokens_of_each_image(processor, scenes):
    _, scene, prompt = scenes["sequence"]
    found = image_tokens(prompt, 2)
    assert [grid for _, grid in found] == [(3, 2), (2, 4), (3, 3)]
    assert sum(len(positions) for positions, _ in found) == int(prompt.mm_token_type_ids.sum())
    assert image_tokens(encode_prompt(processor, scene_without_images()), 2) == []


def scene_without_images():
    from virft_fast.batch import Sample

    return Sample(0, ({"role": "user", "content": "Why?"},), (), "")


def test_what_cannot_be_measured_is_named(processor, scenes):
    policy = Policy(load_model("tiny")).eval()
    prompt = scenes["pip"][2]
    answer = torch.tensor([5, 6])
    collate = lambda answers, packed: policy.collate(  # noqa: E731
        [prompt], answers, pad_token_id=0, device=CPU, packed=packed
    )
    with pytest.raises(ValueError, match="layer: expected 0 to"):
        attention_to_prompts(policy, collate([[answer]], True), 99)
    with pytest.raises(ValueError, match="packed inputs"):
        attention_to_prompts(policy, collate([[answer]], False), 0)
    with pytest.raises(ValueError, match="one completion a prompt"):
        attention_to_prompts(policy, collate([[answer, answer]], True), 0)


def test_no_attention_is_no_number(scenes):
    _, scene, prompt = scenes["pip"]
    nothing = torch.zeros(len(prompt.input_ids))
    assert attention_ratio(nothing, prompt, scene, "pip", 2) is None


# ---- selection -----------------------------------------------------------------------------------


def made(kind="sequence", count=2, **more):
    values = {"text": "a dog", "truth": "a cat", "ratio": 0.1, "perplexity": 2.0} | more
    return Answer(0, kind, count, 0, **values)


@pytest.mark.parametrize(
    "kind, count, limit, at_limit",
    [("sequence", 2, 0.8, True), ("sequence", 3, 0.7, True), ("sequence", 4, 0.6, True),
     ("sequence", 5, 0.6, True), ("collage", 2, 0.7, False), ("collage", 3, 0.6, False),
     ("collage", 4, 0.5, False), ("collage", 6, 0.4, False), ("collage", 9, 0.3, False),
     ("pip", 2, 0.8, False)],
)  # fmt: skip
def test_attention_limits_at_their_edges(kind, count, limit, at_limit):
    def kept(ratio, selection=Selection()):  # noqa: B008
        return not reasons_against(made(kind, count, ratio=ratio), selection)

    assert kept(math.nextafter(limit, 0)) and kept(limit) == at_limit
    assert not kept(math.nextafter(limit, 1))
    own = Selection({(kind, count): 0.05})
    assert not kept(0.051, own) and kept(0.049, own)


def test_reasons_are_named():
    def found(selection=Selection(), **more):  # noqa: B008
        return reasons_against(made(**more), selection)

    assert found() == []
    assert found(problem="image can't be read") == ["image can't be read"]
    assert found(text=" ") == ["the model's answer is empty"]
    assert found(truth="") == ["the row's own answer is empty"]
    assert found(text="a cat ") == ["the model's answer is right"]
    assert found(ratio=None) == ["no attention on any image"]
    assert found(ratio=0.9) == ["attention on the target: sequence of 2"]
    assert found(perplexity=1.1) == ["perplexity"] and found(perplexity=1.1000001) == []
    assert found(perplexity=None) == ["perplexity"]
    assert found(truth="x" * 512, selection=Selection(max_length_ratio=1e9)) == [
        "the row's own answer has 512 characters or more"
    ]
    assert found(truth="c" * 50) == [] and found(truth="c" * 51) == ["length ratio"]
    assert found(text="a car", selection=Selection(min_edit_distance=0.2)) == []
    assert found(text="a car", selection=Selection(min_edit_distance=0.21)) == ["edit distance"]


def test_the_table_counts_every_reason_and_only_answers():
    answers = {
        0: made(),
        1: made(kind="pip", ratio=0.9, perplexity=1.0),
        2: made(kind="pip", ratio=0.7, perplexity=1.0),
        3: made(text="", truth="", ratio=None, perplexity=None, problem="too long"),
        4: Answer(4, problem="image can't be read"),
    }
    reasons = {index: reasons_against(a, Selection()) for index, a in answers.items()}
    lines = [line.split() for line in table(answers, reasons)]
    assert ["sequence", "2", "1", "1", "0.100"] in lines
    assert ["pip", "2", "2", "0", "0.800"] in lines and ["all", "3", "1"] in lines
    dropped = {" ".join(words[:-1]): int(words[-1]) for words in lines[6:]}
    assert dropped == {
        "attention on the target: pip of 2": 1, "perplexity": 2, "too long": 1,
        "image can't be read": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "reason, counted",
    [
        ("image x.png: FileNotFoundError: no such file", "image can't be read"),
        ("solution: missing", "solution: missing"),
        ("solution: expected text, got int 4", "solution: expected text"),
        ("absolute aspect ratio must be smaller than 200, got 500.0",
         "absolute aspect ratio must be smaller than 200"),
    ],
)  # fmt: skip
def test_faults_are_counted_without_what_is_particular(reason, counted):
    assert without_details(reason) == counted


@pytest.mark.parametrize("most, kept, dropped", [(4, 2, 2), (5, 3, 2), (7, 4, 3), (9, 5, 4)])
def test_the_sheet_has_kept_and_dropped_ones(most, kept, dropped):
    answers = {n: Answer(n, "pip", 2, problem="too long" if n == 3 else "") for n in range(10)}
    reasons = {n: [] if n >= 5 else ["perplexity"] for n in range(10)}
    shown = [answer.index for answer in on_sheet(answers, reasons, most)]
    assert shown == [*range(5, 5 + kept), *[0, 1, 2, 4][:dropped]]


# ---- runs ----------------------------------------------------------------------------------------

SMALL_SCENES = [
    "--model_name_or_path", "tiny", "--cell", "56", "--gutter", "14", "--label_size", "12",
    "--max_completion_length", "8", "--batch_size", "5", "--max_length_ratio", "1000",
    "--min_perplexity", "1.0",
]  # fmt: skip


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """LLaVA's JSON: 14 rows of two sources, one with a missing image, one image twice."""
    folder = tmp_path_factory.mktemp("llava")
    records = []
    for number in range(14):
        source = "coco" if number < 7 else "ocr"
        name = f"{source}/{number}.png"
        (folder / "images" / source).mkdir(parents=True, exist_ok=True)
        if number == 5:
            name = "coco/gone.png"
        else:
            noisy(0 if number == 1 else number, (56, 56)).save(folder / "images" / name)
        talk = [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": f"A thing of kind {number}."},
            {"from": "human", "value": "And again?"},
            {"from": "gpt", "value": "No."},
        ]
        records.append({"id": str(number), "image": name, "conversations": talk})
    (folder / "llava.json").write_text(json.dumps(records))
    return folder


def arguments(llava, out, *more):
    return [
        "--dataset_name", str(llava / "llava.json"), "--images", str(llava / "images"),
        "--output", str(out), *SMALL_SCENES, *more,
    ]  # fmt: skip


@pytest.mark.parametrize("door", [data_main, commands.main])
def test_data_mia_and_virft_fast_mia_are_the_same_command(door, monkeypatch):
    monkeypatch.setattr(mia_command, "main", lambda argv: argv)
    assert door(["mia", "--output", "pairs"]) == ["--output", "pairs"]


def test_from_llavas_json_to_pairs_that_train(llava, tmp_path, capsys):
    out = tmp_path / "pairs"
    shares = ["--shares", "sequence=1,collage=1,pip=1", "--collage_images", "2,3,4",
              "--test_share", "0.3"]  # fmt: skip
    assert main(arguments(llava, out, *shares)) == 0
    shown = capsys.readouterr().out
    assert "image can't be read" in shown and "kept" in shown
    assert (tmp_path / "pairs.png").is_file() and (out / "README.md").is_file()
    assert not list(tmp_path.glob(".pairs*"))
    records = [json.loads(line) for line in (out / "selection.jsonl").read_text().splitlines()]
    assert [r["index"] for r in records] == list(range(14))
    kept = [r for r in records if r["kept"]]
    assert kept and all(0 <= r["ratio"] <= 1 for r in kept)
    assert [r["dropped"] for r in records if r["index"] == 5] == [["image can't be read"]]
    train = load_dataset(str(out), split="train")  # `datasets` itself reads it
    row = train[0]
    assert len(row["images"]) == (row["num_images"] if row["kind"] == "sequence" else 1)
    assert row["chosen"][0]["content"] == f"A thing of kind {row['source_row']}."
    assert row["prompt"][0]["content"][-1]["text"].endswith("what is it?")
    assert "attention on the target" in row["reasons"][0]
    samples = SampleDataset(load_rows(str(out), "train"))
    sample = samples.get(0)
    assert sample.columns["chosen"] == row["chosen"][0]["content"]
    assert len(sample.images) == len(row["images"])

    from virft_fast.train import main as train_main

    argv = ["--algorithm", "dpo", "--dataset_name", str(out), "--max_steps", "2",
            "--output_dir", str(tmp_path / "run")]  # fmt: skip
    assert train_main(argv) == 0


KINDS = ["--shares", "sequence=1,collage=1,pip=1", "--collage_images", "2,3"]


@pytest.mark.parametrize("mode", ["clean", "corrupted"])
def test_pairs_are_clean_whatever_the_model_saw(llava, tmp_path, monkeypatch, mode):
    """Pixel by pixel, of every kind, with where the target is and how much attention it had."""
    out, seen = tmp_path / "pairs", {}
    answers = Answering.answers

    def watched(self, plans, scenes):
        seen.update({plan.index: pair for plan, pair in zip(plans, scenes, strict=True)})
        assert self.layer == 1  # the middle one of two
        return answers(self, plans, scenes)

    monkeypatch.setattr(Answering, "answers", watched)
    assert main(arguments(llava, out, *KINDS, "--mode", mode)) == 0
    rows = load_rows(str(llava / "llava.json"), "train", image_folder=llava / "images")
    layout = SceneLayout(
        {"sequence": 1, "collage": 1, "pip": 1}, (2, 3, 4, 5), (2, 3), 56, 14, 12, 7
    )
    scenes = Scenes(rows, layout, seed=0, noise=False, groups=source_groups(rows))
    known = {r["index"]: r for r in map(json.loads, (out / "selection.jsonl").open())}
    kinds = Counter()
    bits = lambda images: [image.tobytes() for image in images]  # noqa: E731
    for row in load_dataset(str(out), split="train"):
        plan = scenes.plan(row["source_row"])
        images = [Image.open(rows[n]["image"][0]).convert("RGB") for n in plan.order]
        scene = compose(plan, images, "What is it?", layout)
        assert bits(row["images"]) == bits(scene.images)
        as_seen = bits(seen[plan.index].images) == bits(scene.images)
        assert as_seen == (mode == "clean" or plan.kind == "sequence")
        assert (row["kind"], row["num_images"]) == (plan.kind, plan.num_images)
        assert (row["target"], row["target_image"]) == (plan.target + 1, scene.target_image)
        assert tuple(row["target_box"]) == scene.box
        answer = known[plan.index]
        assert row["attention_ratio"] == answer["ratio"] and answer["target"] == plan.target
        assert (row["rejected"][0]["content"], row["perplexity"]) == (
            answer["text"], answer["perplexity"],
        )  # fmt: skip
        kinds[plan.kind] += 1
    assert set(kinds) == {"sequence", "collage", "pip"}


def test_companions_come_from_the_same_source(llava):
    rows = load_rows(str(llava / "llava.json"), "train", image_folder=llava / "images")
    groups = source_groups(rows)
    assert groups == ["coco"] * 7 + ["ocr"] * 7
    made = Scenes(rows, SceneLayout(), seed=0, noise=False, groups=groups)
    for index in range(14):
        plan = made.plan(index)
        if index == 5:
            assert plan == "image can't be read"
        elif isinstance(plan, ScenePlan):
            assert len({groups[row] for row in plan.order}) == 1
            assert 5 not in plan.order and not {0, 1} <= set(plan.order)


@pytest.fixture
def asked(monkeypatch):
    """Rows the model is asked about, in order; at number `asked.stop` comes Ctrl-C."""

    class Asked(list):
        stop = None

    rows, answers = Asked(), Answering.answers

    def watched(self, plans, scenes):
        rows.extend(plan.index for plan in plans)
        if rows.stop is not None and len(rows) > rows.stop:
            raise KeyboardInterrupt
        return answers(self, plans, scenes)

    monkeypatch.setattr(Answering, "answers", watched)
    return rows


def selected(folder):
    """selection.jsonl: row -> what is known of it, to the figures that sums in another order
    keep."""
    records = map(json.loads, (folder / "selection.jsonl").read_text().splitlines())
    return {r["index"]: r | {"ratio": 0, "perplexity": 0} for r in records}


def interrupted(asked, capsys, arguments):
    """Rows that a run was asked to answer before Ctrl-C in its second batch."""
    asked.stop = 5
    assert main(arguments) == 130
    assert "the same command resumes it" in capsys.readouterr().err
    asked.stop, rows = None, asked[:5]
    asked.clear()
    return rows


def test_the_number_of_ranks_does_not_matter(llava, tmp_path, asked, capsys):
    """13 rows in batches of 2: one rank has a round more to do than it has rows for. Two go on
    where one was interrupted."""
    whole, two = tmp_path / "whole", tmp_path / "two"
    more = ["--max_rows", "13", "--batch_size", "2"]
    assert main(arguments(llava, whole, *more)) == 0
    asked.clear()
    interrupted(asked, capsys, arguments(llava, two, *more))
    done = run(*arguments(llava, two, *more), module="virft_fast.mia", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert selected(whole) == selected(two) and list(selected(two)) == list(range(13))
    assert "13/13" in done.stderr and "14/13" not in done.stderr


def test_ranks_share_the_rows_and_meet_after_every_batch(llava, monkeypatch):
    """Two ranks, one after the other, with what the first one said."""
    rows = load_rows(str(llava / "llava.json"), "train", image_folder=llava / "images")
    scenes = Scenes(rows, SceneLayout(), seed=0, noise=False)
    told, answered = {0: [], 1: []}, {0: [], 1: []}

    def answer(scenes, answering, batch, digests):
        answered[rank].extend(batch)
        return [Answer(index, problem="none") for index in batch], []

    def gather(value):
        told[rank].append(value)
        return [value]

    monkeypatch.setattr(answering_module, "answer_batch", answer)
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "rank", lambda: rank)  # noqa: B023
        assert (
            list(answering_module.answer_all(scenes, None, None, range(13), batch_size=3))
            == answered[rank]
        )
    assert sorted(answered[0] + answered[1]) == list(range(13))
    assert abs(len(answered[0]) - len(answered[1])) == 1
    assert len(told[0]) == len(told[1])


def test_answers_that_are_there_are_not_asked_for_again(llava, tmp_path, asked, capsys):
    """Neither after Ctrl-C, in the middle of a line of the journal, nor for other thresholds."""
    out, whole = tmp_path / "pairs", tmp_path / "whole"
    first = interrupted(asked, capsys, arguments(llava, out))
    journal = tmp_path / ".pairs.answers.jsonl"
    with journal.open("a") as file:
        file.write('{"stage": "answer", "rec')
    assert main(arguments(llava, out, "--min_perplexity", "1e9")) == 2
    # 5 has no image, and 8 would need more of them than its source has.
    assert first == [0, 1, 2, 3, 4] and asked == [6, 7, 9, 10, 11, 12, 13]
    asked.clear()
    assert main(arguments(llava, out)) == 0 and not asked
    assert not journal.exists()
    assert main(arguments(llava, whole)) == 0
    assert selected(out) == selected(whole)


def test_other_settings_do_not_mix(llava, tmp_path, asked, capsys):
    """They are named; --overwrite starts again under them, and goes on under the same ones."""
    out, other = tmp_path / "pairs", ["--gutter", "20"]
    first = interrupted(asked, capsys, arguments(llava, out, "--overwrite"))
    assert main(arguments(llava, out, *other)) == 2 and not asked
    assert "gutter 14 there and 20 here" in capsys.readouterr().err
    assert interrupted(asked, capsys, arguments(llava, out, *other, "--overwrite")) == first
    assert main(arguments(llava, out, *other, "--overwrite")) == 0
    assert asked and not set(asked) & set(first)


def test_an_answer_about_other_images_or_words_is_asked_for_again(llava, tmp_path, asked):
    """An image in the target's place, or a companion's; a row that is no scene any more."""
    copy, out = tmp_path / "llava", tmp_path / "pairs"
    shutil.copytree(llava, copy)
    more = ["--shares", "sequence=1", "--sequence_images", "2"]
    assert main(arguments(copy, out, *more, "--min_perplexity", "1e9")) == 2
    asked.clear()
    scenes = Scenes(
        rows := load_rows(str(copy / "llava.json"), "train", image_folder=copy / "images"),
        SceneLayout({"sequence": 1}, (2,)), seed=0, noise=False, groups=source_groups(rows),
    )  # fmt: skip
    plans = {n: plan for n in range(14) if isinstance(plan := scenes.plan(n), ScenePlan)}
    noisy(99, (56, 56)).save(copy / "images" / "coco" / "3.png")
    (copy / "images" / "ocr" / "9.png").unlink()
    talks = json.loads((copy / "llava.json").read_text())
    talks[12]["conversations"][0]["value"] = "What else is it?"
    (copy / "llava.json").write_text(json.dumps(talks))
    assert main(arguments(copy, out, *more)) == 0
    other = {12} | {n for n, plan in plans.items() if {3, 9} & set(plan.order)} - {9}
    assert set(asked) == other and len(other) > 2
    assert selected(out)[9]["problem"] == "image can't be read"


def test_only_answers_are_kept(llava, tmp_path, asked):
    """An image that was missing, a scene that was too large: tried again by the next run."""
    copy, out = tmp_path / "llava", tmp_path / "pairs"
    shutil.copytree(llava, copy)
    more = ["--shares", "sequence=1", "--sequence_images", "2,4"]
    none = ["--rollout_cache_tokens", "84", "--min_perplexity", "1e9"]
    assert main(arguments(copy, out, *more, *none)) == 2
    lines = (tmp_path / ".pairs.answers.jsonl").read_text().splitlines()
    kept = {entry["record"]["index"] for entry in map(json.loads, lines[1:])}
    asked.clear()
    noisy(50, (56, 56)).save(copy / "images" / "coco" / "gone.png")
    assert main(arguments(copy, out, *more, "--rollout_cache_tokens", "1000")) == 0
    found = selected(out)
    assert kept and all(found[index]["num_images"] == 2 for index in kept)
    assert not any(r["problem"] for r in found.values())
    assert 5 in asked and any(found[index]["num_images"] == 4 for index in asked)


def test_images_that_vanish_while_pairs_are_written_are_counted(llava, tmp_path, monkeypatch):
    copy, out = tmp_path / "llava", tmp_path / "pairs"
    shutil.copytree(llava, copy)
    write = mia_command.write_pairs

    def after_one_is_gone(*given, **more):
        (copy / "images" / "coco" / "3.png").unlink()
        return write(*given, **more)

    monkeypatch.setattr(mia_command, "write_pairs", after_one_is_gone)
    assert main(arguments(copy, out)) == 0
    assert selected(out)[3]["dropped"] == ["image can't be read"]
    assert "image can't be read" in (out / "README.md").read_text()
    assert 3 not in load_dataset(str(out), split="train")["source_row"]


def test_special_tokens_and_what_the_processor_refuses(llava, tmp_path, asked, capsys, monkeypatch):
    """Each named in its own row; an image far too wide is no companion either."""
    copy, out = tmp_path / "llava", tmp_path / "pairs"
    shutil.copytree(llava, copy)
    talks = json.loads((copy / "llava.json").read_text())
    talks[2]["conversations"][0]["value"] += "<|im_end|>"
    talks[3]["conversations"][1]["value"] += "<|im_end|> <|box_start|>"
    (copy / "llava.json").write_text(json.dumps(talks))
    noisy(4, (1005, 5)).save(copy / "images" / "coco" / "4.png")
    said = make_rollouts

    def spelled_out(*given):
        drawn = said(*given)
        first = drawn.prompts[0].sample.index
        texts = ["<|im_start|>" if p.sample.index == 6 else t
                 for p, t in zip(drawn.prompts, drawn.texts, strict=True)]  # fmt: skip
        return dataclasses.replace(drawn, texts=tuple(texts)) if first <= 6 else drawn

    monkeypatch.setattr("virft_fast.rollout.native.make_rollouts", spelled_out)
    more = ["--shares", "sequence=1,pip=1", "--sequence_images", "2", "--companions", "all"]
    assert main(arguments(copy, out, *more)) == 0
    problems = {n: r["problem"] for n, r in selected(out).items() if r["problem"]}
    assert problems == {
        2: "conversations: expected text and <image> tags only",
        3: "special tokens in the row's own answer",
        4: "image too narrow for the processor",
        5: "image can't be read",
        6: "special tokens in the model's answer",
    }
    shown = capsys.readouterr().out
    assert all(reason in shown for reason in problems.values())
    train = load_dataset(str(out), split="train")
    assert not any(max(i.size) > 1000 for images in train["images"] for i in images)


def test_a_folder_an_image_needs_companions_from_all(llava, tmp_path, capsys):
    copy, out = tmp_path / "llava", tmp_path / "pairs"
    shutil.copytree(llava, copy)
    talks = json.loads((copy / "llava.json").read_text())
    for talk in talks:
        path = copy / "images" / talk["image"]
        talk["image"] = f"{talk['id']}/image.png"
        (copy / "images" / talk["id"]).mkdir()
        if path.exists():
            path.rename(copy / "images" / talk["image"])
    (copy / "llava.json").write_text(json.dumps(talks))
    assert main(arguments(copy, out, "--shares", "pip=1")) == 2
    assert "less than 2 rows; see --companions " in capsys.readouterr().out
    assert main(arguments(copy, out, "--shares", "pip=1", "--companions", "all")) == 0


def test_a_chat_with_a_part_for_its_image_has_its_truth(tmp_path):
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    rows = []
    for number in range(4):
        noisy(number, (56, 56)).save(tmp_path / f"{number}.png")
        chat = [{"role": "user", "content": parts}]
        rows.append({"image": f"{number}.png", "prompt": chat, "solution": f"Thing {number}."})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    scenes = Scenes(
        load_rows(str(tmp_path / "rows.json"), "train"),
        SceneLayout({"pip": 1}),
        seed=0,
        noise=False,
    )
    plan = scenes.plan(2)
    assert isinstance(plan, ScenePlan) and scenes.truth(2) == "Thing 2."
    # What journals of answers hold: another digest would have every scene answered again.
    written = f"(Plan(index=2, kind='pip', order={plan.order}, target=0, prefix={plan.prefix!r})"
    rest = ("What is it?", "Thing 2.", [image_digest(noisy(n, (56, 56))) for n in plan.order])
    described = f"{written}, {repr(rest)[1:]}"
    assert scenes.digest(plan) == hashlib.sha1(described.encode()).hexdigest()[:16]


def test_no_scene_has_images_of_both_splits(llava):
    """Nor are two rows with the same image in two of them."""
    rows = load_rows(str(llava / "llava.json"), "train", image_folder=llava / "images")
    for seed in range(6):
        made = Scenes(
            rows, SceneLayout({"sequence": 1}, (2, 3)), seed=seed, noise=False, test_share=0.4
        )
        assert made.held_out(0) == made.held_out(1)
        plans = [plan for index in range(14) if isinstance(plan := made.plan(index), ScenePlan)]
        splits = [{made.held_out(row) for row in plan.order} for plan in plans]
        assert all(len(split) == 1 for split in splits) and {True} in splits and {False} in splits
        none = Scenes(rows, SceneLayout(), seed=seed, noise=False)
        assert not any(none.held_out(index) for index in range(14) if index != 5)


def test_other_weights_do_not_mix(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    stamp = weights_stamp(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"xy")
    assert weights_stamp(str(tmp_path)) != stamp
    adapter = tmp_path / "adapter"  # whose base is what changes
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path)})
    )
    (adapter / "adapter_model.safetensors").write_bytes(b"a")
    stamp = weights_stamp(str(adapter))
    (tmp_path / "model.safetensors").write_bytes(b"xz")
    assert weights_stamp(str(adapter)) != stamp


def test_rows_that_make_no_scene_are_named_and_keep_their_sources(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for number, question in enumerate(["What?", "<image>", "Where is [0.1, 0.2, 0.3, 0.4]?"]):
        for source in "ab":
            (folder / source).mkdir(exist_ok=True)
            noisy(number, (56, 56)).save(folder / source / f"{number}.png")
            rows.append({"image": f"{source}/{number}.png", "problem": question, "solution": "x"})
    rows.append({"problem": "No image?", "solution": "x"})
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    loaded = load_rows(str(path), "train", image_folder=folder)
    groups = source_groups(loaded)
    assert groups == ["a", "b"] * 3 + [""]
    scenes = Scenes(loaded, SceneLayout(), seed=0, noise=False, groups=groups)
    plans = [scenes.plan(index) for index in range(7)]
    assert plans[2] == plans[3] == "the question is empty"
    assert plans[4] == plans[5] == "boxes in the text"
    assert plans[6] == "expected one image, got 0"


@pytest.mark.parametrize(
    "more, message",
    [
        (["--layer", "99"], "--layer: expected 0 to"),
        (["--thresholds", "sequence9=0.5"], "thresholds: expected some of"),
        (["--shares", "stack=1"], "shares: expected"),
        (["--shares", "pip=1,pip=2"], "--shares: expected each name once"),
        (["--pictures", "-1"], "--pictures: expected a number, 0 or more"),
        (["--seed", "-1"], "--seed: expected a number, 0 or more"),
        (["--images", "/nowhere"], "--images /nowhere: expected a folder"),
        (["--min_perplexity", "1e9"], "no pair was kept"),
    ],
)
def test_bad_input_is_named_and_nothing_half_written(llava, tmp_path, capsys, more, message):
    out = tmp_path / "pairs"
    with suppress(SystemExit):  # of argparse
        assert main(arguments(llava, out, *more)) == 2
    assert message in capsys.readouterr().err
    assert not out.exists() and not (tmp_path / ".pairs.writing").exists()


def test_a_sheet_that_is_there_is_kept_and_named_before_the_work(llava, tmp_path, asked, capsys):
    out, sheet = tmp_path / "pairs", tmp_path / "pairs.png"
    sheet.write_text("mine")
    assert main(arguments(llava, out)) == 2 and not asked
    assert "pairs.png: exists already; pass --overwrite" in capsys.readouterr().err
    assert main(arguments(llava, out, "--pictures", "0")) == 0 and sheet.read_text() == "mine"
    assert main(arguments(llava, out, "--overwrite")) == 0
    assert Image.open(sheet).size[0] > 260


def test_a_journal_that_cant_be_read_is_named_before_the_work(llava, tmp_path, asked, capsys):
    (tmp_path / ".pairs.answers.jsonl").mkdir()
    assert main(arguments(llava, tmp_path / "pairs")) == 2 and not asked
    assert ".pairs.answers.jsonl" in capsys.readouterr().err


def test_a_scene_larger_than_the_rollouts_memory_is_left_out_and_counted(llava, tmp_path, capsys):
    out = tmp_path / "pairs"
    more = ["--shares", "sequence=1", "--sequence_images", "2,4", "--rollout_cache_tokens", "84"]
    assert main(arguments(llava, out, *more)) == 0
    reason = "more tokens than the rollout holds (--rollout_cache_tokens)"
    assert reason in capsys.readouterr().out
    records = selected(out).values()
    counts = {r["num_images"]: r["dropped"] for r in records if r["kind"]}
    assert counts[4] == [reason] and reason not in counts[2]


def test_one_token_answers_have_a_ratio(llava, tmp_path):
    out = tmp_path / "pairs"
    assert main(arguments(llava, out, "--max_completion_length", "1")) == 0
    records = map(json.loads, (out / "selection.jsonl").read_text().splitlines())
    answered = [r for r in records if not r["problem"]]
    assert answered and all(r["num_tokens"] == 1 and 0 <= r["ratio"] <= 1 for r in answered)
