"""Matching with scipy, one problem at a time: runs without the native module, and checks it."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from virft_fast.arguments import need_package
from virft_fast.matching.boxes import iou_reference


def match_reference(
    pred: Tensor,
    gt: Tensor,
    num_pred: Tensor,
    num_gt: Tensor,
    greedy: bool,
    scores: Tensor | None,
    min_iou: float,
) -> tuple[Tensor, Tensor]:
    """`match_boxes` of padded boxes with scipy, one problem at a time."""
    ious = iou_reference(pred, gt, num_pred, num_gt)
    worth = torch.where(ious > min_iou, ious, 0.0)  # (N, K, M)
    order = _greedy_order(pred, scores) if greedy else None
    matches = _solve(worth, num_pred, num_gt, order).to(pred.device)
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


def _solve(worth: Tensor, num_pred: Tensor, num_gt: Tensor, order: np.ndarray | None) -> Tensor:
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


def _scipy() -> ModuleType:
    """Imported lazily: it takes 0.1 s, and isn't needed next to the native module."""
    return need_package("matching without the native module", "scipy.optimize", "scipy", "train")


def _hungarian(worth: np.ndarray) -> np.ndarray:
    """(k, m) worth -> (k,) matches, without the worthless pairs that the solver adds."""
    matches = np.full(worth.shape[0], -1, dtype=np.int64)
    rows, columns = _scipy().linear_sum_assignment(worth, maximize=True)
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


def assign_reference(
    cost: Tensor, num_rows: Tensor, num_cols: Tensor, maximize: bool
) -> tuple[Tensor, Tensor]:
    """`assign` with scipy, one problem at a time."""
    matches = np.full(cost.shape[:2], -1, dtype=np.int64)
    total = np.zeros(len(cost))
    costs = (cost if maximize else -cost).double().cpu().numpy()
    for i, (k, m) in enumerate(zip(num_rows.tolist(), num_cols.tolist(), strict=True)):
        worth = costs[i, :k, :m]
        if np.isnan(worth).any() or np.isposinf(worth).any():
            total[i] = np.nan
            continue
        allowed = np.isfinite(worth)
        if not allowed.any():
            continue
        if allowed.all():
            rows, columns = _scipy().linear_sum_assignment(worth, maximize=True)
            matches[i, rows] = columns
        else:
            least, largest = worth[allowed].min(), worth[allowed].max()
            bonus = (largest - least or 1.0) * (min(k, m) + 1)  # one pair more beats any saving
            matches[i, :k] = _hungarian(np.where(allowed, worth - least + bonus, 0.0))
        rows = np.flatnonzero(matches[i] >= 0)
        total[i] = cost[i, rows, matches[i, rows]].double().sum().item()
    on_device = (torch.from_numpy(array).to(cost.device) for array in (matches, total))
    return next(on_device), next(on_device)
