"""How many pixels the segments of two label maps share: the one count that panoptic quality needs."""

import numpy as np
from numpy.typing import NDArray

from upsnet.operators import library


def count_overlaps(
    first: NDArray[np.int32], second: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Counts the pixels of every pair of ids that occurs.

    Args:
        first, second: label maps of one shape, any int32 ids.

    Returns:
        Ids of `first`, ids of `second` and pixels, N each, ascending by the first id, then by the second.

    Raises:
        ValueError: the maps differ in shape or are not int32.
    """
    if first.shape != second.shape or not first.dtype == second.dtype == np.int32:
        raise ValueError(f"two int32 maps of one shape are needed, not {_kind(first)} and {_kind(second)}")
    count = library.count_pairs or count_pairs_numpy
    keys, pixels = count(np.ascontiguousarray(first).reshape(-1), np.ascontiguousarray(second).reshape(-1))
    first_ids, second_ids = ((keys >> np.uint64(shift)).astype(np.int32).astype(np.int64) for shift in (32, 0))
    order = np.lexsort((second_ids, first_ids))
    return first_ids[order], second_ids[order], pixels[order]


def count_pairs_numpy(
    first: NDArray[np.int32], second: NDArray[np.int32]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The same as `count_pairs` of lib/cython/overlaps.pyx: pairs of two flat maps as keys, first id in the upper half.

    Only the runs of equal pairs are sorted, not the pixels.
    """
    pairs = first.view(np.uint32).astype(np.uint64) << np.uint64(32) | second.view(np.uint32)
    ends = np.flatnonzero(pairs[1:] != pairs[:-1]) + 1
    starts = np.concatenate([np.zeros(min(1, pairs.size), dtype=np.int64), ends])
    keys, kind = np.unique(pairs[starts], return_inverse=True)
    return keys, np.bincount(kind, weights=np.diff(starts, append=pairs.size)).astype(np.int64)


def _kind(label_map: NDArray[np.int32]) -> str:
    return f"{label_map.dtype} {'×'.join(map(str, label_map.shape))}"
