"""Cases for the kernels of a decoding step, against float64: test_decode.py runs them on the torch
references, and in a process with TRITON_INTERPRET=1 on the Triton kernels."""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from virft_fast import native
from virft_fast.kernels.backend import triton_for
from virft_fast.kernels.decode import (
    DecodeMasks,
    add_rms_norm,
    decode_attention,
    rotate_and_store,
    silu_mul,
)
from virft_fast.kernels.sampling import row_seed, sample_tokens, uniform
from virft_fast.kernels.speculation import CONTEXT, FACTORS, MAX_READ, NOWHERE, Pool, keep_drawn
from virft_fast.kernels.speculation import look_up as guess_next

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = not INTERPRETED and os.environ.get("VIRFT_CASES") == "gpu"
DEVICE = "cuda" if ON_GPU else "cpu"
NAN = float("nan")
# The interpreter cuts bits off where a GPU rounds: up to one unit in the last of 8 places, twice.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = st.sampled_from(list(LIMITS))
SIZES = st.sampled_from([16, 24, 32, 64, 80, 128])
few = settings(
    max_examples=10 if INTERPRETED else 40, deadline=None, derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes when interpreted
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def normal(seed, *shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).to(dtype).to(DEVICE)


def close(got, exact, dtype):
    """The error of numbers around 1, in the largest of a tensor."""
    limit = LIMITS[dtype]
    torch.testing.assert_close(got.double(), exact, atol=limit, rtol=limit)


@pytest.fixture(autouse=True, scope="module")
def poisoned_outputs():
    """Whatever a kernel leaves unwritten is NaN."""
    if not (INTERPRETED or ON_GPU):
        yield
        return
    from virft_fast.kernels import triton_decode, triton_sampling, triton_speculation

    def nans(shape, dtype, device):
        value = NAN if dtype.is_floating_point else -99
        return torch.full(shape, value, dtype=dtype, device=device)

    with pytest.MonkeyPatch.context() as patch:
        for module in (triton_decode, triton_sampling, triton_speculation):
            patch.setattr(module, "_empty", nans)
        yield


def test_cases_run_the_implementation_that_they_mean_to():
    module = triton_for(torch.zeros(1, device=DEVICE), "triton_decode")
    assert (module is not None) == (INTERPRETED or ON_GPU)


# ---- attention -----------------------------------------------------------------------------------


@st.composite
def attention_shapes(draw):
    kv_heads = draw(st.integers(1, 3))
    counts = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3).filter(any))
    return dict(
        counts=counts if draw(st.booleans()) else [max(counts)] * len(counts),
        kv_heads=kv_heads,
        heads=kv_heads * draw(st.integers(1, 8)),
        size=draw(SIZES),
        tokens=draw(st.sampled_from([1, 1, 2, 3, 8])),
        prompt=draw(st.integers(1, 150)),
        own=draw(st.integers(8, 90)),
        seed=draw(st.integers(0, 99)),
    )


def make_attention(counts, kv_heads, heads, size, tokens, prompt, own, seed, dtype=torch.float32):
    """The arguments, with lengths that include the extremes."""
    g = torch.Generator().manual_seed(seed)
    groups, rows = len(counts), sum(counts)
    prompt_lengths = torch.randint(1, prompt + 1, (groups,), generator=g)
    prompt_lengths[0] = prompt
    lengths = torch.randint(0, own - tokens + 1, (rows,), generator=g)
    lengths[0], lengths[-1] = 0, own - tokens
    first = torch.tensor([0, *counts]).cumsum(0)
    return dict(
        query=normal(seed, rows, tokens, heads, size, dtype=dtype),
        prompt_keys=normal(seed + 1, groups, kv_heads, prompt, size, dtype=dtype),
        prompt_values=normal(seed + 2, groups, kv_heads, prompt, size, dtype=dtype),
        prompt_lengths=prompt_lengths.to(DEVICE),
        first_rows=first.to(DEVICE),
        keys=normal(seed + 3, rows, kv_heads, own, size, dtype=dtype),
        values=normal(seed + 4, rows, kv_heads, own, size, dtype=dtype),
        lengths=lengths.to(DEVICE),
    )


def attend(arguments, **more):
    counts = arguments["first_rows"].diff()
    size = arguments["query"].shape[-1]
    return decode_attention(**arguments, scaling=size**-0.5, max_rows=int(counts.max()), **more)


