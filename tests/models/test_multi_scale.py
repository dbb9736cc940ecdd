"""Several views of a photo: geometry, averages, and the whole network on them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.models.small import small_network
from tests.reference import multi_scale as twin
from upsnet.dataset.batches import collate
from upsnet.dataset.transforms import Transform
from upsnet.dataset.views import Views
from upsnet.models.box_head import Candidates, DetectionOptions, decode_above, suppress
from upsnet.models.multi_scale import LEAST, Frame, carry_boxes, carry_scores, mean_masks, mean_scores
from upsnet.models.panoptic_head import fuse
from upsnet.models.postprocess import detections_on_photo, merge_segments
from upsnet.models.rpn import ProposalOptions, propose
from upsnet.models.upsnet import SelectionOptions
from upsnet.structures.sample import Sample

close = torch.testing.assert_close


def views_of(*short_sides, flip=True):
    return Views([Transform((side,), 400, use_caffe_model=False) for side in short_sides], flip)


def photo_of(size, seed=0):
    """Patches of colour with a bit of noise."""
    height, width = size
    draws = np.random.default_rng(seed)
    patches = draws.integers(0, 200, (height // 9 + 1, width // 9 + 1, 3))
    return (np.kron(patches, np.ones((9, 9, 1), int))[:height, :width] + draws.integers(0, 50, (*size, 3))).astype(
        np.uint8
    )


def frame_of(sample):
    return Frame.of(collate([sample]), 0)


def spread(sample):
    """The sample of a photo and those of its other views, as a list."""
    return [replace(sample, views=()), *sample.views]


# -- geometry ----------------------------------------------------------------------------------------------------------

FRAMES = {
    "same": Frame((60, 80), 1.25, False, 64),
    "smaller": Frame((31, 41), 0.64, False, 64),
    "larger": Frame((97, 131), 2.04, False, 64),
    "mirrored": Frame((60, 80), 1.25, True, 64),
    "smaller and mirrored": Frame((31, 41), 0.64, True, 64),
}
REFERENCE = FRAMES["same"]


def view_of(frame):
    return Sample(1, "", torch.zeros(3, *frame.size), (48, frame.photo_width), frame.scale, frame.flipped)


@pytest.mark.parametrize("name", FRAMES)
def test_boxes_are_carried_through_photo_coordinates(name):
    source = FRAMES[name]
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(50, 4, generator=generator) * torch.tensor(source.size[::-1] * 2)
    boxes = torch.cat([torch.minimum(corners[:, :2], corners[:, 2:]), torch.maximum(corners[:, :2], corners[:, 2:])], 1)
    boxes = carry_boxes(boxes, source, source)  # cut to the view
    carried = carry_boxes(boxes, source, REFERENCE)
    view, reference = view_of(source), view_of(REFERENCE)
    expected = [twin.box_in_view(twin.box_in_photo(box, view), reference) for box in boxes.tolist()]
    close(carried, torch.tensor(expected), rtol=0, atol=1e-4)
    if name == "same":
        assert torch.equal(carried, boxes)


def test_boxes_come_and_go_as_the_training_makes_them():
    """Photo box × scale, mirrored in photo pixels."""
    in_photo, mirrored = torch.tensor([[2.0, 3, 50, 45]]), torch.tensor([[13.0, 3, 61, 45]])
    for frame in FRAMES.values():
        there = carry_boxes(in_photo * REFERENCE.scale, REFERENCE, frame)
        close(there, (mirrored if frame.flipped else in_photo) * frame.scale, rtol=0, atol=1e-4)
        close(carry_boxes(there, frame, REFERENCE), in_photo * REFERENCE.scale, rtol=0, atol=1e-4)
    assert carry_boxes(torch.zeros(0, 4), FRAMES["mirrored"], REFERENCE).shape == (0, 4)


@pytest.mark.parametrize("name", FRAMES)
def test_scores_are_carried_pixel_by_pixel(name):
    source = FRAMES[name]
    height, width = (-(-side // 32) * 8 for side in source.size)
    scores = torch.randn(3, height, width, generator=torch.Generator().manual_seed(1))
    expected = twin.carried_scores(scores, view_of(source), view_of(REFERENCE), (64, 96)).float()
    close(carry_scores(scores, source, REFERENCE, range(64), range(96)), expected, rtol=0, atol=1e-5)
    part = carry_scores(scores, source, REFERENCE, range(5, 31), range(90, 96))
    close(part, expected[:, 5:31, 90:], rtol=0, atol=1e-5)
    if name == "same":
        enlarged = F.interpolate(scores[None], size=(64, 96), mode="bilinear", align_corners=False)[0]
        close(expected, enlarged, rtol=0, atol=1e-5)  # as the plain path does


@pytest.mark.parametrize("size", [(60, 85), (61, 64), (90, 47)])
@pytest.mark.parametrize("short_side", [59, 47, 33, 75, 120, 181])
@pytest.mark.parametrize("flip", [False, True])
def test_a_ramp_in_the_photo_lies_at_the_same_place_in_every_view(size, short_side, flip):
    """From the photo through OpenCV's resizing: sub-pixel, for any scale, mirrored about the photo's middle."""
    height, width = size
    ramp = np.stack(np.broadcast_arrays(np.arange(width), 2 * np.arange(height)[:, None], 7), axis=-1).astype(np.uint8)
    transforms = [Transform((side,), 1000, (0.0, 0.0, 0.0)) for side in (60, short_side)]
    views = spread(Views(transforms, flip).sample(ramp))
    # The means of 4×4 pixels stand for scores at stride 4.
    scores = [F.avg_pool2d(collate([view]).images, 4)[0] for view in views]
    frames = [frame_of(view) for view in views]
    rows, columns = (range(12, side - 12) for side in frames[0].size)
    y, x = ((torch.tensor(pixels) + 0.5) / frames[0].scale - 0.5 for pixels in (rows, columns))
    expected = torch.stack(torch.broadcast_tensors(torch.tensor(7.0), 2 * y[:, None], x))
    assert len(views) == (4 if flip else 2)
    for score, frame in zip(scores, frames, strict=True):
        close(carry_scores(score, frame, frames[0], rows, columns), expected, rtol=0, atol=1e-3)


# -- averages ----------------------------------------------------------------------------------------------------------


def logits_of(kind, count=5):
    generator = torch.Generator().manual_seed(2)
    views = [torch.randn(4, 6, 7, generator=generator) * 3 for _ in range(count)]
    if kind == "at odds":  # beyond what float32 probabilities can tell from 0 and 1
        views = [view * 100 for view in views]
    if kind == "of one class":
        views = [view[:1] for view in views]
    if kind == "the same":
        views = views[:1] * count
    return views


def mean_of(views):
    """Of S×h×w scores that lie alike."""
    frames = [Frame((4 * views[0].shape[1], 4 * views[0].shape[2]), 1.0, False, 4 * views[0].shape[2])] * len(views)
    return mean_scores(views, frames, frames[0].size)


def enlarged(scores):
    return F.interpolate(scores[None], scale_factor=4, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("kind", ["random", "of one class", "the same"])
@pytest.mark.parametrize("count", [2, 5])
def test_class_probabilities_are_averaged(kind, count):
    views = logits_of(kind, count)
    mean, views = mean_of(views), [enlarged(view) for view in views]
    close(mean, twin.mean_scores(views).float(), rtol=1e-5, atol=1e-5)
    close(mean.softmax(0), torch.stack(views).softmax(1).mean(0), rtol=1e-5, atol=1e-6)
    close(mean.logsumexp(0), torch.stack(views).logsumexp(1).mean(0), rtol=1e-5, atol=1e-5)
    if kind == "the same":
        close(mean, views[0], rtol=0, atol=1e-5)


def test_scores_of_more_rows_than_a_strip():
    views = [torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    close(mean_of(views), twin.mean_scores([enlarged(view) for view in views]).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["random", "the same", "at odds"])
@pytest.mark.parametrize("count", [2, 5])
def test_mask_probabilities_are_averaged(kind, count):
    views = logits_of(kind, count)
    mean = mean_masks(views)
    close(mean, twin.mean_masks(views).float(), rtol=1e-5, atol=1e-5)
    close(mean.sigmoid(), torch.stack(views).sigmoid().mean(0), rtol=1e-5, atol=1e-6)
    assert mean.isfinite().all() and mean_masks([torch.zeros(0, 28, 28)] * count).shape == (0, 28, 28)


def test_one_view_is_left_as_it_is():
    scores = torch.randn(3, 16, 24)
    assert mean_scores([scores], [REFERENCE], (64, 96)) is scores and mean_masks([scores]) is scores


def test_classes_without_probability_keep_a_finite_logit():
    views = logits_of("at odds")
    mean, views = mean_of(views), [enlarged(view) for view in views]
    expected = twin.mean_scores(views).float()
    least = torch.stack(views).logsumexp(1).mean(0) + math.log(LEAST)
    assert mean.isfinite().all() and (expected < least).any() and (expected > least).any()
    close(mean, torch.maximum(expected, least), rtol=1e-5, atol=1e-4)


# -- the network -------------------------------------------------------------------------------------------------------


def network_for(seed):
    selection = SelectionOptions(
        ProposalOptions(pre_nms=40, post_nms=12),
        DetectionOptions(0.3, max_detections=8),
        0.4,
        stuff_area_limit=16,
    )
    return small_network(seed=seed, lively=True, selection=selection).eval()


def assert_alike(ours, theirs, pixels=0.0):
    """pixels: share of the photo that may differ where rounding decides."""
    found, expected = ours.instances, theirs.instances
    assert found.classes.tolist() == expected.classes.tolist()
    close(found.scores, expected.scores, rtol=0, atol=1e-4)
    close(found.boxes, expected.boxes, rtol=0, atol=1e-2)
    assert (ours.semantic_map != theirs.semantic_map).mean() <= pixels
    assert (labels_of(ours) != labels_of(theirs)).mean() <= pixels


def labels_of(prediction):
    """Semantic id and score at every pixel, whatever the segments are called."""
    labels = np.full(prediction.segment_map.shape, -1.0)
    for segment in prediction.segments:
        labels[prediction.segment_map == segment.id] = segment.semantic_id + round(segment.score or 0, 3) / 2
    return labels


VIEWS = {
    "one": views_of(40, flip=False),
    "flip": views_of(40),
    "scales": views_of(40, 27, 58, flip=False),
    "smaller and flip": views_of(40, 25),
    "larger first": views_of(61, 33),
}


@pytest.mark.parametrize("unknown", [True, False])
@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS)
@torch.no_grad()
def test_the_twin_says_the_same(views, unknown):
    things = 0
    for seed in range(2):
        network = network_for(seed)
        if not unknown:
            network.sampling = replace(network.sampling, keep_fraction=1.0)
        sample = views.sample(photo_of((40, 53), seed), 7, "a.jpg")
        (prediction,) = network(collate([sample]))
        expected = twin.predict(network, spread(sample))
        assert (prediction.image_id, prediction.file_name) == (7, "a.jpg")
        assert prediction.segment_map.shape == (40, 53) and len(prediction.instances) > 2
        assert_alike(prediction, expected, pixels=0.002)
        things += sum(segment.score is not None for segment in prediction.segments)
    assert things > 0


@torch.no_grad()
def test_one_view_is_the_plain_path_bit_for_bit():
    """The plain path put together by hand, without anything of `multi_scale`."""
    network = network_for(3)
    batch = collate([views_of(64, flip=False).sample(photo_of((64, 80), i), i) for i in range(2)])
    features = network.features(batch.images)
    proposals = propose(features.rpn, batch.sizes, batch.scales, network.selection.proposals).trimmed()
    logits, deltas = network.box_head(features.levels, rois_of(proposals))
    counts, weak = [len(p) for p in proposals], network.selection.detections
    for i, (prediction, probabilities, offsets) in enumerate(
        zip(network(batch), logits.softmax(1).split(counts), deltas.split(counts), strict=True)
    ):
        above = [
            decode_above(proposals[i], probabilities, offsets, batch.sizes[i], threshold, weak.box_weights)
            for threshold in (weak.score_threshold, network.selection.panoptic_score_threshold)
        ]
        strong = replace(weak, score_threshold=network.selection.panoptic_score_threshold)
        found = above[0].select(suppress(above[0], weak, False))
        candidates = above[1].select(suppress(above[1], strong, True))
        both = Candidates.joined([found, candidates])
        rois = F.pad(both.boxes, (1, 0), value=float(i))
        masks = network.mask_head(features.levels, rois, both.classes).split([len(found), len(candidates)])
        fused = fuse(features.scores[i], (64, 96), candidates, masks[1], network.num_stuff)
        assert np.array_equal(prediction.semantic_map, fused.semantic[:, :80].numpy())
        expected = detections_on_photo(found, masks[0], 1.0, (64, 80))
        assert np.array_equal(prediction.instances.boxes, expected.boxes) and len(expected) > 0
        assert np.array_equal(prediction.instances.scores, expected.scores)
        assert prediction.instances.masks == expected.masks
        channels = fused.channels[:, :80].numpy().astype(np.int16)
        segment_map, segments = merge_segments(
            channels,
            fused.semantic[:, :80].numpy().astype(np.int16),
            fused.instances.classes.numpy(),
            fused.instances.scores.numpy(),
            network.num_stuff,
            network.selection.stuff_area_limit,
        )
        assert np.array_equal(prediction.segment_map, segment_map) and prediction.segments == segments


def rois_of(boxes):
    return torch.cat([F.pad(b, (1, 0), value=float(i)) for i, b in enumerate(boxes)])


@torch.no_grad()
def test_views_that_agree_change_nothing():
    """Up to rounding, and as long as suppression removes a box's double, which it does below a threshold of 1."""
    for seed in range(3):
        network = network_for(seed)
        sample = views_of(48, flip=False).sample(photo_of((40, 53), seed))
        (alone,) = network(collate([sample]))
        (threefold,) = network(collate([replace(sample, views=[sample, sample])]))
        assert len(alone.instances) > 0
        assert_alike(threefold, alone, pixels=0.002)
        assert threefold.instances.masks == alone.instances.masks


