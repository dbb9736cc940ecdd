"""Areas, boxes and per-pixel values of the segments of a panoptic map, from one pass over its runs."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SegmentRuns:
    """An H×W segment map as horizontal runs of one id.

    ids: K distinct ids, ascending, 0 (void) among them if it occurs. areas: K pixels. boxes: K×4 (x, y, width, height).
    """

    ids: Ints
    areas: Ints
    boxes: Ints
    _size: tuple[int, int]
    _kind: Ints
    _length: Ints

    @classmethod
    def of(cls, segment_map: NDArray[np.int32]) -> "SegmentRuns":
        height, width = segment_map.shape
        starts_run = np.ones((height, width), dtype=bool)
        starts_run[:, 1:] = segment_map[:, 1:] != segment_map[:, :-1]
        start = np.flatnonzero(starts_run)
        length = np.diff(start, append=height * width)
        ids, kind = np.unique(segment_map.ravel()[start], return_inverse=True)
        areas = np.bincount(kind, weights=length).astype(np.int64)
        y, x = np.divmod(start, width)
        order = np.argsort(kind, kind="stable")
        first = np.searchsorted(kind[order], np.arange(len(ids)))
        left, top = np.minimum.reduceat(x[order], first), np.minimum.reduceat(y[order], first)
        right, bottom = np.maximum.reduceat((x + length)[order], first), np.maximum.reduceat(y[order], first) + 1
        boxes = np.stack([left, top, right - left, bottom - top], axis=1)
        return cls(ids.astype(np.int64), areas, boxes, (height, width), kind, length)

    def paint(self, values: NDArray[np.int16]) -> NDArray[np.int16]:
        """The H×W map in which every pixel has the value of its segment; `values` belong to `ids`."""
        return np.repeat(values[self._kind], self._length).reshape(self._size)
