"""Kernels against a float64 oracle, gradcheck, each other and the invariants they promise."""

import inspect
import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from virft_fast.kernels import (
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logps,
    logps_and_entropy,
    normalize_then_sum,
    selective_log_softmax,
)
from virft_fast.kernels import linear as linear_module
from virft_fast.kernels.layout import make_layout
from virft_fast.kernels.loss_args import LossArgs
from virft_fast.kernels.reference import grpo_loss_reference
from virft_fast.kernels.token_loss import token_loss

N, T, V, D = 4, 5, 17, 6
NAN, INF = float("nan"), float("inf")
LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo", "sapo", "luspo", "vespo"]
LEVELS = ["token", "sequence"]
KLS = ["k1", "k2", "k3"]


def make_problem(seed=0, dtype=torch.float64):
    """Every mask length from 0 to T, ratios on both sides of the clip range."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, T, D, generator=g, dtype=torch.float64)
    weight = 0.5 * torch.randn(V, D, generator=g, dtype=torch.float64)
    bias = torch.randn(V, generator=g, dtype=torch.float64)
    ids = torch.randint(V, (N, T), generator=g)
    mask = torch.arange(T) < torch.tensor([T, 3, 0, 1])[:, None]
    logps = oracle_logps(hidden @ weight.T + bias, ids)[0]
    old = logps + 0.4 * torch.randn(N, T, generator=g, dtype=torch.float64)
    ref = logps + 0.4 * torch.randn(N, T, generator=g, dtype=torch.float64)
    advantages = torch.randn(N, generator=g, dtype=torch.float64)
    tensors = [x.to(dtype) for x in (hidden, weight, bias, old, ref, advantages)]
    return (*tensors[:3], ids, mask, *tensors[3:])


def oracle_logps(logits, ids, temperature=1.0):
    z = logits.double() / temperature
    p = z.exp() / z.exp().sum(-1, keepdim=True)
    return p.gather(-1, ids[..., None])[..., 0].log(), -(p * p.log()).sum(-1)


def oracle_loss(
    logps, mask, old, ref, advantages, loss_type, level, kl, beta=0.1, low=0.2, high=0.3, delta=None
):
    """One token after the other; the differentiable part in torch scalars."""
    total, counts = 0.0, mask.sum(1).tolist()
    for i in range(N):
        tokens = [t for t in range(T) if mask[i, t]]
        sequence = 0.0
        for t in tokens:
            log_ratio = logps[i, t] - old[i, t]
            if level == "sequence" or loss_type == "gspo":
                log_ratio = sum(logps[i, s] - old[i, s] for s in tokens) / len(tokens)
            r, a = log_ratio.exp(), advantages[i]
            if loss_type == "cispo":
                term = -min(r.item(), high) * a * logps[i, t]
            elif loss_type == "sapo":
                t_a = 1.0 if a > 0 else 1.05
                term = -4 / t_a / (1 + (-t_a * (r - 1)).exp()) * a
            elif loss_type == "vespo":
                w = math.exp(sum((logps[i, s] - old[i, s]).item() for s in tokens))
                k, rate = (2, 3) if a >= 0 else (3, 2)
                term = -math.exp(rate) * w**k * math.exp(-rate * w) * a * logps[i, t]
            else:
                # The gradient flows unless the clipped branch is strictly the smaller objective.
                clipped = min(max(r.item(), 1 - low), 1 + high)
                free = r if delta is None or r <= delta else r.detach() * 0 + delta
                term = -free * a if free * a <= clipped * a else -(clipped * a)
            d = ref[i, t] - logps[i, t]
            term = term + beta * {"k1": -d, "k2": d * d / 2, "k3": d.exp() - d - 1}[kl]
            sequence = sequence + term
        if loss_type in ("grpo", "gspo", "sapo"):
            total = total + sequence / max(len(tokens), 1) / N
        elif loss_type == "luspo":
            total = total + sequence / N
        elif loss_type == "dr_grpo":
            total = total + sequence / (N * 8)
        else:
            total = total + sequence / sum(counts)
    return total


def loss_options(problem, **options):
    *_, old, ref, advantages = problem
    values = {
        "advantages": advantages,
        "old_logps": old,
        "ref_logps": ref,
        "beta": 0.1,
        "epsilon_high": 0.3,
        "max_completion_length": 8,
    }
    return values | options


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype,atol", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_logps_and_entropy_equal_the_oracle(dtype, atol, temperature):
    logits = 3 * torch.randn(N, T, V, generator=torch.Generator().manual_seed(0), dtype=dtype)
    ids = torch.arange(N * T).view(N, T) % V  # id 0 and id V-1 included
    logps, entropy = logps_and_entropy(logits, ids, temperature=temperature)
    expected = oracle_logps(logits, ids, temperature)
    assert logps.dtype == entropy.dtype == dtype
    torch.testing.assert_close(logps.double(), expected[0], atol=atol, rtol=0)
    torch.testing.assert_close(entropy.double(), expected[1], atol=atol, rtol=0)
    alone = selective_log_softmax(logits, ids, temperature=temperature)
    assert torch.equal(alone, logps)


def test_bf16_logits_give_fp32_logps_and_bf16_gradients():
    logits = torch.randn(3, V).bfloat16().requires_grad_()
    logps, entropy = logps_and_entropy(logits, torch.tensor([0, 5, V - 1]))
    expected = oracle_logps(logits.detach(), torch.tensor([0, 5, V - 1]))[0]
    torch.testing.assert_close(logps.detach().double(), expected, atol=1e-5, rtol=0)
    (logps.sum() + entropy.sum()).backward()
    assert logps.dtype == entropy.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_several_tokens_of_a_row(dtype, temperature):
    """One of them twice, one banned; float32 log-probs, and gradients rounded once."""
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(4, 3, V, generator=g)).to(dtype)
    logits[..., 5] = -INF
    index = torch.randint(V, (4, 3, 6), generator=g)
    index[..., 3], index[..., 4] = index[..., 1], 5
    up = torch.randn(4, 3, 6, generator=g, dtype=torch.float64)
    up[..., 4] = 0
    exact = logits.double().requires_grad_()
    wanted = (exact / temperature).log_softmax(-1).gather(-1, index)
    (grad,) = gradients((wanted.where(wanted > -INF, 0.0) * up).sum(), exact)
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        ours = selective_log_softmax(leaf, index, temperature=temperature, inplace=inplace)
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(ours.double(), wanted, atol=1e-5, rtol=0)
        one = selective_log_softmax(logits, index[..., 2], temperature=temperature)
        assert torch.equal(ours[..., 2], one)
        (got,) = gradients((ours.where(ours > -INF, 0.0) * up.to(ours.dtype)).sum(), leaf)
        rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 1e-5)
        torch.testing.assert_close(got.double(), grad, atol=1e-6, rtol=1.01 * rounding)


def test_several_tokens_of_no_rows():
    logits = torch.zeros(2, 0, 5, requires_grad=True)
    logps = selective_log_softmax(logits, torch.zeros(2, 0, 3, dtype=torch.long))
    logps.sum().backward()
    assert logps.shape == (2, 0, 3) and logits.grad.shape == logits.shape


def test_gradcheck_of_several_tokens():
    logits = torch.randn(5, V, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[1, 2, 1]] * 5)
    assert torch.autograd.gradcheck(lambda x: selective_log_softmax(x, ids), logits)


def test_a_mask_of_numbers_is_that_of_bools():
    problem = make_problem()
    hidden, weight, _, ids, mask, *_ = problem
    options = loss_options(problem)
    expected = linear_grpo_loss(hidden, weight, ids, mask, **options).loss
    for dtype in (torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.float64):
        assert linear_grpo_loss(hidden, weight, ids, mask.to(dtype), **options).loss == expected


def test_a_sharded_head_is_named():
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        hidden, weight = torch.zeros(2, 3, 5), torch.zeros(4, 5)
        sharded = distribute_tensor(weight, init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"weight: .* DTensor.* pass weight.full_tensor"):
            linear_grpo_loss(hidden, sharded, IDS, MASK, advantages=ONES)
        assert linear_logps(hidden, sharded.full_tensor(), IDS)[0].isfinite().all()
    finally:
        destroy_process_group()


def test_torch_func_differentiates_once():
    problem = make_problem(dtype=torch.float32)
    hidden, weight, bias, ids, mask, *_ = problem
    options = loss_options(problem, entropy_coef=0.1)
    logits = hidden @ weight.T + bias
    for function, inputs in (
        (lambda x: grpo_loss(x, ids, mask, **options).loss, (logits,)),
        (lambda h, w: linear_grpo_loss(h, w, ids, mask, bias=bias, **options).loss,
         (hidden, weight)),
        (lambda h, w: sum(x.sum() for x in linear_logps(h, w, ids)), (hidden, weight)),
        (lambda x: logps_and_entropy(x, ids)[1].sum(), (logits,)),
        (lambda x: selective_log_softmax(x, ids[..., None]).sum(), (logits,)),
    ):  # fmt: skip
        leaves = [x.clone().requires_grad_() for x in inputs]
        wanted = gradients(function(*leaves), *leaves)
        numbers = tuple(range(len(inputs)))
        for got, value in zip(torch.func.grad(function, numbers)(*inputs), wanted, strict=True):
            torch.testing.assert_close(got, value)
        _, pull = torch.func.vjp(function, *inputs)
        for got, value in zip(pull(torch.tensor(2.0)), wanted, strict=True):
            torch.testing.assert_close(got, 2 * value)


@pytest.mark.parametrize(
    ("options", "packed"),
    [({}, True), ({"importance_sampling_level": "sequence", "use_bias_correction_kl": True}, False),
     ({"top_entropy_quantile": 0.5, "entropy_coef": 0.1, "loss_type": "sapo"}, False),
     ({"off_policy_mask_threshold": 0.02, "loss_type": "vespo", "beta": 0.0}, True)],
)  # fmt: skip
def test_compile_takes_the_whole_loss(options, packed):
    """In one graph, masked NaN included."""
    problem = make_problem(dtype=torch.float32)
    hidden, weight, bias, ids, mask, *_ = problem
    hidden = torch.where(mask[..., None], hidden, NAN)
    options = loss_options(problem, **options)
    layout = (ids, mask)
    if packed:
        offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
        hidden, layout = hidden[mask], (ids[mask], None)
        options |= {name: options[name][mask] for name in ("old_logps", "ref_logps")}
        options |= {"cu_seqlens": offsets}
    for function, inputs in (
        (lambda h, w: linear_grpo_loss(h, w, *layout, bias=bias, chunk_tokens=6, **options),
         (hidden, weight)),
        (lambda x: grpo_loss(x, *layout, **options), (hidden @ weight.T + bias,)),
    ):  # fmt: skip
        torch._dynamo.reset()
        leaves = [x.clone().requires_grad_() for x in inputs]
        wanted, compiled = function(*leaves), torch.compile(
            function, fullgraph=True, backend="aot_eager"
        )(*leaves)  # fmt: skip
        torch.testing.assert_close(compiled.loss, wanted.loss)
        torch.testing.assert_close(compiled.logps, wanted.logps)
        for got, value in zip(
            gradients(compiled.loss, *leaves), gradients(wanted.loss, *leaves), strict=True
        ):
            torch.testing.assert_close(got, value)


def test_compile_generates_code_for_the_loss_and_the_log_probs():
    problem = make_problem(dtype=torch.float32)
    hidden, weight, _, ids, mask, *_ = problem
    options = loss_options(problem)

    def run(h, w):
        several = selective_log_softmax(h @ w.T, ids[..., None].expand(N, T, 2))
        return linear_grpo_loss(h, w, ids, mask, **options).loss + several.sum()

    torch._dynamo.reset()
    results = []
    for function in (run, torch.compile(run, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        value = function(*leaves)
        results.append((value, *gradients(value, *leaves)))
    for got, value in zip(*results, strict=True):
        torch.testing.assert_close(got, value)


def test_gradcheck_of_logps_and_entropy():
    logits = torch.randn(5, V, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(V, (5,))
    assert torch.autograd.gradcheck(lambda x: logps_and_entropy(x, ids, temperature=0.8), logits)
    assert torch.autograd.gradcheck(lambda x: selective_log_softmax(x, ids), logits)


def test_gradcheck_of_linear_logps():
    hidden, weight, bias, ids, *_ = make_problem()
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]

    def run(h, w, b):
        return linear_logps(h, w, ids, bias=b, temperature=0.8, chunk_tokens=3)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("level", LEVELS)
def test_soft_capped_logits_equal_those_that_are_formed(level):
    """Log-probs, losses and gradients; the largest logits are far beyond the cap."""
    problem = make_problem(seed=3)
    hidden, weight, bias, ids, mask, *_ = problem
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    options = {"temperature": 0.9, "importance_sampling_level": level}
    options = loss_options(problem, **options)
    head = {"bias": bias, "softcap": 1.5}
    logits = 1.5 * ((hidden @ weight.T + bias) / 1.5).tanh()
    expected = grpo_loss(logits, ids, mask, **options)
    wanted = gradients(expected.loss, *inputs)
    for function in (partial(linear_grpo_loss, chunk_tokens=3), grpo_loss_reference):
        result = function(hidden, weight, ids, mask, **head, **options)
        torch.testing.assert_close(result.loss, expected.loss)
        torch.testing.assert_close(gradients(result.loss, *inputs), wanted)
    logps, entropy = linear_logps(hidden, weight, ids, **head, temperature=0.9, chunk_tokens=3)
    logits = 1.5 * ((hidden @ weight.T + bias) / 1.5).tanh()
    formed, spread = logps_and_entropy(logits, ids, temperature=0.9)
    torch.testing.assert_close((logps, entropy), (formed, spread))
    wanted = gradients(formed.sum() + spread.sum(), *inputs)
    torch.testing.assert_close(gradients(logps.sum() + entropy.sum(), *inputs), wanted)
    with pytest.raises(ValueError, match="softcap: expected a number above 0 or None, got 0.0"):
        linear_logps(hidden, weight, ids, softcap=0.0)


@pytest.mark.parametrize("scale", [0.0, 1.0, 80.0, 1e4])
def test_invariants(scale):
    logits = scale * torch.randn(64, V, generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()
    logps, entropy = logps_and_entropy(logits, torch.arange(64) % V)
    assert (logps <= 0).all() and (entropy >= 0).all() and (entropy <= math.log(V)).all()
    (grad,) = gradients(logps.sum() + entropy.sum(), logits)
    # Adding a constant to a row changes nothing, so the gradient sums to 0 over it.
    assert grad.isfinite().all() and grad.sum(-1).abs().max() < 1e-4


def test_vocabulary_of_one():
    logits = torch.randn(3, 1, requires_grad=True)
    logps, entropy = logps_and_entropy(logits, torch.zeros(3, dtype=torch.int64))
    (grad,) = gradients(logps.sum() + entropy.sum(), logits)
    assert logps.tolist() == entropy.tolist() == [0, 0, 0] and (grad == 0).all()


def test_banned_tokens_have_no_share():
    logits = torch.tensor([[0.0, 0.0, -INF]], requires_grad=True)
    logps, entropy = logps_and_entropy(logits, torch.tensor([0]))
    assert logps.item() == pytest.approx(-math.log(2))
    assert entropy.item() == pytest.approx(math.log(2))
    (grad,) = gradients(logps.sum() + entropy.sum(), logits)
    torch.testing.assert_close(grad, torch.tensor([[0.5, -0.5, 0.0]]))


def test_advantages_by_hand():
    # [1, 3]: mean 2, unbiased std sqrt(2); [0, 4]: mean 2, std sqrt(8).
    rewards = torch.tensor([1.0, 3, 0, 4], dtype=torch.float64)
    a, b = 1 / (math.sqrt(2) + 0.5), 2 / (math.sqrt(8) + 0.5)
    out = group_advantages(rewards, 2, eps=0.5)
    torch.testing.assert_close(out, torch.tensor([-a, a, -b, b], dtype=torch.float64))
    assert group_advantages(rewards, 2, scale_rewards="none").tolist() == [-1, 1, -2, 2]
    batch = group_advantages(rewards, 2, scale_rewards="batch", eps=1e-4)
    expected = torch.tensor([-1.0, 1, -2, 2], dtype=torch.float64) / (rewards.std() + 1e-4)
    torch.testing.assert_close(batch, expected)


def test_estimators_by_hand():
    """[1, 3, 5]: the others' means are 4, 3, 2; [0, 4] and an unscored row: 4 and 0. Centered:
    -2, 0, 2, -2, 2, whose squares sum to 16: unbiased std 2."""
    rewards = torch.tensor([1.0, 3, 5, 0, 4, NAN])
    rloo = group_advantages(rewards, 3, advantage_estimator="rloo")
    torch.testing.assert_close(rloo, torch.tensor([-3.0, 0, 3, -4, 4, 0]))
    for ignored in ("group", "none"):
        out = group_advantages(
            rewards, 3, advantage_estimator="reinforce_pp", scale_rewards=ignored, eps=0.5
        )
        torch.testing.assert_close(out, torch.tensor([-2.0, 0, 2, -2, 2, 0]) / 2.5)


def test_normalize_then_sum_shows_a_group_whose_sums_are_equal():
    """Two rewards that add up to 1: each is -1, 1 times 1/sqrt(2) in its group, and weights of 2
    and 1 leave half of the first. The other group is equal in both."""
    rewards = torch.tensor([[0.0, 1], [1, 0], [0.3, 0.7], [0.3, 0.7]], dtype=torch.float64)
    assert (group_advantages(rewards.sum(1), 2) == 0).all()
    out = normalize_then_sum(rewards, [2.0, 1.0], 2, eps=1e-12)
    std = math.sqrt(1 / 3)  # of -1, 1, 0, 0 times 1/sqrt(2)
    wanted = torch.tensor([-1, 1, 0, 0], dtype=torch.float64) * math.sqrt(0.5) / std
    torch.testing.assert_close(out, wanted)
    with pytest.raises(ValueError, match=r"expected \(N, 1\), one column for each weight"):
        normalize_then_sum(rewards, [1.0], 2)


SCALINGS = [{"scale_rewards": name} for name in ("group", "batch", "none")]
SCALINGS += [{"advantage_estimator": name} for name in ("rloo", "reinforce_pp")]


@pytest.mark.parametrize("options", SCALINGS)
def test_equal_rewards_give_exactly_zero(options):
    for value in (0.1, 1 / 3, 0.7, 1e6 + 0.1):
        rewards = torch.tensor([value] * 7 + [0.0, 1, 2, 3, 4, 5, 6])
        out = group_advantages(rewards, 7, **options)
        assert (out[:7] == 0).all() and (out[7:] != 0).sum() == 6


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("options", [SCALINGS[0], SCALINGS[2], SCALINGS[3]])
def test_unscored_rows_are_excluded(options, bad):
    rewards = torch.tensor([1.0, bad, 3.0, 2.0, bad, bad, bad, 5.0, bad, bad, bad, bad])
    out = group_advantages(rewards, 4, **options)
    alone = group_advantages(torch.tensor([1.0, 3.0, 2.0]), 3, **options)
    assert out[1] == 0 and (out[4:] == 0).all()
    torch.testing.assert_close(out[[0, 2, 3]], alone)


def test_advantages_edge_shapes():
    assert group_advantages(torch.tensor([3.0, 4.0]), 1).tolist() == [0, 0]
    assert group_advantages(torch.zeros(0), 8).shape == (0,)
    for options in SCALINGS:
        assert group_advantages(torch.tensor([NAN, 1.0]), 1, **options).tolist() == [0, 0]


@pytest.mark.parametrize("delta", [None, 1.1])
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradient_equal_the_oracle(loss_type, level, kl, delta):
    problem = make_problem()
    hidden, weight, bias, ids, mask, old, ref, advantages = problem
    logits = (hidden @ weight.T + bias).requires_grad_()
    options = {"loss_type": loss_type, "importance_sampling_level": level, "kl": kl, "delta": delta}
    high = 1.1 if loss_type == "cispo" else 0.3  # ratios on both sides of the cap
    options["epsilon_high"] = high
    ours = grpo_loss(logits, ids, mask, **loss_options(problem, **options))
    logps, entropy = oracle_logps(logits, ids)
    expected = oracle_loss(
        logps, mask, old, ref, advantages, loss_type, level, kl, high=high, delta=delta
    )
    torch.testing.assert_close(ours.loss, expected)
    torch.testing.assert_close(gradients(ours.loss, logits), gradients(expected, logits))
    torch.testing.assert_close(ours.logps, logps.detach() * mask)
    torch.testing.assert_close(ours.entropy, entropy.detach() * mask)

    fp32 = grpo_loss(logits.float(), ids, mask, **loss_options(problem, **options))
    assert fp32.loss.dtype == fp32.logps.dtype == torch.float32
    assert fp32.loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("chunk_tokens", [None, 3])
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_linear_equals_logits_and_packed_equals_padded(loss_type, level, kl, chunk_tokens):
    problem = make_problem(seed=1)
    hidden, weight, bias, ids, mask, old, ref, advantages = problem
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    options = {"loss_type": loss_type, "importance_sampling_level": level, "kl": kl}
    options = loss_options(problem, temperature=0.9, **options)
    expected = grpo_loss(hidden @ weight.T + bias, ids, mask, **options)
    padded = linear_grpo_loss(
        hidden, weight, ids, mask, bias=bias, chunk_tokens=chunk_tokens, **options
    )
    offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    packed_options = options | {"old_logps": old[mask], "ref_logps": ref[mask]}
    packed = linear_grpo_loss(
        hidden[mask],
        weight,
        ids[mask],
        cu_seqlens=offsets,
        bias=bias,
        chunk_tokens=chunk_tokens,
        **packed_options,
    )
    packed_logits = grpo_loss(
        hidden[mask] @ weight.T + bias, ids[mask], cu_seqlens=offsets, **packed_options
    )
    wanted = gradients(expected.loss, *inputs)
    for result in (padded, packed, packed_logits):
        torch.testing.assert_close(result.loss, expected.loss)
        torch.testing.assert_close(gradients(result.loss, *inputs), wanted)
        for name in ("logps", "entropy", "kl"):
            value = getattr(expected, name)
            value = value if result is padded else value[mask]
            torch.testing.assert_close(getattr(result, name), value)
        for name in ("clip_fraction_low", "clip_fraction_high"):
            torch.testing.assert_close(getattr(result, name), getattr(expected, name))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradcheck_of_linear_grpo_loss(loss_type):
    problem = make_problem(seed=2)
    hidden, weight, bias, ids, mask, *_ = problem
    options = loss_options(problem, loss_type=loss_type)
    # The log-prob's factor is constant in the gradient, but not in the value: hold it at its bound.
    if loss_type in ("cispo", "vespo"):
        options["old_logps"] = options["old_logps"] - 40
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]

    def run(h, w, b):
        return linear_grpo_loss(h, w, ids, mask, bias=b, chunk_tokens=4, **options).loss

    assert torch.autograd.gradcheck(run, inputs)


def more_options(problem):
    """One set a line; with `make_problem`, each changes the loss."""
    *_, mask, old, ref, _ = problem
    weights = (old - ref).exp()
    return [
        {"use_bias_correction_kl": True, "delta": 1.1},
        {"use_bias_correction_kl": True, "kl": "k1"},
        {"use_bias_correction_kl": True, "importance_sampling_level": "sequence"},
        {"is_weights": weights},
        {"is_weights": weights[:, :1], "loss_type": "sapo", "sapo_temperature_pos": 2.0},
        {"off_policy_mask_threshold": 0.01, "sampling_logps": ref},
        {"importance_sampling_mode": "sequence_mask", "sampling_logps": ref},
        {
            "importance_sampling_mode": "token_truncate",
            "sampling_logps": ref,
            "importance_sampling_clip_max": 1.01,
            "loss_type": "luspo",
        },
        {"entropy_coef": 0.3},
        {"entropy_coef": 0.3, "top_entropy_quantile": 0.5, "loss_type": "luspo"},
        {"entropy_coef": 0.3, "entropy_threshold": 2.0, "num_entropy_items": 5, "beta": 0.0},
        {"entropy_threshold": torch.tensor(2.0), "importance_sampling_level": "sequence"},
    ]


NUM_OPTIONS = 12


@pytest.mark.parametrize("number", range(NUM_OPTIONS))
def test_gradcheck_of_every_option(number):
    problem = make_problem(seed=2)
    hidden, weight, bias, ids, mask, *_ = problem
    options = loss_options(problem, **more_options(problem)[number])
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]

    def linear(h, w, b):
        return linear_grpo_loss(h, w, ids, mask, bias=b, chunk_tokens=4, **options).loss

    def from_logits(h, w, b):
        return grpo_loss(h @ w.T + b, ids, mask, **options).loss

    assert torch.autograd.gradcheck(linear, inputs)
    assert torch.autograd.gradcheck(from_logits, inputs)
    plain = linear_grpo_loss(
        hidden, weight, ids, mask, bias=bias,
        **options | dict.fromkeys(["is_weights", "sampling_logps", "delta"])
        | {"importance_sampling_mode": None, "use_bias_correction_kl": False,
           "off_policy_mask_threshold": None, "entropy_coef": 0,
           "top_entropy_quantile": 1.0, "entropy_threshold": None},
    ).loss  # fmt: skip
    assert abs(linear(*inputs) - plain) > 1e-4  # the option changes something here


@pytest.mark.parametrize("number", range(NUM_OPTIONS))
def test_every_option_fused_and_from_the_reference_with_anything_where_masked(number):
    problem = make_problem(seed=3)
    hidden, weight, _, ids, mask, *_ = problem
    options = more_options(problem)[number]
    hidden, ids = torch.where(mask[..., None], hidden, NAN), ids.masked_fill(~mask, -100)
    for name, value in options.items():
        if getattr(value, "shape", None) == mask.shape:
            options[name] = torch.where(mask, value, NAN)
    results = []
    for function in (grpo_loss_reference, linear_grpo_loss):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        result = function(*leaves, ids, mask, **loss_options(problem, temperature=0.8, **options))
        results.append((result.loss, result.kl, *gradients(result.loss, *leaves)))
    for got, value in zip(*results, strict=True):
        torch.testing.assert_close(got, value)
        assert got.isfinite().all()


def test_a_threshold_and_a_count_make_accumulation_equal_one_batch():
    problem = make_problem(seed=4)
    hidden, weight, _, ids, mask, *_ = problem
    options = {"loss_type": "dapo", "entropy_coef": 0.2, "num_items": mask.sum(), "beta": 0.0}
    whole = linear_grpo_loss(
        hidden, weight, ids, mask, **loss_options(problem, top_entropy_quantile=0.4, **options)
    )
    threshold = torch.quantile(whole.entropy[mask], 0.6)
    options |= {"entropy_threshold": threshold}
    options |= {"num_entropy_items": (whole.entropy[mask] >= threshold).sum()}
    total = 0.0
    for rows in (slice(0, 1), slice(1, N)):
        part = [x[rows] for x in (hidden, ids, mask)]
        names = ("advantages", "old_logps", "ref_logps")
        values = {k: v[rows] if k in names else v for k, v in loss_options(problem).items()}
        total += linear_grpo_loss(part[0], weight, *part[1:], **values | options).loss
    torch.testing.assert_close(total, whole.loss)


def run_both(problem, **options):
    """Yield (result, gradient in its first tensor) of the logits and the linear version."""
    hidden, weight, bias, ids, mask, *_ = problem
    logits = (hidden @ weight.T + bias).detach().requires_grad_()
    result = grpo_loss(logits, ids, mask, **options)
    yield result, gradients(result.loss, logits)[0]
    hidden = hidden.detach().requires_grad_()
    result = linear_grpo_loss(hidden, weight, ids, mask, bias=bias, **options)
    yield result, gradients(result.loss, hidden)[0]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masked_positions_may_hold_anything(loss_type, level):
    problem = make_problem()
    hidden, weight, bias, ids, mask, old, ref, advantages = problem
    options = {"loss_type": loss_type, "importance_sampling_level": level}
    clean = loss_options(problem, **options)
    junk = clean | {
        "old_logps": torch.where(mask, old, NAN),
        "ref_logps": torch.where(mask, ref, INF),
    }
    ids = torch.where(mask, ids, -100)
    dirty_hidden = torch.where(mask[..., None], hidden, NAN).requires_grad_()
    dirty_logits = torch.where(mask[..., None], hidden @ weight.T + bias, -INF).requires_grad_()
    runs = (
        (linear_grpo_loss(dirty_hidden, weight, ids, mask, bias=bias, **junk), dirty_hidden),
        (grpo_loss(dirty_logits, ids, mask, **junk), dirty_logits),
    )
    (expected, grad_logits), (_, grad_hidden) = run_both(problem, **clean)
    for (result, source), wanted in zip(runs, (grad_hidden, grad_logits), strict=True):
        torch.testing.assert_close(result.loss, expected.loss)
        (grad,) = gradients(result.loss, source)
        torch.testing.assert_close(grad, wanted)
        assert (grad[~mask] == 0).all()
        for values in (result.logps, result.entropy, result.kl):
            assert (values[~mask] == 0).all() and values.isfinite().all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nothing_active_is_a_finite_zero(loss_type, level):
    problem = list(make_problem())
    problem[4] = torch.zeros(N, T, dtype=torch.bool)
    options = {"loss_type": loss_type, "importance_sampling_level": level}
    for result, grad in run_both(problem, **loss_options(problem, **options)):
        assert result.loss == 0 and (grad == 0).all()
        assert result.clip_fraction_low == result.clip_fraction_high == 0


@pytest.mark.parametrize("shape", [(0, T), (N, 0)])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_empty_batches_keep_the_graph(loss_type, shape):
    weight = torch.randn(V, D, requires_grad=True)
    hidden, ids = torch.randn(*shape, D), torch.zeros(shape, dtype=torch.int64)
    result = linear_grpo_loss(
        hidden, weight, ids, ids.bool(), advantages=torch.ones(shape[0]), loss_type=loss_type
    )
    result.loss.backward()
    assert result.loss == 0 and (weight.grad == 0).all()


def test_on_policy_the_ratio_is_one_and_the_gradient_flows():
    problem = make_problem()
    *_, mask, _, _, advantages = problem
    for result, grad in run_both(problem, advantages=advantages, loss_type="bnpo"):
        expected = -(advantages[:, None] * mask).sum() / mask.sum()
        torch.testing.assert_close(result.loss, expected)
        assert grad.abs().max() > 1e-3
        assert (result.kl == 0).all()


def test_zero_advantage_gives_exactly_no_gradient():
    problem = make_problem()
    *_, old, _, advantages = problem
    for _, grad in run_both(problem, advantages=advantages * 0, old_logps=old):
        assert (grad == 0).all()


def test_ratio_exactly_one_is_not_clipped_even_without_a_range():
    problem = make_problem()
    *_, advantages = problem
    options = {"advantages": advantages, "epsilon_low": 0.0, "epsilon_high": 0.0}
    for result, grad in run_both(problem, **options):
        assert result.clip_fraction_low == result.clip_fraction_high == 0
        assert grad.abs().max() > 1e-3


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("gap", [-500.0, 500.0])
def test_extreme_ratios_stay_finite(gap, level):
    problem = make_problem(dtype=torch.float32)
    *_, old, ref, advantages = problem
    options = loss_options(problem, old_logps=old + gap, ref_logps=ref - gap)
    for result, grad in run_both(problem, importance_sampling_level=level, **options):
        assert result.loss.isfinite() and grad.isfinite().all()


def test_a_far_reference_still_pulls_the_token_up():
    # d = 60 in k3: exp is continued linearly there, and more log-prob must mean less loss.
    logits = torch.tensor([[[0.0, 60.0]]], requires_grad=True)
    ids, mask = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    options = {"advantages": torch.zeros(1), "ref_logps": torch.zeros(1, 1), "beta": 0.1}
    (grad,) = gradients(grpo_loss(logits, ids, mask, **options).loss, logits)
    assert grad[0, 0, 0] < 0 and grad.isfinite().all()


def test_rewards_are_normalised_like_group_advantages():
    problem = make_problem()
    rewards = torch.tensor([1.0, 0.0, NAN, 2.0], dtype=torch.float64)
    by_rewards = run_both(problem, rewards=rewards, num_generations=2)
    by_advantages = run_both(problem, advantages=group_advantages(rewards, 2))
    for (a, grad_a), (b, grad_b) in zip(by_rewards, by_advantages, strict=True):
        assert torch.equal(a.loss, b.loss) and torch.equal(grad_a, grad_b)


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo", "cispo"])
def test_num_items_makes_accumulation_equal_one_batch(loss_type):
    problem = make_problem()
    hidden, weight, bias, ids, mask, old, _, advantages = problem
    logits = hidden @ weight.T + bias
    options = {"loss_type": loss_type}
    whole = grpo_loss(logits, ids, mask, advantages=advantages, old_logps=old, **options)
    parts = [
        grpo_loss(
            logits[rows],
            ids[rows],
            mask[rows],
            advantages=advantages[rows],
            old_logps=old[rows],
            num_items=mask.sum(),
            **options,
        )
        for rows in (slice(0, 1), slice(1, N))
    ]
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss)


def test_clip_fractions_by_hand():
    # Ratios e^+-1 against [0.8, 1.2]: clipped high for A > 0, low for A < 0, free otherwise.
    logits = torch.zeros(2, 2, 4)
    ids, mask = torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.bool)
    old = -math.log(4) + torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    result = grpo_loss(logits, ids, mask, advantages=torch.tensor([1.0, -1.0]), old_logps=old)
    assert (result.clip_fraction_low, result.clip_fraction_high) == (0.5, 0.25)


def test_only_the_loss_is_differentiable_and_no_grad_is_respected():
    problem = make_problem()
    hidden, weight, bias, ids, mask, *_ = problem
    weight.requires_grad_()
    options = loss_options(problem)
    result = linear_grpo_loss(hidden, weight, ids, mask, bias=bias, **options)
    assert result.loss.requires_grad
    for name in ("logps", "entropy", "kl", "clip_fraction_low", "clip_fraction_high"):
        assert not getattr(result, name).requires_grad
    with torch.no_grad():
        quiet = linear_grpo_loss(hidden, weight, ids, mask, bias=bias, **options)
    assert torch.equal(quiet.loss, result.loss) and not quiet.loss.requires_grad


def test_bf16_weights_get_bf16_gradients_close_to_fp32():
    problem = make_problem(dtype=torch.float32)
    _, _, _, ids, mask, *_ = problem
    low = [x.bfloat16().requires_grad_() for x in problem[:3]]
    full = [x.detach().float().requires_grad_() for x in low]
    options = loss_options(problem)
    a = linear_grpo_loss(low[0], low[1], ids, mask, bias=low[2], chunk_tokens=3, **options)
    b = linear_grpo_loss(full[0], full[1], ids, mask, bias=full[2], chunk_tokens=3, **options)
    torch.testing.assert_close(a.loss, b.loss)  # fp32 from the same rounded inputs
    for x, y in zip(gradients(a.loss, *low), gradients(b.loss, *full), strict=True):
        assert x.dtype == torch.bfloat16
        torch.testing.assert_close(x.float(), y, rtol=1e-2, atol=1e-3)


def test_linear_never_holds_the_whole_logits():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return out

    n, t, v, d, rows = 8, 16, 512, 4, 8
    hidden, weight = torch.randn(n, t, d), torch.randn(v, d, requires_grad=True)
    ids, mask = torch.randint(v, (n, t)), torch.ones(n, t, dtype=torch.bool)
    with Largest() as seen:
        for level in LEVELS:
            linear_grpo_loss(
                hidden,
                weight,
                ids,
                mask,
                advantages=torch.ones(n),
                importance_sampling_level=level,
                chunk_tokens=rows,
            ).loss.backward()
        linear_logps(hidden, weight, ids, chunk_tokens=rows)[0].sum().backward()
    assert seen.numel == rows * v < n * t * v


def test_linear_loss_backward_twice_and_scaled():
    problem = make_problem()
    hidden, weight, bias, ids, mask, *_ = problem
    hidden.requires_grad_()
    loss = linear_grpo_loss(hidden, weight, ids, mask, bias=bias, **loss_options(problem)).loss
    once = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(3 * loss, hidden)[0], 3 * once)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_last_position_that_predicts_nothing_is_ignored(inplace):
    problem = make_problem()
    hidden, weight, bias, ids, mask, *_ = problem
    logits = (hidden @ weight.T + bias).requires_grad_()
    expected = grpo_loss(logits, ids, mask, **loss_options(problem, entropy_coef=0.1))
    longer = torch.cat([logits.detach(), torch.full((N, 1, V), NAN)], 1).requires_grad_()
    ours = grpo_loss(longer, ids, mask, inplace=inplace, **loss_options(problem, entropy_coef=0.1))
    assert torch.equal(ours.loss, expected.loss)
    (grad,) = gradients(ours.loss, longer)
    assert torch.equal(grad[:, :-1], gradients(expected.loss, logits)[0])
    assert (grad[:, -1] == 0).all()


LOGITS, IDS = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
MASK, ONES = torch.ones(2, 3, dtype=torch.bool), torch.ones(2)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"logits": LOGITS[0]}, "index: expected"),
        ({"logits": LOGITS.long()}, "logits: expected .* floating point"),
        ({"completion_ids": IDS.int()}, "completion_ids: expected"),
        ({"completion_mask": MASK[0]}, "completion_mask: expected .2, 3. bool or 0/1 numbers"),
        ({"completion_mask": 2 * MASK.long()}, "completion_mask: expected only 0 and 1, got 2"),
        ({"completion_mask": None}, "completion_mask: expected .N, T. bool, got None"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens: expected None"),
        ({"advantages": None}, "exactly one of them, got neither"),
        ({"advantages": [1.0, 2.0]}, "advantages: expected Tensor . None, got list"),
        ({"is_weights": 1.0}, "is_weights: expected Tensor . None, got float; convert it"),
        ({"old_logps": [[0.0] * 3] * 2}, "old_logps: expected Tensor . None, got list"),
        ({"logits": LOGITS.numpy()}, "logits: expected Tensor, got ndarray"),
        ({"logits": LOGITS.tolist()}, "logits: expected Tensor, got list"),
        ({"completion_ids": IDS.tolist()}, "completion_ids: expected Tensor, got list"),
        ({"completion_mask": MASK.tolist()}, "completion_mask: expected Tensor . None, got list"),
        ({"cu_seqlens": [0, 3]}, "cu_seqlens: expected Tensor . None, got list"),
        ({"beta": None}, "beta: expected float, got NoneType"),
        ({"delta": "2"}, "delta: expected float . None, got str"),
        ({"temperature": None}, "temperature: expected float, got NoneType"),
        ({"num_items": "3"}, "num_items: expected int . float . Tensor . None, got str"),
        ({"num_generations": 2.0}, "num_generations: expected int . None, got float"),
        ({"rewards": ONES, "num_generations": 2}, "exactly one of them, got both"),
        ({"advantages": None, "rewards": ONES}, "num_generations: expected"),
        ({"advantages": None, "rewards": ONES, "num_generations": 3}, "num_generations: expected"),
        ({"advantages": torch.ones(3)}, "advantages: expected .2,."),
        ({"beta": 0.1}, "ref_logps: expected"),
        ({"beta": -1.0}, "beta: expected"),
        ({"epsilon_low": NAN}, "epsilon_low: expected"),
        ({"delta": 0.0}, "delta: expected"),
        ({"old_logps": torch.zeros(2, 4)}, "old_logps: expected .2, 3."),
        ({"loss_type": "ppo"}, "loss_type: expected one of"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level: expected one of"),
        ({"kl": "k4"}, "kl: expected one of"),
        ({"temperature": 0.0}, "temperature: expected"),
        ({"loss_type": "dr_grpo", "max_completion_length": 0}, "max_completion_length: expected"),
        ({"beta": INF}, "beta: expected a finite number"),
        ({"is_weights": torch.ones(2)}, "is_weights: expected .2, 3., one a token, or .2, 1., one"),
        ({"sampling_logps": torch.ones(2)}, "sampling_logps: expected"),
        ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg: expected a number > 0, got 0"),
        ({"vespo_k_pos": -1.0}, "vespo_k_pos: expected a number >= 0"),
        (
            {"importance_sampling_mode": "sequence_mask"},
            "sampling_logps: expected .2, 3. log-probs",
        ),
        (
            {"importance_sampling_mode": "token"},
            "importance_sampling_mode: expected None or, .*'token",
        ),
        (
            {"importance_sampling_mode": "sequence_mask", "loss_type": "vespo"},
            "loss_type vespo, one",
        ),
        ({"importance_sampling_mode": "token_mask", "is_weights": torch.ones(2, 3)}, "got both"),
        (
            {"importance_sampling_clip_max": 0.0},
            "importance_sampling_clip_max: expected a number > 0",
        ),
        ({"off_policy_mask_threshold": -0.1}, "off_policy_mask_threshold: expected a number > 0"),
        ({"top_entropy_quantile": 1.5}, "top_entropy_quantile: expected a share"),
        ({"top_entropy_quantile": 0.5, "entropy_threshold": 1.0}, "leave top_entropy_quantile at"),
        ({"entropy_coef": NAN}, "entropy_coef: expected a finite number"),
        ({"entropy_coef": 0.1, "num_entropy_items": -1}, "num_entropy_items: expected a count"),
    ],
)
def test_bad_loss_input_is_named(changes, message):
    arguments = {
        "logits": LOGITS,
        "completion_ids": IDS,
        "completion_mask": MASK,
        "advantages": ONES,
    }
    with pytest.raises(ValueError, match=message):
        grpo_loss(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": [[0.0]]}, "hidden: expected Tensor, got list"),
        ({"weight": None}, "weight: expected Tensor, got NoneType"),
        ({"bias": 0.5}, "bias: expected Tensor . None, got float"),
        ({"index": IDS.numpy()}, "index: expected Tensor, got ndarray"),
        ({"chunk_tokens": 1.5}, "chunk_tokens: expected int . None, got float"),
        ({"temperature": "1"}, "temperature: expected float, got str"),
    ],
)
def test_a_wrong_type_of_a_head_is_named(changes, message):
    arguments = {"hidden": torch.zeros(2, 3, 5), "weight": torch.zeros(4, 5), "index": IDS}
    with pytest.raises(ValueError, match=message):
        linear_logps(**(arguments | changes))


def test_whole_numbers_are_advantages_and_rewards_too():
    for name in ("advantages", "rewards"):
        given = {"num_generations": 2, name: torch.tensor([1, -1])}
        whole = grpo_loss(LOGITS, IDS, MASK, **given)
        given[name] = given[name].float()
        assert torch.equal(whole.loss, grpo_loss(LOGITS, IDS, MASK, **given).loss)
    with pytest.raises(ValueError, match="rewards: expected Tensor, got list"):
        group_advantages([1.0, 2.0], 2)


@pytest.mark.parametrize("offsets", [None, [0, 2], [1, 3], [0, 2, 1, 3]])
def test_bad_offsets_are_named(offsets):
    offsets = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens: expected"):
        grpo_loss(LOGITS[0], IDS[0], cu_seqlens=offsets, advantages=ONES[:1])


def test_bad_linear_input_is_named():
    hidden, weight = torch.zeros(2, 3, 5), torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"hidden: expected \(2, 3, 5\)"):
        linear_logps(hidden[..., :4], weight, IDS)
    with pytest.raises(ValueError, match="weight: expected"):
        linear_logps(hidden, weight[0], IDS)
    with pytest.raises(ValueError, match="bias: expected"):
        linear_logps(hidden, weight, IDS, bias=torch.zeros(5))
    with pytest.raises(ValueError, match=r"bias: expected \(4,\) floating point"):
        linear_logps(hidden, weight, IDS, bias=torch.zeros(4, dtype=torch.long))
    for count in (-1, float("nan")):
        with pytest.raises(ValueError, match="num_items: expected"):
            linear_grpo_loss(
                hidden, weight, IDS, torch.ones(2, 3, dtype=torch.bool), advantages=torch.ones(2),
                loss_type="dapo", num_items=count,
            )  # fmt: skip
    with pytest.raises(ValueError, match="chunk_tokens: expected"):
        linear_logps(hidden, weight, IDS, chunk_tokens=0)


def test_bad_advantage_input_is_named():
    for arguments, message in [
        ((torch.ones(2, 2), 2), "rewards: expected"),
        ((torch.ones(4).long(), 2), "rewards: expected"),
        ((torch.ones(4), 3), "num_generations: expected"),
        ((torch.ones(4), 0), "num_generations: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            group_advantages(*arguments)
    with pytest.raises(ValueError, match="scale_rewards: expected"):
        group_advantages(torch.ones(4), 2, scale_rewards="std")
    with pytest.raises(ValueError, match="advantage_estimator: expected"):
        group_advantages(torch.ones(4), 2, advantage_estimator="ppo")
    with pytest.raises(ValueError, match="eps: expected"):
        group_advantages(torch.ones(4), 2, eps=0.0)


def test_ids_outside_the_vocabulary_are_named():
    logits, hidden, weight = torch.randn(2, 3, 5), torch.randn(2, 3, 4), torch.randn(5, 4)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    for bad, named in ((5, "got 5"), (-1, "got -1")):
        ids = torch.zeros(2, 3, dtype=torch.int64)
        ids[1, 1] = bad
        for call in (
            lambda: selective_log_softmax(logits, ids),  # noqa: B023
            lambda: linear_logps(hidden, weight, ids),  # noqa: B023
            lambda: grpo_loss(logits, ids, mask, advantages=torch.ones(2)),  # noqa: B023
            lambda: linear_grpo_loss(hidden, weight, ids, mask, advantages=torch.ones(2)),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=rf"expected token ids in \[0, 5\), {named}"):
                call()
        ids[1, 1], ids[0, 2] = 0, bad  # where masked, ids may be anything
        assert grpo_loss(logits, ids, mask, advantages=torch.ones(2)).loss.isfinite()


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_strides_and_inplace_do_not_change_the_gradient(layout):
    base = torch.randn(6, 4, 11, dtype=torch.float64)
    logits = {
        "sliced": base[:, 1:],
        "transposed": base.transpose(0, 1),
        "expanded": base[:1].expand(3, 4, 11),
    }[layout]
    ids = torch.randint(11, logits.shape[:2])
    wanted = logits.clone().requires_grad_()
    oracle_logps(wanted, ids)[0].sum().backward()
    for inplace in (False, True):
        leaf = logits.clone() if inplace and layout != "expanded" else logits.detach()
        leaf = leaf.requires_grad_()
        loss = selective_log_softmax(leaf, ids, inplace=inplace).sum()
        (grad,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(grad, wanted.grad)
        assert (grad.data_ptr() == leaf.data_ptr()) == (inplace and layout != "expanded")


def test_who_else_needs_the_logits_is_told_that_they_are_gone():
    logits = torch.randn(3, 7, requires_grad=True)
    scaled = logits * 1.0
    other = scaled.square().sum()
    loss = selective_log_softmax(scaled, torch.tensor([1, 2, 3]), inplace=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


class Products(TorchDispatchMode):
    """Multiplications of the matrix products that are made inside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))


