"""Cases for the Triton kernels, run by test_triton.py: interpreted, or compiled on a GPU.

TRITON_INTERPRET=1 pytest tests/triton_cases.py
"""

import itertools
import math
import os
import sys

import pytest
import torch

from virft_fast.kernels import (
    LossArgs,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logps,
    logps_and_entropy,
    selective_log_softmax,
)
from virft_fast.kernels import backend as backend_module
from virft_fast.kernels import linear as linear_module
from virft_fast.kernels import logprobs as logprobs_module
from virft_fast.kernels.token_loss import token_loss

triton_rows = pytest.importorskip("virft_fast.kernels.triton_rows")
tl = triton_rows.tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
NAN, INF = float("nan"), float("inf")
QWEN2_VL_VOCAB = 151_936

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Whatever a kernel leaves unwritten is NaN."""

    def nans(shape, device, number):
        shape = shape if isinstance(shape, tuple) else (shape,)
        return [torch.full(shape, NAN, device=device) for _ in range(number)]

    def nans_like(logits, inplace, real=logprobs_module.gradient_buffer):
        out = real(logits, inplace)
        return out if inplace else out.fill_(NAN)

    monkeypatch.setattr(triton_rows, "_empty", nans)
    # The package's name `grpo_loss` is the function, not the module.
    for module in (logprobs_module, sys.modules["virft_fast.kernels.grpo_loss"]):
        monkeypatch.setattr(module, "gradient_buffer", nans_like)


def oracle(logits, ids, temperature=1.0):
    log_p = (logits.double() / temperature).log_softmax(-1)
    p = log_p.exp()
    picked = log_p.gather(-1, ids[..., None])[..., 0]
    return picked, -torch.where(p > 0, p * log_p, 0.0).sum(-1)


def random_logits(*shape, dtype=torch.float32, seed=0, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g)).to(dtype).to(DEVICE)


def random_ids(vocab, *shape, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def test_cases_run_the_triton_kernels():
    assert backend_module.triton_for(random_logits(1, 2)) is triton_rows


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocab", [1, 2, 17, 1000, 4096, 4097, 12_304])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_gradient_against_float64(dtype, vocab, temperature):
    logits = random_logits(3, 2, vocab, dtype=dtype).requires_grad_()
    ids = random_ids(vocab, 3, 2)
    weights = random_logits(2, 3, 2, seed=2, scale=1.0)
    exact = logits.detach().double().requires_grad_()
    wanted = oracle(exact, ids, temperature)
    ours = logps_and_entropy(logits, ids, temperature=temperature)
    for got, value in zip(ours, wanted, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), value, atol=1e-5, rtol=1e-6)
    assert (
        (ours[0] <= 0).all() and (ours[1] >= 0).all() and (ours[1] <= math.log(vocab) + 1e-6).all()
    )
    (wanted[0] * weights[0] + wanted[1] * weights[1]).sum().backward()
    (ours[0] * weights[0] + ours[1] * weights[1]).sum().backward()
    rounding = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-5, rtol=rounding)
    if dtype == torch.float32:
        plain = logits.detach().log_softmax(-1) if temperature == 1.0 else None
        if plain is not None:
            theirs = plain.gather(-1, ids[..., None])[..., 0]
            error = (theirs - wanted[0]).abs().max()
            assert (ours[0] - wanted[0]).abs().max() <= 2 * error + 2e-7


def test_the_real_vocabulary_with_its_first_and_last_token():
    logits = random_logits(3, QWEN2_VL_VOCAB, dtype=torch.bfloat16)
    ids = torch.tensor([0, QWEN2_VL_VOCAB - 1, 77], device=DEVICE)
    for got, value in zip(logps_and_entropy(logits, ids), oracle(logits, ids), strict=True):
        torch.testing.assert_close(got.double(), value, atol=1e-5, rtol=1e-6)


def test_extreme_rows():
    vocab = 5000
    equal = torch.full((vocab,), 7.0)
    peak = torch.zeros(vocab)
    peak[3] = 80.0
    banned = torch.randn(vocab, generator=torch.Generator().manual_seed(0))
    banned[: vocab - 10] = -INF  # the whole first block and more
    only = torch.full((vocab,), -INF)
    only[vocab - 1] = 2.0
    steep = torch.linspace(-1e4, 1e4, vocab)
    logits = torch.stack([equal, peak, peak, banned, only, steep]).to(DEVICE)
    ids = torch.tensor([0, 3, 4, vocab - 1, vocab - 1, vocab - 1], device=DEVICE)
    ours = logps_and_entropy(logits.requires_grad_(), ids)
    for got, value in zip(ours, oracle(logits.detach(), ids), strict=True):
        torch.testing.assert_close(got.double(), value, atol=1e-5, rtol=1e-6)
    assert ours[1][4] == 0 and ours[0][4] == 0
    sum(value.sum() for value in ours).backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[3, : vocab - 10] == 0).all()
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(6, device=DEVICE), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "layout", ["sliced", "transposed", "strided", "four_dims", "unfoldable", "offset"]
)
def test_any_strides(layout):
    vocab = 48
    logits = {
        "sliced": lambda: random_logits(3, 5, vocab)[:, 1:-1],
        "transposed": lambda: random_logits(vocab, 4, 3).transpose(0, 2),
        "strided": lambda: random_logits(3, 4, 2 * vocab)[..., ::2],
        "four_dims": lambda: random_logits(2, 3, 4, vocab)[:, :, 1:],
        "unfoldable": lambda: random_logits(2, 3, 4, vocab)[:, 1:],
        "offset": lambda: random_logits(3, 4, vocab + 1)[..., 1:],
    }[layout]()
    ids = random_ids(vocab, *logits.shape[:-1])
    base = logits.detach().requires_grad_()
    exact = logits.detach().double().requires_grad_()
    ours, wanted = logps_and_entropy(base, ids), oracle(exact, ids)
    (ours[0].sum() + ours[1].square().sum()).backward()
    (wanted[0].sum() + wanted[1].square().sum()).backward()
    torch.testing.assert_close(ours[0].double(), wanted[0])
    torch.testing.assert_close(base.grad.double(), exact.grad, atol=1e-5, rtol=1e-5)


def test_ids_with_a_stride_and_a_gradient_written_over_unfoldable_logits():
    start = random_logits(2, 3, 4, 48)[:, 1:]
    every = random_ids(48, 2, 2, 8)
    ids = every[..., ::2]
    expected = start.clone().requires_grad_()
    oracle(expected, ids)[0].sum().backward()
    (whole := start.clone(memory_format=torch.preserve_format)).requires_grad_()
    buffer = torch.zeros(2, 3, 4, 48, device=DEVICE)
    leaf = buffer[:, 1:].copy_(start).detach().requires_grad_()
    for logits, inplace in ((whole, False), (leaf, True)):
        logps = selective_log_softmax(logits, ids, inplace=inplace)
        (grad,) = torch.autograd.grad(logps.sum(), logits)
        torch.testing.assert_close(grad, expected.grad, atol=1e-5, rtol=1e-5)
    rows = random_logits(16, 48)
    strided = random_ids(48, 32)[::2]
    wanted = oracle(rows, strided)[0].float()
    torch.testing.assert_close(selective_log_softmax(rows, strided), wanted)


def test_an_id_outside_the_vocabulary_poisons_its_row_alone():
    values = triton_rows.rows_forward(
        random_logits(3, 10), torch.tensor([1, 10, -1], device=DEVICE), 1.0
    )
    assert values[0].isnan().tolist() == [False, True, True]


def test_in_place_the_gradient_lies_where_the_logits_lay():
    start = random_logits(4, 3, 40)
    ids = random_ids(40, 4, 3)
    expected = start.clone().requires_grad_()
    selective_log_softmax(expected, ids).sum().backward()
    buffer = start.clone()
    leaf = buffer.view(4, 3, 40).requires_grad_()
    result = selective_log_softmax(leaf, ids, inplace=True).sum()
    (grad,) = torch.autograd.grad(result, leaf, retain_graph=True)
    assert grad.data_ptr() == leaf.data_ptr()
    assert torch.equal(grad, expected.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(result, leaf)


LOSSES = list(
    itertools.product(
        ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo"], ["token", "sequence"], [False, True],
        ["k1", "k2", "k3"],
    )
)  # fmt: skip
if INTERPRETED:  # every pair of two values; test_the_pair_of_token_losses has all estimators
    LOSSES = [LOSSES[number * 3 + number % 3] for number in range(len(LOSSES) // 3)]


def make_problem(n=4, t=3, vocab=37, seed=0):
    """Sequences of several lengths, ratios on both sides of the range, NaN wherever masked."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, t, vocab, generator=g)
    ids = torch.randint(vocab, (n, t), generator=g)
    mask = torch.arange(t) < torch.tensor([t, 0, 2, 1])[:n, None]
    logps = oracle(logits, ids)[0].float()
    old = (logps + 0.4 * torch.randn(n, t, generator=g)).masked_fill(~mask, NAN)
    ref = (logps + 0.4 * torch.randn(n, t, generator=g)).masked_fill(~mask, NAN)
    rewards = torch.randn(n, generator=g)
    logits[~mask] = NAN
    return [x.to(DEVICE) for x in (logits, ids, mask, rewards, old, ref)]


