"""virft_fast: GRPO for vision-language models on rewards that can be verified.

Importing this package loads neither torch nor any other heavy library; take what you need from
`virft_fast.kernels`, `virft_fast.matching` and `virft_fast.tasks`, or run
`python -m virft_fast.train`.
"""

import os

__version__ = "0.1.0"
# Of a launcher, before it can be gone: what is imported after this takes seconds.
PARENT_PROCESS = os.getppid()