def count_products(hidden, weight, ids, mask, advantages, **options):
    with Products() as seen:
        loss = linear_grpo_loss(hidden, weight, ids, mask, advantages=advantages, **options).loss
        if loss.requires_grad:
            loss.backward()
    return seen.count / (hidden.shape[-1] * weight.shape[0])


def test_three_products_and_none_for_tokens_without_a_gradient():
    n, t, d, v = 4, 6, 8, 32
    hidden, weight = torch.randn(n, t, d), torch.randn(v, d)
    ids, full = torch.randint(v, (n, t)), torch.ones(n, t, dtype=torch.bool)
    one = torch.tensor([1.0, 0.0, -1.0, 0.0])
    both = [x.clone().requires_grad_() for x in (hidden, weight)]
    assert count_products(*both, ids, full, torch.ones(n)) == 3 * n * t
    # Masked tokens cost nothing at all, tokens without advantage only their log-prob.
    mask = torch.arange(t) < torch.tensor([6, 2, 0, 1])[:, None]
    assert count_products(*both, ids, mask, torch.ones(n)) == 3 * 9
    assert count_products(*both, ids, full, one) == n * t + 2 * 2 * t
    # With a KL term they have a gradient.
    ref = torch.full((n, t), -3.0)
    assert count_products(*both, ids, full, one, ref_logps=ref, beta=0.1) == 3 * n * t
    # Clipped tokens: of the ratios, half are far above the range with a positive advantage.
    logps = linear_logps(hidden, weight, ids)[0]
    old = torch.where(torch.arange(t) % 2 == 0, logps - 1, logps)
    assert count_products(*both, ids, full, torch.ones(n), old_logps=old) == n * t + n * t
    # Low entropy: a quantile of the call needs all log-probs first, a threshold doesn't.
    entropy = linear_logps(hidden, weight, ids)[1]
    top, ones = torch.quantile(entropy, 0.75), torch.ones(n)
    assert count_products(*both, ids, full, ones, entropy_threshold=top) == n * t + 2 * 6
    by_quantile = count_products(*both, ids, full, ones, top_entropy_quantile=0.25)
    assert by_quantile == 2 * n * t + 2 * 6
    # A frozen head (LoRA) has no gradient product of its own, frozen hidden states none of theirs.
    assert count_products(both[0], weight, ids, full, torch.ones(n)) == 2 * n * t
    assert count_products(hidden, both[1], ids, full, torch.ones(n)) == 2 * n * t
    assert count_products(hidden, weight, ids, full, torch.ones(n)) == n * t


