"""Non-maximum suppression: the same indices as the loops and as torchvision, ties and degenerate boxes included."""

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.nms import nms as twin
from upsnet.operators import batched_nms, library, nms, nms_flags

VARIANTS = ("generic", "avx2", "avx512")
INF, NAN = float("inf"), float("nan")


def random_boxes(count, seed=0, whole=False, room=60.0, side=40.0):
    draw = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=draw) * room
    boxes = torch.cat([corner, corner + torch.rand(count, 2, generator=draw) * side], 1)
    return boxes.round() if whole else boxes, torch.rand(count, generator=draw)


def proposals(count, seed=0):
    """Around sixty objects of all sizes, as a region proposal network gives them."""
    draw = torch.Generator().manual_seed(seed)
    objects = torch.arange(count) % 60
    centre = (torch.rand(60, 2, generator=draw) * torch.tensor([1216.0, 800.0]))[objects]
    side = torch.exp(torch.randn(60, 2, generator=draw) + 4)[objects]
    centre = centre + torch.randn(count, 2, generator=draw) * side * 0.15
    side = side * torch.exp(torch.randn(count, 2, generator=draw) * 0.15)
    return torch.cat([centre - side / 2, centre + side / 2], 1), torch.rand(count, generator=draw)


def odd_boxes(count, seed=0):
    """Boxes of which every second is empty, inverted, not a number, infinite, huge or tiny."""
    boxes, scores = random_boxes(count, seed, whole=True)
    small = boxes / 8 * 1e-23
    odd = [
        boxes[:, [0, 1, 0, 3]],
        boxes[:, [2, 1, 0, 3]],
        boxes[:, [2, 3, 0, 1]],
        torch.where(torch.arange(4) == 1, NAN, boxes),
        torch.where(torch.arange(4) == 2, INF, boxes),
        torch.where(torch.arange(4) == 0, -INF, boxes),
        boxes * 1e18,
        boxes * 1e30,
        small,
    ]
    kind = torch.arange(count) // 2 % len(odd)
    chosen = torch.stack(odd)[kind, torch.arange(count)]
    return torch.where(torch.arange(count)[:, None] % 2 == 0, boxes, chosen), scores


@pytest.fixture(params=VARIANTS)
def variant(request, monkeypatch):
    monkeypatch.setenv("UPSNET_NATIVE_CPU", request.param)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("count", [0, 1, 2, 63, 400])
def test_same_as_loops_and_torchvision(count, threshold, whole, variant):
    boxes, scores = random_boxes(count, count, whole)
    if whole:
        scores = (scores * 5).round()  # ties
    ours = nms(boxes, scores, threshold)
    assert ours.dtype == torch.int64
    assert torch.equal(ours, torchvision.ops.nms(boxes, scores, threshold))
    if count < 100:
        assert ours.tolist() == twin(boxes.numpy(), scores.numpy(), threshold)


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.5, 0.7, 0.95, 1.5, INF])
@pytest.mark.parametrize("count", [127, 128, 129, 1000, 2500])
def test_boxes_of_all_sizes(count, threshold, variant):
    boxes, scores = proposals(count)
    assert torch.equal(nms(boxes, scores, threshold), torchvision.ops.nms(boxes, scores, threshold))


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 1e-5, 0.3, 0.7, 1.0, NAN])
@pytest.mark.parametrize("count", [18, 400])
def test_odd_boxes(count, threshold, variant):
    boxes, scores = odd_boxes(count)
    ours = nms(boxes, scores, threshold)
    assert torch.equal(ours, torchvision.ops.nms(boxes, scores, threshold))
    if count < 100:
        assert ours.tolist() == twin(boxes.numpy(), scores.numpy(), threshold)


@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1e-12, 1e12, 1e18])
def test_areas_near_the_ends_of_the_range(scale, variant):
    boxes, scores = proposals(300)
    for threshold in (0.01, 0.5, 0.7):
        expected = torchvision.ops.nms(boxes * scale, scores, threshold)
        assert torch.equal(nms(boxes * scale, scores, threshold), expected)


