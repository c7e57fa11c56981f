"""Pairwise IoU and one-to-one assignment for many small problems, native or in Python.

The native operators in csrc/ take CPU tensors, and CUDA tensors if they were built with CUDA. If
they aren't available, the Python reference below is used, which is many times slower, and warns
once. Its totals are the same, but if several assignments are best, it may choose a different one.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from virft_fast import __version__
from virft_fast.matching.boxes import IOU_KINDS, check_counts, check_problem, iou_reference

METHODS = ("hungarian", "greedy")

_C: ModuleType | None
try:
    _C = importlib.import_module("virft_fast._C")
except ImportError as error:  # not built, or built for another torch
    _C, _WHY_NOT = None, str(error)
else:
    _BUILT = _C.build_info()
    if (_BUILT["torch"], _BUILT["version"]) != (torch.__version__, __version__):
        _WHY_NOT = (
            f"it was built for torch {_BUILT['torch']} and virft_fast {_BUILT['version']}, here "
            f"are {torch.__version__} and {__version__}"
        )
        _C = None
_WITH_CUDA = _C is not None and _BUILT["cuda_archs"] != "none"


def is_native(device: torch.device | str = "cpu") -> bool:
    """Whether the native operators match tensors on `device` without copying them elsewhere."""
    kind = torch.device(device).type
    return _C is not None and (kind == "cpu" or (kind == "cuda" and _WITH_CUDA))


def why_not_native() -> str:
    """Why the native operators aren't available; "" if they are."""
    return "" if _C is not None else _WHY_NOT


