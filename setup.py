"""Builds virft_fast._C, the native matcher, with CMake; the rest is in pyproject.toml.

VIRFT_FAST_CUDA=1 insists on its CUDA half, 0 leaves it out; by default it is built if nvcc works.
VIRFT_FAST_CUDA_ARCHS="80 90" builds it for fewer devices. Without a compiler, the package still
installs and matches with its Python reference.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
WISH = os.environ.get("VIRFT_FAST_CUDA") or "auto"
if WISH not in ("auto", "0", "1"):
    sys.exit(f"VIRFT_FAST_CUDA: expected 0, 1 or nothing, got {WISH!r}")


class Build(build_ext):
    def run(self):
        if self.inplace or self.editable_mode:
            for stale in (ROOT / "virft_fast").glob("_C.*"):
                stale.unlink()  # after a failure it would be loaded
        super().run()

    def build_extension(self, ext):
        try:
            self.run_cmake(ext, WISH)
        except (subprocess.CalledProcessError, OSError, ImportError) as error:
            if WISH != "auto":
                raise CompileError(f"{ext.name}: {error}") from error
            print(f"virft_fast: trying without CUDA, because: {error}", file=sys.stderr)
            try:
                self.run_cmake(ext, "0")
            except (subprocess.CalledProcessError, OSError, ImportError) as second:
                raise CompileError(f"{ext.name}: {second}") from second

    def run_cmake(self, ext, cuda):
        import pybind11

        folder = Path(self.build_temp).resolve() / f"cuda-{cuda}"
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        options = {
            "VIRFT_PYTHON": "ON",
            "VIRFT_CUDA": cuda,
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        if archs := os.environ.get("VIRFT_FAST_CUDA_ARCHS"):
            options["VIRFT_CUDA_ARCHS"] = archs
        flags = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *flags], check=True)
        subprocess.run(["cmake", "--build", folder, "--target", "_C"], check=True)


# Optional: a build that fails is reported, and the package is installed without it.
module = Extension("virft_fast._C", sources=[], optional=WISH != "1")
setup(ext_modules=[module], cmdclass={"build_ext": Build})
