"""Boxes and matching: brute force, DETR's matcher properties, boxes as models write them."""

import itertools

import numpy as np
import pytest
import torch
from processes import run

from virft_fast.matching import (
    cxcywh_to_xyxy,
    match_boxes,
    pad_boxes,
    pairwise_iou,
    rescale_boxes,
    xywh_to_xyxy,
    xyxy_to_cxcywh,
    xyxy_to_xywh,
)

NAN, INF = float("nan"), float("inf")


def random_boxes(rng, n, size=10):
    """Integer corners on a small grid, so that overlaps, ties and duplicates are common."""
    corners = rng.integers(0, size, (n, 2))
    return np.concatenate([corners, corners + rng.integers(1, size, (n, 2))], 1).astype(float)


def random_problem(seed, problems=30, most=5):
    rng = np.random.default_rng(seed)
    pred = [random_boxes(rng, rng.integers(0, most + 1)) for _ in range(problems)]
    gt = [random_boxes(rng, rng.integers(0, most + 1)) for _ in range(problems)]
    (p, num_p), (g, num_g) = pad_boxes(pred), pad_boxes(gt)
    return pred, gt, (p, g, num_p, num_g)


def scalar_iou(a, b, kind="iou"):
    """Float64, one pair, written apart from the code under test."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    inter = w * h if w > 0 and h > 0 else 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    if kind == "iou":
        return inter / union
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return inter / union - (hull - union) / hull


def best_total(pred, gt, min_iou):
    """Largest summed IoU of pairs that count, over every injection."""
    worth = np.array([[scalar_iou(p, g) for g in gt] for p in pred]).reshape(len(pred), len(gt))
    worth = np.where(worth > min_iou, worth, 0.0)
    if worth.shape[0] > worth.shape[1]:
        worth = worth.T
    k, m = worth.shape
    orders = itertools.permutations(range(m), k)
    return max((sum(worth[i, j] for i, j in enumerate(o)) for o in orders), default=0.0)


@pytest.mark.parametrize("kind", ["iou", "giou"])
def test_pairwise_iou_equals_the_scalar_formula_and_is_zero_past_the_counts(kind):
    pred, gt, problem = random_problem(0)
    out = pairwise_iou(*problem, kind=kind)
    assert out.dtype == torch.float32
    for i, (ps, gs) in enumerate(zip(pred, gt, strict=True)):
        expected = np.zeros(out.shape[1:])
        for (j, p), (k, g) in itertools.product(enumerate(ps), enumerate(gs)):
            expected[j, k] = scalar_iou(p, g, kind)
        np.testing.assert_allclose(out[i].numpy(), expected, atol=1e-6)


def test_giou_of_distant_boxes_by_hand():
    # Two unit squares in opposite corners of a 10 x 10 hull: 0 - (100 - 2) / 100.
    pred, gt = torch.tensor([[[0.0, 0, 1, 1]]]), torch.tensor([[[9.0, 9, 10, 10]]])
    one = torch.ones(1, dtype=torch.int64)
    assert pairwise_iou(pred, gt, one, one, kind="giou").item() == pytest.approx(-0.98)
    assert pairwise_iou(pred, gt, one, one).item() == 0


@pytest.mark.parametrize("min_iou", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_hungarian_reaches_the_brute_force_optimum(seed, min_iou):
    pred, gt, problem = random_problem(seed)
    matches, ious = match_boxes(*problem, min_iou=min_iou)
    for i, (ps, gs) in enumerate(zip(pred, gt, strict=True)):
        total = ious[i].double().sum().item()
        assert total == pytest.approx(best_total(ps, gs, min_iou), abs=1e-5)
        taken = [j for j in matches[i].tolist() if j >= 0]
        assert len(taken) == len(set(taken))
        for j, (match, iou) in enumerate(zip(matches[i].tolist(), ious[i].tolist(), strict=True)):
            if match < 0:
                assert iou == 0
            else:
                assert iou == pytest.approx(scalar_iou(ps[j], gs[match]), abs=1e-6)
                assert iou > min_iou


def test_worthless_pairs_do_not_displace_counting_ones():
    # IoU: [[0.6, 0.45], [0.45, 0]]. The crossed pairing has the larger sum, 0.9, and nothing in it
    # counts; the threshold is applied first, so the one pair that counts is found.
    p, n = pad_boxes([[[0.0, 0, 6, 1], [5.5, 0, 10, 1]]])
    g, m = pad_boxes([[[0.0, 0, 10, 1], [0, 0, 2.7, 1]]])
    matches, ious = match_boxes(p, g, n, m, min_iou=0.5)
    assert matches.tolist() == [[0, -1]]
    np.testing.assert_allclose(ious.numpy(), [[0.6, 0]], rtol=1e-6)
    assert match_boxes(p, g, n, m, min_iou=0.4)[0].tolist() == [[1, 0]]


@pytest.mark.parametrize("method", ["hungarian", "greedy"])
def test_batch_of_two_equals_one_twice(method):
    _, _, (p, g, n, m) = random_problem(7, problems=2)
    both = match_boxes(p, g, n, m, method=method, min_iou=0.1)
    for i in range(2):
        one = slice(i, i + 1)
        alone = match_boxes(p[one], g[one], n[one], m[one], method=method, min_iou=0.1)
        assert torch.equal(alone[0], both[0][one]) and torch.equal(alone[1], both[1][one])


@pytest.mark.parametrize("method", ["hungarian", "greedy"])
@pytest.mark.parametrize("pred_n,gt_n", [(0, 0), (0, 2), (2, 0)])
def test_empty_sides_match_nothing_alone_and_mixed(method, pred_n, gt_n):
    box = [0.0, 0, 4, 4]
    for rest in ([], [[box]]):
        p, n = pad_boxes([[box] * pred_n, *rest])
        g, m = pad_boxes([[box] * gt_n, *rest])
        matches, ious = match_boxes(p, g, n, m, method=method)
        assert matches.shape == ious.shape == p.shape[:2]
        assert (matches[0] == -1).all() and (ious[0] == 0).all()
        if rest:
            assert matches[1, 0] == 0 and ious[1, 0] == 1


def test_no_problems():
    p, n = pad_boxes([])
    matches, ious = match_boxes(p, p, n, n)
    assert p.shape == (0, 0, 4) and matches.shape == ious.shape == (0, 0)


@pytest.mark.parametrize("method", ["hungarian", "greedy"])
@pytest.mark.parametrize("kind", ["iou", "giou"])
@pytest.mark.parametrize(
    "bad",
    [
        [5.0, 5, 5, 9],
        [5, 5, 9, 5],
        [9, 9, 5, 5],
        [9, 0, 5, 5],
        [NAN, 0, 5, 5],
        [0, 0, INF, 5],
        [-INF, -INF, INF, INF],
    ],
)
def test_degenerate_boxes_are_worth_zero_on_either_side(bad, kind, method):
    good = [0.0, 0, 10, 10]
    boxes, count = pad_boxes([[bad, good]])
    out = pairwise_iou(boxes, boxes, count, count, kind=kind)
    assert out.tolist() == [[[0, 0], [0, 1]]]
    matches, _ = match_boxes(boxes, boxes, count, count, method=method, min_iou=0.0)
    assert matches.tolist() == [[-1, 1]]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_iou_neither_overflows_nor_underflows(scale):
    a, n = pad_boxes([[[0, 0, 2 * scale, 2 * scale]]])
    b, _ = pad_boxes([[[0, 0, 2 * scale, 1 * scale]]])
    assert pairwise_iou(a, b, n, n).item() == 0.5


def test_rows_past_the_count_may_hold_anything():
    _, _, (p, g, n, m) = random_problem(3)
    junk_p, junk_g = p.clone(), g.clone()
    for i in range(len(n)):
        junk_p[i, n[i] :], junk_g[i, m[i] :] = NAN, 1.0
    for a, b in zip(match_boxes(p, g, n, m), match_boxes(junk_p, junk_g, n, m), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", ["hungarian", "greedy"])
def test_min_iou_is_strict(method):
    # [0, 0, 10, 10] and [0, 0, 10, 5]: 50 / 100, exactly one half.
    (p, n), (g, m) = pad_boxes([[[0, 0, 10, 10]]]), pad_boxes([[[0, 0, 10, 5]]])
    assert match_boxes(p, g, n, m, method=method, min_iou=0.5)[0].item() == -1
    assert match_boxes(p, g, n, m, method=method, min_iou=0.49)[0].item() == 0
    # 30 / 100: 0.3 has no exact float; both sides of the comparison round alike.
    g, m = pad_boxes([[[0, 0, 10, 3]]])
    assert match_boxes(p, g, n, m, method=method, min_iou=0.3)[0].item() == -1


def test_greedy_goes_by_score_and_takes_the_best_free_box():
    gt = [[0.0, 0, 10, 10], [0, 0, 10, 8]]
    pred = [[0.0, 0, 10, 9], [0, 0, 10, 10]]
    (p, n), (g, m) = pad_boxes([pred]), pad_boxes([gt])

    def greedy(scores):
        return match_boxes(p, g, n, m, method="greedy", scores=torch.tensor([scores]))[0].tolist()

    assert greedy([0.9, 0.1]) == [[0, 1]]  # first takes IoU 0.9 over 8/9, second what is left
    assert greedy([0.1, 0.9]) == [[1, 0]]
    assert greedy([NAN, 0.0]) == [[1, 0]]  # a NaN goes last
    assert greedy([0.5, 0.5]) == [[0, 1]]  # equal scores: the order given
    assert match_boxes(p, g, n, m, method="greedy")[0].tolist() == [[0, 1]]


def test_greedy_order_of_equal_scores_is_stable():
    box = [0.0, 0, 10, 10]
    p, n = pad_boxes([[box] * 20])
    g, m = pad_boxes([[box] * 7])
    matches, _ = match_boxes(p, g, n, m, method="greedy", scores=torch.full((1, 20), 0.3))
    assert matches[0].tolist() == list(range(7)) + [-1] * 13


def test_greedy_scores_of_padding_are_ignored():
    p, n = pad_boxes([[[0.0, 0, 4, 4]], [[0.0, 0, 4, 4]] * 3])
    g, m = pad_boxes([[[0.0, 0, 4, 4]], [[0.0, 0, 4, 4]]])
    scores = torch.tensor([[0.1, 9.0, NAN], [0.1, 0.2, 0.3]])
    matches, _ = match_boxes(p, g, n, m, method="greedy", scores=scores)
    assert matches.tolist() == [[0, -1, -1], [-1, -1, 0]]


def test_float64_boxes_keep_their_precision():
    p, n = pad_boxes([[[0.0, 0, 1 / 3, 1]]], dtype=torch.float64)
    g, m = pad_boxes([[[0.0, 0, 1 / 2, 1]]], dtype=torch.float64)
    _, ious = match_boxes(p, g, n, m)
    assert ious.dtype == torch.float64 and abs(ious.item() - 2 / 3) < 1e-15


def test_formats_and_spaces():
    xyxy = torch.tensor([[1.0, 2, 4, 8]])
    assert xyxy_to_cxcywh(xyxy).tolist() == [[2.5, 5, 3, 6]]
    assert xyxy_to_xywh(xyxy).tolist() == [[1, 2, 3, 6]]
    assert torch.equal(cxcywh_to_xyxy(xyxy_to_cxcywh(xyxy)), xyxy)
    assert torch.equal(xywh_to_xyxy(xyxy_to_xywh(xyxy)), xyxy)
    scaled = rescale_boxes(xyxy, from_size=(8, 16), to_size=(1000, 1000))
    assert scaled.tolist() == [[125, 125, 500, 500]]
    with pytest.raises(ValueError, match="positive"):
        rescale_boxes(xyxy, from_size=(0, 16), to_size=(1, 1))


def test_pad_boxes_pads_with_zeros_and_counts():
    padded, counts = pad_boxes([[], np.ones((2, 4)), torch.ones(1, 4)])
    assert padded.shape == (3, 2, 4) and padded.dtype == torch.float32
    assert counts.tolist() == [0, 2, 1] and counts.dtype == torch.int64
    assert padded.sum((1, 2)).tolist() == [0, 8, 4]
    with pytest.raises(ValueError, match=r"boxes\[0\]: expected \(n, 4\), got \(4,\)"):
        pad_boxes([[0, 0, 1, 1]])


BOX, ONE = torch.tensor([[[0.0, 0, 1, 1]]]), torch.ones(1, dtype=torch.int64)


@pytest.mark.parametrize(
    "arguments,options,message",
    [
        ((BOX[0], BOX, ONE, ONE), {}, "pred: expected .N, boxes, 4."),
        ((BOX, BOX[..., :3], ONE, ONE), {}, "gt: expected .N, boxes, 4."),
        ((BOX.long(), BOX, ONE, ONE), {}, "pred: expected float32"),
        ((BOX.half(), BOX, ONE, ONE), {}, "gt: expected 1 problems of torch.float16"),
        ((BOX, BOX.double(), ONE, ONE), {}, "gt: expected 1 problems of torch.float32"),
        ((BOX, BOX.repeat(2, 1, 1), ONE, ONE.repeat(2)), {}, "gt: expected 1 problems"),
        ((BOX, BOX, ONE.short(), ONE), {}, "num_pred: expected .1,. int64"),
        ((BOX, BOX, ONE, ONE.repeat(2)), {}, "num_gt: expected .1,. int64"),
        ((BOX, BOX, ONE * 2, ONE), {}, "num_pred: expected counts in 0..1"),
        ((BOX, BOX, ONE, -ONE), {}, "num_gt: expected counts in 0..1"),
        ((BOX, BOX, ONE, ONE), {"method": "auction"}, "method: expected one of"),
        ((BOX, BOX, ONE, ONE), {"min_iou": NAN}, "min_iou: expected a number in"),
        ((BOX, BOX, ONE, ONE), {"min_iou": 50}, "min_iou: expected a number in"),
        ((BOX, BOX, ONE, ONE), {"scores": torch.ones(1, 2)}, "scores: expected .1, 1."),
        ((BOX, BOX, ONE, ONE), {"scores": ONE[None]}, "scores: expected .1, 1. floating"),
    ],
)
def test_bad_input_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        match_boxes(*arguments, **options)


def test_unknown_iou_kind():
    with pytest.raises(ValueError, match="kind: expected one of"):
        pairwise_iou(BOX, BOX, ONE, ONE, kind="diou")


def test_without_the_native_module_the_reference_matches_and_says_so_once(tmp_path):
    code = """
