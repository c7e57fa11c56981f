"""Speculation changes nothing but the number of passes."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from helpers import CPU, note_shrinks
from models import FAMILIES, random_model
from test_rollout import EVERYTHING, Recorded
from test_rollout_weights import adapted

from virft_fast.kernels.speculation import NOWHERE
from virft_fast.models.qwen_vl import Policy, load_model
from virft_fast.rollout import Sampling
from virft_fast.rollout import decoding as decoding_module
from virft_fast.rollout import graphs as graphs_module
from virft_fast.rollout import speculation as speculation_module
from virft_fast.rollout.cache import Buffers
from virft_fast.rollout.native import NativeRollout
from virft_fast.rollout.observers import AttentionObserver
from virft_fast.rollout.speculation import RECENT_TOKENS, History, best_choice, pool_bytes
from virft_fast.rollout.weights import RolloutWeights

OFTEN = tuple(range(0, 1024, 16))  # stop tokens: about one draw in 16 of a hot distribution


@pytest.fixture(scope="module")
def policy():
    return Policy(load_model("tiny")).eval()


def rollout_of(policy, processor, **options):
    return NativeRollout(lambda: nullcontext(policy), processor.tokenizer, device=CPU, **options)


def assert_equal(out, expected, atol=2e-5):
    """Log-probs differ by rounding: a product of more rows adds up in another order."""
    assert torch.equal(out.completion_ids, expected.completion_ids)
    assert torch.equal(out.completion_mask, expected.completion_mask)
    assert torch.equal(out.truncated, expected.truncated)
    assert out.texts == expected.texts
    torch.testing.assert_close(out.sampling_logps, expected.sampling_logps, rtol=0, atol=atol)


@pytest.fixture
def noted(monkeypatch):
    """What each pass reads, and the shrinks."""
    passes: list[int] = []
    decode = decoding_module.Decoding._decode

    def decode_noted(self):
        passes.append(self.read)
        decode(self)

    monkeypatch.setattr(decoding_module.Decoding, "_decode", decode_noted)
    return passes, note_shrinks(monkeypatch)


@pytest.fixture
def any_read(monkeypatch):
    """Passes read 8, 2, 1, 4, 8, ... tokens, whatever is right."""
    turns = itertools.cycle((8, 2, 1, 4))
    monkeypatch.setattr(speculation_module, "best_choice", lambda *_: (next(turns), 1.0))


SAMPLINGS = {
    "greedy": Sampling(40, greedy=True),
    "greedy with a penalty": Sampling(24, greedy=True, repetition_penalty=1.3),
    "plain": Sampling(33, seed=1),
    "everything": EVERYTHING,
    "ends": Sampling(30, temperature=8.0, seed=2, stop_token_ids=OFTEN),
    "one token": Sampling(1, seed=1),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_completions_equal_those_without(noted, any_read, policy, processor, prompts, name):
    """From an empty history, from answers of another seed, and from the answers themselves, so that
    ends and the maximum length come in the middle of what a pass keeps."""
    sampling, count = SAMPLINGS[name], 1 if name == "greedy" else 3
    expected = rollout_of(policy, processor).generate(prompts, count, sampling, first_row=7)
    noted[0].clear(), noted[1].clear()
    rollout = rollout_of(policy, processor, speculation=History())
    for seed in (77, sampling.seed, sampling.seed):
        out = rollout.generate(prompts, count, replace(sampling, seed=seed), first_row=7)
        if seed == sampling.seed:
            assert_equal(out, expected)
    assert name == "one token" or set(noted[0]) == {1, 2, 4, 8}
    assert rollout.stats.drawn == int(expected.completion_mask.sum())
    assert rollout.stats.longest == expected.completion_mask.shape[1]
    assert name != "ends" or noted[1]


def test_log_probs_equal_to_the_last_place_of_float32(any_read, processor, prompts):
    """With weights in float64, where the order of a sum doesn't matter."""
    policy = Policy(load_model("tiny").double()).eval()
    for sampling in (Sampling(24, seed=1), Sampling(24, greedy=True, repetition_penalty=1.3)):
        expected = rollout_of(policy, processor).generate(prompts, 2, sampling)
        rollout = rollout_of(policy, processor, speculation=History())
        for _ in range(2):
            assert_equal(rollout.generate(prompts, 2, sampling), expected, atol=1e-6)
        assert rollout.stats.accepted > 20


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_equal_in_float32(one_thread, any_read, family, processor, prompts):
    """With four heads to a key, as released models have, and four rows until the end, which most of
    the eight reach: on one thread, products then add up a row in the same order, whatever else is
    in them."""
    policy = Policy(random_model(family, processor.tokenizer, num_key_value_heads=1)).eval()
    filters = {"top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2}
    for sampling in (
        Sampling(33, greedy=True), Sampling(33, seed=1), Sampling(33, seed=2, **filters)
    ):  # fmt: skip
        expected = rollout_of(policy, processor).generate(prompts, 2, sampling)
        assert expected.truncated.sum() >= 4
        rollout = rollout_of(policy, processor, speculation=History())
        for _ in range(2):
            assert_equal(rollout.generate(prompts, 2, sampling), expected, atol=1e-6)
        assert rollout.stats.accepted > 20


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_of_every_family_and_layout(any_read, family, processor, prompts):
    """An adapter beside the weights, and merged into a copy of them."""
    policy = adapted(family, processor)
    copied = RolloutWeights(policy, device=CPU, dtype=torch.float32).policy()
    for one, sampling in (
        (policy, Sampling(20, greedy=True)), (copied, Sampling(20, seed=3, temperature=0.7)),
    ):  # fmt: skip
        expected = rollout_of(one, processor).generate(prompts, 2, sampling)
        rollout = rollout_of(one, processor, speculation=History())
        for _ in range(2):
            assert_equal(rollout.generate(prompts, 2, sampling), expected)
        assert rollout.stats.accepted > 20


def test_own_forward_pass_reads_guesses_too(any_read, processor, prompts):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    policy = Policy(random_model("qwen2_vl", processor.tokenizer, rope_parameters=rope)).eval()
    expected = rollout_of(policy, processor).generate(prompts, 2, Sampling(20, seed=1))
    rollout = rollout_of(policy, processor, speculation=History())
    for _ in range(2):
        assert_equal(rollout.generate(prompts, 2, Sampling(20, seed=1)), expected)


def test_batches_in_turn_and_attention_of_kept_tokens(any_read, policy, processor, prompts):
    """Observers hear of the same attention, in one batch and in several."""
    sampling = Sampling(20, seed=5, temperature=1.3, stop_token_ids=OFTEN)
    plain = AttentionObserver(1)
    expected = rollout_of(policy, processor).generate(prompts, 3, sampling, observer=plain)
    longest = max(len(prompt.input_ids) for prompt in prompts)
    for limit in (None, longest + 3 * 32):
        rollout = rollout_of(policy, processor, speculation=History(), max_cache_tokens=limit)
        for _ in range(2):
            observer = AttentionObserver(1)
            assert_equal(rollout.generate(prompts, 3, sampling, observer=observer), expected)
            assert len(observer.attention) == 12
            for pair in zip(observer.attention, plain.attention, strict=True):
                torch.testing.assert_close(*pair, rtol=0, atol=1e-6)
        assert rollout.stats.accepted > 0


def test_replayed_graphs_give_what_the_steps_give(
    monkeypatch, any_read, policy, processor, prompts
):
    """For other prompts, numbers of rows and histories in the same memory: what a graph depends on
    is in its key or stays where it is. `any_read` turns to other sizes on each check."""
    monkeypatch.setattr(Recorded, "made", [])
    monkeypatch.setattr(graphs_module, "capture_graph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    recorded, eager = (
        rollout_of(policy, processor, speculation=History(), graphs=on) for on in (True, False)
    )
    calls = [(prompts, 4, 40), (prompts[:2], 3, 24), (prompts[2:], 3, 24), (prompts, 4, 40)]
    for number, (some, count, length) in enumerate(calls * 2):
        sampling = Sampling(length, seed=number % 3, repetition_penalty=1.0 + 0.2 * (number % 2))
        out, expected = (r.generate(some, count, sampling) for r in (recorded, eager))
        plain = rollout_of(policy, processor).generate(some, count, sampling)
        assert_equal(out, plain)
        assert_equal(expected, plain)
    assert sum(graph.replays for graph in Recorded.made) > len(Recorded.made) > 8


def test_rows_end_at_the_maximum_length_without_guesses(monkeypatch, policy, processor, prompts):
    """Of rows that guessing left at different lengths, and that pass it until the next check."""
    monkeypatch.setattr(speculation_module, "best_choice", lambda *_: next(turns))
    seeded = torch.Generator().manual_seed(0)
    for length in (21, 22, 23, 24):
        turns = itertools.chain([(8, 1.0)] * 2, itertools.repeat((1, 1.0)))
        rollout = rollout_of(policy, processor, speculation=History())
        sampling = Sampling(length, seed=1)
        plain, observer = AttentionObserver(1), AttentionObserver(1)
        expected = rollout_of(policy, processor).generate(prompts, 3, sampling, observer=plain)
        wrong = torch.rand(expected.completion_ids.shape, generator=seeded) < 0.2
        answers = expected.completion_ids.masked_fill(wrong, 7)
        rollout.speculation.add(prompts, replace(expected, completion_ids=answers))
        assert_equal(rollout.generate(prompts, 3, sampling, observer=observer), expected)
        assert rollout.stats.accepted > 0
        for pair in zip(observer.attention, plain.attention, strict=True):
            torch.testing.assert_close(*pair, rtol=0, atol=1e-6)


def test_no_guesses_where_their_room_would_cost_another_batch(policy, processor, prompts):
    """16 tokens are allocated for 16, and 24 with guesses."""
    longest, sampling = max(len(prompt.input_ids) for prompt in prompts), Sampling(16, seed=1)
    expected = rollout_of(policy, processor).generate(prompts, 2, sampling)
    for limit, guesses in ((4 * (longest + 2 * 16), False), (4 * (longest + 2 * 24), True)):
        rollout = rollout_of(policy, processor, speculation=History(), max_cache_tokens=limit)
        for _ in range(2):
            assert_equal(rollout.generate(prompts, 2, sampling), expected)
        assert (rollout.stats.guessed > 0) == guesses
        assert rollout.stats.longest == expected.completion_mask.sum(1).max()  # one batch


def test_all_guesses_are_right_if_the_history_is_the_answer(noted, policy, processor, prompts):
    """The second rollout learns that stored answers come true, the third reads 8 tokens a pass."""
    greedy = Sampling(64, greedy=True)
    rollout = rollout_of(policy, processor, speculation=History())
    for _ in range(3):
        noted[0].clear()
        out = rollout.generate(prompts, 2, greedy)
    stats, lengths = rollout.stats, out.completion_mask.sum(1)
    assert stats.accepted == stats.guessed > 0
    assert set(noted[0]) == {8}
    # The first token comes from the prompt.
    assert stats.passes == len(noted[0]) == -(-(int(lengths.max()) - 1) // 8)
    assert asdict(stats) == {
        "passes": stats.passes, "longest": int(lengths.max()), "drawn": int(lengths.sum()),
        "guessed": stats.guessed, "accepted": stats.accepted, "agreement": stats.agreement,
    }  # fmt: skip
    assert rollout.speculation.agreement.tolist() == stats.agreement


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_token_a_pass_within_32_of_random_text(monkeypatch, noted, policy, processor, prompts,
                                                   device):  # fmt: skip
    """After a history that was always right."""
    for table in (speculation_module.TIMES, decoding_module.CHECK_EVERY):
        monkeypatch.setitem(table, "cpu", table[device])
    history = History()
    history.agreement[:] = 1.0
    rollout = rollout_of(policy, processor, speculation=history)
    rollout.generate(prompts, 2, Sampling(100, seed=1, temperature=8.0))
    passes, _ = noted
    assert passes[0] > 2 and set(passes[32:]) == {1}
    assert float(history.agreement[0]) < 0.3


def test_guesses_return_with_agreement(noted, policy, processor, prompts):
    """A history of which nothing is expected, but that is the answer: passes soon read more."""
    greedy = Sampling(64, greedy=True)
    rollout = rollout_of(policy, processor, speculation=History())
    rollout.generate(prompts, 2, greedy)
    rollout.speculation.agreement.zero_()
    passes = noted[0]
    passes.clear()
    rollout.generate(prompts, 2, greedy)
    assert passes[0] == 1 and set(passes[12:]) == {8}


def test_passes_repeat(policy, processor, prompts):
    """They depend on counts alone: two rollouts with equal histories take the same."""
    found = []
    for _ in range(2):
        rollout = rollout_of(policy, processor, speculation=History())
        for seed in (1, 2, 2):
            rollout.generate(prompts, 2, Sampling(24, seed=seed, temperature=0.7))
            found.append(asdict(rollout.stats))
    assert found[:3] == found[3:]
    assert found[2]["accepted"] > 0


def test_what_a_pass_reads():
    """Free tokens: 8 unless hardly a guess is right. Costly ones: as many as pay."""
    free, costly = (lambda tokens: 1.0), (lambda tokens: 10.0 + tokens)
    for share, rows, time, read in (
        (0.0, 1, free, 1), (0.05, 1, free, 1), (0.2, 1, free, 8), (1.0, 64, free, 8),
        # One row: (1 + 1/2) tokens in 12 units of time are fewer than 1 in 11, times 1.1.
        (0.5, 1, costly, 4), (0.05, 1, costly, 1), (1.0, 1, costly, 8),
        # 64 rows: 8 times the tokens take 7 times as long.
        (0.9, 64, costly, 1), (1.0, 64, costly, 8),
    ):  # fmt: skip
        shares = np.array([share] * 3)
        kept = sum(share**power for power in range(read))
        assert best_choice(shares, rows, time) == (read, pytest.approx(kept)), (share, rows)
    # Half of the rows need 8 passes for 8 tokens, the others one.
    assert best_choice(np.array([0.0, 1.0]), 2, free)[1] == pytest.approx(16 / 9)


class Drawn:
    """What `History.add` needs of rollouts."""

    def __init__(self, rows, size):
        longest = max(map(len, rows))
        self.completion_ids = torch.tensor([row + [9] * (longest - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        self.completion_mask = torch.arange(longest) < lengths[:, None]
        self.num_generations = size


def test_the_history_is_bounded(prompts):
    """Answers of 2 and 3 tokens and a separator each, so 7 tokens of a prompt: two prompts fit."""
    history = History(recent_tokens=10, stored_tokens=15)
    answers = [[[10 * row + 1, 2], [3, 4, 5]] for row in range(4)]
    for prompt, two in zip(prompts, answers, strict=True):
        history.add([prompt], Drawn(two, 2))
    assert list(history.stored) == [prompt.sample.index for prompt in prompts[2:]]
    assert history.stored[prompts[3].sample.index].tolist() == [31, 2, -1, 3, 4, 5, -1]
    assert history.recent.tolist() == [4, 5, -1, 31, 2, -1, 3, 4, 5, -1]
    assert history.num_bytes() == 4 * 25
    # New answers to a prompt replace the old ones, and it leaves last.
    history.add(prompts[2:3], Drawn([[7], [8]], 2))
    assert list(history.stored) == [prompts[3].sample.index, prompts[2].sample.index]
    history.add(prompts[:1], Drawn([[7], [8]], 2))
    assert list(history.stored) == [
        prompt.sample.index for prompt in (*prompts[3:], prompts[2], prompts[0])
    ]


def test_texts_are_in_order_and_rows_start_at_their_stored_answers(prompts):
    """Two stored answers for three rows: the third row starts at the first again."""
    history = History()
    history.add(prompts[:2], Drawn([[1, 2], [3], [4], [5, 6]], 2))
    texts, starts = history.texts(prompts[1:3], 3)
    stored = history.stored[prompts[1].sample.index]
    assert texts[: NOWHERE + 1].tolist() == [-1] * (NOWHERE + 1)
    text, other = prompts[1], prompts[2]
    expected = torch.where(text.mm_token_type_ids == 0, text.input_ids, -1).tolist() + [-1]
    expected += other.input_ids.tolist() + [-1]
    assert other.pixel_values is None
    expected += [1, 2, -1, 3, -1, 4, -1, 5, 6, -1] + stored.tolist()
    assert texts[NOWHERE + 1 :].tolist() == expected
    first = len(texts) - 5
    assert starts.tolist() == [first, first + 2, first, NOWHERE, NOWHERE, NOWHERE]


def test_rows_start_with_the_share_of_right_guesses_of_their_kind(prompts):
    """The first prompt has stored answers, the second has none."""
    history, stats = History(), speculation_module.Stats(agreement=[0.25, 0.75])
    history.add(prompts[:1], Drawn([[1], [2]], 2))
    speculation = speculation_module.Speculation(
        history, prompts[:2], 2, 8, stats=stats, device=CPU,
        take=lambda name, shape, dtype: torch.empty(shape, dtype=dtype),
    )  # fmt: skip
    assert speculation.share.tolist() == [0.75, 0.75, 0.25, 0.25]


def test_a_history_continues_where_its_state_was_saved(policy, processor, prompts):
    first, second = (rollout_of(policy, processor, speculation=History()) for _ in range(2))
    sampling = Sampling(24, seed=1, temperature=0.7)
    first.generate(prompts, 2, sampling)
    state = first.speculation.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    second.speculation.load_state_dict(state)
    for seed in (2, 3):
        outs = [r.generate(prompts, 2, replace(sampling, seed=seed)) for r in (first, second)]
        assert_equal(*outs)
        assert first.stats == second.stats
    states = [r.speculation.state_dict() for r in (first, second)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in state)
    with pytest.raises(ValueError, match="history: expected tensors .*'recent'.*got"):
        History().load_state_dict({**state, "lengths": state["lengths"][1:]})
    with pytest.raises(ValueError, match="history: expected tensors .*'agreement'.*got"):
        History().load_state_dict({})


@pytest.mark.parametrize(
    "broken",
    [
        {"lengths": torch.tensor([4, -1])},
        {"lengths": torch.tensor([1.0, 2.0])},
        {"lengths": torch.tensor([[1, 2]])},
        {"rows": torch.tensor([5])},
        {"rows": torch.tensor([5, 5])},
        {"stored": torch.ones(3, 1, dtype=torch.int32)},
        {"recent": torch.tensor(1, dtype=torch.int32)},
        {"recent": torch.ones(4)},
        {"agreement": torch.tensor([0.5], dtype=torch.float64)},
        {"agreement": torch.tensor([0.5, float("nan")], dtype=torch.float64)},
        {"agreement": torch.tensor([0.5, 5.0], dtype=torch.float64)},
    ],
    ids=str,
)
def test_a_broken_state_changes_nothing(broken):
    ids = torch.arange(3, dtype=torch.int32)
    state = {
        "recent": ids, "rows": torch.tensor([5, 6]), "lengths": torch.tensor([1, 2]),
        "stored": ids, "agreement": torch.tensor([0.1, 0.2], dtype=torch.float64),
    }  # fmt: skip
    history = History()
    history.load_state_dict(state)
    with pytest.raises(ValueError, match="history: expected .* pass --speculation off to resume"):
        history.load_state_dict(state | broken)
    assert all(torch.equal(history.state_dict()[name], state[name]) for name in state)


def test_memory_of_guesses_is_stated(monkeypatch, policy, processor, prompts):
    taken, take = {}, Buffers.take

    def noted(self, name, shape, dtype):
        tensor = take(self, name, shape, dtype)
        taken[name] = tensor.nbytes
        return tensor

    monkeypatch.setattr(Buffers, "take", noted)
    rollout = rollout_of(policy, processor, speculation=History())
    longest, sampling = max(len(prompt.input_ids) for prompt in prompts), Sampling(40, seed=1)
    for _ in range(2):
        rollout.generate(prompts, 2, sampling)
        assert taken["pool"] + taken["ngrams"] <= pool_bytes(len(prompts), 2, longest, 40)
    rollout.speculation.recent = torch.zeros(RECENT_TOKENS, dtype=torch.int32)  # a full ring
    rollout.generate(prompts, 2, sampling)
    total = taken["pool"] + taken["ngrams"]
    assert total <= pool_bytes(len(prompts), 2, longest, 40) <= 2 * total
