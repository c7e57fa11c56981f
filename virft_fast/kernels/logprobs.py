"""The sampled token's log-prob and the distribution's entropy, computed from logits.

On the GPU, one pass over a row computes both and a second pass the gradient (`triton_rows`). The
torch reference below works on a few rows at a time to save memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from virft_fast.kernels.backend import triton_for
from virft_fast.kernels.loss_args import check_tensors, check_type

# Elements that the reference processes at a time; they fit in a core's cache. Measured on 2 cores.
BLOCK_ELEMENTS = 2**18


def selective_log_softmax(
    logits: Tensor, index: Tensor, *, temperature: float = 1.0, inplace: bool = False
) -> Tensor:
    """Log-probability of one token per row, or of k.

    Args:
        logits: (..., V) floating point, any strides; -inf bans a token.
        index: (...) int64, in [0, V); or (..., k), several tokens a row.
        temperature: above 0; divides the logits.
        inplace: the backward pass writes the gradient over `logits`; nothing may need them after.
    Returns:
        Shape of `index`, float32 (float64 for float64 logits), <= 0. Differentiable once, in
        `logits`.
    Raises:
        ValueError: wrong shapes, index dtype or temperature; says what was expected and what was
            given. On the CPU, also for an id outside V. On the GPU, where a check would
            synchronize, such an id's log-prob is NaN.
    """
    check_tensors(logits=logits, index=index)
    if index.ndim != logits.ndim or not index.shape[-1]:
        return logps_and_entropy(logits, index, temperature=temperature, inplace=inplace)[0]
    check_rows(logits, index[..., 0], temperature)
    check_ids("index", index, logits.shape[-1])
    return _SeveralLogps.apply(logits, index, 1 / temperature, inplace)[0]


def logps_and_entropy(
    logits: Tensor, index: Tensor, *, temperature: float = 1.0, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of one token per row, and the entropy of the row's distribution in nats.

    Args:
        logits: (..., V) floating point, any strides; -inf bans a token.
        index: (...) int64, in [0, V).
        temperature: above 0; divides the logits.
        inplace: the backward pass writes the gradient over `logits`; nothing may need them after.
            Autograd raises an error if it detects such a use.
    Returns:
        Log-probs (...) float32 (float64 for float64 logits), at most 0, and entropies (...), same
        dtype, in [0, log V]. Both differentiable once, in `logits`.
    Raises:
        ValueError: as `selective_log_softmax`.
    """
    check_rows(logits, index, temperature)
    check_ids("index", index, logits.shape[-1])
    logps, _, entropy = _LogpsAndEntropy.apply(logits, index.reshape(-1), 1 / temperature, inplace)
    return logps.view(index.shape), entropy.view(index.shape)


def check_rows(logits: Tensor, index: Tensor, temperature: float) -> None:
    """The checks of both functions above that need only shapes and dtypes, not values."""
    check_tensors(logits=logits, index=index)
    if logits.ndim < 1 or logits.shape[-1] < 1 or not logits.is_floating_point():
        raise ValueError(
            f"logits: expected (..., V) floating point with V >= 1, got {tuple(logits.shape)} "
            f"{logits.dtype}"
        )
    if index.shape != logits.shape[:-1] or index.dtype != torch.int64:
        raise ValueError(
            f"index: expected {tuple(logits.shape[:-1])} int64, got {tuple(index.shape)} "
            f"{index.dtype}; one token id per row; selective_log_softmax also takes (..., k)"
        )
    if index.device != logits.device:
        raise ValueError(f"index: expected on {logits.device}, got {index.device}; move it")
    check_temperature(temperature)


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless 0 < temperature < inf."""
    check_type("temperature", temperature, "float")
    if not 0.0 < temperature < math.inf:
        raise ValueError(
            f"temperature: expected a finite number > 0, got {temperature}; greedy decoding has no "
            "log-probs to train on"
        )


def check_ids(name: str, ids: Tensor, vocab: int) -> None:
    """Raise ValueError for an id outside the vocabulary. CPU only: the check would stall a GPU."""
    if ids.device.type != "cpu" or not ids.numel() or torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocab:
        raise ValueError(
            f"{name}: expected token ids in [0, {vocab}), got {low if low < 0 else high}; mask "
            "what is no token, and see whether the tokenizer belongs to the model"
        )


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is float64, else float32."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def rows_forward(logits: Tensor, ids: Tensor, inv_temp: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of `ids`, norms and entropy of each row of the logits z * inv_temp.

    (..., V) logits with R rows and (R,) ids give (R,), (R, 2) and (R,) float32 (float64 for
    float64). The norms are the maximum and the log of the sum of exp(z - maximum). They stay
    separate, because adding them would round away digits that the gradient needs.
    """
    if torch.compiler.is_compiling():
        return _rows_forward_op(logits, ids, inv_temp)
    return _rows_forward(logits, ids, inv_temp)


