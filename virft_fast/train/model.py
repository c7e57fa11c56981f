"""A run's model, its adapter, its reference and its engine."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from virft_fast import checkpoint as checkpoints
from virft_fast import dist
from virft_fast.algorithms import algorithm_of
from virft_fast.algorithms.base import Data
from virft_fast.algorithms.step import TrainState
from virft_fast.arguments import expecting
from virft_fast.batch import Row
from virft_fast.config import RunConfig, TrainConfig, UsageError
from virft_fast.engine import (
    DeepSpeedEngine,
    OptimizerSettings,
    PlainEngine,
    check_deepspeed,
    load_deepspeed_config,
    make_reference,
    prepare_deepspeed,
    resolve_deepspeed_config,
)
from virft_fast.models.adapters import BASE_FOLDER, LoraPlan, attach
from virft_fast.models.families import Processor, freeze_vision_tower
from virft_fast.models.qwen_vl import Policy, apply_liger, checkpoint_layers, load_model
from virft_fast.models.source import ModelSource, find_model
from virft_fast.rollout.backends import check_model, make_rollout
from virft_fast.rollout.speculation import History

logger = logging.getLogger("virft_fast")


@dataclass(frozen=True)
class Blueprint:
    """The plan of a run's model and optimizer, checked before the weights are loaded.

    Attributes:
        config: the flags.
        source: the model that the flags name.
        plan: the adapter's; None without an adapter.
        dtype: in which the weights are loaded.
        keeps_reference: whether the run holds a second, frozen model.
        learning_rate: step -> its learning rate.
        ds_config: the resolved DeepSpeed configuration; None without --deepspeed.
    """

    config: RunConfig
    source: ModelSource
    plan: LoraPlan | None
    dtype: torch.dtype
    keeps_reference: bool
    learning_rate: Callable[[int], float]
    ds_config: Row | None
    settings: OptimizerSettings


def draw_blueprint(
    config: RunConfig, data: Data, source: ModelSource, plan: LoraPlan | None
) -> tuple[Blueprint, Policy]:
    """The blueprint of the model that the flags name, and its policy without weights.

    Raises:
        ValueError, FileNotFoundError: the flags or the model's files can't be used.
    """
    algorithm, dtype = algorithm_of(config), training_dtype(config)
    learning_rate = learning_rates(config.train, data.total_steps)
    ds_config, settings = deepspeed_config(config.train, source)
    if ds_config is not None:
        check_deepspeed(ds_config)
    source.check_weights()
    twice = algorithm.uses_reference(config) and not config.model.use_peft
    blueprint = Blueprint(config, source, plan, dtype, twice, learning_rate, ds_config, settings)
    policy = build_policy(blueprint, torch.float32, dist.local_device(), empty=True)
    if algorithm.rolls_out(config):
        check_model(config.grpo.rollout_backend, policy)
    return blueprint, policy


def merge_base(blueprint: Blueprint, processor: Processor, resumed: bool) -> Blueprint:
    """The blueprint of the model to load. For a stacked adapter, that is the merged base. It is
    written before training, so that the adapter is trained on the same base that is saved."""
    plan = blueprint.plan
    if plan is None or plan.kind != "stacked":
        return blueprint
    folder = (Path(blueprint.config.train.output_dir) / BASE_FOLDER).resolve()

    def write(base: ModelSource) -> None:
        if not (resumed and folder.is_dir()):
            merged = load_model(base, dtype=blueprint.dtype)
            checkpoints.write_whole_model(folder, merged, processor)

    dist.on_main(partial(write, plan.base))
    source = find_model(str(folder))
    plan = replace(plan, kind="new", name=source.name, base=source)
    return replace(blueprint, source=source, plan=plan)


def prepare_training(
    blueprint: Blueprint, processor: Processor, data: Data, device: torch.device, resumed: bool
) -> TrainState:
    """Load the model, wrap it in its engine and assemble the training state."""
    config, adapter = blueprint.config, blueprint.plan.kind if blueprint.plan else None
    blueprint = merge_base(blueprint, processor, resumed)
    train, grpo, algorithm = config.train, config.grpo, algorithm_of(config)
    torch.manual_seed(train.seed)  # so that a new adapter is the same on all ranks and in every run
    base_weights, save_dtype = blueprint.source.stamp, stored_dtype(config, blueprint.source)
    ds_config, settings, dtype = blueprint.ds_config, blueprint.settings, blueprint.dtype
    partitioning = prepare_deepspeed(ds_config, device) if ds_config else None
    frozen_copy = algorithm.may_use_reference(config)
    policy = build_policy(blueprint, dtype, device, frozen_copy=frozen_copy)
    reference = None
    if blueprint.keeps_reference:
        reference = build_policy(blueprint, dtype, device, checkpointing=False)
    del partitioning
    offload = grpo.offload_rollout_weights
    engine = (
        DeepSpeedEngine(
            policy, settings, config=ds_config, device=device, offload_rollout_weights=offload
        )
        if ds_config is not None
        else PlainEngine(
            policy, settings, device=device, bf16=train.bf16, offload_rollout_weights=offload
        )
    )
    call_reference = engine.forward if algorithm.uses_reference(config) else None
    if reference is not None:
        call_reference = make_reference(reference, engine, ds_config)
    history = History() if grpo.speculates and not policy.recurrent else None
    if policy.recurrent and grpo.speculates:
        logger.info("rollouts guess no tokens: a recurrent state can't be taken back")
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
            speculation=history,
        ),
        history=history if algorithm.draws else None,
        tokenizer=processor.tokenizer,
        reward_funcs=data.reward_funcs,
        reward_weights=data.reward_weights,
        learning_rate=blueprint.learning_rate,
        prompts_per_microbatch=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        max_tokens_per_microbatch=train.max_tokens_per_microbatch,
        seed=train.seed,
        max_bad_steps=train.max_bad_steps,
        base_weights=base_weights,
        adapter=adapter,
        save_dtype=save_dtype,
        max_steps=data.total_steps,
        num_rows=len(data.train),
    )


def deepspeed_config(
    train: TrainConfig, source: ModelSource
) -> tuple[Row | None, OptimizerSettings]:
    """The resolved DeepSpeed configuration (None without --deepspeed) and the optimizer settings,
    which that configuration may override."""
    settings = OptimizerSettings(
        learning_rate=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        epsilon=train.adam_epsilon,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=train.optim,
    )
    if train.deepspeed is None:
        return None, settings
    return resolve_deepspeed_config(
        load_deepspeed_config(train.deepspeed),
        settings=settings,
        micro_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        bf16=train.bf16,
        hidden_size=source.config.get_text_config().hidden_size,
        world_size=dist.world_size(),
    )


def training_dtype(config: RunConfig) -> torch.dtype:
    """The dtype in which weights are loaded. With --bf16, DeepSpeed keeps float32 master copies of
    bf16 weights. Without DeepSpeed the weights are the masters themselves, and only the forward and
    backward passes run in bf16; with --load_in_4bit, the masters are the adapter's alone."""
    if config.model.dtype != "auto":
        return getattr(torch, config.model.dtype)
    narrow = config.train.deepspeed or config.model.load_in_4bit
    return torch.bfloat16 if config.train.bf16 and narrow else torch.float32