def assert_losses_equal(ours, exact, atol=1e-5):
    torch.testing.assert_close(ours.loss.double(), exact.loss, atol=1e-6, rtol=1e-6)
    for name in ("logps", "entropy", "kl", "clip_fraction_low", "clip_fraction_high"):
        got, value = getattr(ours, name).double(), getattr(exact, name)
        torch.testing.assert_close(got, value, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("with_old", [False, True])
@pytest.mark.parametrize(("loss_type", "level", "with_delta", "kl"), LOSSES)
def test_loss_and_gradient_against_float64(loss_type, level, kl, with_delta, with_old):
    logits, ids, mask, rewards, old, ref = make_problem()
    options = {
        "num_generations": 2, "beta": 0.1, "loss_type": loss_type, "kl": kl, "temperature": 0.9,
        "importance_sampling_level": level, "delta": 1.1 if with_delta else None,
        "epsilon_high": 1.1 if loss_type == "cispo" else 0.3, "max_completion_length": 8,
    }  # fmt: skip
    tensors = {"rewards": rewards, "ref_logps": ref}
    if with_old:
        tensors["old_logps"] = old
    leaf = logits.clone().requires_grad_()
    exact_leaf = logits.double().requires_grad_()
    ours = grpo_loss(leaf, ids, mask, **tensors, **options)
    exact = grpo_loss(
        exact_leaf, ids, mask, **{k: v.double() for k, v in tensors.items()}, **options
    )
    assert_losses_equal(ours, exact)
    (3 * ours.loss).backward()
    (3 * exact.loss).backward()
    torch.testing.assert_close(leaf.grad.double(), exact_leaf.grad, atol=1e-6, rtol=1e-5)
    assert (leaf.grad[~mask] == 0).all()
    for vector in (ours.logps, ours.entropy, ours.kl):
        assert (vector[~mask] == 0).all()


@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "gspo"])
def test_without_reference_and_everything_masked(loss_type):
    logits, ids, mask, rewards, _, _ = make_problem()
    options = {"num_generations": 2, "loss_type": loss_type}
    result = grpo_loss(logits, ids, mask, rewards=rewards, **options)
    exact = grpo_loss(logits.double(), ids, mask, rewards=rewards.double(), **options)
    assert_losses_equal(result, exact)
    leaf = logits.clone().requires_grad_()
    result = grpo_loss(leaf, ids, torch.zeros_like(mask), rewards=rewards, **options)
    result.loss.backward()
    assert result.loss == 0 and (leaf.grad == 0).all()


