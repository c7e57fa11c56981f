"""Imported first by whatever needs more than torch and numpy: if packages are missing, its
ImportError names all of them and the extra that installs them.

The kernels, the matcher and the rewards do without. An uncaught error is shown without a traceback.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import TracebackType

from virft_fast.arguments import TRAIN_REMEDY

# As one imports them. DeepSpeed, which the extra also installs, is needed by --deepspeed only.
PACKAGES = (
    "PIL", "accelerate", "charset_normalizer", "datasets", "matplotlib", "safetensors", "scipy",
    "sklearn", "tqdm", "transformers", "xxhash", "yaml",
)  # fmt: skip
_USUAL = sys.excepthook


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, ImportError) and error.name == __name__:
        sys.stderr.write(f"virft_fast: error: {error}\n")
    else:
        _USUAL(kind, error, trace)


# A folder of a package's name in the working directory is found, too, but has no origin.
if missing := [name for name in PACKAGES if getattr(find_spec(name), "origin", None) is None]:
    sys.excepthook = _show
    text = f"expected the packages of the extra train, but {', '.join(missing)} can't be found"
    raise ImportError(f"{text}; {TRAIN_REMEDY}", name=__name__)
