"""Where sampler and trainer differ: two log-probs of a token, and the flags of the correction."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from helpers import CPU, largest_difference, make_state, parameters

from virft_fast.algorithms import grpo as grpo_module
from virft_fast.algorithms.grpo import train_step
from virft_fast.config import GRPOConfig
from virft_fast.models.policy import Policy
from virft_fast.models.qwen_vl import load_model
from virft_fast.rollout import Sampling
from virft_fast.rollout.hf import HFRollout
from virft_fast.rollout.native import NativeRollout
from virft_fast.rollout.speculation import History
from virft_fast.train import parse_args

FILTERS = [
    {"top_p": 0.7}, {"top_k": 3, "temperature": 1.3}, {"min_p": 0.2},
    {"repetition_penalty": 1.5}, {"top_p": 0.8, "top_k": 9, "repetition_penalty": 1.2},
]  # fmt: skip


@pytest.fixture(scope="module")
def policy():
    return Policy(load_model("tiny")).eval()


class Native(NativeRollout):
    def banned(self, policy):
        return []  # the policy's own distribution has all tokens


@pytest.mark.parametrize("how", ["native", "guessing", "hf"])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_plain_log_probs_are_the_policys(policy, processor, prompts, how, filters):
    sampling = Sampling(12, seed=3, **filters)
    weights, tokenizer = lambda: nullcontext(policy), processor.tokenizer
    if how == "hf":
        rollout = HFRollout(weights, tokenizer, device=CPU)
    else:
        history = History() if how == "guessing" else None
        rollout = Native(weights, tokenizer, device=CPU, speculation=history)
    for _ in range(2 if how == "guessing" else 1):  # the second from a full history
        out = rollout.generate(prompts, 2, sampling)
    assert out.plain_logps is not None and (out.plain_logps[~out.completion_mask] == 0).all()
    rows = [ids[mask] for ids, mask in zip(out.completion_ids, out.completion_mask, strict=True)]
    groups = [rows[i : i + 2] for i in range(0, len(rows), 2)]
    with torch.no_grad():
        inputs = policy.collate(prompts, groups, pad_token_id=0, device=CPU)
        logps, _ = policy(inputs, temperature=sampling.temperature)
    plain, drawn = out.plain_logps[out.completion_mask], out.sampling_logps[out.completion_mask]
    torch.testing.assert_close(plain, logps, rtol=0, atol=1e-4)
    assert (plain - drawn).abs().max() > 0.1
    if "repetition_penalty" not in filters:  # filters only leave tokens out
        assert (plain <= drawn + 1e-5).all()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"greedy": True, "top_k": 5}])
def test_without_filters_there_is_one_log_prob(policy, processor, prompts, options):
    rollout = NativeRollout(lambda: nullcontext(policy), processor.tokenizer, device=CPU)
    assert rollout.generate(prompts, 2, Sampling(5, **options)).plain_logps is None


@pytest.mark.parametrize(
    ("flags", "differs", "mode"),
    [
        ({}, False, None),
        ({}, True, "sequence_mask"),
        ({"importance_sampling_mode": "token_mask"}, True, "token_mask"),
        ({"importance_sampling_correction": False}, True, None),
        ({"importance_sampling_correction": True}, False, "sequence_mask"),
        ({"loss_type": "vespo"}, True, None),  # has weights of tokens only
        ({"loss_type": "vespo", "importance_sampling_mode": "token_mask"}, True, "token_mask"),
    ],
)
def test_the_correction_is_on_where_sampler_and_trainer_differ(flags, differs, mode):
    args = GRPOConfig(**flags).loss_args(differs)
    assert args.importance_sampling_mode == mode
    assert (args.importance_sampling_clip_max, args.importance_sampling_clip_min) == (3.0, None)


def test_trls_spellings_are_taken():
    argv = ["--vllm_importance_sampling_correction", "true", "--vllm_importance_sampling_mode",
            "token_mask", "--vllm_importance_sampling_clip_max", "2"]  # fmt: skip
    args = parse_args(argv).grpo.loss_args()
    assert (args.importance_sampling_mode, args.importance_sampling_clip_max) == ("token_mask", 2)


def test_limits_from_flags():
    flags = {"importance_sampling_clip_max": math.inf, "importance_sampling_clip_min": 0.5}
    args = GRPOConfig(importance_sampling_correction=True, **flags).loss_args()
    assert (args.importance_sampling_clip_max, args.importance_sampling_clip_min) == (math.inf, 0.5)
    with pytest.raises(ValueError, match="loss_type vespo, one of .'token_truncate', 'token_mask'"):
        GRPOConfig(importance_sampling_correction=True, loss_type="vespo")


def smooth_state(processor, **config):
    """AdamW's large epsilon keeps an update as continuous in its gradient as one of SGD."""
    config, settings = {"beta": 0.0, **config}, {"epsilon": 1.0, "learning_rate": 1.0}
    return make_state(processor, config=config, settings=settings, prompts_per_microbatch=4)


