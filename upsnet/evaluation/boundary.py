"""Boundaries of segments, for boundary panoptic quality (Cheng et al., "Boundary IoU", CVPR 2021, section 3).

The boundary of a segment: its pixels no farther than d from a pixel outside, where d is 0.02 of the picture's diagonal
and distance is the greater of both coordinates' differences, as in the authors' tool (d erosions by 3×3). What lies
beyond the edge of the picture is outside.
"""

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from upsnet.structures.panoptic_png import MAX_SEGMENT_ID, VOID_ID

DILATION_RATIO = 0.02
INTERIOR_ID = -1
"""Id of the inner pixels of all segments in a map of boundaries."""


def boundary_distance(height: int, width: int) -> int:
    """d in pixels, at least 1."""
    return max(1, round(DILATION_RATIO * math.hypot(height, width)))


def boundary_map(segment_map: NDArray[np.int32]) -> NDArray[np.int32]:
    """The H×W segment map in which the inner pixels of every segment are INTERIOR_ID; void stays void.

    A pixel is inner where the least and the greatest id around it are equal, so that one pass of a minimum and a
    maximum filter serves all segments.

    Raises:
        ValueError: an id does not fit in 24 bits.
    """
    if segment_map.size and not 0 <= segment_map.min() <= segment_map.max() <= MAX_SEGMENT_ID:
        raise ValueError(f"segment ids must lie in 0..{MAX_SEGMENT_ID}, which float32 holds exactly")
    side = 2 * boundary_distance(*segment_map.shape) + 1
    around = np.ones((side, side), dtype=np.uint8)
    ids = segment_map.astype(np.float32)
    least = cv2.erode(ids, around, borderType=cv2.BORDER_CONSTANT, borderValue=(-1.0,))
    is_inner = (least == cv2.dilate(ids, around)) & (segment_map != VOID_ID)
    return np.where(is_inner, np.int32(INTERIOR_ID), segment_map)
