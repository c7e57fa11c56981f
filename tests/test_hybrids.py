"""Models with gated DeltaNet layers (Qwen3.5) or experts: shared prompts, rollouts, training."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import (
    CPU,
    largest_difference,
    make_sample,
    make_state,
    note_shrinks,
    parameters,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import NEWER, random_model
from safetensors.torch import load_file
from saved_layout import tensors
from test_rollout import banned_ids, graphs, plain_generate  # noqa: F401
from test_saving import save
from test_shared_prefix import collate, logps_and_gradient, relative_error
from transformers import AutoModelForImageTextToText

from virft_fast.algorithms import dpo, grpo, sft
from virft_fast.algorithms.dpo import DPOState
from virft_fast.config import DPOConfig
from virft_fast.kernels.prefix_attention import PrefixLayout
from virft_fast.models.processing import load_processor
from virft_fast.models.qwen_vl import (
    Policy,
    add_lora,
    base,
    checkpoint_layers,
    core,
    encode_prompt,
    load_model,
)
from virft_fast.models.recurrent import PackedRecurrence, recurrent_layers
from virft_fast.rollout import Sampling
from virft_fast.rollout import decoding as decoding_module
from virft_fast.rollout.backends import make_rollout
from virft_fast.rollout.cache import CachePlan, cache_numbers, state_tokens
from virft_fast.rollout.native import NativeRollout
from virft_fast.rollout.speculation import History
from virft_fast.rollout.weights import RolloutWeights
from virft_fast.train import main

RULE = "torch_chunk_gated_delta_rule"


@pytest.fixture(scope="module")
def policies(processor):
    return {name: Policy(random_model(name, processor.tokenizer)).eval() for name in NEWER}


@pytest.fixture(scope="module")
def completions():
    """Of 1 to 70 tokens, for each of the four prompts; a chunk of the delta rule has 64."""
    generator = torch.Generator().manual_seed(0)
    lengths = [(5, 1, 24), (70, 2), (3,), (9, 12)]
    return [
        [torch.randint(260, 600, (n,), generator=generator) for n in group] for group in lengths
    ]


# ---- one layer -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layer(policies):
    return recurrent_layers(core(policies["qwen3_5"].model).language_model)[0]


def packed(layer, row, prompts, completions):
    """The layer's outputs, (S, D), for a packed row of inputs, (S, D)."""
    groups = PrefixLayout.from_lengths(prompts, completions).groups
    core = PackedRecurrence(groups, CPU, layer.conv_kernel_size)
    return layer(row[None], recurrent_core=core)[0]


def unshared(layer, row, prompts, completions):
    """The same by transformers' own pass, each completion behind its own copy of the prompt."""
    out = []
    for group in PrefixLayout.from_lengths(prompts, completions).groups:
        prompt = row[group.start : group.first]
        out.append(layer(prompt[None])[0])
        for part in row[group.first : group.end].split(group.lengths):
            out.append(layer(torch.cat([prompt, part])[None])[0, group.prompt_length :])
    return torch.cat(out)


def layout():
    group = st.tuples(st.integers(1, 70), st.lists(st.integers(0, 70), max_size=4))
    return st.lists(group, min_size=1, max_size=3)


def row_of(layer, groups):
    prompts, completions = map(list, zip(*groups, strict=True))
    total = sum(prompts) + sum(map(sum, completions))
    generator = torch.Generator().manual_seed(total)
    return torch.randn(total, layer.hidden_size, generator=generator), prompts, completions


@given(layout())
@settings(max_examples=15, deadline=None, derandomize=True)
@example([(5, [])])
@example([(1, [0, 2, 65]), (2, [1]), (64, [0, 0])])
def test_a_layer_of_any_layout_equals_the_unshared_one(layer, groups):
    row, *lengths = row_of(layer, groups)
    weight = torch.randn(row.shape, generator=torch.Generator().manual_seed(1))

    def run(function):
        inputs = row.clone().requires_grad_()
        out = function(layer, inputs, *lengths)
        wanted = (inputs, *layer.parameters())
        gradients = torch.autograd.grad((out * weight).sum(), wanted)
        return out, torch.cat([gradient.flatten() for gradient in gradients])

    with torch.enable_grad():
        (out, gradient), (expected, plain) = run(packed), run(unshared)
        with other_chunks(layer):
            _, other = run(unshared)
    assert (out - expected).abs().max() <= 1e-5
    assert (gradient - plain).norm() <= 2 * (other - plain).norm() + 1e-6 * plain.norm()


