"""Box formats, coordinate spaces and the reference IoU.

A box is xyxy (two corners, x1 < x2 and y1 < y2) unless a name says otherwise. Coordinates are
continuous: a box from 0 to 10 is 10 wide, not 11. A box is *degenerate* if its width or height
isn't positive or a coordinate isn't finite. Models produce such boxes; they are not an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

IOU_KINDS = ("iou", "giou")
Boxes: TypeAlias = Tensor | np.ndarray | Sequence[Sequence[float]]  # (n, 4)


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) center and size -> (..., 4) corners."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) corners -> (..., 4) center and size."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), dim=-1)


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) first corner and size, as COCO stores boxes -> (..., 4) corners."""
    x, y, w, h = boxes.unbind(-1)
    return torch.stack((x, y, x + w, y + h), dim=-1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """(..., 4) corners -> (..., 4) first corner and size, as COCO stores boxes."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack((x1, y1, x2 - x1, y2 - y1), dim=-1)


def rescale_boxes(
    boxes: Tensor, *, from_size: tuple[float, float], to_size: tuple[float, float]
) -> Tensor:
    """Convert boxes between coordinate spaces: pixels of an image, 0-1000, 0-1.

    Args:
        boxes: (..., 4) floating point, in any format of this module.
        from_size, to_size: (width, height) of the whole image in each space: its size in pixels,
            (1000, 1000), or (1, 1).
    Returns:
        (..., 4), the dtype of `boxes`. Neither rounded nor clipped.
    Raises:
        ValueError: a size is not positive.
    """
    if min(*from_size, *to_size) <= 0:
        raise ValueError(
            f"sizes: expected positive (width, height), got from_size={from_size}, "
            f"to_size={to_size}; give the image's size in pixels, (1000, 1000) or (1, 1)"
        )
    scale_x, scale_y = to_size[0] / from_size[0], to_size[1] / from_size[1]
    return boxes * boxes.new_tensor((scale_x, scale_y, scale_x, scale_y))


def pad_boxes(
    boxes: Sequence[Boxes], *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Stack the boxes of N problems into the padded layout of `pairwise_iou` and `match_boxes`.

    Args:
        boxes: N problems, each an (n, 4) tensor, array or nested list. An empty one may have any
            shape, including [].
        dtype: dtype of the result; float64 for an oracle.
    Returns:
        (N, K, 4) boxes, where K is the largest n, padded with zeros; and (N,) int64 counts. Both
        are on the device of the first problem that is a tensor.
    Raises:
        ValueError: a problem is not (n, 4).
    """
    device = next((p.device for p in boxes if isinstance(p, Tensor)), torch.device("cpu"))
    arrays = [_as_array(i, problem) for i, problem in enumerate(boxes)]
    counts = np.fromiter(map(len, arrays), np.int64, len(arrays))
    widest = int(counts.max(initial=0))
    flat = np.concatenate([_NO_BOXES, *arrays])  # (sum n, 4)
    # Box j of problem i goes to row i * widest + j.
    before = np.cumsum(counts) - counts
    shift = np.arange(len(arrays)) * widest - before
    padded = torch.zeros((len(arrays) * widest, 4), dtype=dtype)
    rows = torch.from_numpy(np.arange(len(flat)) + np.repeat(shift, counts))
    padded[rows] = torch.from_numpy(flat).to(dtype)
    return padded.view(len(arrays), widest, 4).to(device), torch.from_numpy(counts).to(device)


_NO_BOXES = np.zeros((0, 4), np.float32)


def _as_array(i: int, problem: Boxes) -> np.ndarray:
    """The boxes as an (n, 4) array on the CPU."""
    if isinstance(problem, Tensor):
        problem = problem.detach().cpu().double()
    floats = type(problem) is np.ndarray and problem.dtype.char in "fd"
    try:
        array = np.asarray(problem, dtype=None if floats else np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"boxes[{i}]: expected (n, 4) numbers, got {problem!r:.200}") from error
    if array.size == 0:
        return _NO_BOXES
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(
            f"boxes[{i}]: expected (n, 4), got {array.shape}; one box alone is [[x1, y1, x2, y2]]"
        )
    return array


def iou_reference(
    pred: Tensor, gt: Tensor, num_pred: Tensor, num_gt: Tensor, *, kind: str = "iou"
) -> Tensor:
    """`virft_fast.matching.pairwise_iou` in plain torch, for any device."""
    # float64, because products of float32 sides can neither overflow nor underflow in it.
    pred_valid = _valid_boxes(pred, num_pred)
    gt_valid = _valid_boxes(gt, num_gt)
    p = pred.detach().double().masked_fill(~pred_valid[..., None], 0.0)[:, :, None]  # (N, K, 1, 4)
    g = gt.detach().double().masked_fill(~gt_valid[..., None], 0.0)[:, None]  # (N, 1, M, 4)

    inter = _area(torch.maximum(p[..., :2], g[..., :2]), torch.minimum(p[..., 2:], g[..., 2:]))
    union = _area(p[..., :2], p[..., 2:]) + _area(g[..., :2], g[..., 2:]) - inter
    out = inter / union  # (N, K, M)
    if kind == "giou":
        hull = _area(torch.minimum(p[..., :2], g[..., :2]), torch.maximum(p[..., 2:], g[..., 2:]))
        out = out - (hull - union) / hull
    both_valid = pred_valid[:, :, None] & gt_valid[:, None]
    # The second condition is for float64 input whose areas exceed the range of float64.
    out = torch.where(both_valid & out.isfinite(), out, 0.0)
    return out.to(pred.dtype)


def check_problem(pred: Tensor, gt: Tensor, num_pred: Tensor, num_gt: Tensor) -> None:
    """Check the inputs that all matching functions share; the native module checks counts on a CPU.

    Raises:
        ValueError: shapes, dtypes, devices or counts disagree.
    """
    for name, value in dict(pred=pred, gt=gt, num_pred=num_pred, num_gt=num_gt).items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name}: expected a tensor, got {type(value).__name__}; torch.as_tensor makes one"
            )
    for name, boxes in (("pred", pred), ("gt", gt)):
        if boxes.ndim not in (2, 3) or boxes.shape[-1] != 4 or boxes.ndim != gt.ndim:
            raise ValueError(
                f"{name}: expected (N, boxes, 4) xyxy boxes, or pred and gt (boxes, 4) packed, got "
                f"{tuple(boxes.shape)}; add a batch axis for one problem, or use pad_boxes"
            )
        if not boxes.is_floating_point():
            raise ValueError(f"{name}: expected float32, got {boxes.dtype}; convert with .float()")
    packed = pred.ndim == 2 and num_pred.ndim > 0
    count = num_pred.shape[0] if packed else pred.shape[0]
    like_pred = pred.dtype == gt.dtype and pred.device == gt.device
    if not (like_pred and (packed or gt.shape[0] == count)):
        raise ValueError(
            f"gt: expected {count} problems of {pred.dtype} on {pred.device} as in pred, "
            f"got {tuple(gt.shape)} of {gt.dtype} on {gt.device}; convert one to match the other"
        )
    check_counts("num_pred", num_pred, count, pred.device)
    check_counts("num_gt", num_gt, count, gt.device)