def test_one_box_far_away(variant):
    boxes, scores = proposals(600)
    boxes[300] = torch.tensor([1e6, -3e7, 2e6, -1e7])
    assert torch.equal(nms(boxes, scores, 0.5), torchvision.ops.nms(boxes, scores, 0.5))
    same = boxes[:1].repeat(600, 1)
    assert nms(same, scores, 0.5).tolist() == [int(scores.argmax())]


def test_a_thousand_borderline_overlaps(variant):
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
    alone = nms(boxes, scores, threshold, inclusive=inclusive)
    assert alone.tolist() == twin(boxes.numpy(), scores.numpy(), threshold, None, float(inclusive))


@pytest.mark.parametrize("inclusive", [False, True])
def test_inclusive_boxes_of_all_sizes(inclusive, variant):
    boxes, scores = proposals(700)
    exclusive = boxes + torch.tensor([0, 0, 1, 1]) * inclusive
    assert torch.equal(nms(boxes, scores, 0.5, inclusive), torchvision.ops.nms(exclusive, scores, 0.5))


def flags_one_by_one(boxes, threshold, groups, valid, inclusive):
    """Through the loops, a group at a time."""
    flags = torch.zeros(len(boxes), dtype=torch.bool)
    for group in groups.unique():
        members = ((groups == group) & valid).nonzero().squeeze(1)
        preference = np.arange(len(members), 0, -1)
        flags[members[twin(boxes[members].numpy(), preference, threshold, None, float(inclusive))]] = True
    return flags


@pytest.mark.parametrize("inclusive", [False, True])
def test_flags_of_valid_boxes_in_groups(inclusive, variant, monkeypatch):
    boxes, _ = proposals(420)
    boxes[::50] = NAN
    groups = (torch.arange(420) // 4).clamp(max=60) * 7 - 100  # many small ones and a large one
    valid = torch.rand(420, generator=torch.Generator().manual_seed(1)) > 0.3
    expected = flags_one_by_one(boxes, 0.3, groups, valid, inclusive)
    assert torch.equal(nms_flags(boxes, 0.3, groups, valid, inclusive), expected)
    assert torch.equal(nms_flags(boxes, 0.3, groups.int(), valid, inclusive), expected)
    assert torch.equal(nms_flags(boxes.double(), 0.3, groups, valid, inclusive), expected)
    everything = nms_flags(boxes, 0.3, valid=valid, inclusive=inclusive)
    assert not nms_flags(boxes, 0.3, groups, torch.zeros_like(valid)).any()
    monkeypatch.setattr(library, "NOT_IN_USE_BECAUSE", "test")
    assert torch.equal(nms_flags(boxes, 0.3, groups, valid, inclusive), expected)
    assert torch.equal(nms_flags(boxes, 0.3, valid=valid, inclusive=inclusive), everything)


def test_groups_without_the_library(monkeypatch):
    boxes, scores = random_boxes(300, 5)
    groups = torch.arange(300) % 7 - 3
    native = batched_nms(boxes, (scores * 9).round(), groups, 0.3)
    monkeypatch.setattr(library, "NOT_IN_USE_BECAUSE", "test")
    assert torch.equal(batched_nms(boxes, (scores * 9).round(), groups, 0.3), native)


def test_nothing_to_suppress():
    empty = torch.zeros(0, 4)
    assert nms(empty, torch.zeros(0), 0.5).shape == (0,)
    assert batched_nms(empty, torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.5).shape == (0,)
    assert nms_flags(empty, 0.5, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)).shape == (0,)


def test_views_and_other_dtypes():
    boxes, scores = random_boxes(200, 1)
    expected = torchvision.ops.nms(boxes, scores, 0.5)
    assert torch.equal(nms(torch.cat([boxes, boxes], 1)[:, 4:], torch.stack([scores, scores], 1)[:, 0], 0.5), expected)
    assert torch.equal(nms(boxes.double(), scores.double(), 0.5), expected)
    assert torch.equal(batched_nms(boxes, scores, torch.zeros(200, dtype=torch.int32), 0.5), expected)
    half = boxes.bfloat16()
    expected = torchvision.ops.nms(half.float(), scores, 0.5)
    assert torch.equal(nms(half, scores, 0.5), expected)
    twice = torch.stack([torch.arange(200), torch.arange(200)], 1)[:, 0] // 50, torch.ones(200, 2).bool()[:, 0]
    assert torch.equal(nms_flags(boxes, 0.5, *twice), nms_flags(boxes, 0.5, *(t.contiguous() for t in twice)))


