"""The memory estimate against bytes that are counted while a model of the released shapes runs.

The models hold no numbers: they are on the meta device, or made of fake tensors.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import CPU
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from virft_fast import dist
from virft_fast.arguments import was_given
from virft_fast.kernels import linear
from virft_fast.models import qwen_vl, shared_prefix
from virft_fast.models.qwen_vl import Policy, load_model
from virft_fast.models.recurrent import PackedRecurrence
from virft_fast.models.shared_prefix import Group, PackedAttention, read
from virft_fast.train import memory, parse_args, setup
from virft_fast.train.memory import Precision

CUDA = torch.device("cuda")
KERNELS = sys.modules["virft_fast.kernels.prefix_attention"]  # whose name is the function's, too
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
SIZES = {
    "2B": {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
           "num_key_value_heads": 2},
    "7B": {"hidden_size": 3584, "intermediate_size": 18_944, "num_attention_heads": 28,
           "num_key_value_heads": 4},
}  # fmt: skip
PATCHES = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
TOWERS = {
    "qwen2_vl": {"embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4},
    "qwen2_5_vl": {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 2048,
                   "fullatt_block_indexes": []},
    "qwen3_vl": {"hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2048,
                 "deepstack_visual_indexes": [0]},
    "qwen3_5": {"hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2048},
}  # fmt: skip
NAMES = {  # of transformers' classes: before TextConfig, VisionConfig, TextModel; the tower
    "qwen2_vl": ("Qwen2VL", "Qwen2VisionTransformerPretrainedModel"),
    "qwen2_5_vl": ("Qwen2_5_VL", "Qwen2_5_VisionTransformerPretrainedModel"),
    "qwen3_vl": ("Qwen3VL", "Qwen3VLVisionModel"),
    "qwen3_5": ("Qwen3_5", "Qwen3_5VisionModel"),
}
HYBRID = {  # three layers of gated DeltaNet, and one with attention
    "head_dim": 128, "linear_num_key_heads": 12, "linear_num_value_heads": 24,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25, "mrope_section": [8, 4, 4]},
}  # fmt: skip
DEPTH = 4


class Counted(TorchDispatchMode):
    """Counts the bytes of the tensors made in it: those alive now, and the most at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.note(args, counts=False)
        self.note(kwargs, counts=False)
        out = function(*args, **(kwargs or {}))
        self.note(out)
        return out

    def note(self, values, counts=True):
        for tensor in tree_leaves(values):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known[storage._cdata] = storage.nbytes() if counts else 0
                self.now += self.known[storage._cdata]
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key):
        self.now -= self.known.pop(key)


class Flash(torch.autograd.Function):
    """What flash attention keeps, without its arithmetic."""

    @staticmethod
    def forward(ctx, query, key, value):
        rows, heads, length, size = query.shape
        out = query.new_empty(rows, length, heads, size).transpose(1, 2)
        norms = query.new_empty(rows, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, norms)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(states) for states in ctx.saved_tensors[:3])


@pytest.fixture(autouse=True)
def flash(monkeypatch):
    def attention(query, key, value, **options):
        return Flash.apply(query, key, value)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(KERNELS, "_suffix_mask", lambda group, *rest: None)  # as on CUDA


def parts(family):
    name, tower = NAMES[family]
    modules = getattr(transformers.models, family)
    configs = getattr(modules, f"configuration_{family}")
    models = getattr(modules, f"modeling_{family}")
    text, vision = getattr(configs, f"{name}TextConfig"), getattr(configs, f"{name}VisionConfig")
    return text, getattr(models, f"{name}TextModel"), vision, getattr(models, tower)


def stub(family, text=None, vision=None, **policy):
    """What the formula reads of a policy."""
    config = SimpleNamespace(
        model_type=family, text_config=text, vision_config=vision, get_text_config=lambda: text
    )
    policy = {"prefix_attention": "auto", **policy}
    return SimpleNamespace(config=config, shares_prefix=True, **policy)


def made(make, config, dtype):
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(dtype)
    try:
        model = make(config).train()
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    return model


LENGTHS = [650, 200]  # prompt and completion tokens
RUNS = {
    "bfloat16": Precision(2, 2), "float32": Precision(4, 4), "autocast": Precision(2, 4),
}  # fmt: skip


