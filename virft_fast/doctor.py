"""`virft-fast doctor [flags of a run]`: what this machine and environment allow, and what to do
where something is missing. With flags or --config also whether that run fits."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

# The releases of constraints.txt. Down to pyproject.toml's bounds older ones work as well.
TESTED = {
    "torch": "2.13.0", "triton": "3.9.0", "transformers": "5.23.0", "deepspeed": "0.19.8",
    "datasets": "5.2.0", "accelerate": "1.15.0", "peft": "0.21.2",
}  # fmt: skip
# Packages that only some runs need -> (what needs them, how to get them).
OPTIONAL = {
    "peft": ("--use_peft", "pip install --no-build-isolation '.[peft]'"),
    "flash-attn": (
        "--attn_implementation flash_attention_2",
        "on a GPU node: pip install --no-build-isolation '.[gpu]'",
    ),
    "liger-kernel": (
        "--use_liger_kernel",
        "on a GPU node: pip install --no-build-isolation '.[gpu]'",
    ),
    "faster-coco-eval": ("AP of COCO and LVIS", "pip install --no-build-isolation '.[eval]'"),
    "rapidfuzz": ("virft-fast mia", "pip install --no-build-isolation '.[mia]'"),
    "math-verify": ("the reward accuracy_math", "pip install --no-build-isolation '.[math]'"),
}
MIN_FREE_BYTES = 20 * 2**30  # a checkpoint of a 2B model with its optimizer state
MIN_CAPABILITY = (8, 0)  # bfloat16


class Finding(NamedTuple):
    """One thing looked at. `level`: ok, note (something optional is missing) or problem."""

    level: str
    what: str
    remedy: str = ""


def main(argv: list[str] | None = None) -> int:
    """Print all findings; returns 1 if one of them is a problem, 2 for unusable flags."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & {*argv}:
        argparse.ArgumentParser(prog="virft-fast doctor", description=__doc__).print_help()
        return 0
    worst = 0
    for finding in findings():
        print(f"{finding.level:8}{finding.what}")
        if finding.remedy:
            print(f"{'':8}-> {finding.remedy}")
        worst |= finding.level == "problem"
    if argv:
        from virft_fast.train import main as train

        print("\nthis run:", flush=True)
        return train([*argv, "--dry_run"]) or int(worst)
    print("\nno problems" if not worst else "\nproblems were found; see above")
    return int(worst)


def findings(folder: Path = Path()) -> Iterator[Finding]:
    """Look at packages, the native matcher, GPUs, collectives, disk and the loss, in this order."""
    yield from _packages()
    yield from _optional_packages()
    if importlib.util.find_spec("torch") is None:
        return
    yield _matcher()
    yield from _gpus()
    yield from _collectives()
    yield _disk(folder)
    yield _loss()


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])


def _packages() -> Iterator[Finding]:
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield (
        Finding("ok", system)
        if sys.version_info >= (3, 10)
        else Finding("problem", system, "use Python 3.10 or later")
    )
    for requirement in metadata.requires("virft_fast") or []:
        bound = re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", requirement)
        if bound is None or "extra ==" in requirement:
            continue
        name, least = bound.groups()
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            if "sys_platform" not in requirement or platform.system() == "Linux":
                yield Finding("problem", f"{name} is missing", f"pip install '{name}>={least}'")
            continue
        if _release(version) < _release(least):
            remedy = f"pip install '{name}>={least}'"
            yield Finding("problem", f"{name} {version} is older than {least}", remedy)
        elif name in TESTED:
            newer = _release(version) > _release(TESTED[name])
            note = f"newer than the tested {TESTED[name]}; if it fails, install that one"
            yield Finding("note" if newer else "ok", f"{name} {version}", note if newer else "")


def _optional_packages() -> Iterator[Finding]:
    for name, (needed_for, how) in OPTIONAL.items():
        try:
            yield Finding("ok", f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            yield Finding("note", f"{name} is not installed; {needed_for} needs it", how)


def _matcher() -> Finding:
    import torch

    from virft_fast.matching import is_native, why_not_native

    if not is_native():
        remedy = "install torch, setuptools and ninja, then pip install --no-build-isolation ."
        return Finding("note", f"the matcher runs in Python, slowly: {why_not_native()}", remedy)
    if torch.cuda.is_available() and not is_native("cuda"):
        remedy = "VIRFT_FAST_CUDA=1 pip install --no-build-isolation .; needs nvcc"
        return Finding("note", "the native matcher runs on the CPU only", remedy)
    return Finding("ok", "native matcher")


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if not torch.version.cuda else "no driver or GPU"
        yield Finding("note", f"no GPU: {why}; runs use the CPU", "train large models elsewhere")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        text = (
            f"GPU {index}: {device.name}, sm_{device.major}{device.minor}, "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        )
        old = (device.major, device.minor) < MIN_CAPABILITY
        remedy = "bfloat16 needs sm_80 or later; leave --bf16 out" if old else ""
        yield Finding("problem" if old else "ok", text, remedy)
    yield Finding("ok", f"torch {torch.__version__} with CUDA {torch.version.cuda}")


def _collectives() -> Iterator[Finding]:
    import torch

    if torch.cuda.device_count() < 2:
        return
    if torch.distributed.is_nccl_available():
        version = ".".join(str(number) for number in torch.cuda.nccl.version())
        yield Finding("ok", f"NCCL {version}")
    else:
        yield Finding("problem", "no NCCL", "install torch's CUDA build for Linux")


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{free / 2**30:.0f} GiB free in {folder.resolve()}"
    if not os.access(folder, os.W_OK):
        return Finding("problem", f"{folder.resolve()} can't be written", "start in another folder")
    if free < MIN_FREE_BYTES:
        return Finding("note", text, "a 2B model's checkpoint takes about 20 GiB")
    return Finding("ok", text)


def _loss() -> Finding:
    """The fused loss and its gradient against the plain one, on the device a run would use."""
    import torch

    from virft_fast.kernels import grpo_loss, linear_grpo_loss

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 16, 64, generator=generator).to(device).requires_grad_()
    weight = torch.randn(512, 64, generator=generator).to(device)
    ids = torch.randint(512, (8, 16), generator=generator).to(device)
    mask = torch.ones(8, 16, dtype=torch.bool, device=device)
    advantages = torch.linspace(-1, 1, 8, device=device)
    try:
        fused = linear_grpo_loss(hidden, weight, ids, mask, advantages=advantages).loss
        plain = grpo_loss(hidden @ weight.T, ids, mask, advantages=advantages).loss
        pair = [torch.autograd.grad(loss, hidden)[0] for loss in (fused, plain)]
    except Exception as error:  # whatever a driver or a compiler says
        return Finding(
            "problem", f"the fused loss fails on {device}: {error}", "--loss_impl reference"
        )
    difference = (pair[0] - pair[1]).abs().max().item() / pair[1].abs().max().item()
    text = f"fused loss on {device}: gradient within {difference:.0e} of the plain one"
    return Finding("ok", text) if difference < 1e-2 else Finding(
        "problem", text, "train with --loss_impl reference, and report it"
    )  # fmt: skip
