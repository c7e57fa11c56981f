"""Loads vision-language models and prepares them for training.

Some names from other modules (the imports with noqa) can also be imported from here.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from virft_fast.arguments import expecting, need_package
from virft_fast.batch import Row
from virft_fast.config import HUB_ATTENTIONS
from virft_fast.models import adapters as lora
from virft_fast.models.adapters import add_lora  # noqa: F401
from virft_fast.models.families import (  # noqa: F401
    FAMILIES,
    base,
    core,
    family_of,
    freeze_vision_tower,
    tower_names,
)
from virft_fast.models.inputs import banned_token_ids, control_tokens_in, encode_prompt  # noqa: F401
from virft_fast.models.policy import Policy  # noqa: F401
from virft_fast.models.saving import save_model  # noqa: F401
from virft_fast.models.source import ModelSource, find_model, read_config, weights_stamp  # noqa: F401


def load_model(
    name_or_path: str | ModelSource,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    empty: bool = False,
    load_in_4bit: bool = False,
) -> nn.Module:
    """A vision-language model from a folder, a hub id or `tiny`, in `dtype`, on the CPU. It is
    partitioned if a DeepSpeed ZeRO-3 configuration is active.

    Args:
        name_or_path: for an adapter's folder, the base model is loaded and the adapter merged into
            it in float32.
        empty: create the model without weights, on the meta device. Never quantized.
        load_in_4bit: quantize a whole model, see `_to_4bit`; on the GPU if there is one.
    Raises:
        FileNotFoundError: the folder or hub id doesn't exist.
        ValueError: it isn't a model of `AutoModelForImageTextToText`, or can't be read.
    """
    from transformers import AutoModelForImageTextToText as AutoModel
    from transformers import GenerationConfig

    source = find_model(name_or_path, revision)
    config = copy.deepcopy(source.config)  # because transformers changes it
    source.check_weights()
    if not empty:
        source.refuse_code()
    *adapters, (path, revision) = source.chain
    for folder, _ in adapters:
        lora.peft_config(folder)
    options: Row = {"attn_implementation": usable_attention(attn_implementation), "dtype": dtype}
    assert not (load_in_4bit and adapters), "an adapter can't be merged into 4 bits"
    file, hint = ("config.json", "") if empty else ("weights", "; is the folder complete?")
    expected = f"expected the {file} of a {config.model_type} model"
    with expecting(f"--model_name_or_path {source.name!r}: {expected}", hint=hint):
        if empty:
            with torch.device("meta"):
                return AutoModel.from_config(config, trust_remote_code=False, **options)
        # Other formats than safetensors are pickles.
        options |= {"revision": revision, "use_safetensors": True, "output_loading_info": True}
        options["dtype"] = torch.float32 if adapters else dtype
        if load_in_4bit:
            with torch.device("meta"):
                empty_model = AutoModel.from_config(copy.deepcopy(config), trust_remote_code=False)
            tower = tower_names(empty_model)
            options["quantization_config"] = _to_4bit(dtype, tower)
        with lora.undivided() if adapters else contextlib.nullcontext():
            loaded: Any = AutoModel.from_pretrained(path, trust_remote_code=False, **options)
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"--model_name_or_path {source.name!r}: expected all weights of the model, but "
            f"{len(missing)} are missing ({', '.join(missing[:3])}, ...); is the folder complete?"
        )
    for module in model.modules() if load_in_4bit else ():
        # bitsandbytes 0.50 packs weights anew when a CPU with AVX512-BF16 decodes; the packed ones
        # have no backward pass.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    for folder, _ in reversed(adapters):
        model = lora.merge_adapter(model, folder)
    if adapters:
        cast_parameters(model, dtype)
    # Weights are saved under Qwen's names, or else under those of the checkpoint. Under ZeRO-3,
    # transformers remembers all renamings that it could have needed, which would add prefixes.
    renamings = vars(model).pop("_weight_conversions", None) or ()
    if not family_of(config.model_type).is_qwen:
        vars(model)["_weight_conversions"] = [entry for entry in renamings if entry.was_used()]
    # A checkpoint's sampling defaults (Qwen ships a near-greedy temperature) must never affect a
    # rollout. Keep them separately, so that `save_model` can write them back.
    vars(model)["shipped_generation_config"] = base(model).generation_config
    base(model).generation_config = GenerationConfig()
    return model


def _to_4bit(dtype: torch.dtype, tower: list[str]) -> Any:
    """QLoRA's quantization (Dettmers et al. 2023, arXiv:2305.14314) with TRL's defaults: linear
    layers of the language model in NF4, one float32 scale for 64 weights; products in `dtype`.

    Embeddings, norms, the head and the vision tower keep `dtype`.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*(f"model.{name}" for name in tower), "lm_head"],
    )


def checkpoint_layers(model: Any, *, offload: bool) -> None:
    """Keep only each layer's input for the backward pass, which computes the rest again.

    Args:
        offload: keep the inputs in CPU memory.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules() if offload else ():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = _offloading_checkpoint


def _offloading_checkpoint(layer: Callable[..., Any], *inputs: Tensor) -> Any:
    # The layer's own tensors go through the checkpoint's hooks, so only the inputs reach this one.
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(layer, *inputs, use_reentrant=False)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights in place; buffers such as rotary frequencies keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    base(model).config.dtype = dtype


def usable_attention(name: str) -> str:
    """`name`, or sdpa, with a warning, if what `name` needs is missing: a package or a CUDA
    device."""
    from transformers.utils import is_flash_attn_2_available, is_kernels_available

    needed, usable = "", True
    if name == "flash_attention_2":
        needed, usable = "flash-attn", is_flash_attn_2_available()
    elif name in HUB_ATTENTIONS:
        needed, usable = "kernels", is_kernels_available() and torch.cuda.is_available()
    if usable:
        return name
    warnings.warn(
        f"{name} needs the package {needed} and a CUDA device; using sdpa instead", stacklevel=2
    )
    return "sdpa"


def apply_liger(model: nn.Module, device: torch.device) -> None:
    """Compute RMSNorm and SwiGLU with liger-kernel's functions, module by module. Without CUDA,
    only warn.

    liger-kernel's own patches import names that new releases of transformers don't have.
    """
    if device.type != "cuda":
        warnings.warn("--use_liger_kernel has no effect without CUDA", stacklevel=2)
        return
    flag, package = "--use_liger_kernel", "liger-kernel"
    norm = need_package(flag, "liger_kernel.transformers.rms_norm", package, "gpu").LigerRMSNorm
    mlp = need_package(flag, "liger_kernel.transformers.swiglu", package, "gpu").LigerSwiGLUMLP
    # What LigerRMSNorm's forward reads beside the weight and epsilon that transformers' has.
    settings = {"offset": 0.0, "casting_mode": "llama", "in_place": True, "row_mode": None}
    for module in model.modules():
        # Gemma's, and others with `eps`, multiply by 1 + weight.
        if type(module).__name__.endswith("RMSNorm") and "variance_epsilon" in vars(module):
            vars(module).update(settings, forward=MethodType(norm.forward, module))
        elif (
            hasattr(module, "gate_proj")
            and "SiLU" in type(getattr(module, "act_fn", None)).__name__
        ):
            vars(module)["forward"] = MethodType(mlp.forward, module)