def dense(
    query,
    prompt_keys,
    prompt_values,
    prompt_lengths,
    first_rows,
    keys,
    values,
    lengths,
    window=None,
):
    """The same in float64, one row and token at a time."""
    rows, tokens, heads, size = query.shape
    kv_heads = keys.shape[1]
    out = torch.zeros(rows, tokens, heads, size, dtype=torch.float64, device=query.device)
    for row in range(rows):
        group = int((first_rows <= row).sum()) - 1
        for t in range(tokens):
            seen = int(lengths[row]) + t + 1
            known = slice(int(prompt_lengths[group]))
            k = torch.cat([prompt_keys[group][:, known], keys[row][:, :seen]], 1).double()
            v = torch.cat([prompt_values[group][:, known], values[row][:, :seen]], 1).double()
            k, v = (x if window is None else x[:, -window:] for x in (k, v))
            q = query[row, t].view(kv_heads, -1, size).double()
            shares = (q @ k.mT * size**-0.5).softmax(-1)
            out[row, t] = (shares @ v).flatten(0, 1)
    return out.flatten(2)


@few
@given(shapes=attention_shapes(), dtype=DTYPES, window=st.sampled_from([None, None, 1, 7, 90]))
def test_attention_against_float64(shapes, dtype, window):
    arguments = make_attention(**shapes, dtype=dtype)
    got = attend(arguments, window=window)
    assert got.dtype == dtype
    close(got, dense(**arguments, window=window), dtype)


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_attention_reads_nothing_beyond_the_lengths(dtype):
    """Up to whole blocks of NaN. The torch reference masks, so it needs finite numbers."""
    shapes = dict(kv_heads=2, heads=6, size=32, tokens=3, prompt=300, own=200, seed=5)
    arguments = make_attention(counts=[2, 0, 5, 1], **shapes, dtype=dtype)
    before = attend(arguments)
    poison = NAN if INTERPRETED or ON_GPU else 3.0
    for group, length in enumerate(arguments["prompt_lengths"].tolist()):
        for name in ("prompt_keys", "prompt_values"):
            arguments[name][group, :, length:] = poison
    for row, length in enumerate(arguments["lengths"].tolist()):
        for name in ("keys", "values"):
            arguments[name][row, :, length + 3 :] = poison
    assert torch.equal(before, attend(arguments))
    assert before.isfinite().all()


def test_a_row_depends_on_no_other_row():
    shapes = dict(kv_heads=2, heads=4, size=16, tokens=2, prompt=70, own=40, seed=1)
    arguments = make_attention(counts=[3, 4], **shapes)
    before = attend(arguments)
    for name in ("query", "keys", "values"):
        arguments[name][2] = 7.0
    after = attend(arguments)
    others = [row for row in range(7) if row != 2]
    assert torch.equal(before[others], after[others]) and not torch.equal(before[2], after[2])


def test_attention_repeats_bit_for_bit():
    shapes = dict(kv_heads=2, heads=12, size=64, tokens=1, prompt=700, own=130, seed=3)
    arguments = make_attention(counts=[8, 8], **shapes, dtype=torch.bfloat16)
    assert torch.equal(attend(arguments), attend(arguments))


def test_autocast_does_not_round_float32_caches():
    shapes = dict(kv_heads=2, heads=4, size=16, tokens=1, prompt=33, own=20, seed=2)
    arguments = make_attention(counts=[2, 2], **shapes)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = attend(arguments)
    close(got, dense(**arguments), torch.float32)


def test_rows_without_a_prompt_change_nothing():
    shapes = dict(kv_heads=1, heads=4, size=16, tokens=1, prompt=33, own=20, seed=2)
    arguments = make_attention(counts=[2, 3, 2], **shapes)
    fewer = arguments | {"first_rows": torch.tensor([0, 2, 5, 5], device=DEVICE)}
    assert torch.equal(attend(arguments)[:5], attend(fewer)[:5])
    assert attend(fewer).isfinite().all()