import sys, warnings
sys.modules["virft_fast._C"] = None  # as if it had never been built
import torch
from virft_fast.matching import assign, is_native, match_boxes, pad_boxes, pairwise_iou
pred, n = pad_boxes([[[0.0, 0, 10, 10], [20, 20, 30, 30]]])
gt, m = pad_boxes([[[20.0, 20, 30, 31]]])
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        matches, ious = match_boxes(pred, gt, n, m)
        assert matches.tolist() == [[-1, 0]] and ious[0, 1] > 0.9
        assert pairwise_iou(pred, gt, n, m)[0, 1, 0] == ious[0, 1]
        assert match_boxes(pred[0], gt[0], n, m)[0].tolist() == [-1, 0]
        columns, total = assign(torch.tensor([[[4.0, 1, 3], [2, 0, 5], [3, 2, 2]]]))
        assert columns.tolist() == [[1, 0, 2]] and total.tolist() == [5]
assert not is_native()
(warning,) = [w for w in seen if "native matcher" in str(w.message)]
assert str(warning.message).endswith("import of virft_fast._C halted; None in sys.modules")
try:
    match_boxes(pred, gt, n + 5, m)
except ValueError as error:
    assert "num_pred: expected counts in 0..2, got [7]" in str(error)
else:
    raise AssertionError
