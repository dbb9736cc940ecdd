import pytest
import torch
import torchvision
from torch import nn

from upsnet.checkpoints.resnet import is_resnet, load_pretrained, resnet_name
from upsnet.models.resnet import ResNet
from upsnet.structures.errors import WeightsError

NAMES = {
    "conv1.weight": "stem.conv.weight",
    "bn1.running_var": "stem.norm.running_var",
    "layer1.0.conv1.weight": "res2.0.conv1.weight",
    "layer3.22.bn3.bias": "res4.22.norm3.bias",
    "layer4.0.downsample.0.weight": "res5.0.downsample.conv.weight",
    "layer4.0.downsample.1.running_mean": "res5.0.downsample.norm.running_mean",
    "fc.weight": None,
    "fc.bias": None,
    "bn1.num_batches_tracked": None,
    "layer1.0.bn1.num_batches_tracked": None,
    "classifier.weight": "classifier.weight",
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    assert resnet_name(name) == NAMES[name]


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
    backbone = ResNet(18).eval()
    report = load_pretrained(backbone, path)
    assert report.left_out == report.initialised == [] and len(report.loaded) == 100
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for ours, theirs in zip(backbone(image), features(model, image), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class Network(nn.Module):
    """A backbone and a layer that depends on the classes."""

    def __init__(self, classes=5, **options):
        super().__init__()
        self.backbone = ResNet(18, **options)
        self.neck = nn.Linear(4, 4)
        self.score = nn.Linear(4, classes)


def test_whole_network_takes_it_as_its_backbone(resnet18):
    model, path = resnet18
    network = Network()
    report = load_pretrained(network, path)
    assert torch.equal(network.backbone.res3[0].conv1.weight, model.layer2[0].conv1.weight)
    assert report.initialised == ["neck.weight", "neck.bias", "score.weight", "score.bias"]


def test_offsets_stay_initialised(resnet18):
    model, path = resnet18
    backbone = ResNet(18, deformable_from=5)
    report = load_pretrained(backbone, path)
    assert torch.equal(backbone.res5[1].conv2.weight, model.layer4[1].conv2.weight)
    assert report.initialised == [f"res5.{i}.conv2.offset.{kind}" for i in (0, 1) for kind in ("weight", "bias")]


@pytest.mark.parametrize("depth", [34, 50])
def test_another_depth_is_refused(resnet18, depth):
    with pytest.raises(WeightsError, match=r"not the ResNet of this recipe .*network\.pretrained"):
        load_pretrained(ResNet(depth), resnet18[1])
    with pytest.raises(WeightsError, match=r"not the ResNet of this recipe"):
        small = ResNet(18)
        del small.res5[1]
        load_pretrained(small, resnet18[1])


def test_snapshot_of_other_classes_fills_what_fits(tmp_path):
    torch.manual_seed(5)
    trained = Network(classes=9)
    categories = [{"id": 1, "name": "cat", "isthing": 1}]
    torch.save(
        {"weights": trained.state_dict(), "categories": categories, "recipe": "", "format_version": 1},
        tmp_path / "s.pth",
    )
    network = Network(classes=5)
    own = network.score.weight.clone()
    report = load_pretrained(network, tmp_path / "s.pth")
    assert torch.equal(network.neck.weight, trained.neck.weight)
    assert torch.equal(network.backbone.stem.conv.weight, trained.backbone.stem.conv.weight)
    assert torch.equal(network.score.weight, own)
    assert report.initialised == ["score.weight", "score.bias"] == report.left_out
    assert report.other_shape["score.weight"] == ((9, 4), (5, 4))
    backbone = ResNet(18)
    load_pretrained(backbone, tmp_path / "s.pth")
    assert torch.equal(backbone.res5[1].conv2.weight, trained.backbone.res5[1].conv2.weight)


def test_file_of_something_else(tmp_path):
    torch.save({"encoder.weight": torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="nothing in common"):
        load_pretrained(Network(), tmp_path / "w.pth")


def test_real_imagenet_weights(shared):
    path = shared("data/resnet50_imagenet") / "resnet50_caffe_imagenet_fp16.pth"
    backbone = ResNet(50)
    report = load_pretrained(backbone, path)
    assert report.left_out == report.initialised == [] and len(report.loaded) == 265
    stored = torch.load(path, weights_only=True)
    assert is_resnet(stored) and backbone.stem.conv.weight.dtype == torch.float32
    assert torch.equal(backbone.res5[2].conv3.weight, stored["layer4.2.conv3.weight"].float())
    assert torch.equal(backbone.res2[0].downsample.norm.running_var, stored["layer1.0.downsample.1.running_var"])