class Fused:
    """What the fused kernel makes and keeps, without its arithmetic."""

    @staticmethod
    def forward(query, key, value, layout, scaling):
        lse = query.new_empty(query.shape[1], len(query), dtype=torch.float32)
        return query.new_empty(query.shape), lse

    @staticmethod
    def backward(grad, query, key, value, out, lse, layout, scaling):
        return tuple(states.new_empty(states.shape) for states in (query, key, value))


class Elsewhere(torch.autograd.graph.saved_tensors_hooks):
    """As `save_on_cpu`: what is kept leaves the memory that is counted, and comes back."""

    def __init__(self, pin_memory):
        super().__init__(
            lambda tensor: (tensor.shape, tensor.dtype, tensor.device),
            lambda kept: torch.empty(kept[0], dtype=kept[1], device=kept[2]),
        )


# Whether layers are recomputed, and whether their inputs wait in CPU memory.
RECOMPUTED = [(False, False), (True, False), (True, True)]


LANGUAGE = (
    [(family, size, "bfloat16", "two_part") for family in NAMES for size in SIZES]
    + [("qwen2_vl", size, run, "two_part") for size in SIZES for run in ("float32", "autocast")]
    + [("qwen2_vl", size, run, "auto") for size in SIZES for run in RUNS]
)


@pytest.mark.parametrize(
    ("family", "size", "run", "kind", "checkpointing", "offload"),
    [(*case, *how) for case in LANGUAGE for how in RECOMPUTED[:2]]
    + [(*case, True, True) for case in LANGUAGE if case[1] == "2B"],
)
def test_activations_of_the_language_model(
    monkeypatch, family, size, run, kind, checkpointing, offload
):
    """A row of two groups of 8, forward and backward: the most bytes at one time."""
    precision, device = RUNS[run], CUDA if run == "float32" or kind == "auto" else CPU
    monkeypatch.setattr(KERNELS, "triton_for", lambda *_: Fused)
    if run == "float32":  # as on CUDA
        copied = lambda query, *rest, masked: tuple(  # noqa: E731
            states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in rest
        )
        monkeypatch.setattr(KERNELS, "for_query_heads", copied)
    prompt, length = LENGTHS
    groups = [Group(0, prompt, (length,) * 8)]
    groups.append(Group(groups[0].end, prompt, (length,) * 8))
    make_config, make_model, *_ = parts(family)
    given = {"qwen3_vl": {"head_dim": 128}, "qwen3_5": HYBRID}.get(family, {})
    config = make_config(
        **SIZES[size], **{"rope_parameters": ROPE, **given}, vocab_size=8, num_hidden_layers=DEPTH,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    core = PackedAttention(groups, CPU, shared_prefix.core_kind(kind, device))
    core._cores[None] = inner = core._make(None)
    assert inner.keywords["layout"].two_part  # made outside of the fake tensors
    rows = PackedRecurrence(groups, CPU, width=4)
    dtype = torch.bfloat16 if run == "bfloat16" else torch.float32
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = made(make_model, config, dtype)
        shared_prefix.install(model)
        if checkpointing:
            monkeypatch.setattr(qwen_vl, "save_on_cpu", Elsewhere)
            qwen_vl.checkpoint_layers(model, offload=offload)
        tokens = groups[-1].end
        embeds = torch.empty(1, tokens, config.hidden_size, dtype=dtype).requires_grad_()
        positions = torch.zeros(3, 1, tokens, dtype=torch.long)
        with Counted() as counted:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision.autocast):
                out = read(model, embeds * 1, positions, attention_core=core, recurrent_core=rows)
            out.backward(torch.empty_like(out))
    linear = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    casts = 2 * linear * precision.autocast  # counted by `memory_estimate`
    load = memory.Load(tokens, 2 * 8 * (prompt + length), 2 * 8 * length, 0)
    estimate = memory._language_bytes(
        stub(family, config, prefix_attention=kind), load, precision, checkpointing, offload, device
    )  # fmt: skip
    # Autocast's copies are only all there while a checkpointed forward pass runs.
    least = 0.6 if precision.autocast and checkpointing else 0.96
    assert least * (estimate + casts) <= counted.most <= 1.04 * (estimate + casts)


