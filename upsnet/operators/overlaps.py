"""How many pixels the segments of two label maps share: the one count that panoptic quality needs."""

import numpy as np
from numpy.typing import NDArray

from upsnet.operators import library

OverlapCounts = tuple[dict[tuple[int, int], int], dict[int, int], dict[int, int]]
"""{(id of first, id of second): pixels}, ascending; {id of first: pixels}; {id of second: pixels}."""


def count_overlaps(first: NDArray[np.int32], second: NDArray[np.int32]) -> OverlapCounts:
    """Counts the pixels of every pair of ids that occurs, and of every id.

    Args:
        first, second: label maps of one shape, any int32 ids.

    Raises:
        ValueError: the maps differ in shape or are not int32.
    """
    if first.shape != second.shape or not first.dtype == second.dtype == np.int32:
        raise ValueError(f"two int32 maps of one shape are needed, not {_kind(first)} and {_kind(second)}")
    count = library.count_overlaps or count_overlaps_numpy
    return count(np.ascontiguousarray(first).reshape(-1), np.ascontiguousarray(second).reshape(-1))


def count_overlaps_numpy(first: NDArray[np.int32], second: NDArray[np.int32]) -> OverlapCounts:
    """The same as lib/cython/overlaps.pyx, for flat maps. Only the runs of equal pairs are sorted, not the pixels."""
    pairs = first.astype(np.int64) << 32 | (second.astype(np.int64) + 2**31)  # ascend as the pairs do
    ends = np.flatnonzero(pairs[1:] != pairs[:-1]) + 1
    starts = np.concatenate([np.zeros(min(1, pairs.size), dtype=np.int64), ends])
    keys, kind = np.unique(pairs[starts], return_inverse=True)
    pixels = np.bincount(kind, weights=np.diff(starts, append=pairs.size)).astype(np.int64)
    of_pair: dict[tuple[int, int], int] = {}
    of_first: dict[int, int] = {}
    of_second: dict[int, int] = {}
    for a, b, count in zip((keys >> 32).tolist(), ((keys & 0xFFFFFFFF) - 2**31).tolist(), pixels.tolist(), strict=True):
        of_pair[a, b] = count
        of_first[a] = of_first.get(a, 0) + count
        of_second[b] = of_second.get(b, 0) + count
    return of_pair, of_first, of_second


def _kind(label_map: NDArray[np.int32]) -> str:
    return f"{label_map.dtype} {'×'.join(map(str, label_map.shape))}"
