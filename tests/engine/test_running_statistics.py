import pytest
import torch
from torch import nn

from tests.engine.thread_workers import together
from upsnet.engine.running_statistics import RunningStatistics
from upsnet.engine.workers import SingleWorker


def network():
    """Momenta that differ, a norm that is called twice a pass, one without statistics, one over all workers."""
    twice = nn.BatchNorm2d(3, momentum=0.3)
    return nn.Sequential(nn.BatchNorm2d(3), twice, twice, nn.BatchNorm2d(3, track_running_stats=False))


def images(step, number):
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(100 * step + number)) * 3 + number


@pytest.mark.parametrize("count, passes", [(2, 1), (2, 3), (3, 2)])
def test_they_are_those_of_one_worker_after_all_passes(count, passes):
    alone = network()
    for step in range(4):
        for number in range(count * passes):
            alone(images(step, number))

    def work(workers):
        own = network()
        statistics = RunningStatistics(own, workers)
        for step in range(4):
            for number in range(workers.rank * passes, (workers.rank + 1) * passes):
                own(images(step, number))
            statistics.merge()
        return own.state_dict()

    for state in together(count, work):
        for name, expected in alone.state_dict().items():
            torch.testing.assert_close(state[name], expected, rtol=1e-6, atol=1e-7)


def test_without_norms_of_ones_own_nothing_is_exchanged():
    for quiet in (nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3), nn.SyncBatchNorm(3)):
        together(2, lambda workers, quiet=quiet: RunningStatistics(quiet, _Silent(workers)).merge())


class _Silent:
    def __init__(self, workers):
        self.rank, self.count = workers.rank, workers.count


def test_one_worker_alone_keeps_its_statistics():
    alone = network()
    statistics = RunningStatistics(alone, SingleWorker())
    alone(images(0, 0))
    before = {name: tensor.clone() for name, tensor in alone.state_dict().items()}
    statistics.merge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in alone.state_dict().items())