@pytest.mark.parametrize("chunk_tokens", [1, 2, 4, 7, 1000])
def test_dropped_and_moved_rows_leave_the_gradient_as_it_is(chunk_tokens, monkeypatch):
    """Clipped, silent and masked tokens in every tile, and sequences longer than a tile."""
    problem = make_problem(seed=5)
    hidden, weight, bias, ids, mask, _, ref, advantages = problem
    advantages[1] = 0.0
    # Ratios that are clipped with a positive advantage: of every third token.
    now = oracle_logps(hidden @ weight.T + bias, ids)[0].detach()
    old = now - (torch.arange(now.numel()).view_as(now) % 3 == 0).to(now)
    compacted, sizes = linear_module._compacted, []
    monkeypatch.setattr(
        linear_module, "_compacted", lambda *a: sizes.append(len(a[1])) or compacted(*a)
    )
    for level in LEVELS:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        options = {"advantages": advantages, "old_logps": old, "importance_sampling_level": level}
        ours = linear_grpo_loss(
            leaves[0], leaves[1], ids, mask, bias=leaves[2], chunk_tokens=chunk_tokens, **options
        )
        whole = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        logps, _ = oracle_logps(whole[0] @ whole[1].T + whole[2], ids)
        expected = oracle_loss(
            logps, mask, old, ref, advantages, "grpo", level, "k3", beta=0.0, high=0.2
        )
        torch.testing.assert_close(ours.loss, expected)
        torch.testing.assert_close(gradients(ours.loss, *leaves), gradients(expected, *whole))
    assert sizes or chunk_tokens == 1


