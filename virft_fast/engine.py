"""Everything that owns parameters, gradients and optimizer state: all of DeepSpeed, and the plain
one-process or replicated engine that needs none of it.

Both engines have the same methods: `forward`, `backward`, `step`, `whole_weights`, `model_state`,
`save_state`, `load_state`. A step whose gradient is not finite is skipped on every rank.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from virft_fast import dist, progress
from virft_fast.json_files import parse_json
from virft_fast.models.adapters import has_adapter, is_trained_adapter

logger = logging.getLogger(__name__)

# Weights that are gathered at once when ZeRO-3's are copied for a rollout.
GATHERED_NUMBERS = 2**28


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and clipping; learning rates are set step by step."""

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        numbers = (self.learning_rate, self.weight_decay, *self.betas)
        ordered = all(0 <= number < math.inf for number in numbers) and 0 < self.epsilon < math.inf
        if not ordered or len(self.betas) != 2 or max(self.betas) >= 1:
            raise ValueError(
                f"optimizer: expected a rate, a weight decay and an epsilon of 0 or more and two "
                f"betas in [0, 1), got {self}"
            )


@dataclass(frozen=True)
class StepResult:
    """What a step did: the gradient's norm before clipping, and whether it was applied."""

    grad_norm: float
    applied: bool


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that leaves parameters and state alone when `guard()` says so.

    The skip sits here, below DeepSpeed, so that all ranks go through the same collectives whether
    a step counts or not.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.guard = lambda: True

    def step(self, closure: Any = None) -> None:
        if self.guard():
            super().step(closure)


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay, biases and norm weights don't."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    # Under ZeRO-3 a partitioned parameter keeps its true shape in ds_shape.
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) > 1]
    others = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class PlainEngine:
    """One process, or replicas that average their gradients at the step.

    Weights stay in the dtype they came in; with `bf16` the passes run under autocast.
    """

    zero_stage = 0
    updates = 0  # of the weights, begun since the engine was made

    def __init__(
        self,
        policy: nn.Module,
        settings: OptimizerSettings,
        *,
        device: torch.device,
        bf16: bool = False,
    ) -> None:
        self.module = policy.to(device)
        self.device = device
        self.bf16 = bf16
        self.settings = settings
        self.optimizer = GuardedAdamW(
            decay_groups(policy, settings.weight_decay),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            fused=True,
        )

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._autocast():
            return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add to the gradient; `last` with the last microbatch before `step`."""
        loss.backward()

    def step(self, learning_rate: float, *, veto: bool = False) -> StepResult:
        """Update the weights, unless `veto` (the same on all ranks) or the gradient forbids it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._average_gradients(parameters)
        max_norm = self.settings.max_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(parameters, max_norm))
        applied = math.isfinite(norm) and not veto
        if applied:
            self.updates += 1
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(norm, applied)

    @staticmethod
    def _average_gradients(parameters: list[nn.Parameter]) -> None:
        if dist.world_size() == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce_sum(parameter.grad).div_(dist.world_size())

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[nn.Module]:
        """The module with whole weights, free to be used outside `forward`."""
        with self._autocast():
            yield self.module

    def model_state(
        self, model: nn.Module, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor] | None:
        """Weights of `model` on the CPU, on the main process; None elsewhere.

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
        """Weights in full precision and optimizer state, for `load_state`; returns the files that
        this rank has written."""
        if not dist.is_main():
            return []
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with progress.busy("saving"):
            torch.save(state, folder / "state.pt")
        return [folder / "state.pt"]

    def load_state(self, folder: Path) -> None:
        path = find_state(folder, deepspeed=False)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
        # Whatever a damaged or foreign file makes of itself.
        except Exception as error:
            raise ValueError(unreadable_state(path, error)) from error


class DeepSpeedEngine:
    """The policy under DeepSpeed, any ZeRO stage.

    Args:
        config: resolved DeepSpeed configuration, see `resolve_deepspeed_config`.
        make_empty: the policy's shape alone, on the meta device; where ZeRO-3 divides the weights,
            `whole_weights` fills it.
    """

    def __init__(
        self,
        policy: nn.Module,
        settings: OptimizerSettings,
        *,
        config: dict[str, Any],
        device: torch.device,
        make_empty: Callable[[], nn.Module] | None = None,
    ) -> None:
        deepspeed = import_deepspeed()
        self.device = device
        self.updates = 0
        self._make_empty = make_empty
        self._whole: nn.Module | None = None
        self._stale = True
        self.settings = settings
        self.zero_stage = zero_stage(config)
        self.optimizer = GuardedAdamW(
            decay_groups(policy, settings.weight_decay),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
        )
        config = json.loads(json.dumps(config))
        # Without ZeRO and bf16 DeepSpeed clips but keeps the norm to itself, so we clip there.
        self._clips_here = self.zero_stage == 0 and not config.get("bf16", {}).get("enabled")
        if self._clips_here:
            config["gradient_clipping"] = 0.0
        self._norm = 0.0
        self._veto = False
        self.engine, *_ = deepspeed.initialize(
            model=policy, optimizer=self.optimizer, config=config
        )
        # Not before: while it is made, DeepSpeed steps once without gradients, to allocate state.
        self.optimizer.guard = self._guard
        self.engine.checkpoint_engine = _plain_checkpoint_engine()
        # Its scripts that gather weights: model.safetensors has them, and a copy that fails would
        # raise on one rank alone.
        self.engine._copy_recovery_script = lambda folder: None
        self.module = policy

    def _guard(self) -> bool:
        """Called before each inner update; the gradient's global norm is known by then."""
        if self._clips_here:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            max_norm = self.settings.max_grad_norm or math.inf
            self._norm = float(nn.utils.clip_grad_norm_(parameters, max_norm))
        else:
            self._norm = self._global_norm()
        applies = math.isfinite(self._norm) and not self._veto
        self.updates += applies
        return applies

    def _global_norm(self) -> float:
        norm = getattr(self.engine.optimizer, "_global_grad_norm", None)
        return 0.0 if norm is None else float(norm)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """As `PlainEngine.backward`."""
        # Not DeepSpeed's own count: the number of microbatches changes from step to step.
        self.engine.set_gradient_accumulation_boundary(last)
        # The loss is normalised over all microbatches already.
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float, *, veto: bool = False) -> StepResult:
        """As `PlainEngine.step`; call it after `backward` of the last microbatch."""
        self._veto = veto
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        self._stale = True
        overflow = bool(getattr(self.engine.optimizer, "overflow", False))
        norm = math.inf if overflow else self._norm
        return StepResult(norm, not overflow and math.isfinite(norm) and not veto)

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[nn.Module]:
        """The module with whole weights, free to be used outside `forward`; all ranks call.

        Under ZeRO-3 it is a copy in memory of its own, which stays where it is and is filled once
        after each step: no layer is gathered token by token, and ranks may make different numbers
        of module calls.
        """
        if self.zero_stage < 3:
            yield self.module
            return
        if self._whole is None:
            self._whole = materialised(self._make_empty(), self.module, self.device)
        if self._stale:
            self._fill(self._whole)
            self._stale = False
        yield self._whole

    @torch.no_grad()
    def _fill(self, whole: nn.Module) -> None:
        deepspeed = import_deepspeed()
        targets = dict(whole.named_parameters())
        for bucket in _buckets(list(self.module.named_parameters()), GATHERED_NUMBERS):
            with deepspeed.zero.GatheredParameters([parameter for _, parameter in bucket]):
                for name, parameter in bucket:
                    targets[name].copy_(parameter)

    def model_state(
        self, model: nn.Module, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor] | None:
        """As `PlainEngine.model_state`; all ranks call."""
        deepspeed = import_deepspeed()
        state: dict[str, Tensor] | None = {} if dist.is_main() else None
        for name, parameter in _stored_parameters(model):
            progress.mark("saving")
            partitioned = self.zero_stage == 3
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
        self._stale = True
        if path is None:
            raise ValueError(
                f"{folder}: expected engine state of {dist.world_size()} processes at ZeRO stage "
                f"{self.zero_stage}; it was saved with other numbers"
            )


