"""Imports go down the layers, or sideways without a cycle; heavy things stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "virft_fast"
LAYERS = {
    "__init__": 0, "batch": 0, "config": 0, "dist": 0, "kernels": 0, "matching": 0,
    "tasks": 1, "data": 1, "models": 1,
    "engine": 2, "rollout": 2, "metrics": 2,
    "checkpoint": 3, "grpo": 3, "evaluation": 3,
    "train": 4, "evaluate": 4, "report": 4,
}  # fmt: skip
PROGRAMS = ("train", "evaluate", "report")


def imports(path):
    """(module, line) of every import in a file, lazy ones too, those for type checkers not."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno
            if node.module == "virft_fast":
                yield from ((f"virft_fast.{alias.name}", node.lineno) for alias in node.names)


def room(path, root):
    return path.relative_to(root).with_suffix("").parts[0]


def violations(root):
    """What breaks the rules, one line each."""
    found, edges = [], {}
    for path in sorted(root.rglob("*.py")):
        here = room(path, root)
        for module, line in imports(path):
            where = f"{path.relative_to(root)}:{line}"
            if module.split(".")[0] == "deepspeed" and here != "engine":
                found.append(f"{where} imports deepspeed")
            if module == "argparse" and here not in PROGRAMS:
                found.append(f"{where} imports argparse")
            if not module.startswith("virft_fast."):
                continue
            there = module.split(".")[1]
            if LAYERS[there] > LAYERS[here]:
                found.append(f"{where} goes up to {there}")
            if there != here:
                edges.setdefault(here, set()).add(there)
        if here not in PROGRAMS:
            found += [f"{path.relative_to(root)}:{line} {what}" for what, line in outputs(path)]
    return found + cycles(edges)


def outputs(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("print", "sys.exit", "exit"):
                yield f"calls {name}", node.lineno


def cycles(edges):
    found = []
    for start in edges:
        seen, todo = set(), list(edges[start])
        while todo:
            at = todo.pop()
            if at == start:
                found.append(f"{start} is in a cycle")
                break
            if at not in seen:
                seen.add(at)
                todo += edges.get(at, ())
    return found


def test_every_room_has_a_layer():
    assert {room(path, ROOT) for path in ROOT.rglob("*.py")} <= set(LAYERS)


def test_imports_keep_to_the_layers():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("kernels/a.py", "def f():\n    from virft_fast.grpo import x\n", "goes up to grpo"),
        ("grpo.py", "import deepspeed.zero\n", "imports deepspeed"),
        ("dist.py", "print(1)\n", "calls print"),
        ("tasks/a.py", "from virft_fast import data\n", "cycle"),
        ("models/a.py", "import argparse\n", "imports argparse"),
    ],
)
def test_the_checker_sees_a_planted_violation(tmp_path, file, text, complaint):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/b.py").write_text("from virft_fast.tasks import y\n")
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert any(complaint in line for line in violations(tmp_path))


def test_importing_the_package_is_cheap():
    code = (
        "import sys, virft_fast\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'triton', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kernels_tasks_and_matching_need_neither_transformers_nor_deepspeed():
    code = (
        "import sys, virft_fast.kernels, virft_fast.matching, virft_fast.tasks\n"
        "heavy = {'transformers', 'deepspeed', 'triton', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
