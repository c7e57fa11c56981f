"""The host hardly ever waits for the device during a step, counted on a GPU that is pretended."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from family_models import write_family
from helpers import CPU, make_prompts, make_sample, make_state
from models import FAMILIES, random_model
from pretend_gpu import GPU, PretendGPU, Tape

from virft_fast.algorithms import dpo, grpo, sft
from virft_fast.algorithms.dpo import DPOState
from virft_fast.config import DPOConfig
from virft_fast.devices import to_device
from virft_fast.kernels import PrefixLayout, backend, linear_grpo_loss
from virft_fast.models.decode_step import DecodeStep
from virft_fast.models.families import FAMILIES as SHARED
from virft_fast.models.processing import load_processor
from virft_fast.models.qwen_vl import Policy, core, encode_prompt, load_model
from virft_fast.models.recurrent import recurrent_layers
from virft_fast.models.shared_prefix import attention_layers
from virft_fast.rollout import Sampling, graphs, speculation
from virft_fast.rollout.decoding import Decoding
from virft_fast.rollout.native import NativeRollout
from virft_fast.rollout.observers import AttentionObserver
from virft_fast.rollout.speculation import History

# Of a step without its rollout: the losses and the gradient's norm, and the metrics.
WAITS_OF_TRAINING = 2


@pytest.fixture(autouse=True)
def without_triton(monkeypatch):
    """The torch references; and the mask that `causal_lower_right` stands for, which the CPU's
    attention doesn't take."""

    def causal_lower_right(queries, keys):
        mask = torch.ones(queries, keys, dtype=torch.bool)
        return to_device(mask.tril(keys - queries), GPU)

    monkeypatch.setattr(backend, "_module", lambda *names: None)
    monkeypatch.setattr("torch.nn.attention.bias.causal_lower_right", causal_lower_right)


class Replay:
    """A rollout that was made before."""

    def __init__(self, rollouts):
        self.rollouts = rollouts

    def generate(self, *args, **options):
        return self.rollouts


def on_gpu(state, *others):
    gpu = PretendGPU()
    gpu.adopt(state.policy, *others)
    state.engine.device = GPU
    return gpu


def reference_of(state):
    cells = [] if state.reference is None else state.reference.__closure__
    return [c.cell_contents for c in cells if isinstance(c.cell_contents, torch.nn.Module)]