@pytest.mark.parametrize("short_sides", [(40,), (40, 80), (40, 27, 61)], ids=str)
@torch.no_grad()
def test_a_mirrored_photo_gives_the_mirrored_scores_boxes_and_masks(short_sides, monkeypatch):
    """What the panoptic head is given; it cuts boxes to whole pixels from the left, which has no mirror image."""
    given = []
    monkeypatch.setattr("upsnet.models.upsnet.fuse", lambda *args: (given.append(args), fuse(*args))[1])
    photo, views = photo_of((40, 52)), views_of(*short_sides)
    for seed in range(3):
        network = network_for(seed)
        for each in (photo, photo[:, ::-1]):
            network(collate([views.sample(each)]))
        (scores, _, found, masks, *_), (back_scores, _, back, back_masks, *_) = given[-2:]
        # The two pixels at the right mix in what lies in the padding, as in the plain path.
        back_scores = back_scores[:, :40, :52].flip(2)
        close(scores[:, :40, 2:50], back_scores[:, :, 2:50], rtol=0, atol=1e-4)
        x1, y1, x2, y2 = back.boxes.unbind(1)
        close(found.boxes, torch.stack([51 - x2, y1, 51 - x1, y2], dim=1), rtol=0, atol=1e-3)
        close(found.scores, back.scores, rtol=0, atol=1e-5)
        assert torch.equal(found.classes, back.classes)
        close(masks, back_masks.flip(2), rtol=0, atol=1e-3)
    assert sum(len(candidates) for _, _, candidates, *_ in given) > 20