def as_computed(pred: Tensor, gt: Tensor, num_pred: Tensor, num_gt: Tensor) -> tuple[Tensor, ...]:
    """A checked problem in the dtypes of the computation: float32 or float64, and int64."""
    check_problem(pred, gt, num_pred, num_gt)
    if pred.requires_grad or gt.requires_grad:
        pred, gt = pred.detach(), gt.detach()
    if pred.dtype not in (torch.float32, torch.float64):
        pred, gt = pred.float(), gt.float()
    if num_pred.dtype != torch.int64 or num_gt.dtype != torch.int64:
        num_pred, num_gt = num_pred.long(), num_gt.long()
    return pred, gt, num_pred, num_gt


def check_counts(name: str, counts: Tensor, problems: int, device: torch.device) -> None:
    """Raise ValueError if `counts` isn't one integer per problem, on `device`."""
    if counts.shape != (problems,) or counts.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name}: expected ({problems},) int64, got {tuple(counts.shape)} "
            f"{counts.dtype}; one count per problem"
        )
    if counts.device != device:
        raise ValueError(
            f"{name}: expected on {device} like what it counts, got {counts.device}; move it"
        )


def check_count_values(name: str, counts: Tensor, limit: int) -> None:
    """Raise ValueError if a count is negative or larger than the padding.

    Reading counts from a GPU synchronizes with it. Meta tensors and torch.compile have no values to
    read; the kernels bound the counts.
    """
    if counts.is_meta or torch.compiler.is_compiling():
        return
    if bool(((counts < 0) | (counts > limit)).any()):
        raise ValueError(
            f"{name}: expected counts in 0..{limit}, got {counts.tolist()}; "
            "a count can't exceed the padded number of boxes"
        )


def pad_rows(packed: Tensor, counts: Tensor) -> Tensor:
    """(S, ...) rows of N problems, one after the other -> (N, K, ...), padded with zeros.

    Raises:
        ValueError: the counts don't add up to S.
    """
    if int(counts.sum()) != len(packed) or bool((counts < 0).any()):
        raise ValueError(
            f"counts: expected counts that add up to the {len(packed)} packed boxes, got "
            f"{counts.tolist()}"
        )
    widest = int(counts.amax()) if len(counts) else 0
    padded = packed.new_zeros(len(counts), widest, *packed.shape[1:])
    padded[torch.arange(widest, device=counts.device) < counts[:, None]] = packed
    return padded


def unpad_rows(padded: Tensor, counts: Tensor) -> Tensor:
    """The inverse of `pad_rows`."""
    return padded[torch.arange(padded.shape[1], device=counts.device) < counts[:, None]]


def _valid_boxes(boxes: Tensor, counts: Tensor) -> Tensor:
    """(N, K) bool: the box is within its count, finite, and has positive width and height."""
    inside = torch.arange(boxes.shape[1], device=boxes.device) < counts[:, None]
    has_area = (boxes[..., 2:] > boxes[..., :2]).all(-1)
    return inside & has_area & boxes.isfinite().all(-1)


def _area(top_left: Tensor, bottom_right: Tensor) -> Tensor:
    size = (bottom_right - top_left).clamp(min=0)
    return size[..., 0] * size[..., 1]
