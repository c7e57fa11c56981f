"""`python -m virft_fast.train`: train a vision-language model, in one process or under torchrun.

Flags are flat and named as in TRL and Visual-RFT. `--config run.yaml` reads them from a file; flags
on the command line override it.
"""

from virft_fast import train_extra  # noqa: F401
from virft_fast.train.run import main, parse_args

__all__ = ["main", "parse_args"]
