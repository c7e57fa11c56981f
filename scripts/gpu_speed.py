"""Stages of gpu_check.py: how fast the released shapes are; see gpu_stages.py."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from gpu_stages import BFLOAT16_RATE, MEMORY_RATE, G, Results
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration  # noqa: F401  # once, for all stages

from virft_fast.kernels import linear_grpo_loss
from virft_fast.kernels.decode import add_rms_norm, decode_attention, rotate_and_store, silu_mul
from virft_fast.kernels.loss_args import LossArgs
from virft_fast.kernels.sampling import row_seed, sample_tokens
from virft_fast.models.qwen_vl import Policy, core
from virft_fast.rollout import Sampling
from virft_fast.rollout.native import NativeRollout


def pieces(results: Results) -> None:
    """The kernels of one decoding step against their references, and beside the time that it takes
    to read their inputs: 8 prompts of 650 tokens, 8 rows of each with 100 tokens, 2B shapes."""
    groups, heads, keys, size, prompt, own = 8, 12, 2, 128, 768, 128
    if results.toy:
        groups, heads, keys, size, prompt, own = 2, 4, 2, 16, 32, 16
    rows, dim, inner = groups * G, heads * size, 6 * heads * size
    generator = torch.Generator(results.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        made = torch.randn(*shape, generator=generator, device=results.device)
        return made.to(results.dtype)

    def filled(value: int, count: int) -> Tensor:
        return torch.full((count,), value, device=results.device)

    lengths = filled(3 * own // 4, rows)
    cache = (normal(rows, keys, own, size), normal(rows, keys, own, size))
    shared = (normal(groups, keys, prompt, size), normal(groups, keys, prompt, size))
    first = torch.arange(groups + 1, device=results.device) * G
    whole = (*shared, filled(prompt - 8, groups), first, *cache, lengths)
    table = normal(2048, size)
    calls: dict[str, tuple[Callable[..., Any], tuple[Tensor | None, ...], dict[str, Any]]] = {
        "rotate_and_store": (
            rotate_and_store,
            (normal(rows, 1, (heads + 2 * keys) * size), table, table, lengths, *cache, lengths),
            {"num_heads": heads},
        ),
        "decode_attention": (
            decode_attention,
            (normal(rows, 1, heads, size), *whole), {"scaling": size**-0.5, "max_rows": G},
        ),
        "add_rms_norm": (
            add_rms_norm, (normal(rows, dim), normal(rows, dim), normal(dim)), {"eps": 1e-6},
        ),
        "silu_mul": (silu_mul, (normal(rows, 2 * inner),), {}),
    }  # fmt: skip
    for name, (function, arguments, options) in calls.items():
        ours = function(*arguments, **options)
        exact = function(*(_on_cpu(part) for part in arguments), **options)
        for a, b in zip(_tuple(ours), _tuple(exact), strict=True):
            error = float((a.cpu().double() - b).norm() / b.norm())
            results.require(error < 2e-2, f"{name} within 2 % of float64 ({error:.1e})")
        read = sum(part.numel() * part.element_size() for part in arguments if part is not table)
        taken = results.ms(lambda f=function, a=arguments, o=options: f(*a, **o), rounds=50)
        results.add(f"{name}, {rows} rows", 1e3 * taken, "us", read / MEMORY_RATE * 1e6)


def _on_cpu(part: Tensor | None) -> Tensor | None:
    if part is None:
        return None
    return part.double().cpu() if part.is_floating_point() else part.cpu()


def _tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def decode(results: Results) -> None:
    """A decoding step of the 2B and 7B shapes, its kernels, the sampler, and reading prompts."""
    from vlm import SHAPES, FixedLength, make_model, make_processor, make_prompts

    processor = make_processor()
    count, prompt, short, long = (2, 60, 4, 8) if results.toy else (8, 650, 32, 128)
    prompts = make_prompts(processor, count, prompt)
    for size, floor in [("tiny", None)] if results.toy else [("2b", 0.81), ("7b", 3.46)]:
        policy = Policy(make_model(size).eval())
        engine = FixedLength(
            lambda policy=policy: nullcontext(policy), processor.tokenizer, device=results.device
        )

        def generate(length: int, engine: NativeRollout = engine) -> object:
            return engine.generate(prompts, G, Sampling(length))

        times = {n: results.ms(partial(generate, n), rounds=3, warm=1) for n in (1, short, long)}
        step = (times[long] - times[short]) / (long - short)
        results.add(f"decoding step, {size}, {count} x {G} rows", step, "ms", floor)
        results.add(f"reading {count} prompts of {prompt} tokens, {size}", times[1], "ms")
        results.add(f"tokens per second, {size}", 1e3 * count * G / step, "tokens/s")
        if not results.toy:
            results.note(f"{size}, longest kernels of {short} tokens:\n{_profile(generate, short)}")
            results.add(f"peak memory, {size}", torch.cuda.max_memory_allocated() / 2**30, "GiB")
        vocab = SHAPES[size]["vocab_size"]
        del policy, engine, generate
        if not results.toy:
            torch.cuda.empty_cache()
    logits = torch.randn(count * G, vocab, device=results.device)
    seeds = torch.tensor([row_seed(0, row) for row in range(count * G)], device=results.device)
    places = torch.zeros(count * G, dtype=torch.long, device=results.device)
    for name, options in [("no filter", {}), ("top-k 50, top-p 0.9", {"top_k": 50, "top_p": 0.9})]:
        taken = results.ms(lambda o=options: sample_tokens(logits, seeds, places, **o))
        read = logits.numel() * 4 / MEMORY_RATE * 1e3
        results.add(f"sampling {count * G} rows of {vocab}, {name}", taken, "ms", read)


def _profile(generate: Callable[[int], object], length: int) -> str:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        generate(length)
        torch.cuda.synchronize()
    averages = profile.key_averages()
    return averages.table(sort_by="self_device_time_total", row_limit=15, max_name_column_width=60)


def train(results: Results) -> None:
    """A training pass of the 2B shapes: time, memory beside its estimate, waits of the host."""
    from vlm import SHAPES, make_model, make_processor, make_prompts

    size, prompt, length, counts = "2b", 650, 200, (1, 7)
    if results.toy:
        size, prompt, length, counts = "tiny", 60, 8, (1, 2)
    processor, model = make_processor(), make_model(size)
    policy, vocab = Policy(model), SHAPES[size]["vocab_size"] - 300  # without control tokens
    prompts = make_prompts(processor, counts[-1], prompt)
    generator = torch.Generator().manual_seed(0)
    for number in counts:
        drawn = [
            list(torch.randint(vocab, (G, length), generator=generator)) for _ in range(number)
        ]
        inputs = policy.collate(prompts[:number], drawn, pad_token_id=0, device=results.device)
        tokens = inputs.input_ids.numel()
        mask = torch.ones(len(inputs.completion_ids), dtype=torch.bool, device=results.device)
        loss = LossArgs(advantages=torch.linspace(-1, 1, G * number).to(results.device))
        step = lambda i=inputs, m=mask, a=loss: policy(i, loss=a, loss_mask=m)[0].backward()  # noqa: E731
        for checkpointing in (False, True):
            kwargs = {"use_reentrant": False}
            if checkpointing:
                model.gradient_checkpointing_enable(kwargs)
            else:
                model.gradient_checkpointing_disable()
            step()  # makes the gradients
            name = f"{tokens} tokens{', checkpointing' * checkpointing}"
            taken = results.ms(step, rounds=3, warm=1)
            results.add(f"training pass, {size}, {name}", taken, "ms")
            rate = _operations(policy, inputs) / taken * 1e3
            results.add(f"its share of the peak rate, {name}", rate / BFLOAT16_RATE, "MFU", 1.0)
            results.add(f"its memory, {name}", results.peak_gib(step), "GiB")
            estimate = _estimated_gib(policy, inputs, checkpointing, results)
            if estimate is not None:
                results.add(f"its memory as --dry_run estimates it, {name}", estimate, "GiB")
            if not results.toy:
                results.add(f"its waits for the GPU, {name}", _waits(step), "waits", 0)


def _operations(policy: Policy, inputs: Any) -> float:
    """Operations of a forward and a backward pass, without attention's: 6 for each weight and
    token. Recomputation is not counted."""
    parts = [(core(policy.model).language_model, inputs.input_ids.numel()),
             (core(policy.model).visual, len(inputs.pixel_values))]  # fmt: skip
    total = 6 * policy.head.weight.numel() * len(inputs.completion_ids)
    for module, tokens in parts:
        weights = [
            p for n, p in module.named_parameters() if p.ndim > 1 and "embed_tokens" not in n
        ]
        total += 6 * sum(p.numel() for p in weights) * tokens
    return total


def _estimated_gib(
    policy: Policy, inputs: Any, checkpointing: bool, results: Results
) -> float | None:
    """What --dry_run estimates for the pass; None if a package that it needs is missing."""
    try:
        from virft_fast.train import memory, parse_args
    except ImportError as error:
        results.note(f"no estimate: {error}")
        return None
    flags = ["--dtype", str(results.dtype).removeprefix("torch.")]
    config = parse_args(flags + ["--gradient_checkpointing"] * checkpointing)
    joined = sum(len(g.lengths) * (g.prompt_length + max(g.lengths)) for g in inputs.groups)
    load = memory.Load(
        inputs.input_ids.numel(), joined, len(inputs.completion_ids), len(inputs.pixel_values)
    )
    return sum(memory.activation_bytes(config, policy, load, results.device).values()) / 2**30


def _waits(step: Callable[[], object]) -> int:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def loss(results: Results) -> None:
    """The head and the loss at 12,800 rows: ours, materialized logits, and peers' if installed."""
    sizes = [(4, 8, 16, 512, None)]
    if not results.toy:
        sizes = [(64, 200, 1536, 151_936, 22.7), (64, 200, 3584, 152_064, 53.0)]
    for n, t, dim, vocab, floor in sizes:
        generator = torch.Generator(results.device).manual_seed(0)
        options = {"generator": generator, "device": results.device}
        hidden = torch.randn(n, t, dim, **options).to(results.dtype).requires_grad_()
        weight = (torch.randn(vocab, dim, **options) * 2 / dim**0.5).to(results.dtype)
        weight.requires_grad_()
        ids = torch.randint(vocab, (n, t), **options)
        mask = torch.ones(n, t, dtype=torch.bool, device=results.device)
        advantages = torch.linspace(-1, 1, n, device=results.device)

        def whole(logps: Tensor, a: Tensor = advantages) -> Tensor:
            return -((logps - logps.detach()).exp() * a[:, None]).mean()

        def ours(h=hidden, w=weight, i=ids, m=mask, a=advantages) -> Tensor:
            return linear_grpo_loss(h, w, i, m, advantages=a).loss

        def logits(h=hidden, w=weight, i=ids) -> Tensor:
            log_p = (h @ w.T).float().log_softmax(-1)
            return whole(log_p.gather(-1, i[..., None])[..., 0])

        def trl(h=hidden, w=weight, i=ids) -> Tensor:
            from trl.kernels.chunked_logprob import ChunkedLogProbFunction

            given = (h.flatten(0, 1), w, None, i.flatten(), 1.0, 32_768, None, 1.0, ("entropy",))
            return whole(ChunkedLogProbFunction.apply(*given)[0].view(i.shape))

        contenders = {"ours": ours, "materialized logits": logits}
        if importlib.util.find_spec("trl") and not results.toy:
            contenders["TRL"] = trl
        gradients = {}
        for name, contender in contenders.items():
            hidden.grad = weight.grad = None
            try:
                taken = results.ms(lambda c=contender: c().backward(), rounds=5)
                used = results.peak_gib(lambda c=contender: c().backward())
            except (torch.OutOfMemoryError, ImportError, TypeError) as error:
                results.note(f"{name}, D = {dim}: {type(error).__name__}: {error!s:.200}")
                continue
            hidden.grad = weight.grad = None
            contender().backward()
            gradients[name] = hidden.grad.float()
            results.add(f"loss, {n * t} rows, D = {dim}: {name}", taken, "ms", floor)
            results.add(f"its memory, D = {dim}: {name}", used, "GiB")
        for name, gradient in gradients.items():
            error = float((gradient - gradients["ours"]).norm() / gradients["ours"].norm())
            results.require(error < 5e-2, f"the gradient of {name} is ours within 5 %, D = {dim}")
