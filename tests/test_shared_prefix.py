"""A prompt that is read once gives what a prompt read G times gives, up to float32 rounding."""

from __future__ import annotations

import copy
import dataclasses
import sys
from contextlib import nullcontext

import pytest
import torch
from helpers import (
    CPU,
    largest_difference,
    make_prompts,
    make_sample,
    make_state,
    parameters,
)

from virft_fast.algorithms.grpo import train_step
from virft_fast.algorithms.step import Chunk, plan_microbatches
from virft_fast.config import GRPOConfig
from virft_fast.models import shared_prefix
from virft_fast.models.qwen_vl import Policy, add_lora, core, freeze_vision_tower, load_model
from virft_fast.models.shared_prefix import Group, PackedAttention
from virft_fast.optimizer import decay_groups
from virft_fast.rollout import Sampling
from virft_fast.rollout.backends import make_rollout

G = 4
KERNELS = sys.modules["virft_fast.kernels.prefix_attention"]  # whose name is the function's, too


@pytest.fixture(scope="module")
def policy():
    return Policy(load_model("tiny")).eval()


def draw(policy, processor, prompts, num_generations=G, length=24):
    """Completions of different lengths by the policy itself, a list for each prompt."""
    rollout = make_rollout("native", lambda: nullcontext(policy), processor.tokenizer, device=CPU)
    out = rollout.generate(prompts, num_generations, Sampling(length, seed=1))
    generator = torch.Generator().manual_seed(0)
    cut = torch.randint(1, length + 1, (len(out.texts),), generator=generator)
    rows = [
        ids[mask][:most]
        for ids, mask, most in zip(
            out.completion_ids, out.completion_mask, cut.tolist(), strict=True
        )
    ]
    return [rows[i : i + num_generations] for i in range(0, len(rows), num_generations)]


@pytest.fixture(scope="module")
def completions(policy, processor, prompts):
    return draw(policy, processor, prompts)


def collate(policy, prompts, completions, packed):
    return policy.collate(prompts, completions, pad_token_id=0, device=CPU, packed=packed)


def logps_and_gradient(policy, prompts, completions, *, packed, kind="two_part", weights=None):
    """Log-probs, and the gradient of a sum of them with random weights."""
    policy.prefix_attention = kind
    policy.zero_grad()
    logps, _ = policy(collate(policy, prompts, completions, packed))
    if weights is None:
        weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(7))
    (logps * weights).sum().backward()
    gradient = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    return logps.detach(), gradient


def relative_error(a, b):
    assert a.keys() == b.keys()
    flat = lambda grads: torch.cat([grads[name].flatten() for name in sorted(grads)])  # noqa: E731
    return float((flat(a) - flat(b)).norm() / flat(b).norm())


@pytest.mark.parametrize("kind", ["two_part", "dense"])
def test_logps_and_gradient_equal_the_unshared_ones(policy, prompts, completions, kind):
    logps, gradient = logps_and_gradient(policy, prompts, completions, packed=True, kind=kind)
    expected, unshared = logps_and_gradient(policy, prompts, completions, packed=False)
    assert (logps - expected).abs().max() <= 1e-5
    assert relative_error(gradient, unshared) <= 1e-5


def test_the_kernel_is_the_default_on_cuda():
    for device, kind in (("cuda", "fused"), ("cpu", "two_part")):
        assert shared_prefix.core_kind("auto", torch.device(device)) == kind
        assert shared_prefix.core_kind("dense", torch.device(device)) == "dense"
    assert GRPOConfig().prefix_attention == Policy(load_model("tiny")).prefix_attention == "auto"


@pytest.mark.parametrize("kind", ["two_part", "fused", "dense"])
def test_rollouts_read_prompts_with_the_same_kind(monkeypatch, processor, prompts, kind):
    policy, kinds = Policy(load_model("tiny"), prefix_attention=kind), []
    make = PackedAttention.__init__

    def noted(self, groups, device, kind="auto", *rest):
        kinds.append(kind)
        make(self, groups, device, kind, *rest)

    monkeypatch.setattr(PackedAttention, "__init__", noted)
    made = draw(policy, processor, prompts, length=4)
    assert set(kinds) == {kind} and len(made) == 4