@pytest.mark.parametrize(
    "config",
    [
        {"beta": 0.1},
        {"beta": 0.0, "loss_type": "gspo"},
        {"beta": 0.0, "num_iterations": 2, "delta": 3.0},
        {"beta": 0.0, "mask_truncated_completions": True, "loss_type": "dapo"},
    ],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_training_waits_twice_a_step(processor, prompts, config):
    """Once before each update of the optimizer, and once for the metrics."""
    made = {"config": config, "prompts_per_microbatch": 2, "gradient_accumulation_steps": 2}
    plain, state = (make_state(processor, **made) for _ in range(2))
    rollouts = plain.rollout.generate(prompts, 2, grpo._sampling(plain))
    rollouts = replace(rollouts, truncated=torch.arange(8) % 3 == 0)
    plain.rollout = state.rollout = Replay(rollouts)
    want, _ = grpo.train_step(plain, prompts)
    with on_gpu(state, *reference_of(state)) as gpu:
        got, _ = grpo.train_step(state, prompts)
    assert gpu.waits.total() == WAITS_OF_TRAINING - 1 + config.get("num_iterations", 1), gpu.waits
    for name in ("loss", "grad_norm", "entropy", "sampling_logp_difference"):
        assert got[name] == pytest.approx(want[name], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("length", "history"), [(20, None), (70, None), (70, History)])
def test_a_step_waits_four_times_and_once_every_16_tokens(processor, prompts, length, history):
    """The rollout's own: tokens and log-probs at its end, and checks for finished completions. With
    speculation, also the counts at its end."""
    config = {"beta": 0.0, "max_completion_length": length}
    state = make_state(processor, config=config, prompts_per_microbatch=4)
    state.rollout = NativeRollout(
        state.engine.whole_weights, processor.tokenizer, device=GPU, max_cache_tokens=10**6,
        graphs=False, speculation=history and history(),
    )  # fmt: skip
    with on_gpu(state) as gpu:
        _, records = grpo.train_step(state, prompts)
    assert len(records) == 8
    own = 2 + (history is not None)
    assert gpu.waits.total() <= WAITS_OF_TRAINING + own + math.ceil(length / 16), gpu.waits


def test_sft_and_dpo_wait_twice_a_step(processor, prompts):
    state = make_state(processor, prompts_per_microbatch=2, gradient_accumulation_steps=2)
    with on_gpu(state) as gpu:
        sft.train_step(state, prompts)
    assert gpu.waits.total() == WAITS_OF_TRAINING, gpu.waits
    pairs = []
    for index, answers in enumerate([("yes", "no"), ("a cat", "a dog"), ("one", "two")]):
        sample = make_sample(index)
        sample.columns.update(zip(("chosen", "rejected"), answers, strict=True))
        pairs.append(encode_prompt(processor, sample))
    for known in (None, {index: (-3.0, -2.0) for index in range(3)}):
        fields = vars(make_state(processor, prompts_per_microbatch=2))
        state = DPOState(**fields, dpo=DPOConfig(), ref_logps=known)
        with on_gpu(state, *reference_of(state)) as gpu:
            dpo.train_step(state, pairs)
        assert gpu.waits.total() == WAITS_OF_TRAINING, gpu.waits


def test_rollouts_of_recurrent_layers_wait_no_more_than_others(processor, prompts):
    policy = Policy(random_model("qwen3_5", processor.tokenizer)).eval()
    rollout = NativeRollout(
        lambda: nullcontext(policy), processor.tokenizer, device=GPU, max_cache_tokens=10**6,
        graphs=False,
    )  # fmt: skip
    with PretendGPU() as gpu:
        gpu.adopt(policy)
        rollout.generate(prompts, 2, Sampling(40, seed=1))
    assert gpu.waits.total() <= 2 + math.ceil(40 / 16), gpu.waits


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_5"])
def test_no_pass_of_any_family_waits(processor, prompts, family):
    policy = Policy(random_model(family, processor.tokenizer)).train()
    answers = [[torch.tensor([5, 6, 7]), torch.tensor([5])]] * len(prompts)
    with PretendGPU() as gpu:
        gpu.adopt(policy)
        for chosen in (prompts, prompts[2:3]):  # without an image, the tower sees a blank one
            inputs = policy.collate(chosen, answers[: len(chosen)], pad_token_id=0, device=GPU)
            logps, entropy = policy(inputs)
            (logps.sum() + entropy.sum()).backward()
    assert not gpu.waits


def rollouts_in_graphs(monkeypatch, policy, processor, prompts):
    """Three rollouts with any numbers of rows, and what the last two attended to: step by step and
    in pretended graphs; and the graphs. Their passes read 8, 2, 4 and 1 tokens in turn, where the
    model can guess. No step and no replay may wait."""
    tapes, reads = [], set()

    def capture(*args):
        tapes.append(Tape(*args))
        return tapes[-1]

    monkeypatch.setattr(graphs, "capture_graph", capture)
    monkeypatch.setattr(graphs.Graphs, "_synchronize", lambda self: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    hopper = SimpleNamespace(total_memory=2**37)  # its memory is kept, and the graphs with it
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: hopper)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    histc = torch.histc  # a CPU counts no integers
    monkeypatch.setattr(torch, "histc", lambda x, **how: histc(x.float(), **how).to(x.dtype))
    run_step = Decoding._run_step

    def checked(decoding):
        before = gpu.waits.total()
        reads.add(decoding.read)
        run_step(decoding)
        assert gpu.waits.total() == before, gpu.waits

    monkeypatch.setattr(Decoding, "_run_step", checked)
    hybrid = bool(recurrent_layers(core(policy.model).get_decoder()))
    layer = attention_layers(policy.config.get_text_config())[0]
    plain = Sampling(24, stop_token_ids=tuple(range(0, 256, 16)))
    filtered = replace(plain, top_k=60, top_p=0.95, min_p=0.01, repetition_penalty=1.2)
    found = {}
    with PretendGPU() as gpu:
        gpu.adopt(policy)
        for on in (False, True):
            turns = itertools.cycle((8, 2, 4, 1))
            monkeypatch.setattr(speculation, "best_choice", lambda *_, t=turns: (next(t), 1.0))
            observer = AttentionObserver(layer)
            rollout = NativeRollout(
                lambda: nullcontext(policy), processor.tokenizer, device=GPU, graphs=on,
                max_cache_tokens=10**6, speculation=None if hybrid else History(),
            )  # fmt: skip
            outs = [rollout.generate(prompts, 4, plain)]
            for seed in (1, 2):
                sampling = replace(filtered, seed=seed)
                outs.append(rollout.generate(prompts[:1], 3, sampling, observer=observer))
            found[on] = outs, observer.attention
    assert reads == ({1} if hybrid else {1, 2, 4, 8})
    return *found.values(), tapes


@pytest.mark.parametrize("family", SHARED)
def test_a_graph_of_any_family_gives_what_its_steps_give(monkeypatch, tmp_path, family):
    """Whatever a step reads lies where the graph reads it, and no number in it is Python's."""
    folder = write_family(family, tmp_path / family)
    processor, policy = load_processor(str(folder)), Policy(load_model(str(folder)))
    for name, weight in policy.named_parameters():
        if ".experts." in name:
            weight.data = weight.data.bfloat16()
    samples = make_sample(0, [(112, 60)]), make_sample(1, [(56, 84), (112, 56)]), make_sample(2, [])
    prompts = make_prompts(processor, *samples)
    expected, out, tapes = rollouts_in_graphs(monkeypatch, policy.eval(), processor, prompts)
    assert sum(tape.replays for tape in tapes) > 2 * len(tapes) > 0
    for one, other in zip(out[0], expected[0], strict=True):
        assert torch.equal(one.completion_ids, other.completion_ids)
        assert torch.equal(one.sampling_logps, other.sampling_logps)
    assert all(map(torch.equal, out[1], expected[1]))
    assert len(out[1]) == len(expected[1]) == 6


def test_experts_that_wait_are_not_captured(monkeypatch, processor):
    """In float32 or on an older GPU, torch's grouped product reads on the host how many tokens each
    expert gets; so does transformers' loop over experts."""
    text = core(random_model("qwen3_vl_moe", processor.tokenizer)).language_model
    assert DecodeStep(text).waits
    text.bfloat16()
    assert not DecodeStep(text).waits
    with PretendGPU() as gpu:
        gpu.adopt(text)
        for major, waits in ((8, True), (9, False), (10, False), (12, True)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, m=major: (m, 0))
            assert DecodeStep(text).waits == waits
    text.config._experts_implementation_internal = "eager"
    assert DecodeStep(text).waits


def test_rotations_by_length_are_not_captured(processor):
    """The host asks how long the longest row is."""
    text = core(random_model("qwen3_5", processor.tokenizer)).language_model
    for kind, waits in (("yarn", False), ("dynamic", True), ("longrope", True)):
        text.rotary_emb.rope_type = kind
        assert DecodeStep(text).waits == waits


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("rows", [2, 64])
def test_a_loss_without_mask_is_that_of_a_full_mask(level, rows):
    """And waits for nothing. Sequence 2 is silent, sequence 1 longer than a tile of two rows."""
    torch.manual_seed(0)
    offsets = torch.tensor([0, 5, 6, 8, 9], dtype=torch.int32)
    hidden, weight = torch.randn(9, 4), torch.randn(11, 4)
    ids, old = torch.randint(0, 11, (9,)), torch.randn(9) - 2
    advantages = torch.tensor([1.0, -1.0, 0.0, 2.0])

    def loss_and_gradients(move, mask):
        leaves = [move(x).requires_grad_() for x in (hidden, weight)]
        out = linear_grpo_loss(
            *leaves, move(ids), mask, cu_seqlens=offsets, advantages=move(advantages),
            old_logps=move(old), importance_sampling_level=level, chunk_tokens=rows, num_items=7,
        )  # fmt: skip
        out.loss.backward()
        return (out.loss.detach(), out.logps, *(leaf.grad for leaf in leaves))

    full = loss_and_gradients(torch.clone, torch.ones(9, dtype=torch.bool))
    for got, want in zip(loss_and_gradients(torch.clone, None), full, strict=True):
        assert torch.equal(got, want)
    with PretendGPU() as gpu:
        there = loss_and_gradients(lambda x: to_device(x, GPU), None)
    assert not gpu.waits
    for got, want in zip(there, full, strict=True):
        torch.testing.assert_close(got, want)


def test_tables_of_a_packed_row_do_not_wait():
    with PretendGPU() as gpu:
        layout = PrefixLayout.from_lengths([9, 70], [[3, 0, 8], [90]], device=GPU)
        tables = [layout.segment_starts, layout.query_blocks(16)]
        tables += layout.key_blocks(16, 16, 4, 2)[:2]
        assert all(table.device == GPU and table.numel() for table in tables[:3])
    assert not gpu.waits


WAITING = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool(x.any()),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 1],
    "masked assignment": lambda x: x.masked_fill(x > 1, 0.0).__setitem__(x > 1, 2.0),
    "masked_select": lambda x: x.masked_select(x > 1),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "host indices": lambda x: x[torch.tensor([0, 1])],
    "not pinned": lambda x: torch.ones(2).to(x.device, non_blocking=True),
    "blocking": lambda x: torch.ones(2).pin_memory().to(x.device),
    "host data": lambda x: torch.tensor([1.0], device=x.device),
    "copy": lambda x: x.copy_(torch.ones(3)),
    "backward of masked_scatter": lambda x: torch.autograd.grad(
        x.masked_scatter(x > 1, y := torch.ones(3, device=x.device).requires_grad_()).sum(), y
    ),
}


