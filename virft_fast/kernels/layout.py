"""Maps tokens to sequences, with one view of both the padded and the packed layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from virft_fast.devices import to_device
from virft_fast.kernels.loss_args import check_tensors, check_type


@dataclass(frozen=True)
class Layout:
    """The R flat token positions of N sequences; R is N*T if padded, S if packed.

    Attributes:
        shape: (N, T) or (S,), the shape of results.
        num_sequences: N.
        mask: (R,) bool, true for the tokens that count.
        sequence: (R,) int64, index of the token's sequence.
        lengths: (N,) int64, number of tokens that count in each sequence.
        offsets: (N+1,) int64, sequence i is offsets[i]:offsets[i+1] of the R positions.
        bounds: the offsets as numbers, if all tokens count and the host knows it; else None.
    """

    shape: tuple[int, ...]
    num_sequences: int
    mask: Tensor
    sequence: Tensor
    lengths: Tensor
    offsets: Tensor
    bounds: tuple[int, ...] | None = None

    def sequence_sum(self, values: Tensor) -> Tensor:
        """(R,) -> (N,), summed in a fixed order, without atomics."""
        if len(self.shape) == 2:
            return values.view(self.shape).sum(1)
        if not self.num_sequences:
            return values.new_zeros(0)
        return torch.segment_reduce(values, "sum", offsets=self.offsets, initial=0.0, unsafe=True)

    def per_token(self, values: Tensor) -> Tensor:
        """(N,) -> (R,)."""
        if not self.num_sequences:
            return values.new_zeros(self.sequence.shape)
        return values[self.sequence]

    def take(self, rows: Tensor) -> Layout:
        """Packed layout of only the positions `rows`, (R',) int64 ascending. All of them count."""
        lengths = torch.zeros_like(self.lengths)
        lengths.index_add_(0, self.sequence[rows], torch.ones_like(rows))
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        mask, sequence = self.mask[rows], self.sequence[rows]
        return Layout(tuple(rows.shape), self.num_sequences, mask, sequence, lengths, offsets)

    def sequences(self, first: int, last: int, rows: slice) -> Layout:
        """A packed layout of only the sequences first:last, whose positions are `rows`."""
        offsets, lengths = self.offsets[first : last + 1], self.lengths[first:last]
        mask, sequence = self.mask[rows], self.sequence[rows] - first
        return Layout(
            tuple(mask.shape), last - first, mask, sequence, lengths, offsets - offsets[0]
        )


def make_layout(
    completion_ids: Tensor, completion_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Layout:
    """Check and flatten either layout.

    Args:
        completion_ids: (N, T) padded or (S,) packed, int64.
        completion_mask: same shape, bool or 0/1 numbers. With packed ids, it may be None (all
            tokens count) or the int32 (N+1,) `cu_seqlens`.
        cu_seqlens: (N+1,) int32 for the packed layout: sequence i is cu_seqlens[i]:cu_seqlens[i+1].
            On the ids' device or on the CPU. If they are on the CPU and there is no mask, the host
            knows all row counts and needn't wait for the device.
    Raises:
        ValueError: wrong shapes, dtypes or devices; or offsets that don't ascend from 0 to S
            (checked only on the CPU, because reading them would synchronize a GPU).
    """
    check_tensors(completion_ids=completion_ids)
    check_type("completion_mask", completion_mask, "Tensor | None")
    check_type("cu_seqlens", cu_seqlens, "Tensor | None")
    if completion_ids.dtype != torch.int64 or completion_ids.ndim not in (1, 2):
        raise ValueError(
            f"completion_ids: expected (N, T) int64, or (S,) with cu_seqlens, got "
            f"{tuple(completion_ids.shape)} {completion_ids.dtype}"
        )
    if completion_ids.ndim == 1:
        takes_offsets = completion_mask is not None and completion_mask.dtype == torch.int32
        if cu_seqlens is None and takes_offsets:
            completion_mask, cu_seqlens = None, completion_mask
        return _packed(completion_ids, completion_mask, cu_seqlens)
    if cu_seqlens is not None:
        raise ValueError(
            f"cu_seqlens: expected None for padded (N, T) completion_ids, got "
            f"{tuple(cu_seqlens.shape)}; packed ids are (S,)"
        )
    if completion_mask is None:
        raise ValueError(
            "completion_mask: expected (N, T) bool, got None; pass the mask, or pack the "
            "sequences and pass cu_seqlens"
        )
    return _padded(completion_ids, completion_mask)


def _padded(completion_ids: Tensor, completion_mask: Tensor) -> Layout:
    completion_mask = _as_bool(completion_ids, completion_mask)
    n, t = completion_ids.shape
    # In memory of its own: a reshaped `expand` of one sequence would be a view of one number.
    sequence = torch.arange(n, device=completion_ids.device).repeat_interleave(t)
    offsets = torch.arange(n + 1, device=completion_ids.device) * t
    return Layout((n, t), n, completion_mask.reshape(-1), sequence, completion_mask.sum(1), offsets)


def _packed(ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Layout:
    offsets, bounds = _checked_offsets(ids, cu_seqlens)
    positions = torch.arange(ids.shape[0], device=ids.device)
    n = offsets.shape[0] - 1
    if mask is None:
        mask = torch.ones_like(ids, dtype=torch.bool)
    else:
        bounds, mask = None, _as_bool(ids, mask)
    if n == 0:
        mask = torch.zeros_like(mask)
        return Layout(tuple(ids.shape), 0, mask, torch.zeros_like(ids), offsets[:0], offsets)
    # right=True skips empty sequences; tokens after the last offset belong to none.
    sequence = torch.searchsorted(offsets[1:].contiguous(), positions, right=True)
    mask = mask & (sequence < n)
    sequence = sequence.clamp(max=n - 1)
    lengths = torch.zeros(n, dtype=torch.int64, device=ids.device)
    lengths.index_add_(0, sequence, mask.long())
    return Layout(tuple(ids.shape), n, mask, sequence, lengths, offsets, bounds)


def _as_bool(ids: Tensor, mask: Tensor) -> Tensor:
    """The mask as bool; raises ValueError for other shapes, devices or (on a CPU) numbers."""
    if mask.shape != ids.shape:
        raise ValueError(
            f"completion_mask: expected {tuple(ids.shape)} bool or 0/1 numbers like "
            f"completion_ids, got {tuple(mask.shape)} {mask.dtype}"
        )
    if mask.device != ids.device:
        raise ValueError(f"completion_mask: expected on {ids.device}, got {mask.device}; move it")
    if mask.dtype == torch.bool:
        return mask
    chosen = mask != 0
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = mask[chosen & (mask != 1)]
        if len(wrong):
            raise ValueError(f"completion_mask: expected only 0 and 1, got {wrong[0].item()}")
    return chosen


def _checked_offsets(
    ids: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, tuple[int, ...] | None]:
    """(N+1,) int64 on the ids' device, and the same as numbers if they came on the CPU."""
    if cu_seqlens is None or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        got = None if cu_seqlens is None else tuple(cu_seqlens.shape)
        raise ValueError(
            f"cu_seqlens: expected (N+1,) int32 for packed (S,) completion_ids, got {got}; "
            "padded ids are (N, T)"
        )
    on_cpu = cu_seqlens.device.type == "cpu"
    known = cu_seqlens.dtype in (torch.int32, torch.int64)
    if not known or not (on_cpu or cu_seqlens.device == ids.device):
        raise ValueError(
            f"cu_seqlens: expected int32 on {ids.device} or the CPU, got {cu_seqlens.dtype} on "
            f"{cu_seqlens.device}"
        )
    if not on_cpu or torch.compiler.is_compiling():
        return to_device(cu_seqlens.long(), ids.device), None
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != ids.shape[0] or offsets != sorted(offsets):
        raise ValueError(
            f"cu_seqlens: expected ascending offsets from 0 to {ids.shape[0]}, got {offsets}"
        )
    return to_device(cu_seqlens.long(), ids.device), tuple(offsets)
