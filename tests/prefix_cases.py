"""Cases for attention over packed rows, against float64: test_prefix_attention.py runs them on the
torch reference, and in a process with TRITON_INTERPRET=1 on the Triton kernels.

By hand, more and longer rows than in CI, N examples of up to S tokens:
PREFIX_EXAMPLES=N PREFIX_TOKENS=S TRITON_INTERPRET=1 pytest tests/prefix_cases.py -k random_rows
"""

import os
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from virft_fast.kernels import PrefixLayout, prefix_attention
from virft_fast.kernels.backend import triton_for

KERNELS = sys.modules["virft_fast.kernels.prefix_attention"]  # whose name is the function's, too
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = not INTERPRETED and os.environ.get("VIRFT_CASES") == "gpu"
DEVICE = "cuda" if ON_GPU else "cpu"
NAN = float("nan")
# The interpreter cuts bits off where a GPU rounds.
LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
EXAMPLES = int(os.environ.get("PREFIX_EXAMPLES", 4 if INTERPRETED else 25))
MOST_TOKENS = int(os.environ.get("PREFIX_TOKENS", 110 if INTERPRETED else 700))
few = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes when interpreted
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
only_interpreted = pytest.mark.skipif(not INTERPRETED, reason="looks into the interpreter")


@pytest.fixture(autouse=True, scope="module")
def poisoned_outputs():
    """Whatever a kernel leaves unwritten is NaN."""
    if not (INTERPRETED or ON_GPU):
        yield
        return
    from virft_fast.kernels import triton_prefix_attention

    def nans(shape, dtype, device):
        return torch.full(shape, NAN, dtype=dtype, device=device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_prefix_attention, "_empty", nans)
        yield


@pytest.fixture
def small_items(monkeypatch):
    """The keys' gradients of short rows are split, too."""
    monkeypatch.setattr(KERNELS, "MIN_STEPS", 3)
    monkeypatch.setattr(KERNELS, "MAX_ITEMS", 1000)


def test_cases_run_the_implementation_that_they_mean_to():
    module = triton_for(torch.zeros(1, device=DEVICE), "triton_prefix_attention")
    assert (module is not None) == (INTERPRETED or ON_GPU)


def make_row(layout, heads, kv_heads, size, dtype=torch.float32, seed=0, how="apart"):
    """Query, key and value, and the gradient of the output, laid out in one of several ways."""
    g, length = torch.Generator().manual_seed(seed), layout.num_tokens

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE, dtype)

    if how == "merged":  # one projection
        row = normal(length, heads + 2 * kv_heads, size).split([heads, kv_heads, kv_heads], 1)
    elif how == "by head":
        row = [normal(n, length, size).transpose(0, 1) for n in (heads, kv_heads, kv_heads)]
    elif how == "strided":  # numbers of a head aren't next to each other
        row = [normal(length, n, 2 * size)[..., ::2] for n in (heads, kv_heads, kv_heads)]
    else:
        row = [normal(length, n, size) for n in (heads, kv_heads, kv_heads)]
    return [states.detach().requires_grad_() for states in row], normal(length, heads, size)


def run(row, layout, grad, **options):
    """Output and gradients."""
    options = {"scaling": row[0].shape[-1] ** -0.5, **options}
    out = prefix_attention(*row, layout, **options)
    return [out.detach(), *torch.autograd.grad(out, row, grad.to(out.dtype))]


def sees(layout):
    """(S, S) bool: a token sees earlier ones of its group, in the prompt or its own completion, and
    its whole block, but nothing before the window."""
    segments = [
        (number, own, place + group.prompt_length * (own > 0))
        for number, group in enumerate(layout.groups)
        for own, length in enumerate((group.prompt_length, *group.lengths))
        for place in range(length)
    ]
    group, own, place = torch.tensor(segments, device=DEVICE).view(-1, 3).T
    visible = (group[:, None] == group) & ((own == 0) | (own[:, None] == own))
    near = place > place[:, None] - (layout.window or len(segments) + 1)
    causal = torch.ones_like(visible).tril()
    for g in layout.groups:
        for first, end in g.blocks:
            causal[g.start + first : g.start + end, g.start + first : g.start + end] = True
    return visible & near & causal