# The largest takes the interpreter half a minute, and is a block as 8 is.
@pytest.mark.parametrize("group", [1, 2, 3, 5, 8] if INTERPRETED else [1, 2, 3, 5, 8, 64])
def test_the_launch_normalises_rewards_like_group_advantages(group):
    g = torch.Generator().manual_seed(group)
    n, vocab = 2 * group, 11
    rewards = torch.randn(n, generator=g).to(DEVICE)
    rewards[:group] = 0.1 + 0.2  # equal, and not exact in binary
    if group > 3:
        rewards[-1], rewards[-2] = NAN, INF
    logits, ids = random_logits(n, 2, vocab), random_ids(vocab, n, 2)
    mask = torch.ones(n, 2, dtype=torch.bool, device=DEVICE)
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    fused = grpo_loss(leaves[0], ids, mask, rewards=rewards, num_generations=group)
    advantages = group_advantages(rewards, group)
    apart = grpo_loss(leaves[1], ids, mask, advantages=advantages)
    torch.testing.assert_close(fused.loss, apart.loss, atol=1e-7, rtol=1e-6)
    for leaf, result in zip(leaves, (fused, apart), strict=True):
        result.loss.backward()
        assert (leaf.grad[:group] == 0).all()  # equal rewards: exactly nothing
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, atol=1e-7, rtol=1e-5)