def test_masks_of_a_step_serve_all_its_layers():
    shapes = dict(kv_heads=2, heads=6, size=16, tokens=2, prompt=33, own=60, seed=4)
    for counts in ([3, 3], [1, 4]):
        arguments = make_attention(counts=counts, **shapes)
        arguments["lengths"].clamp_(max=20)
        names = ("prompt_keys", "prompt_lengths", "first_rows", "keys", "lengths")
        masks = DecodeMasks.make(
            *(arguments[name] for name in names), num_tokens=2, num_heads=6,
            max_rows=max(counts), width=22,
        )  # fmt: skip
        assert masks.own_bias.shape[-1] == 22
        torch.testing.assert_close(attend(arguments, masks=masks), attend(arguments))


@pytest.mark.parametrize("name", ["prompt_values", "keys", "first_rows", "lengths", "values"])
def test_shapes_that_disagree_are_named(name):
    shapes = dict(kv_heads=2, heads=4, size=16, tokens=1, prompt=9, own=20, seed=2)
    arguments = make_attention(counts=[2, 3], **shapes)
    wrong = arguments | {name: arguments[name][:-1]}
    with pytest.raises(ValueError, match=f"{name}: expected contiguous"):
        decode_attention(**wrong, scaling=1.0, max_rows=3)
    strided = arguments | {"values": arguments["values"].mT.contiguous().mT}
    with pytest.raises(ValueError, match="values: expected contiguous"):
        attend(strided)
    with pytest.raises(ValueError, match="query: expected torch.float32"):
        attend(arguments | {"query": arguments["query"].bfloat16()})


# ---- rotation ------------------------------------------------------------------------------------


