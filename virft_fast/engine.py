"""The engines, which own parameters, gradients and optimizer state. Only this file uses DeepSpeed.

`PlainEngine` runs one process or replicas, `DeepSpeedEngine` any ZeRO stage; an `Engine` is either.
A step whose gradient is not finite is skipped on every rank. The file is long because no other
module may import deepspeed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from virft_fast import dist, progress
from virft_fast.arguments import need_package
from virft_fast.batch import Row
from virft_fast.deepspeed_config import engine_dtype, offloads, zero_stage
from virft_fast.deepspeed_config import load_deepspeed_config as load_deepspeed_config
from virft_fast.deepspeed_config import resolve_deepspeed_config as resolve_deepspeed_config
from virft_fast.models.adapters import has_adapter, in_4bit, is_reference, is_trained_adapter
from virft_fast.models.policy import Policy
from virft_fast.optimizer import GuardedAdamW, OptimizerSettings, make_optimizer
from virft_fast.rollout.weights import RolloutWeights

Stored = dict[str, Tensor]  # weights by their names in a saved model


@dataclass(frozen=True)
class StepResult:
    """The gradient's norm before clipping, and whether the update was applied."""

    grad_norm: float
    applied: bool


class _EngineBase:
    """What both engines have.

    Attributes:
        module: the policy that is trained.
        zero_stage: 0 to 3; at 3 the weights are partitioned over the ranks.
        updates: number of weight updates started since the engine was created.
    """

    module: Policy
    device: torch.device
    settings: OptimizerSettings
    optimizer: torch.optim.Optimizer
    zero_stage = 0
    updates = 0
    _copy: RolloutWeights | None = None

    def free_rollout_weights(self) -> None:
        """Free the copy until the next rollout, with `offload_rollout_weights`."""
        if self._copy is not None:
            self._copy.release()

    def _trained(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _clip(self) -> Tensor:
        """Clip the gradient; returns its norm before that."""
        return nn.utils.clip_grad_norm_(self._trained(), self.settings.max_grad_norm or math.inf)


class PlainEngine(_EngineBase):
    """One process, or replicas that average their gradients at the step.

    The weights keep their dtype; with `bf16`, forward passes run under autocast.
    """

    def __init__(
        self,
        policy: Policy,
        settings: OptimizerSettings,
        *,
        device: torch.device,
        bf16: bool = False,
        offload_rollout_weights: bool = False,
    ) -> None:
        self.module = policy.to(device)
        self.device = device
        self.bf16 = bf16
        self.settings = settings
        self.optimizer = make_optimizer(policy, settings, fused=True)
        self._in_4bit = in_4bit(policy.model)  # rollouts use the 4-bit weights
        if device.type == "cuda" and not self._in_4bit and (bf16 or has_adapter(policy.model)):
            dtype = torch.bfloat16 if bf16 else policy.head.weight.dtype
            self._copy = RolloutWeights(
                policy, device=device, dtype=dtype, offload=offload_rollout_weights
            )

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Context in which the policy computes as in `forward`."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def forward(self, *args: object, **options: object) -> tuple[Tensor, ...]:
        """`Policy.forward`."""
        with self.autocast():
            return self.module(*args, **options)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add to the gradient.

        Args:
            last: true for the last microbatch before `step`.
        """
        loss.backward()

    def step(self, learning_rate: float, *, veto: bool | Tensor = False) -> StepResult:
        """Update the weights unless the gradient is not finite or `veto`, the same on all ranks.

        Args:
            veto: a 0-d tensor is read together with the gradient's norm.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self._average_gradients()
        total = self._clip().double()
        norm, veto = torch.stack([total, torch.zeros_like(total) + veto]).tolist()
        applied = math.isfinite(norm) and not veto
        if applied:
            self.updates += 1
            self.optimizer.step()
        if self._copy is not None:
            self._copy.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(norm, applied)

    def _average_gradients(self) -> None:
        if dist.world_size() == 1:
            return
        for parameter in self._trained():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce_sum(parameter.grad).div_(dist.world_size())

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[Policy]:
        """Context that yields a policy with whole weights, for rollouts. It is a copy if rollouts
        are faster on one: on CUDA in bfloat16, or with an adapter, which is merged into the copy.
        """
        policy = self.module if self._copy is None else self._copy.policy()
        with self.autocast() if policy is self.module else contextlib.nullcontext():
            yield policy

    def model_state(self, model: nn.Module, dtype: torch.dtype | None = None) -> Stored | None:
        """The weights of `model` on the CPU, in the main process; None in the others.

        Args:
            dtype: None keeps each weight's own.
        """
        if not dist.is_main():
            return None
        return {
            name: parameter.detach().to("cpu", dtype or parameter.dtype, copy=True)
            for name, parameter in _stored_parameters(model)
        }

    def save_state(self, folder: Path) -> list[Path]:
        """Save the weights in full precision and the optimizer state, for `load_state`.

        Returns:
            The files that this rank has written.
        """
        if not dist.is_main():
            return []
        state = {"module": self._module_state(), "optimizer": self.optimizer.state_dict()}
        with progress.busy("saving"):
            torch.save(state, folder / "state.pt")
        return [folder / "state.pt"]

    def _module_state(self) -> Stored:
        """The weights to save. In 4 bits only the adapters': a run that resumes reads its base
        model and quantizes it again, with the same result."""
        state: Stored = self.module.state_dict()
        adapters = {n: w for n, w in state.items() if is_trained_adapter(n) or is_reference(n)}
        return adapters if self._in_4bit else state

    def load_state(self, folder: Path) -> None:
        path = find_state(folder, deepspeed=False)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if odd := state["module"].keys() ^ self._module_state().keys():
                raise KeyError(*sorted(odd)[:3])
            self.module.load_state_dict(state["module"], strict=False)
            self.optimizer.load_state_dict(state["optimizer"])
            if self._copy is not None:
                self._copy.update(frozen=True)
        except Exception as error:  # a damaged or unrelated file can raise anything
            raise ValueError(unreadable_state(path, error)) from error


class DeepSpeedEngine(_EngineBase):
    """The policy under DeepSpeed, any ZeRO stage.

    Args:
        config: resolved DeepSpeed configuration, see `resolve_deepspeed_config`.
        offload_rollout_weights: free the copy of the weights for rollouts while training.
    """

    def __init__(
        self,
        policy: Policy,
        settings: OptimizerSettings,
        *,
        config: Row,
        device: torch.device,
        offload_rollout_weights: bool = False,
    ) -> None:
        deepspeed = import_deepspeed()
        self.device = device
        self.settings = settings
        self.zero_stage = zero_stage(config)
        fused = device.type == "cuda" and not offloads(config, "offload_optimizer")
        optimizer = self.optimizer = make_optimizer(policy, settings, fused or None)
        config = json.loads(json.dumps(config))
        # Without ZeRO and bf16, DeepSpeed clips but doesn't expose the norm, so the guard clips.
        self._clips_here = self.zero_stage == 0 and not config.get("bf16", {}).get("enabled")
        if self._clips_here:
            config["gradient_clipping"] = 0.0
        self._norm, self._veto = 0.0, False
        self.engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=config)
        # Set only now, because `initialize` makes one step without gradients to allocate the state.
        cast("GuardedAdamW", self.optimizer).guard = self._guard
        self.engine.checkpoint_engine = _plain_checkpoint_engine()
        # Don't copy its weight-gathering script: model.safetensors has the weights, and a copy that
        # fails would raise on one rank only.
        self.engine._copy_recovery_script = lambda folder: None
        self.module = policy
        if self.zero_stage == 3 or device.type == "cuda":
            gather = deepspeed.zero.GatheredParameters if self.zero_stage == 3 else None
            self._copy = RolloutWeights(
                policy,
                device=device,
                dtype=policy.head.weight.dtype,
                gather=gather,
                offload=offload_rollout_weights,
            )

    def _guard(self) -> bool:
        """Whether the optimizer may step. DeepSpeed has computed the gradient's norm by now."""
        if self._clips_here:
            self._norm = float(self._clip())
        else:
            self._norm = float(getattr(self.engine.optimizer, "_global_grad_norm", None) or 0.0)
        applies = math.isfinite(self._norm) and not self._veto
        self.updates += applies
        return applies

    def forward(self, *args: object, **options: object) -> tuple[Tensor, ...]:
        """As `PlainEngine.forward`."""
        return self.engine(*args, **options)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """As `PlainEngine.backward`."""
        # Set by hand, because the number of microbatches changes from step to step.
        self.engine.set_gradient_accumulation_boundary(last)
        # The loss is already normalized over all microbatches.
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float, *, veto: bool | Tensor = False) -> StepResult:
        """As `PlainEngine.step`; call it after `backward` of the last microbatch."""
        self._veto = bool(veto)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        if self._copy is not None:
            self._copy.update()
        overflow = bool(getattr(self.engine.optimizer, "overflow", False))
        norm = math.inf if overflow else self._norm
        return StepResult(norm, not overflow and math.isfinite(norm) and not self._veto)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """As `PlainEngine.autocast`; the weights have the dtype of the computation already."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[Policy]:
        """As `PlainEngine.whole_weights`; all ranks call.

        Under ZeRO-3 and on CUDA it yields a full copy, refilled once after each step. So layers
        need not be gathered for every token, and ranks may make different numbers of calls.
        """
        yield self.module if self._copy is None else self._copy.policy()

    def model_state(self, model: nn.Module, dtype: torch.dtype | None = None) -> Stored | None:
        """As `PlainEngine.model_state`; all ranks call."""
        deepspeed = import_deepspeed()
        state: Stored | None = {} if dist.is_main() else None
        stored, partitioned = list(_stored_parameters(model)), self.zero_stage == 3
        for name, parameter in progress.bar(stored, "saving", "weight", shown=dist.is_main()):
            progress.mark("saving")
            with deepspeed.zero.GatheredParameters([parameter], enabled=partitioned):
                if state is not None:
                    state[name] = parameter.detach().to("cpu", dtype or parameter.dtype, copy=True)
        return state

    def save_state(self, folder: Path) -> list[Path]:
        """As `PlainEngine.save_state`; all ranks call."""
        writer = self.engine.checkpoint_engine
        writer.error, writer.written = None, []
        self.engine.save_checkpoint(str(folder), tag="state", save_latest=False)
        if writer.error is not None:
            raise writer.error
        return writer.written

    def load_state(self, folder: Path) -> None:
        find_state(folder, deepspeed=True)
        try:
            path, _ = self.engine.load_checkpoint(str(folder), tag="state")
        except Exception as error:
            raise ValueError(unreadable_state(folder, error)) from error
        if self._copy is not None:
            self._copy.update(frozen=True)
        if path is None:
            raise ValueError(
                f"{folder}: expected engine state of {dist.world_size()} processes at ZeRO stage "
                f"{self.zero_stage}; it was saved with other numbers"
            )


Engine: TypeAlias = PlainEngine | DeepSpeedEngine


def find_state(folder: Path, *, deepspeed: bool) -> Path:
    """The file or folder that an engine's `save_state` wrote into `folder`.

    Raises:
        FileNotFoundError: it doesn't exist; the run may have used the other engine.
    """
    path = folder / ("state" if deepspeed else "state.pt")
    if not path.exists():
        this, other = ("with", "without") if deepspeed else ("without", "with")
        raise FileNotFoundError(
            f"{path}: expected the state of a run {this} --deepspeed, got no such file; if it was "
            f"saved {other}, resume it {other}"
        )
    return path


def unreadable_state(path: Path, error: Exception) -> str:
    return (
        f"{path}: expected the engine state of this model, got {type(error).__name__}: "
        f"{str(error)[:300]}; it may be damaged or of another model: resume an earlier checkpoint, "
        "or pass a checkpoint as --model_name_or_path to start a new run from its weights"
    )


def make_reference(
    policy: Policy, engine: Engine, config: Row | None
) -> Callable[..., tuple[Tensor, ...]]:
    """Freeze a copy of the policy and place it: partitioned under ZeRO-3, otherwise on this
    process's device.

    Args:
        config: the engine's resolved DeepSpeed configuration; None for a `PlainEngine`.
    Returns:
        A callable like `Policy.forward`.
    """
    policy.requires_grad_(False).eval()
    if isinstance(engine, PlainEngine):
        policy.to(engine.device)

        def call(*args: object, **options: object) -> tuple[Tensor, ...]:
            with engine.autocast():
                return policy(*args, **options)

        return call
    config = config or {}
    if engine.zero_stage < 3:
        return policy.to(engine.device, engine_dtype(config))
    training = ("optimizer", "scheduler", "gradient_clipping")
    kept = {key: value for key, value in config.items() if key not in training}
    reference, *_ = import_deepspeed().initialize(model=policy, config=kept)
    reference.eval()
    return reference


def import_deepspeed() -> ModuleType:
    """DeepSpeed, configured to use the CPU if there is no GPU.

    Raises:
        ValueError: it isn't installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return need_package("--deepspeed", "deepspeed", "deepspeed", "train")


