"""What the vision tower needs to know about its images' sizes, computed on the host.

transformers' towers accept it as keyword arguments. Otherwise they compute it from the sizes, and
wait for the device several times in every block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from virft_fast.batch import Row
from virft_fast.devices import to_device


def vision_metadata(visual: Any, grid: Tensor, device: torch.device) -> Row:
    """Keyword arguments for `get_image_features`, equal to what the tower computes without them.

    Args:
        visual: the tower, of any family.
        grid: (images, 3) int64 on the CPU: frames, rows and columns of patches.
        device: the tower's.
    """
    from transformers import vision_utils as vision
    from transformers.utils.generic import is_flash_attention_requested

    merge = visual.spatial_merge_size
    given: Row = {
        "position_ids": vision.get_vision_position_ids(grid, merge),
        "cu_seqlens": vision.get_vision_cu_seqlens(grid),
    }
    if hasattr(visual, "window_size"):  # Qwen2.5-VL
        given["window_index"], given["cu_window_seqlens"] = vision.get_vision_window_index(
            grid, merge, visual.window_size, visual.patch_size
        )
    if hasattr(visual, "interpolation_mode"):  # Qwen3-VL
        given["interp_indices"], given["interp_weights"] = (
            vision.get_vision_interpolation_indices_and_weights(
                grid, visual.num_grid_per_side, visual.interpolation_mode,
                visual.interpolation_align_corners, merge,
            )
        )  # fmt: skip
    offsets = {name: value for name, value in given.items() if name.startswith("cu_")}
    moved = {name: to_device(value, device) for name, value in given.items()}
    if not is_flash_attention_requested(visual.config):
        return moved | offsets  # for the host, which splits the sequence at them
    longest = {name: int(value.diff().max()) for name, value in offsets.items()}
    return moved | {f"max_{name[3:-1]}": length for name, length in longest.items()}
