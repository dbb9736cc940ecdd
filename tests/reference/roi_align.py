"""Slow, obvious twins of RoIAlign over a pyramid: one RoI at a time, and one sample at a time."""

import math

import torch
from torchvision.ops import roi_align


def level_of(box, num_levels=4):
    """0..num_levels-1 by the side of an inclusive box: FPN's rule with 224 pixels on level 2."""
    side = math.sqrt((box[2] - box[0] + 1) * (box[3] - box[1] + 1))
    return min(max(math.floor(2 + math.log2(side / 224 + 1e-6)), 0), num_levels - 1)


def pyramid_roi_align(features, rois, output_size, aligned=False):
    """torchvision's operator on each box alone; its gradients are those of the sum."""
    pooled = [torch.zeros(0, features[0].shape[1], output_size, output_size, dtype=features[0].dtype)]
    for roi in rois:
        level = level_of(roi[1:].tolist(), len(features))
        pooled.append(roi_align(features[level], roi[None], output_size, 1 / (4 * 2**level), 2, aligned))
    return torch.cat(pooled)


def bilinear(plane, y, x):
    """A sample at (y, x), pixel centres at whole numbers; 0 beyond one pixel from the border."""
    height, width = len(plane), len(plane[0])
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    above = plane[top][left] * (1 - dx) + plane[top][right] * dx
    below = plane[bottom][left] * (1 - dx) + plane[bottom][right] * dx
    return above * (1 - dy) + below * dy


def roi_align_by_samples(plane, box, scale, output_size, aligned=False):
    """One channel (list of rows), one box: the mean of 2×2 samples in each bin."""
    x1, y1, x2, y2 = (v * scale - (0.5 if aligned else 0.0) for v in box)
    width, height = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1.0), max(y2 - y1, 1.0))
    pooled = [[0.0] * output_size for _ in range(output_size)]
    for i in range(output_size):
        for j in range(output_size):
            for a in (0.25, 0.75):
                for b in (0.25, 0.75):
                    y, x = y1 + (i + a) * height / output_size, x1 + (j + b) * width / output_size
                    pooled[i][j] += bilinear(plane, y, x) / 4
    return pooled
