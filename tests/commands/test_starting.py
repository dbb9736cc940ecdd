"""Where workers that torchrun has started begin."""

import pytest

from tests.engine.test_workers import CATEGORIES
from tests.engine.thread_workers import together
from tests.engine.toy import Toy
from tests.tiny import write_tiny
from upsnet import builders
from upsnet.builders.workers import Launch
from upsnet.commands import starting
from upsnet.config import load_recipe
from upsnet.engine.optimizer import build_optimizer
from upsnet.engine.snapshots import ResumeState, Snapshots


@pytest.mark.parametrize(
    "of_rank_1, goes_on",
    [(Launch(["b", "job"], ["b", "job"]), True), (Launch(["a", "job"], ["a"]), True), (Launch(["c"], ["c"]), False)],
    ids=["its machine counts a restart", "its machine was there before", "another launch"],
)
def test_workers_go_on_with_their_launch_whatever_rank_0_knows_of_it(tmp_path, monkeypatch, of_rank_1, goes_on):
    recipe = load_recipe(str(write_tiny(tmp_path)), ["network.pretrained=null"])
    network = Toy()
    optimizer, snapshots = build_optimizer(network), Snapshots(tmp_path, "toy_", CATEGORIES, "recipe")
    snapshots.begin(None, ["a", "job"])
    snapshots.save(network, optimizer, ResumeState(4, 1))
    monkeypatch.setattr(starting, "_resumed", lambda *arguments, **options: arguments[4])
    monkeypatch.setattr(builders, "launch_of", lambda _: Launch(["new"], ["new"]))

    def start(workers):
        monkeypatch.setattr(workers, "gather", _first_as_if(of_rank_1, workers.gather))
        return starting.starting_point(recipe, network, optimizer, snapshots, workers)

    assert together(2, start) == [snapshots.path(4) if goes_on else None] * 2


def _first_as_if(launch, gather):
    """The first exchange is of launches: rank 1 has this one."""
    calls = iter([True])

    def gathered(value):
        values = gather(value)
        return [values[0], (launch, None)] if next(calls, False) else values

    return gathered
