"""examples/detr_matcher.py in transformers' own losses."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import DetrConfig
from transformers.loss import loss_for_object_detection as detr

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("detr_matcher", ROOT / "examples/detr_matcher.py")
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


def batch(seed, images=6, queries=20, classes=5):
    random = torch.Generator().manual_seed(seed)

    def boxes(*shape):
        centers, sizes = torch.rand(2, *shape, 2, generator=random)
        return torch.cat([0.2 + 0.6 * centers, 0.05 + 0.3 * sizes], -1)

    logits = torch.randn(images, queries, classes + 1, generator=random)
    outputs = {"logits": logits, "pred_boxes": boxes(images, queries)}
    counts = torch.randint(0, 9, (images,), generator=random).tolist()
    targets = [
        {"class_labels": torch.randint(0, classes, (n,), generator=random), "boxes": boxes(n)}
        for n in counts
    ]
    return outputs, targets


@pytest.mark.parametrize("seed", range(5))
def test_the_pairs_are_transformers_own(seed):
    outputs, targets = batch(seed)
    ours = example.BatchedMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
    theirs = detr.HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
    for (rows, columns), (their_rows, their_columns) in zip(
        ours(outputs, targets), theirs(outputs, targets), strict=True
    ):
        assert torch.equal(rows, their_rows) and torch.equal(columns, their_columns)


def test_more_targets_than_queries_and_broken_predictions():
    outputs, targets = batch(7, queries=4)
    outputs["logits"][0, 1] = torch.nan
    ours = example.BatchedMatcher()(outputs, targets)
    theirs = detr.HungarianMatcher()(outputs, targets)
    for n, ((rows, columns), (their_rows, _)) in enumerate(zip(ours, theirs, strict=True)):
        assert len(rows) == len(their_rows) == min(4, len(targets[n]["boxes"]))
        assert len(columns.unique()) == len(columns)


def test_the_loss_is_transformers_own(monkeypatch):
    config = DetrConfig(
        use_timm_backbone=False,
        backbone_config={"model_type": "resnet"},
        num_labels=5,
        auxiliary_loss=False,
    )
    outputs, targets = batch(3)
    logits, boxes = (outputs[name].requires_grad_() for name in ("logits", "pred_boxes"))
    losses = []
    for _ in range(2):
        loss, _, _ = detr.ForObjectDetectionLoss(logits, targets, "cpu", boxes, config)
        losses.append((loss, *torch.autograd.grad(loss, (logits, boxes))))
        monkeypatch.setattr(detr, "HungarianMatcher", example.BatchedMatcher)
    for ours, theirs in zip(*losses, strict=True):
        assert torch.equal(ours, theirs)
