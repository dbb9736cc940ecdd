"""What ends or outlives a training on one or several workers, with toy networks."""

import math
import os
import signal
from dataclasses import replace

import pytest
import torch

from tests.engine.test_workers import CATEGORIES
from tests.engine.thread_workers import together
from tests.engine.toy import OPTIONS, Toy, batch_of, batches, same_weights
from upsnet.engine.bad_batch import TrainingError, write_batch
from upsnet.engine.optimizer import build_optimizer
from upsnet.engine.snapshots import Snapshots, resume
from upsnet.engine.train import train
from upsnet.structures.errors import DataError, PlaceError, Stopped


def snapshots_in(folder, **options):
    return Snapshots(folder, "toy_", CATEGORIES, "recipe", **options)


def with_signal(stream, at):
    for number, batch in enumerate(stream):
        if number == at:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch


def test_a_signal_stops_after_a_snapshot_from_which_training_goes_on(tmp_path, caplog):
    snapshots, network = snapshots_in(tmp_path), Toy()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=r"after step 3; .*train\.resume=auto"):
        train(network, with_signal(batches(4), 3), build_optimizer(network), OPTIONS, snapshots)
    assert signal.getsignal(signal.SIGTERM) == before and snapshots.newest_whole() == snapshots.path(3)
    assert "stopped by a signal after step 3" in caplog.text
    optimizer, whole = build_optimizer(network), Toy()
    train(network, batches(4, first_step=3), optimizer, OPTIONS, start=resume(snapshots.path(3), optimizer))
    train(whole, batches(4), build_optimizer(whole), OPTIONS)
    assert same_weights(network, whole)


def test_a_bad_loss_names_the_images_and_stores_the_batch_of_the_first_worker_that_has_one(tmp_path):
    class Broken(Toy):
        def forward(self, batch):
            output = super().forward(batch)
            output.losses["first_loss"] = output.losses["first_loss"] * (1 if 103 in batch.image_ids else math.nan)
            return output

    def work(workers):
        def store(batch, step):
            path = tmp_path / f"of_{workers.rank}_at_{step}.pth"
            write_batch(path, batch)
            return [path]

        network, stream = Broken(), iter([batch_of([103 + workers.rank]), batch_of([1])])
        with pytest.raises(TrainingError) as caught:
            train(network, stream, build_optimizer(network), OPTIONS, store_batch=store, workers=workers)
        return str(caught.value)

    first, second = together(2, work)
    assert first == second and "step 0: first_loss is nan on image 104: " in first
    assert first.endswith(f"look at 104.jpg, stored as the network saw it in {tmp_path}/of_1_at_0.pth")
    (path,) = tmp_path.iterdir()
    content = torch.load(path, weights_only=True)
    assert content["image_ids"] == [104] and torch.equal(content["images"], batch_of([104]).images)


def test_where_the_batch_cannot_be_stored_the_loss_is_named_all_the_same():
    def store(batch, step):
        raise PlaceError("the disk is full")

    network = Toy()
    network.conv.bias.data.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"is nan on image .* no file .the disk is full"):
        train(network, batches(4), build_optimizer(network), OPTIONS, store_batch=store)


@pytest.mark.parametrize("phase", ["training", "validation"])
def test_what_one_worker_cannot_load_ends_all(phase, caplog):
    def broken():
        yield from (batch_of([1]), batch_of([2]))
        raise DataError("image 3 is cut off")

    def work(workers):
        network, fine = Toy(), [batch_of([5])] * 2
        stream, validation = batches(4), fine
        if workers.rank == 1:
            stream, validation = (broken(), fine) if phase == "training" else (stream, broken())
        with pytest.raises(DataError, match="image 3 is cut off") as caught:
            train(network, stream, build_optimizer(network), OPTIONS, validation=validation, workers=workers)
        return caught.value.told

    assert together(2, work) == [True, True]
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == ["image 3 is cut off"]


def test_a_full_disk_of_rank_0_ends_all(tmp_path, monkeypatch):
    def full(*_):
        raise PlaceError("no room")

    monkeypatch.setattr(Snapshots, "save", full)

    def work(workers):
        network = Toy()
        with pytest.raises(PlaceError, match="no room"):
            train(
                network, batches(4), build_optimizer(network), replace(OPTIONS, snapshot_step=2),
                snapshots_in(tmp_path), workers=workers,
            )  # fmt: skip

    together(2, work)


def test_the_best_tested_snapshot_is_kept(tmp_path):
    qualities = iter([10.0, 30.0, 20.0, 15.0, 12.0])
    options = replace(OPTIONS, snapshot_step=5, test_step=2)
    snapshots, network = snapshots_in(tmp_path, keep=1), Toy()
    train(network, batches(4), build_optimizer(network), options, snapshots, test=lambda stopped: next(qualities))
    assert sorted(path.name for path in tmp_path.glob("*.state.pth")) == ["toy_10.state.pth", "toy_4.state.pth"]
    assert not snapshots.is_best(30.0) and snapshots.is_best(30.1)


def test_a_best_snapshot_that_cannot_be_written_costs_no_other_one(tmp_path, monkeypatch):
    def full(*_):
        raise PlaceError("no room")

    options, snapshots, network = replace(OPTIONS, snapshot_step=3, test_step=4), snapshots_in(tmp_path, keep=1), Toy()

    def test(stopped):
        monkeypatch.setattr(Snapshots, "save", full)
        return 50.0

    with pytest.raises(PlaceError, match="no room"):
        train(network, batches(4), build_optimizer(network), options, snapshots, test=test)
    assert snapshots.newest_whole() == snapshots.path(3) and snapshots.is_best(1.0)


def test_stopped_before_its_first_step_a_resumed_run_leaves_its_snapshot_as_it_is(tmp_path, monkeypatch):
    snapshots, network, options = snapshots_in(tmp_path), Toy(), replace(OPTIONS, max_iteration=3)
    train(network, batches(4), build_optimizer(network), options, snapshots)
    monkeypatch.setattr(Snapshots, "save", lambda *_: pytest.fail("written once more"))
    optimizer = build_optimizer(network)
    start = resume(snapshots.path(3), optimizer)
    snapshots.begin(3)
    with pytest.raises(Stopped, match="after step 3"):
        train(network, with_signal(batches(4, first_step=3), 0), optimizer, OPTIONS, snapshots, start=start)


def test_skipped_images_are_named_once_and_counted(caplog):
    stream = (replace(batch, skipped=["image 3 is cut off"]) for batch in batches(4))
    network = Toy()
    train(network, stream, build_optimizer(network), OPTIONS)
    assert caplog.text.count("image 3 is cut off") == 1
    assert "1 bad images were skipped, 10 times in all" in caplog.text
