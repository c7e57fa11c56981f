"""Every family of docs/models.md: results equal transformers' own, one completion at a time.

The tests with `shows` are what the page's table is made from.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from family_models import EVERY, as_released, gemma4_config, shows, write_family
from helpers import (
    CPU,
    largest_difference,
    make_prompts,
    make_sample,
    make_state,
    parameters,
    read_jsonl,
)
from processes import run
from saved_layout import tensors
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from virft_fast.algorithms import grpo
from virft_fast.data.prompt_source import PromptSource
from virft_fast.kernels import LossArgs, linear
from virft_fast.models.adapters import add_lora
from virft_fast.models.families import (
    UNSHARED,
    base,
    core,
    freeze_vision_tower,
    tower_parameters,
    why_plain,
)
from virft_fast.models.inputs import banned_token_ids, control_tokens_in
from virft_fast.models.plain import logits_rule
from virft_fast.models.policy import Head, Policy
from virft_fast.models.processing import load_processor
from virft_fast.models.qwen_vl import load_model, save_model
from virft_fast.models.source import find_model
from virft_fast.rollout import Sampling
from virft_fast.rollout.backends import check_model, make_rollout

G = 2


@pytest.fixture(scope="module", params=EVERY)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return write_family(family, tmp_path_factory.mktemp("family") / family)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return write_family("gemma3", tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def made(folder):
    """(policy, processor, prompts): images of one size and of two, and none (PaliGemma: one)."""
    return _made(folder)


def _made(folder):
    processor = load_processor(str(folder))
    samples = (
        make_sample(0, [(112, 60)]),
        make_sample(1, [(56, 84), (112, 56)], "Which one is larger?"),
        make_sample(2, [(56, 56)] * folder.name.startswith("paligemma"), "Detect every blue."),
    )
    return Policy(load_model(str(folder))), processor, make_prompts(processor, *samples)


def _completions(prompts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = [3, 1, 4, 2, 5, 3]
    drawn = [torch.randint(300, 500, (n,), generator=generator) for n in lengths]
    return [drawn[G * i : G * i + G] for i in range(len(prompts))]


def _alone(model, processor, prompt, completion, banned=()):
    """(C,) log-probs of a completion, from the model's own forward on the processor's tensors."""
    images = list(prompt.sample.images) or None
    begins = processor.tokenizer.bos_token and prompt.text.startswith(processor.tokenizer.bos_token)
    given = dict(processor(
        text=[prompt.text], images=images, return_tensors="pt", add_special_tokens=not begins
    ))  # fmt: skip
    ids, count = given["input_ids"], len(completion)
    for name, value in given.items():
        if isinstance(value, torch.Tensor) and value.shape == ids.shape:
            # PaliGemma's `generate` gives new tokens type 1, others' type 0.
            one = name == "attention_mask" or (
                name == "token_type_ids" and model.config.model_type == "paligemma"
            )
            end = completion[None] if name == "input_ids" else torch.full((1, count), int(one))
            given[name] = torch.cat([value, end], 1)
    if prompt.image_grid_thw is not None:
        given["mm_token_type_ids"] = (given["input_ids"] == model.config.image_token_id).long()
    logits = model(**given).logits[0, -count - 1 : -1].float()
    logits = logits.index_fill(1, torch.tensor(banned, dtype=torch.long), -torch.inf)
    return logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]


def _gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _logps(policy, prompts, completions, **options):
    with torch.no_grad():
        rows = policy.collate(prompts, completions, pad_token_id=0, device=CPU, **options)
        return policy(rows)[0]


def _expected(policy, processor, prompts, completions):
    pairs = [(p, c) for p, group in zip(prompts, completions, strict=True) for c in group]
    with torch.no_grad():
        return torch.cat([_alone(policy.model, processor, *pair) for pair in pairs])


def test_an_answer_never_sees_what_follows(tmp_path):
    """PaliGemma reads tokens of type 0 in both directions; only its prompts have that type."""
    folder = str(write_family("paligemma", tmp_path))
    processor, policy = load_processor(folder), Policy(load_model(folder))
    samples = (make_sample(0, [(112, 60)]), make_sample(1, [(56, 84)], "Which one is larger?"))
    prompts = make_prompts(processor, *samples)
    completions = _completions(prompts)
    found = _logps(policy, prompts, completions)
    expected = _expected(policy, processor, prompts, completions)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    changed = [[torch.cat([ids[:-1], ids[-1:] - 250]) for ids in group] for group in completions]
    lengths = [len(ids) for group in completions for ids in group]
    both = zip(found.split(lengths), _logps(policy, prompts, changed).split(lengths), strict=True)
    for before, after in both:
        torch.testing.assert_close(before[:-1], after[:-1], rtol=0, atol=1e-6)


# InternVL's language models with a window in all layers, in the second one, and one that isn't
# tested: its configuration has a window, but doesn't say in which layers.
WINDOWS = {
    "mistral": {"model_type": "mistral", "layer_types": ["full_attention"] * 2},  # not read
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "phi3": {"model_type": "phi3", "pad_token_id": 0},
}


@pytest.mark.parametrize("kind", WINDOWS)
def test_sliding_windows_of_language_models(tmp_path, kind):
    text = {"sliding_window": 8, **WINDOWS[kind]}
    policy, processor, prompts = _made(write_family("internvl", tmp_path, text=text))
    completions = _completions(prompts)
    assert policy.shares_prefix == (kind != "phi3")
    found = _logps(policy, prompts, completions)
    expected = _expected(policy, processor, prompts, completions)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if kind == "phi3":
        reason = "it has layers of another kind than full attention: sliding_attention"
        assert policy.unreachable == reason
    else:
        test_greedy_rollouts_equal_generate((policy, processor, prompts), "native")


def test_gemma_4_gets_its_token_types(tmp_path):
    """Its image tokens see each other, which it learns from the processor's token types."""
    processor = load_processor(str(write_family("glm4v", tmp_path)))
    (prompt,) = make_prompts(processor, make_sample(0, [(112, 60)]))
    assert torch.equal(prompt.token_inputs["mm_token_type_ids"], prompt.mm_token_type_ids)
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(gemma4_config()).eval()
    is_image = torch.tensor([0, 0, *[1] * 4, 0, 0])
    ids = torch.where(is_image > 0, model.config.image_token_id, torch.arange(10, 18))
    pixels = torch.rand(1, 36, 48)
    places = {"image_position_ids": torch.cartesian_prod(torch.arange(6), torch.arange(6))[None]}
    completion = torch.tensor([20, 21, 22])
    types = {"mm_token_type_ids": is_image}
    prompt = replace(
        prompt, input_ids=ids, pixel_values=pixels, image_grid_thw=None, image_inputs=places,
        token_inputs=types, **types,
    )  # fmt: skip
    found = _logps(Policy(model), [prompt], [[completion]])

    def own(**types):
        whole = torch.cat([ids, completion])[None]
        mask = torch.ones_like(whole)
        out = model(input_ids=whole, attention_mask=mask, pixel_values=pixels, **places, **types)
        return out.logits[0, -4:-1].log_softmax(-1).gather(1, completion[:, None])[:, 0]

    with torch.no_grad():
        expected, without = own(mm_token_type_ids=F.pad(is_image, (0, 3))[None]), own()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - without).abs().max() > 1e-3


