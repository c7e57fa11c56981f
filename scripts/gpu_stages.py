"""Stages of gpu_check.py: what must be right. Nothing may use the GPU while this is imported."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from virft_fast.kernels import grpo_loss, linear_grpo_loss, linear_logps
from virft_fast.matching import is_native, match_boxes, pairwise_iou
from virft_fast.models.decode_step import DecodeStep
from virft_fast.models.qwen_vl import Policy, add_lora, core, load_model
from virft_fast.models.shared_prefix import Group, PackedAttention
from virft_fast.rollout import Sampling
from virft_fast.rollout.native import NativeRollout
from virft_fast.rollout.speculation import History
from virft_fast.versions import driver_version

ROOT = Path(__file__).parent.parent
# What an H200's data sheet gives: bytes/s of its memory, dense bfloat16 operations/s.
MEMORY_RATE, BFLOAT16_RATE = 4.8e12, 989e12
G = 8
# What the matcher is built from.
SOURCES = ("virft_fast", "csrc", "setup.py", "CMakeLists.txt", "pyproject.toml", "README.md",
           "LICENSE")  # fmt: skip


@dataclass
class Results:
    """A stage's figures and notes, written after each of them."""

    path: Path
    stage: str
    toy: bool
    error: str = ""
    figures: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.toy else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.toy else torch.bfloat16

    def add(self, name: str, value: float, unit: str, floor: float | None = None) -> None:
        """Record a figure. `floor`: the least time, or the highest rate, that the GPU allows."""
        figure = {"name": name, "value": float(value), "unit": unit}
        self.figures.append(figure | {"floor": None if self.toy else floor})
        self.write()

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.write()

    def require(self, holds: bool, text: str) -> None:
        """Record a check, and stop the stage if it fails."""
        self.note(f"{'ok' if holds else 'WRONG'}: {text}")
        if not holds:
            raise AssertionError(text)

    def write(self) -> None:
        content = {"stage": self.stage, "error": self.error, "figures": self.figures,
                   "notes": self.notes, "toy": self.toy}  # fmt: skip
        aside = self.path.with_suffix(".aside")
        aside.write_text(json.dumps(content, indent=1))
        aside.replace(self.path)

    def sync(self) -> None:
        if not self.toy:
            torch.cuda.synchronize()

    def ms(self, function: Callable[[], object], rounds: int = 7, warm: int = 2) -> float:
        """The median time of a call in milliseconds."""
        times = []
        for number in range(warm + rounds):
            self.sync()
            start = time.perf_counter()
            function()
            self.sync()
            if number >= warm:
                times.append(time.perf_counter() - start)
        return 1e3 * statistics.median(times)

    def peak_gib(self, function: Callable[[], object]) -> float:
        """The most memory that a call holds at once beside what there was; 0 on a CPU."""
        if self.toy:
            function()
            return 0.0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**30


