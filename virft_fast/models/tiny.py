"""The embedded model `tiny`, a real Qwen2-VL of 1.5 M parameters; `scripts/make_tiny_model.py`
makes it."""

from pathlib import Path

TINY_PATH = Path(__file__).parent / "tiny_qwen2_vl"


def resolve_model_path(name_or_path: str) -> str:
    """The embedded checkpoint's folder for `tiny`; any other name is returned unchanged."""
    return str(TINY_PATH) if name_or_path == "tiny" else name_or_path
