"""The GRPO loss with the LM head, and log-probs from logits: time, memory and error of each peer.

    pytest benchmarks/test_bench_loss.py                 sizes that take minutes on a CPU
    pytest benchmarks/test_bench_loss.py --size 2b       Qwen2-VL's own, on a GPU; also 7b

Every contender gets the same tensors. Its loss and gradients are first compared with float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from measure import DEVICE, Case, contenders, peak_mib, provider
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from virft_fast.kernels import grpo_loss, linear_grpo_loss, logps_and_entropy

# (sequences, tokens, D, V)
SIZES = {
    "tiny": (4, 8, 16, 512),
    "cpu": (8, 256, 256, 32_768),
    "2b": (64, 200, 1536, 151_936),
    "7b": (64, 200, 3584, 152_064),
}
EPSILON = 0.2
PASSES = pytest.fixture(scope="module", params=["forward", "forward+backward"])


@dataclass(frozen=True)
class Problem:
    hidden: Tensor
    weight: Tensor
    ids: Tensor
    mask: Tensor
    advantages: Tensor
    old: Tensor

    @classmethod
    def make(cls, size: str) -> Problem:
        n, t, d, vocab = SIZES[size]
        g = torch.Generator().manual_seed(0)
        dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
        hidden = torch.randn(n, t, d, generator=g).to(DEVICE, dtype)
        weight = (torch.randn(vocab, d, generator=g) * (2 / d**0.5)).to(DEVICE, dtype)
        ids = torch.randint(vocab, (n, t), generator=g).to(DEVICE)
        lengths = torch.randint(t // 2, t + 1, (n,), generator=g)
        lengths[0] = t
        mask = (torch.arange(t) < lengths[:, None]).to(DEVICE)
        advantages = torch.randn(n, generator=g).to(DEVICE)
        with torch.no_grad():
            logps = exact_logps(hidden.double(), weight.double(), ids)
        old = logps.float() + 0.1 * torch.randn(n, t, generator=g).to(DEVICE)
        return cls(hidden, weight, ids, mask, advantages, old)

    def leaves(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        pick = lambda x: x.detach().to(dtype or x.dtype).clone().requires_grad_()  # noqa: E731
        return pick(self.hidden), pick(self.weight)


def exact_logps(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """(N, T) float64, one sequence at a time."""

    def one(hidden, ids):
        return (hidden @ weight.T).log_softmax(-1).gather(1, ids[:, None])[:, 0]

    pairs = zip(hidden, ids, strict=True)
    return torch.stack([checkpoint(one, *pair, use_reentrant=False) for pair in pairs])


def torch_loss(logps: Tensor, problem: Problem) -> Tensor:
    """GRPO's loss from log-probs (N, T), for peers that return only log-probs."""
    ratio = (logps - problem.old.to(logps.dtype)).exp()
    advantages = problem.advantages.to(logps.dtype)[:, None]
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    mask = problem.mask.to(logps.dtype)
    return ((per_token * mask).sum(1) / mask.sum(1)).mean()


