"""Imports go down the layers, or sideways without a cycle; heavy things stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "virft_fast"
ROOT = Path(__file__).parent.parent / PACKAGE
LAYERS = {
    "__init__": 0, "arguments": 0, "batch": 0, "config": 0, "devices": 0, "digests": 0, "dist": 0,
    "versions": 0, "train_extra": 0, "json_files": 0, "progress": 0,
    "kernels": 0, "matching": 0, "native": 0, "_C": 0,
    "tasks": 1, "data": 1, "models": 1,
    "engine": 2, "optimizer": 2, "deepspeed_config": 2, "rollout": 2, "metrics": 2,
    "checkpoint": 3, "output_lock": 3, "algorithms": 3, "mia": 3, "evaluation": 3,
    "train": 4, "watch": 4, "evaluate": 4, "merge": 4, "report": 4, "gpu_page": 4,
    "data.__main__": 4, "mia.__main__": 4,
    "cli": 4, "commands": 4, "console": 4, "demo": 4, "doctor": 4, "launch_lines": 4,
    "try_model": 4, "__main__": 4,
}  # fmt: skip
# Who may import what; the last line is the compiled matcher.
ONLY_IN = {
    "deepspeed": {"engine"},
    "triton": {"kernels", "models", "rollout"},
    "argparse": {room for room, layer in LAYERS.items() if layer == 4},
    "transformers.HfArgumentParser": {room for room, layer in LAYERS.items() if layer == 4},
    f"{PACKAGE}._C": {"native"},
}


class Import(NamedTuple):
    module: str  # dotted and absolute; `from a import b` gives both a and a.b
    line: int
    lazy: bool  # inside a function


def imports(path: Path, root: Path) -> list[Import]:
    """Every import of a file, lazy and spelt-out dynamic ones too, those for type checkers not."""
    package = [PACKAGE, *path.relative_to(root).parts[:-1]]
    return list(_imports(ast.parse(path.read_text()), package, lazy=False))


def _imports(node: ast.AST, package: list[str], lazy: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package[: len(package) - node.level + 1] if node.level else []
        module = ".".join([*above, *([node.module] if node.module else [])])
        yield Import(module, node.lineno, lazy)
        yield from (Import(f"{module}.{alias.name}", node.lineno, lazy) for alias in node.names)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        if ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield Import(str(node.args[0].value), node.lineno, lazy)
    children: list[ast.AST] = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING":
        children = list(node.orelse)
    lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in children:
        yield from _imports(child, package, lazy)


def outputs(path: Path) -> Iterator[tuple[str, int]]:
    """Where a file prints or ends the process, by whatever road; catching an exit is none."""
    tree = ast.parse(path.read_text())
    handlers = (node.type for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler))
    caught = {id(name) for kind in handlers if kind is not None for name in ast.walk(kind)}
    for node in ast.walk(tree):
        if id(node) in caught:
            continue
        if isinstance(node, ast.Name) and node.id in ("print", "SystemExit", "exit", "quit"):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.exit", "os._exit"):
            yield ast.unparse(node), node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "sys":
            yield from (("sys.exit", node.lineno) for a in node.names if a.name == "exit")


def module_name(path: Path, root: Path) -> str:
    """models/tiny.py -> models.tiny, models/__init__.py -> models."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def room(module: str) -> str:
    return module if module in LAYERS else module.split(".")[0]


def allowed(module: str, places: set[str]) -> bool:
    return module in places or room(module) in places


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def violations(root: Path) -> list[str]:
    """What breaks the rules, a line each."""
    files = {module_name(path, root): path for path in sorted(root.rglob("*.py"))}
    found, on_import, loads_triton = [], [], set()
    edges: dict[str, set[str]] = {here: set() for here in files}
    rooms: dict[str, set[str]] = {room(here): set() for here in files}
    for here, path in files.items():
        if room(here) not in LAYERS:
            found.append(f"{path.relative_to(root)} has no layer")
            continue
        for module, line, lazy in imports(path, root):
            where = f"{path.relative_to(root)}:{line}"
            for what, places in ONLY_IN.items():
                if inside(module, what) and not allowed(here, places):
                    found.append(f"{where} imports {what}")
            if inside(module, "triton") and not lazy:
                loads_triton.add(here)
            there = module.removeprefix(PACKAGE + ".")
            if there == module:  # not ours
                continue
            if LAYERS.get(room(there), 0) > LAYERS[room(here)]:
                found.append(f"{where} goes up to {room(there)}")
            if room(there) in LAYERS and room(there) != room(here):
                rooms[room(here)].add(room(there))
            target = there if there in files else there.rpartition(".")[0]
            if target in files and target != here:
                edges[here].add(target)
                if not lazy:
                    on_import.append((where, here, target))
        if LAYERS[room(here)] < 4:
            found += [f"{path.relative_to(root)}:{n} uses {what}" for what, n in outputs(path)]
    # A kernel's own file may need triton's decorators at its top, but then nobody loads it early.
    found += [
        f"{where} loads triton when it is imported"
        for where, here, target in on_import
        if target in loads_triton and here not in loads_triton
    ]
    found += [f"{sorted(names)} import each other" for names in cycles(edges)]
    return found + [f"{sorted(names)} import each other" for names in cycles(rooms)]