def pairwise_iou(
    pred: Tensor, gt: Tensor, num_pred: Tensor, num_gt: Tensor, *, kind: str = "iou"
) -> Tensor:
    """Intersection over union of every predicted box with every true box of each problem.

    Args:
        pred: (N, K, 4) float32 xyxy, in any unit; rows past `num_pred` may hold anything.
        gt: (N, M, 4), same dtype, unit and device; rows past `num_gt` may hold anything.
        num_pred, num_gt: (N,) int64, 0 allowed.
        kind: "iou", in [0, 1]; or "giou", in (-1, 1]: IoU minus the share of the smallest enclosing
            box that the union leaves empty.
    Returns:
        (N, K, M), the dtype of `pred`; exactly 0, for both kinds, where either box is degenerate
        (inverted, without area, not finite) or past its count. float64 is accepted for oracles.
    Raises:
        ValueError: shapes, dtypes, devices, counts or `kind` are wrong; says what was expected and
            what was given.
    Not differentiable: boxes are parsed text. Source of giou: Rezatofighi et al. 2019,
    arXiv:1902.09630, algorithm 1.
    """
    check_problem(pred, gt, num_pred, num_gt)
    if kind not in IOU_KINDS:
        raise ValueError(f"kind: expected one of {IOU_KINDS}, got {kind!r}")
    if _C is None:
        _warn_once()
        _check_all_counts(pred, gt, num_pred, num_gt)
        return iou_reference(pred, gt, num_pred, num_gt, kind=kind)
    problem = _prepared(pred, gt, num_pred, num_gt)
    return torch.ops.virft_fast.pairwise_iou(*problem, kind == "giou").to(pred.device)


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
        pred: (N, K, 4) float32 xyxy, in any unit; rows past `num_pred` may hold anything.
        gt: (N, M, 4), same dtype, unit and device; rows past `num_gt` may hold anything.
        num_pred, num_gt: (N,) int64, 0 allowed.
        method: "hungarian" maximizes the summed IoU of the pairs that count. "greedy" is
            Visual-RFT's method: in stable order of descending score, each prediction takes the free
            true box with the best IoU (the first, if equal), provided that the pair counts.
        scores: (N, K) floating point, used only by "greedy"; NaN sorts last. None: the order given.
        min_iou: in [0, 1].
    Returns:
        Matches (N, K) int64, index into M, or -1 if unmatched; and IoUs of matched pairs (N, K),
        the dtype of `pred`, 0 if unmatched.
    Raises:
        ValueError: shapes, dtypes, devices, counts, `method` or `min_iou` are wrong; says what was
            expected and what was given.
    Degenerate boxes (inverted, without area, not finite) match nothing. Not differentiable. If
    several assignments are best, "hungarian" returns the same one in every run, but it may differ
    between CPU, CUDA and the reference. Source: Crouse 2016, doi:10.1109/TAES.2016.140952.
    """
    check_problem(pred, gt, num_pred, num_gt)
    _check_options(pred, method, scores, min_iou)
    if _C is None:
        _warn_once()
        _check_all_counts(pred, gt, num_pred, num_gt)
        return match_reference(pred, gt, num_pred, num_gt, method, scores, min_iou)
    problem = _prepared(pred, gt, num_pred, num_gt)
    if scores is not None:
        scores = scores.detach().to(problem[0].device, torch.float64).contiguous()
    matches, ious = torch.ops.virft_fast.match_boxes(
        *problem, scores, method == "greedy", float(min_iou)
    )
    return matches.to(pred.device), ious.to(pred.device)


def _prepared(*problem: Tensor) -> list[Tensor]:
    """The tensors, contiguous, and on the CPU if the operators were built without CUDA."""
    device = problem[0].device
    if device.type != "cpu":
        _check_all_counts(*problem)  # the CPU operators do it themselves
    if not is_native(device) and device.type != "meta":
        device = torch.device("cpu")
    return [tensor.detach().to(device).contiguous() for tensor in problem]


def _check_all_counts(pred: Tensor, gt: Tensor, num_pred: Tensor, num_gt: Tensor) -> None:
    check_counts("num_pred", num_pred, pred.shape[1])
    check_counts("num_gt", num_gt, gt.shape[1])


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "virft_fast: the native matcher is missing, so the Python reference matches boxes (same "
        "totals, many times slower); to build it, run `pip install --no-build-isolation .` with "
        f"this torch and a C++ compiler: {_WHY_NOT}",
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
    if scores.shape != pred.shape[:2] or not scores.is_floating_point():
        raise ValueError(
            f"scores: expected {tuple(pred.shape[:2])} floating point, got {tuple(scores.shape)} "
            f"{scores.dtype}; one score per predicted box, padded like pred"
        )
    if scores.device != pred.device:
        raise ValueError(f"scores: expected on {pred.device} like pred, got {scores.device}")


def match_reference(
    pred: Tensor,
    gt: Tensor,
    num_pred: Tensor,
    num_gt: Tensor,
    method: str,
    scores: Tensor | None,
    min_iou: float,
) -> tuple[Tensor, Tensor]:
    """`match_boxes` with scipy, one problem at a time."""
    ious = iou_reference(pred, gt, num_pred, num_gt)
    worth = torch.where(ious > min_iou, ious, 0.0)  # (N, K, M)
    order = _greedy_order(pred, scores) if method == "greedy" else None
    matches = _assign(worth, num_pred, num_gt, order).to(pred.device)
    if gt.shape[1] == 0:
        return matches, torch.zeros_like(matches, dtype=pred.dtype)
    matched_iou = worth.gather(2, matches.clamp(min=0)[..., None])[..., 0]
    return matches, matched_iou.masked_fill(matches < 0, 0.0)


def _greedy_order(pred: Tensor, scores: Tensor | None) -> np.ndarray:
    """(N, K) positions by descending score; equal scores keep their order."""
    if scores is None:
        scores = pred.new_zeros(pred.shape[:2])
    descending = -np.nan_to_num(
        scores.detach().double().cpu().numpy(), nan=-np.inf, posinf=np.inf, neginf=-np.inf
    )
    return np.argsort(descending, axis=1, kind="stable")


def _assign(worth: Tensor, num_pred: Tensor, num_gt: Tensor, order: np.ndarray | None) -> Tensor:
    """(N, K) int64 matches on the CPU, computed one problem at a time."""
    matches = np.full(worth.shape[:2], -1, dtype=np.int64)
    worth_np = worth.double().cpu().numpy()
    for i, (k, m) in enumerate(zip(num_pred.tolist(), num_gt.tolist(), strict=True)):
        problem = worth_np[i, :k, :m]
        if not problem.any():
            continue
        if order is None:
            matches[i, :k] = _hungarian(problem)
        else:
            matches[i, :k] = _greedy(problem, order[i][order[i] < k])
    return torch.from_numpy(matches)


def _hungarian(worth: np.ndarray) -> np.ndarray:
    """(k, m) worth -> (k,) matches, without the worthless pairs that the solver adds."""
    from scipy.optimize import linear_sum_assignment  # imported lazily: it takes 0.1 s

    matches = np.full(worth.shape[0], -1, dtype=np.int64)
    rows, columns = linear_sum_assignment(worth, maximize=True)
    counts = worth[rows, columns] > 0
    matches[rows[counts]] = columns[counts]
    return matches


def _greedy(worth: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(k, m) worth and (k,) visiting order -> (k,) matches."""
    matches = np.full(worth.shape[0], -1, dtype=np.int64)
    free = np.ones(worth.shape[1], dtype=bool)
    for row in order:
        candidates = np.where(free, worth[row], 0.0)
        best = int(candidates.argmax())
        if candidates[best] > 0:
            matches[row] = best
            free[best] = False
    return matches


if _C is not None:

    @torch.library.register_fake("virft_fast::pairwise_iou")
    def _(pred: Tensor, gt: Tensor, num_pred: Tensor, num_gt: Tensor, giou: bool) -> Tensor:
        return pred.new_empty((pred.shape[0], pred.shape[1], gt.shape[1]))

    @torch.library.register_fake("virft_fast::match_boxes")
    def _(
        pred: Tensor,
        gt: Tensor,
        num_pred: Tensor,
        num_gt: Tensor,
        scores: Tensor | None,
        greedy: bool,
        min_iou: float,
    ) -> tuple[Tensor, Tensor]:
        return num_pred.new_empty(pred.shape[:2]), pred.new_empty(pred.shape[:2])
