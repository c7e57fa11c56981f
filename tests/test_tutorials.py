"""Every tutorial runs as written, and shows what it says one sees.

The blocks of a page run in their order, in one folder that looks like a checkout's root. A block
with a title is the file of that name. A block after `<!-- full size -->` is parsed and not run. The
blocks before a `text` block must have printed its lines, except `...`; numbers with a decimal
point, times and speeds may differ.
"""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs/tutorials"
PAGES = sorted(path for path in FOLDER.glob("*.md") if path.stem != "index")
HEADINGS = ["Commands", "What you should see", "Customize", "Next"]
BLOCK = re.compile(
    r"^(?P<full><!-- full size -->\n)?```(?P<kind>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n"
    r"(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    kind: str
    title: str | None
    text: str
    full: bool


def blocks(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text())
    return [Block(m["kind"], m["title"], m["text"], bool(m["full"])) for m in found]


def commands_of(text: str) -> list[str]:
    """The lines of a shell block, with what the shell joins."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.strip().startswith("#")]


def run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of ours in this process, as importing the libraries takes seconds; others in bash."""
    from virft_fast import commands

    words = shlex.split(line, comments=True)
    if words[:2] == ["python", "-m"] and words[2].startswith("virft_fast."):
        assert commands.main([words[2].removeprefix("virft_fast."), *words[3:]]) == 0, line
    elif words[0] == "python":
        monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_path(words[1], run_name="__main__")
    else:
        print(subprocess.check_output(["bash", "-ec", line], text=True, stderr=subprocess.STDOUT))


def shape(line: str) -> str:
    """A line of output without what differs between machines."""
    line = re.sub(r"[+-]?\d+\.\d+|[\d,]+ (tok/s|MiB|s)\b|\d+:\d\d", "N", line)
    return " ".join(line.split())


def check_output(shown: str, printed: str) -> None:
    there = {shape(line) for line in printed.splitlines()}
    missing = [line for line in shown.splitlines() if shape(line) not in {"", "...", *there}]
    assert not missing, f"{missing} not in\n{printed}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tutorial_runs_as_written(page, tmp_path, monkeypatch, capsys, caplog):
    for name in ("configs", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names, printed = {"__name__": "tutorial"}, ""
    for block in blocks(page):
        caplog.clear()
        if block.kind == "python":
            code = compile(block.text, f"{page.name}: {block.title or 'a block'}", "exec")
        if block.full:
            continue
        if block.title:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.text)
        elif block.kind == "python":
            exec(code, names)
        elif block.kind == "bash":
            for line in commands_of(block.text):
                run_command(line, monkeypatch)
        elif block.kind == "text":
            check_output(block.text, printed)
        printed += "".join(capsys.readouterr()) + caplog.text
    seen = page.read_text().partition("\n## What you should see\n")[2].partition("\n## ")[0]
    for name in re.findall(r"`((?:runs|data)/[^`]+)`", seen):
        assert list(Path().glob(name)), f"{name} was not written"
    if page.stem in LEARNING:
        LEARNING[page.stem](printed)


def test_pages_can_be_run_one_after_the_other():
    """No page writes a file or folder of another, which would then be refused or mixed up."""
    owner: dict[str, str] = {}
    for page in PAGES:
        text = "".join(block.text for block in blocks(page) if not block.full)
        written = re.findall(r"--output(?:_dir)? (\S+)", text)
        written += re.findall(r"Path\(\"([\w.]+)\"", text) + re.findall(
            r"open\(f?\"(\w+.*?)\"", text
        )
        for name in written:
            assert owner.setdefault(name, page.stem) == page.stem, name


def numbers(pattern: str, printed: str) -> list[float]:
    return [float(value) for value in re.findall(pattern, printed)]


def reward_rises(printed: str) -> None:
    last_ten = numbers(r"last ten (\d\.\d+)", printed)
    assert len(last_ten) == 32 and last_ten[-1] > last_ten[9] + 0.05


def boxes_get_better(printed: str) -> None:
    ious = numbers(r"IoU of matched boxes (\d\.\d+)", printed)
    assert ious[0] < 0.4 and ious[-1] > 0.5


def sft_teaches_the_format(printed: str) -> None:
    before, after = re.search(r"no_label +(\d\.\d+) \(.*?\) +(\d\.\d+) ", printed).groups()
    assert float(before) == 1.0 and float(after) < 0.5


def loss_falls(printed: str) -> None:
    losses = numbers(r"step \d+/\d+ +loss (\d\.\d+)", printed)
    assert losses[0] == pytest.approx(0.693, abs=1e-3) and losses[-1] < 0.6


LEARNING = {
    "compose": reward_rises,
    "matcher_in_detr": boxes_get_better,
    "mia_dpo": loss_falls,
    "sft_then_grpo": sft_teaches_the_format,
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tutorials_have_one_shape(page):
    assert re.match(r"# .+\n\nYou ", page.read_text())
    assert re.findall(r"^## (.*)", page.read_text(), re.MULTILINE) == HEADINGS
    assert f"]({page.name})" in (FOLDER / "index.md").read_text()


def test_blocks_are_found_with_their_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text('<!-- full size -->\n```bash\na\n```\n\n```python title="b.py"\nc\n```\n')
    assert blocks(page) == [Block("bash", None, "a\n", True), Block("python", "b.py", "c\n", False)]


def test_output_that_is_not_printed_is_noticed():
    check_output("a 0.5  7 tok/s\n...\nb", "x\na  1.25  1,000 tok/s\ny\nb\n")
    for shown in ("c", "a 1"):
        with pytest.raises(AssertionError, match="not in"):
            check_output(shown, "x\na 1.25\nb\n")
