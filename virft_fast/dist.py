"""Rank, world size and the few collectives that the package needs; all work with one process.

`init` creates a process group only if a launcher (torchrun, deepspeed, or torchrun under srun) has
set WORLD_SIZE above 1.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor

from virft_fast import progress
from virft_fast.devices import to_device

Value = TypeVar("Value")
Flag = TypeVar("Flag", bool, Tensor)


class RankFailed(RuntimeError):
    """Raised inside `agreed` on the ranks that did not fail; names those that did.

    Attributes:
        errors: failed rank -> (name of the error's class, its text).
    """

    def __init__(self, errors: dict[int, tuple[str, str]]) -> None:
        super().__init__("; ".join(f"rank {r}: {n}: {text}" for r, (n, text) in errors.items()))
        self.errors = errors


def init(timeout_s: float = 1800.0) -> torch.device:
    """Join the launcher's process group, if there is one; returns this process's device.

    Args:
        timeout_s: seconds a collective waits for the other processes.

    Raises:
        ValueError: a launcher's variables are missing or contradict each other.
    """
    _check_environment()
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch_dist.is_initialized():
        torch_dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    return device


def _check_environment() -> None:
    given = {name: os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    for name, value in given.items():
        if value is not None and not value.isdecimal():
            raise ValueError(f"{name}: expected a number from the launcher, got {value!r}")
    world = int(given["WORLD_SIZE"] or 1)
    if world == 1:
        return
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE={world}: expected {', '.join(missing)} with it; start with torchrun, "
            "or unset WORLD_SIZE to run one process"
        )
    if int(os.environ["RANK"]) >= world:
        raise ValueError(f"RANK: expected less than WORLD_SIZE={world}, got {given['RANK']}")


def local_device() -> torch.device:
    """cuda:LOCAL_RANK where CUDA works, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def shutdown() -> None:
    """Leave the process group, if this process has joined one."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def rank() -> int:
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def world_size() -> int:
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        with progress.waiting("barrier"):
            torch_dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place; returns the tensor."""
    if world_size() > 1:
        with progress.waiting("all_reduce"):
            torch_dist.all_reduce(tensor)
    return tensor


def any_rank(flag: Flag, device: torch.device | str = "cpu") -> Flag:
    """True on every rank if `flag` is true on one of them. A 0-d tensor stays on the device."""
    if world_size() == 1:
        return flag
    if isinstance(flag, Tensor):
        return all_reduce_sum(flag.float()) > 0
    count = torch.tensor([float(flag)], device=device)
    return bool(all_reduce_sum(count).item() > 0)


def sum_numbers(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Sums over the ranks, in float64."""
    if world_size() == 1:
        return list(numbers)
    flat = to_device(torch.tensor(numbers, dtype=torch.float64), device)
    return all_reduce_sum(flat).tolist()


def gather_numbers(numbers: Sequence[float | Tensor], device: torch.device) -> list[list[float]]:
    """Each rank's numbers as float64, in rank order. The host waits for the device once.

    Args:
        numbers: floats, and 0-d tensors on the device; the same count on all ranks.
        device: where the ranks' collective runs.
    """
    places = [i for i, number in enumerate(numbers) if isinstance(number, Tensor)]
    known = [0.0 if isinstance(number, Tensor) else number for number in numbers]
    flat = torch.tensor(known, dtype=torch.float64)
    if places or world_size() > 1:
        flat = to_device(flat, device)
    if places:
        there = torch.stack([torch.as_tensor(numbers[i]).double() for i in places])
        flat.index_copy_(0, to_device(torch.tensor(places), device), there)
    ranks = [flat]
    if world_size() > 1:
        ranks = [torch.empty_like(flat) for _ in range(world_size())]
        with progress.waiting("all_gather"):
            torch_dist.all_gather(ranks, flat)
    return torch.stack(ranks).tolist()


def all_gather_object(value: Value) -> list[Value]:
    """Every rank's value, in rank order. It is pickled, so pass only small objects of our own."""
    if world_size() == 1:
        return [value]
    values = [value] * world_size()  # placeholders
    with progress.waiting("all_gather"):
        torch_dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """If the body fails on one rank, every rank raises; `is_agreed` recognizes such errors.

    Every rank must enter, and the body must not call collectives.

    Raises:
        RankFailed: on ranks where the body succeeded. The others raise their own error.
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
    mine = None if error is None else (type(error).__name__, str(error)[:1000])
    errors = {r: e for r, e in enumerate(all_gather_object(mine)) if e is not None}
    if error is not None:
        setattr(error, _AGREED, True)
        raise error
    if errors:
        raise RankFailed(errors)


_AGREED = "virft_fast_agreed"  # attribute of an error that every rank knows about


def is_agreed(error: BaseException) -> bool:
    """Whether every rank raises here, so that they can still call collectives together."""
    return world_size() == 1 or isinstance(error, RankFailed) or getattr(error, _AGREED, False)


def on_main(action: Callable[[], Value]) -> Value:
    """Run `action` on the main process; returns its result on every rank. All ranks must call.

    Raises:
        RankFailed: on the other ranks, if `action` raised; the main process raises its error.
    """
    results: list[Value] = []
    with agreed():
        if is_main():
            results.append(action())
    return all_gather_object(results)[0][0]


def from_main(make: Callable[[], Value]) -> Value:
    """Run `make` on the main process; returns its result on all ranks. For plain objects only.

    Raises:
        ValueError: on all ranks, with the text of a ValueError or OSError of the main process.
    """

    def attempt() -> tuple[list[Value], str]:
        try:
            return [make()], ""
        except (ValueError, OSError) as error:
            return [], str(error) or type(error).__name__

    values, error = on_main(attempt)
    if error:
        raise ValueError(error)
    return values[0]
