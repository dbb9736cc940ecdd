import pytest
import torch

from tests.reference import boxes as twin
from upsnet.models.boxes import box_iou, clip, decode, encode

close = torch.testing.assert_close


def random_boxes(count, seed, side=120.0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 4, generator=generator) * side - 10
    boxes = torch.stack([*torch.minimum(corners[:, :2], corners[:, 2:]).T, *corners.T[:2].maximum(corners.T[2:])], 1)
    boxes[::3] = boxes[::3].round()
    return boxes


NASTY = torch.tensor(
    [
        [5, 5, 5, 5],  # one pixel
        [5, 5, 5, 5],
        [0, 0, 0, 80],  # one column
        [6, 5, 9, 5],  # touches the first without sharing a pixel
        [5, 5, 6, 6],
        [-20, -20, -1, -1],  # outside
        [0, 0, 1332.5, 799.3],
        [0.1, 0.2, 0.3, 0.4],  # thinner than a pixel
        [1e4, 1e4, 2e4, 2e4],
    ]
)


@pytest.mark.parametrize("seed", range(3))
def test_overlaps(seed):
    boxes, others = torch.cat([random_boxes(20, seed), NASTY]), torch.cat([NASTY, random_boxes(15, seed + 9)])
    ours, theirs = box_iou(boxes, others), twin.box_iou(boxes, others)
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    assert ours.min() >= 0 and (theirs > 0).sum() > 50


def test_overlap_with_oneself_and_with_nothing():
    close(box_iou(NASTY, NASTY).diagonal(), torch.ones(len(NASTY)), rtol=0, atol=1e-6)
    assert box_iou(NASTY, NASTY)[0, 3] == 0 and box_iou(NASTY, NASTY)[0, 4] == 0.25
    none = torch.zeros(0, 4)
    assert box_iou(none, NASTY).shape == (0, len(NASTY)) and box_iou(NASTY, none).shape == (len(NASTY), 0)
    assert box_iou(none, none).shape == (0, 0)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_coding(weights):
    boxes, targets = torch.cat([random_boxes(30, 1), NASTY]), torch.cat([random_boxes(30, 2), NASTY.flip(0)])
    deltas = encode(boxes, targets, weights)
    expected = [twin.encode_one(b, t, weights) for b, t in zip(boxes, targets, strict=True)]
    close(deltas, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    moves = torch.randn(len(boxes), 4, generator=torch.Generator().manual_seed(3)) * 3 * torch.tensor(weights)
    expected = [twin.decode_one(b, d, weights) for b, d in zip(boxes, moves, strict=True)]
    close(decode(boxes, moves, weights), torch.tensor(expected), rtol=1e-4, atol=1e-2)


def test_decoding_undoes_encoding():
    boxes, targets = random_boxes(50, 4), random_boxes(50, 5)
    close(decode(boxes, encode(boxes, targets)), targets, rtol=1e-4, atol=1e-3)
    assert encode(boxes, boxes).abs().max() == 0
    none = torch.zeros(0, 4)
    assert encode(none, none).shape == decode(none, none).shape == (0, 4)


def test_growth_is_bounded():
    box, wild = torch.tensor([[10.0, 10, 19, 19]]), torch.tensor([[0.0, 0, 500, 500]])
    sides = decode(box, wild)
    close(sides[:, 2:] - sides[:, :2] + 1, torch.full((1, 2), 10 * 1000 / 16))
    assert decode(box, -wild).isfinite().all()


def test_clipping():
    boxes = torch.cat([random_boxes(30, 6), NASTY])
    expected = [twin.clip_one(b, (40, 90)) for b in boxes.tolist()]
    close(clip(boxes, (40, 90)), torch.tensor(expected), rtol=0, atol=1e-5)
    assert clip(boxes[None, :, None], (40, 90)).shape == (1, len(boxes), 1, 4)
