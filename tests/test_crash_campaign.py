"""A piece of scripts/crash_campaign.py: killed runs lose nothing, and the campaign can continue."""

from __future__ import annotations

from pathlib import Path

from helpers import read_jsonl
from processes import run

SCRIPT = Path(__file__).parent.parent / "scripts/crash_campaign.py"
PROGRAM = f"import runpy\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')"


def test_killed_runs_lose_nothing_and_end_as_if_never_killed(tmp_path):
    journal = tmp_path / "journal.jsonl"
    flags = ["--settings", "sft-1", "dpo-2", "grpo-1", "--journal", journal, "--seed", 7]
    done = run(*flags, "--seconds", 30, module=PROGRAM)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    entries = read_jsonl(journal)
    assert entries and all(entry["kills"] for entry in entries)
    assert not any(entry[fault] for entry in entries for fault in ("lost", "half", "unequal"))
    again = run(*flags, "--kills", 1, module=PROGRAM)  # there are as many already
    assert again.returncode == 0 and again.stdout
    assert done.stdout.endswith(again.stdout) and len(read_jsonl(journal)) == len(entries)
