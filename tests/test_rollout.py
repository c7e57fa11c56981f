"""Both rollouts draw from the policy's own distribution, reproducibly, and draw the same."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import replace
from typing import ClassVar
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from helpers import CPU, make_prompts, make_sample, note_shrinks
from models import FAMILIES, random_model

from virft_fast.kernels.sampling import uniform
from virft_fast.models.decode_step import DecodeStep
from virft_fast.models.image_attention import attention_to_prompts
from virft_fast.models.qwen_vl import Policy, core, load_model
from virft_fast.rollout import Sampling
from virft_fast.rollout import decoding as decoding_module
from virft_fast.rollout import graphs as graphs_module
from virft_fast.rollout.backends import make_rollout
from virft_fast.rollout.cache import Buffers, CachePlan, cache_numbers
from virft_fast.rollout.hf import HFRollout
from virft_fast.rollout.native import NativeRollout
from virft_fast.rollout.observers import AttentionObserver
from virft_fast.rollout.sampling import Sampler
from virft_fast.rollout.shrinking import kept_rectangle, kept_rows

EVERYTHING = Sampling(
    24, temperature=1.4, top_k=60, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=3
)


def rollout_of(backend, policy, tokenizer, **options):
    return make_rollout(backend, lambda: nullcontext(policy), tokenizer, device=CPU, **options)


@pytest.fixture(scope="module")
def policy():
    return Policy(load_model("tiny"))


@pytest.fixture(scope="module", params=["native", "hf"])
def rollout(request, policy, processor):
    return rollout_of(request.param, policy, processor.tokenizer)


@pytest.fixture(scope="module")
def native(policy, processor):
    return rollout_of("native", policy, processor.tokenizer)


def plain_generate(model, prompt, length, banned, tokenizer):
    """transformers' own greedy answer to one prompt."""
    images = {}
    if prompt.pixel_values is not None:
        images = {
            "pixel_values": prompt.pixel_values,
            "image_grid_thw": prompt.image_grid_thw,
            "mm_token_type_ids": prompt.mm_token_type_ids[None],
        }
    core(model).rope_deltas = None
    return model.generate(
        input_ids=prompt.input_ids[None],
        attention_mask=torch.ones_like(prompt.input_ids)[None],
        max_new_tokens=length,
        do_sample=False,
        suppress_tokens=banned,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **images,
    )[0, len(prompt.input_ids) :]


def banned_ids(model, tokenizer):
    from virft_fast.models.qwen_vl import banned_token_ids

    return banned_token_ids(tokenizer, model.config.text_config.vocab_size)


@pytest.mark.parametrize("greedy", [True, False])
def test_banned_tokens_are_never_drawn(greedy):
    logits = torch.full((50, 7), -4.0)
    logits[:, 3] = 20.0
    sampler = Sampler(
        Sampling(1, greedy=greedy), vocab_size=7, banned=[3], first_row=0, prompts=[None] * 50,
        device=CPU,
    )  # fmt: skip
    tokens, logps, _ = sampler(logits, torch.tensor(0))
    assert 3 not in tokens
    torch.testing.assert_close(logps, -torch.tensor(6.0).log().expand(50))


def test_greedy_equals_plain_generate(rollout, policy, prompts, processor):
    ours = rollout.generate(prompts, 1, Sampling(12, greedy=True))
    model = policy.model.eval()
    banned = banned_ids(model, processor.tokenizer)
    for row, prompt in enumerate(prompts):
        expected = plain_generate(model, prompt, 12, banned, processor.tokenizer)
        assert ours.completion_ids[row][ours.completion_mask[row]].tolist() == expected.tolist()


@pytest.fixture(scope="module")
def many_prompts(processor):
    """64 prompts: none, one, two or three images of different sizes, texts of different lengths."""
    shapes = [[], [(112, 112)], [(56, 84), (112, 56)], [(84, 84)], [(56, 56), (84, 56), (56, 112)]]
    return make_prompts(
        processor,
        *(
            make_sample(i, shapes[i % len(shapes)], "Detect every red. " * (1 + i % 7))
            for i in range(64)
        ),
    )


def test_greedy_equals_plain_generate_on_64_prompts(native, policy, processor, many_prompts):
    """Completions end at different times, so the batch shrinks on the way."""
    out = native.generate(many_prompts, 1, Sampling(48, greedy=True))
    lengths = out.completion_mask.sum(1)
    assert len(lengths.unique()) > 5
    model = policy.model.eval()
    banned = banned_ids(model, processor.tokenizer)
    for row, prompt in enumerate(many_prompts):
        expected = plain_generate(model, prompt, 48, banned, processor.tokenizer)
        assert out.completion_ids[row][out.completion_mask[row]].tolist() == expected.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_plain_generate_in_every_family(family, processor, prompts):
    policy = Policy(random_model(family, processor.tokenizer)).eval()
    out = rollout_of("native", policy, processor.tokenizer).generate(
        prompts, 1, Sampling(16, greedy=True)
    )
    banned = banned_ids(policy.model, processor.tokenizer)
    for row, prompt in enumerate(prompts):
        expected = plain_generate(policy.model, prompt, 16, banned, processor.tokenizer)
        assert out.completion_ids[row][out.completion_mask[row]].tolist() == expected.tolist()


