"""What is built from the sources installs and runs elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import virft_fast

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources by a machine without a compiler."""
    sources = tmp_path_factory.mktemp("sources") / "virft_fast"
    skipped = shutil.ignore_patterns(".*", "build", "dist", "site", "runs", "_C.*", "*.egg-info")
    shutil.copytree(ROOT, sources, ignore=skipped)
    folder = sources.parent / "dist"
    build = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check"]
    build += ["--outdir", str(folder), str(sources)]
    env = os.environ | {"CC": "false", "CXX": "false"}
    done = subprocess.run(build, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.suffix for path in sorted(folder.iterdir())] == [".whl", ".gz"]
    check = [sys.executable, "-m", "twine", "check", "--strict", *map(str, folder.iterdir())]
    assert subprocess.run(check, capture_output=True).returncode == 0
    return next(folder.glob("*.whl"))


def test_a_wheel_has_every_file_of_the_package(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("virft_fast/")}
    files = [path for path in (ROOT / "virft_fast").rglob("*") if path.is_file()]
    built = ("__pycache__", "_C.")  # what running and compiling add
    kept = [path for path in files if not any(word in str(path) for word in built)]
    assert packed == {str(path.relative_to(ROOT)) for path in kept}
    assert f"virft_fast-{virft_fast.__version__}-" in wheel.name


def test_the_demo_runs_from_an_installed_wheel(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(site), str(wheel)], check=True)
    code = (
        "import sys, virft_fast\nfrom virft_fast.commands import main\n"
        "print(virft_fast.__file__)\nsys.exit(main(sys.argv[1:]))"
    )
    demo = [sys.executable, "-c", code, "demo", "--max_steps", "2", "--eval_samples", "8"]
    env = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(demo, cwd=work, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(str(site)) and "trained 2 steps" in done.stdout
    assert (work / "runs/demo/report.png").is_file()