@triton_rows.triton.jit
def token_loss_kernel(
    LOGP, LOG_RATIO, REF, ADVANTAGE, FACTOR, OUT, size, beta, low, high, delta,
    HAS_REF: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_FACTOR: tl.constexpr,
    POLICY: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`token_loss` alone, with (5, size) output."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = cols < size
    values = triton_rows.token_loss(
        tl.load(LOGP + cols, mask=keep, other=0.0), tl.load(LOG_RATIO + cols, mask=keep, other=0.0),
        tl.load(REF + cols, mask=keep, other=0.0), tl.load(ADVANTAGE + cols, mask=keep, other=0.0),
        tl.load(FACTOR + cols, mask=keep, other=0.0), beta, low, high, delta,
        HAS_REF, HAS_DELTA, HAS_FACTOR, POLICY, KL, KL_RATIO,
    )  # fmt: skip
    for i in tl.static_range(5):
        tl.store(OUT + i * size + cols, values[i], mask=keep)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "sapo"])
@pytest.mark.parametrize(
    ("epsilon", "delta"), [(0.2, None), (0.2, 0.9), (0.2, 1.5), (0.0, None), (0.0, 1.0), (0.2, 1.0)]
)
def test_the_pair_of_token_losses(epsilon, delta, loss_type, kl):
    """With epsilon or delta - 1 at 0, the log-ratio of 0 lies exactly on the edge."""
    log_ratio = torch.cat(
        [torch.linspace(-3, 3, 41), torch.tensor([0.0, -500.0, 500.0, 21.0, -INF])]
    )
    advantage = torch.tensor([-1.5, 0.0, 0.7])
    gap = torch.tensor([-30.0, -1.0, 0.0, 0.5, 30.0])
    grid = torch.cartesian_prod(log_ratio, advantage, gap).to(DEVICE)
    log_ratio, advantage, gap = (column.contiguous() for column in grid.T)
    g = torch.Generator().manual_seed(0)
    logp, weight = -torch.rand(len(grid), generator=g), torch.rand(len(grid), generator=g)
    logp, weight = logp.to(DEVICE), weight.to(DEVICE)
    ref = logp + gap
    with_weight = delta is not None  # every formula runs with and without both
    args = LossArgs(
        beta=0.1, epsilon_low=epsilon, epsilon_high=1 + epsilon if loss_type == "cispo" else None,
        delta=delta, loss_type=loss_type, kl=kl, use_bias_correction_kl=with_weight,
        sapo_temperature_neg=1.3,
    )  # fmt: skip
    wanted = token_loss(
        logp, log_ratio, ref, advantage, args, weight=weight if with_weight else None
    )
    out = torch.full((5, len(grid)), NAN, device=DEVICE)
    token_loss_kernel[(triton_rows.triton.cdiv(len(grid), 256),)](
        logp, log_ratio, ref, advantage, weight, out, len(grid), 0.1, *triton_rows._bounds(args),
        delta or 0.0, HAS_REF=True, HAS_DELTA=delta is not None, HAS_FACTOR=with_weight,
        **triton_rows._formulas(args), BLOCK=256,
    )  # fmt: skip
    clipped = wanted.clipped_high.float() - wanted.clipped_low.float()
    expected = torch.stack([wanted.loss, wanted.d_log_ratio, wanted.d_logp, wanted.kl, clipped])
    torch.testing.assert_close(out, expected, rtol=2e-6, atol=1e-6)