def prepare_deepspeed(config: Row, device: torch.device) -> object:
    """Set DeepSpeed up before a model is loaded. Keep a reference to the result while loading:
    under ZeRO-3 it makes `from_pretrained` partition the weights as it reads them."""
    deepspeed = import_deepspeed()
    if device.type == "cpu":
        # Otherwise the first run spends minutes compiling a shared-memory all-reduce that training
        # never uses.
        deepspeed.ops.__compatible_ops__ = {}
    if not torch.distributed.is_initialized():
        # One process without a launcher: create a group of one with an in-memory store.
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        # DeepSpeed expects what a launcher sets.
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            os.environ.setdefault(name, value)
    deepspeed.init_distributed(verbose=False)
    if zero_stage(config) < 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(config)


def check_deepspeed(config: Row) -> None:
    """Raise ValueError if DeepSpeed refuses a resolved configuration."""
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig

    try:  # DeepSpeed divides train_batch_size by the size of a group that doesn't exist yet
        copied = json.loads(json.dumps(config))
        DeepSpeedConfig({k: v for k, v in copied.items() if k != "train_batch_size"})
    except Exception as error:  # pydantic errors, assertions, and anything unexpected types cause
        raise ValueError(
            f"--deepspeed: expected settings that DeepSpeed takes, got {type(error).__name__}: "
            f"{' '.join(str(error).split())[:400]}"
        ) from error


