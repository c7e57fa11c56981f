"""The copy of the weights for rollouts: what it computes, what it shares, where it stays."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import peft
import pytest
import torch
from helpers import CPU, make_state
from models import FAMILIES, random_model

from virft_fast.algorithms.grpo import train_step
from virft_fast.engine import OptimizerSettings, PlainEngine
from virft_fast.models.decode_step import DecodeStep, merged_linears
from virft_fast.models.qwen_vl import Policy, base, core, freeze_vision_tower, load_model
from virft_fast.rollout import Sampling
from virft_fast.rollout import graphs as graphs_module
from virft_fast.rollout import weights as weights_module
from virft_fast.rollout.native import NativeRollout
from virft_fast.rollout.weights import RolloutWeights

SETTINGS = OptimizerSettings(learning_rate=1e-3)


def adapted(family, processor, *, dora=False):
    """A random model under an adapter that changes its answers."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        exclude_modules=r".*\bvisual\b.*",
        use_dora=dora,
    )
    torch.manual_seed(0)  # of the adapter's start
    model = peft.get_peft_model(random_model(family, processor.tokenizer), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Policy(model.eval())


def answers(policy, processor, prompts, length=16):
    rollout = NativeRollout(lambda: nullcontext(policy), processor.tokenizer, device=CPU)
    return rollout.generate(prompts, 2, Sampling(length, greedy=True))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_adapter_answers_as_the_unmerged_one(family, dora, processor, prompts):
    policy = adapted(family, processor, dora=dora)
    weights = RolloutWeights(policy, device=CPU, dtype=torch.float32)
    out, expected = (answers(p, processor, prompts) for p in (weights.policy(), policy))
    assert torch.equal(out.completion_ids, expected.completion_ids)
    torch.testing.assert_close(out.sampling_logps, expected.sampling_logps, rtol=0, atol=2e-5)
    with policy.model.disable_adapter():
        plain = answers(policy, processor, prompts)
    assert plain.texts != expected.texts


@pytest.mark.parametrize("family", FAMILIES)
def test_copy_computes_projections_as_one_product(family, processor):
    weights = RolloutWeights(adapted(family, processor), device=CPU, dtype=torch.float32)
    text = core(weights.policy().model).language_model
    assert DecodeStep(text).supported
    for layer, decoded in zip(text.layers, DecodeStep(text).layers, strict=True):
        products = (decoded.qkv, decoded.gate_up)
        for linears, product in zip(merged_linears(layer), products, strict=True):
            whole = torch.cat([linear.weight for linear in linears])
            assert torch.equal(product.keywords["weight"], whole)
            assert product.keywords["weight"].data_ptr() == linears[0].weight.data_ptr()


def test_copy_follows_updates_at_the_same_addresses(processor, prompts):
    state = make_state(processor)
    engine = state.engine
    weights = engine._copy = RolloutWeights(state.policy, device=CPU, dtype=torch.float32)
    addresses = [p.data_ptr() for p in weights.policy().parameters()]
    for _ in range(2):
        train_step(state, prompts)
        with engine.whole_weights() as policy:
            assert policy is not state.policy and not policy.training
            assert [p.data_ptr() for p in policy.parameters()] == addresses
            own = dict(policy.named_parameters())
            assert all(torch.equal(own[n], p) for n, p in state.policy.named_parameters())
    assert engine.updates == 2


def test_copy_follows_a_loaded_state_even_where_weights_are_frozen(tmp_path):
    def engine_with(scale):
        model = load_model("tiny")
        freeze_vision_tower(model)
        engine = PlainEngine(Policy(model), SETTINGS, device=CPU)
        with torch.no_grad():
            for parameter in engine.module.parameters():
                parameter.mul_(scale)
        engine._copy = RolloutWeights(engine.module, device=CPU, dtype=torch.bfloat16)
        return engine

    saved, loaded = engine_with(1.5), engine_with(1.0)
    with loaded.whole_weights():
        pass
    saved.save_state(tmp_path)
    loaded.load_state(tmp_path)
    with loaded.whole_weights() as policy:
        own = dict(policy.named_parameters())
    assert all(torch.equal(own[n], p.bfloat16()) for n, p in saved.module.named_parameters())


def test_a_frozen_tower_of_the_same_dtype_is_shared():
    model = load_model("tiny")
    freeze_vision_tower(model)
    policy = Policy(model)
    for dtype, shared in ((torch.float32, True), (torch.bfloat16, False)):
        made = RolloutWeights(policy, device=CPU, dtype=dtype).policy()
        assert made.vision_frozen
        towers = (list(core(p.model).visual.parameters()) for p in (made, policy))
        assert all((a is b) == shared and a.dtype == dtype for a, b in zip(*towers, strict=True))
        language = {id(p) for p in core(model).language_model.parameters()}
        assert not any(id(p) in language for p in made.parameters())
        assert made.head.weight is core(made.model).get_input_embeddings().weight  # tied
    trained = Policy(load_model("tiny"))
    assert not RolloutWeights(trained, device=CPU, dtype=torch.float32).policy().vision_frozen


def test_copy_in_bf16_of_float32_weights_decodes_as_rounded_weights(processor, prompts):
    policy = Policy(load_model("tiny")).eval()
    rounded = copy.deepcopy(policy).bfloat16()
    made = RolloutWeights(policy, device=CPU, dtype=torch.bfloat16).policy()
    out, expected = (answers(p, processor, prompts) for p in (made, rounded))
    assert (out.completion_ids == expected.completion_ids).float().mean() > 0.9  # ties may flip
    assert next(policy.parameters()).dtype == torch.float32


def test_freed_copy_is_filled_again_and_graphs_are_captured_again(monkeypatch, processor, prompts):
    class Eager:
        def __init__(self, run, pool, stream):
            captured.append(self)
            self.replay = run

    captured = []
    monkeypatch.setattr(graphs_module, "capture_graph", Eager)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    policy = Policy(load_model("tiny")).eval()
    expected = answers(policy, processor, prompts)
    for offload in (False, True):
        weights = RolloutWeights(policy, device=CPU, dtype=torch.float32, offload=offload)
        rollout = NativeRollout(
            lambda made=weights: nullcontext(made.policy()),
            processor.tokenizer,
            device=CPU,
            graphs=True,
        )
        held, before = [], None
        for _ in range(3):
            captured.clear()
            out = rollout.generate(prompts, 2, Sampling(16, greedy=True))
            assert torch.equal(out.completion_ids, expected.completion_ids)
            addresses = [p.data_ptr() for p in weights.policy().parameters()]
            assert bool(captured) == (addresses != before)
            assert before is None or offload or addresses == before
            before = addresses
            weights.release()
            sizes = [storage.nbytes() for storage, _ in weights._memory.values()]
            assert any(sizes) != offload
            # What training may take meanwhile keeps the copy from its old addresses.
            held.append([torch.empty(n, dtype=torch.uint8) for _, n in weights._memory.values()])


@pytest.mark.parametrize("bf16", [False, True])
def test_rollouts_go_on_without_a_copy_that_does_not_fit(monkeypatch, caplog, bf16):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(weights_module, "_make_copy", full)
    engine = PlainEngine(Policy(load_model("tiny")), SETTINGS, device=CPU, bf16=bf16)
    engine._copy = RolloutWeights(engine.module, device=CPU, dtype=torch.bfloat16)
    for _ in range(2):
        with engine.whole_weights() as policy:
            assert policy is engine.module and torch.is_autocast_enabled("cpu") == bf16
        engine._copy.update()
        engine.free_rollout_weights()
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "the rollouts' copy of the weights doesn't fit into memory"
    ]
    partitioned = RolloutWeights(
        engine.module, device=CPU, dtype=torch.bfloat16, gather=lambda p: nullcontext()
    )
    with pytest.raises(torch.OutOfMemoryError):
        partitioned.policy()


