"""Pairwise IoU and one-to-one assignment for many small problems, native or in Python.

The native module takes CPU tensors, and CUDA tensors if it was built with CUDA. If it isn't there,
the Python reference below is used, which is many times slower, and warns once. Its totals are the
same, but if several assignments are best, it may choose a different one.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from virft_fast import native
from virft_fast.matching.boxes import (
    IOU_KINDS,
    as_computed,
    check_count_values,
    check_counts,
    iou_reference,
    pad_rows,
    unpad_rows,
)
from virft_fast.matching.reference import assign_reference, match_reference

METHODS = ("hungarian", "greedy")
_C = native.module


def is_native(device: torch.device | str = "cpu") -> bool:
    """Whether the native module matches tensors on `device` without copying them elsewhere."""
    kind = torch.device(device).type
    return _C is not None and (kind == "cpu" or (kind == "cuda" and native.with_cuda))


def why_not_native() -> str:
    """Why the native module isn't available; "" if it is."""
    return native.why_not


def pairwise_iou(
    pred: Tensor, gt: Tensor, num_pred: Tensor, num_gt: Tensor, *, kind: str = "iou"
) -> Tensor:
    """Intersection over union of every predicted box with every true box of each problem.

    Args:
        pred: (N, K, 4) float32 xyxy, in any unit; rows past `num_pred` may hold anything. float16
            and bfloat16 are computed in float32.
        gt: (N, M, 4), same dtype, unit and device; rows past `num_gt` may hold anything.
        num_pred, num_gt: (N,) int64 or int32, 0 allowed.
        kind: "iou", in [0, 1]; or "giou", in (-1, 1]: IoU minus the share of the smallest enclosing
            box that the union leaves empty.
    Returns:
        (N, K, M) float32, or float64 for float64 boxes; exactly 0, for both kinds, where either box
        is degenerate (inverted, without area, not finite) or past its count.
    Raises:
        ValueError: shapes, dtypes, devices, counts or `kind` are wrong; says what was expected and
            what was given.
    Not differentiable: boxes are parsed text. Source of giou: Rezatofighi et al. 2019,
    arXiv:1902.09630, algorithm 1.
    """
    problem = as_computed(pred, gt, num_pred, num_gt)
    if kind not in IOU_KINDS:
        raise ValueError(f"kind: expected one of {IOU_KINDS}, got {kind!r}")
    return _call("pairwise_iou", _pairwise_iou, *problem, kind == "giou")


