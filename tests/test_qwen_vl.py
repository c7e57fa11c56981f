"""The adapter computes what the plain model computes, whatever is batched together."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from helpers import CPU, make_prompts, make_sample
from models import FAMILIES, random_model
from torch.nn import functional as F

from virft_fast.config import HUB_ATTENTIONS
from virft_fast.models.decode_step import SUPPORTED_NORMS
from virft_fast.models.processing import load_processor
from virft_fast.models.qwen_vl import (
    Policy,
    add_lora,
    apply_liger,
    banned_token_ids,
    control_tokens_in,
    core,
    encode_prompt,
    freeze_vision_tower,
    load_model,
)
from virft_fast.models.tiny import resolve_model_path
from virft_fast.models.vision_metadata import vision_metadata
from virft_fast.rollout import Sampling
from virft_fast.rollout.backends import make_rollout

G, T = 3, 5


@pytest.fixture(scope="module")
def policy():
    return Policy(load_model("tiny")).eval()


@pytest.fixture(scope="module")
def completions(policy, prompts, processor):
    """The beginnings of answers, lengths 1..T, (B*G, T)."""
    drawn = make_rollout("native", lambda: nullcontext(policy), processor.tokenizer, device=CPU)
    ids = drawn.generate(prompts, G, Sampling(T, seed=1)).completion_ids
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, T + 1, (len(ids),), generator=generator)
    mask = torch.arange(T) < lengths[:, None]
    return ids.masked_fill(~mask, processor.tokenizer.pad_token_id), mask


def collate(policy, prompts, completions, packed=False):
    ids, mask = completions
    rows = [row[own] for row, own in zip(ids, mask, strict=True)]
    groups = [rows[i : i + G] for i in range(0, len(rows), G)]
    return policy.collate(prompts, groups, pad_token_id=0, device=CPU, packed=packed)


def by_row(logps, mask):
    """Packed (S,) values as (N, T), 0 where masked."""
    return torch.zeros(mask.shape).masked_scatter(mask, logps)


def plain_logps(policy, prompt, ids):
    """The transformers model's own forward pass over one unpadded sequence."""
    model = policy.model
    row = torch.cat([prompt.input_ids, ids])[None]
    types = torch.cat([prompt.mm_token_type_ids, torch.zeros_like(ids)])[None]
    images = {}
    if prompt.pixel_values is not None:
        images = {
            "pixel_values": prompt.pixel_values,
            "image_grid_thw": prompt.image_grid_thw,
            "mm_token_type_ids": types,
        }
    core(model).rope_deltas = None
    logits = model(input_ids=row, attention_mask=torch.ones_like(row), **images).logits
    first = len(prompt.input_ids) - 1
    return logits[0, first:-1].log_softmax(-1).gather(-1, ids[:, None])[:, 0]


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_mixed_batch_equals_plain_model_row_by_row(policy, prompts, completions, packed):
    """Images of different size, several images and none in one batch: each row sees its own."""
    ids, mask = completions
    logps, _ = policy(collate(policy, prompts, completions, packed))
    logps = by_row(logps, mask)
    for row in range(len(ids)):
        length = int(mask[row].sum())
        expected = plain_logps(policy, prompts[row // G], ids[row, :length])
        torch.testing.assert_close(logps[row, :length], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_vision_tower_sees_each_image_once(policy, prompts, completions, packed):
    seen = []
    handle = core(policy.model).visual.register_forward_pre_hook(
        lambda module, args: seen.append(len(args[0]))
    )
    try:
        policy(collate(policy, prompts, completions, packed))
    finally:
        handle.remove()
    patches = sum(len(p.pixel_values) for p in prompts if p.pixel_values is not None)
    assert seen == [patches]


def test_text_only_batch_calls_the_tower_and_gives_it_zero_gradients(policy, prompts, completions):
    """Under ZeRO-3 and data parallelism every rank has to call every module."""
    ids, mask = completions
    inputs = collate(policy, prompts[2:3], (ids[:G], mask[:G]))
    logps, _ = policy(inputs)
    logps.sum().backward()
    grads = [p.grad for p in core(policy.model).visual.parameters()]
    policy.zero_grad()
    assert all(grad is not None and not grad.any() for grad in grads)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_tower_computes_the_same_from_host_metadata(family, processor):
    """Images of several sizes, among them one that Qwen2.5-VL's windows don't divide."""
    sizes = [(112, 112), (56, 84), (140, 196)]
    prompt = make_prompts(processor, make_sample(0, sizes))[0]
    policy = Policy(random_model(family, processor.tokenizer))
    visual = core(policy.model).visual
    pixels, grid = torch.randn_like(prompt.pixel_values), prompt.image_grid_thw
    size = visual.config.patch_size**2 * 6
    pixels = pixels[:, :size]
    given = vision_metadata(visual, grid, CPU)
    plain = visual(pixels, grid_thw=grid, return_dict=True)
    # A grid of other numbers: only what was given can have been used.
    fast = visual(pixels, grid_thw=torch.full_like(grid, -1), return_dict=True, **given)
    assert torch.equal(plain.pooler_output, fast.pooler_output)
    if family == "qwen3_vl":
        assert all(map(torch.equal, plain.deepstack_features, fast.deepstack_features))


@torch.no_grad()
def test_metadata_names_the_longest_parts_for_flash_attention(processor):
    visual = core(random_model("qwen2_5_vl", processor.tokenizer)).visual
    visual.config._attn_implementation = "flash_attention_2"
    given = vision_metadata(visual, torch.tensor([[1, 8, 12], [1, 4, 4]]), CPU)
    assert given["max_seqlen"] == 96
    assert given["max_window_seqlen"] == int(given["cu_window_seqlens"].diff().max()) == 16


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [False, True])
def test_image_features_enter_as_in_the_plain_model(family, packed, processor, prompts):
    """Embeddings, DeepStack and their gradients against transformers' own masked assignments."""
    policy = Policy(random_model(family, processor.tokenizer))
    answers = [[torch.tensor([5, 6, 7])] * 2] * len(prompts)
    inputs = policy.collate(prompts, answers, pad_token_id=0, device=CPU, packed=packed)
    width = 64 * (3 if family == "qwen3_vl" else 1)
    tokens = sum(n for n, _ in inputs.image_copies)
    features = torch.randn(tokens, width, requires_grad=True)
    embeds, deepstack = policy.embed(inputs, features)
    mask = torch.zeros(inputs.input_ids.numel(), dtype=torch.bool)
    mask[inputs.image_places] = True
    mask = mask.view(inputs.input_ids.shape)
    assert torch.equal(mask, inputs.input_ids == policy.config.image_token_id)
    table = core(policy.model).get_input_embeddings()
    copies = zip(inputs.per_prompt(features), inputs.image_copies, strict=True)
    repeated = torch.cat([own for own, (_, n) in copies for _ in range(n)])
    plain = table(inputs.input_ids).masked_scatter(mask[..., None], repeated[:, :64])
    assert torch.equal(embeds, plain)
    pairs = [(embeds, plain)]
    if deepstack is not None:
        model = core(policy.model).language_model
        ours = model._deepstack_process(embeds, inputs.image_places, deepstack[0])
        theirs = model._deepstack_process(plain, mask, repeated[:, 64:128])
        assert torch.equal(ours, theirs)
        pairs.append((ours, theirs))
    weight = torch.randn(embeds.shape)
    for ours, theirs in pairs:
        wanted = [features, table.weight]
        for got, want in zip(
            torch.autograd.grad((ours * weight).sum(), wanted, retain_graph=True),
            torch.autograd.grad((theirs * weight).sum(), wanted, retain_graph=True),
            strict=True,
        ):
            assert torch.equal(got, want)


@torch.no_grad()
def test_image_positions_are_looked_for_in_the_prompt_only(policy, prompts, completions):
    """A completion that holds an image token, however it got there, is read as text."""
    ids, mask = completions
    ids = ids.clone()
    ids[0, 0] = policy.config.image_token_id
    logps, _ = policy(collate(policy, prompts, (ids, mask)))
    assert logps.isfinite().all()


def test_control_tokens_and_unused_rows_are_banned(processor):
    model = load_model("tiny")
    vocab_size = model.config.text_config.vocab_size
    banned = banned_token_ids(processor.tokenizer, vocab_size)
    assert model.config.image_token_id in banned
    assert processor.tokenizer.eos_token_id not in banned
    assert set(range(len(processor.tokenizer), vocab_size)) <= set(banned)
    control = ["<|endoftext|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>",
               "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
    assert set(processor.tokenizer.convert_tokens_to_ids(control)) <= set(banned)
    text = ["<answer>", "<|box_start|>", "<|box_end|>", "<|object_ref_start|>", "<|quad_end|>"]
    assert set(processor.tokenizer.convert_tokens_to_ids(text)).isdisjoint(banned)


def test_special_tokens_of_the_user_are_text(processor):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<seg>"]})
    number = tokenizer.convert_tokens_to_ids("<seg>")
    assert number not in banned_token_ids(tokenizer, len(tokenizer))
    assert control_tokens_in(tokenizer, "<seg><|box_start|>") == []
    assert control_tokens_in(tokenizer, "a<|im_end|>b<|image_pad|><|im_end|>") == [
        "<|im_end|>", "<|image_pad|>"
    ]  # fmt: skip


def test_checkpoints_sampling_defaults_are_set_aside(tmp_path):
    folder = tmp_path / "greedy"
    shutil.copytree(resolve_model_path("tiny"), folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.01, "top_k": 1})
    )
    model = load_model(str(folder))
    assert model.generation_config.temperature in (None, 1.0)
    assert model.generation_config.top_k != 1
    assert model.shipped_generation_config.top_k == 1


def test_prompt_with_image_token_in_its_text_is_refused(processor):
    sample = make_sample(0, text="what is <|image_pad|> here?")
    with pytest.raises(ValueError, match="placeholders"):
        encode_prompt(processor, sample)


def test_frozen_tower_gets_no_gradient_and_is_seen_as_frozen(prompts, completions):
    model = load_model("tiny")
    freeze_vision_tower(model)
    policy = Policy(model)
    assert policy.vision_frozen
    ids, mask = completions
    logps, _ = policy(collate(policy, prompts, (ids, mask)))
    logps.sum().backward()
    assert all(p.grad is None for p in core(model).visual.parameters())
    assert core(model).language_model.norm.weight.grad is not None


def test_cached_image_features_change_nothing(policy, prompts, completions):
    inputs = collate(policy, prompts, completions)
    with torch.no_grad():
        features = policy.image_features(inputs)
        plain, _ = policy(inputs)
        cached, _ = policy(replace(inputs), image_features=features)
    assert torch.equal(plain, cached)


def test_gradient_checkpointing_changes_nothing(prompts, completions):
    gradients = []
    for checkpointing in (False, True):
        model = load_model("tiny").train()
        if checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        policy = Policy(model)
        policy(collate(policy, prompts, completions))[0].sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_lora_trains_the_adapter_only_and_its_off_state_is_the_base_model(prompts, completions):
    pytest.importorskip("peft")
    base = Policy(load_model("tiny")).eval()
    policy = Policy(add_lora(load_model("tiny"), r=4, alpha=8, target_modules=["q_proj", "v_proj"]))
    trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids, mask = completions
    inputs = collate(policy, prompts, (ids, mask))
    with torch.no_grad():
        expected, _ = base(inputs)
        assert not torch.allclose(policy(inputs)[0], expected)
        with policy.model.disable_adapter():
            off, _ = policy(inputs)
    torch.testing.assert_close(off, expected)


@pytest.mark.parametrize(
    ("name", "package"), [("flash_attention_2", "flash-attn"), (HUB_ATTENTIONS[0], "kernels")]
)
def test_flash_attention_falls_back_with_a_warning(name, package):
    with pytest.warns(UserWarning, match=f"{name} needs the package {package} .*sdpa instead"):
        model = load_model("tiny", attn_implementation=name)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", HUB_ATTENTIONS)
def test_a_kernel_of_the_hub_is_used_and_not_saved(monkeypatch, tmp_path, prompts, name):
    """Its place is taken by torch's attention, which sees one image at a time."""
    import transformers
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls = []

    def kernel(module, *args, cu_seq_lens_q=None, **options):
        calls.append(type(getattr(module, "_whole", module)).__name__)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **options)

    monkeypatch.setattr(transformers.utils, "is_kernels_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        transformers.modeling_utils, "lazy_import_flash_attention", lambda *args, **options: None
    )
    transformers.AttentionInterface.register(name, kernel)
    policy = Policy(load_model("tiny", attn_implementation=name)).eval()
    plain = Policy(load_model("tiny")).eval()
    prompts, completions = prompts[:1], [[torch.tensor([5, 6])]]
    for packed in (True, False):
        rows = [model.collate(prompts, completions, pad_token_id=0, device=CPU, packed=packed)
                for model in (policy, plain)]  # fmt: skip
        calls.clear()
        logps, expected = (m(row)[0] for m, row in zip((policy, plain), rows, strict=True))
        torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
        assert set(calls) == {"VisionAttention"} | (set() if packed else {"Qwen2VLAttention"})
    policy.model.save_pretrained(tmp_path)
    assert "kernels-community" not in (tmp_path / "config.json").read_text()


