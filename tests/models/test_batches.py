"""Photos together give what each gives alone."""

import numpy as np
import pytest
import torch

from tests.miniature import CATEGORIES
from tests.models.small import BALL, BOX, KITE, photo_sample, small_network
from upsnet.dataset.batches import collate
from upsnet.dataset.transforms import Transform
from upsnet.dataset.views import Views
from upsnet.models.box_head import DetectionOptions
from upsnet.models.upsnet import SelectionOptions
from upsnet.predict import Predictor
from upsnet.structures.categories import Categories

close = torch.testing.assert_close


@pytest.fixture(scope="module")
def network():
    return small_network(seed=1, lively=True).eval()


def samples_of(count, size=(64, 80)):
    things = [BALL, BOX, KITE]
    return [photo_sample(i, size, things=[things[(i + k) % 3] for k in range(i % 3 + 1)]) for i in range(count)]


def assert_same(ours, theirs):
    assert np.array_equal(ours.segment_map, theirs.segment_map)
    assert np.array_equal(ours.semantic_map, theirs.semantic_map)
    assert [(s.id, s.semantic_id, s.area, s.bbox) for s in ours.segments] == [
        (s.id, s.semantic_id, s.area, s.bbox) for s in theirs.segments
    ]
    assert len(ours.instances) == len(theirs.instances)
    close(ours.instances.boxes, theirs.instances.boxes, rtol=0, atol=1e-3)
    close(ours.instances.scores, theirs.instances.scores, rtol=0, atol=1e-4)
    assert ours.instances.classes.tolist() == theirs.instances.classes.tolist()
    assert ours.instances.masks == theirs.instances.masks


@torch.no_grad()
def test_features_of_four_photos(network):
    samples = samples_of(4)
    together = network.features(collate(samples).images)
    for i, sample in enumerate(samples):
        alone = network.features(collate([sample]).images)
        for ours, theirs in zip(
            [*together.levels, *together.rpn.logits, *together.rpn.deltas, together.scores],
            [*alone.levels, *alone.rpn.logits, *alone.rpn.deltas, alone.scores],
            strict=True,
        ):
            close(ours[i : i + 1], theirs, rtol=0, atol=1e-4)


@torch.no_grad()
def test_segments_of_four_photos(network):
    samples = samples_of(4)
    together = network(collate(samples))
    things = 0
    for sample, prediction in zip(samples, together, strict=True):
        (alone,) = network(collate([sample]))
        assert (prediction.image_id, prediction.file_name) == (sample.image_id, sample.file_name)
        assert prediction.segment_map.shape == sample.original_size
        assert_same(prediction, alone)
        things += sum(segment.score is not None for segment in prediction.segments)
        assert len(prediction.instances) > 0
    assert things > 3, "without things in the result this test cannot fail"


def photos():
    draws = np.random.default_rng(0)
    sizes = [(64, 80), (80, 64), (64, 80), (63, 80), (40, 100), (62, 77), (64, 80)]
    coarse = [draws.integers(0, 256, (h // 8, w // 8, 3)).astype(np.uint8) for h, w in sizes]
    return [
        np.ascontiguousarray(np.kron(c, np.ones((9, 9, 1), dtype=np.uint8))[:h, :w])
        for c, (h, w) in zip(coarse, sizes, strict=True)
    ]


@pytest.mark.parametrize("short_sides", [(64,), (64, 50)], ids=str)
def test_mixed_sizes_through_the_predictor(network, short_sides):
    categories = Categories.from_coco(CATEGORIES, "miniature")
    views = Views([Transform((side,), 128, use_caffe_model=False) for side in short_sides], flip=len(short_sides) > 1)
    pictures, things = photos(), 0
    together = Predictor(network, categories, views, batch_size=3).predict(pictures)
    single = Predictor(network, categories, views)
    for picture, result in zip(pictures, together, strict=True):
        alone = single.predict(picture)
        assert result.segment_map.shape == picture.shape[:2] and np.array_equal(result.photo, picture)
        assert np.array_equal(result.segment_map, alone.segment_map)
        assert np.array_equal(result.semantic_map, alone.semantic_map)
        assert [(s.id, s.name, s.area) for s in result.segments] == [(s.id, s.name, s.area) for s in alone.segments]
        things += sum(segment.is_thing for segment in result.segments)
    assert things > 3
    assert len({result.segment_map.tobytes() for result in together}) == len(pictures)


@torch.no_grad()
def test_photos_without_detections():
    options = SelectionOptions(detections=DetectionOptions(score_threshold=0.9), panoptic_score_threshold=0.9)
    network = small_network(seed=1, selection=options).eval()
    samples = samples_of(3)
    for prediction in network(collate(samples)):
        assert len(prediction.instances) == 0 and prediction.instances.boxes.shape == (0, 4)
        assert all(segment.score is None for segment in prediction.segments)
        assert prediction.segment_map.shape == samples[0].original_size


@torch.no_grad()
def test_photos_with_and_without_detections_share_a_pass(network):
    """One photo's boxes must not slip to the next: an image in the middle has none."""
    samples = samples_of(3)
    plain = [network(collate([sample]))[0] for sample in samples]

    def silence(levels, rois):
        logits, deltas = heads(levels, rois)
        logits[rois[:, 0] == 1] = torch.tensor([9.0, 0, 0, 0])
        return logits, deltas

    heads = network.box_head.forward
    network.box_head.forward = silence
    try:
        together = network(collate(samples))
    finally:
        network.box_head.forward = heads
    assert_same(together[0], plain[0])
    assert_same(together[2], plain[2])
    assert len(together[1].instances) == 0 < len(plain[1].instances)