@torch.no_grad()
def test_mirrored_views_change_something():
    network = network_for(0)
    photo = photo_of((40, 53))
    (plain,) = network(collate([views_of(40, flip=False).sample(photo)]))
    for views in (views_of(40), views_of(40, 60, flip=False)):
        (fused,) = network(collate([views.sample(photo)]))
        assert not np.array_equal(fused.segment_map, plain.segment_map)
        assert (fused.semantic_map == plain.semantic_map).mean() > 0.5


def silence(network, monkeypatch, quiet):
    """The box head finds nothing in the views that `quiet` numbers."""
    heads, calls = network.box_head.forward, []

    def forward(levels, rois):
        logits, deltas = heads(levels, rois)
        calls.append(len(rois))
        if len(calls) - 1 in quiet:
            logits[:, 0] = 99.0
        return logits, deltas

    monkeypatch.setattr(network.box_head, "forward", forward)


@pytest.mark.parametrize("quiet", [{0}, {1, 2}, {0, 1, 2, 3}], ids=str)
@torch.no_grad()
def test_views_without_detections(quiet, monkeypatch):
    network = network_for(1)
    views = views_of(40, 56)
    sample = views.sample(photo_of((40, 53), 1))
    found = [twin.found_in(network, network.features(collate([view]).images), view) for view in spread(sample)]
    assert all(any(score > 0.4 for score, _, _ in of_view) for of_view in found)
    silence(network, monkeypatch, quiet)
    (prediction,) = network(collate([sample]))
    assert (len(prediction.instances) == 0) == (len(quiet) == 4)
    assert prediction.segment_map.shape == (40, 53)
    loud = [box for i, of_view in enumerate(found) if i not in quiet for _, _, box in of_view]
    loud = [np.clip(box, 0, [52, 39, 52, 39]) for box in loud]
    for box in prediction.instances.boxes:
        assert np.abs(loud - box).max(axis=1).min() < 0.05, "every box comes from a view that saw one"


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (3, 90), (33, 31)], ids=str)
@torch.no_grad()
def test_photos_smaller_than_a_stride(size):
    views = Views([Transform((side,), 64, use_caffe_model=False) for side in (8, 5, 40)], flip=True)
    (prediction,) = network_for(2)(collate([views.sample(photo_of(size))]))
    assert prediction.segment_map.shape == prediction.semantic_map.shape == size