def test_rollouts_go_on_without_a_freed_copy_that_no_longer_fits(monkeypatch):
    policy = Policy(load_model("tiny"))
    weights = RolloutWeights(policy, device=CPU, dtype=torch.bfloat16, offload=True)
    assert weights.policy() is not policy
    weights.release()
    storages = list(weights._memory.items())
    key, (storage, size) = storages[len(storages) // 2]  # some fit

    class Full:
        nbytes = storage.nbytes

        def resize_(self, size):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(weights._memory, key, (Full(), size))
    for _ in range(2):
        assert weights.policy() is policy
        weights.update()
        weights.release()


def test_adapter_weights_alone_are_read_again_after_an_update(monkeypatch, processor):
    """Frozen weights don't change, so ZeRO-3 doesn't gather those without an adapter twice."""
    policy = adapted("qwen2_vl", processor)
    gathered = []
    weights = RolloutWeights(
        policy,
        device=CPU,
        dtype=torch.float32,
        gather=lambda parameters: nullcontext(gathered.append(len(parameters))),
    )
    weights.policy()
    layers = policy.config.text_config.num_hidden_layers
    whole = len(list(base(policy.model).parameters()))
    assert sum(gathered) == whole
    gathered.clear()
    weights.update()
    weights.policy()
    assert sum(gathered) == 3 * 3 * layers  # weight, A and B of three projections a layer
    gathered.clear()
    weights.policy()
    assert not gathered
