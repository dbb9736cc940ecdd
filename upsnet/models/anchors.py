"""Anchor boxes of the region proposal network (Faster R-CNN, section 3.1.1)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def base_anchors(stride: int, ratios: Sequence[float] = (0.5, 1.0, 2.0), scales: Sequence[float] = (8.0,)) -> Tensor:
    """Anchors at cell (0, 0): A×4 float32, ratio by ratio (ratio = height / width), scale fastest.

    The sides are rounded (half to even) at the size of the cell and multiplied by the scale afterwards, so shapes are
    not exact scaled copies of each other between strides.
    """
    center = (stride - 1) / 2
    anchors = []
    for ratio in ratios:
        width = np.round(np.sqrt(stride * stride / ratio))
        height = np.round(width * ratio)
        for scale in scales:
            half_width, half_height = (width * scale - 1) / 2, (height * scale - 1) / 2
            anchors.append([center - half_width, center - half_height, center + half_width, center + half_height])
    return torch.tensor(anchors, dtype=torch.float32)


def grid_anchors(base: Tensor, height: int, width: int, stride: int) -> Tensor:
    """Anchors of a whole level: (height·width·A)×4 in the order row, column, anchor."""
    y = torch.arange(height, device=base.device) * stride
    x = torch.arange(width, device=base.device) * stride
    shift_y, shift_x = torch.meshgrid(y, x, indexing="ij")
    shifts = torch.stack([shift_x, shift_y, shift_x, shift_y], dim=-1).to(base.dtype)
    return (shifts[:, :, None, :] + base).reshape(-1, 4)