@pytest.mark.parametrize("sampling", [Sampling(40, seed=1), EVERYTHING])
def test_both_backends_draw_the_same(policy, processor, prompts, sampling):
    ours, oracle = (
        rollout_of(name, policy, processor.tokenizer).generate(prompts, 5, sampling, first_row=7)
        for name in ("native", "hf")
    )
    assert torch.equal(ours.completion_ids, oracle.completion_ids)
    assert torch.equal(ours.completion_mask, oracle.completion_mask)
    assert torch.equal(ours.truncated, oracle.truncated)
    torch.testing.assert_close(ours.sampling_logps, oracle.sampling_logps, rtol=0, atol=2e-5)


def test_same_seed_same_rows_and_batches_can_be_split(rollout, prompts):
    """What a row draws depends on its number in the global batch, not on its batch."""
    sampling = Sampling(10, seed=3)
    whole = rollout.generate(prompts, 3, sampling)
    again = rollout.generate(prompts, 3, sampling)
    parts = [
        rollout.generate(prompts[:2], 3, sampling, first_row=0),
        rollout.generate(prompts[2:], 3, sampling, first_row=6),
    ]
    assert whole.texts == again.texts == parts[0].texts + parts[1].texts
    assert len(set(whole.texts)) > 3


def test_rows_of_several_groups_that_shrink_stay_apart(monkeypatch, native, policy, prompts):
    """About one token in 16 ends a completion: most rows end early, in every group."""
    sampling = Sampling(40, temperature=8.0, seed=2, stop_token_ids=tuple(range(0, 1024, 16)))
    sizes = note_shrinks(monkeypatch)
    together = native.generate(prompts, 8, sampling)
    assert any(len(rows) > 1 and rows[0] < 8 for rows in sizes), sizes
    alone = [native.generate([p], 8, sampling, first_row=8 * i) for i, p in enumerate(prompts)]
    completions = [
        [ids[mask].tolist() for ids, mask in zip(r.completion_ids, r.completion_mask, strict=True)]
        for r in (together, *alone)
    ]
    assert completions[0] == sum(completions[1:], [])