def environment(results: Results) -> None:
    """Versions; the kernel that torch chooses for attention; what memory and matrix units reach."""
    for name in ("torch", "triton", "transformers", "deepspeed", "flash-attn", "liger-kernel"):
        try:
            results.note(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            results.note(f"{name} is not installed")
    results.note(f"Python {platform.python_version()}, CUDA {torch.version.cuda}")
    if not results.toy:
        device = torch.cuda.get_device_properties(0)
        results.note(
            f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB"
        )
        results.note(f"cuDNN {torch.backends.cudnn.version()}")
        results.note(f"driver for CUDA {driver_version()}")
    query = torch.randn(1, 12, 650, 128, device=results.device, dtype=results.dtype)
    key = torch.randn(1, 2, 650, 128, device=results.device, dtype=results.dtype)
    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        number = torch._fused_sdp_choice(query, key, key, is_causal=True, enable_gqa=True)
        chosen = torch.nn.attention.SDPBackend(number).name
        results.note(f"attention of (1, 12, 650, 128), 2 key heads, cuDNN {cudnn}: {chosen}")
        results.require(not (chosen == "MATH" and not results.toy), "no unfused attention")
    size = 2**22 if results.toy else 2**32
    pair = torch.empty(2, size, dtype=torch.uint8, device=results.device)
    rate = 2 * size / results.ms(lambda: pair[0].copy_(pair[1])) * 1e3
    results.add("copy", rate / 1e12, "TB/s", MEMORY_RATE / 1e12)
    side = 256 if results.toy else 8192
    left = torch.randn(side, side, device=results.device, dtype=results.dtype)
    rate = 2 * side**3 / results.ms(lambda: left @ left) * 1e3
    results.add("matrix product", rate / 1e12, "TFLOP/s", BFLOAT16_RATE / 1e12)


def kernels(results: Results) -> None:
    """The fused loss against float64, bounds of its outputs, and the tests of the kernels."""
    n, t, dim, vocab = (4, 8, 32, 512) if results.toy else (8, 64, 512, 32_000)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, t, dim, generator=generator)
    weight = torch.randn(vocab, dim, generator=generator) * 2 / dim**0.5
    ids = torch.randint(vocab, (n, t), generator=generator)
    mask, advantages = torch.ones(n, t, dtype=torch.bool), torch.linspace(-1, 1, n)
    narrow = [part.to(results.device, results.dtype).requires_grad_() for part in (hidden, weight)]
    here = [part.to(results.device) for part in (ids, mask, advantages)]
    ours = linear_grpo_loss(*narrow, *here[:2], advantages=here[2])
    ours.loss.backward()
    exact = [part.detach().cpu().double().requires_grad_() for part in narrow]
    theirs = grpo_loss(exact[0] @ exact[1].T, ids, mask, advantages=advantages.double())
    theirs.loss.backward()
    for name, a, b in zip(("hidden", "weight"), narrow, exact, strict=True):
        error = float((a.grad.cpu().double() - b.grad).norm() / b.grad.norm())
        results.add(f"error of the loss's gradient, {name}", error, "relative")
        results.require(error < 2e-2, f"gradient of {name} within 2 % of float64")
    _in_one_graph(results, [part.detach() for part in narrow], *here)
    logps, entropy = linear_logps(*(part.detach() for part in narrow), here[0])
    bound = torch.log(torch.tensor(float(vocab))) * (1 + 1e-4)
    results.require(bool((logps <= 0).all()), "log-probs are at most 0")
    results.require(bool(((entropy >= 0) & (entropy <= bound)).all()), "0 <= entropy <= log V")
    if results.toy:
        return
    missing = [n for n in ("pytest", "hypothesis") if importlib.util.find_spec(n) is None]
    if missing:
        results.note(f"{' and '.join(missing)} missing: the kernels' tests did not run")
    else:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        for cases in ("triton_cases", "decode_cases", "prefix_cases"):
            status = _run([*command, f"tests/{cases}.py"], limit=20, TRITON_INTERPRET="0",
                          VIRFT_CASES="gpu")  # fmt: skip
            if status is None:  # most of the time goes into compiling kernels
                results.note(f"tests/{cases}.py: nothing has failed in 20 s, the rest did not run")
            else:
                results.require(status == 0, f"tests/{cases}.py pass on the GPU")
    if sanitizer := shutil.which("compute-sanitizer"):
        small = "from virft_fast.doctor import _loss; print(*_loss())"
        status = _run([sanitizer, "--error-exitcode", "9", sys.executable, "-c", small], limit=20)
        results.note(f"compute-sanitizer on a small loss: exit status {status}")


