"""The form of a network that only predicts, against the network itself."""

import numpy as np
import pytest
import torch
from torch import nn

import upsnet
from tests.models.small import SAMPLES, small_network, training_batch
from upsnet.engine.precision import autocast
from upsnet.models.inference import prepare
from upsnet.models.layers import FusedConv, FusedLinear

KINDS = [
    {},
    {"backbone_norm": "batch_norm", "norm": "batch_norm"},
    {"backbone_norm": "group_norm", "norm": "group_norm"},
    {"deformable_from": 4},
]


def network_of(options):
    """A network whose norms are not the identity."""
    network = small_network(lively=True, **options).eval()
    draw = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_(0, 0.1, generator=draw)
            module.weight.data.uniform_(0.7, 1.3, generator=draw)
            module.running_var.uniform_(0.8, 1.8, generator=draw)
    return network


def tensors_of(features):
    return [*features.levels, *features.rpn.logits, *features.rpn.deltas, *features.rpn.anchors, features.scores]


@torch.inference_mode()
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_the_same_features_and_predictions(options):
    network = network_of(options)
    prepared, batch = prepare(network), training_batch(*SAMPLES)
    for expected, found in zip(
        tensors_of(network.features(batch.images)), tensors_of(prepared.features(batch.images)), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    things = 0
    for expected, found in zip(network(batch), prepared(batch), strict=True):
        assert np.mean(found.segment_map == expected.segment_map) > 0.999
        assert len(found.instances) == len(expected.instances)
        np.testing.assert_allclose(found.instances.boxes, expected.instances.boxes, atol=1e-2)
        things += len(expected.instances)
    assert things > 20


def test_the_given_network_stays_as_it_is():
    network = network_of(KINDS[1])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    kinds = [type(module) for module in network.modules()]
    trainable = [parameter.requires_grad for parameter in network.parameters()]
    prepare(network, torch.bfloat16)
    assert [type(module) for module in network.modules()] == kinds
    assert [parameter.requires_grad for parameter in network.parameters()] == trainable
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert sum(network.train()(training_batch("things and stuff")).losses.values()).requires_grad


def test_no_batch_norm_is_left_and_group_norm_stays():
    for options in KINDS[:2]:
        assert not any(isinstance(m, nn.BatchNorm2d) for m in prepare(network_of(options)).modules())
    count = sum(isinstance(m, nn.GroupNorm) for m in network_of(KINDS[2]).modules())
    assert sum(isinstance(m, nn.GroupNorm) for m in prepare(network_of(KINDS[2])).modules()) == count > 0


def test_convolutions_and_linear_layers_are_replaced():
    prepared = prepare(network_of({}))
    assert {name for name, m in prepared.named_modules() if isinstance(m, nn.Conv2d)} == {
        "mask_head.score", "semantic_head.score"
    }  # fmt: skip
    assert not any(isinstance(m, nn.Linear | nn.ConvTranspose2d) for m in prepared.modules())


def test_weights_are_in_bf16_and_what_leaves_the_dense_part_is_not():
    network = network_of({})
    prepared, images = prepare(network, torch.bfloat16), training_batch("things and stuff").images
    with torch.inference_mode(), autocast(torch.device("cpu"), "bf16"):
        found = prepared.features(images)
        assert all(level.dtype == torch.bfloat16 for level in found.levels)
        assert all(t.dtype == torch.float32 for t in tensors_of(found)[len(found.levels) :])
        expected = network.features(images)
        for ours, theirs in zip(tensors_of(found), tensors_of(expected), strict=True):
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=0.05 * float(theirs.abs().max()))
    for name, module in prepared.named_modules():
        if isinstance(module, nn.Conv2d | FusedConv | FusedLinear):
            assert module.weight.dtype == torch.bfloat16, name


@torch.inference_mode()
def test_predictions_in_bf16():
    network, batch = network_of({}), training_batch(*SAMPLES)
    with autocast(torch.device("cpu"), "bf16"):
        found = prepare(network, torch.bfloat16)(batch)
    for ours, theirs in zip(found, network(batch), strict=True):
        assert np.mean(ours.semantic_map == theirs.semantic_map) > 0.97


def test_bf16_on_a_real_photo(shared):
    """A real backbone; the heads are untrained, so that many classes nearly tie: a hard case."""
    weights = shared("data/resnet50_imagenet") / "resnet50_caffe_imagenet_fp16.pth"
    photo = shared("data/coco_mini") / "images/train2017/000000000025.jpg"
    changes = {
        "network.pretrained": str(weights), "network.pretrained_convention": "caffe", "test.scales": [320],
        "test.panoptic_stuff_area_limit": 0,
    }  # fmt: skip
    single, half = (
        upsnet.load("upsnet_resnet50_coco_16gpu", None, "cpu", changes | {"test.precision": precision}).predict(photo)
        for precision in ("fp32", "bf16")
    )
    assert len(single.segments) > 20
    assert np.mean(single.segment_map == half.segment_map) > 0.97