def test_prompts_that_fill_the_cache_are_decoded_in_turn(policy, processor, prompts, native):
    """A limit on the cache changes when things are computed, not what."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    # A place of 32 tokens for a completion of 20.
    small = rollout_of("native", policy, processor.tokenizer, max_cache_tokens=longest + 3 * 32)
    sampling = Sampling(20, seed=5)
    batches = small._batches(small.max_cache_tokens, prompts, 3, sampling)
    assert list(batches) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    observers = AttentionObserver(1), AttentionObserver(1)
    expected, out = (
        r.generate(prompts, 3, sampling, observer=observer)
        for r, observer in zip((native, small), observers, strict=True)
    )
    assert out.texts == expected.texts
    for pair in zip(*(observer.attention for observer in observers), strict=True):
        torch.testing.assert_close(*pair, rtol=0, atol=1e-6)


def test_prompt_that_does_not_fit_is_named_before_anything_runs(policy, processor, prompts):
    small = rollout_of("native", policy, processor.tokenizer, max_cache_tokens=40)
    calls = []
    handle = core(policy.model).visual.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(ValueError, match=r"row 0 .*at most 40.*max_completion_length"):
            small.generate(prompts, 3, Sampling(20, seed=5))
    finally:
        handle.remove()
    assert not calls


def test_long_prompts_are_read_in_several_calls(monkeypatch, native, prompts):
    sampling = Sampling(16, seed=2)
    expected = native.generate(prompts, 2, sampling)
    monkeypatch.setitem(decoding_module.PREFILL_TOKENS, "cpu", 1)
    out = native.generate(prompts, 2, sampling)
    assert out.texts == expected.texts
    torch.testing.assert_close(out.sampling_logps, expected.sampling_logps, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["native", "hf"])
@pytest.mark.parametrize(
    "images", [(0, 1, 0, 2, 1), (0, 0), (1,)], ids=["mixed", "text alone", "one image"]
)
def test_features_of_a_frozen_tower_are_each_prompts_own(monkeypatch, processor, backend, images):
    model = load_model("tiny")
    core(model).visual.requires_grad_(False)
    policy = Policy(model)
    samples = [make_sample(i, ((56, 84),) * count) for i, count in enumerate(images)]
    prompts = make_prompts(processor, *samples)
    monkeypatch.setitem(decoding_module.PREFILL_TOKENS, "cpu", 1)  # a call for each prompt
    rollout = rollout_of(backend, policy, processor.tokenizer)
    found = rollout.generate(prompts, 2, Sampling(4, seed=1)).image_features
    assert [len(features) for features in found] == [6 * count for count in images]
    for prompt, features in zip(prompts, found, strict=True):
        if prompt.pixel_values is not None:
            inputs = policy.collate([prompt], [[]], pad_token_id=0, device=CPU)
            torch.testing.assert_close(features, policy.image_features(inputs), rtol=0, atol=1e-5)
    core(model).visual.requires_grad_(True)
    trained = rollout_of(backend, Policy(model), processor.tokenizer)
    assert trained.generate(prompts, 2, Sampling(4, seed=1)).image_features is None


class Recorded:
    """What a CUDA graph is to the engine: the operations of one step on the tensors of that moment,
    whatever the engine has turned to since."""

    made: ClassVar[list[Recorded]] = []

    def __init__(self, run, pool, stream):
        run()  # the warm-up
        decoding = copy.copy(run.__self__)
        decoding.observer = copy.copy(decoding.observer)
        decoding.sampler = copy.copy(decoding.sampler)
        decoding.read_tokens = copy.copy(decoding.read_tokens)
        self.run = decoding._decode
        self.pool, self.replays = pool, 0
        state = decoding.state
        tensors = [state.tokens, state.drawn, state.first_rows]
        tensors += decoding.read_tokens.rotation or ()
        tensors += [part for cache in state.caches.values() for part in vars(cache).values()]
        self.addresses = [(tuple(t.shape), t.data_ptr()) for t in tensors]
        self.made.append(self)

    def replay(self):
        self.replays += 1
        self.run()


@pytest.fixture
def graphs(monkeypatch):
    """Graphs that were recorded, on the CPU."""
    pools = itertools.count()
    monkeypatch.setattr(Recorded, "made", [])
    monkeypatch.setattr(graphs_module, "capture_graph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    return Recorded.made


def test_replayed_graphs_give_what_the_steps_give(graphs, native, policy, processor, prompts):
    """Buffers and graphs are used again, for other prompts, numbers of rows and seeds: what a graph
    depends on must be in its key or stay where it is."""
    rollout = NativeRollout(
        lambda: nullcontext(policy), processor.tokenizer, device=CPU, graphs=True
    )
    penalty = {"repetition_penalty": 1.2}
    calls = [
        (prompts, 8, 70, penalty),  # all later ones find room in its memory, so nothing moves
        (prompts[:1], 6, 64, {}), (prompts[2:3], 6, 64, {}),
        (prompts[:2], 1, 64, {}), (prompts[:1], 2, 64, {}), (prompts[:1], 1, 64, {}),
        (prompts, 6, 64, {}), (prompts[:1], 6, 64, penalty), (prompts, 6, 64, penalty),
    ]  # fmt: skip
    for number, (some, count, length, options) in enumerate(calls):
        for seed in (number, 100 + number):
            sampling = Sampling(length, seed=seed, **options)
            layer = (1, None, 0)[number % 3]
            one, other = (None if layer is None else AttentionObserver(layer) for _ in range(2))
            out = rollout.generate(some, count, sampling, observer=one)
            expected = native.generate(some, count, sampling, observer=other)
            assert torch.equal(out.completion_ids, expected.completion_ids)
            assert torch.equal(out.sampling_logps, expected.sampling_logps)
            if layer is not None:
                assert len(one.attention) == len(some) * count
                assert all(map(torch.equal, one.attention, other.attention))
    assert sum(graph.replays for graph in graphs) > 3 * len(graphs)


def test_replayed_graph_knows_positions_past_those_of_its_recording(
    graphs, policy, processor, prompts
):
    """A prompt of text as long as one with an image has further positions in the same graph."""

    class Endless(NativeRollout):
        def banned(self, policy):
            return [*super().banned(policy), self.tokenizer.eos_token_id]

    text = text_prompt(processor, len(prompts[0].input_ids))
    plain, rollout = (
        Endless(lambda: nullcontext(policy), processor.tokenizer, device=CPU, graphs=graphs_)
        for graphs_ in (False, True)
    )
    sampling = Sampling(64, seed=1)
    rollout.generate(prompts, 2, Sampling(96))  # later ones find room in its memory
    rollout.generate(prompts[:1], 2, sampling)
    recorded = len(graphs)
    out, expected = (r.generate([text], 2, sampling) for r in (rollout, plain))
    assert torch.equal(out.completion_ids, expected.completion_ids)
    assert len(graphs) == recorded


def text_prompt(processor, length):
    """A prompt of so many tokens, all of them text."""
    for words in range(1, length):
        (prompt,) = make_prompts(processor, make_sample(9, [], "Detect" + " red" * words))
        if len(prompt.input_ids) == length:
            return prompt
    raise AssertionError(length)


def test_graphs_are_found_again_and_forgotten_when_memory_moves(graphs, policy, processor, prompts):
    rollout = NativeRollout(
        lambda: nullcontext(policy), processor.tokenizer, device=CPU, graphs=True
    )
    sampling = Sampling(40, seed=1, min_p=0.0)
    rollout.generate(prompts, 4, sampling)
    first = len(graphs)
    assert first > 1 and {graph.pool for graph in graphs} == {0}
    rollout.generate(prompts, 4, sampling)
    assert len(graphs) == first
    # Fewer rows at the front of the same memory: new graphs beside the old ones, in their pool.
    rollout.generate(prompts, 2, sampling)
    fewer = len(graphs)
    assert fewer > first and {graph.pool for graph in graphs} == {0}
    rollout.generate(prompts, 4, sampling)
    assert len(graphs) == fewer
    # More rows need other memory: all begins anew, with a pool of its own.
    rollout.generate(prompts, 6, sampling)
    assert len(graphs) > fewer and {graph.pool for graph in graphs[fewer:]} == {1}
    assert set(rollout._buffers.graphs._graphs.values()) == set(graphs[fewer:])
    memory = {flat.data_ptr() for flat in rollout._buffers._flat.values()}
    assert all(g.addresses[-1][1] not in memory for g in graphs[:fewer])
    assert all(address in memory for g in graphs[fewer:] for _, address in g.addresses)


def test_the_least_recently_used_graph_is_evicted(
    graphs, monkeypatch, native, policy, processor, prompts
):
    monkeypatch.setattr(graphs_module, "MAX_GRAPHS", 2)
    rollout = NativeRollout(
        lambda: nullcontext(policy), processor.tokenizer, device=CPU, graphs=True
    )
    sampling = Sampling(70, seed=1)
    out, expected = (r.generate(prompts, 6, sampling) for r in (rollout, native))
    assert out.texts == expected.texts
    assert len(graphs) > 2 == len(rollout._buffers.graphs)
    assert list(rollout._buffers.graphs._graphs.values()) == graphs[-2:]
    assert {graph.pool for graph in graphs} == {0}


def test_a_capture_that_fails_is_told_once_and_changes_nothing(
    monkeypatch, caplog, native, policy, processor, prompts
):
    calls = []

    def refuse(run, pool, stream):
        run()  # the warm-up changes the state before the failure
        calls.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs_module, "capture_graph", refuse)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    rollout = NativeRollout(
        lambda: nullcontext(policy), processor.tokenizer, device=CPU, graphs=True
    )
    for seed in (1, 2):
        sampling = Sampling(40, seed=seed, repetition_penalty=1.2)
        out, expected = (r.generate(prompts, 3, sampling) for r in (rollout, native))
        assert torch.equal(out.completion_ids, expected.completion_ids)
        assert torch.equal(out.sampling_logps, expected.sampling_logps)
    assert calls == [1]
    assert [r.getMessage() for r in caplog.records if "not permitted" in r.getMessage()] != []
    assert len(caplog.records) == 1


def test_a_capture_allows_other_threads_to_pin_memory(monkeypatch):
    """As the thread that reads ahead does. In CUDA's default mode, either of the two would fail."""
    stream, modes = MagicMock(), []
    monkeypatch.setattr(torch, "cuda", MagicMock())

    def capture(graph, **options):
        modes.append(options["capture_error_mode"])
        return nullcontext()

    torch.cuda.graph = capture
    graphs_module.capture_graph(lambda: None, 0, stream)
    assert modes == ["thread_local"]