@pytest.mark.parametrize("what", WAITING)
def test_the_pretended_gpu_counts_what_waits(what):
    with PretendGPU() as gpu:
        x = to_device(torch.tensor([1.0, 2.0, 3.0]), GPU)
        assert x.device == GPU and x.is_cuda and (x * 2).sum().device == GPU
        assert not gpu.waits
        WAITING[what](x)
    assert gpu.waits.total() == 1


@pytest.mark.parametrize(
    "free",
    [
        lambda x: torch.where(x > 1, x, 0.0).sum() * 2,
        lambda x: x.index_select(0, to_device(torch.tensor([0, 1]), x.device)),
        lambda x: torch.zeros(3, device=x.device).index_copy(0, x.long() - 1, x).cumsum(0),
        lambda x: torch.ones(3).to(CPU).nonzero().tolist(),
        lambda x: x.to(torch.float64) + 1,
    ],
)
def test_the_pretended_gpu_counts_nothing_else(free):
    with PretendGPU() as gpu:
        free(to_device(torch.tensor([1.0, 2.0, 3.0]), GPU))
    assert not gpu.waits


def test_the_pretended_gpu_refuses_operands_on_both_sides():
    with PretendGPU(), pytest.raises(AssertionError, match="on the host and on the GPU"):
        to_device(torch.ones(2), GPU) + torch.ones(2)
