"""RoIAlign (Mask R-CNN, section 3) over the levels of a feature pyramid."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

CANONICAL_SIZE = 224.0
"""Side of a box, in network pixels, that is pooled from level 4 (FPN, eq. 1)."""


def roi_levels(boxes: Tensor, num_levels: int = 4) -> Tensor:
    """Level 0..num_levels-1 (P2, P3, …) of N×4 inclusive boxes at network scale (FPN, eq. 1 with k0 = 4)."""
    side = torch.sqrt((boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1))
    # The small term stands inside the logarithm: so the released weights were trained.
    return torch.floor(2 + torch.log2(side / CANONICAL_SIZE + 1e-6)).clamp(0, num_levels - 1).long()


def pyramid_roi_align(features: Sequence[Tensor], rois: Tensor, output_size: int) -> Tensor:
    """Pools every RoI from the level that fits its size.

    Args:
        features: levels B×C×H×W at strides 4, 8, 16, 32.
        rois: R×5 (image index, x1, y1, x2, y2) at network scale, float32.
        output_size: side of the pooled squares.

    Returns:
        R×C×output_size×output_size, in the order of the RoIs: the mean of 2×2 bilinear samples a bin, coordinates
        without half-pixel shift. Half precision computes in float32 and returns the features' dtype.
    """
    levels = roi_levels(rois[:, 1:], len(features))
    pooled = features[0].new_zeros(len(rois), features[0].shape[1], output_size, output_size)
    # The eight bits of bfloat16 would move a box at 1000 pixels by up to 4.
    dtype = torch.promote_types(pooled.dtype, torch.float32)
    for i, feature in enumerate(features):
        members = torch.nonzero(levels == i).flatten()
        if len(members):
            part = roi_align(
                feature.to(dtype), rois[members].to(dtype), output_size, spatial_scale=1 / (4 * 2**i), sampling_ratio=2
            )
            pooled = pooled.index_copy(0, members, part.to(pooled.dtype))
    return pooled