class Stream:
    """What `capture_graph` needs of a CUDA stream."""

    device, device_index = torch.device("cuda", 0), 0

    def wait_stream(self, other):
        self.waited_for = other


@pytest.mark.parametrize("ended", [False, True], ids=["while it runs", "when it ends"])
def test_a_failed_capture_leaves_stream_and_allocator_as_they_were(monkeypatch, ended):
    """torch's own context raises when a failed capture ends, and then leaves both as they are."""
    default, side = Stream(), Stream()
    current, underway = [default], []

    class Graph:
        def __init__(self, graph, pool, **options):
            self.pool = pool

        def __enter__(self):
            current[0] = side
            underway.append(self.pool)

        def __exit__(self, *error):
            if ended and not error[0]:
                underway.remove(self.pool)
            raise RuntimeError("the capture is invalid")

    def end(device, pool):
        if pool not in underway:
            raise RuntimeError("not recording to this pool")
        underway.remove(pool)

    released = []
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[0])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(
        torch._C, "_cuda_releasePool", lambda *place: released.append(place), raising=False
    )
    calls = []

    def step():
        calls.append(1)
        if len(calls) == 2 and not ended:
            raise ValueError("the step's own error")

    with pytest.raises(RuntimeError, match="the capture is invalid"):
        graphs_module.capture_graph(step, 7, side)
    assert (current, underway) == ([default], []) and default.waited_for is side
    assert released == ([] if ended else [(0, 7)])