def naive(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    return torch_loss(log_p.gather(-1, problem.ids[..., None])[..., 0], problem)


def trl(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    mask = problem.mask
    logps = ChunkedLogProbFunction.apply(
        hidden[mask], weight, None, problem.ids[mask], 1.0, 32_768, None, 1.0, ("entropy",)
    )[0]
    whole = torch.zeros(mask.shape, dtype=logps.dtype, device=mask.device)
    return torch_loss(whole.masked_scatter(mask, logps), problem)


def liger(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, epsilon_low=EPSILON, epsilon_high=EPSILON, loss_type="grpo", use_ref_model=False,
        compiled=False,
    )  # fmt: skip
    return loss(
        hidden, weight, problem.ids, problem.mask.to(hidden.dtype), problem.advantages,
        old_per_token_logps=problem.old,
    )[0]  # fmt: skip


def torch_linear(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    nll = F.linear_cross_entropy(
        hidden.flatten(0, 1), weight, problem.ids.flatten(), reduction="none", options=options
    )
    return torch_loss(-nll.float().view(problem.ids.shape), problem)


def ours(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    return linear_grpo_loss(
        hidden, weight, problem.ids, problem.mask, advantages=problem.advantages,
        old_logps=problem.old, epsilon_low=EPSILON,
    ).loss  # fmt: skip


LOSSES = {
    "naive torch": naive,
    "TRL, fused head": trl,
    "Liger, chunked": liger,
    "F.linear_cross_entropy": torch_linear,
    "torch.compile": torch.compile(naive, dynamic=False),
    "ours": ours,
}
if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
    LOSSES["F.linear_cross_entropy"] = "needs torch 2.13 or later"


def naive_logps(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    log_p = (hidden[problem.mask] @ weight.T).float().log_softmax(-1)
    return log_p.gather(-1, problem.ids[problem.mask][:, None])[:, 0]


def our_logps(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    return linear_grpo_loss(
        hidden, weight, problem.ids, problem.mask, advantages=problem.advantages
    ).logps[problem.mask]


# For contenders that return them, the log-probs of the tokens that count.
LOGPS = {"naive torch": naive_logps, "ours": our_logps}


def relative(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


@PASSES
def head(request, size):
    gradient = request.param != "forward"
    problem = Problem.make(size)
    exact_loss, exact_grads, wanted = exact(problem)
    runs, notes = without_compile(LOSSES, size), {}
    for name, loss in runs.items():
        if isinstance(loss, str) or not provider(name)[1]:
            continue
        leaves = problem.leaves()

        def step(loss=loss, leaves=leaves):
            if not gradient:
                with torch.no_grad():
                    return loss(problem, *leaves)
            return torch.autograd.grad(loss(problem, *leaves), leaves)

        value = loss(problem, *leaves)
        grads = torch.autograd.grad(value, leaves)
        errors = [relative(g, e) for g, e in zip(grads, exact_grads, strict=True)]
        # Peers with 16-bit logits have errors of about a percent: reported, and bounded.
        limit = 1e-5 if DEVICE == "cpu" else 5e-2
        assert abs(value.item() - exact_loss) < (1e-5 if DEVICE == "cpu" else 1e-2), name
        assert max(errors) < limit, (name, errors)
        notes[name] = {"peak_mib": peak_mib(step), "gradient_error": max(errors)}
        if name in LOGPS:
            with torch.no_grad():
                logps = LOGPS[name](problem, *leaves)
            notes[name]["logp_error"] = (logps.double() - wanted).abs().max().item()
        del grads, value
        runs[name] = step
    assert notes["ours"]["logp_error"] < (1e-5 if DEVICE == "cpu" else 1e-3), notes["ours"]
    if size == "cpu" and gradient:
        assert notes["ours"]["peak_mib"] <= notes["naive torch"]["peak_mib"] / 8, notes
    runs["the products alone"] = lambda: products(problem, gradient)
    return Case(f"LM head and loss, {size}: {request.param}", runs, notes)


@contenders(*LOSSES, "the products alone")
def test_head_and_loss(race, head, contender):
    race(head, contender)


def without_compile(functions, size):
    """Without torch.compile where it would take longer than all the rest."""
    return functions | ({"torch.compile": "not for --size tiny"} if size == "tiny" else {})


def exact(problem: Problem) -> tuple[float, tuple[Tensor, ...], Tensor]:
    """Loss, gradients and log-probs of the tokens that count, in float64."""
    hidden, weight = problem.leaves(torch.float64)
    logps = exact_logps(hidden, weight, problem.ids)
    loss = torch_loss(logps, problem)
    grads = torch.autograd.grad(loss, (hidden, weight))
    return loss.item(), grads, logps.detach()[problem.mask]


def products(problem: Problem, gradient: bool) -> None:
    """The matrix products that no contender can avoid, on the tokens that count; the gradient of
    the weights is summed in float32."""
    with torch.no_grad():
        hidden, weight = problem.hidden[problem.mask], problem.weight
        size = 2048 if DEVICE == "cuda" else 256
        total = torch.zeros_like(weight, dtype=torch.float32) if gradient else None
        for rows in hidden.split(size):
            logits = rows @ weight.T
            if gradient:
                logits @ weight
                if total.dtype == rows.dtype:
                    total.addmm_(logits.T, rows)
                else:
                    torch.addmm(total, logits.T, rows, out_dtype=total.dtype, out=total)


@pytest.fixture(scope="module")
def loss(size):
    """The loss and its gradient from precomputed logits and old log-probs."""
    n, t, vocab = (8, 64, 32_768) if DEVICE == "cpu" else (32, 256, 151_936)
    if size == "tiny":
        n, t, _, vocab = SIZES[size]
    g = torch.Generator().manual_seed(0)
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    # One position more than tokens, as models return them and Liger's kernel expects.
    logits = (3 * torch.randn(n, t + 1, vocab, generator=g)).to(DEVICE, dtype).requires_grad_()
    ids = torch.randint(vocab, (n, t), generator=g).to(DEVICE)
    mask = torch.ones(n, t, dtype=torch.bool, device=DEVICE)
    advantages = torch.randn(n, generator=g).to(DEVICE)
    with torch.no_grad():
        old = logps_and_entropy(logits[:, :-1], ids)[0]
        old += 0.1 * torch.randn(n, t, generator=g).to(DEVICE)
    problem = Problem(logits, logits, ids, mask, advantages, old)

    def plain():
        log_p = logits[:, :-1].float().log_softmax(-1)
        return torch_loss(log_p.gather(-1, ids[..., None])[..., 0], problem)

    def fused():
        return grpo_loss(
            logits, ids, mask, advantages=advantages, old_logps=old, epsilon_low=EPSILON
        ).loss

    functions = {"naive torch": plain, "torch.compile": torch.compile(plain), "ours": fused}
    runs, notes = {"Liger, rows": "needs a GPU"}, {}
    if provider("Liger")[1] and DEVICE == "cuda":
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        def liger_rows():
            return triton_grpo_loss(
                logits, old, None, ids, advantages, mask, temperature=1.0, beta=0.0,
                eps_low=EPSILON, eps_high=EPSILON, inplace=False, loss_type="grpo", reduce=True,
            )[0]  # fmt: skip

        functions["Liger, rows"] = liger_rows
    runs |= without_compile(functions, size)
    wanted = plain()
    exact = torch.autograd.grad(wanted, logits)[0]
    for name, function in runs.items():
        if isinstance(function, str):
            continue
        step = lambda function=function: torch.autograd.grad(function(), logits)[0]  # noqa: E731
        assert abs(function().item() - wanted.item()) < 1e-4, name
        error = relative(step(), exact)
        assert error < (1e-5 if DEVICE == "cpu" else 2e-2), (name, error)
        notes[name] = {"peak_mib": peak_mib(step)}
        runs[name] = step
    return Case(f"loss from {n}x{t} rows of logits, forward+backward", runs, notes)


@contenders("naive torch", "torch.compile", "Liger, rows", "ours")
def test_loss_from_logits(race, loss, contender):
    race(loss, contender)


@PASSES
def rows(request, size):
    """Log-prob and entropy from precomputed logits."""
    gradient = request.param != "forward"
    rows, vocab = (512, 32_768) if DEVICE == "cpu" else (8192, 151_936)
    if size == "tiny":
        rows, vocab = 32, 512
    g = torch.Generator().manual_seed(0)
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    logits = (3 * torch.randn(rows, vocab, generator=g)).to(DEVICE, dtype).requires_grad_()
    ids = torch.randint(vocab, (rows,), generator=g).to(DEVICE)

    def plain():
        log_p = logits.float().log_softmax(-1)
        return log_p.gather(1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    def fused():
        return logps_and_entropy(logits, ids)

    functions = {"naive torch": plain, "ours": fused}
    runs, notes = {"TRL, rows": "needs a GPU"}, {}
    if provider("TRL")[1] and DEVICE == "cuda":
        from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

        functions["TRL, rows"] = lambda: selective_log_softmax_and_entropy(logits, ids)
    wanted = [x.double() for x in plain()]
    exact = torch.autograd.grad(wanted[0].sum(), logits)[0]

    def step(function):
        if not gradient:
            with torch.no_grad():
                return function()
        return torch.autograd.grad(function()[0].sum(), logits)

    for name, function in functions.items():
        values = function()
        for got, value in zip(values, wanted, strict=True):
            torch.testing.assert_close(got.double(), value, atol=2e-4, rtol=1e-5)
        error = relative(torch.autograd.grad(values[0].sum(), logits)[0], exact)
        assert error < (1e-5 if DEVICE == "cpu" else 2e-2), (name, error)
        runs[name] = partial(step, function)
        notes[name] = {"peak_mib": peak_mib(runs[name]), "gradient_error": error}
    copy = torch.empty_like(logits)
    runs["a copy of the logits"] = lambda: copy.copy_(logits.detach())
    return Case(f"{rows} rows of logits: {request.param}", runs, notes)


@contenders("naive torch", "TRL, rows", "ours", "a copy of the logits")
def test_rows_of_logits(race, rows, contender):
    race(rows, contender)