def flat_step(processor, prompts, **config):
    """Parameters and metrics after a step without KL term."""
    state = smooth_state(processor, **config)
    metrics, _ = train_step(state, prompts)
    return parameters(state.policy), metrics


def test_a_step_in_float32_is_as_without_the_correction(processor, prompts):
    """By default it is off there, bit for bit; asked for, it corrects what little differs: rounding
    and the control tokens that are never sampled."""
    before = parameters(smooth_state(processor).policy)
    (default, _), (off, _), (on, _) = (
        flat_step(processor, prompts, importance_sampling_correction=given)
        for given in (None, False, True)
    )
    assert largest_difference(default, off) == 0 < largest_difference(on, off)
    assert largest_difference(on, off) < 1e-3 * largest_difference(off, before)


def test_a_step_with_filters_weights_by_the_kept_mass(processor, prompts):
    """Without mismatch of the engines, a completion's weight is the mass that the filter kept: an
    update by hand with these weights is the same."""
    config = {"top_k": 4, "temperature": 1.5}
    truncated = {"importance_sampling_mode": "token_truncate"}
    on, metrics = flat_step(
        processor, prompts, importance_sampling_correction=True, **truncated, **config
    )
    off, _ = flat_step(processor, prompts, **config)
    assert 0 < metrics["sampling_kept_mass"] < 0.99 and largest_difference(on, off) > 1e-5
    assert metrics["sampling_logp_difference"] < 1e-4  # engines agree; the filter isn't counted
    state = smooth_state(processor, **config)
    forward = state.engine.forward

    def weighted(inputs, *, loss=None, **options):
        if loss is not None:
            loss = replace(loss, is_weights=weights[len(inputs.completion_ids)])
        return forward(inputs, loss=loss, **options)

    weights, made = {}, grpo_module.lay_out

    def noted(*args, **kwargs):
        microbatches = made(*args, **kwargs)
        for mb in microbatches:
            weights[len(mb.inputs.completion_ids)] = (mb.plain_logps - mb.sampling_logps).exp()
        return microbatches

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state.engine, "forward", weighted)
        patch.setattr(grpo_module, "lay_out", noted)
        train_step(state, prompts)
    assert largest_difference(parameters(state.policy), on) < 1e-5


@pytest.mark.parametrize(
    ("flags", "warns"),
    [
        ({}, False),
        ({"top_p": 0.9}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"top_p": 0.9, "importance_sampling_correction": True}, False),
    ],
)
def test_filters_without_correction_are_warned_of(processor, caplog, flags, warns):
    state = make_state(processor, config={"beta": 0.0, **flags})
    grpo_module.ALGORITHM.begin(None, state, None, resumed=False)
    assert ("--importance_sampling_correction weights" in caplog.text) == warns
