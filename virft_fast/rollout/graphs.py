"""CUDA graphs of decoding steps: captured at first use, and the least recently used one evicted."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# One training run needs about ten for each padded length of its prompts; with speculation, several
# times as many, one for each number of tokens that a pass reads.
MAX_GRAPHS = 128


class Graphs:
    """The graphs that one rollout engine has captured. They hold addresses: call `clear` before any
    tensor that they use moves.

    If a capture fails, steps run one operation at a time from then on, with one warning.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.failed = device, False
        self._graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph] = OrderedDict()
        self._addresses: tuple[int, ...] = ()
        self._pool: torch.cuda._POOL_HANDLE | None = None
        self._stream: torch.cuda.Stream | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    def use_weights(self, weights: Sequence[Tensor]) -> None:
        """Clear the graphs if they were captured with weights or buffers at other addresses."""
        addresses = tuple(weight.data_ptr() for weight in weights)
        if addresses != self._addresses:
            self.clear()
            self._addresses = addresses

    def run(self, key: Hashable, step: Callable[[], None], changed: Sequence[Tensor]) -> None:
        """Run `step` as a graph.

        Args:
            key: everything that determines the step's addresses, shapes and operations.
            changed: tensors that the step changes. A capture runs the step once more, and restores
                them.
        """
        graph = self._graphs.get(key)
        if graph is None and not self.failed:
            graph = self._capture(key, step, changed)
        if graph is None:
            step()
            return
        self._graphs.move_to_end(key)
        graph.replay()

    def _capture(
        self, key: Hashable, step: Callable[[], None], changed: Sequence[Tensor]
    ) -> torch.cuda.CUDAGraph | None:
        if len(self._graphs) >= MAX_GRAPHS:
            self._synchronize()
            self._graphs.popitem(last=False)
        before = [tensor.clone() for tensor in changed]
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if self._stream is None and self.device.type == "cuda":
            # One for all captures: every new stream would get its own cuBLAS workspace.
            self._stream = torch.cuda.Stream(self.device)
        try:
            graph = self._graphs[key] = capture_graph(step, self._pool, self._stream)
        except Exception as error:  # CUDA, cuBLAS and Triton each raise their own
            chain = [e for e in (error.__context__, error) if e]  # ending a failed one raises, too
            logger.warning(
                "a decoding step can't be captured as a CUDA graph, so that rollouts run without "
                "graphs, which is slower: %s",
                "; then ".join(f"{type(e).__name__}: {str(e)[:300]}" for e in chain),
            )
            graph, self.failed = None, True
            self.clear()
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        return graph

    def clear(self) -> None:
        if self._graphs:
            self._synchronize()
        self._graphs.clear()
        self._pool = None  # a pool without graphs can't be captured into again

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the last replay may still be running


def capture_graph(
    run: Callable[[], None], pool: torch.cuda._POOL_HANDLE, stream: torch.cuda.Stream | None
) -> torch.cuda.CUDAGraph:
    """`run` as a CUDA graph. A warm-up executes `run` once; the capture itself doesn't.

    Only this thread's calls can spoil the capture: the thread that reads ahead pins memory, which
    CUDA would otherwise refuse to do during a capture.
    """
    assert stream is not None, "a CUDA device has a stream"
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            run()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            run()
    except Exception:
        # torch (2.13) stays on the stream, and its allocator in the capture, if ending it raises.
        torch.cuda.set_stream(current)
        current.wait_stream(stream)
        with contextlib.suppress(RuntimeError):  # it has left the capture
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
            torch._C._cuda_releasePool(stream.device_index, pool)
        raise
    return graph
