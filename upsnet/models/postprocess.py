"""From network resolution back to the photo: masks pasted, maps resized, the panoptic map cleaned up."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F

from upsnet.models.box_head import Candidates
from upsnet.structures.results import Detections, Segment, segments_of
from upsnet.structures.sample import VOID


def paste_masks(
    probabilities: Tensor, boxes: NDArray[np.float32], size: tuple[int, int], threshold: float = 0.5
) -> list[dict[str, Any]]:
    """Masks on the photo as COCO RLE (compressed, `counts` as text).

    Each mask gets a frame of one zero and its box grows by the same share around its centre (half sides without +1);
    the grown box is truncated to integers.

    Args:
        probabilities: N×M×M, 0..1. boxes: N×4 in photo pixels. size: height and width of the photo.
    """
    side = probabilities.shape[-1]
    framed = F.pad(probabilities.cpu().float(), (1, 1, 1, 1))
    grown = _grow(boxes, (side + 2) / side).astype(np.int32)
    return [_paste(mask, box, size, threshold) for mask, box in zip(framed, grown.tolist(), strict=True)]


def _grow(boxes: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    half = (boxes[:, 2:] - boxes[:, :2]) * np.float32(0.5)
    center = (boxes[:, 2:] + boxes[:, :2]) * np.float32(0.5)
    half = half * np.float32(factor)
    return np.concatenate([center - half, center + half], axis=1)


def _paste(mask: Tensor, box: list[int], size: tuple[int, int], threshold: float) -> dict[str, Any]:
    x1, y1, x2, y2 = box
    height, width = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
    resized = F.interpolate(mask[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]
    canvas = np.zeros(size, dtype=np.uint8, order="F")
    # A box that clipping turned inside out by a fraction of a pixel covers nothing.
    top, bottom = max(y1, 0), min(y2 + 1, size[0])
    left, right = max(x1, 0), min(x2 + 1, size[1])
    if top < bottom and left < right:
        canvas[top:bottom, left:right] = (resized > threshold).numpy()[top - y1 : bottom - y1, left - x1 : right - x1]
    rle = coco_mask.encode(canvas)
    return {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")}


def detections_on_photo(
    found: Candidates, mask_logits: Tensor, scale: float, original_size: tuple[int, int]
) -> Detections:
    """Detections in photo pixels. mask_logits: N×M×M of each detection's class."""
    boxes = (found.boxes / scale).cpu().numpy().astype(np.float32)
    return Detections(
        boxes=boxes,
        classes=found.classes.cpu().numpy(),
        scores=found.scores.cpu().numpy().astype(np.float32),
        masks=paste_masks(mask_logits.sigmoid(), boxes, original_size),
    )


def labels_on_photo(labels: Tensor, scale: float, original_size: tuple[int, int]) -> NDArray[np.int16]:
    """A label map at network scale, padded or not, on the photo: nearest neighbour, always the photo's own size."""
    height, width = original_size
    step = 1.0 / (1.0 / scale)  # the reciprocal of the enlargement, as OpenCV forms it
    rows = np.floor(np.arange(height) * step).astype(np.int64).clip(max=labels.shape[0] - 1)
    columns = np.floor(np.arange(width) * step).astype(np.int64).clip(max=labels.shape[1] - 1)
    small = labels.to(torch.int16).cpu().numpy()
    return small[rows[:, None], columns[None, :]]


def merge_segments(
    channels: NDArray[np.int16],
    semantic: NDArray[np.int16],
    classes: NDArray[np.int64],
    scores: NDArray[np.float32],
    num_stuff: int,
    stuff_area_limit: int,
) -> tuple[NDArray[np.int32], list[Segment]]:
    """The final segments of one photo.

    An instance whose pixels are, by the semantic head's majority, a stuff class (on at least half of them) becomes
    part of that stuff. Afterwards every stuff class with fewer than `stuff_area_limit` pixels is removed.

    Args:
        channels: H×W, 0..num_stuff-1 stuff, num_stuff + i the i-th instance, VOID none.
        semantic: H×W semantic ids.
        classes, scores: thing class 1..C-1 and score of each instance.

    Returns:
        H×W segment ids (0 = no label) and the segments, ids ascending from 1: stuff first, then instances.
    """
    stuff = np.where(channels < num_stuff, channels, VOID)
    segment_map = np.zeros(channels.shape, dtype=np.int32)
    semantic_ids: dict[int, int] = {}
    segment_scores: dict[int, float] = {}
    for i, (thing, score) in enumerate(zip(classes.tolist(), scores.tolist(), strict=True)):
        region = channels == num_stuff + i
        area = int(region.sum())
        if area == 0:
            continue
        own = num_stuff - 1 + thing
        votes = np.bincount(semantic[region])
        majority = int(votes.argmax())
        if majority < num_stuff and votes[majority] >= 0.5 * area:
            stuff[region] = majority
            continue
        segment_id = num_stuff + i + 1
        segment_map[region] = segment_id
        semantic_ids[segment_id], segment_scores[segment_id] = own, score
    areas = np.bincount(stuff[stuff != VOID], minlength=num_stuff)
    for label in np.flatnonzero(areas >= max(stuff_area_limit, 1)).tolist():
        segment_map[stuff == label] = label + 1
        semantic_ids[label + 1] = label
    return segment_map, segments_of(segment_map, semantic_ids, segment_scores)