@shows("shared training")
def test_a_grpo_step_equals_a_plain_loop(made):
    policy, processor, prompts = made
    model, completions = policy.model, _completions(prompts)
    assert policy.shares_prefix == policy.family.shares
    advantages = torch.tensor([1.0, -0.5, 0.3, -2.0, 0.7, 1.1])
    loss = torch.zeros(())
    rows = [(p, c) for p, group in zip(prompts, completions, strict=True) for c in group]
    for (prompt, completion), advantage in zip(rows, advantages, strict=True):
        logps = _alone(model, processor, prompt, completion)
        loss = loss - advantage * (logps - logps.detach()).exp().mean() / len(rows)
    loss.backward()
    expected = _gradients(model)
    model.zero_grad()
    inputs = policy.collate(prompts, completions, pad_token_id=0, device=CPU)
    ours, *_ = policy(inputs, loss=LossArgs(loss_type="grpo", advantages=advantages))
    ours.backward()
    found = _gradients(model)
    model.zero_grad()
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    used = {name for name, grad in expected.items() if grad.abs().max() > 1e-7}
    assert used <= found.keys() and any(name.startswith("model.vis") for name in used)
    norm = torch.stack([expected[name].norm() for name in used]).norm()
    difference = torch.stack([(found[name] - expected[name]).norm() for name in used]).norm()
    assert difference <= 1e-5 * norm


