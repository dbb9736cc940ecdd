"""The colour code of panoptic PNGs: segment id = R + 256 G + 65536 B (COCO panoptic format)."""

import numpy as np
from numpy.typing import NDArray

VOID_ID = 0
"""Id of pixels without a segment, in truth and prediction alike."""

MAX_SEGMENT_ID = 256**3 - 1


def rgb_to_id(rgb: NDArray[np.uint8]) -> NDArray[np.int32]:
    """H×W×3 uint8 RGB picture → H×W int32 segment ids, 0..MAX_SEGMENT_ID."""
    code = np.zeros((*rgb.shape[:-1], 4), dtype=np.uint8)  # the bytes of the ids, the lowest first
    for channel in range(3):
        code[..., channel] = rgb[..., channel]
    return code.view("<i4")[..., 0].astype(np.int32, copy=False)


def id_to_rgb(ids: NDArray[np.int32]) -> NDArray[np.uint8]:
    """H×W segment ids → H×W×3 uint8 RGB picture.

    Raises:
        ValueError: an id is negative or does not fit in 24 bits.
    """
    if ids.size and (ids.min() < 0 or ids.max() > MAX_SEGMENT_ID):
        raise ValueError(f"segment ids must lie in 0..{MAX_SEGMENT_ID}, got {ids.min()}..{ids.max()}")
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], axis=-1).astype(np.uint8)
