"""Whether the installed packages and the GPU's driver are new enough."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from importlib import metadata

import torch


def release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])


def requirements() -> Iterator[tuple[str, str | None, str, str]]:
    """What the installed package and its extra `train` require: (name, installed version or None,
    least version, the whole line). Nothing if it isn't installed itself.
    """
    try:
        lines = metadata.requires("virft_fast") or []
    except metadata.PackageNotFoundError:
        return
    for line in lines:
        bound = re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", line)
        if bound is None or "extra ==" in line.replace('extra == "train"', ""):
            continue
        name, least = bound.groups()
        try:
            yield name, str(metadata.version(name)), least, line
        except metadata.PackageNotFoundError:
            yield name, None, least, line


def too_old() -> list[str]:
    """The packages that are older than this one requires, each with its remedy."""
    return [
        f"{name} {version} is older than {least}: pip install '{name}>={least}'"
        for name, version, least, _ in requirements()
        if version and release(version) < release(least)
    ]


def driver_version() -> int:
    """The newest CUDA that the NVIDIA driver supports, 12020 for 12.2; 0 without a driver."""
    version = ctypes.c_int(0)
    with contextlib.suppress(OSError):  # torch has no public function for it
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def unusable_driver() -> tuple[str, str] | None:
    """Why torch can't use the GPU that this machine has, and what to do; None if it can, there is
    none, or CUDA_VISIBLE_DEVICES hides it."""
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    built = torch.version.cuda
    if built is None:
        if not os.path.exists("/proc/driver/nvidia/version"):
            return None
        why = f"torch {torch.__version__} was built without CUDA, but there is an NVIDIA driver"
        return why, "install torch's CUDA build, or set CUDA_VISIBLE_DEVICES= to use the CPU"
    number = driver_version()
    driver = (number // 1000, number % 1000 // 10)
    if not number or driver[0] >= release(built)[0]:
        return None
    return (
        f"the NVIDIA driver is too old: it supports CUDA {driver[0]}.{driver[1]}, and torch "
        f"{torch.__version__} was built for CUDA {built}",
        f"update the driver, or install a torch that was built for CUDA {driver[0]}",
    )