def _seen(policy, inputs):
    """(the loss, its gradients, the most rows of a tensor as wide as the vocabulary)."""
    weight, advantages = base(policy.model).lm_head.weight, torch.arange(len(inputs.cu_seqlens) - 1)
    rows = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            out = function(*arguments, **(options or {}))
            for tensor in pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == weight.shape[:1]:
                    if tensor.data_ptr() != weight.data_ptr():
                        rows.append(tensor.shape[:-1].numel())
            return out

    with Watch():
        loss, *_ = policy(inputs, loss=LossArgs(loss_type="grpo", advantages=advantages - 1.5))
        loss.backward()
    gradients = _gradients(policy.model)
    policy.model.zero_grad()
    return loss, gradients, max(rows)


@shows("fused head")
def test_no_logits_are_stored(made, monkeypatch):
    """But tiles of 4 of the 18 completion tokens' logits, for the same loss and gradients."""
    policy, _, prompts = made
    inputs = policy.collate(prompts, _completions(prompts), pad_token_id=0, device=CPU)
    monkeypatch.setattr(linear, "_tile_rows", lambda weight: 4)
    loss, gradients, rows = _seen(policy, inputs)
    monkeypatch.setattr(policy, "head", Head(base(policy.model).lm_head, "reference"))
    expected, plain, all_rows = _seen(policy, inputs)
    assert rows == 4 and all_rows >= 18
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, plain, rtol=1e-4, atol=1e-5)


def test_weights_in_16_bits(made, folder):
    """The log-probs are as close to float32's as those of transformers' own pass."""
    policy, processor, prompts = made
    narrow = Policy(load_model(str(folder), dtype=torch.bfloat16))
    completions = _completions(prompts)
    exact, ours = (_logps(one, prompts, completions) for one in (policy, narrow))
    own = _expected(narrow, processor, prompts, completions)
    ours, own = ((logps - exact).square().mean().sqrt() for logps in (ours, own))
    assert 0 < ours <= 2 * own


@shows("tower once per image")
def test_the_tower_runs_once_per_image(made, monkeypatch):
    policy, _, prompts = made
    calls = []
    own = core(policy.model).get_image_features

    @functools.wraps(own)  # its signature says which tensors it takes
    def counted(**options):
        calls.append(options["pixel_values"].shape)
        return own(**options)

    def inputs(chosen, **options):
        groups = _completions(chosen)
        return policy.collate(chosen, groups, pad_token_id=0, device=CPU, **options)

    together = inputs(prompts)
    monkeypatch.setitem(vars(core(policy.model)), "get_image_features", counted)
    policy(together)
    assert calls == [together.pixel_values.shape]
    features = policy.image_features(together)
    policy(together, image_features=features)
    assert len(calls) == 2
    if prompts[2].pixel_values is not None:  # PaliGemma has no prompts without images
        monkeypatch.undo()
        return
    assert together.images.keys() >= {"pixel_values"}
    for number, packed in enumerate((None, False), 3):
        policy(inputs(prompts[2:], packed=packed))[0].sum().backward()  # all ranks call the tower
        assert len(calls) == number
        grads = [p.grad for p in tower_parameters(policy.model)]
        assert sum(grad is not None for grad in grads) > len(grads) / 2
        assert not any(grad.any() for grad in grads if grad is not None)
        policy.model.zero_grad()


