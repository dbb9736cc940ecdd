"""What is ours of the workers of Horovod, with a stand-in for it; the real one: tests/test_horovod.py."""

import sys
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.engine.toy import OPTIONS, Toy, batches, same_weights
from upsnet.engine.optimizer import build_optimizer
from upsnet.engine.standing import unpack
from upsnet.engine.train import train

CPU = torch.device("cpu")


class Lost(Exception):
    """A worker is lost, in the middle of a step."""


class Changed(Exception):
    """There are other machines, noticed at the end of a step."""


class StandIn:
    """Horovod as one worker of `count` whose others have zeros for gradients, so that a sum is its own part."""

    def __init__(self):
        self.said, self.count, self.failures = [], 1, {}
        self.steps = 0
        hvd = self.hvd = ModuleType("horovod.torch")
        hvd.Sum, hvd.rank, hvd.local_rank, hvd.size = "sum", lambda: 0, lambda: 0, lambda: self.count
        hvd.init, hvd.shutdown = lambda: self.said.append("init"), lambda: self.said.append("shutdown")
        hvd.broadcast_parameters = lambda tensors, root_rank: self.check(*tensors.values())
        hvd.broadcast_object = lambda value, root_rank, name: value
        hvd.allgather_object = self.gather
        hvd.allreduce = lambda tensor, op, name: tensor
        hvd.DistributedOptimizer = self.optimizer
        hvd.elastic = SimpleNamespace(run=self.run)

    def modules(self):
        common = ModuleType("horovod.common.elastic")
        outer = self

        class State:
            def __init__(self, bcast_object, get_rank):
                pass

            def check_host_updates(self):
                outer.fail("end of step")

        common.State = State
        package = ModuleType("horovod")
        package.torch = self.hvd
        return {
            "horovod": package,
            "horovod.torch": self.hvd,
            "horovod.common": ModuleType("horovod.common"),
            "horovod.common.elastic": common,
        }

    def check(self, *tensors):
        assert all(tensor.is_contiguous() for tensor in tensors)

    def gather(self, value, name):
        return [value] * self.count

    def fail(self, where):
        if (where, self.steps) in self.failures:
            raise self.failures.pop((where, self.steps))

    def optimizer(self, optimizer, named_parameters, compression, backward_passes_per_step, op):
        assert op == "sum" and self.count * backward_passes_per_step == 4
        assert [id(p) for _, p in named_parameters] == [id(p) for p in self.network.parameters()]

        def synchronize(own):
            self.steps += 1
            self.fail("in a step")
            for group in own.param_groups:
                for parameter in group["params"]:
                    sent, context = compression.compress(parameter.grad)
                    self.check(sent)
                    parameter.grad.set_(compression.decompress(sent, context))

        @contextmanager
        def skip_synchronize(own):
            yield

        methods = {"synchronize": synchronize, "skip_synchronize": skip_synchronize}
        return type(type(optimizer).__name__, (type(optimizer),), methods)(optimizer.param_groups)

    def run(self, work):
        """As Horovod's own does it."""

        def repeated(state):
            fresh = True
            while True:
                if fresh:
                    state.sync()
                try:
                    return work(state)
                except Lost:
                    state.restore()
                    fresh = True
                except Changed:
                    fresh = False
                self.said.append("reset")
                state.reset()

        return repeated


@pytest.fixture
def stand_in(monkeypatch):
    stand_in = StandIn()
    for name, module in stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "upsnet.engine.horovod_workers", raising=False)
    yield stand_in
    sys.modules.pop("upsnet.engine.horovod_workers", None)


def trained(stand_in, compression="none", **network):
    workers = import_module("upsnet.engine.horovod_workers").HorovodWorkers(CPU, compression)
    options = replace(OPTIONS, accumulation=4)

    def work(kept):
        stand_in.network = Toy(**network).to(memory_format=torch.channels_last)
        optimizer = build_optimizer(stand_in.network)
        start = unpack(kept, stand_in.network, optimizer) if kept else None
        first = start.iteration if start else 0
        stand_in.said.append(first)
        train(stand_in.network, batches(1, first_step=first), optimizer, options, start=start, workers=workers)
        return stand_in.network

    network = workers.run(work)
    workers.close()
    return network


def alone(**network):
    network = Toy(**network).to(memory_format=torch.channels_last)
    train(network, batches(1), build_optimizer(network), replace(OPTIONS, accumulation=4))
    return network


def test_training_is_that_of_one_worker_and_memory_without_gaps_travels(stand_in):
    assert same_weights(trained(stand_in), alone())
    assert stand_in.said == ["init", 0, "shutdown"]


def test_fp16_rounds_gradients_on_their_way(stand_in):
    rounded, exact = trained(stand_in, "fp16"), alone()
    assert not same_weights(rounded, exact)
    for name, tensor in exact.state_dict().items():
        torch.testing.assert_close(rounded.state_dict()[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("where, error", [("in a step", Lost()), ("end of step", Changed())])
def test_other_workers_go_on_after_the_last_whole_step(stand_in, monkeypatch, where, error):
    """A step that breaks off has moved the running statistics; they come back, too."""
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    stand_in.failures = {(where, 4): error}
    done = 3 if where == "in a step" else 4
    assert same_weights(trained(stand_in, batch_norm=True), alone(batch_norm=True))
    assert stand_in.said == ["init", 0, "reset", done, "shutdown"]


def test_workers_lost_before_the_first_step_begin_anew(stand_in, monkeypatch):
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    stand_in.failures = {("in a step", 1): Lost()}
    assert same_weights(trained(stand_in), alone())
    assert stand_in.said == ["init", 0, "reset", 0, "shutdown"]


def test_without_elastic_an_error_ends_the_run(stand_in):
    stand_in.failures = {("in a step", 2): Lost()}
    with pytest.raises(Lost):
        trained(stand_in)
