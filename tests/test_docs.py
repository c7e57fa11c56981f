"""What README, docs and configs say is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from virft_fast.config import TRAIN_GROUPS, EvalConfig, known_flags

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCS += sorted((ROOT / "docs").glob("*.md"))
KNOWN = {*known_flags(TRAIN_GROUPS), *known_flags((EvalConfig,)), "nproc_per_node", "nnodes",
         "node_rank", "master_addr", "master_port"}  # fmt: skip


@pytest.mark.parametrize("path", [*DOCS, *(ROOT / "configs").glob("*.sh")], ids=lambda p: p.name)
def test_flags_exist(path):
    named = set(re.findall(r"(?<![\w-])--([a-z]\w+)", path.read_text()))
    assert named <= KNOWN


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_config_keys_exist(path):
    assert set(yaml.safe_load(path.read_text())) <= set(known_flags(TRAIN_GROUPS))


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_relative_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_readme_begins_with_the_two_commands():
    block = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert [line.split("#")[0].strip() for line in block.strip().splitlines()] == [
        "make demo",
        "make test",
    ]


def test_architecture_names_every_file():
    text = (ROOT / "docs/ARCHITECTURE.md").read_text()
    names = {path.name for path in (ROOT / "virft_fast").rglob("*.py")}
    assert [name for name in sorted(names) if name not in text] == []
