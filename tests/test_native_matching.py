"""The native matcher against scipy and its Python reference, on problems of every kind."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from virft_fast.matching import assign, is_native, match_boxes, pad_boxes, pairwise_iou
from virft_fast.matching.boxes import iou_reference
from virft_fast.matching.reference import assign_reference, match_reference

pytestmark = pytest.mark.skipif(not is_native(), reason="the native matcher is not built")

STRANGE = (float("nan"), float("inf"), -float("inf"), 0.0, -5.0, 1e30, 1e-30, 1e-200, 1e200)


def boxes(rng, count, *, whole=False, strange=0.0, size=100.0):
    """(count, 4) corners; a share `strange` of the coordinates is what models also write."""
    corner, extent = rng.uniform(0, size, (count, 2)), rng.uniform(1, size, (count, 2))
    out = np.concatenate([corner, corner + extent], 1)
    out = np.floor(out) if whole else out
    bad = rng.random(out.shape) < strange
    out[bad] = rng.choice(STRANGE, bad.sum())
    return out


def problems(seed, count, most, *, dtype=torch.float64, **kind):
    """Padded problems of 0..most boxes a side; every fifth repeats some of its boxes."""
    rng = np.random.default_rng(seed)
    sides = []
    for _ in range(2):
        side = [boxes(rng, rng.integers(0, most + 1), **kind) for _ in range(count)]
        for rows in side[::5]:
            rows[len(rows) // 2 :] = rows[: len(rows) - len(rows) // 2]
        sides.append(pad_boxes(side, dtype=dtype))
    (pred, num_pred), (gt, num_gt) = sides
    return pred, gt, num_pred, num_gt


KINDS = [
    {"most": 6, "whole": True},
    {"most": 8, "strange": 0.1},
    {"most": 32},
    {"most": 40, "strange": 0.02},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_iou_equals_the_reference_to_the_bit(kind, dtype):
    problem = problems(1, 300, dtype=dtype, **kind)
    for name in ("iou", "giou"):
        ours, expected = pairwise_iou(*problem, kind=name), iou_reference(*problem, kind=name)
        assert ours.dtype == dtype and torch.equal(ours, expected)
        assert ours.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_total_equals_scipys_on_ten_thousand_problems(kind, dtype):
    """1,250 problems a case and threshold: 10,000 of each dtype."""
    for seed, min_iou in ((2, 0.0), (20, 0.5)):
        problem = problems(seed + 100 * (dtype == torch.float64), 1250, dtype=dtype, **kind)
        table = iou_reference(*problem)
        worth = torch.where(table > min_iou, table, 0.0).double().numpy()
        matches, ious = match_boxes(*problem, min_iou=min_iou)
        totals = ious.double().sum(1)
        for n, (k, m) in enumerate(zip(problem[2].tolist(), problem[3].tolist(), strict=True)):
            rows, columns = linear_sum_assignment(worth[n, :k, :m], maximize=True)
            assert totals[n] == pytest.approx(worth[n][rows, columns].sum(), abs=1e-5)
            pairs = [(r, c) for r, c in enumerate(matches[n].tolist()) if c >= 0]
            assert len({c for _, c in pairs}) == len(pairs)
            for r, c in pairs:
                assert r < k and c < m and 0 < ious[n, r] == worth[n, r, c]


@pytest.mark.parametrize("method", ["hungarian", "greedy"])
def test_indices_equal_the_references_where_there_is_no_tie(method):
    """Boxes with random corners have no two equal IoUs but 0, and worthless pairs are no pairs."""
    problem = problems(3, 1000, 24)
    pred, gt, num_pred, num_gt = problem
    gt += torch.rand(gt.shape, generator=torch.Generator().manual_seed(0), dtype=gt.dtype) / 10
    pred += torch.rand(pred.shape, generator=torch.Generator().manual_seed(1), dtype=gt.dtype) / 10
    scores = torch.rand(pred.shape[:2], generator=torch.Generator().manual_seed(2))
    for min_iou in (0.0, 0.3, 0.5):
        ours = match_boxes(*problem, method=method, scores=scores, min_iou=min_iou)
        expected = match_reference(*problem, method == "greedy", scores, min_iou)
        assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


def test_greedy_equals_the_reference_with_ties_and_nan():
    problem = problems(4, 1500, 12, whole=True, strange=0.05, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, problem[0].shape[:2], generator=generator) / 3
    scores[torch.rand(scores.shape, generator=generator) < 0.1] = float("nan")
    for given in (scores, None):
        ours = match_boxes(*problem, method="greedy", scores=given, min_iou=0.2)
        expected = match_reference(*problem, True, given, 0.2)
        assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


@pytest.mark.parametrize(("most_pred", "most_gt"), [(300, 20), (20, 300), (100, 100), (129, 65)])
def test_large_problems(most_pred, most_gt):
    rng = np.random.default_rng(5)
    pred, num_pred = pad_boxes([boxes(rng, most_pred, size=300.0) for _ in range(4)])
    gt, num_gt = pad_boxes([boxes(rng, most_gt, size=300.0) for _ in range(4)])
    worth = iou_reference(pred, gt, num_pred, num_gt).double().numpy()
    totals = match_boxes(pred, gt, num_pred, num_gt, min_iou=0.0)[1].double().sum(1)
    for n in range(4):
        rows, columns = linear_sum_assignment(worth[n], maximize=True)
        assert totals[n] == pytest.approx(worth[n][rows, columns].sum(), abs=1e-4)


def test_permuting_either_side_permutes_the_answer():
    pred, gt, num_pred, num_gt = problems(6, 200, 10)
    k, m = pred.shape[1], gt.shape[1]
    num_pred, num_gt = torch.full_like(num_pred, k), torch.full_like(num_gt, m)
    noise = torch.Generator().manual_seed(0)
    pred = (
        torch.rand(pred.shape, generator=noise, dtype=pred.dtype).sort(-1).values[..., [0, 1, 2, 3]]
    )
    gt = torch.rand(gt.shape, generator=noise, dtype=gt.dtype).sort(-1).values
    order, other = torch.randperm(k, generator=noise), torch.randperm(m, generator=noise)
    matches, ious = match_boxes(pred, gt, num_pred, num_gt, min_iou=0.0)
    moved, moved_ious = match_boxes(pred[:, order], gt[:, other], num_pred, num_gt, min_iou=0.0)
    back = torch.where(moved >= 0, other[moved.clamp(min=0)], -1)
    assert torch.equal(back, matches[:, order]) and torch.equal(moved_ious, ious[:, order])
    assert (matches >= 0).any()


def test_layout_of_the_tensors_does_not_matter():
    pred, gt, num_pred, num_gt = problems(7, 50, 6, dtype=torch.float32)
    expected = match_boxes(pred, gt, num_pred, num_gt, min_iou=0.1)
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (pred, gt)]
    counts = [torch.stack([c, c], 1)[:, 0] for c in (num_pred, num_gt)]
    assert not strided[0].is_contiguous() and not counts[0].is_contiguous()
    ours = match_boxes(*strided, *counts, min_iou=0.1)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert torch.equal(pairwise_iou(*strided, *counts), pairwise_iou(pred, gt, num_pred, num_gt))


def test_threads_change_nothing():
    problem = problems(8, 3000, 12, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        answers = []
        for count in (1, 4):
            torch.set_num_threads(count)
            answers.append(match_boxes(*problem, min_iou=0.0))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def test_a_large_batch_is_spread_over_threads():
    """The calling thread does about half of the work of two, however busy the machine is."""
    problem = problems(8, 4096, 32, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        match_boxes(*problem, min_iou=0.0)  # starts the threads
        own, whole = time.thread_time(), time.process_time()
        for _ in range(5):
            match_boxes(*problem, min_iou=0.0)
        own, whole = time.thread_time() - own, time.process_time() - whole
    finally:
        torch.set_num_threads(threads)
    assert own < 0.75 * whole


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_threads_are_those_of_torch():
    """One OpenMP library in a process that imports only torch and the matcher."""
    program = (
        "import torch, virft_fast.matching as m\n"
        "from pathlib import Path\n"
        "assert m.is_native()\n"
        "paths = {line.split()[-1] for line in open('/proc/self/maps')}\n"
        "print(sum('omp' in Path(path).name.partition('.')[0] for path in paths))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stdout.strip() == "1", answer


def operator_arguments():
    pred, gt, num_pred, num_gt = problems(9, 3, 4, dtype=torch.float32)
    return pred, gt, num_pred, num_gt


def test_operators_pass_opcheck():
    problem = operator_arguments()
    torch.library.opcheck(torch.ops.virft_fast.pairwise_iou.default, (*problem, True))
    scores = torch.rand(problem[0].shape[:2], dtype=torch.float64)
    for arguments in ((None, False, 0.5), (scores, True, 0.1)):
        torch.library.opcheck(torch.ops.virft_fast.match_boxes.default, (*problem, *arguments))
    costs = (torch.rand(3, 4, 5), torch.tensor([4, 0, 2]), torch.tensor([5, 3, 1]))
    torch.library.opcheck(torch.ops.virft_fast.assign.default, (*costs, True))


def test_compiles_without_a_graph_break():
    def both(pred, gt, num_pred, num_gt):
        matches, ious = match_boxes(pred, gt, num_pred, num_gt, min_iou=0.1)
        table = pairwise_iou(pred, gt, num_pred, num_gt, kind="giou")
        return matches + 1, ious * 2, table, *assign(table, num_pred, num_gt, maximize=True)

    problem = operator_arguments()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(*problem), both(*problem), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda p, g, n, m: (p[:, :, :3], g, n, m), "pred: expected (N, boxes, 4)"),
        (lambda p, g, n, m: (p, g.double(), n, m), "gt: expected 3 problems"),
        (lambda p, g, n, m: (p, g[:2], n, m), "gt: expected 3 problems"),
        (lambda p, g, n, m: (p, g, n.float(), m), "num_pred: expected"),
        (lambda p, g, n, m: (p[0], g[0], n, m), "num_pred: expected counts that add up to"),
        (lambda p, g, n, m: (p, g, n, m[:2]), "num_gt: expected"),
        (lambda p, g, n, m: (p, g, n + 100, m), "num_pred: expected counts in 0..4, got 10"),
        (lambda p, g, n, m: (p, g, n, m - 100), "num_gt: expected counts in 0..3, got -"),
    ],
)
def test_direct_calls_can_not_read_past_a_tensor(spoil, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        torch.ops.virft_fast.match_boxes(*spoil(*operator_arguments()), None, False, 0.5)


def test_build_info():
    from virft_fast import __version__
    from virft_fast._C import build_info

    info = build_info()
    assert info["version"] == __version__
    known = {"version", "interface", "compiler", "cuda_archs", "threads", "instructions"}
    assert set(info) == known
    if sys.platform.startswith("linux"):
        assert info["threads"] == "OpenMP"


@pytest.mark.parametrize("method", ["hungarian", "greedy"])
def test_packed_boxes_match_as_padded_ones(method):
    pred, gt, num_pred, num_gt = problems(11, 200, 12, strange=0.05)
    scores = torch.rand(pred.shape[:2]) if method == "greedy" else None
    options = {"method": method, "min_iou": 0.1}
    expected = match_boxes(pred, gt, num_pred, num_gt, scores=scores, **options)
    inside = torch.arange(pred.shape[1]) < num_pred[:, None]
    in_gt = torch.arange(gt.shape[1]) < num_gt[:, None]
    packed_scores = None if scores is None else scores[inside]
    packed = match_boxes(pred[inside], gt[in_gt], num_pred, num_gt, scores=packed_scores, **options)
    for ours, theirs in zip(packed, expected, strict=True):
        assert torch.equal(ours, theirs[inside])
    none = match_boxes(pred[inside][:0], gt[in_gt], num_pred * 0, num_gt)
    assert [len(part) for part in none] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_boxes_and_counts_are_computed_in_float32(dtype):
    pred, gt, num_pred, num_gt = problems(12, 50, 8, whole=True)
    pred, gt = pred.to(dtype), gt.to(dtype)
    ours = match_boxes(pred, gt, num_pred.int(), num_gt.int())
    expected = match_boxes(pred.float(), gt.float(), num_pred, num_gt)
    assert ours[1].dtype == torch.float32 and ours[0].dtype == torch.int64
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    tables = (
        pairwise_iou(pred, gt, num_pred, num_gt),
        pairwise_iou(pred.float(), gt.float(), num_pred, num_gt),
    )
    assert torch.equal(*tables)


def cost_problems(seed, count, most, *, dtype=torch.float64, forbidden=0.0, whole=False):
    """Padded cost matrices of 0..most rows and columns, NaN past the counts."""
    rng = np.random.default_rng(seed)
    num_rows, num_cols = rng.integers(0, most + 1, (2, count))
    cost = rng.normal(size=(count, most, most)) * 10.0 ** rng.integers(-3, 4, (count, 1, 1))
    cost = np.floor(cost) if whole else cost
    cost[rng.random(cost.shape) < forbidden] = np.inf
    cost = torch.from_numpy(cost).to(dtype)
    outside = (torch.arange(most)[:, None] >= torch.from_numpy(num_rows)[:, None, None]) | (
        torch.arange(most) >= torch.from_numpy(num_cols)[:, None, None]
    )
    cost[outside] = torch.nan
    return cost, torch.from_numpy(num_rows), torch.from_numpy(num_cols)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("count", "most", "whole"), [(400, 8, True), (200, 33, False), (20, 130, False)]
)
def test_assign_reaches_scipys_total(count, most, whole, dtype, maximize):
    cost, num_rows, num_cols = cost_problems(13, count, most, dtype=dtype, whole=whole)
    matches, total = assign(cost, num_rows, num_cols, maximize=maximize)
    for n, (k, m) in enumerate(zip(num_rows.tolist(), num_cols.tolist(), strict=True)):
        matrix = cost[n, :k, :m].double().numpy()
        rows, columns = linear_sum_assignment(matrix, maximize=maximize)
        best = matrix[rows, columns].sum()
        assert total[n].item() == pytest.approx(best, rel=1e-12, abs=1e-12)
        chosen = matches[n, :k][matches[n, :k] >= 0]
        assert len(chosen) == min(k, m) == len(chosen.unique()) and (chosen < m).all()
        assert (matches[n, k:] == -1).all()


@pytest.mark.parametrize("most", [6, 40])
def test_forbidden_pairs_are_avoided_before_costs_are_saved(most):
    cost, num_rows, num_cols = cost_problems(14, 200, most, forbidden=0.6)
    ours = assign(cost, num_rows, num_cols)
    expected = assign_reference(cost, num_rows, num_cols, False)
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-9, atol=1e-9)
    assert torch.equal((ours[0] >= 0).sum(1), (expected[0] >= 0).sum(1))
    for n, row in (ours[0] >= 0).nonzero().tolist():
        assert cost[n, row, ours[0][n, row]].isfinite()
    turned = assign(-cost, num_rows, num_cols, maximize=True)
    assert torch.equal(turned[0], ours[0]) and torch.equal(turned[1], -ours[1])
    if most == 6:  # against every possible choice
        for n in range(40):
            matrix = cost[n, : num_rows[n], : num_cols[n]].numpy()
            assert best_choice(matrix) == pytest.approx(
                (int((ours[0][n] >= 0).sum()), -ours[1][n].item()), abs=1e-9
            )


def best_choice(matrix):
    """The largest number of allowed pairs, and minus their least cost, by trying all."""
    if not len(matrix):
        return (0, 0.0)
    answers = [best_choice(matrix[1:])]
    for column in np.flatnonzero(np.isfinite(matrix[0])):
        pairs, gain = best_choice(np.delete(matrix[1:], column, 1))
        answers.append((pairs + 1, gain - matrix[0, column]))
    return max(answers)


# scipy's own cases: https://github.com/scipy/scipy, optimize/tests/test_linear_assignment.py
@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ([[400, 150, 400], [400, 450, 600], [300, 225, 300]], [150, 400, 300]),
        ([[400, 150, 400, 1], [400, 450, 600, 2], [300, 225, 300, 3]], [150, 2, 300]),
        ([[10, 10, 8], [9, 8, 1], [9, 7, 4]], [10, 1, 7]),
        ([[10, 10, 8, 11], [9, 8, 1, 1], [9, 7, 4, 10]], [10, 1, 4]),
        ([[10, float("inf")], [float("inf"), 1]], [10, 1]),
        ([[7, 1, 2], [3, 4, 0]], [1, 0]),
    ],
)
def test_known_assignments(matrix, expected):
    cost = torch.tensor(matrix, dtype=torch.float64)
    for problem in (cost, cost.T, -cost, -cost.T):
        matches, total = assign(problem[None], maximize=bool((problem < 0).any()))
        rows = (matches[0] >= 0).nonzero()[:, 0]
        values = problem[rows, matches[0][rows]]
        assert sorted(values.abs().tolist()) == sorted(expected)
        assert total.abs().item() == sum(expected)


@pytest.mark.parametrize("sentinel", [1e9, 1e30, 3e38])
def test_huge_costs_that_are_avoided_do_not_blur_the_others(sentinel):
    rng = np.random.default_rng(16)
    cost = rng.normal(size=(60, 12, 15))
    cost[rng.random(cost.shape) < 0.3] = sentinel
    cost[:, 0] = np.where(np.arange(15) == 4, sentinel, sentinel * 2)  # one can't be avoided
    matches, total = assign(torch.from_numpy(cost))
    for n, matrix in enumerate(cost):
        rows, columns = linear_sum_assignment(matrix)
        ours = matrix[np.arange(12), matches[n].numpy()]
        assert np.sort(ours)[:11].sum() == pytest.approx(
            np.sort(matrix[rows, columns])[:11].sum(), rel=1e-6
        )
        assert total[n].item() == pytest.approx(matrix[rows, columns].sum(), rel=1e-12)


def test_a_list_of_matrices_of_any_kind():
    matrices = [np.array([[3, 1], [2, 9]]), torch.zeros(0, 4), torch.tensor([[5.0, 1.0, 2.0]])]
    matches, total = assign(matrices)
    assert matches.tolist() == [[1, 0], [-1, -1], [1, -1]] and total.tolist() == [3, 0, 1]
    assert assign([])[0].shape == (0, 0) and assign(torch.zeros(2, 0, 3))[1].tolist() == [0, 0]
    assert assign(torch.tensor([[[True, False]]]))[0].tolist() == [[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("how", ["contiguous", "transposed", "every second"])
def test_a_list_equals_the_padded_batch(dtype, how):
    cost, num_rows, num_cols = cost_problems(19, 60, 20, forbidden=0.2)
    cost = cost.nan_to_num(posinf=7.0).mul(100).to(dtype)
    matrices = []
    for matrix, rows, cols in zip(cost, num_rows, num_cols, strict=True):
        own = matrix[:rows, :cols]
        if how == "transposed":
            own = own.T.contiguous().T
        elif how == "every second":
            own = torch.stack([own, own + 1], -1)[..., 0]
        matrices.append(own)
    assert any(not matrix.is_contiguous() for matrix in matrices) or how == "contiguous"
    listed, padded = assign(matrices), assign(cost, num_rows, num_cols)
    assert torch.equal(listed[0], padded[0][:, : int(num_rows.max())])
    assert torch.equal(listed[1], padded[1])


def test_a_list_of_large_integers_keeps_their_digits():
    assert assign([torch.tensor([[2**30 + 1, 2**30]])])[1].tolist() == [2**30]


def test_costs_of_any_size_are_finite_inside():
    for scale in (1e308, 1e-308, 5e-324):
        cost = scale * torch.tensor([[[-1.7, 1.7, 0.0], [1.7, 0.0, -1.7]]], dtype=torch.float64)
        assert assign(cost)[0].tolist() == [[0, 2]]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((torch.zeros(2, 3),), "cost: expected (N, K, M)"),
        ((torch.zeros(1, 2, 2), torch.tensor([3])), "num_rows: expected counts in 0..2"),
        ((torch.zeros(1, 2, 2), None, torch.tensor([1, 1])), "num_cols: expected (1,) int64"),
        (([torch.zeros(2)],), "cost[0]: expected a matrix"),
        (([torch.zeros(1, 1, dtype=torch.complex64)],), "cost[0]: expected a matrix of real"),
        (([torch.zeros(1, 1), torch.zeros(1, 1, device="meta")],), "cost[1]: expected on cpu"),
        (([torch.tensor([[1.0, torch.nan]])],), "in problems [0]"),
        (([torch.zeros(2, 2)], torch.tensor([1])), "num_rows, num_cols: expected none"),
        ((torch.tensor([[[1.0, torch.nan]]]),), "in problems [0]"),
        ((torch.tensor([[[1.0, -torch.inf]]]),), "+inf to forbid a pair"),
    ],
)
def test_bad_costs_are_named(arguments, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        assign(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("most", [8, 32, 100, 1200])
def test_assign_on_cuda_equals_cpu(most, maximize):
    if not torch.cuda.is_available() or not is_native("cuda"):
        pytest.skip("needs a CUDA device and a CUDA build")
    cost, num_rows, num_cols = cost_problems(15, 4 if most > 100 else 200, most, forbidden=0.2)
    cost = -cost if maximize else cost
    expected = assign(cost, num_rows, num_cols, maximize=maximize)
    ours = assign(cost.cuda(), num_rows.cuda(), num_cols.cuda(), maximize=maximize)
    torch.testing.assert_close(ours[1].cpu(), expected[1], rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [*KINDS, {"most": 100}, {"most": 1500, "size": 3000.0}], ids=str)
def test_cuda_equals_cpu(kind, dtype):
    if not torch.cuda.is_available() or not is_native("cuda"):
        pytest.skip("needs a CUDA device and a CUDA build")
    problem = problems(10, 40 if kind["most"] > 40 else 1000, dtype=dtype, **kind)
    on_gpu = [tensor.cuda() for tensor in problem]
    for name in ("iou", "giou"):
        ours = pairwise_iou(*on_gpu, kind=name).cpu()
        assert torch.equal(ours, pairwise_iou(*problem, kind=name))
    scores = torch.rand(problem[0].shape[:2])
    for min_iou in (0.0, 0.5):
        matches, ious = match_boxes(*on_gpu, min_iou=min_iou)
        expected = match_boxes(*problem, min_iou=min_iou)
        assert matches.is_cuda and matches.shape == expected[0].shape
        totals, best = ious.cpu().double().sum(1), expected[1].double().sum(1)
        torch.testing.assert_close(totals, best, atol=1e-4, rtol=1e-5)
        greedy = match_boxes(*on_gpu, method="greedy", scores=scores.cuda(), min_iou=min_iou)
        expected = match_boxes(*problem, method="greedy", scores=scores, min_iou=min_iou)
        assert torch.equal(greedy[0].cpu(), expected[0])
        assert torch.equal(greedy[1].cpu(), expected[1])


def test_no_warning_where_the_module_is_there():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        match_boxes(*operator_arguments())