@pytest.mark.parametrize("part", ["_parameters", "_buffers"])
def test_graphs_are_captured_again_for_weights_that_moved(graphs, policy, processor, prompts, part):
    """Or buffers: transformers' layers read the rotation's frequencies there."""
    policy = copy.deepcopy(policy)
    rollout = NativeRollout(
        lambda: nullcontext(policy), processor.tokenizer, device=CPU, graphs=True
    )
    sampling = Sampling(20, seed=1)
    expected = rollout.generate(prompts, 2, sampling)
    before = len(graphs)
    for module in policy.modules():
        vars(module)[part] = copy.deepcopy(vars(module)[part])
    out = rollout.generate(prompts, 2, sampling)
    assert torch.equal(out.completion_ids, expected.completion_ids)
    assert len(graphs) == 2 * before
    rollout.generate(prompts, 2, sampling)
    assert len(graphs) == 2 * before


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_rotations_that_the_kernels_do_not_know(graphs, processor, prompts, kind):
    """transformers' layers read the tokens. A graph can't follow a rotation that depends on the
    length."""
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    model = random_model("qwen2_vl", processor.tokenizer, rope_parameters=rope)
    policy = Policy(model).eval()
    rollout = NativeRollout(
        lambda: nullcontext(policy), processor.tokenizer, device=CPU, graphs=True
    )
    assert not DecodeStep(core(model).language_model).supported
    out = rollout.generate(prompts, 2, Sampling(16, greedy=True))
    assert bool(graphs) == (kind == "linear")
    banned = banned_ids(model, processor.tokenizer)
    for row, (ids, mask) in enumerate(zip(out.completion_ids, out.completion_mask, strict=True)):
        expected = plain_generate(model, prompts[row // 2], 16, banned, processor.tokenizer)
        assert ids[mask].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("prompts_a_rollout", "count", "length", "mean"), [(2, 8, 1024, 300), (8, 8, 256, 120)]
)
def test_a_run_captures_few_graphs(prompts_a_rollout, count, length, mean):
    """200 rollouts with log-normal lengths of completions, and prompts of 300 to 900 tokens."""
    rng = np.random.default_rng(0)
    graphs, memory, moves, captures = OrderedDict(), 0, 0, 0
    for _ in range(200):
        longest = int(rng.integers(300, 900, size=prompts_a_rollout).max())
        plan = CachePlan.rounded(prompts_a_rollout, count, longest, length, "cuda")
        if plan.groups * plan.prompt_length > memory:
            memory = plan.groups * plan.prompt_length
            moves += bool(graphs)
            graphs.clear()
        drawn = np.exp(rng.normal(np.log(mean) - 0.125, 0.5, size=prompts_a_rollout * count))
        rows, sizes = drawn.astype(int).clip(4, length), [count] * prompts_a_rollout
        for used in range(length - 1):
            if used % decoding_module.CHECK_EVERY["cuda"] == 0:
                active = (rows > used + 1).tolist()
                if not any(active):
                    break
                if kept := kept_rows(active, sizes):
                    rows, sizes = rows[kept.rows], kept.sizes
            key = (len(rows), plan.prompt_length)
            if key not in graphs:
                captures += 1
                if len(graphs) >= graphs_module.MAX_GRAPHS:
                    graphs.popitem(last=False)
            graphs[key] = None
            graphs.move_to_end(key)
    assert 0 < captures < 60 and not moves


def test_memory_of_a_rollout_is_free_for_training(native, prompts):
    native.generate(prompts, 4, Sampling(10, seed=1))
    assert native._buffers.num_bytes() == 0


def test_plan_is_what_is_allocated(monkeypatch, policy, processor, prompts):
    """The one number that batches, the check at the start and --dry_run go by."""
    taken = {}
    take = Buffers.take

    def noted(self, name, shape, dtype):
        taken[name] = torch.Size(shape).numel()
        return take(self, name, shape, dtype)

    monkeypatch.setattr(Buffers, "take", noted)
    rollout = rollout_of("native", policy, processor.tokenizer)
    sampling = Sampling(10, seed=1)
    rollout.generate(prompts, 3, sampling)
    names = ("prompt_keys", "prompt_values", "keys", "values")
    allocated = sum(n for name, n in taken.items() if name.rstrip("0123456789") in names)
    text = policy.config.text_config
    assert allocated == cache_numbers(text) * rollout._plan(prompts, 3, sampling).num_tokens


@pytest.mark.parametrize(
    ("device", "prompt", "completion", "expected"),
    [
        ("cpu", 501, 64, (501, 64)), ("cpu", 501, 65, (501, 80)), ("cuda", 1, 1, (1024, 128)),
        ("cuda", 513, 129, (1024, 256)), ("cuda", 1024, 256, (1024, 256)),
        ("cuda", 1025, 256, (1536, 256)), ("cuda", 1537, 256, (2048, 256)),
    ],
)  # fmt: skip
def test_plan_rounds_up(device, prompt, completion, expected):
    plan = CachePlan.rounded(3, 4, prompt, completion, device)
    assert (plan.prompt_length, plan.completion_length) == expected
    assert plan.num_tokens == 3 * (expected[0] + 4 * expected[1])


def test_prompts_have_few_lengths_on_cuda():
    lengths = [CachePlan.rounded(1, 1, n, 1, "cuda").prompt_length for n in range(1, 4097)]
    assert set(lengths) == {1024, 1536, 2048, 3072, 4096}
    assert all(0 <= p - n < max(1024, n / 2) for n, p in enumerate(lengths, 1))


def test_prompts_are_padded_less_if_the_cache_would_overflow():
    needed = 640 + 8 * 256
    plans = [CachePlan.rounded(1, 8, 600, 256, "cuda", n) for n in (needed, needed + 384)]
    assert [plan.prompt_length for plan in plans] == [640, 1024]
    assert all(plan.num_tokens <= needed + 384 for plan in plans)


def test_rows_that_stay():
    """Of 3 prompts with 4, 1 and 3 rows, 5 of 8 rows are active: 6 stay, sorted by prompt."""
    yes, no = True, False
    active = [no, yes, no, yes, no, yes, yes, yes]
    kept = kept_rows(active, [4, 1, 3])
    assert (kept.rows, kept.sizes, kept.prompts) == ([0, 1, 3, 5, 6, 7], [3, 0, 3], None)
    assert kept_rows([yes] * 7 + [no], [4, 1, 3]) is None
    # As a rectangle of 4 prompts with 2 rows: prompts 1 and 3 have one active row each.
    active = [no, no, no, yes, no, no, yes, no]
    kept = kept_rectangle(active, [2] * 4)
    assert (kept.rows, kept.sizes, kept.prompts) == ([3, 6], [1, 1], [1, 3])
    assert kept_rectangle([yes, no] * 3 + [yes, yes], [2] * 4) is None


@pytest.mark.parametrize("temperature", [1.0, 1.3])  # below 1 the noise of fp32 logits grows
def test_sampling_logps_are_the_training_logps(native, policy, processor, prompts, temperature):
    """With nothing filtered and nothing banned, rollout and training speak of one distribution."""
    sampling = Sampling(30, seed=4, temperature=temperature)
    out = rollout_without_bans(policy, processor.tokenizer).generate(prompts, 4, sampling)
    rows = [ids[mask] for ids, mask in zip(out.completion_ids, out.completion_mask, strict=True)]
    groups = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    with torch.no_grad():
        inputs = policy.collate(prompts, groups, pad_token_id=0, device=CPU)
        logps, _ = policy(inputs, temperature=temperature)
    difference = (logps - out.sampling_logps[out.completion_mask]).abs().max()
    assert difference <= 1e-5


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16_decoding_is_as_close_to_fp32_as_the_forward_pass(policy, processor, prompts, how):
    """Against float32 of the same weights: the noise that bf16 puts into a plain forward pass over
    the same tokens is the measure."""
    narrow = copy.deepcopy(policy).eval()
    context = nullcontext
    if how == "weights":
        narrow.bfloat16()
    else:
        context = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    wide = copy.deepcopy(narrow).float()
    with context():
        rollout = rollout_without_bans(narrow, processor.tokenizer)
        out = rollout.generate(prompts, 8, Sampling(40, seed=6))
    rows = [ids[mask] for ids, mask in zip(out.completion_ids, out.completion_mask, strict=True)]
    groups = [rows[i : i + 8] for i in range(0, len(rows), 8)]
    inputs = policy.collate(prompts, groups, pad_token_id=0, device=CPU, packed=False)
    with torch.no_grad():
        exact, _ = wide(inputs)
        with context():
            plain, _ = narrow(inputs)
    ours = (out.sampling_logps[out.completion_mask] - exact).abs()
    noise = (plain.float() - exact).abs()
    assert len(ours) > 300 and 0 < ours.mean() <= 1.25 * noise.mean()
    assert ours.max() <= 2 * noise.max()


def rollout_without_bans(policy, tokenizer):
    class Open(NativeRollout):
        def banned(self, policy):
            return []

    return Open(lambda: nullcontext(policy), tokenizer, device=CPU)


def test_seeds_and_rows_differ(rollout, prompts):
    first = rollout.generate(prompts[:1], 6, Sampling(8, seed=1))
    second = rollout.generate(prompts[:1], 6, Sampling(8, seed=2))
    assert first.texts != second.texts
    assert len(set(first.texts)) > 1


def test_mask_ends_with_eos_and_padding_follows(rollout, prompts, processor):
    out = rollout.generate(prompts, 4, Sampling(60, seed=0))
    eos, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    assert out.completion_mask.dtype == torch.bool
    for ids, mask, truncated, logps in zip(
        out.completion_ids, out.completion_mask, out.truncated, out.sampling_logps, strict=True
    ):
        length = int(mask.sum())
        assert mask[:length].all() and not mask[length:].any()
        assert (ids[length:] == pad).all() and (logps[length:] == 0).all()
        assert (logps[:length] < 0).all()
        assert ((ids[:length] == eos).nonzero().flatten().tolist() == [length - 1]) != truncated


def test_further_stop_ids_end_a_completion(rollout, prompts, processor):
    word = processor.tokenizer.convert_tokens_to_ids("</think>")
    plain = rollout.generate(prompts, 2, Sampling(40, greedy=True))
    out = rollout.generate(prompts, 2, Sampling(40, greedy=True, stop_token_ids=(word,)))
    assert any(word in ids for ids in plain.completion_ids)
    for ids, mask, long in zip(
        out.completion_ids, out.completion_mask, plain.completion_ids, strict=True
    ):
        own = ids[mask].tolist()
        assert own == long[: len(own)].tolist()
        assert word not in own[:-1]


@pytest.mark.parametrize(
    ("layer", "dtype"), [(0, torch.float32), (1, torch.float32), (1, torch.float64)]
)
def test_observed_attention_is_that_of_a_second_reading(prompts, layer, dtype, processor):
    """Of completions that end at different times, one token long too, in groups of one and three;
    what is drawn does not change."""
    policy = Policy(load_model("tiny", dtype=dtype)).eval()
    native = rollout_of("native", policy, processor.tokenizer)
    sampling = Sampling(24, temperature=1.3, seed=1)
    for num_generations, length in ((1, 24), (3, 24), (3, 1)):
        asked = replace(sampling, max_completion_length=length)
        observer = AttentionObserver(layer)
        out = native.generate(prompts, num_generations, asked, observer=observer)
        plain = native.generate(prompts, num_generations, asked)
        assert torch.equal(out.completion_ids, plain.completion_ids)
        lengths = out.completion_mask.sum(1).tolist()
        assert length == 1 or len(set(lengths)) > 1
        assert len(observer.attention) == len(lengths)
        for row, attention in enumerate(observer.attention):
            prompt = prompts[row // num_generations]
            inputs = policy.collate(
                [prompt],
                [[out.completion_ids[row, : lengths[row]]]],
                pad_token_id=processor.tokenizer.pad_token_id,
                device=CPU,
                packed=True,
            )
            (expected,) = attention_to_prompts(policy, inputs, layer)
            torch.testing.assert_close(attention, expected.float(), atol=1e-6, rtol=0)


def test_any_observer_is_told_what_happens_in_order(native, policy, prompts):
    """Per layer, each prompt once and each step once; shares of a row add up to less than 1."""

    class Recorder:
        key = "recorder"
        layers = range(policy.config.text_config.num_hidden_layers)

        def __init__(self):
            self.events = []

        def start(self, prompts, plan, take):
            self.events.append(("start", len(prompts)))
            return ()

        def prompt_attention(self, layer, number, query, key, group, scaling, window):
            assert query.shape[1:] == (key.shape[1], key.shape[2])
            assert group.prompt_length == len(prompts[number].input_ids)
            self.events.append(("prompt", layer, number))

        def step_attention(self, layer, shares, rows, done):
            heads, groups = policy.config.text_config.num_attention_heads, len(prompts)
            assert shares.shape[0] == 2 * groups and shares.shape[1] * shares.shape[2] == heads
            assert (shares.sum(-1) < 1).all()
            assert rows.tolist() == list(range(2 * groups)) and not done.any()
            self.events.append(("step", layer))

        def finish(self):
            self.events.append(("finish",))

    recorder = Recorder()
    native.generate(prompts, 2, Sampling(3, seed=0), observer=recorder)
    layers = range(policy.config.text_config.num_hidden_layers)
    assert recorder.events == [
        ("start", len(prompts)),
        *(("prompt", layer, number) for layer in layers for number in range(len(prompts))),
        *[("step", layer) for layer in layers] * 2,
        ("finish",),
    ]


def test_one_token_completions(rollout, prompts):
    out = rollout.generate(prompts, 2, Sampling(1, seed=0))
    assert out.completion_ids.shape == (8, 1) and out.completion_mask.all()


def test_no_banned_token_is_drawn_even_when_the_model_wants_it(rollout, policy, prompts):
    image_token = policy.config.image_token_id
    weight = policy.model.lm_head.weight
    saved = weight[image_token].clone()
    # Tied with the embedding, so the row must stay what it is where images are read: they are not.
    with torch.no_grad():
        weight[image_token] = weight.mean(0) * 50
    try:
        out = rollout.generate(prompts, 4, Sampling(6, seed=0))
    finally:
        with torch.no_grad():
            weight[image_token] = saved
    assert image_token not in out.completion_ids


@torch.no_grad()
def test_a_text_marker_that_the_model_wants_is_drawn_and_kept(rollout, policy, prompts, processor):
    greedy = Sampling(2, greedy=True)
    wanted = rollout.generate(prompts[:1], 1, greedy).completion_ids[0, 0]
    marker = processor.tokenizer.convert_tokens_to_ids("<|box_start|>")
    weight = policy.model.lm_head.weight
    saved = weight[marker].clone()
    weight[marker] = 2 * weight[wanted]
    try:
        out = rollout.generate(prompts[:1], 1, greedy)
    finally:
        weight[marker] = saved
    assert out.completion_ids[0, 0] == marker
    assert out.texts[0].startswith("<|box_start|>")
    assert out.sampling_logps.isfinite().all()


def draws(logits, sampling, n, prompts=None):
    """`n` rows of the same logits, drawn at one position."""
    sampler = Sampler(
        sampling,
        vocab_size=logits.shape[-1],
        banned=[],
        first_row=0,
        prompts=prompts or [None] * n,
        device=CPU,
    )
    return sampler(logits.expand(n, -1), torch.tensor(5))[:2]


@pytest.mark.parametrize(
    "options",
    [
        {}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2},
        {"top_k": 9, "top_p": 0.9},
    ],
    ids=str,
)  # fmt: skip
def test_draws_follow_the_exact_probabilities(options):
    """Chi-square of 20,000 draws against the filtered softmax, by transformers' own filters."""
    import transformers as hf
    from scipy.stats import chisquare

    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    logits[0, 3] = -torch.inf
    n = 20_000
    tokens, logps = draws(logits, Sampling(1, seed=11, **options), n)
    scores = logits
    if "temperature" in options:
        scores = hf.TemperatureLogitsWarper(options["temperature"])(None, scores)
    if "top_k" in options:
        scores = hf.TopKLogitsWarper(options["top_k"])(None, scores)
    if "top_p" in options:
        scores = hf.TopPLogitsWarper(options["top_p"])(None, scores)
    if "min_p" in options:
        scores = hf.MinPLogitsWarper(options["min_p"])(None, scores)
    exact = scores[0].double().softmax(-1)
    counts = torch.bincount(tokens, minlength=12)
    possible = exact > 0
    assert not counts[~possible].any()
    assert chisquare(counts[possible], exact[possible] * n).pvalue > 1e-3
    torch.testing.assert_close(logps, exact.log()[tokens].float(), rtol=0, atol=1e-5)


def test_draws_of_neighbouring_rows_and_positions_are_independent():
    """Uniform, and without correlation between rows or positions."""
    from scipy.stats import chisquare, pearsonr

    sampling = Sampling(1, seed=3)
    seeds = Sampler(
        sampling, vocab_size=2, banned=[], first_row=0, prompts=[None] * 4000, device=CPU
    ).seeds
    at = [uniform(seeds, torch.tensor(position)) for position in range(3)]
    for values in at:
        assert 0 < values.min() and values.max() < 1
        assert chisquare(torch.histc(values.float(), 20, 0, 1)).pvalue > 1e-3
        assert abs(pearsonr(values[:-1], values[1:])[0]) < 0.06
    assert abs(pearsonr(at[0], at[1])[0]) < 0.06 and abs(pearsonr(at[1], at[2])[0]) < 0.06


def test_rare_tokens_of_a_large_vocabulary_keep_their_share():
    """150,000 small probabilities behind a large one: none is lost in the sum."""
    logits = torch.zeros(1, 150_000)
    logits[0, 0] = 12.0
    n = 2000
    tokens, _ = draws(logits, Sampling(1, seed=1), n)
    share = float((tokens > 75_000).float().mean())
    exact = 75_000 / (150_000 + torch.tensor(12.0).exp().item())
    assert abs(share - exact) < 5 * (exact * (1 - exact) / n) ** 0.5


def test_repetition_penalty_is_transformers_own(prompts):
    import transformers as hf

    logits = torch.randn(2, 1024, generator=torch.Generator().manual_seed(1)) * 3
    sampling = Sampling(1, repetition_penalty=1.7, greedy=True)
    sampler = Sampler(
        sampling, vocab_size=1024, banned=[], first_row=0, prompts=prompts[:2], device=CPU
    )
    processor = hf.RepetitionPenaltyLogitsProcessor(1.7)
    seen = [prompt.input_ids for prompt in prompts[:2]]
    for position in range(20):
        expected = [
            processor(ids[None], row[None].clone())[0].argmax()
            for ids, row in zip(seen, logits, strict=True)
        ]
        tokens, *_ = sampler(logits, torch.tensor(position))
        assert tokens.tolist() == [int(token) for token in expected]
        seen = [torch.cat([ids, token[None]]) for ids, token in zip(seen, tokens, strict=True)]


def test_top_k_one_is_greedy_and_temperature_flattens(rollout, prompts):
    greedy = rollout.generate(prompts, 2, Sampling(10, greedy=True))
    top1 = rollout.generate(prompts, 2, Sampling(10, top_k=1, seed=4))
    cold = rollout.generate(prompts, 2, Sampling(10, temperature=1e-4, seed=4))
    assert greedy.texts == top1.texts == cold.texts


def test_training_mode_is_given_back(rollout, policy, prompts):
    policy.train()
    rollout.generate(prompts[:1], 2, Sampling(2))
    assert policy.training


def test_native_needs_a_reachable_attention(policy, processor, prompts):
    policy.unreachable = "it is made of stone"
    try:
        with pytest.raises(ValueError, match="made of stone; pass --rollout_backend hf"):
            rollout_of("native", policy, processor.tokenizer).generate(prompts, 1, Sampling(2))
    finally:
        policy.unreachable = None


def test_unknown_backend(policy, processor):
    with pytest.raises(ValueError, match="native.*vllm"):
        rollout_of("vllm", policy, processor.tokenizer)


def test_hf_is_the_oracle_class(policy, processor):
    assert isinstance(rollout_of("hf", policy, processor.tokenizer), HFRollout)


@pytest.mark.parametrize(
    "options",
    [
        {"max_completion_length": 0}, {"temperature": 0.0}, {"temperature": float("nan")},
        {"top_p": 0.0}, {"top_k": -1}, {"min_p": 1.0}, {"repetition_penalty": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_sampling_that_makes_no_sense_is_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}: expected"):
        Sampling(**{"max_completion_length": 5, **options})


def test_nothing_to_draw_is_named(rollout, prompts):
    for some, count in (([], 2), (prompts, 0)):
        with pytest.raises(ValueError, match="expected prompts and at least one completion"):
            rollout.generate(some, count, Sampling(5))


def test_the_nucleus_ends_where_the_likeliest_tokens_reach_top_p():
    """Probabilities 1/2, 1/4, 1/8, 1/8, exact in binary. The last two are equal: both or none."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    for top_p, kept in ((0.5, 1), (0.75, 2), (0.8, 4), (0.875, 4), (0.9, 4)):
        tokens, _ = draws(logits, Sampling(1, seed=0, top_p=top_p), 200)
        assert sorted(tokens.unique().tolist()) == list(range(kept)), top_p


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_tokens_read_together_equal_tokens_read_in_turn(monkeypatch, family, processor, prompts):
    """Four tokens of each row in one pass, of rows with 0 to 2 tokens before them."""
    started = []

    def stop(self):
        started.append(self)
        raise StopIteration

    monkeypatch.setattr(decoding_module.Decoding, "run", stop)
    policy = Policy(random_model(family, processor.tokenizer)).eval()
    with pytest.raises(StopIteration):
        rollout_of("native", policy, processor.tokenizer).generate(prompts[:2], 3, Sampling(12))
    (decoding,) = started
    state = decoding.state
    tokens = torch.randint(0, 600, (6, 6), generator=torch.Generator().manual_seed(0))
    lengths, starts = torch.tensor([0, 1, 2, 0, 2, 1]), state.counters[1].clone()
    rows = torch.arange(6)

    def read(tokens, lengths):
        state.counters[0] = lengths
        attend = decoding_module.CachedAttention(state, 3, None)
        return decoding.read_tokens(tokens, starts + lengths, lengths, state.caches, attend)

    for position in range(2):  # rows with fewer tokens read these again below
        read(tokens[:, position, None], torch.full((6,), position))
    ahead = torch.stack([tokens[rows, lengths + i] for i in range(4)], 1)
    together = read(ahead, lengths)
    in_turn = [read(ahead[:, i, None], lengths + i) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(in_turn, 1), rtol=0, atol=2e-5)
    assert together.std() > 0.1
