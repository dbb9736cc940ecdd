import cv2
import numpy as np
import pytest

from tests.reference.panoptic_pairs import CATEGORIES, prediction_of, random_pair, truth_of
from tests.reference.panoptic_quality import slow_boundary, slow_match
from upsnet.evaluation import boundary
from upsnet.evaluation.boundary import INTERIOR_ID, boundary_distance, boundary_map
from upsnet.evaluation.panoptic_quality import PanopticQuality, match_segments


def edges_of(segment_map):
    """{id: mask} of the boundaries in a map, after the check that nothing else has changed."""
    found = boundary_map(segment_map)
    assert found.dtype == np.int32 and np.array_equal(found == 0, segment_map == 0)
    assert np.array_equal(np.where(found == INTERIOR_ID, segment_map, found), segment_map)
    return {int(i): found == i for i in np.unique(segment_map) if i}


def blobs(shape, seed, width=3):
    """Smooth noise in four steps: void and segments of all shapes that touch the edge of the picture."""
    noise = cv2.GaussianBlur(np.random.default_rng(seed).random(shape).astype(np.float32), (0, 0), width)
    levels = np.digitize(noise, np.quantile(noise, [0.25, 0.5, 0.75]))
    return np.array([0, 2**24 - 1, 2**24 - 2, 70000], np.int32)[levels]


@pytest.mark.parametrize("distance", [1, 2, 3, 9])
def test_equals_slow_twin(distance, monkeypatch):
    monkeypatch.setattr(boundary, "boundary_distance", lambda height, width: distance)
    for seed, shape in enumerate([(25, 30), (1, 1), (1, 12), (12, 1), (3, 5), (20, 20)]):
        segment_map = blobs(shape, seed)
        for segment_id, edge in edges_of(segment_map).items():
            assert np.array_equal(edge, slow_boundary(segment_map == segment_id, distance))


def test_equals_erosion_of_each_segment_at_full_size():
    """The definition of the authors' tool: d erosions by 3×3, with zeros around the picture."""
    segment_map = blobs((240, 320), 3, width=25)
    for segment_id, edge in edges_of(segment_map).items():
        mask = (segment_map == segment_id).astype(np.uint8)
        padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=8)[1:-1, 1:-1]
        assert np.array_equal(edge, mask > inner) and inner.any()


def test_distance_is_two_hundredths_of_the_diagonal():
    assert boundary_distance(480, 640) == 16 and boundary_distance(1024, 2048) == 46
    assert boundary_distance(3, 4) == boundary_distance(1, 1) == boundary_distance(15, 20) == 1


def test_ids_beyond_24_bits_are_refused():
    with pytest.raises(ValueError, match="which float32 holds exactly"):
        boundary_map(np.full((3, 3), 2**24, np.int32))


# -- panoptic quality with it ------------------------------------------------------------------------------------------


def test_random_pairs_equal_the_slow_twin():
    """All are so small that the distance is 1."""
    below = 0
    for seed in range(150):
        prediction, truth = random_pair(seed)
        matching = match_segments(prediction, truth, CATEGORIES, boundary=True)
        slow = slow_match(prediction, truth, boundary=1)
        ious = {(m.truth.id, m.prediction.id): m.iou for m in matching.matched}
        assert ious == pytest.approx(slow["tp"], abs=1e-12)
        for kind, segments in (("fn", matching.missed), ("fp", matching.invented), ("ignored", matching.ignored)):
            assert {segment.id for segment in segments} == slow[kind]
        plain = match_segments(prediction, truth, CATEGORIES)
        below += sum(m.iou for m in plain.matched) > sum(ious.values()) + 1e-9
    assert below > 20


def moved_square(picture, side, by):
    """Matching of a square in the middle of a square picture and the same moved to the right; stuff fills the rest."""
    truth, prediction = np.full((2, picture, picture), 2, np.int32)
    first = (picture - side) // 2
    truth[first : first + side, first : first + side] = 1
    prediction[first : first + side, first + by : first + by + side] = 1
    pair = prediction_of(prediction, {1: 2, 2: 0}), truth_of(truth, {1: 2, 2: 0})
    return [match_segments(*pair, CATEGORIES, boundary=kind) for kind in (False, True)]


def test_the_smaller_iou_counts():
    """60×60 in 70×70 moved by 1; d is 2. The rings have 60² - 56² pixels and share 4 lines of 59 and 56 of 2."""
    plain, matching = moved_square(70, 60, by=1)
    ious = [next(m.iou for m in each.matched if m.truth.id == 1) for each in (plain, matching)]
    assert ious == pytest.approx([60 * 59 / (60 * 61), 348 / 580])


def test_a_match_needs_more_than_half_of_the_boundary():
    """30×30 in 40×40 moved by 2; d is 1. The rings have 116 pixels and share two lines of 28."""
    plain, matching = moved_square(40, 30, by=2)
    assert next(m.iou for m in plain.matched if m.truth.id == 1) == pytest.approx(30 * 28 / (30 * 32))
    assert 1 in {s.id for s in matching.missed} and 1 in {s.id for s in matching.invented}


def test_void_is_in_neither_union():
    """The half of the prediction that lies in void costs nothing, with its boundary."""
    truth, prediction = np.zeros((40, 40), np.int32), np.ones((40, 40), np.int32)
    truth[:, :20] = 7
    matching = match_segments(prediction_of(prediction, {1: 0}), truth_of(truth, {7: 0}), CATEGORIES, boundary=True)
    # The truth's boundary: 2·20 + 2·38 pixels. The prediction's in that half: one column of 38 less.
    assert matching.matched[0].iou == pytest.approx((2 * 20 + 38) / (2 * 20 + 2 * 38))


def test_excuses_are_those_of_whole_segments():
    """A prediction that lies mostly in void is ignored, whatever its boundary does."""
    truth = np.zeros((40, 40), np.int32)
    truth[:, 25:] = 7
    prediction = np.zeros((40, 40), np.int32)
    prediction[10:30, 10:40] = 1
    matching = match_segments(prediction_of(prediction, {1: 0}), truth_of(truth, {7: 1}), CATEGORIES, boundary=True)
    assert [s.id for s in matching.ignored] == [] and [s.id for s in matching.invented] == [1]
    prediction[10:30, 37:] = 0
    matching = match_segments(prediction_of(prediction, {1: 0}), truth_of(truth, {7: 1}), CATEGORIES, boundary=True)
    assert [s.id for s in matching.ignored] == [1]


def test_boundaries_lower_the_quality():
    quality, plain = PanopticQuality(CATEGORIES), PanopticQuality(CATEGORIES)
    for seed in range(60):
        pair = random_pair(seed)
        quality.add_matching(match_segments(*pair, CATEGORIES, boundary=True))
        plain.add(*pair)
    assert 0 < quality.summary()["all"]["pq"] < plain.summary()["all"]["pq"]
