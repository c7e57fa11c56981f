"""Writes the tables of docs/models.md and README.md from what the code decides for each family.
Fused head, tower and ZeRO are the same for every model that can be trained.

python scripts/make_models_page.py

A family is built from transformers' default configuration with a few layers, without weights.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from virft_fast.models.families import CHECKED, FAMILIES
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
    "llava_onevision": "LLaVA-OneVision", "glm4v": "GLM-4V",
}  # fmt: skip


def page() -> str:
    """The text of docs/models.md with an updated table."""
    found = families()
    lines = _heads("`model_type`")
    for name, row in found.items():
        layers = f"`{'`, `'.join(row[-1].why.removeprefix('on ').split(', '))}`"
        cells = [_cell(entry) for entry in row[:-1]]
        lines.append(f"| {NAMES[name]}, `{name}` | {' | '.join(cells)} | {layers} |")
    return _updated(PAGE, lines)


def readme() -> str:
    """The text of README.md with an updated table: one row for families that get the same."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, row in families().items():
        alike.setdefault(tuple(map(_cell, row)), []).append(name)
    lines = _heads("")
    for cells, names in alike.items():
        others = [] if names[-1] in FAMILIES else ["others (untested)"]
        shown = ", ".join([*(NAMES[name] for name in names), *others])
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return _updated(README, lines)


@functools.cache
def families() -> dict[str, list[Support]]:
    return {name: support_of(name) for name in (*FAMILIES, *CHECKED)}


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


def _cell(entry: Support) -> str:
    return "yes" if entry.given else "no"


def _heads(first: str) -> list[str]:
    features = [entry.feature for entry in next(iter(families().values()))]
    return [f"| {first} | {' | '.join(features)} |", "|---" * (len(features) + 1) + "|"]


def _updated(path: Path, lines: list[str]) -> str:
    before, rest = path.read_text().split(BEGIN)
    return before + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    PAGE.write_text(page())
    README.write_text(readme())