def test_a_neighbor_changes_nothing(made):
    """Padding to other prompts' lengths, tiles and images leaves a prompt as it is."""
    policy, processor, prompts = made
    one = make_prompts(processor, make_sample(3, [(56, 56)]))  # of fewer tiles than the others
    prompts = [prompts[1], *one, prompts[2]]
    groups = _completions(prompts)
    with torch.no_grad():
        together, _ = policy(policy.collate(prompts, groups, pad_token_id=0, device=CPU))
        alone = [
            policy(policy.collate([prompt], [group], pad_token_id=0, device=CPU))[0]
            for prompt, group in zip(prompts, groups, strict=True)
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["hf", "native"])
@shows("native rollout")
def test_greedy_rollouts_equal_generate(made, backend):
    policy, processor, prompts = made
    if backend == "hf" and policy.family.deepstack:
        pytest.skip("refused, see test_rollout.py")
    if backend == "native" and not policy.family.shares:
        with pytest.raises(ValueError, match="--rollout_backend native: .*own code.*hf"):
            check_model("native", policy)
        return
    rollout = make_rollout(
        backend, lambda: contextlib.nullcontext(policy), processor.tokenizer, device=CPU
    )
    out = rollout.generate(prompts, G, Sampling(5, greedy=True))
    tokenizer, model = processor.tokenizer, base(policy.model)
    banned = banned_token_ids(tokenizer, model.config.get_text_config().vocab_size)
    for row, mask in enumerate(out.completion_mask):
        completion, prompt = out.completion_ids[row][mask], prompts[row // G]
        with torch.no_grad():
            logps = _alone(model, processor, prompt, completion, banned)
        torch.testing.assert_close(out.sampling_logps[row][mask], logps, rtol=0, atol=1e-4)
    given = dict(processor(
        text=[prompts[1].text], images=list(prompts[1].sample.images), return_tensors="pt",
        add_special_tokens=False,
    ))  # fmt: skip
    tokens = model.generate(
        **given, do_sample=False, max_new_tokens=5, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, suppress_tokens=banned,
    )[0, given["input_ids"].shape[1] :]  # fmt: skip
    for row in (G, G + 1):
        assert torch.equal(out.completion_ids[row][out.completion_mask[row]], tokens)


def test_the_doctor_finds_what_a_run_would_refuse(tmp_path):
    from virft_fast.doctor import _model

    folder = write_family("internvl", tmp_path)
    (folder / "chat_template.jinja").unlink()
    (finding,) = _model(str(folder))
    assert finding.level == "problem" and "chat template" in finding.what


def test_the_doctor_says_what_the_family_gets(folder):
    from virft_fast.doctor import _model

    found = {f.what.split(":")[0]: f for f in _model(str(folder))}
    notes = [name for name, f in found.items() if f.level == "note"]
    if folder.name in UNSHARED:
        assert notes == ["shared training", "native rollout"]
        assert "--rollout_backend hf is used" in found["native rollout"].what
    else:
        assert notes == []


def test_saved_folders_are_the_familys_own(made, folder, tmp_path):
    """Plain transformers reads them: the weights, and files as in the base model's folder."""
    policy, processor, prompts = made
    save_model(policy.model, dict(policy.model.state_dict()), processor, tmp_path)
    again = hf.AutoModelForImageTextToText.from_pretrained(tmp_path)
    own = dict(policy.model.state_dict())
    assert own.keys() == again.state_dict().keys()
    assert all(torch.equal(own[name], value) for name, value in again.state_dict().items())
    assert tensors(tmp_path, "model").keys() == tensors(folder, "model").keys()
    for path in folder.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    if policy.config.model_type in ("gemma3", "idefics3"):  # others need torchvision, for videos
        read = hf.AutoProcessor.from_pretrained(tmp_path)
        assert type(read).__name__ == type(processor).__name__
        images = list(prompts[0].sample.images)
        given = {"text": [prompts[0].text], "images": images, "return_tensors": "pt"}
        ours, theirs = processor(**given), read(**given)
        assert all(torch.equal(ours[name], theirs[name]) for name in ("input_ids", "pixel_values"))


@pytest.mark.parametrize("template_file", ["chat_template.json", "tokenizer_config.json"])
def test_files_of_released_models_give_the_same_prompts(
    made, folder, tmp_path, monkeypatch, template_file
):
    """With SmolVLM's own processor, which needs num2words for videos alone."""
    from transformers.models.smolvlm import processing_smolvlm

    policy, processor, prompts = made
    if policy.family.is_qwen:
        pytest.skip("see test_saving.py")
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    released = tmp_path / folder.name
    shutil.copytree(folder, released)
    as_released(released, template_file)
    read = load_processor(str(released))
    assert read.tokenizer.eos_token == "<|im_end|>"
    for prompt, again in zip(
        prompts, make_prompts(read, *(p.sample for p in prompts)), strict=True
    ):
        assert again.text == prompt.text and torch.equal(again.input_ids, prompt.input_ids)
        if prompt.pixel_values is not None:
            assert torch.equal(again.pixel_values, prompt.pixel_values)
    read.save_pretrained(tmp_path)
    for name in ("preprocessor_config.json", template_file):
        assert (tmp_path / name).read_bytes() == (released / name).read_bytes()


def test_a_turn_ends_with_the_chat_formats_token(gemma):
    """And not with the first of generation_config.json; no control token is sampled as text."""
    tokenizer = load_processor(str(gemma)).tokenizer
    assert tokenizer.eos_token == "<|im_end|>"
    assert control_tokens_in(tokenizer, "a <image_soft_token> <|im_start|> <|box_start|>") == [
        "<image_soft_token>", "<|im_start|>",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("behind", "end"), [("<end_of_utterance>\n", "<end_of_utterance>"), ("\n", "<|endoftext|>")]
)
def test_a_turns_end_may_be_in_the_template_alone(tmp_path, behind, end):
    """As in Idefics3-8B. Without any, what follows an answer is the start of the next turn."""
    folder = write_family("idefics3", tmp_path)
    (folder / "generation_config.json").unlink()
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>\n", behind))
    tokenizer = load_processor(str(folder)).tokenizer
    assert tokenizer.eos_token == end
    model = load_model(str(folder), empty=True)
    banned = banned_token_ids(tokenizer, model.config.get_text_config().vocab_size)
    assert tokenizer.eos_token_id not in banned


def test_a_prompt_begins_with_one_bos_token(gemma):
    _, processor, prompts = _made(gemma)
    bos = processor.tokenizer.bos_token_id
    assert processor.tokenizer("?").input_ids[0] == bos
    assert prompts[0].input_ids.tolist().count(bos) == 1 and prompts[0].input_ids[0] == bos


def test_a_text_with_image_tokens_is_refused(gemma):
    processor = load_processor(str(gemma))
    for token in ("<start_of_image>", "<image_soft_token>"):
        with pytest.raises(ValueError, match=f"the text must not hold {token}"):
            make_prompts(processor, make_sample(0, text=f"what is {token}?"))


@pytest.mark.parametrize("loss_impl", ["fused", "reference"])
@pytest.mark.parametrize(
    ("scale", "cap", "bias"),
    [(0.25, None, False), (1.0, 3.0, False), (0.5, 2.0, True), (1, None, True)],
)
def test_scaled_and_capped_logits(gemma, monkeypatch, scale, cap, bias, loss_impl):
    """The log-probs and gradients are those of the logits that the model itself makes."""
    kind = hf.Gemma3ForConditionalGeneration
    forward = kind.forward

    def changed(self, *arguments: Any, **options: Any) -> Any:
        output = forward(self, *arguments, **options)
        logits = output.logits * scale
        output.logits = logits if cap is None else cap * (logits / cap).tanh()
        return output

    monkeypatch.setattr(kind, "forward", changed)
    model = load_model(str(gemma))
    if bias:
        head = nn.Linear(*reversed(model.lm_head.weight.shape))
        head.weight = model.lm_head.weight
        model.lm_head = head
    found = logits_rule(model)
    assert found[0] == pytest.approx(scale) and found[1] == (cap and pytest.approx(cap))
    policy, processor = Policy(model, loss_impl=loss_impl), load_processor(str(gemma))
    prompts = make_prompts(processor, make_sample(0))
    completion = torch.tensor([400, 450, 350])
    logps = _alone(model, processor, prompts[0], completion)
    (-logps.mean()).backward()
    expected = _gradients(model)
    model.zero_grad()
    inputs = policy.collate(prompts, [[completion]], pad_token_id=0, device=CPU)
    torch.testing.assert_close(policy(inputs)[0], logps, rtol=1e-5, atol=1e-5)
    policy(inputs, loss=LossArgs(loss_type="grpo", advantages=torch.ones(1)))[0].backward()
    for name, grad in _gradients(model).items():
        if name in expected:
            torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-6)