def _in_one_graph(results: Results, inputs: list[Tensor], *rest: Tensor) -> None:
    """torch.compile takes the loss and its gradient without a break in the graph."""
    ids, mask, advantages = rest

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_grpo_loss(hidden, weight, ids, mask, advantages=advantages).loss

    values = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [part.clone().requires_grad_() for part in inputs]
        value = function(*leaves)
        values.append([value.detach(), *torch.autograd.grad(value, leaves)])
    pairs = zip(*values, strict=True)
    error = max(float((a - b).float().norm() / a.float().norm()) for a, b in pairs)
    results.add("loss and gradients in one graph against without", error, "relative")
    results.require(error < 1e-2, "torch.compile(fullgraph=True) takes the loss")


def _run(command: list[str], *, limit: float, folder: Path = ROOT, **environ: str) -> int | None:
    """A command's exit status; None if it took too long. Its output goes into the stage's log."""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path} | environ
    try:
        return subprocess.run(command, cwd=folder, env=env, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return None


def extension(results: Results) -> None:
    """The matcher's CUDA half, built for this GPU in a folder of its own, against the CPU."""
    if results.toy:
        results.note("native matcher" if is_native() else "matcher in Python")
        _matches(torch.device("cpu"))
        return
    from torch.utils import cpp_extension

    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    missing += ["pybind11"] if importlib.util.find_spec("pybind11") is None else []
    missing += ["nvcc"] if cpp_extension.CUDA_HOME is None else []
    if missing:
        results.note(f"the extension was not built, for lack of {', '.join(missing)}")
        if is_native("cuda"):
            _matches(results.device)
            results.note("ok: with the installed one, CPU and GPU give the same IoU and matches")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in SOURCES:  # a build deletes the module that it finds
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, folder / part)
        major, minor = torch.cuda.get_device_capability()
        start = time.perf_counter()
        status = _run([sys.executable, "setup.py", "build_ext", "--inplace"], limit=50,
                      folder=folder, VIRFT_FAST_CUDA="1", VIRFT_FAST_CUDA_ARCHS=f"{major}{minor}",
                      CUDACXX=f"{cpp_extension.CUDA_HOME}/bin/nvcc")  # fmt: skip
        results.require(status == 0, "the extension builds")
        results.add("build of the extension", time.perf_counter() - start, "s")
        check = "import gpu_stages, torch; gpu_stages._matches(torch.device('cuda'))"
        paths = os.pathsep.join([name, str(ROOT / "scripts")])
        status = _run([sys.executable, "-c", check], limit=40, folder=folder, PYTHONPATH=paths)
        results.require(status == 0, "CPU and GPU give the same IoU and matches")


def _matches(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 512, 12, 2, 2, generator=generator).sort(-2).values
    pred, gt = corners.flatten(-2)
    counts = torch.randint(0, 13, (2, 512), generator=generator)
    problem = (pred, gt, counts[0], counts[1])
    assert device.type == "cpu" or is_native("cuda")
    there = [part.to(device) for part in problem]
    torch.testing.assert_close(
        pairwise_iou(*there).cpu(), pairwise_iou(*problem), rtol=1e-6, atol=1e-6
    )
    assert torch.equal(match_boxes(*there)[0].cpu(), match_boxes(*problem)[0])