def materialised(empty: nn.Module, like: nn.Module, device: torch.device) -> nn.Module:
    """The module with memory behind its parameters, tied ones still tied, and the buffers of
    `like`, which has the same parts."""
    memory: dict[int, nn.Parameter] = {}
    parts = dict(like.named_modules())
    for path, module in empty.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = memory.get(id(parameter))
                if made is None:
                    made = torch.empty_like(parameter, device=device)
                    made = nn.Parameter(made, requires_grad=False)
                    memory[id(parameter)] = made
                module._parameters[name] = made
        for name in module._buffers:
            module._buffers[name] = parts[path]._buffers[name]
    return empty.eval()


def _buckets(
    named: list[tuple[str, nn.Parameter]], most: int
) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Runs of parameters of at most `most` numbers together, or one that is larger."""
    bucket, total = [], 0
    for name, parameter in named:
        size = getattr(parameter, "ds_numel", parameter.numel())
        if bucket and total + size > most:
            yield bucket
            bucket, total = [], 0
        bucket.append((name, parameter))
        total += size
    if bucket:
        yield bucket


def find_state(folder: Path, *, deepspeed: bool) -> Path:
    """Where the state is that an engine's `save_state` wrote into `folder`.

    Raises:
        FileNotFoundError: there is none, or another engine's.
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