def cycles(edges: dict[str, set[str]]) -> set[frozenset[str]]:
    """The sets of nodes that reach each other."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(edges.get(start, ()))
        while todo:
            at = todo.pop()
            if at not in seen:
                seen.add(at)
                todo += edges.get(at, ())
        return seen

    reached = {node: reach(node) for node in edges}
    return {
        frozenset(other for other in reached[node] if node in reached.get(other, ()))
        for node in edges
        if node in reached[node]
    }


def test_imports_keep_to_the_layers():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("kernels/a.py", "def f():\n    from virft_fast.mia import x\n", "goes up to mia"),
        ("kernels/a.py", "def f():\n    from virft_fast import mia\n", "goes up to mia"),
        ("kernels/a.py", "from ..mia import x\n", "goes up to mia"),
        ("kernels/a.py", "from .. import mia\n", "goes up to mia"),
        ("kernels/__init__.py", "from ..mia import x\n", "goes up to mia"),
        ("kernels/a.py", "import virft_fast.mia as g\n", "goes up to mia"),
        ("kernels/a.py", "import importlib\nimportlib.import_module('virft_fast.mia')\n", "mia"),
        ("data/a.py", "import virft_fast.data.__main__\n", "goes up to data.__main__"),
        ("if.py", "", "has no layer"),
        (
            "kernels/a.py",
            "from typing import TYPE_CHECKING\nif not TYPE_CHECKING:\n    import virft_fast.mia\n",
            "goes up to mia",
        ),
        (
            "kernels/a.py",
            "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    pass\nelse:\n    import virft_fast.mia\n",
            "goes up to mia",
        ),
        ("mia.py", "import deepspeed.zero\n", "imports deepspeed"),
        ("mia.py", "def f():\n    from deepspeed import zero\n", "imports deepspeed"),
        ("tasks/a.py", "def f():\n    import triton\n", "imports triton"),
        ("kernels/__init__.py", "from virft_fast.kernels.k import f\n", "loads triton"),
        ("matching/boxes.py", "from virft_fast import _C\n", "imports virft_fast._C"),
        ("models/a.py", "import argparse\n", "imports argparse"),
        ("models/a.py", "from transformers import HfArgumentParser\n", "HfArgumentParser"),
        ("dist.py", "print(1)\n", "uses print"),
        ("dist.py", "say = print\n", "uses print"),
        ("dist.py", "import sys\nsys.exit(1)\n", "uses sys.exit"),
        ("dist.py", "from sys import exit as leave\n", "uses sys.exit"),
        ("dist.py", "raise SystemExit(1)\n", "uses SystemExit"),
        ("dist.py", "try:\n    pass\nexcept OSError:\n    exit()\n", "uses exit"),
        ("tasks/a.py", "from virft_fast import data\n", "import each other"),
        ("data/c.py", "def f():\n    from virft_fast.data.b import y\n", "import each other"),
    ],
)
def test_the_checker_sees_a_planted_violation(tmp_path, file, text, complaint):
    clean = {
        "__init__.py": "",
        "mia.py": "import virft_fast.data\nfrom virft_fast.kernels import f\n",
        "kernels/__init__.py": "def f():\n    from virft_fast.kernels import k\n",
        "kernels/k.py": "import triton\n",
        "native.py": "from virft_fast import _C\n",
        "engine.py": "def f():\n    import deepspeed\n",
        "data/__init__.py": "",
        "data/__main__.py": "import argparse\nprint(argparse)\n",
        "data/b.py": "from virft_fast.tasks import y\nfrom virft_fast.data.c import x\n",
        "data/c.py": "",
        "batch.py": "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from virft_fast.data import b\n",
    }

    def write(name: str, content: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)

    for name, content in clean.items():
        write(name, content)
    assert violations(tmp_path) == []
    write(file, text)
    assert any(complaint in line for line in violations(tmp_path)), violations(tmp_path)


HEAVY = ("transformers", "deepspeed", "triton", "datasets")


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("virft_fast", ("torch", *HEAVY)),
        ("virft_fast.kernels, virft_fast.matching, virft_fast.tasks", HEAVY),
    ],
)
def test_importing_loads_nothing_heavy(modules, heavy):
    code = (
        f"import sys, {modules}\n"
        f"loaded = set({heavy!r}) & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
