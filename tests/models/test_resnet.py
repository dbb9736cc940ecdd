import itertools

import pytest
import torch
import torchvision
from torch import nn

from upsnet.models.layers import DeformConv2d, FrozenBatchNorm2d
from upsnet.models.resnet import DEPTHS, ResNet

close = torch.testing.assert_close
IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def shake(module):
    """Norms with statistics and factors that are not 0 and 1."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)


def copy_from_torchvision(ours, theirs):
    """Module by module: both have the same layers in the same order, apart from where shortcuts stand."""

    def layers(block):
        shortcut = [m for m in block.downsample.modules() if not list(m.children())] if block.downsample else []
        own = [m for name, m in block.named_children() if name.startswith(("conv", "norm", "bn"))]
        convs = [m for m in own if isinstance(m, nn.Conv2d)]
        norms = [m for m in own if isinstance(m, nn.BatchNorm2d)]
        return convs + norms + [m for m in shortcut if not isinstance(m, nn.Identity)]

    pairs = [(ours.stem.conv, theirs.conv1), (ours.stem.norm, theirs.bn1)]
    for number in range(1, 5):
        stages = zip(ours.get_submodule(f"res{number + 1}"), theirs.get_submodule(f"layer{number}"), strict=True)
        for our_block, their_block in stages:
            pairs += zip(layers(our_block), layers(their_block), strict=True)
    for our_layer, their_layer in pairs:
        our_layer.load_state_dict(their_layer.state_dict())


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_equals_torchvision(depth):
    torch.manual_seed(1)
    theirs = torchvision.models.get_model(f"resnet{depth}", weights=None).eval()
    shake(theirs)
    ours = ResNet(depth, stride_in_1x1=False)
    copy_from_torchvision(ours, theirs)
    with torch.no_grad():
        expected, x = [], theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(IMAGE))))
        for number in range(1, 5):
            x = theirs.get_submodule(f"layer{number}")(x)
            expected.append(x)
        features = ours(IMAGE)
    for ours_c, theirs_c in zip(features, expected, strict=True):
        close(ours_c, theirs_c, rtol=1e-5, atol=1e-5 * float(theirs_c.abs().max()))
    assert ours.out_channels == [f.shape[1] for f in features]


def test_the_place_of_the_stride():
    torch.manual_seed(2)
    in_3x3 = ResNet(50, stride_in_1x1=False)
    in_1x1 = ResNet(50, stride_in_1x1=True)
    in_1x1.load_state_dict(in_3x3.state_dict())
    with torch.no_grad():
        ours, theirs = in_1x1(IMAGE), in_3x3(IMAGE)
    assert [f.shape for f in ours] == [f.shape for f in theirs]
    assert [tuple(f.shape[1:]) for f in ours] == [(256 * 2**i, 16 // 2**i, 24 // 2**i) for i in range(4)]
    close(ours[0], theirs[0])  # res2 has no stride
    assert (ours[1] - theirs[1]).abs().max() > 0.1
    assert in_1x1.res3[0].conv1.stride == (2, 2) and in_1x1.res3[0].conv2.stride == (1, 1)
    assert in_1x1.res3[1].conv1.stride == (1, 1)


def test_frozen_batch_norm():
    norm = FrozenBatchNorm2d(4).train()
    shake(norm)
    norm.requires_grad_(False)
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    y = norm(x)
    y.square().sum().backward()
    shape = (1, 4, 1, 1)
    deviation = (norm.running_var + norm.eps).sqrt().view(shape)
    expected = (x - norm.running_mean.view(shape)) / deviation * norm.weight.view(shape) + norm.bias.view(shape)
    close(y, expected)
    assert x.grad.abs().sum() > 0 and norm.weight.grad is None and norm.bias.grad is None
    assert all(torch.equal(value, state[name]) for name, value in norm.state_dict().items())


@pytest.mark.parametrize("norm", ["frozen_batch_norm", "batch_norm", "group_norm"])
@pytest.mark.parametrize("freeze_at", range(6))
def test_freezing(freeze_at, norm):
    torch.manual_seed(0)
    network = ResNet(18, norm=norm, freeze_at=freeze_at).train()
    before = {name: value.clone() for name, value in network.state_dict().items() if "running" in name}
    parts = ["stem", "res2", "res3", "res4", "res5"]
    frozen = parts[:freeze_at]
    loss = sum(feature.square().mean() for feature in network(IMAGE))
    if freeze_at < 5:
        loss.backward()
    for name, parameter in network.named_parameters():
        expected = name.split(".")[0] not in frozen
        if norm == "frozen_batch_norm" and ("norm" in name):
            expected = False
        assert parameter.requires_grad == expected, name
        assert (parameter.grad is not None) == expected, name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, name
    for name, value in before.items():
        moves = norm == "batch_norm" and name.split(".")[0] not in frozen
        assert torch.equal(value, network.state_dict()[name]) != moves, name
    assert loss.requires_grad == (freeze_at < 5)


def deformable_blocks(network):
    return [name for name, module in network.named_modules() if isinstance(module, DeformConv2d)]


@pytest.mark.parametrize("depth", [18, 50])
def test_deformable_blocks(depth):
    blocks = DEPTHS[depth].blocks
    conv = "conv2"
    every = {n: [f"res{n}.{i}.{conv}" for i in range(blocks[n - 2])] for n in range(2, 6)}
    assert deformable_blocks(ResNet(depth)) == []
    for start in (3, 4, 5):
        expected = list(itertools.chain(*(every[n] for n in range(start, 6))))
        assert deformable_blocks(ResNet(depth, deformable_from=start)) == expected
    assert deformable_blocks(ResNet(depth, deformable_last=True)) == [every[3][-1], every[4][-1]]
    assert deformable_blocks(ResNet(depth, deformable_from=5, deformable_last=True)) == [
        every[3][-1],
        every[4][-1],
        *every[5],
    ]


@pytest.mark.parametrize("stride_in_1x1", [True, False])
@pytest.mark.parametrize("depth", [18, 50])
def test_a_new_deformable_network_equals_the_plain_one(depth, stride_in_1x1):
    torch.manual_seed(3)
    plain = ResNet(depth, stride_in_1x1=stride_in_1x1)
    shake(plain)
    deformable = ResNet(depth, stride_in_1x1=stride_in_1x1, deformable_from=3)
    missing, unexpected = deformable.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and missing and all(".offset." in name for name in missing)
    with torch.no_grad():
        for ours, theirs in zip(deformable(IMAGE), plain(IMAGE), strict=True):
            close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
        nn.init.normal_(deformable.res3[-1].conv2.offset.bias)
        assert (deformable(IMAGE)[1] - plain(IMAGE)[1]).abs().max() > 0.01


def test_a_trained_batch_norm_learns_its_statistics_in_training_only():
    network = ResNet(18, norm="batch_norm", freeze_at=0)
    before = network.res5[0].norm1.running_mean.clone()
    with torch.no_grad():
        network.eval()(IMAGE)
        assert torch.equal(network.res5[0].norm1.running_mean, before)
        network.train()(IMAGE)
    assert not torch.equal(network.res5[0].norm1.running_mean, before)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm, freeze_at", [("batch_norm", 0), ("batch_norm", 2), ("group_norm", 1)])
def test_blocks_computed_anew_give_the_same_byte_for_byte(norm, freeze_at, precision):
    """Gradients, and running statistics, which must move once."""

    def passed(checkpointing):
        torch.manual_seed(0)
        network = ResNet(50, norm=norm, freeze_at=freeze_at, deformable_last=True, checkpointing=checkpointing).train()
        kept, large = [], IMAGE.numel()

        def keep(tensor):
            kept.append(tensor.untyped_storage().data_ptr() if tensor.numel() > large else None)
            return tensor

        for _ in range(2):
            with (
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
                torch.autocast("cpu", precision, enabled=precision != torch.float32),
            ):
                loss = sum(feature.float().square().mean() for feature in network(IMAGE))
            loss.backward()
        return network, {name: p.grad for name, p in network.named_parameters() if p.requires_grad}, len(kept)

    plain, gradients, kept = passed(False)
    anew, gradients_anew, kept_anew = passed(True)
    assert all(torch.equal(gradients_anew[name], gradient) for name, gradient in gradients.items())
    state = anew.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    assert kept_anew < kept / 4


def test_without_gradients_nothing_is_computed_anew(monkeypatch):
    monkeypatch.setattr("upsnet.models.resnet.checkpoint", None)
    network = ResNet(18, checkpointing=True)
    with torch.no_grad():
        network.train()(IMAGE)
    network.eval()(IMAGE)