def dense(row, layout, grad):
    """The same in float64."""
    leaves = [states.detach().double().requires_grad_() for states in row]
    query, *rest = leaves
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in rest)
    scores = torch.einsum("qhe,khe->hqk", query, key) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~sees(layout), -torch.inf)
    out = torch.einsum("hqk,khe->qhe", scores.softmax(-1), value)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


def assert_close(got, exact, dtype=torch.float32):
    limit = LIMITS[dtype]
    for ours, wanted in zip(got, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == wanted.shape
        if dtype == torch.float32:
            torch.testing.assert_close(ours.double(), wanted, atol=limit, rtol=limit)
        elif wanted.numel():  # sums of rounded terms
            assert (ours.double() - wanted).norm() <= limit * wanted.norm()


# ---- values and gradients ------------------------------------------------------------------------


@st.composite
def layouts(draw, most=MOST_TOKENS):
    """Groups of 0 to 9 completions, lengths of 0 to 300, of at most `most` tokens together."""
    left, prompts, completions = most, [], []

    def length():
        nonlocal left
        longest = min(300, left)
        size = draw(st.one_of(st.integers(0, longest), st.integers(0, min(40, longest))))
        left -= size
        return size

    for _ in range(draw(st.integers(1, 4))):
        prompts.append(length())
        completions.append([length() for _ in range(draw(st.integers(0, 9)))])
    return prompts, completions


@only_interpreted
def test_many_blocks_take_several_launches(monkeypatch, small_items):
    from virft_fast.kernels import triton_prefix_attention as kernels

    layout = PrefixLayout.from_lengths(*ROW, device=DEVICE)
    row, grad = make_row(layout, 4, 2, 16)
    expected = run(row, layout, grad)
    monkeypatch.setattr(kernels, "MAX_BLOCKS", 2)
    for ours, wanted in zip(run(row, layout, grad), expected, strict=True):
        assert torch.equal(ours, wanted)


@few
@given(
    lengths=layouts(), kv_heads=st.integers(1, 2), repeats=st.integers(1, 8),
    size=st.sampled_from([16, 24, 32, 64, 80, 128]), seed=st.integers(0, 99),
    how=st.sampled_from(["apart", "merged", "by head"]),
    steps=st.sampled_from([1, 4, KERNELS.MIN_STEPS]),
)  # fmt: skip
def test_random_rows_against_float64(
    monkeypatch, lengths, kv_heads, repeats, size, seed, how, steps
):
    monkeypatch.setattr(KERNELS, "MIN_STEPS", steps)
    layout = PrefixLayout.from_lengths(*lengths, device=DEVICE)
    row, grad = make_row(layout, kv_heads * repeats, kv_heads, size, seed=seed, how=how)
    assert_close(run(row, layout, grad), dense(row, layout, grad))


@settings(few, max_examples=2 if INTERPRETED else 10)
@given(lengths=layouts(most=900), seed=st.integers(0, 99))
def test_long_rows_against_float64(lengths, seed):
    layout = PrefixLayout.from_lengths(*lengths, device=DEVICE)
    row, grad = make_row(layout, 2, 1, 16, seed=seed)
    assert_close(run(row, layout, grad), dense(row, layout, grad))


@pytest.mark.parametrize("how", ["merged", "strided"])
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_dtypes_against_float64(dtype, how, small_items):
    layout = PrefixLayout.from_lengths([70, 5], [[3, 80, 0, 20], [9]], device=DEVICE)
    row, grad = make_row(layout, 2, 1, 16, dtype, how=how)
    assert_close(run(row, layout, grad), dense(row, layout, grad), dtype)


def test_float64_goes_to_the_reference():
    layout = PrefixLayout.from_lengths([3], [[2, 0, 3]], device=DEVICE)
    row, _ = make_row(layout, 2, 1, 8, torch.float64)
    assert torch.autograd.gradcheck(lambda *row: prefix_attention(*row, layout, scaling=0.3), row)


@pytest.mark.parametrize("window", [None, 1, 3, 20, 74])
@pytest.mark.parametrize("blocks", [(), ((0, 6), (7, 8), (60, 70))])
def test_windows_and_blocks_against_float64(window, blocks):
    """A window shorter than a block, than a completion, than a prompt, and than both together."""
    lengths = [70, 5], [[3, 80, 0, 20], [9]]
    groups = PrefixLayout.from_lengths(*lengths).groups
    groups = (replace(groups[0], blocks=blocks), groups[1])
    layout = PrefixLayout(groups, torch.device(DEVICE), window)
    row, grad = make_row(layout, 4, 2, 16)
    assert layout.causal == (window is None and not blocks)
    assert_close(run(row, layout, grad), dense(row, layout, grad))


def test_an_empty_window_is_refused():
    groups = PrefixLayout.from_lengths([3], [[2]]).groups
    with pytest.raises(ValueError, match="window: expected at least 1 token or None, got 0"):
        PrefixLayout(groups, torch.device(DEVICE), 0)


def test_large_heads_go_to_the_reference():
    layout = PrefixLayout.from_lengths([3], [[2, 0, 3]], device=DEVICE)
    row, grad = make_row(layout, 2, 1, 160)
    assert_close(run(row, layout, grad), dense(row, layout, grad))


@pytest.mark.parametrize(
    "lengths", [([], []), ([0], [[]]), ([0, 0], [[0], [4, 0]]), ([5, 0], [[], []]), ([1], [[1]])]
)
def test_empty_prompts_completions_and_rows(lengths):
    layout = PrefixLayout.from_lengths(*lengths, device=DEVICE)
    row, grad = make_row(layout, 2, 1, 16)
    assert_close(run(row, layout, grad), dense(row, layout, grad))


def test_heads_beyond_32_bits():
    """Heads 2^30 numbers apart, so that the last one starts beyond 2^31."""
    layout = PrefixLayout.from_lengths([20], [[3, 5]], device=DEVICE)
    small, grad = make_row(layout, 3, 3, 16, torch.float16, how="by head")
    apart = 2**30 + 16
    memory = torch.empty(2 * apart + 28 * 16, dtype=torch.float16, device=DEVICE)
    far = memory.as_strided((28, 3, 16), (16, apart, 1)).copy_(small[0].detach()).requires_grad_()
    row = [far, *(far.detach().requires_grad_() for _ in range(2))]
    assert_close(run(row, layout, grad), dense(row, layout, grad), torch.float16)


def test_large_scores():
    """Of which all but one share of a row are 0."""
    layout = PrefixLayout.from_lengths([20], [[7, 9]], device=DEVICE)
    row, grad = make_row(layout, 2, 1, 16)
    row = [(300 * row[0].detach()).requires_grad_(), *row[1:]]
    got, exact = run(row, layout, grad), dense(row, layout, grad)
    for ours, wanted in zip(got, exact, strict=True):
        assert ours.isfinite().all()
        assert (ours.double() - wanted).norm() <= 1e-4 * wanted.norm()


# ---- isolation -----------------------------------------------------------------------------------

ROW = ([17, 40], [[9, 0, 30], [5, 12]])  # the second completion group starts at row 96


def test_another_completion_changes_nothing_at_all():
    layout = PrefixLayout.from_lengths(*ROW, device=DEVICE)
    row, grad = make_row(layout, 2, 1, 16)
    other = [states.detach().clone() for states in row]
    for states in (*other, new_grad := grad.clone()):
        states[26:56] = 3 * torch.randn_like(states[26:56])  # the first group's last completion
    first = run(row, layout, grad)
    second = run([states.requires_grad_() for states in other], layout, new_grad)
    kept = torch.ones(layout.num_tokens, dtype=torch.bool)
    kept[26:56] = False
    assert torch.equal(first[0][kept], second[0][kept])
    assert torch.equal(first[1][kept], second[1][kept])
    kept[:17] = False  # the prompt's keys and values collect from it
    for a, b in zip(first[2:], second[2:], strict=True):
        assert torch.equal(a[kept], b[kept])
        assert not torch.equal(a[:17], b[:17])


@pytest.mark.parametrize("poisoned", [slice(0, 56), slice(56, 113)], ids=["first", "second"])
def test_nan_stays_in_its_group(poisoned, small_items):
    layout = PrefixLayout.from_lengths(*ROW, device=DEVICE)
    row, grad = make_row(layout, 2, 1, 16)
    expected = run(row, layout, grad)
    for states in (*row, grad):
        states.detach()[poisoned] = NAN
    kept = torch.ones(layout.num_tokens, dtype=torch.bool)
    kept[poisoned] = False
    for got, wanted in zip(run(row, layout, grad), expected, strict=True):
        assert torch.equal(got[kept], wanted[kept]) and got[poisoned].isnan().all()


def test_the_same_bits_every_time(small_items):
    layout = PrefixLayout.from_lengths([40], [[20] * 3], device=DEVICE)
    row, grad = make_row(layout, 2, 1, 16)
    first = run(row, layout, grad)
    fresh = PrefixLayout.from_lengths([40], [[20] * 3], device=DEVICE)
    for other in (layout, fresh):
        assert all(map(torch.equal, run(row, other, grad), first))


# ---- autograd ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_bitwise_the_same(reentrant):
    layout = PrefixLayout.from_lengths([9], [[4, 6]], device=DEVICE)
    row, grad = make_row(layout, 2, 1, 16)
    expected = run(row, layout, grad)

    def attend(*row):
        return prefix_attention(*row, layout, scaling=16**-0.5)

    out = checkpoint(attend, *row, use_reentrant=reentrant)
    out.backward(grad)
    assert all(map(torch.equal, (out, *(states.grad for states in row)), expected))


def test_a_layout_made_for_inference_serves_training():
    layout = PrefixLayout.from_lengths([9], [[4, 6]], device=DEVICE)
    row, grad = make_row(layout, 2, 1, 16)
    with torch.inference_mode():
        out = prefix_attention(*row, layout, scaling=16**-0.5)
    assert torch.equal(run(row, layout, grad)[0], out)


def test_autocast_casts_the_arguments():
    layout = PrefixLayout.from_lengths([9], [[4, 6]], device=DEVICE)
    row, grad = make_row(layout, 2, 1, 16)
    narrow = [states.detach().bfloat16().requires_grad_() for states in row]
    expected = run(narrow, layout, grad)
    mixed = [row[0], row[1], row[2].detach().bfloat16().requires_grad_()]
    with torch.autocast(DEVICE, torch.bfloat16):
        got = run(mixed, layout, grad)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.bfloat16(), b)
    assert [g.dtype for g in got[1:]] == [torch.float32, torch.float32, torch.bfloat16]