def make_reference(policy: nn.Module, engine: PlainEngine | DeepSpeedEngine, config: Any) -> Any:
    """Put a frozen copy of the policy where it can be called: partitioned under ZeRO-3, else on
    this process's device. Returns a callable like the module."""
    for parameter in policy.parameters():
        parameter.requires_grad_(False)
    policy.eval()
    if isinstance(engine, PlainEngine):
        policy.to(engine.device)

        def call(*args: Any, **kwargs: Any) -> Any:
            with engine._autocast():
                return policy(*args, **kwargs)

        return call
    if engine.zero_stage < 3:
        return policy.to(engine.device, engine_dtype(config))
    deepspeed = import_deepspeed()
    kept = {
        key: value
        for key, value in config.items()
        if key not in ("optimizer", "scheduler", "gradient_clipping")
    }
    reference, *_ = deepspeed.initialize(model=policy, config=kept)
    reference.eval()
    return reference


def import_deepspeed() -> Any:
    """DeepSpeed, told to use the CPU where there is no GPU; a clear error where it is missing."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            "--deepspeed: expected the package deepspeed (>= 0.19); pip install deepspeed"
        ) from error
    return deepspeed


def prepare_deepspeed(config: dict[str, Any], device: torch.device) -> Any:
    """Make DeepSpeed ready before a model is loaded. Keep what this returns alive while loading:
    under ZeRO-3 it makes `from_pretrained` partition the weights as they arrive."""
    deepspeed = import_deepspeed()
    if device.type == "cpu":
        # Otherwise the first run compiles DeepSpeed's shared-memory all-reduce, for minutes; of
        # training's collectives none uses it.
        deepspeed.ops.__compatible_ops__ = {}
    if not torch.distributed.is_initialized():
        # One process without a launcher: a group of one, in this process's memory.
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        # What a launcher would have set; DeepSpeed reads it without asking whether it is there.
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            os.environ.setdefault(name, value)
    deepspeed.init_distributed(verbose=False)
    if zero_stage(config) < 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(config)


_BLOCKS = ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler")


def load_deepspeed_config(path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON.

    Raises:
        FileNotFoundError, ValueError: no such file, or no JSON object in it.
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
    config: dict[str, Any],
    *,
    settings: OptimizerSettings,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    bf16: bool,
    hidden_size: int,
    world_size: int,
) -> tuple[dict[str, Any], OptimizerSettings]:
    """Fill in HF's "auto" values.

    Args:
        config: as in the user's file; left unchanged.
    Returns:
        The configuration with every "auto" replaced and without its optimizer and scheduler
        blocks, and the optimizer's settings, updated by an optimizer block.
    Raises:
        ValueError: an "auto" nobody can fill, a batch size that contradicts the flags, fp16, or an
            optimizer other than Adam(W).
    """
    config = json.loads(json.dumps(config))
    settings = _take_optimizer_block(config, settings)
    scheduler = config.pop("scheduler", None)
    if scheduler is not None:
        logger.warning("the scheduler block of the DeepSpeed file is ignored: the learning rate "
                       "follows --lr_scheduler_type")  # fmt: skip
    batch = micro_batch_size * gradient_accumulation_steps * world_size
    known = {
        ("train_micro_batch_size_per_gpu",): micro_batch_size,
        ("gradient_accumulation_steps",): gradient_accumulation_steps,
        ("train_batch_size",): batch,
        ("gradient_clipping",): settings.max_grad_norm,
        ("bf16", "enabled"): bf16,
        ("fp16", "enabled"): False,
        ("zero_optimization", "reduce_bucket_size"): hidden_size * hidden_size,
        ("zero_optimization", "stage3_prefetch_bucket_size"): int(0.9 * hidden_size**2),
        ("zero_optimization", "stage3_param_persistence_threshold"): 10 * hidden_size,
        ("zero_optimization", "stage3_gather_16bit_weights_on_model_save"): True,
    }
    for path, value in known.items():
        _fill(config, path, value)
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
                "train_batch_size", "gradient_clipping"):  # fmt: skip
        if config.setdefault(key, known[(key,)]) != known[(key,)]:
            raise ValueError(
                f"--deepspeed: {key} is {config[key]} in the file, but the flags make it "
                f'{known[(key,)]}; write "auto" there'
            )
    fp16 = config.get("fp16", {})
    if fp16.get("enabled") is True:
        raise ValueError("--deepspeed: fp16 is not supported; use bf16 (--bf16) or float32")
    for knob in ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis",
                 "min_loss_scale"):  # fmt: skip
        if fp16.get(knob) == "auto":
            fp16.pop(knob)
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
    left = _autos(config)
    if left:
        raise ValueError(f'--deepspeed: no value is known for "auto" at {", ".join(left)}')
    return config, settings


def check_deepspeed(config: dict[str, Any]) -> None:
    """Raise ValueError for what DeepSpeed itself refuses in a resolved configuration."""
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig

    try:  # without the one that it divides by the processes of a group which is made later
        DeepSpeedConfig({k: v for k, v in config.items() if k != "train_batch_size"})
    except Exception as error:  # pydantic's errors, assertions and what odd types make of its code
        raise ValueError(
            f"--deepspeed: expected settings that DeepSpeed takes, got {type(error).__name__}: "
            f"{' '.join(str(error).split())[:400]}"
        ) from error


def _take_optimizer_block(config: dict[str, Any], settings: OptimizerSettings) -> OptimizerSettings:
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
        return OptimizerSettings(
            learning_rate=float(given.get("lr", settings.learning_rate)),
            betas=tuple(map(float, given.get("betas", settings.betas))),
            epsilon=float(given.get("eps", settings.epsilon)),
            weight_decay=float(given.get("weight_decay", settings.weight_decay)),
            max_grad_norm=settings.max_grad_norm,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--deepspeed: optimizer.params: expected numbers, two of them for betas, got {given}: "
            f"{error}"
        ) from error


def _fill(config: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    *parents, last = path
    for key in parents:
        config = config.get(key, {})
    if config.get(last) == "auto":
        config[last] = value


def _autos(config: Any, prefix: str = "") -> list[str]:
    if isinstance(config, dict):
        found = [
            _autos(value, f"{prefix}.{key}" if prefix else key) for key, value in config.items()
        ]
        return [name for names in found for name in names]
    if isinstance(config, list):
        return [name for value in config for name in _autos(value, prefix)]
    return [prefix] if config == "auto" else []


def zero_stage(config: dict[str, Any] | None) -> int:
    return int((config or {}).get("zero_optimization", {}).get("stage", 0))


def engine_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype DeepSpeed keeps the module in."""
    return torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32