def test_other_logits_are_refused(gemma, monkeypatch):
    kind = hf.Gemma3ForConditionalGeneration
    forward = kind.forward

    def shifted(self, *arguments: Any, **options: Any) -> Any:
        output = forward(self, *arguments, **options)
        output.logits = output.logits + 1
        return output

    monkeypatch.setattr(kind, "forward", shifted)
    with pytest.raises(ValueError, match="scale or soft-cap its head's output at most"):
        Policy(load_model(str(gemma), empty=True))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "a vision-language model.*got model_type 'llama'"),
        ({"model_type": "t5gemma2"}, "only decodes, got 't5gemma2'"),
    ],
)
def test_models_that_cannot_work_are_refused(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path), empty=True)


def test_a_model_without_image_features_is_refused(gemma):
    model = load_model(str(gemma), empty=True)
    model.lm_head = nn.Sequential()
    with pytest.raises(ValueError, match="a linear `lm_head`, got Gemma3ForConditionalGeneration"):
        Policy(model)


def test_a_model_that_asks_for_no_images_is_refused(gemma, monkeypatch):
    policy, _, prompts = _made(gemma)
    model = core(policy.model)

    def blind(input_ids: Any, attention_mask: Any, **_: Any) -> Any:
        embeds = model.get_input_embeddings()(input_ids)
        return model.get_decoder()(inputs_embeds=embeds, attention_mask=attention_mask)

    groups = _completions(prompts)
    inputs = policy.collate(prompts, groups, pad_token_id=0, device=CPU, packed=False)
    policy(inputs)
    monkeypatch.setitem(vars(model), "forward", blind)
    with pytest.raises(RuntimeError, match="to call get_image_features, but it didn't"):
        policy(inputs)


