"""Non-maximum suppression: plain, by group, and with the inclusive box convention."""

from typing import Any

import torch
import torchvision
from torch import Tensor

from upsnet.operators import library


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, inclusive: bool = False) -> Tensor:
    """Greedy non-maximum suppression: a box goes if it overlaps a better kept one by more than the threshold.

    Values are those of `torchvision.ops.nms`; among equal scores the earlier box comes first.

    Args:
        boxes: (N, 4) x1, y1, x2, y2; the width is x2 - x1.
        scores: (N,).
        iou_threshold: intersection over union, strictly above which a box is suppressed.
        inclusive: the boxes' last pixel belongs to them, as in our networks: width = x2 - x1 + 1.

    Returns:
        Indices of the kept boxes by descending score, int64.

    Raises:
        ValueError: a shape that does not fit, by the tensor's name.
    """
    _check("nms", boxes, scores=scores)
    order = scores.sort(stable=True, descending=True).indices
    flags = nms_flags(boxes.index_select(0, order), iou_threshold, inclusive=inclusive)
    return order[flags.nonzero().squeeze(1)]


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, inclusive: bool = False) -> Tensor:
    """`nms` within each group (class, level, image or a code of several): boxes of different groups never meet.

    Args:
        boxes: (N, 4) x1, y1, x2, y2.
        scores: (N,).
        groups: (N,) integers.
        iou_threshold, inclusive: as in `nms`.

    Returns:
        Indices of the kept boxes of all groups by descending score (equal scores in the order given), int64.

    Raises:
        ValueError: a shape that does not fit, by the tensor's name.
    """
    _check("batched_nms", boxes, scores=scores, groups=groups)
    order = scores.sort(stable=True, descending=True).indices
    ordered_groups, by_group = groups[order].sort(stable=True)
    flags = nms_flags(boxes.index_select(0, order[by_group]), iou_threshold, ordered_groups, inclusive=inclusive)
    return order[torch.empty_like(flags).index_put_((by_group,), flags).nonzero().squeeze(1)]


def nms_flags(
    boxes: Tensor,
    iou_threshold: float,
    groups: Tensor | None = None,
    valid: Tensor | None = None,
    inclusive: bool = False,
) -> Tensor:
    """`nms` of boxes in order of preference, of fixed shape: nothing is asked of the device.

    Args:
        boxes: (N, 4) x1, y1, x2, y2, of each group the best one first.
        iou_threshold, inclusive: as in `nms`.
        groups: (N,) integers, equal ones side by side; one group if not given.
        valid: (N,) bool: the others neither stay nor suppress.

    Returns:
        Whether each box stays: (N,) bool.

    Raises:
        ValueError: a shape that does not fit, by the tensor's name.
    """
    _check("nms_flags", boxes, groups=groups, valid=valid)
    if boxes.dtype not in library.FLOATS:
        boxes = boxes.float()
    if library.covers("nms_flags", boxes):
        groups = None if groups is None else groups.long()
        flags: Tensor = torch.ops.upsnet.nms_flags(boxes, groups, valid, iou_threshold, inclusive)
        return flags
    return _plain_flags(boxes, iou_threshold, groups, valid, inclusive)


def _plain_flags(
    boxes: Tensor, iou_threshold: float, groups: Tensor | None, valid: Tensor | None, inclusive: bool
) -> Tensor:
    """The same through torchvision, group by group."""
    if inclusive:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + 1], dim=1)
    preference = torch.arange(len(boxes), 0, -1, device=boxes.device, dtype=boxes.dtype)
    flags = torch.zeros_like(preference, dtype=torch.bool)
    valid = torch.ones_like(flags) if valid is None else valid
    for members in [valid] if groups is None else [(groups == group) & valid for group in groups.unique()]:
        indices = members.nonzero().squeeze(1)
        flags[indices[torchvision.ops.nms(boxes[indices], preference[indices], iou_threshold)]] = True
    return flags


def _check(operator: str, boxes: Tensor, **others: Tensor | None) -> None:
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{operator}: boxes has shape {tuple(boxes.shape)}, (N, 4) is expected")
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != boxes.shape[:1]:
            raise ValueError(f"{operator}: {name} has shape {tuple(tensor.shape)}, ({boxes.shape[0]},) is expected")


def _shape(boxes: Tensor, groups: Tensor | None, valid: Tensor | None, threshold: float, inclusive: bool) -> Tensor:
    return boxes.new_empty(boxes.shape[0], dtype=torch.bool)


def _under_autocast(dtype: torch.dtype, boxes: Tensor, *others: Any) -> tuple[Any, ...]:
    return boxes.float(), *others


library.register("nms_flags", _shape, autocast=_under_autocast)