def _stored_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters under `model`'s own names, a tied one once; of an adapter only its own, those
    of a frozen vision tower too."""
    whole = not has_adapter(model)
    for name, parameter in model.named_parameters():
        if whole or is_trained_adapter(name):
            yield name, parameter


def _without_enums(value: Any) -> Any:
    """Some releases of Python 3.11 pickle an enum as a call of getattr, which `weights_only`
    refuses to make; DeepSpeed compares its own with their numbers."""
    if isinstance(value, Enum):
        return value.value
    if type(value) is dict:
        return {key: _without_enums(item) for key, item in value.items()}
    return value


def _plain_checkpoint_engine() -> Any:
    """DeepSpeed's checkpoint files, read without unpickling arbitrary objects.

    The files written are kept in `written`. A write that fails (a full disk) is kept in `error`
    instead of raised: raising on one rank would leave the others waiting at DeepSpeed's next
    barrier.
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

        def create(self, info: Any) -> None:
            pass

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            self._keep_error(lambda: os.makedirs(path, exist_ok=exist_ok))

        def save(self, state_dict: Any, path: str) -> None:
            self._keep_error(lambda: torch.save(_without_enums(state_dict), path))
            self.written.append(Path(path))

        def _keep_error(self, action: Callable[[], Any]) -> None:
            try:
                action()
            except Exception as error:
                self.error = self.error or error

        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location=map_location, weights_only=True)

    return PlainCheckpointEngine(None)