@pytest.mark.parametrize("head_dim", [128, 256])
def test_heads_that_the_fused_kernel_does_not_take_count_as_two_part(head_dim):
    """As in Qwen3.5 and Gemma 3."""
    make_config, *_ = parts("qwen3_vl")
    config = make_config(**SIZES["2B"], head_dim=head_dim)
    load = memory.Load(1000, 900, 500, 0)
    fused, two_part = (
        memory._language_bytes(
            stub("qwen3_vl", config, prefix_attention=kind), load, RUNS["bfloat16"], False, False,
            CUDA,
        )
        for kind in ("fused", "two_part")
    )  # fmt: skip
    assert fused == two_part if head_dim > 128 else fused < two_part


@pytest.mark.parametrize(("checkpointing", "offload"), RECOMPUTED)
@pytest.mark.parametrize("run", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", NAMES)
def test_activations_of_the_vision_tower(monkeypatch, family, run, checkpointing, offload):
    num, precision = 1564, RUNS[run]
    *_, make_config, make_model = parts(family)
    config = make_config(**TOWERS[family], **PATCHES, num_heads=16, depth=DEPTH)
    with torch.device("meta"):
        model = made(make_model, config, getattr(torch, run))
        if checkpointing:
            monkeypatch.setattr(qwen_vl, "save_on_cpu", Elsewhere)
            qwen_vl.checkpoint_layers(model, offload=offload)
        dim = config.embed_dim if family == "qwen2_vl" else config.hidden_size
        rotation = tuple(torch.empty(num, dim // 16) for _ in range(2))
        hidden = torch.empty(num, dim, dtype=getattr(torch, run)).requires_grad_()
    lengths = torch.tensor([0, num], dtype=torch.int32)
    with Counted() as counted:
        states = hidden * 1
        for block in model.blocks:
            states = block(states, cu_seqlens=lengths, position_embeddings=rotation)
        out = model.merger(states)
        out.backward(torch.empty_like(out))
    load = memory.Load(0, 0, 0, num)
    estimate = memory._tower_bytes(
        stub(family, vision=config), load, precision, checkpointing, offload
    )
    assert estimate == pytest.approx(counted.most, rel=0.06)


def run_of(*flags):
    config = parse_args(["--model_name_or_path", "tiny", *flags])
    return SimpleNamespace(config=config, ds_config=None, keeps_reference=False)


def test_bytes_of_the_loss(monkeypatch):
    """In float32, with the gradients of hidden states and weight."""
    rows, dim, vocab = 600, 256, 16_384
    monkeypatch.setitem(linear.TILE_ELEMENTS, "cpu", 100 * vocab)
    hidden = torch.randn(rows, dim).requires_grad_()
    weight = torch.randn(vocab, dim).requires_grad_()
    ids, cuts = torch.zeros(rows, dtype=torch.long), torch.tensor([0, rows], dtype=torch.int32)
    mask, advantages = torch.ones(rows, dtype=torch.bool), torch.ones(1)
    with Counted() as counted:
        predicting = hidden * 1
        options = {"advantages": advantages, "cu_seqlens": cuts}
        loss = linear.linear_grpo_loss(predicting, weight, ids, mask, **options).loss
        torch.autograd.grad(loss, (predicting, weight))
    text = SimpleNamespace(vocab_size=vocab, hidden_size=dim)
    load = memory.Load(0, 0, rows, 0)
    estimate = memory._head_bytes(run_of().config, stub("qwen2_vl", text), load, CPU)
    assert estimate == pytest.approx(counted.most, rel=0.05)


GROUP = ["--max_prompt_length", "100", "--max_completion_length", "50", "--num_generations", "4"]


@pytest.mark.parametrize(("flags", "tokens", "joined", "completions", "patches"), [
    ([], 2 * 300, 2 * 600, 2 * 200, 2 * 64),
    (["--max_tokens_per_microbatch", "900"], 600, 2 * 600, 2 * 200, 2 * 64),  # a step's prompts
    (["--max_tokens_per_microbatch", "900", "--gradient_accumulation_steps", "2"],
     900, 3 * 600, 3 * 200, 3 * 64),
    (["--max_tokens_per_microbatch", "150"], 150, 300, 100, 64),
    (["--algorithm", "dpo"], 2 * 200, 2 * 300, 2 * 100, 2 * 64),
    (["--algorithm", "sft"], 2 * 150, 2 * 150, 2 * 50, 2 * 64),
])  # fmt: skip
def test_the_largest_microbatch_that_the_flags_allow(flags, tokens, joined, completions, patches):
    config = run_of(*GROUP, "--per_device_train_batch_size", "2", *flags).config
    policy = SimpleNamespace(shares_prefix=True)
    expected = memory.Load(tokens, joined, completions, patches)
    assert memory.load_of(config, policy, None, 64) == expected
    if not flags:  # each completion reads its prompt again
        policy.shares_prefix = False
        assert memory.load_of(config, policy, None, 64) == memory.Load(1200, 0, 400, 128)


@pytest.fixture(scope="module")
def policy():
    return Policy(load_model("tiny", empty=True))


def fitting(policy, free_mib, *flags, prompts=8):
    data = SimpleNamespace(prompts_per_step=prompts)
    run = run_of(*GROUP, "--gradient_accumulation_steps", "64", *flags)
    return memory.fitting_tokens(run, data, policy, 64, free_mib * 2**20)


def test_a_microbatch_is_as_large_as_fits(policy):
    chosen = [fitting(policy, mib) for mib in (1, 100, 300, 500, 700, 2**20)]
    assert chosen == sorted(chosen) and len(set(chosen)) >= 4
    assert chosen[0] == memory.TOKEN_STEP and chosen[-1] == memory.MOST_TOKENS
    assert all(tokens % memory.TOKEN_STEP == 0 for tokens in chosen)
    assert fitting(policy, 300, "--gradient_checkpointing") > fitting(policy, 300)
    assert fitting(policy, 300, "--freeze_vision_tower") >= fitting(policy, 300)
    assert fitting(policy, 300, prompts=1) >= fitting(policy, 300)  # fewer images


def test_what_a_chosen_microbatch_needs_is_free(policy):
    """Beside weights, gradients, optimizer state and the rollouts' cache and guesses, and with a
    margin."""
    data, free = SimpleNamespace(prompts_per_step=1), 400 * 2**20
    run = run_of(
        *GROUP, "--gradient_accumulation_steps", "64", "--eval_samples", "120",
        "--eval_batch_size", "120",
    )  # fmt: skip
    tokens = memory.fitting_tokens(run, data, policy, 64, free)
    total = sum(p.numel() for p in policy.parameters())
    sizes = memory.memory_estimate(run, data, policy, total, total)
    model = memory.needed_beside_cache(sizes)
    assert model == total * 16 + sizes["tokens of earlier answers, to guess from"]
    cache = sum(sizes.values()) - model
    assert memory.KEPT_SHARE * free / 2 < cache < memory.KEPT_SHARE * free

    def needs(tokens):
        load = dataclasses.replace(memory.load_of(run.config, policy, tokens, 0), patches=64)
        return sum(memory.activation_bytes(run.config, policy, load, CPU).values())

    room = (1 - memory.MARGIN) * free - model - cache
    assert needs(tokens) <= room < needs(tokens + memory.TOKEN_STEP)


@pytest.mark.parametrize(("flags", "device", "tokens"), [
    ([], "cuda", 3072),
    (["--gradient_accumulation_steps", "4"], "cuda", 3072),
    (["--max_tokens_per_microbatch", "900"], "cuda", 900),
    (["--per_device_train_batch_size", "1"], "cuda", None),  # explicit, though it is the default
    (["--per_device_train_batch_size=2"], "cuda", None),
    (["--max_tokens_per_microbatch", "900", "--per_device_train_batch_size", "2"], "cuda", 900),
    ([], "cpu", None),
])  # fmt: skip
def test_a_gpu_fills_microbatches_unless_the_user_gave_a_size(monkeypatch, flags, device, tokens):
    """All ranks take the number of the rank with the least memory."""
    monkeypatch.setattr(setup, "fitting_tokens", lambda run, data, policy, patches, free: free)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5120, 8192))
    monkeypatch.setattr(dist, "all_gather_object", lambda mine: [mine, 3072])
    prompt = SimpleNamespace(image_grid_thw=None)
    got = setup.microbatch_tokens(run_of(*flags), None, None, prompt, torch.device(device))
    assert got == tokens


def test_a_config_file_gives_a_size_as_a_flag_does(tmp_path):
    path = tmp_path / "run.yaml"
    for text, given in (("per_device_train_batch_size: 1", True), ("seed: 1", False)):
        path.write_text(text)
        train = run_of("--config", str(path)).config.train
        assert was_given(train, "per_device_train_batch_size") == given
