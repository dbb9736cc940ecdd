"""From network resolution back to the photo: masks pasted, maps resized, the panoptic map cleaned up."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upsnet.models.box_head import Candidates
from upsnet.operators import count_overlaps, paste_masks
from upsnet.structures.results import Detections, Segment, segments_of
from upsnet.structures.sample import VOID


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
    return small.take(columns, axis=1)[rows]


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
    pairs, pixels_of, _ = count_overlaps(channels.astype(np.int32), semantic.astype(np.int32))
    majorities: dict[int, tuple[int, int]] = {}  # of each channel: votes and class
    for (channel, label), votes in pairs.items():  # ascending: of equal ones the first class stays
        if votes > majorities.get(channel, (0, 0))[0]:
            majorities[channel] = votes, label

    segment_ids = np.zeros(num_stuff + len(classes) + 1, dtype=np.int32)  # of each channel; the last, VOID's, stays 0
    semantic_ids: dict[int, int] = {}
    segment_scores: dict[int, float] = {}
    stuff: dict[int, int] = {}  # channels that are or become stuff, and its class
    for channel, pixels in pixels_of.items():
        votes, label = majorities[channel]
        instance, segment_id = channel - num_stuff, channel + 1
        if channel == VOID:
            continue
        if instance < 0:
            stuff[channel] = channel
        elif label < num_stuff and votes >= 0.5 * pixels:
            stuff[channel] = label
        else:
            segment_ids[channel] = segment_id
            semantic_ids[segment_id] = num_stuff - 1 + int(classes[instance])
            segment_scores[segment_id] = float(scores[instance])
    areas = np.zeros(num_stuff, dtype=np.int64)
    for channel, label in stuff.items():
        areas[label] += pixels_of[channel]
    stays = areas >= max(stuff_area_limit, 1)
    for channel, label in stuff.items():
        if stays[label]:
            segment_ids[channel] = label + 1
            semantic_ids[label + 1] = label
    segment_map = segment_ids.take(channels, mode="wrap")  # VOID, -1, is the last entry
    return segment_map, segments_of(segment_map, semantic_ids, segment_scores)
