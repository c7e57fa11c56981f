"""A run's model, its adapter, its reference and its engine."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from virft_fast import checkpoint as checkpoints
from virft_fast import dist
from virft_fast.algorithms import algorithm_of
from virft_fast.algorithms.base import Data
from virft_fast.algorithms.step import TrainState
from virft_fast.batch import Row
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
from virft_fast.models.processing import ImageOnlyQwen2VLProcessor
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
    """The flags with LoRA defaults filled in, and the adapter's plan (None without an adapter)."""
    r, alpha, targets = model.lora_r, model.lora_alpha, model.lora_target_modules
    plan, values = None, {**LORA_DEFAULTS}
    if model.use_peft:
        name, revision = model.model_name_or_path, model.model_revision
        plan = plan_lora(name, revision=revision, r=r, alpha=alpha, target_modules=targets)
        values = {key: getattr(plan, key) for key in values}
    return replace(
        model,
        lora_r=r or values["r"],
        lora_alpha=alpha or values["alpha"],
        lora_target_modules=targets or list(values["target_modules"]),
    ), plan


def describe_adapter(plan: LoraPlan) -> str:
    """A line about the adapter, for the user."""
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
    config: RunConfig, plan: LoraPlan | None, processor: ImageOnlyQwen2VLProcessor, resumed: bool
) -> ModelConfig:
    """The flags of the model to load. For a stacked adapter this is the merged base, which is
    written before training, so that the model that is trained is the one that is saved."""
    if plan is None or plan.kind != "stacked":
        return config.model
    folder = (Path(config.train.output_dir) / BASE_FOLDER).resolve()

    def write() -> None:
        if not (resumed and folder.is_dir()):
            merged = load_model(plan.name, revision=plan.revision, dtype=training_dtype(config))
            checkpoints.write_whole_model(folder, merged, processor)

    dist.on_main(write)
    return replace(config.model, model_name_or_path=str(folder), model_revision=None)


def prepare_training(
    config: RunConfig,
    processor: ImageOnlyQwen2VLProcessor,
    data: Data,
    device: torch.device,
    model: ModelConfig | None = None,
) -> TrainState:
    """Load the model, wrap it in its engine and put the parts of a step together.

    Args:
        model: which model to load, and how; default: as in `config`.
    """
    model = model or config.model
    train, grpo, algorithm = config.train, config.grpo, algorithm_of(config)
    torch.manual_seed(train.seed)  # a new adapter is the same on all ranks, and in every run
    base_weights = weights_stamp(resolve_model_path(model.model_name_or_path))
    ds_config, settings = deepspeed_config(config)
    partitioning = prepare_deepspeed(ds_config, device) if ds_config else None
    dtype, frozen_copy = training_dtype(config), algorithm.may_use_reference(config)
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
    """Whether the run holds a second, frozen model."""
    return algorithm_of(config).uses_reference(config) and not config.model.use_peft


def deepspeed_config(config: RunConfig) -> tuple[Row | None, OptimizerSettings]:
    """The resolved configuration of DeepSpeed, None without --deepspeed, and the optimizer's
    settings, which it may override."""
    train = config.train
    settings = OptimizerSettings(
        learning_rate=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        epsilon=train.adam_epsilon,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
    )
    if train.deepspeed is None:
        return None, settings
    model_config = read_config(config.model.model_name_or_path, config.model.model_revision)
    return resolve_deepspeed_config(
        load_deepspeed_config(train.deepspeed),
        settings=settings,
        micro_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        bf16=train.bf16,
        hidden_size=model_config.get_text_config().hidden_size,
        world_size=dist.world_size(),
    )


def training_dtype(config: RunConfig) -> torch.dtype:
    """The dtype to load the weights in. With --bf16, DeepSpeed keeps float32 masters of bf16
    weights; without DeepSpeed the weights are the masters, and only the passes are in bf16."""
    if config.model.dtype != "auto":
        return getattr(torch, config.model.dtype)
    return torch.bfloat16 if config.train.bf16 and config.train.deepspeed else torch.float32


def stored_dtype(config: RunConfig) -> torch.dtype | None:
    """The dtype of saved weights; None: the one they are trained in."""
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
    """The model as the flags describe it, in training mode.

    Args:
        empty: on the meta device, without weights.
        frozen_copy: hold a frozen copy of a continued adapter, as the reference.
    """
    if grpo.prefix_attention == "flex" and device.type != "cuda":
        raise UsageError(
            "--prefix_attention flex: expected a CUDA device, because FlexAttention has no "
            "backward pass on the CPU; use two_part"
        )
    _, plan = begin_adapter(model)
    base = load_model(
        plan.base if plan else model.model_name_or_path,
        revision=plan.revision if plan else model.model_revision,
        dtype=dtype,
        attn_implementation=model.attn_implementation,
        empty=empty,
    )
    if model.use_liger_kernel:
        apply_liger(base, device)
    trained = attach(base, plan, reference=frozen_copy) if plan else base
    if model.freeze_vision_tower:
        freeze_vision_tower(trained)
    if model.gradient_checkpointing:
        kwargs = {"use_reentrant": False}
        base.gradient_checkpointing_enable(kwargs)  # type: ignore[operator]  # typed as a Tensor
    return Policy(
        trained.train(),
        loss_impl=grpo.loss_impl,
        prefix_sharing=grpo.prefix_sharing,
        prefix_attention=grpo.prefix_attention,
    )
