"""The training loop on several workers, which here are threads; processes: test_torch_workers.py."""

import json
import math
from dataclasses import replace

import pytest
import torch

from tests.engine.thread_workers import together
from tests.engine.toy import OPTIONS, Toy, batch_of, batches, same_weights
from upsnet.engine.bad_batch import TrainingError
from upsnet.engine.log import TrainingLog
from upsnet.engine.optimizer import build_optimizer
from upsnet.engine.snapshots import Snapshots
from upsnet.engine.train import train
from upsnet.structures.categories import Categories, Category

CATEGORIES = Categories([Category(1, "a", True, (0, 0, 0))])
IMAGES = 4
UNTOLD = {"images_per_second", "data_seconds", "memory", "time"}


def share_of(workers, batch_size):
    """The micro-batches of this worker: consecutive ones of every step."""
    own = IMAGES // workers.count // batch_size
    for number, batch in enumerate(batches(batch_size)):
        if number // own % workers.count == workers.rank:
            yield batch


def run(count, folder, batch_size=1, options=OPTIONS, **network):
    options = replace(options, accumulation=IMAGES // count // batch_size)

    def work(workers):
        own = Toy(**network)
        optimizer = build_optimizer(own)
        log = TrainingLog(folder / "metrics.jsonl") if workers.rank == 0 else None
        validation = [batch_of([7 + workers.rank])] if count == 2 else [batch_of([7]), batch_of([8])]
        train(
            own, share_of(workers, batch_size), optimizer, options, log=log, validation=validation, workers=workers,
            snapshots=Snapshots(folder, f"of_{workers.rank}_", CATEGORIES, "recipe"),
        )  # fmt: skip
        return own

    networks = together(count, work)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return networks, [{k: v for k, v in line.items() if k not in UNTOLD} for line in lines]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_two_workers_train_like_one_with_twice_the_accumulation(tmp_path, precision):
    """Byte for byte as long as a sum has two terms; what is logged, validation too, to the last digit."""
    options = replace(OPTIONS, precision=precision, clip_gradient=0.5, ema=0.7)
    (alone,), told = run(1, tmp_path / "one", 2, options)
    several, told_by_several = run(2, tmp_path / "two", 2, options)
    assert all(same_weights(alone, network) for network in several)
    assert told == told_by_several and len(told) == 2 + 3


@pytest.mark.parametrize("count", [2, 4])
def test_several_workers_train_like_one_up_to_the_order_of_sums(tmp_path, count):
    (alone,), _ = run(1, tmp_path / "one", batch_norm=True)
    several, _ = run(count, tmp_path / "many", batch_norm=True)
    for network in several:
        for name, tensor in network.state_dict().items():
            torch.testing.assert_close(tensor, alone.state_dict()[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("clip_gradient", [None, 0.5])
def test_where_one_workers_gradient_overflows_none_makes_the_step(tmp_path, clip_gradient):
    """fp16: each worker has its own loss scale, and they must stay equal."""

    class Overflowing(Toy):
        def forward(self, batch):
            output = super().forward(batch)
            if batch.image_ids == [103]:
                output.losses["first_loss"].register_hook(lambda gradient: gradient * math.inf)
            return output

    def work(workers):
        network = Overflowing()
        stream = [batch_of([100 + workers.rank]), batch_of([102 + workers.rank])]
        small = {"first_loss": 0.01, "second_loss": 0.01}  # so that nothing else overflows
        options = replace(
            OPTIONS, precision="fp16", clip_gradient=clip_gradient, max_iteration=steps, snapshot_step=1,
            loss_weights=small,
        )  # fmt: skip
        states = []

        class Keeping:
            def save(self, network, optimizer, state):
                states.append(state.scaler["scale"])

        train(network, stream, build_optimizer(network), options, Keeping(), workers=workers)
        return network, states

    steps = 1
    (before, _), _ = together(2, work)
    steps = 2
    (first, scales), (second, _) = together(2, work)
    assert scales == [65536.0, 32768.0]
    assert same_weights(first, second) and same_weights(first, before) and not same_weights(first, Toy())


def test_layers_that_draw_do_so_by_seed_step_and_images():
    def seeds(seed):
        seen = []

        class Seeing(Toy):
            def forward(self, batch):
                seen.append((tuple(batch.image_ids), torch.initial_seed()))
                return super().forward(batch)

        network = Seeing()
        train(network, batches(2), build_optimizer(network), replace(OPTIONS, accumulation=2, seed=seed))
        return seen

    first, again, other = seeds(1), seeds(1), seeds(2)
    assert first == again and not {seed for _, seed in first} & {seed for _, seed in other}
    assert len({seed for _, seed in first}) == len(first) == 20


def test_rank_0_alone_writes_snapshots(tmp_path):
    run(2, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["of_0_10.pth", "of_0_10.state.pth"]


def test_a_loss_that_is_not_finite_stops_all_workers_before_the_step(tmp_path):
    class Broken(Toy):
        def forward(self, batch):
            output = super().forward(batch)
            if 104 in batch.image_ids:
                output.losses["first_loss"] = output.losses["first_loss"] * math.nan
            return output

    def work(workers):
        network = Broken()
        stream = iter([batch_of([100 + workers.rank]), batch_of([103 + workers.rank]), batch_of([1])])
        with pytest.raises(TrainingError, match="step 1: first_loss is nan on image 104: training stops before"):
            train(network, stream, build_optimizer(network), OPTIONS, workers=workers)
        return network

    first, second = together(2, work)
    assert same_weights(first, second) and all(torch.isfinite(p).all() for p in first.parameters())
    assert not same_weights(first, Toy())
