from dataclasses import replace

import pytest
import torch

from tests.engine.thread_workers import together
from tests.engine.toy import OPTIONS, Toy, batch_of, batches, same_weights
from upsnet.checkpoints.files import read_weights
from upsnet.engine.optimizer import build_optimizer
from upsnet.engine.snapshots import Snapshots, resume
from upsnet.engine.train import train, validation_values
from upsnet.engine.weight_average import WeightAverage
from upsnet.structures.categories import Categories, Category

AVERAGED = replace(OPTIONS, ema=0.6, snapshot_step=5)


@pytest.fixture
def snapshots(tmp_path):
    return Snapshots(tmp_path, "toy_", Categories([Category(1, "a", True, (0, 0, 0))]), "")


def trained(options, steps=10, **arguments):
    network = Toy(batch_norm=True)
    train(network, batches(4), build_optimizer(network), replace(options, max_iteration=steps), **arguments)
    return network


def averages_by_hand(decay, steps=10):
    average = dict(Toy(batch_norm=True).named_parameters())
    for step in range(1, steps + 1):
        own = min(decay, (1 + step) / (10 + step))
        weights = dict(trained(OPTIONS, step).named_parameters())
        average = {name: own * average[name] + (1 - own) * weights[name] for name in average}
    return average


@pytest.mark.parametrize("decay", [0.3, 0.9])
def test_the_weight_file_holds_the_average_and_the_network_keeps_its_weights(snapshots, decay):
    """Against the formula; 0.3 is reached within the ten steps, 0.9 is not."""
    network = trained(replace(AVERAGED, ema=decay), snapshots=snapshots)
    assert same_weights(network, trained(OPTIONS))
    stored = read_weights(snapshots.path(10)).state
    for name, average in averages_by_hand(decay).items():
        torch.testing.assert_close(stored[name], average.detach(), rtol=0, atol=1e-6)
    for name, statistic in network.named_buffers():
        assert torch.equal(stored[name], statistic), name


def test_frozen_weights_have_no_average(snapshots):
    network = Toy()
    network.conv.requires_grad_(False)
    with WeightAverage(network, 0.9).applied() as raw:
        assert raw.keys() == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    with WeightAverage(network, None).applied() as raw:
        assert not raw


@pytest.mark.parametrize("ema", [0.6, None])
def test_a_resumed_training_goes_on_with_its_weights_and_its_average(snapshots, ema):
    """Byte for byte; without an average from there on, the weights are those of the training all the same."""
    whole = trained(AVERAGED, snapshots=snapshots)
    written = snapshots.path(10).read_bytes()
    again = Toy(batch_norm=True)
    optimizer = build_optimizer(again)
    start = resume(snapshots.path(5), optimizer)
    again.load_state_dict(read_weights(snapshots.path(5)).state)
    train(again, batches(4, first_step=5), optimizer, replace(AVERAGED, ema=ema), snapshots, start=start)
    assert same_weights(again, whole)
    assert (snapshots.path(10).read_bytes() == written) == (ema is not None)


def test_validation_looks_at_the_average(snapshots):
    lines = []

    class Log:
        line = lines.append

        def scalars(self, *_):
            pass

    trained(AVERAGED, snapshots=snapshots, validation=[batch_of([1, 2])], log=Log())
    averaged = Toy(batch_norm=True)
    averaged.load_state_dict(read_weights(snapshots.path(10)).state)
    seen = validation_values(averaged, [batch_of([1, 2])], AVERAGED, torch.device("cpu"))
    assert lines[-1]["val_total"] == AVERAGED.total(seen.losses)


def test_workers_have_one_average(snapshots):
    """That of the weights of rank 0, though theirs were others at first."""

    def work(workers):
        network = Toy()
        with torch.no_grad():
            network.conv.bias.add_(workers.rank)
        plain_share = workers.share

        def share(network, optimizer, accumulation):
            network.load_state_dict(workers.gather(network.state_dict())[0])
            return plain_share(network, optimizer, accumulation)

        workers.share = share
        looked = []

        class Looking(list):
            def __iter__(self):
                looked.append({name: weight.clone() for name, weight in network.named_parameters()})
                return iter([batch_of([1])])

        train(network, batches(4), build_optimizer(network), AVERAGED, validation=Looking(), workers=workers)
        return looked

    first, second = together(2, work)
    assert len(first) == 3
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