def test_infinite_log_probs_do_not_spoil_the_loss():
    """A sampled token that is banned now, and one that the reference bans, with and without old
    log-probs. One sequence, whose layout isn't a view of a single number."""
    logits, ids = random_logits(1, 3, 37), torch.tensor([[3, 5, 36]], device=DEVICE)
    logits[0, 0, 3] = -INF
    mask, ref = torch.ones_like(ids).bool(), torch.full((1, 3), -1.0, device=DEVICE)
    ref[0, 1] = -INF
    for old in (None, torch.full((1, 3), -2.0, device=DEVICE)):
        results = []
        for dtype in (torch.float64, torch.float32):
            leaf = logits.clone().to(dtype).requires_grad_()
            given = {"advantages": torch.ones(1), "old_logps": old, "ref_logps": ref}
            given = {k: v if v is None else v.to(DEVICE, dtype) for k, v in given.items()}
            result = grpo_loss(leaf, ids, mask, use_bias_correction_kl=True, **given)
            result.loss.backward()
            results.append((result.loss.item(), leaf.grad.double(), result.kl[0, 1].item()))
        (exact, wanted, _), (loss, grad, kl) = results
        assert math.isfinite(exact) and loss == pytest.approx(exact, rel=1e-5) and kl == INF
        torch.testing.assert_close(grad, wanted, atol=1e-6, rtol=1e-5)


# How each option is computed: in the fused launch, or from its log-probs.
OPTIONS = [
    {"loss_type": "sapo", "use_bias_correction_kl": True, "sapo_temperature_neg": 2.0},
    {"loss_type": "cispo", "is_weights": "token", "entropy_coef": 0.2, "epsilon_high": 1.1},
    {"is_weights": "sequence", "delta": 1.1, "use_bias_correction_kl": True},
    {"loss_type": "vespo", "is_weights": "sequence"},
    {"loss_type": "luspo", "off_policy_mask_threshold": 0.01},
    {"importance_sampling_mode": "sequence_mask", "delta": 1.1},
    {"importance_sampling_mode": "token_truncate", "loss_type": "vespo"},
    {"top_entropy_quantile": 0.5, "entropy_coef": 0.2},
    {"entropy_threshold": 3.0, "is_weights": "token", "entropy_coef": 0.2, "num_entropy_items": 3},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(OPTIONS)))
@pytest.mark.parametrize("linear", [False, True])
def test_options_against_float64(linear, number):
    logits, ids, mask, rewards, old, ref = make_problem()
    if not linear:  # a last position that predicts nothing
        logits = torch.cat([logits, torch.full_like(logits[:, :1], NAN)], 1)
    options = {"beta": 0.1} | OPTIONS[number]
    noise = random_logits(4, 3, seed=6, scale=0.3).exp()
    weights = {"token": noise, "sequence": noise[:, :1]}.get(options.pop("is_weights", None))
    tensors = {"advantages": rewards, "old_logps": old, "ref_logps": ref}
    if weights is not None:
        tensors["is_weights"] = weights
    if "importance_sampling_mode" in options:
        tensors["sampling_logps"] = old + 0.3 * (noise - 1)
    results = []
    for dtype in (torch.float64, torch.float32):
        leaf = logits.detach().to(dtype).requires_grad_()
        given = {k: v.to(dtype) for k, v in tensors.items()} | options
        if linear:
            eye = torch.eye(37, dtype=dtype, device=DEVICE)
            result = linear_grpo_loss(leaf, eye, ids, mask, chunk_tokens=2, **given)
        else:
            result = grpo_loss(leaf, ids, mask, **given)
        results.append((result, torch.autograd.grad(3 * result.loss, leaf)[0].double()))
    (exact, wanted), (ours, grad) = results
    assert_losses_equal(ours, exact)
    torch.testing.assert_close(grad, wanted, atol=1e-6, rtol=1e-5)
    assert (grad[:, :3][~mask] == 0).all() and (grad[:, 3:] == 0).all()


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo", "gspo"])
@pytest.mark.parametrize(("chunk_tokens", "softcap"), [(None, 1.5), (2, None), (2, 1.5), (4, None)])
def test_linear_loss_against_float64_padded_and_packed(loss_type, chunk_tokens, softcap):
    """Logits of up to 8 in size are soft-capped at 1.5; what is masked may be NaN."""
    _, ids, mask, rewards, old, ref = make_problem()
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(4, 3, 8, generator=g).to(DEVICE)
    weight = torch.randn(37, 8, generator=g).to(DEVICE)
    bias = torch.randn(37, generator=g).to(DEVICE)
    hidden[~mask] = NAN
    options = {"num_generations": 2, "loss_type": loss_type, "chunk_tokens": chunk_tokens}
    options["softcap"] = softcap
    offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    results = []
    for dtype, packed in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        pick = (lambda x: x[mask]) if packed else (lambda x: x)
        result = linear_grpo_loss(
            pick(leaves[0]), leaves[1], pick(ids), None if packed else mask, bias=leaves[2],
            rewards=rewards, old_logps=pick(old), ref_logps=pick(ref), beta=0.0,
            cu_seqlens=offsets if packed else None, **options,
        )  # fmt: skip
        results.append((result.loss.double(), torch.autograd.grad(result.loss, leaves)))
    for loss, grads in results[1:]:
        torch.testing.assert_close(loss, results[0][0], atol=1e-6, rtol=1e-5)
        for got, value in zip(grads, results[0][1], strict=True):
            torch.testing.assert_close(got.double(), value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [48, 50, 9000])
