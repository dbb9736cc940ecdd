"""Layers that several parts of the network share."""

import torch

from upsnet.models.layers import DeformConv2d
from upsnet.operators import deform_conv2d


def test_deformable_layer_under_autocast_rounds_features_but_no_places():
    torch.manual_seed(0)
    layer, features = DeformConv2d(8, 4), torch.randn(1, 8, 5, 300)
    torch.nn.init.normal_(layer.offset.weight, std=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        found, offset = layer(features), layer.offset(features)
    assert found.dtype == torch.bfloat16
    rounded = [tensor.bfloat16().float() for tensor in (features, layer.weight, layer.bias)]
    expected = deform_conv2d(rounded[0], offset.float(), *rounded[1:], padding=1)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.01 * expected.abs().max().item())
    places = torch.arange(300.0) + offset.float()[:, 1::2]
    coarse = places.bfloat16().float() - torch.arange(300.0)  # what rounding the places themselves would give
    wrong = torch.stack([offset.float()[:, ::2], coarse], 2).flatten(1, 2)
    assert (deform_conv2d(rounded[0], wrong, *rounded[1:], padding=1) - expected).abs().max() > expected.abs().max() / 4
