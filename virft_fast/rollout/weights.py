"""A copy of a policy's weights for rollouts: whole, in one dtype, with the adapter merged in.

Its layout is that of `lay_out`. It is allocated once and filled again after each update, at the
same addresses, so that CUDA graphs stay valid. A frozen weight that already has the copy's dtype
and layout is shared instead.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from virft_fast.models.adapters import TRAINED, is_trained_adapter
from virft_fast.models.decode_step import lay_out, merged_linears
from virft_fast.models.families import base, core
from virft_fast.models.policy import Policy

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as LoraLayer

logger = logging.getLogger(__name__)

# How many numbers of partitioned weights are gathered at once.
GATHERED_NUMBERS = 2**28

# Context in which partitioned parameters are whole.
Gather = Callable[[list[nn.Parameter]], contextlib.AbstractContextManager[object]]


@dataclass(frozen=True)
class _Copied:
    """A weight of the copy and where it comes from.

    Attributes:
        adapter: peft's layer around the weight's module, whose adapter changes the weight.
    """

    target: nn.Parameter
    source: nn.Parameter
    adapter: LoraLayer | None

    @property
    def read(self) -> list[nn.Parameter]:
        """The parameters that decide the value."""
        if self.adapter is None:
            return [self.source]
        named = self.adapter.named_parameters()
        return [self.source, *(p for name, p in named if is_trained_adapter(name))]

    def fill(self) -> None:
        value: Tensor = self.source
        if self.adapter is not None:
            value = _merged(self.source, self.adapter)
        self.target.copy_(value)


class RolloutWeights:
    """The copy of a policy. The first rollout allocates it.

    Args:
        policy: in training; with or without an adapter.
        dtype: of the copy.
        gather: makes partitioned parameters whole; all ranks enter it in the same order. None: they
            are not partitioned.
        offload: whether `release` frees the memory.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        device: torch.device,
        dtype: torch.dtype,
        gather: Gather | None = None,
        offload: bool = False,
    ) -> None:
        self._trained, self._device, self._dtype = policy, device, dtype
        self._gather, self._offload = gather, offload
        self._policy: Policy | None = None
        self._stale, self._filled, self._copied = True, False, list[_Copied]()
        self._memory: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def policy(self) -> Policy:
        """The copy, with the current weights; the policy in training if a copy doesn't fit into
        memory. All ranks call; only the first call after an update gathers."""
        try:
            whole = self._allocated()
        except torch.OutOfMemoryError:
            if self._gather is not None:
                raise
            logger.warning(
                "the rollouts' copy of the weights doesn't fit into memory; they run without it, "
                "which is slower"
            )
            whole = self._policy = self._trained
            self._copied, self._memory = [], {}  # after `release`, they are those of the old copy
        if self._stale:
            self._fill()
        return whole

    def _allocated(self) -> Policy:
        if self._policy is None:
            self._policy, self._copied = _make_copy(
                self._trained, self._device, self._dtype, share=self._gather is None
            )
            # Neighbors have one storage.
            storages = [copied.target.untyped_storage() for copied in self._copied]
            self._memory = {s.data_ptr(): (s, s.nbytes()) for s in storages}
        for storage, size in self._memory.values():
            if storage.nbytes() < size:
                storage.resize_(size)
                self._stale, self._filled = True, False
        return self._policy

    @torch.no_grad()
    def _fill(self) -> None:
        changed = [
            copied
            for copied in self._copied
            if not self._filled or any(parameter.requires_grad for parameter in copied.read)
        ]
        for bucket in _buckets(changed, GATHERED_NUMBERS):
            read = [parameter for copied in bucket for parameter in copied.read]
            with self._gather(read) if self._gather else contextlib.nullcontext():
                for copied in bucket:
                    copied.fill()
        self._stale, self._filled = False, True

    def update(self, *, frozen: bool = False) -> None:
        """The policy's weights have changed; `frozen`: those that aren't trained, too."""
        self._stale = True
        self._filled &= not frozen

    def release(self) -> None:
        """Free the memory until the next rollout, if `offload` is set."""
        if self._offload:
            for storage, _ in self._memory.values():
                storage.resize_(0)


def _make_copy(
    policy: Policy, device: torch.device, dtype: torch.dtype, *, share: bool
) -> tuple[Policy, list[_Copied]]:
    """An allocated copy without values, and how to fill it. It takes the policy's buffers."""
    model = cast("Any", base(policy.model))
    with torch.device("meta"):
        empty = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    text: Any = core(empty).get_decoder()
    merged = {
        id(linear)
        for layer in (text.layers if policy.unreachable is None else ())
        for linears in merged_linears(cast("Any", layer))
        for linear in linears
    }
    modules, memory = dict(model.named_modules()), {}
    copied: list[_Copied] = []
    for path, module in empty.named_modules():
        original = modules[path]
        adapter = original if hasattr(original, "base_layer") else None
        original = original if adapter is None else adapter.base_layer
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            source = original._parameters[name]
            if id(source) not in memory:
                usable = share and not source.requires_grad and source.dtype == dtype
                if usable and id(module) not in merged and adapter is None:
                    memory[id(source)] = source
                else:
                    shape = getattr(source, "ds_shape", source.shape)
                    numbers = torch.empty(shape, dtype=dtype, device=device)
                    target = memory[id(source)] = nn.Parameter(numbers, requires_grad=False)
                    changes = adapter if name == "weight" else None
                    copied.append(_Copied(target, source, changes))
            module._parameters[name] = memory[id(source)]
        for name in module._buffers:
            module._buffers[name] = original._buffers[name]
    whole = Policy(empty, prefix_sharing="off").eval()
    whole.vision_frozen = policy.vision_frozen
    if policy.unreachable is None:
        lay_out(text)
    return whole, copied


def _merged(weight: Tensor, layer: LoraLayer) -> Tensor:
    """The weight (out, in) with the trained adapter of peft's linear layer merged in, float32."""
    down, up = (getattr(layer, name)[TRAINED].weight for name in ("lora_A", "lora_B"))
    whole = torch.addmm(weight.float(), up.float(), down.float(), alpha=layer.scaling[TRAINED])
    if layer.use_dora.get(TRAINED):  # Liu et al. 2024, arXiv:2402.09353, equation 5
        magnitude = layer.lora_magnitude_vector[TRAINED].weight.float()
        whole *= (magnitude / whole.norm(dim=1))[:, None]
    return whole


def _buckets(copied: Sequence[_Copied], limit: int) -> Iterator[list[_Copied]]:
    """Runs of weights that read at most `limit` numbers; a larger one is alone."""
    bucket: list[_Copied] = []
    total = 0
    for one in copied:
        size = sum(getattr(p, "ds_numel", p.numel()) for p in one.read)
        if bucket and total + size > limit:
            yield bucket
            bucket, total = [], 0
        bucket.append(one)
        total += size
    if bucket:
        yield bucket