@few
@given(
    rows=st.integers(1, 3), tokens=st.sampled_from([1, 2, 8]), kv_heads=st.integers(1, 2),
    repeats=st.sampled_from([1, 3, 8]), size=SIZES, normed=st.booleans(), seed=st.integers(0, 99),
    dtype=DTYPES,
)  # fmt: skip
def test_rotation_against_float64(rows, tokens, kv_heads, repeats, size, normed, seed, dtype):
    heads = kv_heads * repeats
    qkv = normal(seed, rows, tokens, (heads + 2 * kv_heads) * size, dtype=dtype)
    angle = normal(seed + 1, 50, size // 2).double()
    cos, sin = angle.cos().repeat(1, 2), torch.cat([-angle.sin(), angle.sin()], 1)
    cos, sin = cos.to(dtype), sin.to(dtype)
    g = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 50 - tokens + 1, (rows,), generator=g).to(DEVICE)
    lengths = torch.randint(0, 20 - tokens + 1, (rows,), generator=g).to(DEVICE)
    keys, values = (normal(seed + n, rows, kv_heads, 20, size, dtype=dtype) for n in (2, 3))
    old_keys, old_values = keys.clone(), values.clone()
    norms = [normal(seed + n, size, dtype=dtype) if normed else None for n in (4, 5)]
    query = rotate_and_store(
        qkv, cos, sin, positions, keys, values, lengths,
        num_heads=heads, q_norm=norms[0], k_norm=norms[1],
    )  # fmt: skip
    assert query.shape == (rows, tokens, heads, size) and query.dtype == dtype

    exact = qkv.double().unflatten(2, (-1, size))
    q, k, v = exact.split([heads, kv_heads, kv_heads], 2)
    if normed:
        q, k = (
            x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w.double()
            for x, w in zip((q, k), norms, strict=True)
        )
    places = positions[:, None] + torch.arange(tokens, device=DEVICE)
    c, s = (table[places][:, :, None].double() for table in (cos, sin))
    rotated = [
        x * c + torch.cat([x[..., size // 2 :], x[..., : size // 2]], -1) * s for x in (q, k)
    ]
    close(query, rotated[0], dtype)
    wanted_keys, wanted_values = old_keys.double(), old_values.double()
    for row in range(rows):
        for t in range(tokens):
            wanted_keys[row, :, lengths[row] + t] = rotated[1][row, t]
            wanted_values[row, :, lengths[row] + t] = v[row, t]
    close(keys, wanted_keys, dtype)
    assert torch.equal(values.double(), wanted_values)
    untouched = old_keys.double() == wanted_keys
    assert torch.equal(keys[untouched], old_keys[untouched])


# ---- norm and activation -------------------------------------------------------------------------


@few
@given(
    rows=st.integers(1, 4), size=st.sampled_from([1, 7, 64, 100, 1536]), add=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 30.0]), seed=st.integers(0, 99), dtype=DTYPES,
)  # fmt: skip
def test_norm_against_float64(rows, size, add, scale, seed, dtype):
    hidden, delta = (scale * normal(seed + n, rows, size, dtype=dtype) for n in (0, 1))
    weight = normal(seed + 2, size, dtype=dtype)
    before = hidden.clone()
    total, normed = add_rms_norm(hidden, delta if add else None, weight, 1e-6)
    assert torch.equal(hidden, before)
    if not add:
        assert torch.equal(total, hidden)
    exact = hidden.double() + delta.double() if add else hidden.double()
    torch.testing.assert_close(total.double(), exact, atol=0, rtol=LIMITS[dtype])
    exact = total.double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    close(normed, exact, dtype)


@few
@given(
    rows=st.integers(1, 4), size=st.sampled_from([1, 24, 130, 2048]), seed=st.integers(0, 99),
    dtype=DTYPES,
)  # fmt: skip
def test_silu_mul_against_float64(rows, size, seed, dtype):
    gate_up = 4 * normal(seed, rows, 2 * size, dtype=dtype)
    gate, up = gate_up.double().chunk(2, -1)
    got = silu_mul(gate_up)
    assert got.shape == (rows, size) and got.dtype == dtype
    close(got, gate * gate.sigmoid() * up, dtype)


def test_leading_dimensions_stay():
    hidden, weight = normal(0, 2, 3, 8), normal(1, 8)
    for got in add_rms_norm(hidden, hidden, weight, 1e-6):
        assert got.shape == (2, 3, 8)
    assert silu_mul(hidden).shape == (2, 3, 4)
    with pytest.raises(ValueError, match="gate_up: expected an even"):
        silu_mul(hidden[..., :5])
    with pytest.raises(ValueError, match="weight: expected contiguous"):
        add_rms_norm(hidden, None, weight[:4], 1e-6)


# ---- sampling ------------------------------------------------------------------------------------


def make_sampling(rows, vocab, seed, ties=False):
    """Logits, some banned, with large blocks of both; seeds and positions."""
    logits = 3 * normal(seed, rows, vocab)
    if ties:
        logits = (2 * logits).round() / 2
    bias = torch.zeros(vocab, device=DEVICE)
    bias[normal(seed + 1, vocab) < -1] = -torch.inf
    bias[vocab // 2] = 0.0
    seeds = torch.tensor([row_seed(seed, row) for row in range(rows)], device=DEVICE)
    positions = torch.arange(rows, device=DEVICE) * 7
    return dict(logits=logits, seeds=seeds, positions=positions, bias=bias)


def reference(logits, seeds, positions, **more):
    """The torch reference of float32 logits, whatever the process runs."""
    from virft_fast.kernels import sampling

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "triton_for", lambda *_: None)
        return sample_tokens(logits, seeds, positions, **more)


SAMPLINGS = dict(
    temperature=st.sampled_from([1.0, 0.7, 1.5]), top_k=st.sampled_from([0, 0, 1, 3, 40]),
    top_p=st.sampled_from([1.0, 1.0, 0.3, 0.9]), min_p=st.sampled_from([0.0, 0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.7]), greedy=st.booleans(),
)  # fmt: skip


@few
@given(
    rows=st.integers(1, 5), vocab=st.sampled_from([1, 5, 300, 2048, 2049, 5000]),
    seed=st.integers(0, 99), ties=st.booleans(), options=st.fixed_dictionaries(SAMPLINGS),
)  # fmt: skip
def test_sampling_equals_the_reference(rows, vocab, seed, ties, options):
    """Tokens exactly, with equal scores and filters at once; the seen tokens as well."""
    inputs = make_sampling(rows, vocab, seed, ties)
    seen = normal(seed + 2, rows, vocab) > 1
    masks = [seen.clone() if options["repetition_penalty"] != 1.0 else None for _ in range(2)]
    tokens, logps = sample_tokens(**inputs, **options, seen=masks[0])
    wanted, wanted_logps = reference(**inputs, **options, seen=masks[1])
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(logps, wanted_logps, atol=1e-5, rtol=1e-5)
    assert (inputs["bias"][tokens] == 0).all()
    if masks[0] is not None:
        assert torch.equal(*masks)
        assert masks[0].gather(1, tokens[:, None]).all()


@few
@given(
    seed=st.integers(0, 99), vocab=st.sampled_from([7, 300, 2500]),
    options=st.fixed_dictionaries(SAMPLINGS | {"greedy": st.just(False)}),
)  # fmt: skip
def test_sampling_against_transformers_filters_in_float64(seed, vocab, options):
    """Scores without ties: their filters keep the same tokens, and ours have the probabilities of
    the filtered softmax."""
    import transformers as hf

    inputs = make_sampling(3, vocab, seed)
    seen = normal(seed + 2, 3, vocab) > 1
    scores = (inputs["logits"] + inputs["bias"]).cpu()
    penalty = options["repetition_penalty"]
    ids = [row.nonzero()[:, 0] for row in seen.cpu()]
    process = hf.RepetitionPenaltyLogitsProcessor(penalty)
    rows = zip(ids, scores, strict=True)
    scores = torch.cat([process(i[None], row[None]) if len(i) else row[None] for i, row in rows])
    scores = (scores / options["temperature"]).double()
    if options["top_k"]:
        scores = hf.TopKLogitsWarper(options["top_k"])(None, scores)
    if options["top_p"] < 1:
        scores = hf.TopPLogitsWarper(options["top_p"])(None, scores)
    if options["min_p"]:
        scores = hf.MinPLogitsWarper(options["min_p"])(None, scores)
    cumulated = scores.softmax(-1).cumsum(-1)
    at = uniform(inputs["seeds"], inputs["positions"]).cpu()[:, None]
    exact = torch.searchsorted(cumulated, at * cumulated[:, -1:], right=True)[:, 0]
    tokens, logps = (x.cpu() for x in sample_tokens(**inputs, **options, seen=seen))
    assert torch.equal(tokens, exact)
    wanted = scores.log_softmax(-1).gather(1, exact[:, None])[:, 0]
    torch.testing.assert_close(logps.double(), wanted, atol=1e-5, rtol=1e-5)


def test_draws_from_a_real_vocabulary_equal_the_reference():
    inputs = make_sampling(6, 151_936, 3)
    tokens, logps = sample_tokens(**inputs)
    wanted, wanted_logps = reference(**inputs)
    assert torch.equal(tokens, wanted) and len(tokens.unique()) > 3
    torch.testing.assert_close(logps, wanted_logps, atol=1e-5, rtol=1e-5)


def test_one_token_left_has_probability_one():
    inputs = make_sampling(4, 5000, 1)
    inputs["bias"] = torch.full((5000,), -torch.inf, device=DEVICE)
    inputs["bias"][4321] = 0.0
    for options in ({}, {"greedy": True}, {"top_p": 0.5}, {"top_k": 7}, {"min_p": 0.3}):
        tokens, logps = sample_tokens(**inputs, **options)
        assert (tokens == 4321).all() and (logps == 0).all()


def test_each_row_has_its_own_position():
    """As many draws one at a time, at the row's position."""
    inputs = make_sampling(6, 300, 2) | {"bias": None}
    tokens, _ = sample_tokens(**inputs)
    for row in range(6):
        one = {name: inputs[name][row : row + 1] for name in ("logits", "seeds")}
        alone, _ = sample_tokens(**one, positions=inputs["positions"][row])
        assert alone == tokens[row]


def test_sampling_repeats_bit_for_bit():
    inputs = make_sampling(4, 5000, 8)
    first, again = (sample_tokens(**inputs, top_p=0.9) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_sampling_names_what_is_wrong():
    inputs = make_sampling(4, 50, 8)
    for name in ("seeds", "positions", "bias"):
        with pytest.raises(ValueError, match=f"{name}: expected contiguous"):
            sample_tokens(**inputs | {name: inputs[name][:-1]})
    for name in ("seeds", "positions", "bias"):
        spread = inputs[name].repeat_interleave(2)[::2]
        with pytest.raises(ValueError, match=rf"{name}: expected .* with strides \(2,\)"):
            sample_tokens(**inputs | {name: spread})
    with pytest.raises(ValueError, match=r"logits: expected \(R, V\) float32"):
        sample_tokens(**inputs | {"logits": inputs["logits"].bfloat16()})


@pytest.mark.skipif(not INTERPRETED, reason="counts interpreted launches")
def test_launches(monkeypatch):
    """Two for the attention, three for the sampling with or without filters, else one."""
    from triton.runtime.interpreter import GridExecutor

    launched = []
    run = GridExecutor.__call__

    def counted(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    def count(function, *args, **kwargs):
        launched.clear()
        function(*args, **kwargs)
        return len(launched)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    inputs = make_sampling(2, 300, 1)
    everything = dict(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
    seen = torch.zeros(2, 300, dtype=torch.bool)
    for options in ({}, {"greedy": True}, everything | {"seen": seen}):
        assert count(sample_tokens, **inputs, **options) == 3
    shapes = dict(kv_heads=2, heads=4, size=16, tokens=2, prompt=300, own=20, seed=2)
    arguments = make_attention(counts=[2, 3], **shapes)
    assert count(attend, arguments) == 2
    table, start = normal(0, 50, 16), torch.zeros(5, dtype=torch.long)
    caches = [arguments[name] for name in ("keys", "values", "lengths")]
    qkv = normal(1, 5, 2, 8 * 16)
    assert count(rotate_and_store, qkv, table, table, start, *caches, num_heads=4) == 1
    assert count(add_rms_norm, qkv, qkv, normal(2, 128), 1e-6) == 1
    assert count(silu_mul, qkv) == 1


def test_several_tokens_of_a_row_are_drawn_as_one_after_the_other():
    inputs = make_sampling(6, 300, 5)
    one = torch.cat([sample_tokens(**inputs | {"positions": inputs["positions"] + t})[0][:, None]
                     for t in range(3)], 1)  # fmt: skip
    inputs["logits"] = inputs["logits"].repeat_interleave(3, 0)
    tokens, _ = sample_tokens(**inputs)
    assert torch.equal(tokens.view(6, 3), one) and len(one.unique()) > 5
    with pytest.raises(ValueError, match="seeds: expected contiguous"):
        sample_tokens(**inputs | {"logits": inputs["logits"][:17]})


# ---- speculation ---------------------------------------------------------------------------------


class Plain:
    """What `keep_drawn` and `look_up` compute, with lists and a dictionary."""

    def __init__(self, pool, length, goes_on):
        self.tokens, self.size = pool.tokens.tolist(), pool.table.shape[1]
        self.first, self.width, self.length = pool.first, pool.width, length
        self.goes_on, self.latest = goes_on.tolist(), {}

    def entry(self, gram):
        pairs = zip(reversed(gram), FACTORS, strict=False)
        return len(gram), sum(token * factor for token, factor in pairs) >> 33 & self.size - 1

    def insert(self, place):
        for n in (2, 3, 4):
            gram = self.tokens[place - n : place]
            if min(gram) >= 0:
                entry = self.entry(gram)
                self.latest[entry] = max(place, self.latest.get(entry, 0))

    def guess(self, row, counters):
        at, end = counters[6], self.first + row * self.width + CONTEXT + counters[2]
        if self.tokens[at] < 0:
            at = NOWHERE
            for n in (4, 3, 2):
                gram = self.tokens[end - n : end]
                found = self.latest.get(self.entry(gram), NOWHERE)
                if min(gram) >= 0 and self.tokens[found - n : found] == gram:
                    at = found
                    break
        counters[6] = at
        guesses = self.tokens[at : at + MAX_READ]
        known = guesses.index(-1) if -1 in guesses else MAX_READ
        return guesses[:known] + [0] * (MAX_READ - known)

    def keep(self, row, drawn, guesses, counters, active):
        """How many tokens are kept, and whether the row is still active."""
        if not active:
            return 0, False
        kept, right, ended = 0, True, False
        place = self.first + row * self.width + CONTEXT + counters[2]
        while right and not ended and kept < len(drawn):
            right = drawn[kept] == guesses[kept]
            counters[3] += right
            self.tokens[place + kept] = drawn[kept]
            self.insert(place + kept)
            kept += 1
            ended = not self.goes_on[drawn[kept - 1]] or counters[2] + kept == self.length
        for index in range(3):
            counters[index] += kept
        counters[4] += kept - 1 if ended else len(drawn) - 1
        counters[5] += kept - 1
        counters[6] = counters[6] + kept if right else NOWHERE
        return kept, not ended


@pytest.fixture(params=["native", "reference"])
def implementation(request, monkeypatch):
    """CPU tensors with the compiled module, and without it. Others have Triton's kernels."""
    if request.param == "native" and native.module is None:
        pytest.skip("virft_fast._C is not built")
    if request.param == "reference":
        monkeypatch.setattr(native, "module", None)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(("size", "stride"), [(1 << 18, 0), (1 << 18, 5), (8, 0)])
def test_kept_tokens_and_guesses_equal_those_of_lists_and_a_dictionary(size, stride):
    """Rows with a history, of 4 different tokens, so that n-grams repeat. Most guesses come true,
    token 4 ends a row but for the first, and a table of 8 entries has collisions."""
    generator = torch.Generator().manual_seed(size + stride)

    def randint(high, *shape):
        return torch.randint(high, shape, generator=generator)

    rows, slots, length, first = 5, [0, 2, 3, 4, 6], 40, 64
    width = CONTEXT + length + MAX_READ
    tokens = torch.full((first + 7 * width + 2 * MAX_READ,), -1)
    tokens[NOWHERE + 1 : 60] = randint(4, 55)
    tokens[[20, 21, 40]] = -1
    own = tokens[first : first + 7 * width].view(7, width)
    own[:, :CONTEXT] = randint(4, 7, CONTEXT)
    own[0, :2] = -1  # a prompt of two tokens
    table = torch.full((3, size), NOWHERE)
    pool = Pool(tokens.to(DEVICE), table.to(DEVICE), first, width)
    goes_on = torch.tensor([1, 1, 1, 1, 0])
    plain = Plain(pool, length, goes_on)
    pool.insert(torch.arange(NOWHERE, 60, device=DEVICE))
    for place in range(NOWHERE + 1, 60):
        if plain.tokens[place] >= 0:
            plain.insert(place)
    counters = torch.zeros(7, rows + stride, dtype=torch.long, device=DEVICE)[:, :rows]
    counters[0] = -1
    counters[6] = torch.tensor([NOWHERE, 22, 30, NOWHERE, 41])
    expected = counters.T.tolist()
    read = torch.zeros(rows, 1 + MAX_READ, dtype=torch.long, device=DEVICE)
    active, seen = torch.ones(rows, dtype=torch.long), torch.zeros(rows, 5, dtype=torch.bool)
    active, seen, where = active.to(DEVICE), seen.to(DEVICE), torch.tensor(slots).to(DEVICE)
    logps = torch.full((7, length + MAX_READ), NAN, device=DEVICE)
    going, kept_logps = [True] * rows, {}
    guess_next(pool, read, counters, where)
    guesses = [plain.guess(slot, row) for slot, row in zip(slots, expected, strict=True)]
    for count in (1, 2, 8, 4, 1, 8, 8, 2, 4, 8, 1, 8, 8, 4, 8, 8, 8, 8, 8):
        assert read[:, 1:].tolist() == guesses
        assert counters.T.tolist() == expected
        drawn = torch.where(randint(4, rows, count) > 0, torch.tensor(guesses)[:, :count],
                            randint(5, rows, count))  # fmt: skip
        drawn[0].clamp_(max=3)
        new = -torch.rand(rows, count, generator=generator)
        seen.zero_()
        kept = keep_drawn(
            pool, drawn.to(DEVICE), new.to(DEVICE), read, counters, active, where,
            goes_on.to(DEVICE), logps, length=length, seen=seen,
        )  # fmt: skip
        guess_next(pool, read, counters, where)
        for row, slot in enumerate(slots):
            at, was = expected[row][2], going[row]
            number, going[row] = plain.keep(
                slot, drawn[row].tolist(), guesses[row], expected[row], was
            )
            assert int(kept[row]) == number and bool(active[row]) == going[row]
            kept_logps |= {(slot, at + t): float(new[row, t]) for t in range(number)}
            if was:
                assert int(read[row, 0]) == int(drawn[row, number - 1])
                assert set(seen[row].nonzero()[:, 0].tolist()) == set(drawn[row, :number].tolist())
        guesses = [plain.guess(slot, row) for slot, row in zip(slots, expected, strict=True)]
        assert pool.tokens.tolist() == plain.tokens
    assert not any(going) and expected[0][2] == length > max(row[2] for row in expected[1:])
    for (slot, at), logp in kept_logps.items():
        assert float(logps[slot, at]) == logp