def test_the_gradient_tile_shrinks_to_16_bits_in_its_own_memory(dtype, vocab):
    tile = random_logits(4, vocab)
    tile[2] = NAN  # a token without gradient may hold anything
    ids = random_ids(vocab, 4)
    _, norms, entropy = triton_rows.rows_forward(tile, ids, 0.8)
    g = torch.tensor([0.5, -2.0, 0.0, 1.0], device=DEVICE)
    h = torch.tensor([0.0, 0.3, 0.0, -0.1], device=DEVICE)
    wanted = torch.full_like(tile, NAN)
    triton_rows.rows_backward(tile, ids, norms, entropy, g, h, 0.8, wanted)
    got = triton_rows.tile_backward(tile, ids, norms, entropy, g, h, 0.8, dtype)
    assert got.dtype == dtype and got.data_ptr() == tile.data_ptr()
    if INTERPRETED and dtype == torch.bfloat16:  # the interpreter cuts off, a GPU rounds
        torch.testing.assert_close(got.float(), wanted, rtol=2**-7, atol=0)
    else:
        assert torch.equal(got, wanted.to(dtype))


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_linear_logps_against_float64(softcap):
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(7, 8, generator=g), torch.randn(5001, 8, generator=g)
    ids = random_ids(5001, 7)
    results = []
    for dtype in (torch.float64, torch.float32):
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (hidden, weight)]
        given = {"softcap": softcap, "temperature": 0.8, "chunk_tokens": 3}
        logps, entropy = linear_logps(*leaves, ids, **given)
        grads = torch.autograd.grad((logps + entropy.square()).sum(), leaves)
        results.append([x.double() for x in (logps, entropy, *grads)])
    for got, value in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, value, atol=1e-5, rtol=1e-5)