@torch.no_grad()
def test_photos_together_give_what_each_gives_alone():
    network, views = network_for(4), views_of(40, 27)
    samples = [views.sample(photo_of(size, i), i) for i, size in enumerate([(40, 53), (40, 55), (80, 107)])]
    together, things = network(collate(samples)), 0
    for sample, prediction in zip(samples, together, strict=True):
        (alone,) = network(collate([sample]))
        assert prediction.image_id == sample.image_id and prediction.segment_map.shape == sample.original_size
        assert_alike(prediction, alone, pixels=0.002)
        things += len(alone.instances)
    assert things > 3


@torch.no_grad()
def test_the_threshold_of_detections_leaves_the_panoptic_map_alone():
    batch = collate([views_of(40, 27).sample(photo_of((40, 53)))])
    network = network_for(0)
    (prediction,) = network(batch)
    network.selection = replace(network.selection, detections=replace(network.selection.detections, score_threshold=2))
    (other,) = network(batch)
    assert len(prediction.instances) > 0 and len(other.instances) == 0
    assert any(segment.score is not None for segment in other.segments) and other.segments == prediction.segments
    assert np.array_equal(other.segment_map, prediction.segment_map)


@torch.no_grad()
def test_half_precision():
    batch = collate([views_of(40, 27).sample(photo_of((40, 53)))])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (prediction,) = network_for(0)(batch)
    assert prediction.instances.scores.dtype == np.float32 and prediction.segment_map.shape == (40, 53)