def test_parts_without_gradient_and_a_spread_gradient():
    layout = PrefixLayout.from_lengths([9], [[4, 4]], device=DEVICE)
    (query, key, value), _ = make_row(layout, 2, 1, 16)
    out = prefix_attention(query, key.detach(), value, layout, scaling=0.25)
    grads = torch.autograd.grad(out.sum(), (query, value))  # an expanded gradient
    ones = torch.ones_like(out)
    expected = dense((query, key, value), layout, ones)
    assert_close(grads, [expected[1], expected[3]])
    with torch.no_grad():
        assert torch.equal(prefix_attention(query, key, value, layout, scaling=0.25), out)


@pytest.mark.skipif(not (INTERPRETED or ON_GPU), reason="of the kernels")
def test_only_output_and_log_sum_exp_are_kept_and_one_derivative():
    layout = PrefixLayout.from_lengths([9], [[4, 6]], device=DEVICE)
    row, grad = make_row(layout, 4, 2, 16)
    out = prefix_attention(*row, layout, scaling=0.25)
    kept = out.grad_fn.saved_tensors
    assert [x.data_ptr() for x in kept[:4]] == [x.data_ptr() for x in (*row, out)]
    assert [x.shape for x in kept[4:]] == [(4, layout.num_tokens)]
    grad.requires_grad_()
    (first,) = torch.autograd.grad(out, row[:1], grad, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "text"),
    [
        (([3, 4], [[1]]), "completion_lengths: expected a list for each of the 2 prompts, got 1"),
        (([-3], [[1]]), "expected lengths of at least 0, got a prompt of -3"),
        (([3], [[1, -1]]), r"expected lengths of at least 0, .* completions of \[1, -1\]"),
        (
            ([3], [2]),
            r"expected .* completion_lengths \[\[C, .* in whole numbers, .* completions of 2",
        ),
        (([3.5], [[2]]), "in whole numbers, got a prompt of 3.5 and completions of"),
        (([3], [[2, 1.0]]), r"in whole numbers, .* completions of \[2, 1.0\]"),
    ],
)
def test_impossible_lengths_are_named(lengths, text):
    with pytest.raises(ValueError, match=text):
        PrefixLayout.from_lengths(*lengths)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda q, k, v: (q[None], k, v), r"expected \(S, H, E\) and \(S, K, E\)"),
        (lambda q, k, v: (q, k[:, :0], v), "with H a multiple of K"),
        (lambda q, k, v: (q[:, :3], k, v), "with H a multiple of K"),
        (lambda q, k, v: (q[:-1], k, v), r"query: expected \(113, 4, 16\) for the layout's 113"),
        (lambda q, k, v: (q, k[:-1], v), r"key: expected \(113, 2, 16\)"),
        (lambda q, k, v: (q, k, v[..., :8]), r"value: expected \(113, 2, 16\)"),
        (lambda q, k, v: (q[..., :8], k, v), r"query: expected \(113, 4, 16\)"),
        (lambda q, k, v: (q, k.half(), v), "key: expected the query's dtype, 16, 32 or 64 bits"),
        (lambda *row: [x.to(torch.float8_e4m3fn) for x in row], "got torch.float8_e4m3fn"),
        (lambda q, k, v: (q.long(), k.long(), v.long()), "got torch.int64"),
        (lambda q, k, v: (q, k, v.to("meta")), "value: expected on the layout's .*, got meta"),
        (lambda q, k, v: (q.to("meta"), k, v), "query: expected on the layout's .*, got meta"),
    ],
)
def test_tensors_that_disagree_are_named(change, text):
    layout = PrefixLayout.from_lengths(*ROW, device=DEVICE)
    row, _ = make_row(layout, 4, 2, 16)
    with pytest.raises(ValueError, match=text):
        prefix_attention(*change(*(states.detach() for states in row)), layout, scaling=1.0)