def _rows_forward(logits: Tensor, ids: Tensor, inv_temp: float) -> tuple[Tensor, Tensor, Tensor]:
    triton_rows = triton_for(logits)
    if triton_rows is not None:
        return triton_rows.rows_forward(logits, ids, inv_temp)
    return rows_forward_reference(logits, ids, inv_temp)


def rows_forward_reference(
    logits: Tensor, ids: Tensor, inv_temp: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(logits)
    logps, entropy, norms = (
        torch.empty((len(ids), *more), dtype=dtype, device=ids.device) for more in ((), (), (2,))
    )
    for rows, z in _blocks(logits):
        z = _scaled(z, dtype, inv_temp)
        highest = z.amax(-1, keepdim=True)
        picked = z.gather(-1, ids[rows, None]) - highest
        z = z - highest
        e = z.exp()
        total = e.sum(-1, keepdim=True)
        log_total = total.log()
        logps[rows] = (picked - log_total)[:, 0]
        norms[rows, :1], norms[rows, 1:] = highest, log_total
        mean = e.mul_(z).sum(-1, keepdim=True) / total
        # A banned token gave 0 * inf; exp(-1e5) is 0. On CUDA, looking would wait.
        if mean.is_cuda or not bool(mean.isfinite().all()):
            z.clamp_(min=-1e5)
            mean = z.exp().mul_(z).sum(-1, keepdim=True) / total
        entropy[rows] = (log_total - mean)[:, 0]
    # Rounding can leave the range by one ulp; NaN stays NaN.
    return logps, norms, entropy.clamp_(0.0, math.log(logits.shape[-1]))


def rows_backward(
    logits: Tensor,
    ids: Tensor,
    norms: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    inv_temp: float,
    out: Tensor,
    scale: Tensor | None = None,
) -> None:
    """Gradient of sum(grad_logps * logps) + sum(grad_entropy * entropy) in the logits, into `out`.

    d logps / d z_j = 1[j = index] - p_j and d entropy / d z_j = -p_j (log p_j + entropy), times
    inv_temp and the 0-d `scale`. `out` may be `logits`. Rows whose gradients are 0 get zeros, even
    if their logits are NaN.
    """
    run = _rows_backward_op if torch.compiler.is_compiling() else _rows_backward
    run(logits, ids, norms, entropy, grad_logps, grad_entropy, inv_temp, out, scale)


def _rows_backward(
    logits: Tensor,
    ids: Tensor,
    norms: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    inv_temp: float,
    out: Tensor,
    scale: Tensor | None,
) -> None:
    triton_rows = triton_for(logits)
    if triton_rows is not None:
        triton_rows.rows_backward(
            logits, ids, norms, entropy, grad_logps, grad_entropy, inv_temp, out, scale
        )
        return
    if scale is not None:
        grad_logps = None if grad_logps is None else grad_logps * scale
        grad_entropy = None if grad_entropy is None else grad_entropy * scale
    rows_backward_reference(logits, ids, norms, entropy, grad_logps, grad_entropy, inv_temp, out)


def rows_backward_reference(
    logits: Tensor,
    ids: Tensor,
    norms: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    inv_temp: float,
    out: Tensor,
) -> None:
    for rows, z, block in _blocks(logits, out):
        g = None if grad_logps is None else grad_logps[rows, None] * inv_temp
        h = None if grad_entropy is None else grad_entropy[rows, None] * inv_temp
        # The block of `out` is the buffer if its numbers are wide enough.
        buffer = block if block.dtype == norms.dtype else torch.empty_like(z, dtype=norms.dtype)
        z = _scaled(z, norms.dtype, inv_temp)
        log_p = torch.sub(z, norms[rows, :1], out=buffer).sub_(norms[rows, 1:])
        silent = norms.new_ones((len(z), 1), dtype=torch.bool)
        change = None
        if h is not None:
            assert entropy is not None, "the gradient of the entropy needs the entropy"
            silent &= h == 0
            p = log_p.exp()
            change = h * p * torch.where(p > 0, log_p + entropy[rows, None], 0.0)
        grad = log_p.exp_()
        if g is None:
            grad.zero_()
        else:
            silent &= g == 0
            grad.mul_(-g).scatter_add_(-1, ids[rows, None], g)
        if change is not None:
            grad -= change
        if silent.is_cuda or bool(silent.any()):
            grad.masked_fill_(silent, 0.0)
        if grad is not block:
            block.copy_(grad)


def _scaled(logits: Tensor, dtype: torch.dtype, inv_temp: float) -> Tensor:
    """The logits in `dtype` times inv_temp; may be the logits themselves."""
    logits = logits.to(dtype)
    return logits if inv_temp == 1.0 else logits * inv_temp


# What torch.compile calls without looking inside.
_rows_forward_op = torch.library.custom_op(
    "virft_fast::rows_forward", _rows_forward, mutates_args=()
)
_rows_backward_op = torch.library.custom_op(
    "virft_fast::rows_backward", _rows_backward, mutates_args=("out",)
)


@_rows_forward_op.register_fake
def _(logits: Tensor, ids: Tensor, inv_temp: float) -> tuple[Tensor, Tensor, Tensor]:
    empty = lambda *shape: ids.new_empty(shape, dtype=compute_dtype(logits))  # noqa: E731
    return empty(len(ids)), empty(len(ids), 2), empty(len(ids))


def pick(vector: Tensor | None, rows: Tensor | slice = slice(None)) -> Tensor | None:
    """Some rows of a vector that may be missing, contiguous."""
    return None if vector is None else vector[rows].contiguous()


def _blocks(*tensors: Tensor, first: int = 0) -> Iterator[tuple[Any, ...]]:
    """A few rows of (..., V) tensors at a time, as (n, V) views, with their numbers before. Many
    rows on a GPU, where launches cost more than memory."""
    shape = tensors[0].shape
    if len(shape) > 2 and not all(tensor.is_contiguous() for tensor in tensors):
        count = math.prod(shape[1:-1])
        for i in range(shape[0]):
            yield from _blocks(*(tensor[i] for tensor in tensors), first=first + i * count)
        return
    tensors = tuple(tensor.view(-1, shape[-1]) if len(shape) != 2 else tensor for tensor in tensors)
    elements = BLOCK_ELEMENTS if tensors[0].device.type == "cpu" else 2**28
    size = max(1, elements // shape[-1])
    for start in range(0, len(tensors[0]), size):
        parts = tuple(tensor[start : start + size] for tensor in tensors)
        yield slice(first + start, first + start + len(parts[0])), *parts


class _LogpsAndEntropy(torch.autograd.Function):
    """Saves the logits themselves: no second (..., V) tensor lives between the passes."""

    @staticmethod
    def forward(logits, index, inv_temp, inplace):
        return rows_forward(logits, index, inv_temp)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, index, ctx.inv_temp, ctx.inplace = inputs
        _, norms, entropy = output
        ctx.save_for_backward(logits, index, norms, entropy)
        ctx.mark_non_differentiable(norms)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, _, grad_entropy):
        logits, index, norms, entropy = ctx.saved_tensors
        if grad_logps is None and grad_entropy is None:
            return None, None, None, None
        grad_logps, grad_entropy = pick(grad_logps), pick(grad_entropy)
        out = gradient_buffer(logits, ctx.inplace)
        rows_backward(logits, index, norms, entropy, grad_logps, grad_entropy, ctx.inv_temp, out)
        return out, None, None, None


class _SeveralLogps(torch.autograd.Function):
    """Log-probs of (..., k) tokens from one pass over each row."""

    @staticmethod
    def forward(logits, index, inv_temp, inplace):
        inside = (index >= 0) & (index < logits.shape[-1])  # others give NaN, as in the kernels
        index = index.where(inside, 0)
        _, norms, _ = rows_forward(logits, index[..., 0].reshape(-1), inv_temp)
        m, log_s = norms.view(*logits.shape[:-1], 2).split(1, -1)
        logps = (logits.gather(-1, index).to(norms.dtype) * inv_temp - m) - log_s
        return logps.where(inside, torch.nan), norms, index

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, _, ctx.inv_temp, ctx.inplace = inputs
        ctx.save_for_backward(logits, *output)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, *_):
        logits, logps, norms, index = ctx.saved_tensors
        out, total = gradient_buffer(logits, ctx.inplace), grad_logps.sum(-1, keepdim=True)
        first, flat = index[..., 0].reshape(-1), total.reshape(-1)
        rows_backward(logits, first, norms, None, flat, None, ctx.inv_temp, out)
        # The chosen tokens' gradients, rounded once; a token chosen twice gets the sum of both.
        same = index[..., None] == index[..., None, :]
        chosen = (same * grad_logps[..., None, :]).sum(-1) - total * logps.exp()
        out.scatter_(-1, index, (chosen * ctx.inv_temp).to(out.dtype))
        return out, None, None, None


def gradient_buffer(logits: Tensor, inplace: bool) -> Tensor:
    """The gradient's buffer. If it is `logits`, autograd detects other nodes that saved them."""
    overlaps = any(step == 0 and size > 1 for step, size in zip(logits.stride(), logits.shape))  # noqa: B905
    if not inplace or overlaps:
        return torch.empty_like(logits)
    torch.autograd.graph.increment_version(logits)
    return logits.detach()
