"""Builds virft_fast._C, the native matcher; everything else about the package is in pyproject.toml.

VIRFT_FAST_CUDA=1 builds its CUDA half as well, 0 leaves it out; by default it is built if nvcc and
a CUDA build of torch are installed. Without a compiler, or without torch at build time, the package
still installs, and matches with its Python reference.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# The PTX of the last one lets newer devices compile the kernels for themselves.
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
# Without -fopenmp, at::parallel_for in our file is a plain loop. Nothing is linked for it: the
# symbols come from the OpenMP library that torch has loaded, so there is one pool of threads.
OPENMP = "-fopenmp" if sys.platform == "linux" else "-fopenmp-simd"
CXX_FLAGS = ["-std=c++20", "-O3", OPENMP, "-ffp-contract=off",
             "-fvisibility=hidden", "-g0"]  # fmt: skip


def sources(*parts: str) -> list[str]:
    """Paths of csrc/sources.txt that belong to one of the parts."""
    lines = (ROOT / "csrc/sources.txt").read_text().splitlines()
    pairs = [line.split() for line in lines if line and not line.startswith("#")]
    return [f"csrc/{path}" for part, path in pairs if part in parts]


def version() -> str:
    text = (ROOT / "virft_fast/__init__.py").read_text()
    return re.search(r'__version__ = "(.+?)"', text)[1]


def without_extension(reason: str) -> None:
    print(f"virft_fast: the native matcher is left out: {reason}", file=sys.stderr)


def extension() -> dict:
    """`ext_modules` and `cmdclass` for setup(), or nothing where it can't be built."""
    wish = os.environ.get("VIRFT_FAST_CUDA") or "auto"
    if wish not in ("auto", "0", "1"):
        sys.exit(f"VIRFT_FAST_CUDA: expected 0, 1 or nothing, got {wish!r}")
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        reason = "torch is not there at build time (pip's --no-build-isolation shows it)"
        if wish == "1":
            sys.exit(f"VIRFT_FAST_CUDA=1: {reason}")
        without_extension(reason)
        return {}
    has_cuda = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
    if wish == "1" and not has_cuda:
        sys.exit(
            "VIRFT_FAST_CUDA=1: expected nvcc and a CUDA build of torch, got "
            f"torch {torch.__version__} and CUDA_HOME {cpp_extension.CUDA_HOME}"
        )
    with_cuda = has_cuda and wish != "0"

    class Build(cpp_extension.BuildExtension.with_options(use_ninja=bool(shutil.which("ninja")))):
        def run(self) -> None:
            # In a checkout the package may hold an older build, which would be loaded after a
            # failure.
            for stale in (ROOT / "virft_fast").glob("_C.*"):
                stale.unlink()
            if wish == "1":
                super().run()
                return
            try:
                super().run()
            except Exception as error:
                self.without_cuda(error)

        def without_cuda(self, error: Exception) -> None:
            if not with_cuda:
                without_extension(str(error))
                return
            print(f"virft_fast: the CUDA half is left out: {error}", file=sys.stderr)
            self.extensions[:] = [module(torch, cpp_extension, with_cuda=False)]
            try:
                super().run()
            except Exception as second:
                without_extension(str(second))

    return {
        "ext_modules": [module(torch, cpp_extension, with_cuda=with_cuda)],
        "cmdclass": {"build_ext": Build},
    }


def module(torch, cpp_extension, *, with_cuda: bool):
    archs = (os.environ.get("VIRFT_FAST_CUDA_ARCHS") or " ".join(CUDA_ARCHS)).split()
    macros = [
        ("VIRFT_FAST_VERSION", version()),
        ("VIRFT_TORCH_VERSION", torch.__version__),
        ("VIRFT_CUDA_ARCHS", " ".join(archs) if with_cuda else "none"),
    ]
    options = {
        "include_dirs": [str(ROOT / "csrc")],
        "define_macros": macros,
        "extra_compile_args": {"cxx": CXX_FLAGS},
        # Also loads before torch is imported, from site-packages and from a checkout.
        "runtime_library_dirs": ["$ORIGIN/../torch/lib", f"{Path(torch.__file__).parent}/lib"],
    }
    if not with_cuda:
        return cpp_extension.CppExtension("virft_fast._C", sources("core", "torch"), **options)
    options["extra_compile_args"]["nvcc"] = nvcc_flags(archs)
    return cpp_extension.CUDAExtension("virft_fast._C", sources("core", "torch", "cuda"), **options)


def nvcc_flags(archs: list[str]) -> list[str]:
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    return ["-std=c++20", "-O3", "-fmad=false", "-DUSE_CUDA", *codes]


setup(**extension())
