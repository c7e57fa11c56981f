"""virft_fast: GRPO for vision-language models with verifiable rewards.

Importing this package loads neither torch nor any other heavy library. Import what you need from
`virft_fast.kernels`, `virft_fast.matching` and `virft_fast.tasks`, or run
`python -m virft_fast.train`.
"""

import os

__version__ = "0.2.0"
# The launcher's process id, read before the slow imports, during which the launcher may exit.
PARENT_PROCESS = os.getppid()
