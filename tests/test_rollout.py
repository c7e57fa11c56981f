"""The transformers rollout draws from the policy's own distribution, reproducibly."""

from __future__ import annotations

import pytest
import torch
from helpers import CPU

from virft_fast.models.qwen_vl import Policy, core, load_model
from virft_fast.rollout import Sampling
from virft_fast.rollout.hf import HFRollout, _RowGumbel


@pytest.fixture(scope="module")
def rollout(processor):
    return HFRollout(Policy(load_model("tiny")), processor.tokenizer, device=CPU)


def test_greedy_equals_plain_generate(rollout, prompts, processor):
    ours = rollout.generate(prompts, 1, Sampling(12, greedy=True))
    model = rollout.policy.model.eval()
    for row, prompt in enumerate(prompts):
        images = {}
        if prompt.pixel_values is not None:
            images = {
                "pixel_values": prompt.pixel_values,
                "image_grid_thw": prompt.image_grid_thw,
                "mm_token_type_ids": prompt.mm_token_type_ids[None],
            }
        core(model).rope_deltas = None
        expected = model.generate(
            input_ids=prompt.input_ids[None],
            attention_mask=torch.ones_like(prompt.input_ids)[None],
            max_new_tokens=12,
            do_sample=False,
            suppress_tokens=rollout.banned,
            eos_token_id=processor.tokenizer.eos_token_id,
            pad_token_id=processor.tokenizer.pad_token_id,
            **images,
        )[0, len(prompt.input_ids) :]
        assert ours.completion_ids[row, : len(expected)].tolist() == expected.tolist()


def test_rows_are_drawn_alike_however_the_batch_is_split(rollout, prompts):
    sampling = Sampling(8, seed=3)
    whole = rollout.generate(prompts, 3, sampling)
    for part in range(len(prompts)):
        alone = rollout.generate(prompts[part : part + 1], 3, sampling, first_row=3 * part)
        assert alone.texts == whole.texts[3 * part : 3 * part + 3]


def test_seeds_and_rows_differ(rollout, prompts):
    first = rollout.generate(prompts[:1], 6, Sampling(8, seed=1))
    second = rollout.generate(prompts[:1], 6, Sampling(8, seed=2))
    assert first.texts != second.texts
    assert len(set(first.texts)) > 1


def test_mask_ends_with_eos_and_padding_follows(rollout, prompts, processor):
    out = rollout.generate(prompts, 4, Sampling(60, seed=0))
    eos, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    assert out.completion_mask.dtype == torch.bool
    for ids, mask, truncated in zip(
        out.completion_ids, out.completion_mask, out.truncated, strict=True
    ):
        length = int(mask.sum())
        assert mask[:length].all() and not mask[length:].any()
        assert (ids[length:] == pad).all()
        assert ((ids[:length] == eos).nonzero().flatten().tolist() == [length - 1]) != truncated


def test_no_banned_token_is_drawn_even_when_the_model_wants_it(processor, prompts):
    policy = Policy(load_model("tiny"))
    image_token = policy.config.image_token_id
    lm_head = policy.model.lm_head

    def prefer_image_tokens(module, args, logits):
        logits[..., image_token] = 1e4
        return logits

    handle = lm_head.register_forward_hook(prefer_image_tokens)
    try:
        out = HFRollout(policy, processor.tokenizer, device=CPU).generate(
            prompts, 2, Sampling(6, seed=0)
        )
    finally:
        handle.remove()
    assert image_token not in out.completion_ids


def test_b13_draws_follow_the_softmax():
    """20,000 draws of one row: each share within 5 standard errors of its probability."""
    scores = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    draw = _RowGumbel(seed=0, first_row=0, num_rows=1, device=CPU)
    n = 20_000
    counts = torch.bincount(
        torch.cat([draw(None, scores).argmax(-1) for _ in range(n)]), minlength=4
    )
    p = scores[0].softmax(-1)
    assert counts[3] == 0
    error = (counts / n - p).abs()
    assert (error <= 5 * (p * (1 - p) / n).sqrt() + 1e-12).all()


def test_top_k_one_is_greedy_and_temperature_flattens(rollout, prompts):
    greedy = rollout.generate(prompts, 2, Sampling(10, greedy=True))
    top1 = rollout.generate(prompts, 2, Sampling(10, top_k=1, seed=4))
    cold = rollout.generate(prompts, 2, Sampling(10, temperature=1e-4, seed=4))
    assert greedy.texts == top1.texts == cold.texts


def test_training_mode_is_given_back(rollout, prompts):
    rollout.policy.train()
    rollout.generate(prompts[:1], 2, Sampling(2))
    assert rollout.policy.training