def attention(results: Results) -> None:
    """Attention of packed rows of changing lengths: the first call of each, and the gradients."""
    heads, keys, size, prompt = (4, 2, 16, 40) if results.toy else (12, 2, 128, 650)
    kinds = ["fused", "two_part"] if results.toy else ["fused", "two_part", "flex"]
    torch.backends.cuda.enable_cudnn_sdp(False)

    def states(length: int, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        made = (torch.randn(1, length, n, size, generator=generator) for n in (heads, keys, keys))
        return [s.to(results.device, dtype).transpose(1, 2).requires_grad_() for s in made]

    for kind in kinds:
        times = []
        for number in range(4 if results.toy else 20):
            group = Group(0, prompt, tuple(prompt // 4 + 7 * number + i for i in range(G)))
            row = states(group.end, results.dtype)
            attend = PackedAttention([group], results.device, kind)
            results.sync()
            start = time.perf_counter()
            attend(0, *row, size**-0.5).sum().backward()
            results.sync()
            times.append(1e3 * (time.perf_counter() - start))
        results.add(f"first call of a new length, {kind}: median", statistics.median(times), "ms")
        results.add(f"first call of a new length, {kind}: longest", max(times[1:]), "ms")
        again = results.ms(lambda a=attend, r=row: a(0, *r, size**-0.5).sum().backward())
        results.add(f"the same row again, {kind}", again, "ms")
    group = Group(0, prompt, (9, 30, 0, 17))
    gradients = {}
    for kind, dtype in [("dense", torch.float32), *((kind, results.dtype) for kind in kinds)]:
        row = states(group.end, dtype)
        out = PackedAttention([group], results.device, kind)(0, *row, size**-0.5)
        out.float().square().mean().backward()
        gradients[kind] = torch.cat([part.grad.flatten().float() for part in row])
    for kind in kinds:
        error = gradients[kind] - gradients["dense"]
        error = float(error.norm() / gradients["dense"].norm())
        results.add(f"error of the gradient, {kind}", error, "relative")
        results.require(error < 2e-2, f"gradient of {kind} within 2 % of dense float32")


def rollout(results: Results) -> None:
    """Steps in graphs and with guesses draw what single operations draw; what a capture takes."""
    from models import random_model
    from vlm import make_model, make_processor, make_prompts

    qwen, gemma = make_processor(), make_processor("gemma3")
    models = [("whole", load_model("tiny"), qwen)]
    if importlib.util.find_spec("peft"):
        adapted = add_lora(load_model("tiny"), r=4, alpha=8, target_modules=["q_proj", "up_proj"])
        models.append(("LoRA", adapted, qwen))
    models.append(("qwen3_5", random_model("qwen3_5", qwen.tokenizer), qwen))
    experts = random_model("qwen3_vl_moe", qwen.tokenizer)
    models.append(("qwen3_vl_moe", experts.to(results.dtype), qwen))  # float32 ones have no graphs
    models.append(("gemma3", make_model("cpu", "gemma3").float(), gemma))
    for name, model, processor in models:
        policy = Policy(model.to(results.device)).eval()
        prompts = make_prompts(processor, 2 if results.toy else 4, 60 if processor is qwen else 300)
        engines = [
            NativeRollout(
                lambda policy=policy: nullcontext(policy), processor.tokenizer,
                device=results.device, graphs=graphs and not results.toy, speculation=history,
            )
            for graphs, history in ((True, None), (False, None), (True, History()))
        ]  # fmt: skip
        for round_ in range(2 if results.toy else 4):
            sampling = Sampling(12 if results.toy else 96, seed=round_, top_k=20 * (round_ % 2))
            start = time.perf_counter()
            drawn = [engine.generate(prompts, 4, sampling) for engine in engines]
            for other, what in ((1, "graphs"), (2, "guesses")):
                if other == 2 and model.dtype != torch.float32:
                    continue  # products of other shapes may round another way
                same = torch.equal(drawn[0].completion_ids, drawn[other].completion_ids)
                results.require(same, f"{what} draw the same tokens, {name}, round {round_}")
            results.note(f"{name}, round {round_}: {time.perf_counter() - start:.2f} s")
            with torch.no_grad():  # the weights move, at the same addresses
                for parameter in policy.parameters():
                    parameter.mul_(1.01)
        results.add(f"graphs captured in {round_ + 1} rollouts, {name}",
                    len(engines[0]._buffers.graphs), "graphs")  # fmt: skip
        results.require(
            results.toy or not engines[0]._buffers.graphs.failed, "no capture has failed"
        )
        waits = DecodeStep(core(policy.model).get_decoder()).waits  # experts on most GPUs
        results.require(
            results.toy or waits != bool(len(engines[0]._buffers.graphs)),
            f"{name} has {'no ' * waits}graphs",
        )
