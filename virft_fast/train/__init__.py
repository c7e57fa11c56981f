"""`python -m virft_fast.train`: GRPO on a vision-language model, from one process or torchrun.

Flags are flat and named as in TRL and Visual-RFT; `--config run.yaml` gives them from a file, flags
on the command line win.
"""

from virft_fast.train.flags import parse_args
from virft_fast.train.run import main

__all__ = ["main", "parse_args"]
