"""transformers' Hungarian matcher with the whole batch solved in one call.

    model = DetrForObjectDetection(config)
    use_our_matcher()    # DETR, YOLOS and Table Transformer then train with it

The costs are transformers' own; only the assignment is ours. Two things are faster: an image's
predictions are compared with its own targets alone, and no cost matrix goes through SciPy.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.image_transforms import center_to_corners_format
from transformers.loss import loss_for_object_detection as detr

from virft_fast.matching import assign, pairwise_iou


class BatchedMatcher(detr.HungarianMatcher):
    @torch.no_grad()
    def forward(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> list:
        """As `HungarianMatcher.forward`: (prediction indices, target indices) of each image."""
        logits, boxes = (
            outputs["logits"],
            outputs["pred_boxes"].float(),
        )  # (N, K, classes), (N, K, 4)
        labels = pad_sequence([t["class_labels"] for t in targets], batch_first=True)  # (N, M)
        true = pad_sequence([t["boxes"].float() for t in targets], batch_first=True)  # (N, M, 4)
        counts = torch.tensor([len(t["boxes"]) for t in targets], device=logits.device)
        probs = logits.float().softmax(-1)
        corners, true_corners = center_to_corners_format(boxes), center_to_corners_format(true)
        queries = torch.full_like(counts, boxes.shape[1])
        giou = pairwise_iou(corners, true_corners, queries, counts, kind="giou")  # (N, K, M)
        cost = self.bbox_cost * torch.cdist(boxes, true, p=1) - self.giou_cost * giou
        cost -= self.class_cost * probs.gather(2, labels[:, None].expand(-1, boxes.shape[1], -1))
        # A broken prediction is matched only where no other is left, as in transformers.
        cost = cost.nan_to_num(nan=1e9, posinf=1e9, neginf=1e9)
        matches, _ = assign(cost, num_cols=counts)
        pairs = []
        for columns in matches.cpu():
            rows = (columns >= 0).nonzero()[:, 0]
            pairs.append((rows, columns[rows]))
        return pairs


def use_our_matcher() -> None:
    """Make transformers' ForObjectDetectionLoss create this matcher."""
    detr.HungarianMatcher = BatchedMatcher
