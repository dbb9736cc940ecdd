import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from tests.reference import panoptic as twin
from upsnet.dataset.transforms import network_scale, scaled_size
from upsnet.models.box_head import Candidates
from upsnet.models.postprocess import detections_on_photo, labels_on_photo, merge_segments
from upsnet.structures.sample import VOID

PHOTO = (40, 55)


def test_no_detections():
    none = Candidates(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    found = detections_on_photo(none, torch.zeros(0, 28, 28), 0.5, PHOTO)
    assert len(found) == 0 and found.boxes.shape == (0, 4) and found.masks == []


def test_detections_are_in_photo_pixels():
    candidates = Candidates(torch.tensor([[10.0, 20, 50, 60]]), torch.tensor([0.5]), torch.tensor([2]))
    found = detections_on_photo(candidates, torch.full((1, 28, 28), 3.0), 2.0, PHOTO)
    assert found.boxes.tolist() == [[5, 10, 25, 30]] and found.boxes.dtype == np.float32
    assert found.classes.tolist() == [2] and found.scores.tolist() == [0.5]
    rows, columns = np.nonzero(coco_mask.decode(found.masks[0]))
    assert abs(int(rows.min()) - 10) <= 1 and abs(int(columns.max()) - 25) <= 1


PHOTOS = [(427, 640), (480, 640), (640, 427), (33, 999), (1, 1), (1, 700), (375, 500), (1024, 2048), (7, 5), (26, 40)]


@pytest.mark.parametrize("short_side", [64, 256, 800])
@pytest.mark.parametrize("photo", PHOTOS, ids=str)
def test_labels_come_back_at_the_size_of_the_photo(photo, short_side):
    scale = network_scale(*photo, short_side, 1333)
    height, width = scaled_size(*photo, scale)
    labels = torch.arange(max(height, 1) * max(width, 1)).reshape(max(height, 1), max(width, 1)) % 3000 - 1
    resized = labels_on_photo(labels, scale, photo)
    assert resized.shape == photo and resized.dtype == np.int16
    # Where OpenCV's result has these pixels too, they are equal.
    theirs = cv2.resize(
        labels.numpy().astype(np.int16), None, fx=1 / scale, fy=1 / scale, interpolation=cv2.INTER_NEAREST
    )
    rows, columns = min(photo[0], theirs.shape[0]), min(photo[1], theirs.shape[1])
    assert np.array_equal(resized[:rows, :columns], theirs[:rows, :columns])
    assert max(photo[0] - rows, photo[1] - columns) <= 0.5 / scale + 1


@pytest.mark.parametrize("photo", [(427, 640), (640, 427)])
def test_plain_enlarging_could_give_a_pixel_too_many(photo):
    scale = float(np.float32(network_scale(*photo, 256, 1333)))  # the original hands the scale on in float32
    labels = np.zeros(scaled_size(*photo, scale), dtype=np.int16)
    enlarged = cv2.resize(labels, None, fx=1 / scale, fy=1 / scale, interpolation=cv2.INTER_NEAREST)
    assert sorted(enlarged.shape) == [427, 641]
    assert labels_on_photo(torch.from_numpy(labels), scale, photo).shape == photo


def maps_of(seed, things, num_stuff, size=(24, 30)):
    """Blobs rather than noise, so that majorities exist; ties are frequent."""
    draws = np.random.default_rng(seed)
    coarse = draws.integers(VOID, num_stuff + things, (size[0] // 3, size[1] // 3))
    channels = np.kron(coarse, np.ones((3, 3))).astype(np.int16)
    semantic = np.kron(draws.integers(0, num_stuff + 3, (size[0] // 2, size[1] // 2)), np.ones((2, 2)))
    return channels, semantic.astype(np.int16), draws.integers(1, 4, things)


@pytest.mark.parametrize("limit", [0, 40, 10_000])
@pytest.mark.parametrize(("things", "num_stuff"), [(0, 3), (1, 0), (1, 1), (6, 2), (30, 2), (12, 0)])
@pytest.mark.parametrize("seed", range(3))
def test_merge_segments(seed, things, num_stuff, limit):
    channels, semantic, classes = maps_of(seed, things, num_stuff)
    scores = np.linspace(0.9, 0.6, things).astype(np.float32)
    segment_map, segments = merge_segments(channels, semantic, classes, scores, num_stuff, limit)
    expected = twin.merge_segments(channels, semantic, classes, num_stuff, limit)
    by_id = {segment.id: segment for segment in segments}
    assert segment_map.dtype == np.int32 and sorted(by_id) == sorted(set(segment_map.ravel().tolist()) - {0})
    for position, segment_id in np.ndenumerate(segment_map):
        if segment_id == 0:
            assert position not in expected
            continue
        semantic_id, instance = expected[position]
        segment = by_id[int(segment_id)]
        assert segment.semantic_id == semantic_id
        assert segment.score == (None if instance is None else float(scores[instance]))
    assert len(segments) == len(set(expected.values()))
    assert all(segment.area == (segment_map == segment.id).sum() for segment in segments)


def test_every_rule_of_the_merge_occurs():
    channels, semantic, classes = maps_of(0, 30, 2)
    labels = twin.merge_segments(channels, semantic, classes, 2, 0)
    turned = [p for p, (_, instance) in labels.items() if instance is None and channels[p] >= 2]
    stayed = {instance for _, instance in labels.values() if instance is not None}
    assert turned and 3 < len(stayed) < 30 and len(labels) < channels.size


@pytest.mark.parametrize(("stuff_votes", "becomes_stuff"), [(5, True), (4, False)])
def test_half_of_an_instance_must_be_stuff(stuff_votes, becomes_stuff):
    channels = np.full((1, 10), 2, dtype=np.int16)
    # the other pixels are things of several classes, none of which has more than the stuff
    semantic = np.array([[1] * stuff_votes + [2, 2, 3, 3, 4, 4][: 10 - stuff_votes]], dtype=np.int16)
    one = np.ones(1, dtype=np.float32)
    _, (segment,) = merge_segments(channels, semantic, np.array([2]), one, 2, 0)
    assert (segment.semantic_id, segment.score is None) == ((1, True) if becomes_stuff else (3, False))


def test_stuff_of_exactly_the_limit_stays():
    channels = np.array([[0] * 4 + [1] * 5], dtype=np.int16)
    none = np.zeros(0)
    _, segments = merge_segments(channels, channels, none.astype(np.int64), none.astype(np.float32), 2, 5)
    assert [(s.semantic_id, s.area) for s in segments] == [(1, 5)]


def test_more_than_255_instances():
    channels = np.arange(400, dtype=np.int16).reshape(20, 20) + 2
    semantic = np.full((20, 20), 2, dtype=np.int16)
    segment_map, segments = merge_segments(
        channels, semantic, np.ones(400, dtype=np.int64), np.ones(400, dtype=np.float32), 2, 0
    )
    assert len(segments) == 400 == len(np.unique(segment_map)) and {s.area for s in segments} == {1}