@torch.no_grad()
def test_flex_attention_equals_the_dense_mask(policy, prompts, completions):
    inputs = collate(policy, prompts, completions, packed=True)
    logps = {}
    for kind in ("flex", "dense"):
        policy.prefix_attention = kind
        logps[kind], _ = policy(inputs)
    policy.prefix_attention = "auto"
    assert (logps["flex"] - logps["dense"]).abs().max() <= 1e-5


@torch.no_grad()
def test_another_completion_changes_nothing_at_all(policy, prompts, completions):
    """Isolation: completion 3 replaced by other tokens, the others' log-probs stay bit for bit."""
    changed = [list(group) for group in completions]
    changed[1][2] = torch.randint(
        260, 600, changed[1][2].shape, generator=torch.Generator().manual_seed(5)
    )
    before, _ = policy(collate(policy, prompts, completions, packed=True))
    after, _ = policy(collate(policy, prompts, changed, packed=True))
    lengths = [len(ids) for group in completions for ids in group]
    parts = [t.split(lengths) for t in (before, after)]
    row = G + 2
    assert not torch.equal(parts[0][row], parts[1][row])
    for number, (a, b) in enumerate(zip(*parts, strict=True)):
        assert number == row or torch.equal(a, b)


@torch.no_grad()
def test_completions_in_another_order_give_the_same(policy, prompts, completions):
    order = [2, 0, 3, 1]
    moved = [[group[i] for i in order] for group in completions]
    logps, _ = policy(collate(policy, prompts, completions, packed=True))
    permuted, _ = policy(collate(policy, prompts, moved, packed=True))
    by_row = logps.split([len(ids) for group in completions for ids in group])
    moved_rows = permuted.split([len(ids) for group in moved for ids in group])
    for b in range(len(prompts)):
        for place, i in enumerate(order):
            a, expected = moved_rows[b * G + place], by_row[b * G + i]
            torch.testing.assert_close(a, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_one_completion_equals_the_plain_forward(policy, prompts, completions):
    alone = [group[:1] for group in completions]
    logps, gradient = logps_and_gradient(policy, prompts, alone, packed=True)
    expected, unshared = logps_and_gradient(policy, prompts, alone, packed=False)
    assert (logps - expected).abs().max() <= 1e-5
    assert relative_error(gradient, unshared) <= 1e-5


def test_completions_of_one_token_add_nothing_to_the_row(policy, prompts, completions):
    """All of them are predicted by the prompt's last token, whose gradients add up."""
    short = [[ids[:1] for ids in group] for group in completions]
    inputs = collate(policy, prompts, short, packed=True)
    assert inputs.input_ids.shape[1] == sum(len(prompt.input_ids) for prompt in prompts)
    logps, gradient = logps_and_gradient(policy, prompts, short, packed=True)
    expected, unshared = logps_and_gradient(policy, prompts, short, packed=False)
    assert (logps - expected).abs().max() <= 1e-5
    assert relative_error(gradient, unshared) <= 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_bitwise_the_same(prompts, completions, reentrant):
    results = []
    for checkpointing in (False, True):
        model = load_model("tiny").train()
        if checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": reentrant}
            )
        results.append(logps_and_gradient(Policy(model), prompts, completions, packed=True))
    (logps, gradient), (again, recomputed) = results
    assert torch.equal(logps, again)
    assert largest_difference(gradient, recomputed) == 0


def test_bf16_is_as_close_to_fp32_as_the_unshared_pass(policy, prompts, completions):
    """Against float32 of the same weights: the noise of bf16 itself is the measure."""
    narrow = copy.deepcopy(policy).bfloat16()
    wide = copy.deepcopy(narrow).float()
    exact, exact_gradient = logps_and_gradient(wide, prompts, completions, packed=False)

    def noise(packed):
        logps, gradient = logps_and_gradient(narrow, prompts, completions, packed=packed)
        gradient = {name: grad.float() for name, grad in gradient.items()}
        error = (logps.float() - exact).abs()
        return float(error.mean()), float(error.max()), relative_error(gradient, exact_gradient)

    for shared, unshared in zip(noise(True), noise(False), strict=True):
        assert shared <= 1.25 * unshared