def _stored_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters to save under `model`'s own names: the adapter's if there is one, otherwise
    all, including frozen ones. Tied parameters appear once."""
    whole = not has_adapter(model)
    return ((n, p) for n, p in model.named_parameters() if whole or is_trained_adapter(n))


def _without_enums(value: object) -> object:
    """Replace enums by their numbers, which DeepSpeed also accepts. Some Python 3.11 releases
    pickle an enum as a call to getattr, which `weights_only` refuses."""
    if isinstance(value, Enum):
        return value.value
    if type(value) is dict:
        return {key: _without_enums(item) for key, item in value.items()}
    return value


def _plain_checkpoint_engine() -> object:
    """DeepSpeed's checkpoint engine, but it refuses to unpickle arbitrary objects.

    `written` lists the files it wrote. If a write fails (a full disk), it keeps the exception in
    `error`: raising it on one rank would leave the others waiting at DeepSpeed's next barrier.
    """
    import_deepspeed()
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]

    class PlainCheckpointEngine(TorchCheckpointEngine):
        error: Exception | None = None
        written: list[Path] = []

        def create(self, info: object) -> None:
            pass

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            self._keep_error(lambda: os.makedirs(path, exist_ok=exist_ok))

        def save(self, state_dict: object, path: str) -> None:
            self._keep_error(lambda: torch.save(_without_enums(state_dict), path))
            self.written.append(Path(path))

        def _keep_error(self, action: Callable[[], object]) -> None:
            try:
                action()
            except Exception as error:
                self.error = self.error or error

        def load(self, path: str, map_location: str | torch.device | None = None) -> Row:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location=map_location, weights_only=True)

    return PlainCheckpointEngine(None)