def test_liger_off_cuda_warns_and_changes_nothing():
    with pytest.warns(UserWarning, match="no effect"):
        apply_liger(load_model("tiny"), CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_liger_computes_norms_and_mlps(monkeypatch, processor, family):
    """Through its own modules. Torch's functions replace their Triton functions, which run on a GPU
    only."""
    rms_norm = pytest.importorskip("liger_kernel.transformers.rms_norm")
    swiglu = pytest.importorskip("liger_kernel.transformers.swiglu")
    calls = Counter()

    class Norm:
        @staticmethod
        def apply(hidden, weight, epsilon, offset, casting_mode, in_place, row_mode):
            assert (offset, casting_mode, in_place, row_mode) == (0.0, "llama", True, None)
            calls["norm"] += 1
            return F.rms_norm(hidden, hidden.shape[-1:], weight, epsilon)

    class SiLUMul:
        @staticmethod
        def apply(gate, up, *multipliers):
            assert set(multipliers) <= {1.0}
            calls["mlp"] += 1
            return F.silu(gate) * up

    monkeypatch.setattr(rms_norm, "LigerRMSNormFunction", Norm)
    monkeypatch.setattr(swiglu, "LigerSiLUMulFunction", SiLUMul)
    model = random_model(family, processor.tokenizer)
    images = {
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }

    def outputs():
        features = core(model).get_image_features(**images, return_dict=True).pooler_output
        return torch.cat(list(features)), model(input_ids=torch.arange(9)[None]).logits

    expected = outputs()
    assert not calls
    apply_liger(model, torch.device("cuda"))
    for ours, theirs in zip(outputs(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    text, vision = model.config.text_config, model.config.vision_config
    num_norms = 2 * text.num_hidden_layers + 1
    num_mlps = text.num_hidden_layers
    if family == "qwen3_vl":  # with norms of queries and keys
        num_norms += 2 * text.num_hidden_layers
    if family == "qwen2_5_vl":  # the same in its vision tower
        num_norms, num_mlps = num_norms + 2 * vision.depth + 1, num_mlps + vision.depth
    assert calls == {"norm": num_norms, "mlp": num_mlps}
    norms = [module for module in model.modules() if "variance_epsilon" in vars(module)]
    assert len(norms) == num_norms
    text_norms = core(model).language_model.modules()
    named = {type(m).__name__ for m in text_norms if "variance_epsilon" in vars(m)}
    assert named <= set(SUPPORTED_NORMS)  # so decoding knows them


def test_without_liger_the_flag_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    for name in [name for name in sys.modules if name.startswith("liger_kernel.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match="expected the package liger-kernel; pip install"):
        apply_liger(load_model("tiny"), torch.device("cuda"))


def test_missing_model_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json.*nowhere"):
        load_model(str(tmp_path / "nowhere"))


def test_other_model_families_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="a vision-language model.*gpt2"):
        load_model(str(tmp_path))


def test_batch_of_one_and_prompt_alone_agree(policy, processor, completions):
    """Left padding to a longer neighbour leaves a prompt's positions as they were."""
    short, long = make_prompts(
        processor, make_sample(5, [(56, 56)]), make_sample(6, [(112, 112)], "A longer text " * 5)
    )
    ids, mask = completions
    with torch.no_grad():
        together, _ = policy(collate(policy, [short, long], (ids[: 2 * G], mask[: 2 * G])))
        alone, _ = policy(collate(policy, [short], (ids[:G], mask[:G])))
    torch.testing.assert_close(together[: len(alone)], alone, rtol=0, atol=1e-5)


def test_evaluation_sees_images_as_training_did(tmp_path):
    """The image size of training is saved with the model, and evaluation takes it from there."""
    load_processor("tiny", min_pixels=56 * 56, max_pixels=56 * 84).save_pretrained(tmp_path)
    sample = make_sample(0, [(300, 200)])
    trained = encode_prompt(load_processor("tiny", max_pixels=56 * 84), sample)
    evaluated = encode_prompt(load_processor(str(tmp_path)), sample)
    assert torch.equal(trained.pixel_values, evaluated.pixel_values)
    assert torch.equal(trained.input_ids, evaluated.input_ids)
    assert int(evaluated.image_grid_thw.prod()) * 14 * 14 <= 56 * 84
