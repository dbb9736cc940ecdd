"""Matching and sampling against their loop twins, fed with the same draws."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.models.test_boxes import random_boxes
from tests.reference import boxes as twin
from upsnet.models.anchors import base_anchors, grid_anchors
from upsnet.models.boxes import box_iou
from upsnet.models.matching import (
    IGNORED,
    AnchorSampling,
    RoISampling,
    mask_targets,
    match_anchors,
    sample_rois,
)
from upsnet.structures.draws import SeededDraws
from upsnet.structures.masks import Bitmap, Masks, Polygons

NONE = torch.zeros(0, 4)
SIZE = (88, 120)
TRUTHS = {
    "none": NONE,
    "one": torch.tensor([[20.0, 10, 60, 50]]),
    "one pixel": torch.tensor([[37.0, 41, 37, 41]]),
    "twins": torch.tensor([[20.0, 10, 60, 50], [20.0, 10, 60, 50]]),
    "tied with several anchors": torch.tensor([[16.0, 16, 47, 47]]),
    "on the border": torch.tensor([[0.0, 0, 119, 87], [100.0, 60, 119, 87]]),
    "outside": torch.tensor([[200.0, 200, 240, 240]]),
    "many": random_boxes(12, 0, 80.0).clamp(min=0),
}


ANCHORS = torch.cat([grid_anchors(base_anchors(stride), 96 // stride, 128 // stride, stride) for stride in (8, 16, 32)])


ANCHOR_OPTIONS = {
    "default": AnchorSampling(),
    "small": AnchorSampling(batch_size=12),
    "crowded": AnchorSampling(batch_size=10, positive_fraction=0.2, positive_overlap=0.3, negative_overlap=0.1),
    "all positive": AnchorSampling(batch_size=6, positive_fraction=1.0, positive_overlap=0.2),
    "straddling": AnchorSampling(batch_size=40, straddle=10.0),
    "anywhere": AnchorSampling(batch_size=40, straddle=-1.0),
}


CROWDS = {
    "no crowd": NONE,
    "a crowd": torch.tensor([[50.0, 20, 119, 80]]),
    "crowds over all": torch.tensor([[0.0, 0, 60, 87], [30.0, 0, 119, 87]]),
    "a crowd outside": torch.tensor([[300.0, 300, 320, 320]]),
}
BOTH = pytest.mark.parametrize("as_original", [True, False], ids=["original", "mended"])


@BOTH
@pytest.mark.parametrize("crowds", CROWDS.values(), ids=CROWDS)
@pytest.mark.parametrize("options", ANCHOR_OPTIONS.values(), ids=ANCHOR_OPTIONS)
@pytest.mark.parametrize("truth", TRUTHS.values(), ids=TRUTHS)
def test_match_anchors(truth, options, crowds, as_original):
    field = ANCHORS
    options = replace(options, as_original=as_original)
    labels, targets = match_anchors(field, truth, crowds, SIZE, options, SeededDraws(5))
    expected, nearest = twin.match_anchors(field, truth, crowds, SIZE, options, SeededDraws(5))
    assert labels.tolist() == [expected.get(i, IGNORED) for i in range(len(field))]
    positive = torch.nonzero(labels == 1).flatten().tolist()
    wanted = [twin.encode_one(field[i], truth[nearest[i]]) for i in positive]
    torch.testing.assert_close(targets[positive], torch.tensor(wanted).reshape(-1, 4), rtol=1e-4, atol=1e-5)
    assert len(positive) <= max(int(options.positive_fraction * options.batch_size), 0)


@BOTH
def test_every_rule_of_the_anchors_is_met_in_these_cases(as_original):
    field, seen = ANCHORS, set()
    for truth in TRUTHS.values():
        for options in ANCHOR_OPTIONS.values():
            options = replace(options, as_original=as_original)
            labels, _ = match_anchors(field, truth, NONE, SIZE, options, SeededDraws(5))
            positive, negative = int((labels == 1).sum()), int((labels == 0).sum())
            seen.add("no negatives" if negative == 0 and len(truth) else "negatives")
            if positive == int(options.positive_fraction * options.batch_size):
                seen.add("full of positives")
            overlaps = box_iou(field, truth).amax(dim=1) if len(truth) else torch.zeros(len(field))
            if (overlaps[labels == 1] < options.negative_overlap).any():
                seen.add("weak positive")
            if (overlaps[labels == 1] == 0).any():
                seen.add("positive beside its box")
    both = {"no negatives", "negatives", "full of positives", "weak positive"}
    assert seen == (both | {"positive beside its box"} if as_original else both)


def test_an_image_smaller_than_every_anchor():
    given = (TRUTHS["one"], NONE, (8, 8), AnchorSampling(), SeededDraws(1))
    labels, targets = match_anchors(ANCHORS, *given)
    assert (labels == IGNORED).all() and targets.abs().sum() == 0
    labels, _ = match_anchors(NONE, *given)
    assert labels.shape == (0,)


def test_an_anchor_may_touch_the_border_but_not_cross_it():
    field = torch.tensor([[0.0, 0, 9, 9], [0, 0, 10, 9], [0, 0, 9, 10], [-1, 0, 8, 9], [0, 0, 9.5, 9]])
    labels, _ = match_anchors(field, field[:1], NONE, (10, 10), AnchorSampling(batch_size=8), SeededDraws(1))
    assert labels.tolist() == [1, IGNORED, IGNORED, IGNORED, 1]


@pytest.mark.parametrize(("batch_size", "original", "mended"), [(4, 3, 3), (5, 0, 4), (6, 0, 4)])
def test_the_original_needs_more_candidates_than_places(batch_size, original, mended):
    field = torch.tensor([[0.0, 0, 9, 9], *([20.0 * i, 20, 20 * i + 9, 29] for i in range(4))])
    for as_original, negatives in ((True, original), (False, mended)):
        options = AnchorSampling(batch_size=batch_size, as_original=as_original)
        labels, _ = match_anchors(field, field[:1], NONE, (100, 100), options, SeededDraws(1))
        assert labels[0] == 1 and (labels == 0).sum() == negatives


def test_a_weak_positive_becomes_background_in_the_original_only():
    field = torch.tensor([[10.0, 10, 19, 19], *([20.0 * i, 40, 20 * i + 9, 49] for i in range(4))])
    truth = torch.tensor([[10.0, 10, 10, 19]])  # a tenth of the first anchor, and no other overlaps it
    labels = set()
    for seed in range(20):
        options = AnchorSampling(batch_size=4, as_original=True)
        labels.add(int(match_anchors(field, truth, NONE, (100, 100), options, SeededDraws(seed))[0][0]))
        options = replace(options, as_original=False)
        assert match_anchors(field, truth, NONE, (100, 100), options, SeededDraws(seed))[0][0] == 1
    assert labels == {0, 1}


def test_discarded_positives_are_no_background():
    field = torch.tensor([[10.0 * i, 0, 10 * i + 9, 9] for i in range(8)])
    options = AnchorSampling(batch_size=8, positive_fraction=0.25, positive_overlap=0.2, negative_overlap=0.2)
    truth = torch.tensor([[0.0, 0, 39, 9], [40.0, 40, 41, 41]])  # a quarter of it is each of the first four anchors
    labels, _ = match_anchors(field, truth, NONE, (100, 100), options, SeededDraws(1))
    assert sorted(labels[:4].tolist()) == [IGNORED, IGNORED, 1, 1] and (labels[4:] == 0).all()


def test_an_anchor_inside_a_crowd_is_no_background():
    field = torch.tensor([[0.0, 0, 9, 9], [3.0, 0, 12, 9], [4.0, 0, 13, 9], [50.0, 50, 59, 59]])
    crowd = torch.tensor([[0.0, 0, 9, 9]])  # all, 0.7 and 0.6 of the first three
    for as_original, options in ((True, {"batch_size": 3}), (False, {}), (False, {"crowd_overlap": 0.65})):
        sampling = AnchorSampling(as_original=as_original, **options)
        labels = [match_anchors(field, NONE, crowd, (99, 99), sampling, SeededDraws(i))[0].tolist() for i in range(20)]
        background = {i for one in labels for i in range(4) if one[i] == 0}
        assert background == ({0, 1, 2, 3} if as_original else {2, 3} if options else {1, 2, 3})


CLASSES = torch.arange(12) % 3 + 1
ROI_OPTIONS = {
    "default": RoISampling(),
    "small": RoISampling(batch_size=16),
    "few foreground": RoISampling(batch_size=10, foreground_fraction=0.1),
    "half": RoISampling(batch_size=5, foreground_fraction=0.5),  # 2.5 rounds to 2
    "hard background": RoISampling(batch_size=32, background_low=0.1, background_high=0.4),
}


@pytest.mark.parametrize("options", ROI_OPTIONS.values(), ids=ROI_OPTIONS)
@pytest.mark.parametrize("crowd", ["none", "some", "all"])
@pytest.mark.parametrize("truth", TRUTHS.values(), ids=TRUTHS)
@pytest.mark.parametrize("count", [0, 1, 60])
@BOTH
def test_sample_rois(truth, crowd, count, options, as_original):
    options = replace(options, as_original=as_original)
    near = truth[torch.arange(count // 2) % len(truth)] + random_boxes(count // 2, 3, 20.0) if len(truth) else NONE
    proposals = torch.cat([random_boxes(count - len(near), 7), near])
    is_crowd = torch.tensor([crowd == "all" or (crowd == "some" and i % 2 == 0) for i in range(len(truth))]).bool()
    given = (proposals, truth, CLASSES[: len(truth)], is_crowd, options)
    sampled = sample_rois(*given, SeededDraws(9)).trimmed()
    expected = twin.sample_rois(*given, SeededDraws(9))
    boxes = torch.from_numpy(np.array([box for box, _, _ in expected], dtype=np.float32).reshape(-1, 4))
    assert torch.equal(sampled.boxes, boxes)
    assert sampled.labels.tolist() == [label for _, label, _ in expected]
    foreground = [(box, truth[owner]) for box, _, owner in expected if owner is not None]
    assert len(sampled.box_targets) == len(foreground)
    wanted = [twin.encode_one(box, target, options.box_weights) for box, target in foreground]
    torch.testing.assert_close(sampled.box_targets, torch.tensor(wanted).reshape(-1, 4), rtol=1e-4, atol=1e-4)
    if as_original:
        assert sampled.owners is None
    else:
        single = torch.nonzero(~is_crowd).flatten()
        assert single[sampled.owners].tolist() == [owner for _, _, owner in expected if owner is not None]


@BOTH
@pytest.mark.parametrize("options", ROI_OPTIONS.values(), ids=ROI_OPTIONS)
def test_padding_of_proposals_and_empty_slots(options, as_original):
    options, truth = replace(options, as_original=as_original), TRUTHS["many"]
    proposals = torch.cat([random_boxes(30, 7), truth + 2, torch.zeros(100, 4)])
    valid = torch.arange(len(proposals)) < 42
    given = (truth, CLASSES[: len(truth)], torch.arange(len(truth)) % 4 == 1, options)
    padded = sample_rois(proposals, *given, SeededDraws(9), valid)
    plain = sample_rois(proposals[:42], *given, SeededDraws(9))
    count, slots = int((plain.labels != IGNORED).sum()), min(options.batch_size, len(truth) + len(proposals))
    assert len(padded.labels) == len(padded.boxes) == slots and (padded.labels[count:] == IGNORED).all()
    assert len(padded.box_targets) == min(round(options.foreground_fraction * options.batch_size), slots)
    first, second = padded.trimmed(), plain.trimmed()
    assert torch.equal(first.boxes, second.boxes) and torch.equal(first.labels, second.labels)
    assert torch.equal(first.box_targets, second.box_targets)
    assert (first.labels[len(first.box_targets) :] == 0).all() and (first.labels[: len(first.box_targets)] > 0).all()
    known = padded.foreground()[: len(first.box_targets)]
    assert (
        torch.equal(known[:, :4], first.boxes[: len(known)])
        and known[:, 4].tolist() == first.labels[: len(known)].tolist()
    )
    assert known[:, 5].tolist() == ([-1] * len(known) if as_original else first.owners.tolist())


def test_a_crowd_lends_its_class_but_not_its_box_in_the_original():
    given = torch.tensor([[10.0, 10, 50, 48], [80.0, 80, 90, 90]]), torch.tensor([[10.0, 10, 50, 50]])
    classes = torch.tensor([2]), torch.tensor([True])
    sampled = sample_rois(*given, *classes, RoISampling(as_original=True), SeededDraws(1)).trimmed()
    assert sampled.boxes.tolist() == given[0].tolist() and sampled.labels.tolist() == [2, 0]
    sampled = sample_rois(*given, *classes, RoISampling(), SeededDraws(1)).trimmed()
    assert sampled.boxes.tolist() == [[80, 80, 90, 90]] and sampled.labels.tolist() == [0]


def test_a_proposal_mostly_inside_a_crowd_is_not_sampled():
    truth = torch.tensor([[0.0, 0, 9, 9], [0.0, 0, 99, 9]])  # a thing inside a crowd
    proposals = torch.tensor([[0.0, 0, 9, 8], [93.0, 0, 102, 9], [94.0, 0, 103, 9]])  # 1, 0.7 and 0.6 inside it
    given = (proposals, truth, torch.tensor([1, 2]), torch.tensor([False, True]))
    sampled = sample_rois(*given, RoISampling(), SeededDraws(1)).trimmed()
    expected = {tuple(box) for box in (*truth[:1].tolist(), *proposals[1:].tolist())}
    assert {tuple(box) for box in sampled.boxes.tolist()} == expected
    assert sampled.labels.tolist() == [1, 0, 0]
    sampled = sample_rois(*given, RoISampling(crowd_overlap=0.65), SeededDraws(1)).trimmed()
    assert len(sampled.boxes) == 2


def test_mask_targets_come_from_the_nearest_mask_in_the_original():
    square = Polygons((np.array([10.0, 10, 40, 10, 40, 40, 10, 40]),))
    dot = Bitmap(70, 5, np.ones((1, 1), dtype=bool))
    masks = Masks([square, dot])
    boxes = torch.tensor([[10.0, 10, 40, 40], [70.0, 5, 70, 5], [60.0, 0, 72, 8], [200.0, 200, 220, 220]])
    targets = mask_targets(boxes, masks, 14)
    assert targets.shape == (4, 14, 14) and targets.dtype == torch.float32
    for i, (mask, box) in enumerate(zip([square, dot, dot, square], boxes.double().numpy(), strict=True)):
        assert np.array_equal(targets[i].numpy(), mask.crop(box, 14))
    assert targets[0].mean() > 0.9 and targets[1].all() and 0 < targets[2].sum() < 20 and targets[3].sum() == 0
    assert mask_targets(NONE, masks, 14).shape == (0, 14, 14)


def test_mask_targets_come_from_the_own_mask():
    """Two things whose boxes tell another story than their masks: a box drawn by hand, and a mask beside it."""
    left, right = (Bitmap(x, 0, np.ones((10, 10), dtype=bool)) for x in (0, 10))
    boxes = torch.tensor([[0.0, 0, 9, 9], [0.0, 0, 9, 9]])
    targets = mask_targets(boxes, Masks([left, right]), 14, torch.tensor([0, 1]))
    assert targets[0].all() and not targets[1].any()
    assert mask_targets(boxes, Masks([left, right]), 14).all()
