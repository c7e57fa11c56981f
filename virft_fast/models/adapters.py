"""LoRA adapters: starting a training stage with one, and merging.

A run with `--use_peft` starts in one of three ways (`LoraPlan.kind`):
    new        the model has no adapter: a new one is trained on it;
    continued  the model is an adapter's folder: its training continues on the same base;
    stacked    the flags change rank, alpha or layers, or the adapter can't be trained here: it is
               merged, the merged model is saved, and a new adapter is trained on it.
Plain peft loads each result: its adapter_config.json names the base it was trained on.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from torch import nn

from virft_fast.arguments import expecting, need_package
from virft_fast.batch import Json, Row
from virft_fast.config import ModelConfig
from virft_fast.models.families import base, core, in_tower, tower_names
from virft_fast.models.source import BASE_FOLDER, CONFIG_FILE, ModelSource
from virft_fast.models.tiny import resolve_model_path

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel

logger = logging.getLogger(__name__)

TRAINED, REFERENCE = "default", "reference"  # names of the adapters in a model

_LAYERS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
LORA_DEFAULTS: Row = {"r": 16, "alpha": 32, "target_modules": _LAYERS}  # of Qwen2 to 3-VL

# Settings that a continued adapter may have: peft applies them in the layers and saves them again.
_KEPT = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
# With any other initialization, peft changes the base model's weights.
_BASE_KEEPING_STARTS = (None, True, False, "gaussian", "orthogonal")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide peft's warnings that ask the user for nothing."""
    with warnings.catch_warnings():
        # An attribute that transformers 5 has renamed; peft 0.21 reads the old name.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.* is deprecated")
        # `merge_adapter` ties the weights again if they are equal.
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
        yield


@dataclass(frozen=True)
class LoraPlan:
    """How a run with an adapter starts.

    Attributes:
        kind: "new", "continued" or "stacked", as above.
        name: the folder or hub id that the user named.
        base: the base model; for "stacked", the adapter to merge.
        r, alpha, target_modules: settings of the adapter to train.
    """

    kind: str
    name: str
    base: ModelSource
    r: int
    alpha: float
    target_modules: tuple[str, ...]

    def __str__(self) -> str:
        shape = f"r {self.r}, alpha {self.alpha:g}, layers {', '.join(self.target_modules)}"
        name, base = self.name, self.base.name
        if self.kind == "continued":
            return f"training continues the LoRA adapter in {name} ({shape}) on {base}"
        if self.kind == "new":
            return f"a new LoRA adapter ({shape}) is trained on {base}"
        return (
            f"a new LoRA adapter ({shape}) is trained on the model in {name}, whose own adapter is "
            f"merged into {BASE_FOLDER}/ of --output_dir"
        )


def plan_lora(model: ModelConfig, source: ModelSource) -> tuple[ModelConfig, LoraPlan | None]:
    """The flags, and how the run's adapter starts (None without --use_peft). In the returned flags,
    unset values come from the named adapter or the defaults. Reads no weights.

    Raises:
        ValueError: the flags match the adapter, but it can't be trained further.
    """
    r, alpha, targets = model.lora_r, model.lora_alpha, model.lora_target_modules
    plan = LoraPlan("new", source.name, source, **LORA_DEFAULTS)
    if model.use_peft:
        plan = _plan(source, {"r": r, "alpha": alpha, "target_modules": tuple(sorted(targets))})
    filled: Row = {"lora_r": r or plan.r, "lora_alpha": alpha or plan.alpha,
              "lora_target_modules": targets or list(plan.target_modules)}  # fmt: skip
    return replace(model, **filled), plan if model.use_peft else None


def _plan(source: ModelSource, given: Row) -> LoraPlan:
    name, own = source.name, source.adapter
    requested: Row = {key: value for key, value in given.items() if value}
    default = LORA_DEFAULTS
    if not given["target_modules"] and (own is None or isinstance(own.get("target_modules"), str)):
        default = LORA_DEFAULTS | {"target_modules": source.linear_layers}
    if own is None:
        return LoraPlan("new", name, source, **{**default, **requested})
    settings = _settings(own)
    agree = all(settings.get(key) == value for key, value in requested.items())
    if agree and len(source.chain) == 2:
        _check_continues(name, own)
        base = ModelSource(source.chain[1][0], source.chain[1:])
        return LoraPlan("continued", name, base, **settings)
    if isinstance(own.get("target_modules"), str):  # a pattern, which may not match this model
        settings.pop("target_modules")
    return LoraPlan("stacked", name, source, **{**default, **settings, **requested})