def test_linear_logps_equal_torchs_linear_cross_entropy():
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("torch >= 2.13 has it")
    hidden, weight = torch.randn(9, 8), torch.randn(50, 8)
    ids, upstream = torch.randint(50, (9,)), torch.randn(9)
    results = []
    for ours in (True, False):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        if ours:
            nll = -linear_logps(*leaves, ids, chunk_tokens=4)[0]
        else:
            options = torch.nn.LinearCrossEntropyOptions()
            nll = torch.nn.functional.linear_cross_entropy(
                *leaves, ids, reduction="none", options=options
            )
        results.append((nll.detach(), *torch.autograd.grad((nll * upstream).sum(), leaves)))
    for got, value in zip(*results, strict=True):
        torch.testing.assert_close(got, value, atol=1e-5, rtol=1e-5)


def test_linear_logps_equal_trls_fused_head():
    module = pytest.importorskip("trl.kernels.chunked_logprob")
    hidden, weight, bias = torch.randn(9, 8), torch.randn(50, 8), torch.randn(50)
    ids, up = torch.randint(50, (9,)), torch.randn(2, 9)
    results = []
    for ours in (True, False):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        if ours:
            logps, entropy = linear_logps(*leaves[:2], ids, bias=leaves[2], temperature=0.7)
        else:
            logps, entropy, *_ = module.ChunkedLogProbFunction.apply(
                *leaves, ids, 0.7, 16, None, 1.0, ("entropy",)
            )
        total = (logps * up[0] + entropy * up[1]).sum()
        results.append((logps.detach(), entropy.detach(), *torch.autograd.grad(total, leaves)))
    for got, value in zip(*results, strict=True):
        torch.testing.assert_close(got, value, atol=1e-5, rtol=1e-5)


