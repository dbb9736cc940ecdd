"""Arithmetic on boxes (x1, y1, x2, y2) in inclusive pixels: width = x2 - x1 + 1.

The conventions are those of the first Faster R-CNN; released UPSNet weights depend on each +1 and -1 here.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_LOG_RATIO = math.log(1000.0 / 16.0)
"""Upper bound of the predicted log width and height ratios: exp of more would leave every photo."""


def widths_heights(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Widths and heights of ...×4 boxes."""
    return boxes[..., 2] - boxes[..., 0] + 1, boxes[..., 3] - boxes[..., 1] + 1


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of every pair: N×4, M×4 → N×M float32.

    Anchor matching compares IoUs for equality, so the rounding is part of the definition: everything is float32 but
    the areas, from the + 1 on, and the union, which are float64; the areas of `others` and the union are then rounded
    to float32.
    """
    intersection = _intersections(boxes, others)
    union = (_areas(boxes)[:, None] + _areas(others).float()).sub_(intersection)
    return intersection.div_(union.float())


def box_coverage(boxes: Tensor, regions: Tensor) -> Tensor:
    """Share of each box that lies in each region: N×4, M×4 → N×M float32, 0..1 (pycocotools' overlap with a crowd)."""
    return _intersections(boxes, regions).div_(_areas(boxes).float()[:, None])


def _areas(boxes: Tensor) -> Tensor:
    """float64."""
    width, height = ((boxes[:, i + 2] - boxes[:, i]).double() + 1 for i in (0, 1))
    return width * height


def _intersections(boxes: Tensor, others: Tensor) -> Tensor:
    # In place: of tens of thousands of anchors and a hundred boxes each of these is a large matrix.
    width, height = (
        torch.minimum(boxes[:, None, i + 2], others[:, i + 2])
        .sub_(torch.maximum(boxes[:, None, i], others[:, i]))
        .add_(1)
        .clamp_(min=0)
        for i in (0, 1)
    )
    return width.mul_(height)


def encode(boxes: Tensor, targets: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Offsets (dx, dy, dw, dh) from N×4 boxes to N×4 targets (R-CNN, appendix C), times the weights."""
    (width, height), (target_width, target_height) = widths_heights(boxes), widths_heights(targets)
    center_x, center_y = boxes[:, 0] + 0.5 * width, boxes[:, 1] + 0.5 * height
    target_x, target_y = targets[:, 0] + 0.5 * target_width, targets[:, 1] + 0.5 * target_height
    return torch.stack(
        [
            weights[0] * (target_x - center_x) / width,
            weights[1] * (target_y - center_y) / height,
            weights[2] * torch.log(target_width / width),
            weights[3] * torch.log(target_height / height),
        ],
        dim=1,
    )


def decode(boxes: Tensor, deltas: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Moves ...×4 boxes by ...×4 offsets: the inverse of `encode`, with the size ratios bounded by 1000/16."""
    width, height = widths_heights(boxes)
    center_x, center_y = boxes[..., 0] + 0.5 * width, boxes[..., 1] + 0.5 * height
    dx, dy = deltas[..., 0] / weights[0], deltas[..., 1] / weights[1]
    dw = (deltas[..., 2] / weights[2]).clamp(max=MAX_LOG_RATIO)
    dh = (deltas[..., 3] / weights[3]).clamp(max=MAX_LOG_RATIO)
    new_x, new_y = dx * width + center_x, dy * height + center_y
    half_width, half_height = 0.5 * (torch.exp(dw) * width), 0.5 * (torch.exp(dh) * height)
    return torch.stack(
        [new_x - half_width, new_y - half_height, new_x + half_width - 1, new_y + half_height - 1], dim=-1
    )


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """...×4 boxes cut to an image of this height and width."""
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack(
        [x1.clamp(0, width - 1), y1.clamp(0, height - 1), x2.clamp(0, width - 1), y2.clamp(0, height - 1)], dim=-1
    )