def test_a_scaling_that_is_a_tensor_is_named():
    layout = PrefixLayout.from_lengths(*ROW, device=DEVICE)
    row, _ = make_row(layout, 4, 2, 16)
    with pytest.raises(ValueError, match="scaling: expected a number, got Tensor"):
        prefix_attention(*row, layout, scaling=torch.tensor(0.25))


# ---- work ----------------------------------------------------------------------------------------


@only_interpreted
@pytest.mark.parametrize("steps", [2, 48])
def test_tiles_visited_are_those_that_the_mask_needs(monkeypatch, steps):
    """Two products a tile in the forward pass, three and four in the backward pass."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    from virft_fast.kernels import triton_prefix_attention as kernels

    monkeypatch.setattr(KERNELS, "MIN_STEPS", steps)
    products, current = {}, []
    launch, product = GridExecutor.__call__, InterpreterBuilder.create_dot

    def launched(self, *args, **kwargs):
        current[:] = [self.fn.__name__]
        return launch(self, *args, **kwargs)

    def counted(self, *args):
        products[current[0]] = products.get(current[0], 0) + 1
        return product(self, *args)

    monkeypatch.setattr(GridExecutor, "__call__", launched)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    layout = PrefixLayout.from_lengths([70, 0, 40], [[3, 40, 0, 9], [35], []], device=DEVICE)
    heads, kv_heads = 2, 1
    row, grad = make_row(layout, heads, kv_heads, 16)
    run(row, layout, grad)
    mask = sees(layout)
    runs = [(a, z) for g in layout.groups for a, z in ((g.start, g.first), (g.first, g.end))]
    blocks = [(i, min(i + 32, z), a) for a, z in runs for i in range(a, z, 32)]

    def needed(rows, cols):
        return bool(mask[slice(*rows), slice(*cols)].any())

    forward = backward = 0
    for first, end, _ in blocks:
        # Keys in tiles from the prompt's first, and from the first that the first row's own
        # completion has.
        group = next(g for g in layout.groups if g.start <= first < g.end)
        own = int(layout.segment_starts[first])
        tiles = [(i, min(i + 32, group.first)) for i in range(group.start, group.first, 32)]
        if own >= group.first:
            tiles += [(i, min(i + 32, group.end)) for i in range(own, group.end, 32)]
        forward += heads * sum(needed((first, end), tile) for tile in tiles)
        rows = [(i, min(i + 32, group.end)) for i in range(first, group.end, 32)]
        backward += heads * sum(needed(tile, (first, end)) for tile in rows)
    assert kernels.tiles(kernels.FORWARD, row[0])[:2] == (32, 32)
    assert products == {
        "forward_kernel": 2 * forward, "backward_query_kernel": 3 * forward,
        "backward_key_kernel": 4 * backward,
    }  # fmt: skip


@only_interpreted
def test_launches(monkeypatch, small_items):
    """One for the output, two for the gradients, one more where blocks are split."""
    from triton.runtime.interpreter import GridExecutor

    launches, launch = [], GridExecutor.__call__

    def launched(self, *args, **kwargs):
        launches.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", launched)
    for lengths, split in ((([5, 5, 5], [[3, 3], [2], []]), False), (([40], [[40, 40]]), True)):
        launches.clear()
        layout = PrefixLayout.from_lengths(*lengths, device=DEVICE)
        row, grad = make_row(layout, 2, 1, 16)
        run(row, layout, grad)
        names = ["forward_kernel", "backward_query_kernel", "backward_key_kernel"]
        assert launches == names + ["sum_shares_kernel"] * split


# ---- a model -------------------------------------------------------------------------------------


@pytest.mark.skipif(ON_GPU, reason="the model is on the CPU")
def test_training_equals_two_part(processor, prompts):
    """Log-probs and the gradient of every parameter of the embedded model."""
    from test_shared_prefix import logps_and_gradient, relative_error

    from virft_fast.models.qwen_vl import Policy, load_model

    policy, prompts = Policy(load_model("tiny")), prompts[2:]
    g = torch.Generator().manual_seed(1)
    completions = [
        [torch.randint(260, 600, (length,), generator=g) for length in lengths]
        for lengths in ([7, 1, 20], [12])
    ]
    results = [
        logps_and_gradient(policy, prompts, completions, packed=True, kind=kind)
        for kind in ("fused", "two_part")
    ]
    (logps, gradient), (expected, wanted) = results
    assert (logps - expected).abs().max() <= 1e-5
    assert relative_error(gradient, wanted) <= 1e-5


@only_interpreted
def test_rollouts_read_prompts_with_the_kernel(monkeypatch, processor, prompts):
    from test_shared_prefix import CPU, Sampling, make_rollout, nullcontext

    from virft_fast.kernels import triton_prefix_attention as kernels
    from virft_fast.models.qwen_vl import Policy, load_model

    policy, calls, forward = Policy(load_model("tiny")).eval(), [], kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args: calls.append(1) or forward(*args))
    outs = []
    for kind, count in (("fused", 3), ("two_part", 0)):  # layers
        policy.prefix_attention = kind
        rollout = make_rollout(
            "native", lambda: nullcontext(policy), processor.tokenizer, device=CPU
        )
        outs.append(rollout.generate(prompts[2:], 2, Sampling(2, seed=1)))
        assert len(calls) == count
        calls.clear()
    assert torch.equal(outs[0].completion_ids, outs[1].completion_ids)
    logps = (out.sampling_logps for out in outs)
    torch.testing.assert_close(*logps, rtol=0, atol=2e-5)