class other_chunks:  # noqa: N801
    """transformers' delta rule in chunks of 32 tokens instead of 64."""

    def __init__(self, layer):
        self.module = sys.modules[type(layer).__module__]

    def __enter__(self):
        self.rule = getattr(self.module, RULE)
        setattr(self.module, RULE, partial(self.rule, chunk_size=32))

    def __exit__(self, *error):
        setattr(self.module, RULE, self.rule)


@torch.no_grad()
def test_another_completion_changes_nothing_at_all(layer):
    groups = [(70, [33, 1, 64]), (2, [5, 12])]
    row, *lengths = row_of(layer, groups)
    expected = packed(layer, row, *lengths)
    for first, last in ((70, 103), (104, 168), (170, 175)):
        for filler in (1.5, torch.nan):
            changed = row.clone()
            changed[first:last] = filler
            out = packed(layer, changed, *lengths)
            kept = torch.ones(len(row), dtype=torch.bool)
            kept[first:last] = False
            assert torch.equal(out[kept], expected[kept])
            assert not torch.equal(out[~kept], expected[~kept])


# ---- whole models --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NEWER)
def test_logps_and_gradient_equal_the_unshared_ones(policies, prompts, completions, family):
    policy, calls = policies[family], []
    hook = core(policy.model).visual.register_forward_hook(lambda *args: calls.append(1))
    logps, gradient = logps_and_gradient(policy, prompts, completions, packed=True)
    expected, plain = logps_and_gradient(policy, prompts, completions, packed=False)
    hook.remove()
    assert len(calls) == 2  # once a pass, for all images
    assert (logps - expected).abs().max() <= 1e-5
    assert relative_error(gradient, plain) <= 1e-5
    # And the unshared ones, of rows with padding, are transformers' own for one row.
    prompt, ids = prompts[1], completions[1][1]
    row = torch.cat([prompt.input_ids, ids])[None]
    with torch.no_grad():
        logits = policy.model(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            mm_token_type_ids=torch.cat([prompt.mm_token_type_ids, torch.zeros_like(ids)])[None],
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid_thw,
        ).logits
    own = logits[0, len(prompt.input_ids) - 1 : -1].log_softmax(-1).gather(-1, ids[:, None])
    assert (expected[100:102] - own[:, 0]).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_recomputed_layers_of_an_adapter_give_the_same(processor, prompts, completions, family):
    torch.manual_seed(0)
    model = random_model(family, processor.tokenizer)
    targets = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", "q_proj"]
    policy = Policy(add_lora(model, r=4, alpha=8, target_modules=targets))
    logps, gradient = logps_and_gradient(policy, prompts, completions, packed=True)
    assert sum("linear_attn" in name for name in gradient) == 2 * 5 * 2  # layers, targets, A and B
    checkpoint_layers(base(policy.model), offload=False)
    policy.train()
    again, recomputed = logps_and_gradient(policy, prompts, completions, packed=True)
    assert torch.equal(logps, again)
    assert all(torch.equal(gradient[name], recomputed[name]) for name in gradient)


@pytest.mark.parametrize("autocast", [True, False])
def test_16_bits(processor, prompts, completions, autocast):
    """As close to float32 as the unshared pass, up to a factor of 2."""
    exact = Policy(random_model("qwen3_5", processor.tokenizer))
    policy = exact if autocast else copy.deepcopy(exact).bfloat16()
    with torch.no_grad():
        truth, _ = exact(collate(exact, prompts, completions, True))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            shared, plain = (
                policy(collate(policy, prompts, completions, packed))[0] for packed in (True, False)
            )
    error = [(logps - truth).square().mean().sqrt() for logps in (shared, plain)]
    assert 0 < error[0] <= 2 * error[1]


def test_missing_kernels_are_named_on_a_gpu(monkeypatch, caplog, processor):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    Policy(random_model("qwen3_vl_moe", processor.tokenizer))
    assert not caplog.text
    Policy(random_model("qwen3_5", processor.tokenizer))
    assert "slow without flash-linear-attention and causal-conv1d" in caplog.text


def test_a_layer_that_bypasses_the_recurrence_is_noticed(processor, prompts, completions):
    policy = Policy(random_model("qwen3_5", processor.tokenizer))
    del recurrent_layers(core(policy.model).language_model)[1].forward
    with pytest.raises(RuntimeError, match="expected 2 layers to share the prompt, 1 did"):
        policy(collate(policy, prompts, completions, True))


# ---- rollouts ------------------------------------------------------------------------------------


def rollout_of(policy, processor, **options):
    return NativeRollout(lambda: nullcontext(policy), processor.tokenizer, device=CPU, **options)