def _settings(config: Row) -> Row:
    """The values of our flags in an adapter_config.json."""
    targets = config.get("target_modules") or ()
    targets = (targets,) if isinstance(targets, str) else tuple(sorted(targets))
    flags = {"r": config.get("r"), "alpha": config.get("lora_alpha"), "target_modules": targets}
    return {key: value for key, value in flags.items() if value}


def _check_continues(name: str, config: Row) -> None:
    """Raise ValueError unless it is a plain LoRA adapter of an unchanged base's linear layers."""
    odd = {k: v for k, v in config.items() if k not in _KEPT and v and v != "none"}
    if config.get("peft_type") != "LORA":
        odd["peft_type"] = config.get("peft_type")
    if config.get("init_lora_weights") not in _BASE_KEEPING_STARTS:
        odd["init_lora_weights"] = config["init_lora_weights"]
    settings = _settings(config)
    odd |= {key: None for key in ("r", "alpha", "target_modules") if key not in settings}
    targets = settings.get("target_modules", ())
    if {"lm_head", "embed_tokens"} & {target.split(".")[-1] for target in targets}:
        odd["target_modules"] = list(targets)
    if odd:
        raise ValueError(
            f"--use_peft --model_name_or_path {name}: expected an adapter that can be trained "
            f"further (LoRA on linear layers, without biases or other weights), got {odd}; merge "
            f"it with `python -m virft_fast.merge {name} OUT` and train from OUT"
        )


@_quiet()
def add_lora(
    model: nn.Module,
    *,
    r: int,
    alpha: float,
    target_modules: Sequence[str],
    revision: str | None = None,
) -> PeftModel:
    """The model with a new LoRA adapter on its language model; everything else is frozen."""
    peft = need_package("--use_peft", "peft", "peft", "peft")
    tower = tower_names(model)
    _check_targets(model, target_modules, tower)
    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=list(target_modules),
        # The vision tower of Qwen2.5-VL has layers with the same names.
        exclude_modules=rf".*\b({'|'.join(tower)})\b.*",
        revision=revision,
    )
    adapted = peft.get_peft_model(model, config)
    # peft has set it to the name used for loading, which may be a relative path.
    config.base_model_name_or_path = _absolute(base(model).name_or_path)
    return adapted


