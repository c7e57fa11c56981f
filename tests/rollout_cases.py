"""Rollouts on the decoding kernels: test_rollout_kernels.py runs them with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from helpers import CPU, make_prompts, make_sample, note_shrinks
from models import FAMILIES, random_model
from test_rollout import banned_ids, plain_generate
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from virft_fast.kernels import (
    backend,
    triton_decode,
    triton_rows,
    triton_sampling,
    triton_speculation,
)
from virft_fast.models.processing import load_processor
from virft_fast.models.qwen_vl import Policy, load_model
from virft_fast.rollout import Sampling
from virft_fast.rollout import decoding as decoding_module
from virft_fast.rollout import graphs as graphs_module
from virft_fast.rollout.native import NativeRollout
from virft_fast.rollout.observers import AttentionObserver
from virft_fast.rollout.speculation import History

FILTERS = {"temperature": 1.4, "top_k": 60, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2}


@pytest.fixture(scope="module")
def processor():
    return load_processor("tiny")


@pytest.fixture(scope="module")
def prompts(processor):
    samples = make_sample(0), make_sample(1, [(56, 84), (84, 56)], "Detect."), make_sample(2, [])
    return make_prompts(processor, *samples)


@pytest.fixture(scope="module")
def policy():
    return Policy(load_model("tiny")).eval()


def rollout_of(policy, processor, **options):
    return NativeRollout(lambda: nullcontext(policy), processor.tokenizer, device=CPU, **options)


def on_torch(monkeypatch, run):
    """The result on the torch references."""
    with monkeypatch.context() as patch:
        patch.setattr(backend, "interpreted", lambda: False)
        return run()


def test_cases_are_interpreted():
    assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_plain_generate(family, processor, prompts):
    policy = Policy(random_model(family, processor.tokenizer)).eval()
    out = rollout_of(policy, processor).generate(prompts, 2, Sampling(10, greedy=True))
    banned = banned_ids(policy.model, processor.tokenizer)
    for row, (ids, mask) in enumerate(zip(out.completion_ids, out.completion_mask, strict=True)):
        prompt = prompts[row // 2]
        expected = plain_generate(policy.model, prompt, 10, banned, processor.tokenizer)
        assert ids[mask].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("length", "options"), [(14, {"temperature": 8.0}), (6, FILTERS)], ids=["plain", "filters"]
)
def test_drawn_tokens_equal_those_on_torch(
    monkeypatch, length, options, policy, processor, prompts
):
    """About one token in 4 ends a completion, so that the batch shrinks, with and without the
    graphs' rule: prompts keep their place, and any number of rows."""
    sampling = Sampling(length, seed=2, stop_token_ids=tuple(range(0, 1024, 4)), **options)

    class Eager:
        def __init__(self, run, pool, stream):
            self.replay = run.__self__._decode

    def run(**graphs):
        observer = AttentionObserver(1)
        rollout = rollout_of(policy, processor, **graphs)
        return rollout.generate(prompts, 4, sampling, observer=observer), observer.attention

    expected, attention = on_torch(monkeypatch, run)
    selected = note_shrinks(monkeypatch)
    monkeypatch.setattr(graphs_module, "capture_graph", Eager)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    for graphs in (False, True):
        selected.clear()
        out, observed = run(graphs=graphs)
        assert torch.equal(out.completion_ids, expected.completion_ids)
        torch.testing.assert_close(out.sampling_logps, expected.sampling_logps, rtol=0, atol=2e-5)
        for pair in zip(observed, attention, strict=True):
            torch.testing.assert_close(*pair, rtol=0, atol=1e-6)
        ragged = any(len(set(sizes)) > 1 for sizes in selected)
        assert selected and ragged == graphs


class Launches(TorchDispatchMode):
    """Counts torch's operations but those that only make a view or allocate memory."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, given = function.overloadpacket.__name__, tree_leaves((args, kwargs))
        memory = {t.untyped_storage().data_ptr() for t in given if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        views = all(t.untyped_storage().data_ptr() in memory for t in tree_leaves(out))
        writes = name.endswith("_") or "out" in (kwargs or {})
        self.counts[name] += writes or not (views or name.startswith("empty"))
        return out


def test_guesses_on_the_kernels_change_no_token(monkeypatch, policy, processor, prompts):
    """Of a history that is the answer, with any number of rows of a prompt, as in graphs."""
    sampling, prompts = Sampling(12, seed=4, **FILTERS), prompts[1:]

    def run(history, **options):
        rollout = rollout_of(policy, processor, speculation=history, **options)
        return rollout.generate(prompts, 2, sampling), rollout.stats

    class Eager:
        def __init__(self, run, pool, stream):
            self.replay = run.__self__._decode

    monkeypatch.setattr(graphs_module, "capture_graph", Eager)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    history = History()
    expected, _ = on_torch(monkeypatch, lambda: run(history))
    history.agreement[:] = 0.8
    out, stats = run(history, graphs=True)
    assert torch.equal(out.completion_ids, expected.completion_ids)
    torch.testing.assert_close(out.sampling_logps, expected.sampling_logps, rtol=0, atol=2e-5)
    assert stats.passes <= 6 and stats.accepted == stats.guessed > 10


@pytest.mark.parametrize("options", [{}, FILTERS, {"greedy": True}], ids=["plain", "filters", "1"])
@pytest.mark.parametrize(
    ("family", "read"), [*((family, None) for family in FAMILIES), ("qwen3_vl", 1), ("qwen3_vl", 4)]
)
def test_one_step_has_few_launches(monkeypatch, family, options, read, processor, prompts):
    """At most 12 a layer and 6, torch's operations counted too, and guesses of the next tokens.
    Where filters apply, two more compute and store the log-prob under temperature alone; of several
    tokens, two more find their places."""
    policy = Policy(random_model(family, processor.tokenizer)).eval()
    launches = Launches()

    class Counted:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.counts.update([self.name])

    def zeros(shape, dtype, device):
        with _disable_current_modes():
            return torch.zeros(shape, dtype=dtype, device=device)

    decode = decoding_module.Decoding._decode

    def counting(self):
        with monkeypatch.context() as patch, launches:
            for module in (triton_decode, triton_rows, triton_sampling, triton_speculation):
                for name in [name for name in vars(module) if name.endswith("_kernel")]:
                    patch.setattr(module, name, Counted(name))
            patch.setattr(triton_sampling, "_empty", zeros)  # tokens of the vocabulary
            self.read = read or 1
            decode(self)
        raise StopIteration

    monkeypatch.setattr(decoding_module.Decoding, "_decode", counting)
    with pytest.raises(StopIteration):
        history = None if read is None else History()
        rollout = rollout_of(policy, processor, speculation=history)
        rollout.generate(prompts, 2, Sampling(4, seed=0, **options))
    layers = policy.config.text_config.num_hidden_layers
    counts = +launches.counts  # without those that launch nothing
    attention = ("rotate_kernel", "prompt_attention_kernel", "own_attention_kernel")
    assert all(counts[name] == layers for name in (*attention, "silu_mul_kernel"))
    assert counts["add_rms_norm_kernel"] == 2 * layers + 1
    assert (counts["linear"], counts["mm"]) == (4 * layers, 1)  # the layers' and the head's
    if read is not None:
        assert (counts["keep_kernel"], counts["guess_kernel"]) == (1, 1)
    more = (options == FILTERS) * (2 if read in (None, 1) else 4)
    assert counts.total() <= 12 * layers + 6 + more, counts
