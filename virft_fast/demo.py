"""`virft-fast demo [flags]`: train the embedded model on generated shapes, as `make demo` does."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from virft_fast.commands import end_process


def main(argv: list[str] | None = None) -> int:
    """Train with demo.yaml; flags in `argv` override it. Returns the exit status."""
    # The model is so small that more threads cost time; torch reads this when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from virft_fast import train

    config = Path(__file__).with_name("demo.yaml")
    return train.main(["--config", str(config), *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    end_process(main())