def match_boxes(
    pred: Tensor,
    gt: Tensor,
    num_pred: Tensor,
    num_gt: Tensor,
    *,
    method: str = "hungarian",
    scores: Tensor | None = None,
    min_iou: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Assign predicted to true boxes one to one, separately in each of N problems.

    A pair counts if its IoU is strictly greater than `min_iou`, with both rounded to the boxes'
    dtype. Other pairs are worth 0 in the assignment, so they can't displace a pair that counts.

    Args:
        pred: (N, K, 4) float32 xyxy, in any unit; rows past `num_pred` may hold anything. Or
            packed: (S, 4), the boxes of all problems one after the other, S the sum of `num_pred`.
            float16 and bfloat16 are computed in float32.
        gt: (N, M, 4), or (sum of `num_gt`, 4) if `pred` is packed; same dtype, unit and device.
        num_pred, num_gt: (N,) int64 or int32, 0 allowed.
        method: "hungarian" maximizes the summed IoU of the pairs that count. "greedy" is
            Visual-RFT's method: in stable order of descending score, each prediction takes the free
            true box with the best IoU (the first, if equal), provided that the pair counts.
        scores: (N, K), or (S,) if packed, floating point, used only by "greedy"; NaN sorts last.
            None: the order given.
        min_iou: in [0, 1].
    Returns:
        Matches (N, K), or (S,) if packed, int64, index into the problem's true boxes, or -1 if
        unmatched; and IoUs of matched pairs, same shape, float32 (float64 for float64 boxes), 0 if
        unmatched.
    Raises:
        ValueError: shapes, dtypes, devices, counts, `method` or `min_iou` are wrong; says what was
            expected and what was given.
    Degenerate boxes (inverted, without area, not finite) match nothing. Not differentiable. If
    several assignments are best, "hungarian" returns the same one in every run, but it may differ
    between CPU, CUDA and the reference. Source: Crouse 2016, doi:10.1109/TAES.2016.140952.
    """
    problem = as_computed(pred, gt, num_pred, num_gt)
    _check_options(pred, method, scores, min_iou)
    scores = None if scores is None else scores.detach().double()
    return _call("match_boxes", _match_boxes, *problem, scores, method == "greedy", float(min_iou))


def assign(
    cost: Tensor | Sequence[Tensor | np.ndarray],
    num_rows: Tensor | None = None,
    num_cols: Tensor | None = None,
    *,
    maximize: bool = False,
) -> tuple[Tensor, Tensor]:
    """Assign rows to columns one to one, separately in each of N cost matrices.

    As many pairs as the smaller side has, of the least total cost. An infinite cost (+inf, or -inf
    with `maximize`) forbids its pair; then as many pairs as possible are made.

    Args:
        cost: (N, K, M) numbers, solved in float64; entries past the counts may hold anything. Or a
            list of N matrices of any sizes, without counts.
        num_rows, num_cols: (N,) int64 or int32, on the device of `cost`, 0 allowed; None: K and M.
        maximize: find the largest total instead.
    Returns:
        Matches (N, K) int64, each row's column, or -1 for a row without one; and totals (N,)
        float64, the sums of the matched costs.
    Raises:
        ValueError: shapes, dtypes, devices or counts are wrong, or an entry is NaN or an infinity
            of the other sign. On CUDA, where looking would synchronize, a problem with such an
            entry has no pairs, and its total is NaN.
    Not differentiable; take the matched costs for that. If several assignments are best, the same
    one is returned in every run, but it may differ between CPU, CUDA and the reference. Source:
    Crouse 2016, doi:10.1109/TAES.2016.140952.
    """
    if isinstance(cost, Tensor):
        problem = _cost_problem(cost, num_rows, num_cols)
        matches, total = _call("assign", _assign, *problem, maximize)
    elif num_rows is not None or num_cols is not None:
        raise ValueError("num_rows, num_cols: expected none with a list of matrices")
    else:
        matches, total = _assign_list(_matrices(cost), maximize)
    if total.device.type == "cpu" and not torch.compiler.is_compiling() and total.isnan().any():
        bad = total.isnan().nonzero()[:3, 0].tolist()
        raise ValueError(
            f"cost: expected numbers, or {'-' if maximize else '+'}inf to forbid a pair, got NaN "
            f"or the other infinity in problems {bad}"
        )
    return matches, total


def _matrices(cost: Sequence[Tensor | np.ndarray]) -> list[Tensor]:
    """The matrices in one dtype, float32 or float64."""
    matrices = [torch.as_tensor(matrix).detach() for matrix in cost]
    for n, matrix in enumerate(matrices):
        if matrix.ndim != 2 or matrix.is_complex():
            raise ValueError(
                f"cost[{n}]: expected a matrix of real numbers, got {tuple(matrix.shape)} "
                f"{matrix.dtype}"
            )
        if matrix.device != matrices[0].device:
            raise ValueError(
                f"cost[{n}]: expected on {matrices[0].device} like the first, got {matrix.device}"
            )
    single = (torch.float32, torch.float16, torch.bfloat16)
    dtype = torch.float32 if all(m.dtype in single for m in matrices) else torch.float64
    return [matrix.to(dtype) for matrix in matrices]


def _assign_list(matrices: list[Tensor], maximize: bool) -> tuple[Tensor, Tensor]:
    sizes = torch.tensor([m.shape for m in matrices], dtype=torch.int64).view(-1, 2)
    rows, cols = sizes.amax(0).tolist() if matrices else (0, 0)
    num_rows, num_cols = sizes.T.contiguous()
    device = matrices[0].device if matrices else num_rows.device
    if _C is None or device.type != "cpu" or torch.compiler.is_compiling():
        first = matrices[0] if matrices else torch.empty(0)
        cost = first.new_zeros(len(matrices), rows, cols)
        for padded, matrix in zip(cost, matrices, strict=True):
            padded[: matrix.shape[0], : matrix.shape[1]] = matrix
        return _call("assign", _assign, cost, num_rows.to(device), num_cols.to(device), maximize)
    matrices = [matrix.contiguous() for matrix in matrices]  # read where they are
    double = bool(matrices) and matrices[0].dtype == torch.float64
    places = torch.tensor([matrix.data_ptr() for matrix in matrices], dtype=torch.int64)
    matches = torch.empty(len(matrices), rows, dtype=torch.int64)
    total = torch.empty(len(matrices), dtype=torch.float64)
    _run("assign", "float64" if double else "float32", places, num_rows, num_cols, len(matrices),
         rows, cols, maximize, True, matches, total)  # fmt: skip
    return matches, total


def _cost_problem(
    cost: Tensor, num_rows: Tensor | None, num_cols: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Costs in float32 or float64, and their counts in int64."""
    if cost.ndim != 3 or cost.is_complex():
        raise ValueError(
            f"cost: expected (N, K, M) real numbers, got {tuple(cost.shape)} {cost.dtype}; add a "
            "batch axis for one problem"
        )
    if cost.dtype not in (torch.float32, torch.float64):
        cost = cost.to(torch.float32 if cost.is_floating_point() else torch.float64)
    counts = []
    for name, given, size in zip(
        ("num_rows", "num_cols"), (num_rows, num_cols), cost.shape[1:], strict=True
    ):
        if given is None:
            given = torch.full(cost.shape[:1], size, dtype=torch.int64, device=cost.device)
        else:
            check_counts(name, given, len(cost), cost.device)
            if not (_C and cost.is_cpu) and not torch.compiler.is_compiling():
                check_count_values(name, given, size)  # natively, the CPU checks them itself
        counts.append(given.long())
    return cost.detach(), counts[0], counts[1]


# The operators: what the functions above call directly, and torch.compile through the dispatcher


def _call(name: str, function: Callable, *arguments: Any):
    """Call directly where nothing traces, which saves several microseconds."""
    first = arguments[0]
    traced = torch.compiler.is_compiling() or type(first) is not Tensor or first.is_meta
    return getattr(torch.ops.virft_fast, name)(*arguments) if traced else function(*arguments)


def _prepared(*tensors: Any) -> tuple[str, list[Any]]:
    """The native functions to use, and the tensors contiguous, on the CPU unless they take CUDA."""
    device = tensors[0].device
    if device.type != "cpu" and not is_native(device):
        device = torch.device("cpu")
    if tensors[0].device != device:
        tensors = tuple(None if t is None else t.to(device) for t in tensors)
    placed = [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]
    dtype = "float64" if tensors[0].dtype == torch.float64 else "float32"
    return dtype if device.type == "cpu" else "cuda_" + dtype, placed


def _run(name: str, suffix: str, *arguments: Any, scratch: int = 0) -> None:
    """Call a native function with the tensors' addresses, and where it runs."""
    places = [
        value.data_ptr() if isinstance(value, Tensor) else 0 if value is None else value
        for value in arguments
    ]
    function = getattr(_C, f"{name}_{suffix}")
    if not suffix.startswith("cuda"):
        function(*places, torch.get_num_threads())
        return
    device = arguments[0].device
    if name != "iou":
        places.append(torch.empty(scratch, dtype=torch.uint8, device=device).data_ptr())
    function(*places, device.index, torch.cuda.current_stream(device).cuda_stream)


def _back(device: torch.device, *tensors: Tensor) -> Any:
    if tensors[0].device == device:
        return tensors
    return tuple(tensor.to(device) for tensor in tensors)


def _pairwise_iou(pred: Tensor, gt: Tensor, num_pred: Tensor, num_gt: Tensor, giou: bool) -> Tensor:
    if pred.ndim != 3:
        raise ValueError(f"pred: expected (N, boxes, 4), got {tuple(pred.shape)}; use pad_boxes")
    if not (_C and pred.is_cpu):
        check_count_values("num_pred", num_pred, pred.shape[1])
        check_count_values("num_gt", num_gt, gt.shape[1])
    if _C is None:
        _warn_once()
        return iou_reference(pred, gt, num_pred, num_gt, kind="giou" if giou else "iou")
    suffix, (p, g, n, m) = _prepared(pred, gt, num_pred, num_gt)
    out = p.new_empty(p.shape[0], p.shape[1], g.shape[1])
    _run("iou", suffix, p, g, n, m, *out.shape, giou, out)
    return out.to(pred.device)


def _match_boxes(
    pred: Tensor,
    gt: Tensor,
    num_pred: Tensor,
    num_gt: Tensor,
    scores: Tensor | None,
    greedy: bool,
    min_iou: float,
) -> tuple[Tensor, Tensor]:
    packed = pred.ndim == 2
    if packed and (_C is None or pred.device.type != "cpu"):
        padded = pad_rows(pred, num_pred), pad_rows(gt, num_gt)
        scores = None if scores is None else pad_rows(scores, num_pred)
        answer = _match_boxes(*padded, num_pred, num_gt, scores, greedy, min_iou)
        return unpad_rows(answer[0], num_pred), unpad_rows(answer[1], num_pred)
    if not (_C and pred.is_cpu):  # there it checks them itself
        check_count_values("num_pred", num_pred, pred.shape[1])
        check_count_values("num_gt", num_gt, gt.shape[1])
    if _C is None:
        _warn_once()
        return match_reference(pred, gt, num_pred, num_gt, greedy, scores, min_iou)
    suffix, (p, g, n, m, s) = _prepared(pred, gt, num_pred, num_gt, scores)
    matches, ious = n.new_empty(p.shape[:-1]), p.new_empty(p.shape[:-1])
    sizes = (len(n), p.shape[-2], g.shape[-2])
    if suffix.startswith("cuda"):
        scratch = _C.scratch_bytes(*sizes, p.element_size())
        _run(
            "match", suffix, p, g, n, m, *sizes, s, greedy, min_iou, matches, ious, scratch=scratch
        )
    else:
        _run("match", suffix, p, g, n, m, *sizes, packed, s, greedy, min_iou, matches, ious)
    return _back(pred.device, matches, ious)


def _assign(
    cost: Tensor, num_rows: Tensor, num_cols: Tensor, maximize: bool
) -> tuple[Tensor, Tensor]:
    if _C is None:
        _warn_once()
        return assign_reference(cost, num_rows, num_cols, maximize)
    suffix, (c, n, m) = _prepared(cost, num_rows, num_cols)
    matches, total = n.new_empty(c.shape[:2]), c.new_empty(c.shape[:1], dtype=torch.float64)
    if suffix.startswith("cuda"):
        scratch = _C.scratch_bytes(*c.shape, 8)
        _run("assign", suffix, c, n, m, *c.shape, maximize, matches, total, scratch=scratch)
    else:
        _run("assign", suffix, c, n, m, *c.shape, maximize, False, matches, total)
    return _back(cost.device, matches, total)


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "virft_fast: the native matcher is missing, so the Python reference matches boxes (same "
        "totals, many times slower); to build it, run `pip install -e .` with a C++ compiler: "
        f"{native.why_not}",
        stacklevel=3,
    )


