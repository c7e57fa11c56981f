"""The model of a run, its adapter, its reference and its engine."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from virft_fast import checkpoint as checkpoints
from virft_fast import dist
from virft_fast.algorithms import algorithm_of
from virft_fast.algorithms.base import Data
from virft_fast.algorithms.step import TrainState
from virft_fast.config import GRPOConfig, ModelConfig, RunConfig, UsageError
from virft_fast.engine import (
    DeepSpeedEngine,
    OptimizerSettings,
    PlainEngine,
    load_deepspeed_config,
    make_reference,
    prepare_deepspeed,
    resolve_deepspeed_config,
)
from virft_fast.models.adapters import BASE_FOLDER, LORA_DEFAULTS, LoraPlan, attach, plan_lora
from virft_fast.models.qwen_vl import (
    Policy,
    apply_liger,
    freeze_vision_tower,
    load_model,
    read_config,
    weights_stamp,
)
from virft_fast.models.tiny import resolve_model_path
from virft_fast.rollout.backends import check_model, make_rollout
from virft_fast.train.flags import learning_rates, num_steps


def begin_adapter(model: ModelConfig) -> tuple[ModelConfig, LoraPlan | None]:
    """How the adapter begins, None without one, and the flags with their values filled in."""
    flags = {"r": model.lora_r, "alpha": model.lora_alpha}
    targets, plan, values = model.lora_target_modules, None, {**LORA_DEFAULTS}
    if model.use_peft:
        plan = plan_lora(
            model.model_name_or_path, revision=model.model_revision, target_modules=targets, **flags
        )
        values = {name: getattr(plan, name) for name in values}
    return replace(
        model,
        lora_r=model.lora_r or values["r"],
        lora_alpha=model.lora_alpha or values["alpha"],
        lora_target_modules=targets or list(values["target_modules"]),
    ), plan


def describe_adapter(plan: LoraPlan) -> str:
    """What a run tells of its adapter."""
    shape = f"r {plan.r}, alpha {plan.alpha:g}, layers {', '.join(plan.target_modules)}"
    if plan.kind == "continued":
        return f"training continues the LoRA adapter in {plan.name} ({shape}) on {plan.base}"
    if plan.kind == "stacked":
        return (
            f"a new LoRA adapter ({shape}) is trained on the model in {plan.name}, whose own "
            f"adapter is merged into {BASE_FOLDER}/ of --output_dir"
        )
    return f"a new LoRA adapter ({shape}) is trained on {plan.base}"


def base_model(
    config: RunConfig, plan: LoraPlan | None, processor: Any, resume: Path | None
) -> ModelConfig:
    """The model that is loaded, with its flags: of a stacked adapter the merged base, written
    before training so that what is trained is what is saved."""
    if plan is None or plan.kind != "stacked":
        return config.model
    folder = (Path(config.train.output_dir) / BASE_FOLDER).resolve()
    if dist.is_main() and not (resume and folder.is_dir()):
        dtype = training_dtype(
            config.model, bf16=config.train.bf16, deepspeed=config.train.deepspeed is not None
        )
        merged = load_model(plan.name, revision=plan.revision, dtype=dtype)
        checkpoints.write_whole_model(folder, merged, processor)
    dist.barrier()
    return replace(config.model, model_name_or_path=str(folder), model_revision=None)


def prepare_training(
    config: RunConfig,
    processor: Any,
    data: Data,
    device: torch.device,
    model: ModelConfig | None = None,
) -> TrainState:
    """Load the model, wrap it in its engine and put the parts of a step together.

    Args:
        model: which model is loaded, and how; default: as `config` says.
    """
    model = model or config.model
    train, grpo = config.train, config.grpo
    torch.manual_seed(train.seed)  # an adapter begins the same on all ranks, and in every run
    settings = OptimizerSettings(
        learning_rate=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        epsilon=train.adam_epsilon,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
    )
    base_weights = weights_stamp(resolve_model_path(model.model_name_or_path))
    ds_config, settings = deepspeed_config(config, settings)
    partitioning = prepare_deepspeed(ds_config, device) if ds_config else None
    dtype = training_dtype(model, bf16=train.bf16, deepspeed=ds_config is not None)
    algorithm = algorithm_of(config)
    frozen_copy = algorithm.may_use_reference(config)
    policy = build_policy(model, grpo, dtype, device, frozen_copy=frozen_copy)
    if algorithm.rolls_out(config):
        check_model(grpo.rollout_backend, policy)
    reference = None
    if keeps_reference(config):
        frozen = replace(model, gradient_checkpointing=False)
        reference = build_policy(frozen, grpo, dtype, device)
    del partitioning
    empty = partial(build_policy, model, grpo, dtype, device, empty=True, frozen_copy=frozen_copy)
    engine = (
        DeepSpeedEngine(policy, settings, config=ds_config, device=device, make_empty=empty)
        if ds_config is not None
        else PlainEngine(policy, settings, device=device, bf16=train.bf16)
    )
    call_reference = engine.forward if algorithm.uses_reference(config) else None
    if reference is not None:
        call_reference = make_reference(reference, engine, ds_config)
    total_steps = num_steps(config, len(data.train))
    return algorithm.make_state(
        config,
        policy=policy,
        engine=engine,
        reference=call_reference,
        rollout=make_rollout(
            grpo.rollout_backend,
            engine.whole_weights,
            processor.tokenizer,
            device=device,
            max_cache_tokens=grpo.rollout_cache_tokens,
        ),
        tokenizer=processor.tokenizer,
        reward_funcs=data.reward_funcs,
        reward_weights=data.reward_weights,
        learning_rate=learning_rates(config, total_steps),
        prompts_per_microbatch=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        max_tokens_per_microbatch=train.max_tokens_per_microbatch,
        seed=train.seed,
        max_bad_steps=train.max_bad_steps,
        base_weights=base_weights,
        save_dtype=stored_dtype(config),
        max_steps=total_steps,
        num_rows=len(data.train),
    )


def keeps_reference(config: RunConfig) -> bool:
    """Whether there is a second, frozen model."""
    return algorithm_of(config).uses_reference(config) and not config.model.use_peft


def deepspeed_config(
    config: RunConfig, settings: OptimizerSettings
) -> tuple[dict[str, Any] | None, OptimizerSettings]:
    if config.train.deepspeed is None:
        return None, settings
    model_config = read_config(config.model.model_name_or_path, config.model.model_revision)
    return resolve_deepspeed_config(
        load_deepspeed_config(config.train.deepspeed),
        settings=settings,
        micro_batch_size=config.train.per_device_train_batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        bf16=config.train.bf16,
        hidden_size=model_config.get_text_config().hidden_size,
        world_size=dist.world_size(),
    )


def training_dtype(model: ModelConfig, *, bf16: bool, deepspeed: bool) -> torch.dtype:
    """The dtype weights are loaded in. With bf16 DeepSpeed keeps float32 masters of bf16 weights;
    without DeepSpeed the weights themselves are the masters and only the passes are in bf16."""
    if model.dtype != "auto":
        return getattr(torch, model.dtype)
    return torch.bfloat16 if bf16 and deepspeed else torch.float32


def stored_dtype(config: RunConfig) -> torch.dtype | None:
    """The dtype of saved weights; None: as they are trained."""
    if config.train.save_dtype != "auto":
        return getattr(torch, config.train.save_dtype)
    if config.model.use_peft or not config.train.bf16:
        return None
    return read_config(config.model.model_name_or_path, config.model.model_revision).dtype


def build_policy(
    model: ModelConfig,
    grpo: GRPOConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    empty: bool = False,
    frozen_copy: bool = False,
) -> Policy:
    """The model as the flags want it trained.

    Args:
        empty: its shape alone, on the meta device.
        frozen_copy: of an adapter that is continued, as the reference.
    """
    if grpo.prefix_attention == "flex" and device.type != "cuda":
        raise UsageError(
            "--prefix_attention flex: expected a CUDA device, because FlexAttention has no "
            "backward pass on the CPU; use two_part"
        )
    _, plan = begin_adapter(model)
    loaded = load_model(
        plan.base if plan else model.model_name_or_path,
        revision=plan.revision if plan else model.model_revision,
        dtype=dtype,
        attn_implementation=model.attn_implementation,
        empty=empty,
    )
    if model.use_liger_kernel:
        apply_liger(loaded, device)
    if plan is not None:
        loaded = attach(loaded, plan, reference=frozen_copy)
    if model.freeze_vision_tower:
        freeze_vision_tower(loaded)
    if model.gradient_checkpointing:
        loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(
        loaded.train(),
        loss_impl=grpo.loss_impl,
        prefix_sharing=grpo.prefix_sharing,
        prefix_attention=grpo.prefix_attention,
    )