def stored_dtype(config: RunConfig, source: ModelSource) -> torch.dtype | None:
    """The dtype of saved weights; None keeps the training dtype."""
    if config.train.save_dtype != "auto":
        return getattr(torch, config.train.save_dtype)
    as_trained = config.model.use_peft or not config.train.bf16
    return None if as_trained else source.config.dtype


def learning_rates(train: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """A function from step to learning rate, following a schedule from transformers.

    Raises:
        UsageError: no such schedule exists, or it depends on more than the step.
    """
    from transformers import get_scheduler

    warmup = train.warmup_steps or train.warmup_ratio
    warmup_steps = math.ceil(warmup * total_steps) if warmup < 1 else int(warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=train.learning_rate)
    expected = (
        f"--lr_scheduler_type {train.lr_scheduler_type}: expected a schedule of transformers that "
        "depends on the step alone, such as linear or cosine"
    )
    with expecting(expected, (ValueError, TypeError, ArithmeticError, AttributeError)):
        schedule = get_scheduler(train.lr_scheduler_type, optimizer, warmup_steps, total_steps)
        factors = schedule.lr_lambdas
        factors[0](0), factors[0](total_steps - 1)
    return lambda step: train.learning_rate * factors[0](min(step, total_steps - 1))


def build_policy(
    blueprint: Blueprint,
    dtype: torch.dtype,
    device: torch.device,
    *,
    empty: bool = False,
    frozen_copy: bool = False,
    checkpointing: bool = True,
) -> Policy:
    """The model as the blueprint describes it, in training mode.

    Args:
        empty: on the meta device, without weights.
        frozen_copy: keep a frozen copy of a continued adapter as the reference.
        checkpointing: apply --gradient_checkpointing; not for a reference, which has no gradients.
    """
    model, grpo, plan = blueprint.config.model, blueprint.config.grpo, blueprint.plan
    if grpo.prefix_attention == "flex" and device.type != "cuda":
        raise UsageError(
            "--prefix_attention flex: expected a CUDA device, because FlexAttention has no "
            "backward pass on the CPU; use auto"
        )
    base = load_model(
        plan.base if plan else blueprint.source,
        dtype=dtype,
        attn_implementation=model.attn_implementation,
        empty=empty,
        load_in_4bit=model.load_in_4bit,
    )
    if model.use_liger_kernel:
        apply_liger(base, device)
    trained = attach(base, plan, reference=frozen_copy) if plan else base
    if model.freeze_vision_tower:
        freeze_vision_tower(trained)
    if checkpointing and model.gradient_checkpointing:
        checkpoint_layers(base, offload=model.offload_activations)
    return Policy(
        trained.train(),
        loss_impl=grpo.loss_impl,
        prefix_sharing=grpo.prefix_sharing,
        prefix_attention=grpo.prefix_attention,
    )
