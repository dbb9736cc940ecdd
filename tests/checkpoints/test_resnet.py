"""A ResNet becomes the backbone of a network."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from upsnet.checkpoints.files import Kind, read_weights
from upsnet.checkpoints.loading import load_pretrained
from upsnet.checkpoints.resnet import our_name
from upsnet.models.resnet import ResNet
from upsnet.structures.categories import Categories
from upsnet.structures.errors import WeightsError

NAMES = {
    "conv1.weight": "backbone.stem.conv.weight",
    "bn1.running_var": "backbone.stem.norm.running_var",
    "layer1.0.conv1.weight": "backbone.res2.0.conv1.weight",
    "layer3.22.bn3.bias": "backbone.res4.22.norm3.bias",
    "layer4.0.downsample.0.weight": "backbone.res5.0.downsample.conv.weight",
    "layer4.0.downsample.1.running_mean": "backbone.res5.0.downsample.norm.running_mean",
    "fc.weight": None,
    "classifier.weight": None,
}
NO_CLASSES = Categories([])


class Network(nn.Module):
    """A backbone and a layer more."""

    def __init__(self, depth=18, **options):
        super().__init__()
        self.backbone = ResNet(depth, **options)
        self.neck = nn.Linear(4, 4)


def load(network, path):
    return load_pretrained(network, read_weights(path), NO_CLASSES, seed=0)


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    assert our_name(name) == NAMES[name]


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(model.state_dict(), path)
    return model, path


def features(model, image):
    """C2..C5 of torchvision's ResNet."""
    x = model.maxpool(model.relu(model.bn1(model.conv1(image))))
    levels = []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = layer(x)
        levels.append(x)
    return levels


def test_loaded_backbone_computes_what_torchvision_computes(resnet18):
    model, path = resnet18
    network = Network().eval()
    report = load(network, path)
    assert report.left_out == [] and len(report.loaded) == 100
    assert report.initialised == report.missing == ["neck.weight", "neck.bias"]
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for ours, theirs in zip(network.backbone(image), features(model, image), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_biases_of_convolutions_go_into_the_norms(resnet18, tmp_path):
    """The caffe ResNet-50 that others give out has one in the stem; some copies have them everywhere."""
    model, path = copy.deepcopy(resnet18[0]), tmp_path / "w.pth"
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.rand(module.out_channels) - 0.5)
    torch.save({"state_dict": model.state_dict()}, path)
    network = Network().eval()
    assert load(network, path).left_out == []
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for ours, theirs in zip(network.backbone(image), features(model, image), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_offsets_stay_initialised(resnet18):
    model, path = resnet18
    network = Network(deformable_from=5)
    report = load(network, path)
    assert torch.equal(network.backbone.res5[1].conv2.weight, model.layer4[1].conv2.weight)
    offsets = [f"backbone.res5.{i}.conv2.offset.{kind}" for i in (0, 1) for kind in ("weight", "bias")]
    assert report.initialised == [*offsets, "neck.weight", "neck.bias"]


@pytest.mark.parametrize("options", [{"depth": 34}, {"depth": 50}, {"norm": "group_norm"}])
def test_another_backbone_is_refused(resnet18, options):
    network = Network(**options)
    before = network.backbone.stem.conv.weight.clone()
    with pytest.raises(WeightsError, match=r"another backbone than this recipe .*network\.pretrained"):
        load(network, resnet18[1])
    assert torch.equal(network.backbone.stem.conv.weight, before)


def test_a_deeper_file_is_refused(resnet18):
    small = Network()
    del small.backbone.res5[1]
    with pytest.raises(WeightsError, match=r"the first: backbone\.res5\.1\."):
        load(small, resnet18[1])


def test_file_of_something_else(tmp_path):
    torch.save({"encoder.weight": torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"neither a ResNet nor an UPSNet \(encoder.weight\)"):
        load(Network(), tmp_path / "w.pth")


def test_real_imagenet_weights(shared):
    path = shared("data/resnet50_imagenet") / "resnet50_caffe_imagenet_fp16.pth"
    file = read_weights(path)
    assert file.kind is Kind.RESNET and file.dtypes == {"float16": 54, "float32": 213, "int64": 53}
    network = Network(50)
    report = load(network, path)
    assert report.left_out == [] and len(report.loaded) == 265
    stored = torch.load(path, weights_only=True)
    backbone = network.backbone
    assert backbone.stem.conv.weight.dtype == torch.float32
    assert torch.equal(backbone.res5[2].conv3.weight, stored["layer4.2.conv3.weight"].float())
    assert torch.equal(backbone.res2[0].downsample.norm.running_var, stored["layer1.0.downsample.1.running_var"])
