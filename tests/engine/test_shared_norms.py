"""Norms over all workers. torch has none for CPUs, so what they compute together only GPUs show."""

import torch
from torch import nn

from upsnet.engine import torch_workers
from upsnet.engine.running_statistics import RunningStatistics
from upsnet.engine.shared_norms import share_norms
from upsnet.engine.torch_workers import TorchWorkers
from upsnet.models.layers import FrozenBatchNorm2d
from upsnet.models.resnet import ResNet


def test_trained_norms_alone_are_replaced_and_keep_what_they_have():
    network = nn.Sequential(
        nn.BatchNorm2d(3, eps=0.1, momentum=0.2), FrozenBatchNorm2d(3), nn.GroupNorm(1, 3), ResNet(18, "batch_norm")
    )
    image = torch.randn(2, 3, 64, 64)
    network[:3](image)
    network[3].train()
    parameters, state = list(network.parameters()), {name: t.clone() for name, t in network.state_dict().items()}
    training = [module.training for module in network.modules()]
    expected = [network[0](image), *network[3](image)]
    network.load_state_dict(state)

    share_norms(network, nn.SyncBatchNorm)

    assert [type(module) for module in network[:3]] == [nn.SyncBatchNorm, FrozenBatchNorm2d, nn.GroupNorm]
    assert not any(type(module) is nn.BatchNorm2d for module in network.modules())
    assert all(own is before for own, before in zip(network.parameters(), parameters, strict=True))
    assert [module.training for module in network.modules()] == training
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    # One process has all the images there are.
    assert all(torch.equal(own, e) for own, e in zip([network[0](image), *network[3](image)], expected, strict=True))


def test_their_statistics_need_no_exchange():
    class Silent:
        rank, count = 1, 2

    network = nn.Sequential(nn.BatchNorm2d(3), FrozenBatchNorm2d(3))
    share_norms(network, nn.SyncBatchNorm)
    RunningStatistics(network, Silent()).merge()


def test_there_is_one_for_gpus_only(monkeypatch):
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch_workers, "rendezvous", lambda _: iter([(torch.distributed.HashStore(), 0, 1)]))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    assert TorchWorkers(torch.device("cpu")).batch_norm is None
    assert TorchWorkers(torch.device("cuda", 1)).batch_norm is nn.SyncBatchNorm
