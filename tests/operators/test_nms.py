"""Non-maximum suppression: the same indices as the loops and as torchvision, ties and degenerate boxes included."""

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.nms import nms as twin
from upsnet.operators import batched_nms, library, nms, nms_inclusive


def random_boxes(count, seed=0, whole=False):
    draw = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=draw) * 60
    boxes = torch.cat([corner, corner + torch.rand(count, 2, generator=draw) * 40], 1)
    return boxes.round() if whole else boxes, torch.rand(count, generator=draw)


@pytest.mark.parametrize("variant", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("count", [0, 1, 2, 63, 400])
def test_same_as_loops_and_torchvision(count, threshold, whole, variant, monkeypatch):
    monkeypatch.setenv("UPSNET_NATIVE_CPU", variant)
    boxes, scores = random_boxes(count, count, whole)
    if whole:
        scores = (scores * 5).round()  # ties
    ours = nms(boxes, scores, threshold)
    assert ours.dtype == torch.int64
    assert torch.equal(ours, torchvision.ops.nms(boxes, scores, threshold))
    if count < 100:
        assert ours.tolist() == twin(boxes.numpy(), scores.numpy(), threshold)


def test_a_thousand_borderline_overlaps():
    """Whole-numbered boxes on a small grid hit the threshold exactly, where rounding of the union would show."""
    draw = torch.Generator().manual_seed(3)
    corner = torch.randint(0, 12, (1500, 2), generator=draw) / 7
    boxes = torch.cat([corner, corner + torch.randint(1, 12, (1500, 2), generator=draw) / 7], 1)
    scores = torch.rand(1500, generator=draw)
    for threshold in (1 / 3, 0.5, 0.6, 2 / 3, 0.7, 0.75):
        assert torch.equal(nms(boxes, scores, threshold), torchvision.ops.nms(boxes, scores, threshold))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 6)] * 4, st.integers(0, 3), st.integers(-2, 2)), min_size=0, max_size=12),
    st.sampled_from([0.0, 0.25, 0.5, 0.99]),
    st.booleans(),
)
def test_groups_and_inclusive_boxes_against_loops(rows, threshold, inclusive):
    table = np.array(rows, dtype=np.float32).reshape(-1, 6)
    table[:, 2:4] += table[:, :2] - 1  # sides from -1 up: empty and inverted boxes too
    boxes, scores, groups = (torch.from_numpy(a.copy()) for a in (table[:, :4], table[:, 4], table[:, 5]))
    ours = batched_nms(boxes, scores, groups.long(), threshold, inclusive=inclusive)
    assert ours.tolist() == twin(boxes.numpy(), scores.numpy(), threshold, groups.numpy(), float(inclusive))


def test_groups_without_the_library(monkeypatch):
    boxes, scores = random_boxes(300, 5)
    groups = torch.arange(300) % 7 - 3
    native = batched_nms(boxes, (scores * 9).round(), groups, 0.3)
    monkeypatch.setattr(library, "NOT_IN_USE_BECAUSE", "test")
    assert torch.equal(batched_nms(boxes, (scores * 9).round(), groups, 0.3), native)


def test_views_and_other_dtypes():
    boxes, scores = random_boxes(200, 1)
    expected = torchvision.ops.nms(boxes, scores, 0.5)
    assert torch.equal(nms(torch.cat([boxes, boxes], 1)[:, 4:], torch.stack([scores, scores], 1)[:, 0], 0.5), expected)
    assert torch.equal(nms(boxes.double(), scores.double(), 0.5), expected)
    assert torch.equal(batched_nms(boxes, scores, torch.zeros(200, dtype=torch.int32), 0.5), expected)


def test_fixture_of_the_original(shared):
    for config in ("resnet50_coco_16gpu", "resnet50_cityscapes_16gpu"):
        data = np.load(shared(f"reference/oracle_fixtures/units_{config}.npz"))
        rows = torch.from_numpy(data["nms::in::dets"])
        kept = nms_inclusive(rows[:, :4], rows[:, 4], float(data["nms::in::thresh"]))
        assert kept.tolist() == data["nms::out::keep"].tolist()


@pytest.mark.skipif(not library.native_in_use(), reason=library.NOT_IN_USE_BECAUSE)
def test_operator_checks_of_torch():
    boxes, _ = random_boxes(20)
    torch.library.opcheck(torch.ops.upsnet.nms_sorted.default, (boxes, None, 0.5))
    torch.library.opcheck(torch.ops.upsnet.nms_sorted.default, (boxes, torch.arange(20) // 5, 0.5))


@pytest.mark.parametrize(
    ("boxes", "scores", "groups", "word"),
    [
        ((3, 5), (3,), (3,), "boxes"),
        ((3, 4), (2,), (2,), "scores"),
        ((3, 4), (3,), (2,), "groups"),
    ],
)
def test_wrong_shapes_are_refused_by_name(boxes, scores, groups, word):
    with pytest.raises(ValueError, match=word):
        batched_nms(torch.zeros(boxes), torch.zeros(scores), torch.zeros(groups, dtype=torch.int64), 0.5)
