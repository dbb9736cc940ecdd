import itertools

import pytest
import torch
from torch.nn import functional as F

from upsnet.models.fpn import FPN

close = torch.testing.assert_close
CHANNELS = (8, 16, 24, 32)


def features_of(height=64, width=96, images=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(images, c, height // 2**i, width // 2**i) for i, c in enumerate(CHANNELS, start=2)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(
    ("global_average", "upsample", "norm"),
    list(itertools.product([False, True], ["nearest", "bilinear"], ["none", "group_norm", "batch_norm"])),
)
def test_against_the_formula(global_average, upsample, norm):
    torch.manual_seed(0)
    fpn = FPN(CHANNELS, 32, global_average, upsample, norm).eval()
    features = features_of()
    with torch.no_grad():
        levels = fpn(features)
        c2, c3, c4, c5 = (layer(feature) for layer, feature in zip(fpn.lateral, features, strict=True))
        if global_average:
            mean = features[3].sum(dim=(2, 3)) / (features[3].shape[2] * features[3].shape[3])
            c5 = c5 + (mean @ fpn.global_average.weight.T + fpn.global_average.bias)[:, :, None, None]
        tops = [c5]
        for lateral in (c4, c3, c2):
            align = {} if upsample == "nearest" else {"align_corners": False}
            tops.insert(0, lateral + F.interpolate(tops[0], scale_factor=2, mode=upsample, **align))
        expected = [layer(top) for layer, top in zip(fpn.output, tops, strict=True)]
        expected.append(expected[3][:, :, ::2, ::2])
    assert len(levels) == 5
    for ours, theirs in zip(levels, expected, strict=True):
        close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert [tuple(level.shape) for level in levels] == [(2, 32, 64 // s, 96 // s) for s in (4, 8, 16, 32)] + [
        (2, 32, 1, 2)
    ]


def test_the_global_average_sees_the_padding():
    torch.manual_seed(0)
    features = features_of()
    padded = [F.pad(feature, (0, feature.shape[-1])) for feature in features]
    plain, average = FPN(CHANNELS, 32), FPN(CHANNELS, 32, global_average=True)
    average.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        # Far from the padding (the left column of P5) only the average tells the two apart.
        close(plain(padded)[3][..., :1], plain(features)[3][..., :1])
        assert (average(padded)[3][..., :1] - average(features)[3][..., :1]).abs().max() > 0.01


def test_every_parameter_learns():
    fpn = FPN(CHANNELS, 32, global_average=True, norm="group_norm")
    sum(level.square().sum() for level in fpn(features_of())).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in fpn.parameters())
    assert fpn.channels == 32
