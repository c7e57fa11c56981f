"""A stand-in for `torch.cuda.set_sync_debug_mode` without a GPU.

Inside `PretendGPU`, tensors that were moved to `GPU`, and all that is computed from them, say that
they are on it, so that code takes its CUDA branches. The arithmetic stays on the CPU. Each time
the host would wait for the device, the place is recorded; an operation that would fail on a real
GPU, because its operands are on both sides, raises.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
# The result's shape or the answer depends on values, so the host reads them.
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "masked_scatter_backward", "_unique",
    "_unique2", "unique_dim", "unique_consecutive", "equal", "is_nonzero", "bincount", "allclose",
}  # fmt: skip
READS = {"tolist", "numpy", "__array__"}  # read memory without a dispatched operation
# Its C++ groups gradients by their real device and then moves a number "back" there.
CLIPPING = torch.nn.utils.clip_grads_with_norm_.__code__.co_filename


class _Marks:
    """Storages with a property. A weak reference keeps an address from being used again."""

    def __init__(self) -> None:
        self._refs: dict[int, StorageWeakRef] = {}

    def __contains__(self, tensor: object) -> bool:
        return isinstance(tensor, Tensor) and self._key(tensor) in self._refs

    def _key(self, tensor: Tensor) -> int:
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage()._cdata

    def add(self, tensor: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            ref = StorageWeakRef(tensor.untyped_storage())
        self._refs[ref.cdata] = ref

    def remove(self, tensor: Tensor) -> None:
        self._refs.pop(self._key(tensor), None)


class PretendGPU(TorchFunctionMode):
    """Attributes: waits: "operation file:line" of our code -> how often the host waited there."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.on_gpu, self.pinned = _Marks(), _Marks()
        self._dispatch = _Dispatch(self)

    def __enter__(self) -> PretendGPU:
        self._dispatch.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._dispatch.__exit__(*error)

    def adopt(self, *modules: torch.nn.Module) -> None:
        """Say of modules' parameters and buffers that they are on the GPU."""
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self.on_gpu.add(tensor)

    def wait(self, what: str) -> None:
        self.waits[f"{what} {next(_our_frames(), 'elsewhere')}"] += 1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name, first = getattr(func, "__name__", ""), args[0] if args else None
        if func == Tensor.device.__get__:
            return GPU if first in self.on_gpu else func(*args)
        if func == Tensor.is_cuda.__get__:
            return first in self.on_gpu
        if func == Tensor.is_cpu.__get__:
            return first not in self.on_gpu
        if name in ("pin_memory", "is_pinned"):
            return self._pin(first) if name == "pin_memory" else first in self.pinned
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._to(func, args, kwargs)
        if func is Tensor.backward:  # with this mode on, for backward passes in Python
            super().__enter__()
            try:
                torch.autograd.Variable._execution_engine.run_backward(
                    (first,), (torch.ones_like(first),), False, False, (), True, True
                )
                return None
            finally:
                super().__exit__(None, None, None)
        if name in READS and first in self.on_gpu:
            self.wait(name)
        device = kwargs.get("device")
        made_there = device is not None and torch.device(device).type == "cuda"
        if made_there:
            kwargs["device"] = "cpu"
        out = func(*args, **kwargs)
        if made_there:
            if name in ("tensor", "as_tensor", "asarray"):
                self.wait(f"{name} from host data")
            self.on_gpu.add(out)
        return out

    def _pin(self, tensor: Tensor) -> Tensor:
        pinned = tensor.clone()
        self.pinned.add(pinned)
        return pinned

    def _to(self, func, args, kwargs):
        tensor, *rest = args
        if sys._getframe(2).f_code.co_filename == CLIPPING:
            return tensor
        devices = [_device(value) for value in (*rest, kwargs.pop("device", None))]
        devices = [device for device in devices if device is not None]
        target = {Tensor.cpu: "cpu", Tensor.cuda: "cuda"}.get(func) or (devices or [None])[0]
        rest = [value for value in rest if _device(value) is None or isinstance(value, Tensor)]
        non_blocking = kwargs.get("non_blocking", False)
        out = tensor.to(*rest, **kwargs) if rest or kwargs else tensor
        there = tensor in self.on_gpu
        if target == "cuda" and not there:
            if not (non_blocking and tensor in self.pinned):
                self.wait("copy to the GPU of memory that isn't pinned")
            out = out.clone()
            self.on_gpu.add(out)
        elif target == "cpu" and there:
            self.wait("copy to the CPU")
            out = out.clone()
            self.on_gpu.remove(out)
        return out


class _Dispatch(TorchDispatchMode):
    def __init__(self, outer: PretendGPU) -> None:
        super().__init__()
        self.outer = outer

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, outer = kwargs or {}, self.outer
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor in outer.on_gpu for tensor in inputs]
        name = func.overloadpacket.__name__
        if name == "copy_":
            target, source = there[:2]
            if target != source and inputs[1].ndim:  # a number is passed along
                pinned = inputs[1] in outer.pinned and (kwargs or args[2:])
                if source or not pinned:
                    outer.wait("copy_ between host and GPU")
            return func(*args, **kwargs)
        if any(there):
            self._check(func, name, args, kwargs, inputs, there)
        out = func(*args, **kwargs)
        if any(there):
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    outer.on_gpu.add(tensor)
        return out

    def _check(self, func, name, args, kwargs, inputs, there) -> None:
        outer = self.outer
        if name in WAITS:
            outer.wait(name)
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            if not isinstance(args[:2][-1], int):  # the same number of each is no value to read
                outer.wait(name)
        if name == "segment_reduce" and not kwargs.get("unsafe"):
            outer.wait(name)
        indexes = name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
        if indexes:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                outer.wait(f"{name} by a mask")
            if any(index not in outer.on_gpu for index in indices):
                outer.wait(f"{name} by indices on the host")
        elif any(t.ndim and not here for t, here in zip(inputs, there, strict=True)):
            places = [(tuple(t.shape), here) for t, here in zip(inputs, there, strict=True)]
            raise AssertionError(f"{func}: operands on the host and on the GPU: {places}")


class Tape(TorchDispatchMode):
    """A CUDA graph of `run`, pretended: the operations of one call, with the numbers and tensors
    that they had. A replay runs no Python of ours."""

    def __init__(self, run, pool=None, stream=None):
        run()  # the warm-up
        super().__init__()
        self.calls, self.replays = [], 0
        with self:
            run()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        memory = {_memory(leaf) for leaf in tree_leaves((args, kwargs))}
        # Where a result's memory is new, a replay writes it there again; a view needs nothing.
        made = [leaf for leaf in tree_leaves(out) if _memory(leaf) not in memory]
        if made or func._schema.is_mutable:
            self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        with _disable_current_modes():
            for func, args, kwargs, out in self.calls:
                results = zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True)
                for old, new in results:
                    if _memory(old) != _memory(new):
                        old.copy_(new)


def _memory(value: object) -> int | None:
    if not isinstance(value, Tensor):
        return None
    with torch._C.DisableTorchFunction():
        return value.untyped_storage().data_ptr()


def _device(value: object) -> str | None:
    if isinstance(value, Tensor):
        return None
    if isinstance(value, (str, torch.device)):
        return torch.device(value).type
    return None


def _our_frames() -> Iterator[str]:
    """Places in the stack in this package, innermost first; else in transformers."""
    frames = traceback.extract_stack()[::-1]
    for part in ("virft_fast/virft_fast/", "/virft_fast/", "transformers/"):
        for frame in frames:
            if part in frame.filename and "pretend_gpu" not in frame.filename:
                yield f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"
