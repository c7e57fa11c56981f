"""What a model gets, and why not more; `virft-fast doctor --model` and docs/models.md show it."""

from __future__ import annotations

from typing import NamedTuple

from virft_fast.models.families import tower_names
from virft_fast.models.policy import Policy
from virft_fast.models.source import linear_layers


class Support(NamedTuple):
    """Whether a model has a feature, and the reason or the details."""

    feature: str
    given: bool
    why: str


def supports(policy: Policy) -> list[Support]:
    """What the policy's model gets, as the code decides it; it needs no weights."""
    reason, head, layers = policy.unreachable, policy.head, linear_layers(policy.model)
    scaled = f", scaled by {head.scale:g}" if head.scale != 1 else ""
    capped = f", soft-capped at {head.softcap:g}" if head.softcap else ""
    hf = "; --rollout_backend hf is used"
    return [
        Support("shared training", reason is None, reason or "a prompt is read once per group"),
        Support("native rollout", reason is None, (reason or "") + hf if reason else "as training"),
        Support("fused head", True, f"logits tile by tile{scaled}{capped}"),
        Support("tower once per image", True, ", ".join(tower_names(policy.model))),
        Support("ZeRO 0-3", True, "--deepspeed"),
        Support("LoRA", bool(layers), f"on {', '.join(layers)}"),
    ]
