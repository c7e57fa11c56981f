"""IoU and Hungarian matching of many small problems, from boxes to matches.

numpy and scipy start from one array per problem, as they expect; torch and ours from padded
tensors. "from lists" is ours with the padding included.
"""

from __future__ import annotations

import importlib.util
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from virft_fast.matching import is_native, match_boxes, pad_boxes

# name -> smallest and largest number of predictions, then of true boxes
SIZES = {
    "1..8": ((1, 8), (1, 8)),
    "1..32": ((1, 32), (1, 32)),
    "32x32": ((32, 32), (32, 32)),
    "100x100": ((100, 100), (100, 100)),
    "300x20": ((300, 300), (20, 20)),
}
CASES = [(count, size) for count in (64, 4096) for size in SIZES]


def boxes(rng, count):
    corner, extent = rng.uniform(0, 800, (count, 2)), rng.uniform(20, 420, (count, 2))
    return np.concatenate([corner, corner + extent], 1).astype(np.float32)


def problems(count, size):
    rng = np.random.default_rng(0)
    (low_k, high_k), (low_m, high_m) = SIZES[size]
    pred = [boxes(rng, rng.integers(low_k, high_k + 1)) for _ in range(count)]
    gt = [boxes(rng, rng.integers(low_m, high_m + 1)) for _ in range(count)]
    return pred, gt


def numpy_iou(a, b):
    """(k, m) IoU as detection code usually computes it."""
    top_left = np.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = np.minimum(a[:, None, 2:], b[None, :, 2:])
    size = np.clip(bottom_right - top_left, 0, None)
    inter = size[..., 0] * size[..., 1]
    area_a = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
    area_b = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    return inter / (area_a[:, None] + area_b[None] - inter)


def torch_iou(pred, gt):
    """(N, K, M) batched IoU of padded boxes by torchvision's formula."""
    top_left = torch.max(pred[:, :, None, :2], gt[:, None, :, :2])
    bottom_right = torch.min(pred[:, :, None, 2:], gt[:, None, :, 2:])
    size = (bottom_right - top_left).clamp(min=0)
    inter = size[..., 0] * size[..., 1]
    area_p = (pred[..., 2] - pred[..., 0]) * (pred[..., 3] - pred[..., 1])
    area_g = (gt[..., 2] - gt[..., 0]) * (gt[..., 3] - gt[..., 1])
    return inter / (area_p[:, :, None] + area_g[:, None] - inter)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_used(run):
    """CPU time of the process over that of the calling thread, which takes an equal share."""
    run()
    own, whole = time.thread_time(), time.process_time()
    for _ in range(5):
        run()
    return (time.process_time() - whole) / (time.thread_time() - own)


@pytest.mark.skipif(not is_native(), reason="the native matcher is not built")
@pytest.mark.parametrize(("count", "size"), CASES, ids=str)
def test_matching(race, count, size):
    pred, gt = problems(count, size)
    (p, num_pred), (g, num_gt) = pad_boxes(pred), pad_boxes(gt)
    tables = [numpy_iou(a, b) for a, b in zip(pred, gt, strict=True)]
    all_threads = torch.get_num_threads()

    def scipy_alone():
        return [linear_sum_assignment(table, maximize=True) for table in tables]

    def numpy_and_scipy():
        return [
            linear_sum_assignment(numpy_iou(a, b), maximize=True)
            for a, b in zip(pred, gt, strict=True)
        ]

    def torch_and_scipy():
        padded = torch_iou(p, g).numpy()
        return [
            linear_sum_assignment(table[:k, :m], maximize=True)
            for table, k, m in zip(padded, num_pred.tolist(), num_gt.tolist(), strict=True)
        ]

    def ours(count):
        with threads(count):
            return match_boxes(p, g, num_pred, num_gt, min_iou=0.0)

    def ours_from_lists():
        with threads(1):
            (p, num_pred), (g, num_gt) = pad_boxes(pred), pad_boxes(gt)
            return match_boxes(p, g, num_pred, num_gt, min_iou=0.0)

    def totals(pairs):
        return [t[pair].sum(dtype=np.float64) for t, pair in zip(tables, pairs, strict=True)]

    contenders = {
        "numpy IoU + scipy": numpy_and_scipy,
        "torchvision-style IoU + scipy": torch_and_scipy,
        "scipy's assignment alone": scipy_alone,
        "ours, 1 thread": lambda: ours(1),
        "ours, 1 thread, from lists": ours_from_lists,
        f"ours, all {all_threads} threads": lambda: ours(all_threads),
    }
    # First check that all contenders reach equal totals on each problem.
    expected = np.array(totals(scipy_alone()))
    found = [totals(numpy_and_scipy()), totals(torch_and_scipy())]
    found.append(ours_from_lists()[1].double().sum(1))
    found += [ours(number)[1].double().sum(1) for number in (1, all_threads)]
    if size in ("32x32", "100x100") and importlib.util.find_spec("torch_linear_assignment"):
        from torch_linear_assignment import batch_linear_assignment  # equal counts only

        def linear_assignment():
            return batch_linear_assignment(-torch_iou(p, g))

        contenders["torch IoU + torch-linear-assignment"] = linear_assignment
        columns = linear_assignment()[..., None]
        found.append(torch_iou(p, g).gather(2, columns)[..., 0].double().sum(1))
    if torch.cuda.is_available() and is_native("cuda"):
        on_gpu = [tensor.cuda() for tensor in (p, g, num_pred, num_gt)]

        def ours_cuda():
            answer = match_boxes(*on_gpu, min_iou=0.0)
            torch.cuda.synchronize()
            return answer

        contenders["ours, CUDA"] = ours_cuda
        found.append(ours_cuda()[1].double().sum(1).cpu())
    for each in found:
        np.testing.assert_allclose(each, expected, atol=1e-4)
    notes = {
        name: {"threads used": threads_used(run)}
        for name, run in contenders.items()
        if name.endswith(("thread", "threads"))
    }
    race(f"{count} problems of {size}", contenders, ours="ours, 1 thread", notes=notes)