def test_pixel_bounds_are_qwens_alone(gemma):
    with pytest.raises(ValueError, match="expected a Qwen-VL, got gemma3"):
        load_processor(str(gemma), max_pixels=10_000)
    samples: Any = {0: make_sample(0)}
    source = PromptSource(samples, load_processor(str(gemma)), max_prompt_length=1)
    assert source.load(0).reason.endswith("more than --max_prompt_length 1; raise it")


@shows("LoRA")
def test_an_adapter_trains_alone_and_plain_peft_reads_it(made, folder, tmp_path):
    """One step of GRPO, with an adapter on all linear layers of the language model."""
    import peft

    _, processor, prompts = made
    source = find_model(str(folder))
    names = source.linear_layers
    assert {"q_proj", "o_proj"} <= set(names) and "lm_head" not in names
    model = add_lora(load_model(source), r=2, alpha=4, target_modules=names)
    native = not why_plain(model.config.model_type)
    state = make_state(
        processor, make_model=lambda: model, backend="native" if native else "hf",
        prompts_per_microbatch=3,
    )  # fmt: skip
    text = {n for n, m in core(model).get_decoder().named_modules() if n.endswith("base_layer")}
    before = parameters(model)
    grpo.train_step(state, prompts)
    after = parameters(model)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert len(changed) == len(text) > 0 and all("lora_B" in name for name in changed)
    assert state.policy.vision_frozen
    save_model(model, dict(model.state_dict()), processor, tmp_path)
    plain = hf.AutoModelForImageTextToText.from_pretrained(folder)
    plain = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    completions = _completions(prompts[1:2])
    logps = _logps(state.policy.eval(), prompts[1:2], completions)
    with torch.no_grad():
        found = [_alone(plain, processor, prompts[1], ids) for ids in completions[0]]
    torch.testing.assert_close(torch.cat(found), logps, rtol=0, atol=1e-5)