def _check_options(pred: Tensor, method: str, scores: Tensor | None, min_iou: float) -> None:
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    if not isinstance(min_iou, (int, float)) or not 0.0 <= min_iou <= 1.0:
        raise ValueError(f"min_iou: expected a number in [0, 1], got {min_iou!r}")
    if scores is None:
        return
    if not isinstance(scores, Tensor):
        raise ValueError(f"scores: expected a tensor or None, got {type(scores).__name__}")
    if scores.shape != pred.shape[:-1] or not scores.is_floating_point():
        raise ValueError(
            f"scores: expected {tuple(pred.shape[:-1])} floating point, got {tuple(scores.shape)} "
            f"{scores.dtype}; one score per predicted box, padded like pred"
        )
    if scores.device != pred.device:
        raise ValueError(f"scores: expected on {pred.device} like pred, got {scores.device}")


_LIBRARY = torch.library.Library("virft_fast", "DEF")
_BOXES = "Tensor pred, Tensor gt, Tensor num_pred, Tensor num_gt"
_LIBRARY.define(f"pairwise_iou({_BOXES}, bool giou) -> Tensor")
_LIBRARY.define(
    f"match_boxes({_BOXES}, Tensor? scores, bool greedy, float min_iou) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "assign(Tensor cost, Tensor num_rows, Tensor num_cols, bool maximize) -> (Tensor, Tensor)"
)


