"""What a run last did, for its watcher and for a person."""

from __future__ import annotations

import sys
import time

from virft_fast import progress


def test_a_bar_appears_only_where_work_takes_long(monkeypatch, capsys):
    assert list(progress.bar(range(3), "saving", "weight")) == [0, 1, 2]
    monkeypatch.setattr(progress, "BAR_SECONDS", 0.01)
    for _ in progress.bar(range(3), "saving", "weight"):
        time.sleep(0.15)
    assert "saving" not in capsys.readouterr().err  # no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for _ in progress.bar(range(3), "saving", "weight"):
        time.sleep(0.15)
    assert "saving" in capsys.readouterr().err
    for _ in progress.bar(range(3), "saving", "weight", shown=False):
        time.sleep(0.15)
    assert "saving" not in capsys.readouterr().err
