"""Loads the compiled module, `virft_fast._C` (csrc/), if it was built for this version.

Attributes:
    module: `virft_fast._C`, or None.
    why_not: why it is None, else "".
    with_cuda: whether its matcher takes CUDA tensors.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from virft_fast import __version__

INTERFACE = 3  # of csrc/module.cpp

module: ModuleType | None
why_not, with_cuda = "", False
try:
    module = importlib.import_module("virft_fast._C")
except ImportError as error:
    module, why_not = None, str(error)
else:
    _built = module.build_info()
    with_cuda = _built["cuda_archs"] != "none"
    if (_built["version"], _built.get("interface")) != (__version__, INTERFACE):
        why_not = f"it was built for another virft_fast, {_built['version']}; this is {__version__}"
        module, with_cuda = None, False
