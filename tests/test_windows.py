"""Gemma 3 shares prompts: sliding windows, and images whose tokens see each other.

Its windows are shorter here than an image, than a prompt, and reached only in the completions."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from family_models import write_family
from helpers import CPU, make_prompts, make_sample, note_shrinks
from test_families import _alone
from test_rollout import banned_ids
from test_shared_prefix import collate, logps_and_gradient, relative_error

from virft_fast.models.image_attention import attention_to_prompts
from virft_fast.models.processing import load_processor
from virft_fast.models.qwen_vl import Policy, checkpoint_layers, load_model
from virft_fast.models.shared_prefix import Group, PackedAttention, windows
from virft_fast.rollout import Sampling
from virft_fast.rollout.backends import make_rollout
from virft_fast.rollout.native import NativeRollout
from virft_fast.rollout.observers import AttentionObserver
from virft_fast.rollout.speculation import History

WINDOWS = (3, 16, 48)  # an image has 4 tokens, the prompts have 23 to 39


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By window: the policies; the processor; prompts with one image, with two, and without."""
    policies = {}
    for window in WINDOWS:
        folder = tmp_path_factory.mktemp("gemma")
        write_family("gemma3", folder, text={"sliding_window": window})
        policies[window] = Policy(load_model(str(folder))).eval()
    processor = load_processor(str(folder))
    prompts = make_prompts(
        processor,
        make_sample(0, [(112, 60)]),
        make_sample(1, [(56, 84), (112, 56)], "Which one is larger?"),
        make_sample(2, [], "Detect every blue one in front of something red."),
    )
    return policies, processor, prompts


def _completions(prompts, lengths=(30, 1, 7)):
    generator = torch.Generator().manual_seed(0)
    return [[torch.randint(300, 500, (n,), generator=generator) for n in lengths] for _ in prompts]


def _rollout(policy, processor, **options):
    return NativeRollout(lambda: nullcontext(policy), processor.tokenizer, device=CPU, **options)


def test_the_windows_are_those_that_the_tests_mean(made):
    policies, _, prompts = made
    lengths = [len(prompt.input_ids) for prompt in prompts]
    assert max(lengths) < WINDOWS[2] < min(lengths) + 30 and WINDOWS[1] < min(lengths)
    inputs = collate(policies[3], prompts, _completions(prompts), True)
    blocks = [[end - first for first, end in group.blocks] for group in inputs.groups]
    assert blocks == [[4], [4, 4], []]
    # The last of so many tokens sees them all, and one more doesn't.
    config = policies[16].config.text_config
    assert windows(config, 16) == {} and set(windows(config, 17).values()) == {16}


@pytest.mark.parametrize("kind", ["two_part", "dense"])
@pytest.mark.parametrize("window", WINDOWS)
def test_logps_and_gradient_equal_the_unshared_ones(made, window, kind):
    policy, prompts = made[0][window], made[2]
    completions = _completions(prompts)
    logps, gradient = logps_and_gradient(policy, prompts, completions, packed=True, kind=kind)
    expected, unshared = logps_and_gradient(policy, prompts, completions, packed=False)
    assert (logps - expected).abs().max() <= 1e-5
    assert relative_error(gradient, unshared) <= 1e-5


@torch.no_grad()
def test_rows_of_one_completion_equal_transformers(made):
    policies, processor, prompts = made
    for policy in policies.values():
        completions = [group[:1] for group in _completions(prompts)]
        logps, _ = policy(collate(policy, prompts, completions, True))
        own = [
            _alone(policy.model, processor, prompt, group[0])
            for prompt, group in zip(prompts, completions, strict=True)
        ]
        assert (logps - torch.cat(own)).abs().max() <= 1e-5
    # A window that isn't applied would be seen.
    others = [
        policy(collate(policy, prompts, completions, True))[0] for policy in policies.values()
    ]
    assert (others[0] - others[1]).abs().max() > 1e-3 < (others[1] - others[2]).abs().max()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["two_part", "fused", "dense"])