def test_two_runs_give_the_same_bits():
    _, ids, mask, rewards, old, _ = make_problem()
    hidden = random_logits(4, 3, 16).requires_grad_()
    weight = random_logits(37, 16, seed=5).requires_grad_()
    runs = []
    for _ in range(2):
        result = linear_grpo_loss(
            hidden, weight, ids, mask, rewards=rewards, num_generations=2, old_logps=old
        )
        runs.append([result.loss, *torch.autograd.grad(result.loss, (hidden, weight))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="16-bit products with float32 out are a GPU's")
def test_16_bit_head_against_float64():
    """Log-probs as exact as float32 tiles make them; gradients rounded once, to 16 bits."""
    g = torch.Generator().manual_seed(0)
    n, t, d, vocab = 8, 40, 256, 8192
    hidden = torch.randn(n, t, d, generator=g).to(DEVICE, torch.bfloat16)
    weight = (torch.randn(vocab, d, generator=g) * 0.3).to(DEVICE, torch.bfloat16)
    ids = random_ids(vocab, n, t)
    mask = torch.ones(n, t, dtype=torch.bool, device=DEVICE)
    rewards = torch.randn(n, generator=g).to(DEVICE)
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        result = linear_grpo_loss(*leaves, ids, mask, rewards=rewards, num_generations=4)
        results.append((result.logps.double(), *torch.autograd.grad(result.loss, leaves)))
    assert (results[1][0] - results[0][0]).abs().max() < 1e-3
    for got, value in zip(results[1][1:], results[0][1:], strict=True):
        assert ((got.double() - value).norm() / value.norm()).item() < 4e-3


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
def test_a_new_completion_length_compiles_nothing():
    def compiled():
        kernels = (triton_rows.grpo_forward_kernel, triton_rows.rows_backward_kernel)
        return sum(len(cache[0]) for k in kernels for cache in k.device_caches.values())

    counts = []
    for t, temperature in ((5, 1.0), (6, 0.9), (7, 0.8), (16, 0.7), (33, 0.6)):
        logits = random_logits(4, t, 64).requires_grad_()
        mask = torch.ones(4, t, dtype=torch.bool, device=DEVICE)
        rewards = torch.arange(4.0, device=DEVICE)
        result = grpo_loss(
            logits, random_ids(64, 4, t), mask, rewards=rewards, num_generations=2,
            temperature=temperature,
        )  # fmt: skip
        result.loss.backward()
        counts.append(compiled())
    assert counts[0] == counts[-1]


@pytest.mark.parametrize(("vocab", "softcap"), [(37, None), (37, 1.5), (4160, None)])
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bit_factors_against_float64(monkeypatch, autocast, vocab, softcap):
    """The way of a GPU: 16-bit factors, float32 products, the gradient tile over the logits."""
    if INTERPRETED:
        stub_16_bit_products(monkeypatch)
    g = torch.Generator().manual_seed(3)
    _, _, mask, rewards, _, _ = make_problem()
    ids = random_ids(vocab, 4, 3)
    hidden = torch.randn(4, 3, 16, generator=g).bfloat16().to(DEVICE)
    weight = torch.randn(vocab, 16, generator=g).bfloat16().to(DEVICE)
    given = torch.float32 if autocast else torch.bfloat16
    results = []
    for dtype in (torch.float64, given):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast and dtype == given):
            head = {"softcap": softcap, "chunk_tokens": 5}
            loss = linear_grpo_loss(*leaves, ids, mask, rewards=rewards, num_generations=2, **head)
            logps, entropy = linear_logps(*leaves, ids, temperature=0.9, **head)
        grads = [g for x in (loss.loss, (logps + entropy).mean())
                 for g in torch.autograd.grad(x, leaves)]  # fmt: skip
        results.append((loss.logps.double(), logps.double(), entropy.double(), *grads))
    for got, value in zip(results[1][:3], results[0][:3], strict=True):
        torch.testing.assert_close(got, value, atol=1e-5, rtol=1e-5)
    limit = 8e-3 if INTERPRETED else 4e-3  # the interpreter cuts bits off where a GPU rounds
    for got, value in zip(results[1][3:], results[0][3:], strict=True):
        assert got.dtype == given
        assert ((got.double() - value).norm() / value.norm()).item() < limit


def stub_16_bit_products(monkeypatch):
    def product(left, right, dtype):
        assert left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float64)
        return (left.double() @ right.double()).to(dtype)

    monkeypatch.setattr(linear_module, "_multiplies_16_bits", lambda device: True)
    monkeypatch.setattr(
        linear_module, "_mm", lambda left, right, out: out.copy_(product(left, right, out.dtype))
    )
    monkeypatch.setattr(
        linear_module,
        "_add_mm",
        lambda total, left, right: total.add_(product(left, right, total.dtype)),
    )


@pytest.mark.skipif(not INTERPRETED, reason="4 GiB that a CPU never touches")
def test_rows_beyond_32_bits():
    """Rows 2^31 elements apart, read and written where they are."""
    apart, vocab = 2**31 + 16, 17
    logits = torch.empty(apart + 64, dtype=torch.bfloat16).as_strided((2, vocab), (apart, 1))
    logits.copy_(random_logits(2, vocab))
    ids = torch.tensor([3, 16])
    expected = logits.double().requires_grad_()
    wanted = oracle(expected, ids)[0]
    (grad,) = torch.autograd.grad(wanted.sum(), expected)
    logps, norms, _ = triton_rows.rows_forward(logits, ids, 1.0)
    torch.testing.assert_close(logps.double(), wanted.detach(), atol=1e-5, rtol=1e-5)
    triton_rows.rows_backward(logits, ids, norms, None, torch.ones(2), None, 1.0, logits)
    torch.testing.assert_close(logits.double(), grad, atol=1e-3, rtol=1e-2)
