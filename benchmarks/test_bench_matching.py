"""Matching of many small problems: from boxes, from given costs, and in transformers' DETR.

    pytest benchmarks/test_bench_matching.py    three minutes

numpy and scipy start from one array per problem, as they expect; torch and ours from padded
tensors. "from lists" is ours on one array per problem, which it joins first.
torch-linear-assignment takes problems of one size only; smaller ones are padded with pairs of IoU
0. First, all contenders must reach the same total in each problem.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from measure import Case, contenders, provider

from virft_fast.matching import assign, is_native, match_boxes, pad_boxes

scipy = pytest.importorskip("scipy.optimize", reason="scipy: not installed; pip install scipy")
pytestmark = pytest.mark.skipif(not is_native(), reason="the native matcher is not built")

# name -> smallest and largest number of predictions, then of true boxes
SIZES = {
    "1..8": ((1, 8), (1, 8)),
    "1..32": ((1, 32), (1, 32)),
    "32x32": ((32, 32), (32, 32)),
    "100x100": ((100, 100), (100, 100)),
    "300x20": ((300, 300), (20, 20)),
}
COUNTS = (64, 4096)
TLA = "torch-linear-assignment"
THREADS = {"ours, 1 thread": 1, "ours, 2 threads": 2, "ours, 1 thread, from lists": 1}
OURS = (*THREADS, "ours, CUDA")
SCIPY = ("numpy IoU + scipy", "torchvision-style IoU + scipy", "scipy's assignment alone")
DETR = ("transformers' HungarianMatcher", "ours inside it")
EXAMPLE = Path(__file__).parent.parent / "examples/detr_matcher.py"


def boxes(rng, count):
    corner, extent = rng.uniform(0, 800, (count, 2)), rng.uniform(20, 420, (count, 2))
    return np.concatenate([corner, corner + extent], 1).astype(np.float32)


def iou(a, b, lib):
    """(..., k, m) as detection code usually computes it, with numpy or torch."""
    a, b = a[..., :, None, :], b[..., None, :, :]
    size = lib.minimum(a[..., 2:], b[..., 2:]) - lib.maximum(a[..., :2], b[..., :2])
    inter = size[..., 0].clip(0) * size[..., 1].clip(0)
    areas = [(x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b)]
    return inter / (areas[0] + areas[1] - inter)


def solve(tables, **options):
    return [scipy.linear_sum_assignment(table, **options) for table in tables]


def totals(tables, pairs):
    return np.array([t[pair].sum(dtype=np.float64) for t, pair in zip(tables, pairs, strict=True)])


def with_ours(runs, function, tensors, from_lists):
    """The contenders, and ours with each number of threads, from lists and on a GPU."""
    runs |= dict.fromkeys(THREADS, partial(function, *tensors))
    runs["ours, 1 thread, from lists"] = from_lists
    runs["ours, CUDA"] = "needs a GPU, and the native matcher built with CUDA"
    if torch.cuda.is_available() and is_native("cuda"):
        runs["ours, CUDA"] = partial(function, *(tensor.cuda() for tensor in tensors))
    if not provider(TLA)[1]:
        runs.pop(TLA, None), runs.pop(f"torch IoU + {TLA}", None)
    return runs


@pytest.fixture(scope="module", params=product(COUNTS, SIZES), ids=lambda p: f"{p[0]}-{p[1]}")
def box_case(request, size):
    count, name = request.param
    count = 4 if size == "tiny" else count
    (low_k, high_k), (low_m, high_m) = SIZES[name]
    rng = np.random.default_rng(0)
    pred = [boxes(rng, rng.integers(low_k, high_k + 1)) for _ in range(count)]
    gt = [boxes(rng, rng.integers(low_m, high_m + 1)) for _ in range(count)]
    (p, num_pred), (g, num_gt) = pad_boxes(pred), pad_boxes(gt)
    tables = [iou(a, b, np) for a, b in zip(pred, gt, strict=True)]

    def numpy_and_scipy():
        return solve((iou(a, b, np) for a, b in zip(pred, gt, strict=True)), maximize=True)

    def torch_and_scipy():
        cut = zip(iou(p, g, torch).numpy(), num_pred.tolist(), num_gt.tolist(), strict=True)
        return solve((table[:k, :m] for table, k, m in cut), maximize=True)

    def linear_assignment():
        from torch_linear_assignment import batch_linear_assignment

        return batch_linear_assignment(-iou(p, g, torch).nan_to_num())  # padding has no area

    def from_lists():
        counts = [torch.tensor([len(x) for x in each]) for each in (pred, gt)]
        packed = [torch.from_numpy(np.concatenate(each)) for each in (pred, gt)]
        return match_boxes(*packed, *counts, min_iou=0.0)

    alone = partial(solve, tables, maximize=True)
    expected = totals(tables, alone())
    runs = dict(zip(SCIPY, (numpy_and_scipy, torch_and_scipy, alone), strict=True))
    runs[f"torch IoU + {TLA}"] = linear_assignment
    match = partial(match_boxes, min_iou=0.0)
    runs = with_ours(runs, match, (p, g, num_pred, num_gt), from_lists)
    for peer, run in runs.items():
        if isinstance(run, str):
            continue
        found = run()
        if peer in SCIPY:
            found = totals(tables, found)
        elif TLA in peer:
            picked = iou(p, g, torch).nan_to_num().gather(2, found.clamp(min=0)[..., None])[..., 0]
            found = (picked * (found >= 0)).double().sum(1)
        elif "lists" in peer:
            found = torch.stack([x.double().sum() for x in found[1].split(num_pred.tolist())])
        else:
            found = found[1].double().sum(1).cpu()
        np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=peer)
    return Case(f"boxes: {count} problems of {name}", runs, threads=THREADS)


@contenders(*SCIPY, f"torch IoU + {TLA}", *OURS)
def test_match_boxes(race, box_case, contender):
    race(box_case, contender)


@pytest.fixture(
    scope="module", params=product(COUNTS, [*SIZES][2:]), ids=lambda p: f"{p[0]}-{p[1]}"
)
def cost_case(request, size):
    count, name = request.param
    count = 4 if size == "tiny" else count
    (rows, _), (columns, _) = SIZES[name]
    tables = [*np.random.default_rng(0).uniform(0, 1, (count, rows, columns))]
    cost = torch.from_numpy(np.stack(tables))

    def linear_assignment():
        from torch_linear_assignment import batch_linear_assignment

        return batch_linear_assignment(cost)

    runs = {"scipy": partial(solve, tables), TLA: linear_assignment}
    runs = with_ours(runs, assign, (cost,), partial(assign, tables))
    expected = totals(tables, solve(tables))
    for peer, run in runs.items():
        if peer != "scipy" and callable(run):
            columns = run() if peer == TLA else run()[0]
            picked = cost.gather(2, columns.cpu().clamp(min=0)[..., None])[..., 0]
            found = (picked * (columns.cpu() >= 0)).sum(1)
            np.testing.assert_allclose(found, expected, rtol=1e-9, err_msg=peer)
    return Case(f"costs: {count} problems of {name}", runs, threads=THREADS)


@contenders("scipy", TLA, *OURS)
def test_assign(race, cost_case, contender):
    race(cost_case, contender)


@pytest.fixture(scope="module", params=[8, 64])
def detr_case(request):
    """Images of 100 queries with 1 to 20 targets, as in DETR on COCO."""
    pytest.importorskip("transformers", reason="not installed; pip install transformers")
    from transformers.loss.loss_for_object_detection import HungarianMatcher

    spec = importlib.util.spec_from_file_location("detr_matcher", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    random = torch.Generator().manual_seed(0)

    def cxcywh(*shape):
        centers, extents = torch.rand(2, *shape, 2, generator=random)
        return torch.cat([0.2 + 0.6 * centers, 0.05 + 0.3 * extents], -1)

    images = request.param
    logits = torch.randn(images, 100, 92, generator=random)
    outputs = {"logits": logits, "pred_boxes": cxcywh(images, 100)}
    targets = [
        {"class_labels": torch.randint(91, (n,), generator=random), "boxes": cxcywh(n)}
        for n in torch.randint(1, 21, (images,), generator=random).tolist()
    ]
    kinds = (HungarianMatcher, example.BatchedMatcher)
    runs = {
        name: partial(kind(class_cost=1, bbox_cost=5, giou_cost=2), outputs, targets)
        for name, kind in zip(DETR, kinds, strict=True)
    }
    for theirs, own in zip(*(run() for run in runs.values()), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(theirs, own, strict=True))
    return Case(f"DETR's matcher: {images} images, 100 queries, 1 to 20 targets", runs)


@contenders(*DETR)
def test_detr(race, detr_case, contender):
    race(detr_case, contender)
