"""Deformable convolution in plain loops over every output value, tap and channel."""

import math

import numpy as np


def bilinear(plane: np.ndarray, y: float, x: float) -> float:
    """Value of an H×W map at a real place; pixels outside the map are 0."""
    height, width = plane.shape
    if not (-1 < y < height and -1 < x < width):
        return 0.0
    top, left = math.floor(y), math.floor(x)
    value = 0.0
    for row, weight_y in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, weight_x in ((left, 1 - (x - left)), (left + 1, x - left)):
            if 0 <= row < height and 0 <= column < width:
                value += weight_y * weight_x * plane[row, column]
    return value


def deform_conv2d(
    input: np.ndarray,
    offset: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """All arrays float64, shapes as in `upsnet.operators.deform_conv2d`."""
    images, channels, _, _ = input.shape
    outputs, group_channels, kernel_h, kernel_w = weight.shape
    group_outputs = outputs // (channels // group_channels)
    taps = kernel_h * kernel_w
    per_group = channels // (offset.shape[1] // (2 * taps))
    result = np.zeros((images, outputs, *offset.shape[2:]))
    for n, o, row, column in np.ndindex(result.shape):
        total = 0.0 if bias is None else float(bias[o])
        for k, i, j in np.ndindex(group_channels, kernel_h, kernel_w):
            c = o // group_outputs * group_channels + k
            tap = (c // per_group) * taps + i * kernel_w + j
            y = row * stride[0] - padding[0] + i * dilation[0] + offset[n, 2 * tap, row, column]
            x = column * stride[1] - padding[1] + j * dilation[1] + offset[n, 2 * tap + 1, row, column]
            factor = 1.0 if mask is None else mask[n, tap, row, column]
            total += weight[o, k, i, j] * factor * bilinear(input[n, c], y, x)
        result[n, o, row, column] = total
    return result
