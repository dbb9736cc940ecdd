"""Non-maximum suppression, box by box."""

import numpy as np


def overlap(a: np.ndarray, b: np.ndarray, extra: float) -> np.float32:
    """Intersection over union of two boxes in float32; `extra` is 1 where the last pixel belongs to the box."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        one, zero = np.float32(extra), np.float32(0)
        areas = [(box[2] + one - box[0]) * (box[3] + one - box[1]) for box in (a, b)]
        width = max(zero, min(a[2] + one, b[2] + one) - max(a[0], b[0]))
        height = max(zero, min(a[3] + one, b[3] + one) - max(a[1], b[1]))
        return np.float32(width * height) / (areas[0] + areas[1] - width * height)


def nms(
    boxes: np.ndarray, scores: np.ndarray, iou_threshold: float, groups: np.ndarray | None = None, extra: float = 0
) -> list[int]:
    """Kept indices by descending score, the earlier one first among equal scores."""
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        rivals = [k for k in kept if groups is None or groups[k] == groups[i]]
        if not any(float(overlap(boxes[k], boxes[i], extra)) > iou_threshold for k in rivals):
            kept.append(i)
    return kept
