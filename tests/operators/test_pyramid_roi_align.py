import pytest
import torch

from tests.reference import roi_align as twin
from upsnet.operators.pyramid_roi_align import pyramid_roi_align, roi_levels

close = torch.testing.assert_close


def pyramid(channels=3, side=256, images=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(images, channels, side // (4 * 2**i), side // (4 * 2**i)) for i in range(4)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def square(side, at=0.0):
    return [at, at, at + side - 1, at + side - 1]


def rois_of(boxes):
    return torch.tensor([[i % 2, *box] for i, box in enumerate(boxes)], dtype=torch.float32).reshape(-1, 5)


NASTY = [
    square(1, 7.0),  # one pixel
    square(111.9),
    square(112.0),  # just on the next level
    square(223.9),
    square(224.0),
    square(447.9),
    square(448.0),
    square(2000.0),
    [-40.0, -40, -8, -8],  # outside
    [240.0, 240, 300, 300],  # over the border
    [254.6, 254.6, 255, 255],
    [0.0, 100, 255, 101],  # long and thin
    [10.25, 3.75, 90.5, 77.125],
]


def test_levels_are_those_of_the_rule():
    sides = {1: 0, 111.9: 0, 112: 1, 223.9: 1, 224: 2, 447.9: 2, 448: 3, 1e5: 3}
    assert roi_levels(torch.tensor([square(side) for side in sides])).tolist() == list(sides.values())
    # The geometric mean of the sides counts.
    assert roi_levels(torch.tensor([[0.0, 0, 447, 111], [0.0, 0, 447, 110]])).tolist() == [2, 1]
    assert roi_levels(torch.zeros(0, 4)).shape == (0,)


def test_the_small_term_of_the_rule_stands_inside_the_logarithm():
    """A box whose area falls short of 112² by 2.8e-6 of it is lifted over the border only so."""
    just_short = torch.tensor([[0.0, 0.0, 111.0, 112 * (1 - 2.8e-6) - 1]])
    assert roi_levels(just_short).tolist() == [1]
    assert roi_levels(torch.tensor([[0.0, 0.0, 111.0, 112 * (1 - 6e-6) - 1]])).tolist() == [0]


@pytest.mark.parametrize("output_size", [1, 7, 14])
def test_roi_by_roi(output_size):
    generator = torch.Generator().manual_seed(1)
    start = torch.rand(40, 2, generator=generator) * 200
    boxes = torch.cat([start, start + torch.rand(40, 2, generator=generator) ** 2 * 400], dim=1)
    features, rois = pyramid(), rois_of([*NASTY, *boxes.tolist()])
    assert set(roi_levels(rois[:, 1:]).tolist()) == {0, 1, 2, 3}
    close(pyramid_roi_align(features, rois, output_size), twin.pyramid_roi_align(features, rois, output_size))


@pytest.mark.parametrize("box", NASTY, ids=str)
def test_sample_by_sample(box):
    features = pyramid(channels=1, images=1)
    level = twin.level_of(box)
    expected = twin.roi_align_by_samples(features[level][0, 0].tolist(), box, 1 / (4 * 2**level), 3)
    pooled = pyramid_roi_align(features, torch.tensor([[0.0, *box]]), 3)
    close(pooled[0, 0], torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_without_rois():
    features = [level.requires_grad_() for level in pyramid()]
    pooled = pyramid_roi_align(features, torch.zeros(0, 5), 7)
    assert pooled.shape == (0, 3, 7, 7)
    close(pyramid_roi_align(features, rois_of(NASTY[:1]), 7).shape, torch.Size([1, 3, 7, 7]))


def test_gradients():
    features = [level.requires_grad_() for level in pyramid(channels=1, side=64, dtype=torch.float64)]
    rois = rois_of([[3, 5, 40, 50], [2, 2, 150, 130], [0, 0, 240, 260], [10, 0, 600, 500], [9, 9, 9, 9]]).double()
    assert set(roi_levels(rois[:, 1:]).tolist()) == {0, 1, 2, 3}
    assert torch.autograd.gradcheck(lambda *levels: pyramid_roi_align(levels, rois, 2), features)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_positions(dtype):
    # Eight bits of mantissa would move a box at 1000 pixels by up to 4.
    features = pyramid(side=1024, images=1)
    rois = torch.tensor([[0.0, 901.3, 933.7, 987.2, 999.1], [0, 515.7, 3.3, 1017.9, 505.6]])
    pooled = pyramid_roi_align([level.to(dtype) for level in features], rois, 7)
    assert pooled.dtype == dtype
    exact = twin.pyramid_roi_align([level.to(dtype).float() for level in features], rois, 7)
    close(pooled.float(), exact, rtol=0.01, atol=0.01)