def test_reference_equals_fused_for_every_loss_type():
    problem = make_problem(seed=2)
    hidden, weight, _, ids, mask, *_ = problem
    hidden, ids = torch.where(mask[..., None], hidden, NAN), ids.masked_fill(~mask, -100)
    for loss_type in LOSS_TYPES:
        results = []
        for function in (linear_grpo_loss, grpo_loss_reference):
            leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
            options = loss_options(problem, loss_type=loss_type, temperature=0.8)
            result = function(*leaves, ids, mask, **options)
            results.append((result.loss, result.kl, *gradients(result.loss, *leaves)))
        for got, value in zip(*results, strict=True):
            torch.testing.assert_close(got, value)


def test_autocast_on_a_cpu_changes_nothing():
    problem = make_problem(dtype=torch.float32)
    hidden, weight, bias, ids, mask, *_ = problem
    logits = hidden @ weight.T + bias
    calls = {
        "logps": lambda: (logps_and_entropy(leaves[0], ids), leaves[:1]),
        "loss": lambda: (loss_of(grpo_loss(leaves[0], ids, mask, **options)), leaves[:1]),
        "linear logps": lambda: (linear_logps(leaves[1], leaves[2], ids), leaves[1:]),
        "linear loss": lambda: (
            loss_of(linear_grpo_loss(leaves[1], leaves[2], ids, mask, **options)),
            leaves[1:],
        ),
    }
    loss_of = lambda result: (result.loss, result.entropy)  # noqa: E731
    options = loss_options(problem)
    for name, call in calls.items():
        results = []
        for enabled in (False, True):
            leaves = [x.detach().clone().requires_grad_() for x in (logits, hidden, weight)]
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                values, inputs = call()
                total = sum(value.sum() for value in values)
            results.append((*values, *torch.autograd.grad(total, inputs)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), name


def test_float16_inputs_have_gradients_that_would_underflow_in_float16(monkeypatch):
    """As on a GPU: p / (N T) is far below what float16 can hold, so its factors are float32."""
    monkeypatch.setattr(linear_module, "_multiplies_16_bits", lambda device: True)
    g = torch.Generator().manual_seed(0)
    n, t, d, vocab = 64, 32, 4, 4096
    hidden = torch.randn(n, t, d, generator=g).half()
    weight = (0.1 * torch.randn(vocab, d, generator=g)).half()
    ids, mask = torch.randint(vocab, (n, t), generator=g), torch.ones(n, t, dtype=torch.bool)
    advantages = torch.randn(n, generator=g)
    scale, grads = 2**14, []  # as a gradient scaler would
    for dtype in (torch.float64, torch.float16):
        leaf = weight.detach().to(dtype).requires_grad_()
        loss = linear_grpo_loss(hidden.to(dtype), leaf, ids, mask, advantages=advantages).loss
        (grad,) = torch.autograd.grad(scale * loss, leaf)
        grads.append(grad.double())
    assert (grads[1] - grads[0]).norm() < 1e-3 * grads[0].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_never_more_than_twice_the_error_of_plain_torch(dtype):
    g = torch.Generator().manual_seed(0)
    rows, d, vocab = 64, 32, 5000
    hidden = torch.randn(rows, d, generator=g).to(dtype)
    weight = (0.5 * torch.randn(vocab, d, generator=g)).to(dtype)
    logits = (3 * torch.randn(rows, vocab, generator=g)).to(dtype)
    ids, up = torch.randint(vocab, (rows,), generator=g), torch.randn(2, rows, generator=g)

    def plain(logits):
        log_p = logits.log_softmax(-1)
        return log_p.gather(-1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    def run(function, *inputs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        values = function(*leaves)
        total = sum((value * u.to(value.dtype)).sum() for value, u in zip(values, up, strict=True))
        return [*values, *torch.autograd.grad(total, leaves)]

    for ours, theirs, inputs in (
        (lambda x: logps_and_entropy(x, ids), plain, (logits,)),
        (lambda h, w: linear_logps(h, w, ids), lambda h, w: plain(h @ w.T), (hidden, weight)),
    ):
        exact = run(theirs, *(x.double() for x in inputs))
        triples = zip(run(ours, *inputs), run(theirs, *inputs), exact, strict=True)
        for number, (got, other, value) in enumerate(triples):
            error, allowed = ((x.double() - value).abs().max() for x in (got, other))
            assert error <= 2 * allowed + 1e-7, (number, error, allowed)
            assert dtype != torch.float32 or number > 1 or error <= 1e-5


def test_the_count_of_tokens_may_be_a_share_of_several_ranks():
    problem = make_problem()
    hidden, weight, _, ids, mask, *_ = problem
    whole, part = (
        linear_grpo_loss(
            hidden, weight, ids, mask, **loss_options(problem, loss_type="dapo", num_items=count)
        ).loss
        for count in (1, 0.25)
    )
    torch.testing.assert_close(part, 4 * whole)


def test_a_count_that_is_not_a_number_shows():
    problem = make_problem()
    hidden, weight, _, ids, mask, *_ = problem
    options = loss_options(problem, loss_type="dapo", num_items=torch.tensor(NAN))
    assert linear_grpo_loss(hidden, weight, ids, mask, **options).loss.isnan()


def test_factors_are_narrow_where_both_inputs_are(monkeypatch):
    monkeypatch.setattr(linear_module, "_multiplies_16_bits", lambda device: True)
    one = lambda dtype: torch.zeros(1, dtype=dtype)  # noqa: E731
    low, full = torch.bfloat16, torch.float32
    for hidden, weight, expected in ((low, low, low), (low, full, full), (full, low, full)):
        assert linear_module.factor_dtype(one(hidden), one(weight)) == expected
    with torch.autocast("cpu", low):
        assert linear_module.factor_dtype(one(full), one(full)) == low
        assert linear_module.factor_dtype(one(torch.float64), one(full)) == torch.float64


def test_tensors_on_another_device_are_named():
    hidden, weight = torch.zeros(2, 3, 5), torch.zeros(4, 5)
    with pytest.raises(ValueError, match="weight: expected on cpu like hidden, got meta"):
        linear_logps(hidden, weight.to("meta"), IDS)
    with pytest.raises(ValueError, match="bias: expected on cpu like hidden, got meta"):
        linear_logps(hidden, weight, IDS, bias=torch.zeros(4, device="meta"))


def test_the_two_losses_have_the_same_defaults():
    from_logits, linear = (
        {name: p.default for name, p in inspect.signature(function).parameters.items()}
        for function in (grpo_loss, linear_grpo_loss)
    )
    own = ("hidden", "weight", "bias", "softcap", "chunk_tokens")
    assert {k: v for k, v in from_logits.items() if k not in ("logits", "inplace")} == {
        k: v for k, v in linear.items() if k not in own
    }
    assert from_logits["epsilon_low"] == 0.2 and "kwargs" not in from_logits


def test_an_argument_that_is_unknown_is_named():
    with pytest.raises(TypeError, match="grpo_loss: .* unknown argument epsilon"):
        grpo_loss(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64), epsilon=0.2)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_no_sequences_or_no_tokens_give_an_empty_gradient(shape):
    logits = torch.zeros(*shape, 5, requires_grad=True)
    hidden, weight = torch.zeros(*shape, 4, requires_grad=True), torch.zeros(5, 4)
    weight.requires_grad_()
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    rewards = {"advantages": torch.zeros(shape[0])}
    for result, leaves in (
        (grpo_loss(logits, ids, mask, **rewards).loss, [logits]),
        (linear_grpo_loss(hidden, weight, ids, mask, **rewards).loss, [hidden, weight]),
        (logps_and_entropy(logits, ids)[0].sum(), [logits]),
        (linear_logps(hidden, weight, ids)[0].sum(), [hidden, weight]),
    ):
        assert result == 0
        for leaf, grad in zip(leaves, gradients(result, *leaves), strict=True):
            assert grad.shape == leaf.shape and (grad == 0).all()


def test_the_kernels_can_read_the_layout_of_one_sequence():
    """Kernels read it number by number, without strides."""
    layout = make_layout(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3), None)
    assert layout.sequence.stride() == (1,) and layout.sequence.tolist() == [0, 0, 0]


def test_the_gradient_of_sapo_keeps_its_digits_where_the_gate_is_almost_open():
    log_ratio = torch.tensor([1.5, 2.0, 2.5])
    args = LossArgs(loss_type="sapo", sapo_temperature_pos=1.25)
    ours, exact = (
        token_loss(x, x, None, torch.ones_like(x), args).d_log_ratio
        for x in (log_ratio, log_ratio.double())
    )
    torch.testing.assert_close(ours.double(), exact, atol=0, rtol=1e-5)


def test_float64_keeps_the_digits_of_sapos_and_vespos_numbers():
    """1.05 and the others have no exact float32."""
    log_ratio = torch.tensor([-0.3, 0.2], dtype=torch.float64)
    logits = torch.zeros(2, 1, 2, dtype=torch.float64)
    given = {"advantages": torch.tensor([-1.0, 1.0], dtype=torch.float64),
             "old_logps": (-math.log(2) - log_ratio)[:, None]}  # fmt: skip
    losses = []
    for options in (
        {"loss_type": "sapo", "sapo_temperature_pos": 0.9},
        {"loss_type": "vespo", "vespo_k_pos": 2.1, "vespo_lambda_pos": 3.3, "vespo_k_neg": 1.7,
         "vespo_lambda_neg": 2.3},
    ):  # fmt: skip
        ids, mask = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
        losses.append(grpo_loss(logits, ids, mask, **given, **options).loss.item())
    sapo = vespo = 0.0
    for x, advantage, t, k, rate in ((-0.3, -1.0, 1.05, 1.7, 2.3), (0.2, 1.0, 0.9, 2.1, 3.3)):
        sapo -= advantage * 4 / t / (1 + math.exp(-t * (math.exp(x) - 1))) / 2
        vespo -= advantage * math.exp(rate + k * x - rate * math.exp(x)) * -math.log(2) / 2
    assert losses == pytest.approx([sapo, vespo], rel=1e-13)
