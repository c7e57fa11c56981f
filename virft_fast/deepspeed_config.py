"""DeepSpeed's JSON files: which settings are allowed, and what "auto" resolves to.

This module doesn't import deepspeed; `engine.py` does, and uses the resolved configuration.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import torch

from virft_fast.batch import Json, Row
from virft_fast.json_files import parse_json
from virft_fast.optimizer import OptimizerSettings

logger = logging.getLogger(__name__)

_BLOCKS = ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler")
_SCALING = "loss_scale initial_scale_power loss_scale_window hysteresis min_loss_scale".split()


def load_deepspeed_config(path: str) -> Row:
    """Read a DeepSpeed JSON.

    Raises:
        FileNotFoundError, ValueError: the file is missing or holds no JSON object.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--deepspeed: expected a JSON file, got {path!r}: no such file")
    config = parse_json(file.read_bytes(), f"--deepspeed {path}")
    if not isinstance(config, dict):
        raise ValueError(f"--deepspeed {path}: expected a JSON object, got {type(config).__name__}")
    blocks = {name: config.get(name, {}) for name in _BLOCKS}
    if isinstance(blocks["optimizer"], dict):
        blocks["optimizer.params"] = blocks["optimizer"].get("params", {})
    for name, block in blocks.items():
        if not isinstance(block, dict):
            raise ValueError(f"--deepspeed {path}: {name}: expected an object, got {block!r}")
    stage = blocks["zero_optimization"].get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(
            f"--deepspeed {path}: zero_optimization.stage: expected 0 to 3, got {stage!r}"
        )
    return config


def resolve_deepspeed_config(
    config: Row,
    *,
    settings: OptimizerSettings,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    bf16: bool,
    hidden_size: int,
    world_size: int,
) -> tuple[Row, OptimizerSettings]:
    """Replace HF's "auto" values.

    Args:
        config: the user's file as read; not modified.
    Returns:
        The configuration with every "auto" replaced and without its optimizer and scheduler
        blocks, and the optimizer's settings, updated from the optimizer block.
    Raises:
        ValueError: an "auto" with no value for it, a batch size that contradicts the flags, fp16,
            or an optimizer other than Adam(W).
    """
    config = json.loads(json.dumps(config))
    settings = _pop_optimizer(config, settings)
    if config.pop("scheduler", None) is not None:
        logger.warning("the scheduler block of the DeepSpeed file is ignored: the learning rate "
                       "follows --lr_scheduler_type")  # fmt: skip
    fixed = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "train_batch_size": micro_batch_size * gradient_accumulation_steps * world_size,
        "gradient_clipping": settings.max_grad_norm,
    }
    _replace_auto(config, fixed)
    _replace_auto(config.get("bf16", {}), {"enabled": bf16})
    _replace_auto(config.get("fp16", {}), {"enabled": False})
    zero = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    _replace_auto(config.get("zero_optimization", {}), zero)
    for key, value in fixed.items():
        if config.setdefault(key, value) != value:
            raise ValueError(
                f"--deepspeed: {key} is {config[key]} in the file, but the flags make it {value}; "
                'write "auto" there'
            )
    fp16 = config.get("fp16", {})
    if fp16.get("enabled") is True:
        raise ValueError("--deepspeed: fp16 is not supported; use bf16 (--bf16) or float32")
    for name in _SCALING:
        if fp16.get(name) == "auto":
            fp16.pop(name)
    if config.get("bf16", {}).get("enabled", bf16) != bf16:
        raise ValueError(
            f"--deepspeed: bf16 is {config['bf16']['enabled']} in the file, but the flags make it "
            f'{bf16}; write "auto" there, or pass --bf16 {not bf16}'
        )
    config["bf16"] = {**config.get("bf16", {}), "enabled": bf16}
    if bf16:
        config["bf16"].setdefault("check_grad_overflow", True)
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    if unresolved := _autos(config):
        raise ValueError(f'--deepspeed: "auto" has no value at {", ".join(unresolved)}; write one')
    return config, settings


def _pop_optimizer(config: Row, settings: OptimizerSettings) -> OptimizerSettings:
    """Remove the optimizer block; returns `settings` updated with its values."""
    block = config.pop("optimizer", None)
    if block is None:
        return settings
    if block.get("type") not in ("Adam", "AdamW"):
        raise ValueError(
            f"--deepspeed: expected optimizer AdamW or no optimizer block, got "
            f"{block.get('type')!r}"
        )
    given = {k: v for k, v in block.get("params", {}).items() if v != "auto"}
    try:
        first, second = map(float, given.get("betas", settings.betas))
        return replace(
            settings,
            learning_rate=float(given.get("lr", settings.learning_rate)),
            betas=(first, second),
            epsilon=float(given.get("eps", settings.epsilon)),
            weight_decay=float(given.get("weight_decay", settings.weight_decay)),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--deepspeed: optimizer.params: expected numbers, two of them for betas, got {given}: "
            f"{error}"
        ) from error


def _replace_auto(block: Row, values: Row) -> None:
    block |= {name: value for name, value in values.items() if block.get(name) == "auto"}


def _autos(config: Json, prefix: str = "") -> list[str]:
    """The dotted paths of every "auto"."""
    if isinstance(config, dict):
        paths = (_autos(v, f"{prefix}.{key}" if prefix else key) for key, v in config.items())
        return [path for nested in paths for path in nested]
    if isinstance(config, list):
        return [path for value in config for path in _autos(value, prefix)]
    return [prefix] if config == "auto" else []


def zero_stage(config: Row | None) -> int:
    return int((config or {}).get("zero_optimization", {}).get("stage", 0))


def offloads(config: Row | None, block: str) -> bool:
    """Whether `offload_optimizer` or `offload_param` moves something away from the GPU."""
    place = (config or {}).get("zero_optimization", {}).get(block)
    return isinstance(place, dict) and place.get("device", "none") != "none"


def engine_dtype(config: Row) -> torch.dtype:
    """The dtype in which DeepSpeed keeps the module."""
    return torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
