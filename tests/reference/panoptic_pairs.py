"""Pairs of truth and prediction: small ones by hand, and random ones."""

from collections.abc import Iterable

import numpy as np

from upsnet.structures.categories import Categories, Category
from upsnet.structures.results import Prediction, Segment, Truth
from upsnet.structures.sample import VOID

CATEGORIES = Categories([Category(10 * i + 1, f"class {i}", i >= 2, (i, i, i)) for i in range(4)])
"""Two stuff and two thing classes."""


def truth_of(ids: object, classes: dict[int, int], crowds: Iterable[int] = ()) -> Truth:
    """A truth from a map, {id: class} and the ids of the crowds, in the order of `classes`."""
    ids = np.atleast_2d(np.asarray(ids, dtype=np.int32))
    area = {i: int((ids == i).sum()) for i in classes}
    segments = [Segment(i, c, area[i], (0, 0, 0, 0), None, i in crowds) for i, c in classes.items()]
    return Truth(1, "photo.jpg", ids, segments, np.full(ids.shape, VOID, np.int16))


def prediction_of(ids: object, classes: dict[int, int]) -> Prediction:
    """A prediction from a map and {id: class}; the areas of its segments are nonsense: nobody may believe them."""
    ids = np.atleast_2d(np.asarray(ids, dtype=np.int32))
    return Prediction(1, "photo.jpg", ids, [Segment(i, c, 999, (0, 0, 0, 0)) for i, c in classes.items()])


def random_map(draws: np.random.Generator, ids: list[int], shape: tuple[int, int]) -> np.ndarray:
    """Rectangles on void; some ids may get no pixel."""
    canvas = np.zeros(shape, dtype=np.int32)
    for i in ids:
        y, x = draws.integers(0, shape[0]), draws.integers(0, shape[1])
        canvas[y : y + draws.integers(1, 9), x : x + draws.integers(1, 9)] = i
    return canvas


def random_pair(seed: int) -> tuple[Prediction, Truth]:
    """A truth with crowds and void and a prediction that resembles it; ids use all 24 bits."""
    draws = np.random.default_rng(seed)
    shape = (int(draws.integers(1, 14)), int(draws.integers(1, 14)))
    ids = draws.choice(2**24 - 1, size=draws.integers(0, 7), replace=False) + 1
    truth_map = random_map(draws, ids.tolist(), shape)
    prediction_map = np.roll(truth_map, draws.integers(0, 3), axis=int(draws.integers(0, 2)))
    prediction_map[random_map(draws, [1], shape) == 1] = draws.choice([0, 5, *ids.tolist()])
    present = [i for i in np.unique(truth_map).tolist() if i]
    classes = {i: int(draws.integers(0, 4)) for i in draws.permutation(present).tolist()}
    crowds = [i for i in present if classes[i] >= 2 and draws.random() < 0.4]
    given = [i for i in np.unique(prediction_map).tolist() if i]
    same = {i: classes[i] if i in classes and draws.random() < 0.8 else int(draws.integers(0, 4)) for i in given}
    return prediction_of(prediction_map, same), truth_of(truth_map, classes, crowds)


def strange_pair(seed: int) -> tuple[Prediction, Truth]:
    """A pair whose truth contradicts itself in every way that the official tool does not notice.

    Wrong areas, ids without segment, segments without pixels, doubled ids (on both sides), id 0 as a segment.
    """
    prediction, truth = random_pair(seed)
    draws = np.random.default_rng((seed, 1))

    def segment(segment_id: int) -> Segment:
        area, crowd = int(draws.integers(0, 40)), bool(draws.random() < 0.3)
        return Segment(segment_id, int(draws.integers(0, 4)), area, (0, 0, 0, 0), None, crowd)

    for each in truth.segments:
        if draws.random() < 0.5:
            each.area = int(each.area * draws.choice([0, 0.5, 0.9, 2]))
    truth.segments = [each for each in truth.segments if draws.random() < 0.8]
    if draws.random() < 0.3:
        truth.segments.append(segment(2**24 - int(draws.integers(1, 9))))  # surely without pixels
    for segments in (truth.segments, prediction.segments):
        if segments and draws.random() < 0.2:
            segments.insert(int(draws.integers(0, len(segments) + 1)), segment(segments[0].id))
    if draws.random() < 0.2:
        truth.segments.append(segment(0))
    if draws.random() < 0.2 and (prediction.segment_map == 0).any():
        prediction.segments.append(segment(0))
    return prediction, truth
