"""Compile every .cu for all architectures, without a GPU: python scripts/check_cuda.py

Prints registers and spills of each kernel; fails on a spill, a warning or an error.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
ARCHS = ("80", "86", "89", "90", "100", "120")


def main() -> int:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("expected nvcc on PATH, got none; install the CUDA toolkit (13 was tried)")
        return 1
    problems = 0
    for source in sorted((ROOT / "csrc").rglob("*.cu")):
        problems += check(nvcc, source)
    print(f"{problems} problems")
    return 1 if problems else 0


def check(nvcc: str, source: Path) -> int:
    """Compile one file; returns the number of problems."""
    include = [f"-I{ROOT / 'csrc'}"]
    flags = ["-std=c++17", "-O3", "-fmad=false", "-Xptxas=-v"]
    flags.append("-Xcompiler=-Wall,-Wno-unknown-pragmas")
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "--threads=2", *flags, *include, "-c", source, "-o", f"{folder}/o"]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    out = demangled(done.stdout + done.stderr).replace("(anonymous namespace)::", "")
    out = out.replace("(virft_fast::IouKind)", "kind ")
    if done.returncode:
        print(out)
        return 1
    problems = [line for line in out.splitlines() if "warning" in line.lower()]
    kernels = re.findall(
        r"Compiling entry function '(.+?>?)\(.*?' for '(sm_\d+)'.*?(\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        out,
        re.DOTALL,
    )
    for name, arch, stored, loaded, registers in kernels:
        name = name.removeprefix("void ").replace("virft_fast::", "")
        spilled = int(stored) + int(loaded)
        print(f"{arch:7} {name:28} {registers:>4} registers {spilled:>4} bytes spilled")
        if spilled:
            problems.append(f"{name} spills {spilled} bytes on {arch}")
    if {arch for _, arch, *_ in kernels} != {f"sm_{arch}" for arch in ARCHS}:
        problems.append(f"{source.name}: expected kernels for every architecture of {ARCHS}")
    for problem in problems:
        print("PROBLEM", problem)
    return len(problems)


def demangled(text: str) -> str:
    filt = shutil.which("cu++filt") or shutil.which("c++filt")
    if filt is None:
        return text
    return subprocess.run([filt], input=text, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