def test_lora_and_its_off_state(prompts, completions):
    pytest.importorskip("peft")
    torch.manual_seed(0)
    policy = Policy(add_lora(load_model("tiny"), r=4, alpha=8, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    logps, gradient = logps_and_gradient(policy, prompts, completions, packed=True)
    expected, unshared = logps_and_gradient(policy, prompts, completions, packed=False)
    assert (logps - expected).abs().max() <= 1e-5
    assert relative_error(gradient, unshared) <= 1e-5
    with policy.model.disable_adapter(), torch.no_grad():
        off, _ = policy(collate(policy, prompts, completions, packed=True))
        base, _ = Policy(load_model("tiny")).eval()(
            collate(policy, prompts, completions, packed=True)
        )
    torch.testing.assert_close(off, base)


def test_cached_features_of_a_frozen_tower_are_bitwise_the_same(prompts, completions):
    model = load_model("tiny").eval()
    freeze_vision_tower(model)
    policy = Policy(model)
    inputs = collate(policy, prompts, completions, packed=True)
    features = policy.image_features(inputs)
    with torch.no_grad():
        plain, cached = policy(inputs)[0], policy(inputs, image_features=features)[0]
    assert torch.equal(plain, cached)


def test_attention_falls_back_without_a_core(prompts):
    """A plain call of the routed model is the call it was before, padding and all."""
    routed, plain = load_model("tiny").eval(), load_model("tiny").eval()
    Policy(routed)
    ids = torch.randint(300, 600, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(routed(input_ids=ids, attention_mask=mask).logits, expected)


def test_attention_that_is_fallen_back_on_finds_its_own_name(prompts):
    """As transformers' flash functions do, which choose their kernel by it."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = []

    def spy(module, *args, **options):
        some = (module.config._attn_implementation, module.layer_idx, module.is_causal)
        linear = next(part for part in module.modules() if isinstance(part, torch.nn.Linear))
        seen.append((*some, linear.in_features, module.config.hidden_size))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **options)

    AttentionInterface.register("flash_spy", spy)
    model, plain = load_model("tiny").eval(), load_model("tiny").eval()
    text = core(model).language_model.config
    text._attn_implementation = "flash_spy"
    Policy(model, prefix_sharing="off")
    ids = prompts[2].input_ids[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    width = text.hidden_size
    assert seen == [
        ("flash_spy", layer, True, width, width) for layer in range(text.num_hidden_layers)
    ]


def test_eager_attention_can_be_shared_too(prompts, completions):
    policy = Policy(load_model("tiny", attn_implementation="eager")).eval()
    with torch.no_grad():
        shared, _ = policy(collate(policy, prompts, completions, packed=True))
        plain, _ = policy(collate(policy, prompts, completions, packed=False))
    assert (shared - plain).abs().max() <= 1e-5


def test_saved_config_does_not_name_the_routing(tmp_path):
    model = load_model("tiny")
    Policy(model)
    model.save_pretrained(tmp_path)
    assert "shared_prefix" not in (tmp_path / "config.json").read_text()
    assert load_model(str(tmp_path)).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"use_bidirectional_attention": True}, "its tokens see those after them"),
        ({"attn_logit_softcapping": 30.0}, "its attention has sinks or soft-capped scores"),
    ],
)
def test_model_that_cannot_share_is_refused_with_the_reason(caplog, change, reason):
    model = load_model("tiny")
    for name, value in change.items():
        setattr(core(model).language_model.config, name, value)
    with pytest.raises(ValueError, match=f"{reason}.*--prefix_sharing off"):
        Policy(model, prefix_sharing="on")
    with caplog.at_level("WARNING"):
        policy = Policy(model, prefix_sharing="auto")
    assert reason in caplog.text and not policy.shares_prefix
    caplog.clear()
    assert not Policy(model, prefix_sharing="off").shares_prefix
    assert not caplog.text


def test_attention_with_sinks_is_refused():
    """As GPT-OSS has it, whatever its layers' kinds."""
    model = load_model("tiny")
    core(model).language_model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="its attention has sinks"):
        Policy(model, prefix_sharing="on")


def test_attention_that_is_built_in_is_refused():
    model = load_model("tiny")
    core(model).language_model._supports_attention_backend = False
    with pytest.raises(ValueError, match="built in"):
        Policy(model, prefix_sharing="on")


def test_layer_that_bypasses_the_routing_is_noticed(policy, prompts, completions):
    """Somebody patches the model after it was routed: an error, never a wrong gradient."""
    config = core(policy.model).language_model.config
    routed = config._attn_implementation
    config._attn_implementation = "sdpa"
    try:
        with pytest.raises(RuntimeError, match="0 did; pass --prefix_sharing off"):
            policy(collate(policy, prompts, completions, packed=True))
    finally:
        config._attn_implementation = routed


@pytest.mark.parametrize("kind", ["fused", "two_part", "dense", "flex"])
@torch.no_grad()
def test_core_computes_in_the_dtype_of_the_values(kind):
    """Queries and keys that a rotation in float32 has widened are narrowed again."""
    groups, generator = [Group(0, 4, (3, 2))], torch.Generator().manual_seed(0)
    wide = [torch.randn(1, 2, 9, 8, generator=generator) for _ in range(3)]
    narrow = [part.bfloat16() for part in wide]
    expected = PackedAttention(groups, CPU, kind)(0, *narrow, 0.3)
    out = PackedAttention(groups, CPU, kind)(0, *wide[:2], narrow[2], 0.3)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


@torch.no_grad()
def test_under_autocast_the_core_gets_one_dtype(monkeypatch, policy, prompts, completions):
    """The rotation's cosines are float32 there, so it gives queries and keys in float32."""
    given, computed = set(), set()
    call, core_call = PackedAttention.__call__, shared_prefix.two_part_attention

    def attention(self, layer, *states_and_scaling):
        given.update(part.dtype for part in states_and_scaling[:3])
        return call(self, layer, *states_and_scaling)

    def two_part(*states, **options):
        computed.update(part.dtype for part in states)
        return core_call(*states, **options)

    monkeypatch.setattr(policy, "prefix_attention", "two_part")
    monkeypatch.setattr(PackedAttention, "__call__", attention)
    monkeypatch.setattr(shared_prefix, "two_part_attention", two_part)
    exact, _ = policy(collate(policy, prompts, completions, packed=False))
    with torch.autocast("cpu", torch.bfloat16):
        shared, _ = policy(collate(policy, prompts, completions, packed=True))
        unshared, _ = policy(collate(policy, prompts, completions, packed=False))
    assert given == {torch.float32, torch.bfloat16} and computed == {torch.bfloat16}
    noise, ours = (unshared - exact).abs(), (shared - exact).abs()
    assert 0 < ours.mean() <= 1.25 * noise.mean() and ours.max() <= 1.25 * noise.max()


@pytest.mark.parametrize("kind", ["fused", "two_part", "dense", "flex"])
@pytest.mark.parametrize("lengths", [[(3, 3)], [(0, 0, 0)], [(5, 0, 2), (), (1,)], [(), (4, 7)]])
@torch.no_grad()
def test_core_against_a_loop_over_sequences(kind, lengths):
    """Softmax over what each token may see, in float64, one sequence at a time."""
    generator = torch.Generator().manual_seed(0)
    groups, start = [], 0
    for number, group in enumerate(lengths):
        groups.append(Group(start, 4 + number, group))
        start = groups[-1].end
    heads, kv_heads, size = 4, 2, 8
    query = torch.randn(1, heads, start, size, generator=generator)
    key, value = (torch.randn(1, kv_heads, start, size, generator=generator) for _ in range(2))
    out = PackedAttention(groups, CPU, kind)(0, query, key, value, 0.3)

    def softmax(rows, seen):
        q = query[0, :, rows].double()
        k, v = (part[0, :, seen].double().repeat_interleave(2, 0) for part in (key, value))
        scores = q @ k.transpose(1, 2) * 0.3
        length = len(rows)
        causal = torch.ones(length, len(seen), dtype=torch.bool).tril(len(seen) - length)
        return (scores.masked_fill(~causal, -torch.inf).softmax(-1) @ v).transpose(0, 1)

    for group in groups:
        prompt = list(range(group.start, group.first))
        expected = softmax(prompt, prompt)
        torch.testing.assert_close(out[0, prompt].double(), expected, rtol=0, atol=1e-6)
        position = group.first
        for length in group.lengths:
            own = list(range(position, position + length))
            if own:
                expected = softmax(own, prompt + own)
                torch.testing.assert_close(out[0, own].double(), expected, rtol=0, atol=1e-6)
            position += length


# Attention on CUDA


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


def on_cuda(*shape, dtype):
    """(heads, S, E), laid out as a projection of the row's tokens gives it."""
    heads, length, size = shape
    return torch.zeros(length, heads, size, dtype=dtype).as_subclass(OnCuda).transpose(0, 1)


@pytest.fixture
def handed_over(monkeypatch):
    """Sizes, strides and whether keys are shared, of each call of torch's attention. Flash
    attention accepts what it accepts on a GPU since sm_80."""
    calls = []

    def attention(query, key, value, attn_mask=None, is_causal=False, scale=None, **options):
        parts = [(part.shape, part.stride()) for part in (query, key, value)]
        calls.append((*parts, is_causal, options.get("enable_gqa", False)))
        return torch.zeros(query.shape, dtype=query.dtype)

    def flash(params):
        assert params.enable_gqa and params.attn_mask is None and not params.is_causal
        return params.query.dtype == params.key.dtype == params.value.dtype == torch.bfloat16

    monkeypatch.setattr(shared_prefix.F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(KERNELS, "can_use_flash_attention", flash)
    return calls


@pytest.mark.parametrize(
    ("dtype", "shared"), [(torch.bfloat16, True), (torch.float32, False)], ids=str
)
def test_keys_are_copied_for_query_heads_only_where_cuda_can_not_share_them(
    handed_over, dtype, shared
):
    for length in (100, 101, 150, 199):  # other completions, the same prompt
        layout = KERNELS.PrefixLayout.from_lengths([65], [[length] * 3])
        query = on_cuda(12, layout.num_tokens, 16, dtype=dtype)
        key, value = (on_cuda(2, layout.num_tokens, 16, dtype=dtype) for _ in range(2))
        row = (states.transpose(0, 1) for states in (query, key, value))
        KERNELS.two_part_attention(*row, layout, scaling=0.1)
    assert len(handed_over) == 8
    for _, (key_size, _), (value_size, _), _, gqa in handed_over:
        assert key_size[1] == value_size[1] == (2 if shared else 12) and gqa is shared
    if shared:  # the row's length is in no stride of the prompt's part
        assert len({call for call in handed_over if call[3]}) == 1


@pytest.mark.parametrize(("dtype", "heads"), [(torch.bfloat16, 2), (torch.float32, 4)], ids=str)
def test_other_passes_copy_keys_where_cuda_can_not_share_them(
    monkeypatch, policy, handed_over, dtype, heads
):
    """transformers' own attention would share them, and torch would take its unfused kernel."""
    layer = core(policy.model).language_model.layers[0].self_attn
    query = on_cuda(4, 9, 16, dtype=dtype)[None]
    key, value = (on_cuda(2, 9, 16, dtype=dtype)[None] for _ in range(2))
    shared_prefix.attend("sdpa", layer, query, key, value, None, 0.1)
    (call,) = handed_over
    assert call[1][0][1] == call[2][0][1] == heads and call[4] is (heads == 2)


@pytest.mark.parametrize("backend", ["native", "hf"])
def test_no_pass_can_use_cudnn_attention(monkeypatch, processor, prompts, backend):
    """Neither the tower nor rollouts, training or the reference."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    state = make_state(processor, config={"beta": 0.1}, backend=backend)
    calls, attention = [], shared_prefix.F.scaled_dot_product_attention

    def spy(*args, **options):
        calls.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    train_step(state, prompts)
    assert len(calls) > 20 and not any(calls)


# The step


SMOOTH = {"epsilon": 1e-3, "learning_rate": 2e-3}


def two_steps(state, prompts):
    return [train_step(state, prompts)[0] for _ in range(2)]


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "gspo"])
def test_steps_with_and_without_sharing_agree(processor, prompts, loss_type, beta):
    """Native rollout and shared prompts against transformers' generate and a row a completion."""
    config = {
        "loss_type": loss_type, "beta": beta, "num_iterations": 2, "num_generations": 4,
        "max_completion_length": 12,
    }  # fmt: skip
    # A KL term grows with the exponential of how far a step went, and rounding with it: shorter
    # steps, and less that they may differ by.
    settings = SMOOTH | {"learning_rate": 5e-4 if beta else 2e-3}
    shared = make_state(processor, config=config, settings=settings, prompts_per_microbatch=4)
    plain = make_state(
        processor, config=config, settings=settings, prompts_per_microbatch=4, backend="hf",
        policy={"prefix_sharing": "off"},
    )  # fmt: skip
    start = parameters(shared.policy)
    ours, oracle = two_steps(shared, prompts), two_steps(plain, prompts)
    assert largest_difference(parameters(shared.policy), start) > 1e-4
    apart = largest_difference(parameters(shared.policy), parameters(plain.policy))
    assert apart <= 1e-5 * settings["learning_rate"] / 2e-3
    for a, b in zip(ours, oracle, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5, rel=1e-5)
        assert a["reward"] == b["reward"]
        assert a["entropy"] == pytest.approx(b["entropy"], abs=1e-4)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo"])
def test_microbatches_by_tokens_change_nothing(processor, prompts, loss_type):
    """Also where a group is too long for one and has to be split."""
    config = {"loss_type": loss_type, "beta": 0.1, "num_generations": 4}
    states = [
        make_state(
            processor, config=config, settings=SMOOTH, prompts_per_microbatch=4,
            max_tokens_per_microbatch=tokens,
        )
        for tokens in (None, 60, 10)
    ]  # fmt: skip
    metrics = [two_steps(state, prompts) for state in states]
    for state, other in zip(states[1:], metrics[1:], strict=True):
        assert largest_difference(parameters(states[0].policy), parameters(state.policy)) <= 1e-5
        for a, b in zip(metrics[0], other, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_groups_of_equal_rewards_are_never_read(processor, prompts):
    """Without a KL term they are left out of the forward pass; the step is the same."""

    def reward(prompts, completions, **columns):
        values = [len(set(c[0]["content"])) / 10 for c in completions]
        return [1.0] * 4 + values[4:]  # the first group learns nothing

    read = []
    results = []
    for keep in (False, True):
        state = make_state(
            processor, config={"beta": 0.0, "num_generations": 4}, settings=SMOOTH,
            reward=reward, prompts_per_microbatch=4,
        )  # fmt: skip
        if keep:
            state.config.beta = 1e-30  # as good as none, but everything is read
            state.reference = lambda inputs, **kw: (torch.zeros(len(inputs.completion_ids)), None)
        core(state.policy.model).language_model.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: (
                read.append(args[0].shape[1]) if torch.is_grad_enabled() else None
            ),
            with_kwargs=True,
        )
        results.append((train_step(state, prompts)[0], parameters(state.policy)))
    (metrics, dropped), (_, kept) = results
    assert metrics["dropped_fraction"] >= 0.25
    assert read[0] < read[1] - len(prompts[0].input_ids)
    assert largest_difference(dropped, kept) <= 1e-6


def test_step_without_anything_to_learn_still_steps(processor, prompts):
    """Every group of equal rewards: one empty microbatch, a zero gradient, moments that decay."""
    state = make_state(
        processor, config={"beta": 0.0}, reward=lambda prompts, completions, **c: [1.0] * 8,
        prompts_per_microbatch=4,
    )  # fmt: skip
    before = parameters(state.policy)
    metrics, _ = train_step(state, prompts)
    assert metrics["dropped_fraction"] == 1 and metrics["grad_norm"] == 0
    assert largest_difference(before, parameters(state.policy)) == 0
    assert len(state.engine.optimizer.state) == sum(
        len(group["params"]) for group in decay_groups(state.policy, 0.0)
    )


def test_metrics_of_rollout_against_training(processor, prompts):
    metrics, _ = train_step(make_state(processor, prompts_per_microbatch=4), prompts)
    # What is banned from sampling, special tokens, has a probability of its own in training.
    assert 0 <= metrics["sampling_logp_difference"] < 1e-3
    assert metrics["sampling_ratio_max"] == pytest.approx(1.0, abs=1e-2)
    for name in ("rollout_tokens_per_s", "train_tokens_per_s"):
        assert metrics[name] > 0
    assert 0 < metrics["time/rollout_share"] + metrics["time/train_share"] < 1


PLAN = {"prompt_lengths": [10, 20, 10], "lengths": [5] * 12, "prompts_per_microbatch": 2}
CHUNKS = [Chunk(b, tuple(range(4 * b, 4 * b + 4))) for b in range(3)]


def rows_of(plan):
    return [[(part.prompt, part.rows) for part in parts] for parts in plan]


def test_plan_by_prompts():
    plan = plan_microbatches(CHUNKS, **PLAN, max_tokens=None, shared=True)
    assert [[part.prompt for part in parts] for parts in plan] == [[0, 1], [2]]


def test_plan_by_tokens_keeps_groups_whole():
    """30, 40 and 30 tokens with a shared prompt."""
    assert [len(p) for p in plan_microbatches(CHUNKS, **PLAN, max_tokens=70, shared=True)] == [2, 1]
    assert [len(p) for p in plan_microbatches(CHUNKS, **PLAN, max_tokens=100, shared=True)] == [3]
    # Unshared, padded: 4 * 15, 4 * 25, ...
    plan = plan_microbatches(CHUNKS, **PLAN, max_tokens=100, shared=False)
    assert [len(p) for p in plan] == [1, 1, 1]


def test_plan_splits_a_group_only_where_it_is_too_long_alone():
    plan = plan_microbatches(CHUNKS, **PLAN, max_tokens=35, shared=True)
    assert rows_of(plan) == [
        [(0, (0, 1, 2, 3))], [(1, (4, 5, 6))], [(1, (7,))], [(2, (8, 9, 10, 11))],
    ]  # fmt: skip
    alone = plan_microbatches(CHUNKS[:1], **PLAN, max_tokens=1, shared=True)
    assert rows_of(alone) == [[(0, (row,))] for row in range(4)]


def test_shapes_of_a_packed_row(policy, prompts, completions):
    """The row holds every prompt once and every completion without its last token."""
    inputs = collate(policy, prompts, completions, packed=True)
    total = sum(len(p.input_ids) for p in prompts)
    total += sum(len(ids) - 1 for group in completions for ids in group)
    assert inputs.input_ids.shape == (1, total) and inputs.position_ids.shape == (3, 1, total)
    assert inputs.groups[-1].end == total
    assert len(inputs.predictors) == len(inputs.completion_ids) == int(inputs.cu_seqlens[-1])
    assert dataclasses.asdict(inputs.groups[0])["start"] == 0
    assert shared_prefix.unreachable(core(policy.model).language_model) is None


def test_several_images_in_a_prompt(policy, processor, completions):
    prompts = make_prompts(
        processor, make_sample(8, [(56, 56), (112, 84), (84, 56)], "Which one is the largest?")
    )
    completions = draw(policy, processor, prompts)
    logps, gradient = logps_and_gradient(policy, prompts, completions, packed=True)
    expected, unshared = logps_and_gradient(policy, prompts, completions, packed=False)
    assert (logps - expected).abs().max() <= 1e-5
    assert relative_error(gradient, unshared) <= 1e-5
