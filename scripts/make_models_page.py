"""Writes the tables of docs/models.md and README.md: what the code decides for each family. A "yes"
needs a test in tests/test_families.py that shows it with this family; without one, the table says
"untested".

python scripts/make_models_page.py

A family is built from transformers' default configuration with a few layers, without weights.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch

from virft_fast.models.families import FAMILIES
from virft_fast.models.policy import Policy
from virft_fast.models.support import Support, supports

ROOT = Path(__file__).parent.parent
PAGE, README = ROOT / "docs/models.md", ROOT / "README.md"
BEGIN, END = "<!-- begin: scripts/make_models_page.py -->\n", "<!-- end -->"
LAYERS = 4  # of each tower and language model; Qwen3.5's repeat after so many
NAMES = {
    "qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL MoE", "qwen3_5": "Qwen3.5", "qwen3_5_moe": "Qwen3.5 MoE",
    "gemma3": "Gemma 3", "internvl": "InternVL", "idefics3": "Idefics3", "smolvlm": "SmolVLM",
    "llava_onevision": "LLaVA-OneVision", "glm4v": "GLM-4V", "paligemma": "PaliGemma",
}  # fmt: skip


def page() -> str:
    """The text of docs/models.md with an updated table and the layers that LoRA adapts."""
    lines, adapted = _heads("`model_type`"), dict[str, list[str]]()
    for name, cells in families().items():
        lines.append(f"| {NAMES[name]}, `{name}` | {' | '.join(cells)} |")
        layers = support_of(name)[-1].why.removeprefix("on ").split(", ")
        adapted.setdefault(f"`{'`, `'.join(layers)}`", []).append(NAMES[name])
    usual, *others = adapted
    lines += ["", f"LoRA adapts {usual} by default, except in these:", ""]
    lines += [f"- {', '.join(adapted[layers])}: {layers}" for layers in others]
    return _updated(PAGE, [*lines, ""])


def readme() -> str:
    """The text of README.md with an updated table: one row for families that get the same."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, cells in families().items():
        alike.setdefault(cells, []).append(name)
    lines = _heads("")
    for cells, names in alike.items():
        shown = ", ".join(NAMES[name] for name in names)
        if names[-1] not in FAMILIES:
            shown += "; others, untested"
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return _updated(README, lines)


@functools.cache
def families() -> dict[str, tuple[str, ...]]:
    """The cells of each family's row."""
    sys.path.append(str(ROOT / "tests"))
    import test_families  # noqa: F401  # its decorators fill `SHOWN`
    from family_models import EVERY, SHOWN

    def cell(name: str, entry: Support) -> str:
        tested = name in SHOWN.get(entry.feature, ())
        return ("yes" if tested else "untested") if entry.given else "no"

    return {name: tuple(cell(name, entry) for entry in support_of(name)) for name in EVERY}


@functools.cache
def support_of(model_type: str) -> list[Support]:
    """What a family gets, on its default configuration."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(model_type)
    for part in (config.text_config, config.vision_config):
        _shorten(part)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    return supports(Policy(model, prefix_sharing="off"))


def _shorten(part: Any) -> None:
    for name in ("num_hidden_layers", "depth"):
        if hasattr(part, name):
            setattr(part, name, LAYERS)
    if getattr(part, "layer_types", None):
        part.layer_types = part.layer_types[:LAYERS]
    if hasattr(part, "deepstack_visual_indexes"):
        part.deepstack_visual_indexes = [0, 1, 2]


def _heads(first: str) -> list[str]:
    features = [entry.feature for entry in support_of(next(iter(families())))]
    return [f"| {first} | {' | '.join(features)} |", "|---" * (len(features) + 1) + "|"]


def _updated(path: Path, lines: list[str]) -> str:
    before, rest = path.read_text().split(BEGIN)
    return before + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    PAGE.write_text(page())
    README.write_text(readme())
