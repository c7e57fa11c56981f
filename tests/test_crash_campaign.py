"""A piece of scripts/crash_campaign.py: killed runs lose nothing, and the campaign can continue."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers import read_jsonl
from processes import environment

SCRIPT = Path(__file__).parent.parent / "scripts/crash_campaign.py"


def campaign(*arguments):
    words = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=500)


def test_killed_runs_lose_nothing_and_end_as_if_never_killed(tmp_path):
    journal = tmp_path / "journal.jsonl"
    flags = ["--settings", "sft-1", "grpo-1", "--journal", journal, "--seed", 7]
    done = campaign(*flags, "--seconds", 20)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    entries = read_jsonl(journal)
    assert entries and all(entry["kills"] for entry in entries)
    assert not any(entry[fault] for entry in entries for fault in ("lost", "half", "unequal"))
    again = campaign(*flags, "--kills", 1)  # there are as many already
    assert done.stdout.endswith(again.stdout) and len(read_jsonl(journal)) == len(entries)
