"""`virft-fast doctor [--model X] [flags of a run]`: checks what this machine and its packages
allow, and says how to get what is missing. With --model, it says what that model gets, and why not
more. Followed by a run's flags, it also checks whether that run fits."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from virft_fast.arguments import TRAIN_REMEDY
from virft_fast.commands import end_process
from virft_fast.console import unbreakable
from virft_fast.versions import release, requirements, unusable_driver

# The releases in constraints.txt. Older ones also work, down to pyproject.toml's bounds.
TESTED = {
    "torch": "2.13.0", "triton": "3.9.0", "transformers": "5.23.0", "deepspeed": "0.19.8",
    "datasets": "5.2.0", "accelerate": "1.15.0", "peft": "0.21.2",
}  # fmt: skip
# Packages that only some runs need -> (what needs them, the extra that installs them).
OPTIONAL = {
    "peft": ("--use_peft", "peft"),
    "bitsandbytes": ("--load_in_4bit and --optim adamw_8bit", "4bit"),
    "flash-attn": (
        "--attn_implementation flash_attention_2 (pip compiles it for up to an hour)",
        "flash-attn",
    ),
    "kernels": ("--attn_implementation kernels-community/flash-attn2", "kernels"),
    "liger-kernel": ("--use_liger_kernel", "gpu"),
    "faster-coco-eval": ("AP of COCO and LVIS", "eval"),
    "rapidfuzz": ("virft-fast mia", "mia"),
    "math-verify": ("the reward accuracy_math", "math"),
}
# Packages with compiled code or kernels, which may not fit this torch.
BUILT = ("triton", "deepspeed", "flash-attn", "liger-kernel", "faster-coco-eval")
MIN_FREE_BYTES = 20 * 2**30  # a checkpoint of a 2B model with its optimizer state
MIN_CAPABILITY = (8, 0)  # bfloat16


class Finding(NamedTuple):
    """The result of one check. `level`: ok, note (something optional is missing) or problem."""

    level: str
    what: str
    remedy: str = ""


@unbreakable()
def main(argv: list[str] | None = None) -> int:
    """Print all findings; returns 1 if one of them is a problem, 2 for unusable flags."""
    parser = argparse.ArgumentParser(
        prog="virft-fast doctor", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--model", help="a folder, a hub id or tiny: what does it get?")
    arguments, argv = parser.parse_known_args(argv)  # the rest is the run's
    worst = 0
    for finding in findings(model=arguments.model):
        print(f"{finding.level:8}{finding.what}")
        if finding.remedy:
            print(f"{'':8}-> {finding.remedy}")
        worst |= finding.level == "problem"
    print("\nno problems" if not worst else "\nproblems were found; see above")
    if not argv:
        return int(worst)
    print("\nthis run:", flush=True)
    try:
        from virft_fast.train import main as train
    except Exception as error:  # whatever a broken package raises
        print(f"virft-fast doctor: the run can't be checked: {error}", file=sys.stderr)
        return 1
    return train([*argv, "--dry_run"]) or int(worst)


def findings(folder: Path = Path(), model: str | None = None) -> Iterator[Finding]:
    """Check packages, the native matcher, GPUs, collectives, disk, the loss and a model, in this
    order. A check that fails is also a finding."""
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "Python and packages": _packages, "optional packages": _optional_packages,
        "the matcher": _matcher, "GPUs": _gpus, "collectives": _collectives,
        "the disk": partial(_disk, folder), "the fused loss": _loss,
    }  # fmt: skip
    if model is not None:
        checks["the model"] = partial(_model, model)
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as error:  # a broken package or driver can raise anything
            text = f"{name} can't be checked: {type(error).__name__}: {error}"
            yield Finding("problem", text, "reinstall the package that the message names")


def _packages() -> Iterator[Finding]:
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    old = sys.version_info < (3, 10)
    yield Finding("problem" if old else "ok", system, "use Python 3.10 or later" if old else "")
    if not (required := list(requirements())):
        yield Finding("note", "virft_fast is not installed", "pip install -e '.[train]'")
    missing = []
    for name, version, least, line in required:
        remedy = f"pip install '{name}>={least}'"
        if version is None:
            if "sys_platform" not in line or platform.system() == "Linux":
                missing.append(name)
        elif release(version) < release(least):
            yield Finding("problem", f"{name} {version} is older than {least}", remedy)
        elif name in TESTED:
            newer = release(version) > release(TESTED[name])
            note = f"newer than the tested {TESTED[name]}; if it fails, install that one"
            yield _imported(name, version, note if newer else "")
    if missing:
        yield Finding("problem", f"missing for training: {', '.join(missing)}", TRAIN_REMEDY)


def _optional_packages() -> Iterator[Finding]:
    for name, (needed_for, extra) in OPTIONAL.items():
        try:
            yield _imported(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            where = "on a GPU node: " if extra in ("gpu", "flash-attn", "kernels") else ""
            options = "--no-build-isolation " if name == "flash-attn" else ""
            yield Finding(
                "note",
                f"{name} is not installed; {needed_for} needs it",
                f"{where}pip install {options}{name}; in a checkout: '.[{extra}]'",
            )


def _imported(name: str, version: str, note: str = "") -> Finding:
    """The finding about an installed package; imports those in `BUILT`."""
    import torch

    if not torch.cuda.is_available():  # else DeepSpeed warns
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        if name in BUILT:
            importlib.import_module(name.replace("-", "_"))
    except Exception as error:  # compiled code can raise anything
        text = f"{name} {version} can't be imported: {type(error).__name__}: {error!s:.300}"
        return Finding("problem", text, "reinstall it for this torch, or uninstall it")
    return Finding("note" if note else "ok", f"{name} {version}", note)


def _matcher() -> Iterator[Finding]:
    import torch

    from virft_fast.matching import is_native, why_not_native

    if not is_native():
        remedy = "install a C++ compiler, then pip install -e . in a checkout"
        yield Finding("note", f"the matcher runs in Python, slowly: {why_not_native()}", remedy)
    elif torch.cuda.is_available() and not is_native("cuda"):
        remedy = "VIRFT_FAST_CUDA=1 pip install -e . in a checkout; needs nvcc"
        yield Finding("note", "the native matcher runs on the CPU only", remedy)
    else:
        yield Finding("ok", "native matcher")


def _gpus() -> Iterator[Finding]:
    import torch

    if trouble := unusable_driver():
        yield Finding("problem", *trouble)
        return
    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if not torch.version.cuda else "no driver or GPU"
        yield Finding(
            "note", f"no GPU: {why}; runs use the CPU", "train large models on a machine with a GPU"
        )
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


def _disk(folder: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(folder).free
    text = f"{free / 2**30:.0f} GiB free in {folder.resolve()}"
    if not os.access(folder, os.W_OK):
        yield Finding("problem", f"{folder.resolve()} can't be written", "start in another folder")
    elif free < MIN_FREE_BYTES:
        yield Finding("note", text, "a 2B model's checkpoint takes about 20 GiB")
    else:
        yield Finding("ok", text)


def _loss() -> Iterator[Finding]:
    """Compare the fused loss and its gradient with the plain ones, on a run's device."""
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
        difference = (pair[0] - pair[1]).abs().max().item() / pair[1].abs().max().item()
        text = f"fused loss on {device}: gradient within {difference:.0e} of the plain one"
    except Exception as error:  # a driver or a compiler can raise anything
        difference, text = math.inf, f"the fused loss fails on {device}: {error}"
    if difference < 1e-2:
        yield Finding("ok", text)
    else:
        yield Finding("problem", text, "train with --loss_impl reference, and report it")


def _model(name: str) -> Iterator[Finding]:
    """What the model gets; reads its configuration, not its weights."""
    from virft_fast.models.processing import load_processor
    from virft_fast.models.qwen_vl import Policy, find_model, load_model
    from virft_fast.models.support import supports

    try:
        source = find_model(name)
        policy = Policy(load_model(source, empty=True), prefix_sharing="off")
        load_processor(source)
    except (ImportError, ValueError, OSError) as error:
        yield Finding("problem", str(error), "docs/models.md lists what can be trained")
        return
    yield Finding("ok", f"model {name}: {source.config.model_type}")
    for feature, given, why in supports(policy):
        yield Finding("ok" if given else "note", f"{feature}: {'yes' if given else 'no'}, {why}")


if __name__ == "__main__":
    end_process(main())