def test_fixture_of_the_original(shared):
    for config in ("resnet50_coco_16gpu", "resnet50_cityscapes_16gpu"):
        data = np.load(shared(f"reference/oracle_fixtures/units_{config}.npz"))
        rows = torch.from_numpy(data["nms::in::dets"])
        kept = nms(rows[:, :4], rows[:, 4], float(data["nms::in::thresh"]), inclusive=True)
        assert kept.tolist() == data["nms::out::keep"].tolist()


native_only = pytest.mark.skipif(not library.native_in_use(), reason=library.NOT_IN_USE_BECAUSE)


@native_only
def test_operator_checks_of_torch():
    boxes, _ = random_boxes(20)
    operator = torch.ops.upsnet.nms_flags.default
    torch.library.opcheck(operator, (boxes, None, None, 0.5, False))
    torch.library.opcheck(operator, (boxes, torch.arange(20) // 5, boxes[:, 0] > 9, 0.5, True))
    torch.library.opcheck(operator, (boxes[:0], None, None, 0.5, True))


@native_only
def test_autocast():
    boxes = random_boxes(50)[0].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flags = torch.ops.upsnet.nms_flags(boxes, None, None, 0.5, False)
    assert torch.equal(flags, nms_flags(boxes.float(), 0.5))


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda n, m: batched_nms(n(3, 5), n(3), m(3), 0.5), "batched_nms: boxes"),
        (lambda n, m: batched_nms(n(3, 4), n(2), m(3), 0.5), "batched_nms: scores"),
        (lambda n, m: batched_nms(n(3, 4), n(3), m(2), 0.5), "batched_nms: groups"),
        (lambda n, m: nms(n(4), n(3), 0.5), "nms: boxes"),
        (lambda n, m: nms(n(3, 4), n(3, 1), 0.5), "nms: scores"),
        (lambda n, m: nms_flags(n(3, 4), 0.5, m(3, 1)), "nms_flags: groups"),
        (lambda n, m: nms_flags(n(3, 4), 0.5, None, m(2).bool()), "nms_flags: valid"),
    ],
)
def test_wrong_shapes_are_refused_by_name(call, word):
    with pytest.raises(ValueError, match=word):
        call(torch.zeros, lambda *shape: torch.zeros(shape, dtype=torch.int64))


@native_only
def test_the_operator_refuses_what_it_cannot_read():
    boxes, groups, valid = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)
    operator = torch.ops.upsnet.nms_flags
    for wrong in (
        (boxes.double(), groups, valid),
        (boxes, groups.int(), valid),
        (boxes, groups, groups),
        (boxes[0],) * 3,
    ):
        with pytest.raises(RuntimeError, match="nms_flags"):
            operator(*wrong, 0.5, False)


@pytest.mark.gpu
@pytest.mark.skipif(not library.native_cuda_in_use() or not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("count", [0, 1, 31, 64, 65, 1000, 5000])
@pytest.mark.parametrize("make", [proposals, odd_boxes, random_boxes])
def test_same_on_a_gpu(make, count, inclusive):
    boxes, scores = make(count, 3)
    singles, tens = torch.arange(count), torch.arange(count) // 10
    valid = scores > 0.2
    for threshold in (0.0, 0.5, 0.7):
        for groups in (None, tens // 50, tens, singles):
            for taking_part in (None, valid):
                expected = nms_flags(boxes, threshold, groups, taking_part, inclusive)
                moved = (None if t is None else t.cuda() for t in (groups, taking_part))
                assert torch.equal(nms_flags(boxes.cuda(), threshold, *moved, inclusive).cpu(), expected)
        kept = batched_nms(boxes.cuda(), scores.cuda(), (tens % 5).cuda(), threshold)
        assert torch.equal(kept.cpu(), batched_nms(boxes, scores, tens % 5, threshold))
