"""Non-maximum suppression: plain, by group, and with the inclusive box convention."""

import torch
import torchvision
from torch import Tensor

from upsnet.operators import library


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: a box goes if it overlaps a better kept one by more than the threshold.

    Values are those of `torchvision.ops.nms`; among equal scores the earlier box comes first.

    Args:
        boxes: (N, 4) x1, y1, x2, y2; the width is x2 - x1.
        scores: (N,).
        iou_threshold: intersection over union, strictly above which a box is suppressed.

    Returns:
        Indices of the kept boxes by descending score, int64.

    Raises:
        ValueError: a shape that does not fit, by the tensor's name.
    """
    _check(boxes, scores)
    if not library.covers("nms_sorted", boxes):
        kept: Tensor = torchvision.ops.nms(boxes, scores, iou_threshold)
        return kept
    order = scores.sort(stable=True, descending=True).indices
    return order[torch.ops.upsnet.nms_sorted(boxes.index_select(0, order), None, iou_threshold)]


def nms_inclusive(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """`nms` for boxes whose last pixel belongs to them: width = x2 - x1 + 1, the convention of our networks."""
    return nms(to_exclusive(boxes), scores, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, inclusive: bool = False) -> Tensor:
    """`nms` within each group (class, level, image or a code of several): boxes of different groups never meet.

    Args:
        boxes: (N, 4) x1, y1, x2, y2.
        scores: (N,).
        groups: (N,) integers.
        iou_threshold: as in `nms`.
        inclusive: the boxes' last pixel belongs to them.

    Returns:
        Indices of the kept boxes of all groups by descending score (equal scores in the order given), int64.

    Raises:
        ValueError: a shape that does not fit, by the tensor's name.
    """
    _check(boxes, scores)
    if groups.shape != scores.shape:
        raise ValueError(f"batched_nms: groups has shape {tuple(groups.shape)}, {tuple(scores.shape)} is expected")
    if inclusive:
        boxes = to_exclusive(boxes)
    order = scores.sort(stable=True, descending=True).indices
    if library.covers("nms_sorted", boxes):
        by_group = groups[order].sort(stable=True).indices
        ordered = order[by_group]
        kept = torch.ops.upsnet.nms_sorted(boxes.index_select(0, ordered), groups[ordered].long(), iou_threshold)
        return order[by_group[kept].sort().values]
    flags = torch.zeros_like(scores, dtype=torch.bool)
    for group in groups.unique():
        members = (groups == group).nonzero().squeeze(1)
        flags[members[torchvision.ops.nms(boxes[members], scores[members], iou_threshold)]] = True
    return order[flags[order]]


def to_exclusive(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) with inclusive last pixels as boxes with width x2 - x1."""
    return boxes + boxes.new_tensor([0, 0, 1, 1])


def _check(boxes: Tensor, scores: Tensor) -> None:
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"nms: boxes has shape {tuple(boxes.shape)}, (N, 4) is expected")
    if scores.shape != boxes.shape[:1]:
        raise ValueError(f"nms: scores has shape {tuple(scores.shape)}, ({boxes.shape[0]},) is expected")


def _shape(boxes: Tensor, groups: Tensor | None, threshold: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


library.register("nms_sorted", _shape)