def test_another_completion_changes_nothing_at_all(made, kind):
    policy, prompts = made[0][16], made[2]
    policy.prefix_attention = kind
    completions = _completions(prompts)
    expected = policy(collate(policy, prompts, completions, True))[0].split([30, 1, 7] * 3)
    completions[1][0] = completions[1][0] - 50
    found = policy(collate(policy, prompts, completions, True))[0].split([30, 1, 7] * 3)
    equal = [torch.equal(one, other) for one, other in zip(found, expected, strict=True)]
    assert equal == [n != 3 for n in range(9)]


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 1, 6, 30])
def test_every_core_sees_the_same(window):
    generator = torch.Generator().manual_seed(0)
    groups = [Group(0, 20, (9, 0, 14), ((0, 4), (5, 12))), Group(43, 8, (5,), ((1, 7),))]
    row = [torch.randn(1, heads, 56, 16, generator=generator) for heads in (4, 2, 2)]
    windows = {0: window} if window else {}
    expected, *others = (
        PackedAttention(groups, CPU, kind, windows)(0, *row, 0.3)
        for kind in ("two_part", "dense", "flex", "fused")
    )
    for out in others:
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_recomputed_layers_give_the_same(made):
    policy, prompts = copy.deepcopy(made[0][16]), made[2]
    completions = _completions(prompts)
    logps, gradient = logps_and_gradient(policy, prompts, completions, packed=True)
    checkpoint_layers(policy.model, offload=False)
    again, recomputed = logps_and_gradient(policy.train(), prompts, completions, packed=True)
    assert torch.equal(logps, again)
    assert all(torch.equal(gradient[name], recomputed[name]) for name in gradient)


def test_hf_rollouts_draw_the_same(made):
    policies, processor, prompts = made
    native, hf = (
        make_rollout(name, lambda: nullcontext(policies[16]), processor.tokenizer, device=CPU)
        for name in ("native", "hf")
    )
    out, expected = (one.generate(prompts, 2, Sampling(24, seed=1)) for one in (native, hf))
    assert out.texts == expected.texts


@torch.no_grad()
@pytest.mark.parametrize("window", WINDOWS)
def test_greedy_equals_generate(made, window):
    """In a batch of prompts of different lengths; then again, with guesses that are all right."""
    policies, processor, prompts = made
    policy, tokenizer = policies[window], processor.tokenizer
    rollout = _rollout(policy, processor, speculation=History())
    first, again = (rollout.generate(prompts, 2, Sampling(24, greedy=True)) for _ in range(2))
    assert rollout.stats.accepted > 0 and rollout.stats.passes < 23
    for number, prompt in enumerate(prompts):
        given = processor(
            text=[prompt.text], images=list(prompt.sample.images) or None, return_tensors="pt",
            add_special_tokens=False,
        )  # fmt: skip
        expected = policy.model.generate(
            **given, do_sample=False, max_new_tokens=24, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=banned_ids(policy.model, tokenizer),
        )[0, len(prompt.input_ids) :]  # fmt: skip
        for out in (first, again):
            for row in (2 * number, 2 * number + 1):
                found = out.completion_ids[row][out.completion_mask[row]]
                assert found.tolist() == expected.tolist()


@torch.no_grad()
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("guesses", [False, True])
def test_batches_that_shrink_draw_what_training_computes(monkeypatch, made, window, guesses):
    """About one token in 16 ends a completion, at different times."""
    policies, processor, prompts = made
    policy, sizes = policies[window], note_shrinks(monkeypatch)
    sampling = Sampling(40, seed=2, stop_token_ids=tuple(range(0, 1024, 16)))
    rollout = _rollout(policy, processor, speculation=History() if guesses else None)
    rollout.banned = lambda policy: []  # which training doesn't know of
    for _ in range(1 + guesses):
        out = rollout.generate(prompts, 4, sampling)
    assert len(sizes) > 1 and len(out.completion_mask.sum(1).unique()) > 4
    assert (rollout.stats.accepted > 0) == guesses
    rows = [ids[mask] for ids, mask in zip(out.completion_ids, out.completion_mask, strict=True)]
    groups = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    logps, _ = policy(collate(policy, prompts, groups, True))
    drawn = out.sampling_logps[out.completion_mask]
    assert (logps - drawn).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 12])
def test_observed_attention_is_that_of_a_packed_row(made, length):
    policies, processor, prompts = made
    policy, observer = policies[16], AttentionObserver(0)
    out = _rollout(policy, processor).generate(
        prompts, 1, Sampling(length, greedy=True), observer=observer
    )
    rows = [ids[mask] for ids, mask in zip(out.completion_ids, out.completion_mask, strict=True)]
    expected = attention_to_prompts(
        policy, collate(policy, prompts, [[row] for row in rows], True), 0
    )
    for found, own, prompt in zip(observer.attention, expected, prompts, strict=True):
        torch.testing.assert_close(found, own, rtol=0, atol=1e-6)
        assert not found[: len(prompt.input_ids) - 16].any() and found.any()
