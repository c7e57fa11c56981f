"""Boxes: formats and coordinate spaces, pairwise IoU, and batched one-to-one matching."""

from virft_fast.matching.boxes import (
    cxcywh_to_xyxy,
    pad_boxes,
    rescale_boxes,
    xywh_to_xyxy,
    xyxy_to_cxcywh,
    xyxy_to_xywh,
)
from virft_fast.matching.solver import assign, is_native, match_boxes, pairwise_iou, why_not_native

__all__ = ["assign", "cxcywh_to_xyxy", "is_native", "match_boxes", "pad_boxes", "pairwise_iou",
           "rescale_boxes", "why_not_native", "xywh_to_xyxy", "xyxy_to_cxcywh",
           "xyxy_to_xywh"]  # fmt: skip