def _check_targets(model: nn.Module, target_modules: Sequence[str], tower: Sequence[str]) -> None:
    """Raise ValueError if any name matches no layer; peft raises only if no name matches."""
    linear = [f".{name}" for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    layers = [name for name in linear if not in_tower(tower, name)]
    for target in target_modules:
        if not any(name.endswith(f".{target}") for name in layers):
            names = sorted({name.rsplit(".", 1)[1] for name in layers} - {"lm_head"})
            raise ValueError(
                f"--lora_target_modules {target}: expected names of the language model's linear "
                f"layers ({', '.join(names)}); leave it out for all of them"
            )


@_quiet()
def attach(model: nn.Module, plan: LoraPlan, *, reference: bool = False) -> PeftModel:
    """The base model with the adapter to train; the adapter's weights are float32.

    Args:
        model: `plan.base`, loaded; if it is on the meta device, so is the adapter.
        reference: also add a frozen copy of a continued adapter, for `as_reference`.
    Raises:
        ValueError: the adapter's weights can't be read or don't fit the base model.
    """
    if plan.kind != "continued":
        targets, (_, revision) = plan.target_modules, plan.base.chain[0]
        return add_lora(
            model, r=plan.r, alpha=plan.alpha, target_modules=targets, revision=revision
        )
    peft = need_package("--use_peft", "peft", "peft", "peft")
    config = cast("LoraConfig", peft_config(plan.name))  # checked by `plan_lora`
    config.inference_mode = False
    if config.lora_dropout:
        logger.warning("%s: its dropout %s is set to 0", plan.name, config.lora_dropout)
        config.lora_dropout = 0.0
    path, config.revision = plan.base.chain[0]
    config.base_model_name_or_path = _absolute(path)
    adapted = peft.PeftModel(model, config)
    weights = dict(adapted.named_parameters())
    on_meta = any(weight.is_meta for weight in weights.values())
    if not on_meta:
        _load_weights(adapted, plan.name)
    if reference:
        adapted.add_adapter(REFERENCE, deepcopy(config))
        for name, copy in adapted.named_parameters():
            if is_reference(name):
                copy.requires_grad_(False)
                if not on_meta:
                    copy.data.copy_(weights[name.replace(f".{REFERENCE}", f".{TRAINED}")])
    return adapted


@_quiet()
def peft_config(folder: str) -> PeftConfig:
    """The peft configuration of the adapter in a folder.

    Raises:
        ValueError: peft is not installed, or can't read it.
    """
    peft = need_package(f"--model_name_or_path {folder!r} is an adapter", "peft", "peft", "peft")
    with expecting(f"--model_name_or_path {folder!r}: expected {CONFIG_FILE} as peft writes it"):
        return peft.PeftConfig.from_pretrained(folder, trust_remote_code=False)


@_quiet()
def merge_adapter(model: nn.Module, folder: str) -> nn.Module:
    """The base model with an adapter merged into its weights, all of which are trainable.

    Args:
        model: float32, on the CPU, not partitioned. Changed in place.
    Raises:
        ValueError: the adapter can't be merged, or its weights don't fit.
    """
    peft = need_package(f"--model_name_or_path {folder!r} is an adapter", "peft", "peft", "peft")
    config = peft_config(folder)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(
            f"--model_name_or_path {folder!r}: expected an adapter that can be merged, such as "
            f"LoRA, got {config.peft_type}"
        )
    # Untie the weights: an adapter on one of them must not change the other.
    head, embedding = base(model).lm_head, core(model).get_input_embeddings().weight
    tied = head.weight is embedding
    if tied:
        head.weight = nn.Parameter(embedding.detach().clone())
    adapted = peft.PeftModel(model, config)
    _load_weights(adapted, folder)
    expected = "expected an adapter that can be merged into its base model"
    errors = (RuntimeError, ValueError, AttributeError, NotImplementedError)
    with expecting(f"--model_name_or_path {folder!r}: {expected}", errors):
        merged = adapted.merge_and_unload(safe_merge=True).requires_grad_(True)
    if tied:
        head, embedding = base(merged).lm_head, core(merged).get_input_embeddings().weight
        same = torch.equal(head.weight, embedding)
        if same:
            head.weight = embedding
        # peft marks the weights as untied whenever it merges.
        for model_config in (merged.config, merged.config.get_text_config()):
            model_config.tie_word_embeddings = same
    return merged


def _load_weights(model: PeftModel, folder: str) -> None:
    """Load the adapter's weights from its folder; raise ValueError unless they fit one to one."""
    from peft import load_peft_weights, set_peft_model_state_dict

    expected = f"--model_name_or_path {folder!r}: expected the adapter's weights"
    with expecting(expected, hint="; is the folder complete?"):
        if not (Path(folder) / "adapter_model.safetensors").is_file():  # peft would unpickle a .bin
            raise FileNotFoundError("no adapter_model.safetensors")
        loaded = load_peft_weights(folder, device="cpu")
        result: Json = set_peft_model_state_dict(model, loaded, TRAINED)
    missing = [key for key in result.missing_keys if TRAINED in key.split(".")]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"--model_name_or_path {folder!r}: expected an adapter of this base model, but "
            f"{len(missing)} of its weights are missing {missing[:2]} and "
            f"{len(result.unexpected_keys)} fit nowhere {result.unexpected_keys[:2]}"
        )


def has_adapter(model: nn.Module) -> TypeGuard[PeftModel]:
    return hasattr(model, "peft_config")


def in_4bit(model: nn.Module) -> bool:
    """Whether linear layers of the model are stored in 4 bits."""
    return getattr(base(model), "is_loaded_in_4bit", False)


def is_trained_adapter(name: str) -> bool:
    """Whether a parameter with this name belongs to the adapter that is trained and saved."""
    return TRAINED in name.split(".")


def is_reference(name: str) -> bool:
    """Whether a parameter with this name belongs to the frozen copy that `attach` made."""
    return REFERENCE in name.split(".")


@contextlib.contextmanager
def as_reference(model: nn.Module) -> Iterator[None]:
    """Context in which a model with an adapter computes as it did when training started."""
    if not has_adapter(model):
        yield
    elif REFERENCE not in model.peft_config:
        with model.disable_adapter():
            yield
    else:
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        # Don't use peft's `set_adapter`: it changes which parameters are trained.
        try:
            for layer in layers:
                layer._active_adapter = REFERENCE
            yield
        finally:
            for layer in layers:
                layer._active_adapter = TRAINED


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Context in which weights are loaded whole, so that they can be merged. ZeRO-3 partitions them
    when the engine is created, instead of while they are read."""
    from transformers.integrations import deepspeed

    weak_ref = deepspeed._hf_deepspeed_config_weak_ref
    alive = weak_ref and weak_ref()
    if not alive:
        yield
        return
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(alive)


def _absolute(name: str) -> str:
    """A folder's absolute path, so that an adapter can name it; a hub id is returned unchanged."""
    path = Path(resolve_model_path(name))
    return str(path.resolve()) if name and path.is_dir() else name
