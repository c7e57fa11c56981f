"""Child of test_stages.py and test_dpo.py: runs of virft_fast.train, one after another, here.

    torchrun --nproc_per_node W -m two_stages RUNS

RUNS is a JSON list of argument lists.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from virft_fast import dist
from virft_fast.commands import end_process
from virft_fast.train import main

shutdown, dist.shutdown = dist.shutdown, lambda: None  # one process group serves them all
for argv in json.loads(Path(sys.argv[1]).read_text()):
    assert main(argv) == 0, argv
shutdown()
end_process(0)