def _checked_boxes(function: Callable) -> Callable:
    """For direct calls of the operator, which must not read past a tensor."""

    def checked(*arguments: Any):
        problem = as_computed(*arguments[:4])
        if len(arguments) == 5:
            return function(*problem, arguments[4])
        scores, greedy, min_iou = arguments[4:]
        _check_options(arguments[0], METHODS[greedy], scores, min_iou)
        return function(*problem, None if scores is None else scores.double(), greedy, min_iou)

    return checked


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("pairwise_iou", _checked_boxes(_pairwise_iou), _key)
    _LIBRARY.impl("match_boxes", _checked_boxes(_match_boxes), _key)
    _LIBRARY.impl(
        "assign", lambda c, n, m, maximize: _assign(*_cost_problem(c, n, m), maximize), _key
    )


@torch.library.register_fake("virft_fast::pairwise_iou")
def _(pred: Tensor, gt: Tensor, *_: object) -> Tensor:
    return pred.new_empty((pred.shape[0], pred.shape[1], gt.shape[1]))


@torch.library.register_fake("virft_fast::match_boxes")
def _(pred: Tensor, gt: Tensor, num_pred: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return num_pred.new_empty(pred.shape[:-1]), pred.new_empty(pred.shape[:-1])


@torch.library.register_fake("virft_fast::assign")
def _(cost: Tensor, num_rows: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return num_rows.new_empty(cost.shape[:2]), cost.new_empty(cost.shape[:1], dtype=torch.float64)