@pytest.mark.parametrize("family", NEWER)
def test_greedy_equals_plain_generate(policies, processor, prompts, family):
    """In one batch of prompts of different lengths, and in several that fill the cache."""
    policy = policies[family]
    whole = rollout_of(policy, processor).generate(prompts, 2, Sampling(16, greedy=True))
    longest = max(len(prompt.input_ids) for prompt in prompts)
    state = state_tokens(policy.config.text_config, 4)
    small = rollout_of(policy, processor, max_cache_tokens=longest + 2 * (16 + state))
    parts = small.generate(prompts, 2, Sampling(16, greedy=True))
    banned = banned_ids(policy.model, processor.tokenizer)
    for row in range(2 * len(prompts)):
        expected = plain_generate(policy.model, prompts[row // 2], 16, banned, processor.tokenizer)
        for out in (whole, parts):
            found = out.completion_ids[row][out.completion_mask[row]]
            assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("family", NEWER)
def test_batches_that_shrink_draw_what_training_computes(
    monkeypatch, policies, processor, prompts, family
):
    """About one token in 16 ends a completion, at different times."""
    policy, sizes = policies[family], note_shrinks(monkeypatch)
    sampling = Sampling(40, seed=2, stop_token_ids=tuple(range(0, 1024, 16)))
    rollout = rollout_of(policy, processor)
    rollout.banned = lambda policy: []  # which training doesn't know of
    out = rollout.generate(prompts, 4, sampling)
    assert len(sizes) > 1 and len(out.completion_mask.sum(1).unique()) > 4
    rows = [ids[mask] for ids, mask in zip(out.completion_ids, out.completion_mask, strict=True)]
    groups = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    with torch.no_grad():
        logps, _ = policy(collate(policy, prompts, groups, True))
    drawn = out.sampling_logps[out.completion_mask]
    assert (logps - drawn).abs().max() <= 1e-5


def test_hf_rollouts_draw_the_same(policies, processor, prompts):
    policy, sampling = policies["qwen3_5"], Sampling(12, seed=1)
    native, hf = (
        make_rollout(name, lambda: nullcontext(policy), processor.tokenizer, device=CPU)
        for name in ("native", "hf")
    )
    out, expected = (rollout.generate(prompts, 2, sampling) for rollout in (native, hf))
    assert out.texts == expected.texts


@pytest.mark.parametrize("family", NEWER)
def test_rollouts_on_a_copy_of_the_weights_draw_the_same(processor, prompts, family):
    """As under ZeRO-3 and with an adapter on a GPU. The copy's configuration names our attention
    already."""
    torch.manual_seed(0)
    model = add_lora(
        random_model(family, processor.tokenizer), r=2, alpha=4, target_modules=["q_proj"]
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    policy = Policy(model).eval()
    copied = RolloutWeights(policy, device=CPU, dtype=torch.float32).policy()
    out, expected = (
        rollout_of(one, processor).generate(prompts, 2, Sampling(8, seed=1))
        for one in (copied, policy)
    )
    assert torch.equal(out.completion_ids, expected.completion_ids)


def test_recurrent_layers_are_not_asked_to_read_guesses(policies, processor, prompts):
    """A wrong guess would leave its trace in the state."""
    policy, history, sampling = policies["qwen3_5"], History(), Sampling(12, greedy=True)
    rollout = rollout_of(policy, processor, speculation=history)
    first, again = (rollout.generate(prompts, 2, sampling) for _ in range(2))
    assert torch.equal(first.completion_ids, again.completion_ids)
    assert rollout.stats.guessed == 0 and rollout.stats.passes == 11


def test_replayed_graphs_give_what_the_steps_give(graphs, policies, processor, prompts):  # noqa: F811
    """The states stay where they are."""
    policy = policies["qwen3_5"]
    plain, rollout = (rollout_of(policy, processor, graphs=on) for on in (False, True))
    stops = tuple(range(0, 1024, 16))
    for some, count, seed in ((prompts, 4, 0), (prompts[:1], 3, 1), (prompts[:1], 3, 2)):
        sampling = Sampling(40, seed=seed, stop_token_ids=stops)
        out, expected = (r.generate(some, count, sampling) for r in (rollout, plain))
        assert torch.equal(out.completion_ids, expected.completion_ids)
    assert sum(graph.replays for graph in graphs) > 2 * len(graphs) > 0


def test_the_cache_counts_recurrent_states(policies):
    """As tokens of keys and values: what fits depends on it."""
    text = policies["qwen3_5"].config.text_config
    # Two layers: a float32 state of 4 heads x 8 x 16, and 3 inputs of 96 channels.
    size = 2 * (4 * 4 * 8 * 16 + 3 * 96 * 2)
    assert cache_numbers(text) == 2 * 1 * 2 * 16
    assert state_tokens(text, 2) == -(-size // (2 * cache_numbers(text)))
    assert state_tokens(policies["qwen3_vl_moe"].config.text_config, 2) == 0
    assert CachePlan(2, 3, 100, 20, state=5).num_tokens == 2 * (100 + 3 * 25)


def test_states_take_the_memory_that_is_counted(monkeypatch, policies, processor, prompts):
    policy, taken = policies["qwen3_5"], {}
    take = decoding_module.Buffers.take

    def noted(self, name, shape, dtype):
        taken[name] = torch.Size(shape).numel() * dtype.itemsize
        return take(self, name, shape, dtype)

    monkeypatch.setattr(decoding_module.Buffers, "take", noted)
    rollout = rollout_of(policy, processor)
    sampling = Sampling(10, seed=1)
    rollout.generate(prompts, 3, sampling)
    kinds = ("prompt_keys", "prompt_values", "keys", "values", "inputs", "states")
    size = sum(n for name, n in taken.items() if name.rstrip("0123456789") in kinds)
    token, tokens = (
        4 * cache_numbers(policy.config.text_config),
        rollout._plan(prompts, 3, sampling),
    )
    assert 0 <= token * tokens.num_tokens - size < token * 3 * len(prompts)


# ---- files and whole runs ------------------------------------------------------------------------


@pytest.mark.parametrize("family", NEWER)
def test_a_saved_folder_is_read_by_transformers_and_saved_again(tmp_path, processor, family):
    """With the names and shapes that transformers itself writes, except that matrices of
    Qwen3-VL-MoE's experts are turned, as they were released."""
    model, folder = random_model(family, processor.tokenizer), tmp_path / "ours"
    save(model, folder, processor)
    model.save_pretrained(tmp_path / "theirs")
    shapes = [tensors(tmp_path / name, "model") for name in ("ours", "theirs")]
    turned = {name for name in shapes[0] if shapes[0][name] != shapes[1][name]}
    assert shapes[0].keys() == shapes[1].keys() and len(turned) == 6 * (family == "qwen3_vl_moe")
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    for loaded in (plain, load_model(str(folder))):
        assert type(loaded) is type(model)
        assert largest_difference(loaded.state_dict(), model.state_dict()) == 0
    again = save(loaded, tmp_path / "again", load_processor(str(folder)))
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("family", NEWER)
def test_steps_of_every_algorithm_equal_the_unshared_ones(processor, prompts, family):
    """Losses, and the weights after a step of GRPO with a reference, of SFT and of DPO."""
    pairs = []
    for index, answers in enumerate([("yes", "no"), ("a cat", "a dog and more")]):
        sample = make_sample(index)
        sample.columns.update(zip(("chosen", "rejected"), answers, strict=True))
        pairs.append(encode_prompt(processor, sample))
    metrics, weights = [], []
    for sharing in ("on", "off"):
        state = make_state(
            processor, config={"beta": 0.1}, policy={"prefix_sharing": sharing},
            settings={"epsilon": 1e-3},  # AdamW's usual one makes steps of noise as large as others
            make_model=lambda: random_model(family, processor.tokenizer),
            prompts_per_microbatch=4,
        )  # fmt: skip
        metrics.append([grpo.train_step(state, prompts)[0], sft.train_step(state, prompts)[0]])
        state = DPOState(**vars(state), dpo=DPOConfig())
        metrics[-1].append(dpo.train_step(state, pairs)[0])
        weights.append(parameters(state.policy))
    for one, other in zip(*metrics, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5, abs=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert largest_difference(*weights) <= 1e-5


RUN = (
    "--dataset_name shapes_detection --per_device_train_batch_size 1 --num_generations 2 "
    "--max_completion_length 8 --max_steps 2 --save_steps 1 --learning_rate 1e-3 --report_to none"
)


def test_a_run_resumes_bit_for_bit(tmp_path, capsys, policies, processor):
    """With a dry run before, and an adapter on all kinds of layers."""
    model = save(policies["qwen3_5_moe"].model, tmp_path / "model", processor)
    reward = f"{Path(__file__).with_name('helpers.py')}:letter_count"
    argv = ["--model_name_or_path", str(model), *RUN.split(), "--reward_funcs", reward]
    argv += ["--use_peft", "--lora_target_modules", "q_proj", "in_proj_qkv", "out_proj"]
    assert main([*argv, "--dry_run"]) == 0
    assert "keys and values of a rollout" in capsys.readouterr().out
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main([*argv, "--output_dir", str(whole)]) == 0
    start = ["--resume_from_checkpoint", str(whole / "checkpoint-1")]
    assert main([*argv, "--output_dir", str(resumed), *start]) == 0
    first, second = (load_file(out / "adapter_model.safetensors") for out in (whole, resumed))
    assert any(tensor.any() for name, tensor in first.items() if "lora_B" in name)
    assert largest_difference(first, second) == 0