def test_a_frozen_tower_leaves_the_rest_trainable(folder):
    model = load_model(str(folder))
    freeze_vision_tower(model)
    policy = Policy(model)
    assert policy.vision_frozen and base(model).lm_head.weight.requires_grad
    assert all(p.requires_grad for p in core(model).get_decoder().parameters())


# (family, ZeRO stage) of two ranks; -1 is the plain engine. LLaVA-OneVision's core has a parameter
# of its own. Families with experts route the ranks' tokens to different ones.
RANKS = [("internvl", -1), ("internvl", 0), ("gemma3", 1), ("smolvlm", 2)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """By the family and stage, None for one process: what `family_ranks` saved. All families in one
    start of that many processes."""
    folder, results = tmp_path_factory.mktemp("ranks"), {}
    folders = {name: write_family(name, folder / name) for name in EVERY}
    stages = {1: [(name, -1) for name in EVERY], 2: [*RANKS, *((name, 3) for name in EVERY)]}
    for processes, runs in stages.items():
        out = folder / str(processes)
        names = [f"{folders[name]}:{stage}" for name, stage in runs]
        done = run(out, 4 // processes, *names, module="family_ranks", processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        for name, stage in runs:
            saved = torch.load(f"{out}-{name}-{stage}.pt", weights_only=True)
            results[name, None if processes == 1 else stage] = saved
    for name in EVERY:
        results[name, "folders"] = (folder / f"2-{name}-3", folders[name])
    return results


def _two_equal_one(ranks, name, stage):
    one, two = ranks[name, None], ranks[name, stage]
    assert largest_difference(one["start"], two["start"]) == 0
    assert largest_difference(one["start"], one["end"]) > 1e-4
    assert largest_difference(one["end"], two["end"]) <= 1e-5
    for ours, theirs in zip(two["metrics"], one["metrics"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("name", "stage"), RANKS)
def test_two_ranks_equal_one(ranks, name, stage):
    """One of them has images, the other text alone; nobody waits for the other's vision tower."""
    _two_equal_one(ranks, name, stage)


@shows("ZeRO 0-3")
def test_two_ranks_with_parts_of_the_weights_equal_one(ranks, family):
    """ZeRO-3, where each rank holds half of every weight; they are saved under the names of the
    checkpoint, as plain transformers does."""
    _two_equal_one(ranks, family, 3)
    saved, released = (tensors(folder, "model") for folder in ranks[family, "folders"])
    assert saved.keys() == released.keys()


def _train(capsys, *argv):
    from virft_fast.train import main

    status = main([*map(str, argv), "--report_to", "none"])
    said = capsys.readouterr()
    assert status == 0, said.err[-3000:]
    return said


def test_a_run_from_sft_to_evaluation(tmp_path, digits, capsys, caplog):
    """SFT, then GRPO with an adapter that is resumed, then an evaluation of the adapter's folder,
    from the commands' own flags; `native`, the default, becomes `hf`, and says so."""
    from virft_fast import evaluate

    base_folder = write_family("paligemma", tmp_path / "base")
    common = ["--dataset_name", digits, "--max_completion_length", 6, "--logging_steps", 1,
              "--per_device_train_batch_size", 2]  # fmt: skip
    sft, out = tmp_path / "sft", tmp_path / "grpo"
    _train(capsys, "--algorithm", "sft", "--model_name_or_path", base_folder, "--output_dir", sft,
           "--max_steps", 1, *common)  # fmt: skip
    argv = ["--model_name_or_path", sft, "--output_dir", out, "--use_peft", "--num_generations", 2,
            "--save_steps", 1, "--beta", 0.1, *common]  # fmt: skip
    _train(capsys, *argv, "--max_steps", 1)
    assert "--rollout_backend hf, because paligemma runs through" in caplog.text
    said = _train(capsys, *argv, "--max_steps", 2, "--resume_from_checkpoint", "latest")
    assert "layers down_proj, gate_proj, k_proj, o_proj, q_proj" in said.out + said.err
    assert [line["step"] for line in read_jsonl(out / "metrics.jsonl")] == [1, 2]
    result = tmp_path / "answers.jsonl"
    assert evaluate.main([
        "--model_name_or_path", str(out), "--dataset_name", str(digits), "--split", "test",
        "--output", str(result), "--max_completion_length", "4",
    ]) == 0  # fmt: skip
    assert len(read_jsonl(result)) == 8


def test_preferences_train(tmp_path, gemma, capsys):
    """DPO on rows with and without an image; two steps lower the loss, which starts at log 2."""
    import datasets

    texts = [("red", "blue"), ("one", "two"), ("cat", "dog"), ("left", "right")]
    rows = datasets.Dataset.from_list([
        {
            "images": [make_sample(n).images[0]] * (n % 2),
            "prompt": [{"role": "user", "content": "Which?"}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for n, (chosen, rejected) in enumerate(texts)
    ]).cast_column("images", datasets.List(datasets.Image()))  # fmt: skip
    rows.save_to_disk(tmp_path / "rows")
    out = tmp_path / "out"
    _train(capsys, "--algorithm", "dpo", "--model_name_or_path", gemma, "--output_dir", out,
           "--dataset_name", tmp_path / "rows", "--per_device_train_batch_size", 4,
           "--gradient_accumulation_steps", 1, "--learning_rate", 1e-3,
           "--lr_scheduler_type", "constant", "--max_steps", 3)  # fmt: skip
    losses = [line["loss"] for line in read_jsonl(out / "metrics.jsonl")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[2] < losses[0]


def test_a_dry_run_names_the_tower(tmp_path, gemma, digits, capsys):
    said = _train(capsys, "--dry_run", "--model_name_or_path", gemma, "--dataset_name", digits,
                  "--output_dir", tmp_path / "out").out  # fmt: skip
    assert "vision tower" in said and "not estimated for this family" in said
    assert "<start_of_image>" in said


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("family", "backend", "advice"),
    [
        ("paligemma", "native", "pass --rollout_backend hf"),
        ("qwen3_vl", "hf", "leave the flag out"),
    ],
)
def test_a_backend_that_cannot_run_a_family_is_an_error(
    tmp_path, digits, capsys, command, family, backend, advice
):
    """Of the flag; a family without native rollouts has `hf` as its default."""
    from virft_fast import evaluate, train

    folder = write_family(family, tmp_path / "base")
    argv = ["--model_name_or_path", folder, "--dataset_name", digits, "--rollout_backend", backend]
    own = {"train": ["--output_dir", tmp_path / "out"], "evaluate": ["--output", tmp_path / "a"]}
    main = {"train": train.main, "evaluate": evaluate.main}[command]
    assert main([*map(str, argv), *map(str, own[command])]) == 2
    said = capsys.readouterr().err
    assert f"--rollout_backend {backend}: expected" in said and advice in said