"""
    done = run(module=code)
    assert done.returncode == 0, done.stderr


def test_a_module_built_for_another_version_is_not_used():
    code = """
import sys, types, warnings, torch
built = types.ModuleType("virft_fast._C")
built.build_info = lambda: {"version": "0.0", "cuda_archs": "none"}
sys.modules["virft_fast._C"] = built
import virft_fast
virft_fast._C = built
from virft_fast.matching import is_native, match_boxes, pad_boxes
assert not is_native()
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    boxes, counts = pad_boxes([[[0, 0, 1, 1]]])
    match_boxes(boxes, boxes, counts, counts)
assert "built for another virft_fast, 0.0" in str(seen[0].message), seen
"""
    done = run(module=code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("bad", [[[1, 2, 3]], ["abcd"], [[[1, 2, 3, 4], [1, 2]]], [7]])
def test_pad_boxes_names_what_is_no_box(bad):
    with pytest.raises(ValueError, match=r"boxes\[0\]: expected \(n, 4\)"):
        pad_boxes(bad)


def test_pad_boxes_takes_arrays_tensors_and_lists_alike():
    rows = [[0.5, 1, 2, 3], [4, 5, 6, 7.25]]
    kinds = [rows, np.array(rows), torch.tensor(rows), torch.tensor(rows).bfloat16(), [], [[]],
             torch.zeros(0, 4, requires_grad=True)]  # fmt: skip
    padded, counts = pad_boxes(kinds)
    assert counts.tolist() == [2, 2, 2, 2, 0, 0, 0] and padded.shape == (7, 2, 4)
    for i in range(4):
        assert padded[i].tolist() == rows
    assert not padded[4:].any()
    assert pad_boxes([])[0].shape == (0, 0, 4)
