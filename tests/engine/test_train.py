import json
import logging
import math
import re
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.engine.toy import IMAGES, OPTIONS, Recorder, Toy, batch_of, batches, same_weights
from upsnet.engine.bad_batch import TrainingError
from upsnet.engine.log import TrainingLog
from upsnet.engine.optimizer import build_optimizer
from upsnet.engine.schedule import learning_rate
from upsnet.engine.train import train
from upsnet.structures.draws import SeededDraws


def trained(options=OPTIONS, batch_size=4, kind="sgd", network=None, **arguments):
    network = network or Toy()
    train(network, batches(batch_size), build_optimizer(network, kind), options, **arguments)
    return network


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_same_seed_twice_gives_the_same_weights_byte_for_byte(kind):
    dropout = [trained(kind=kind, network=Toy(dropout=0.3)) for _ in range(2)]
    assert same_weights(*dropout)
    assert not same_weights(dropout[0], trained(replace(OPTIONS, seed=2), kind=kind, network=Toy(dropout=0.3)))
    assert not same_weights(dropout[0], Toy())


@pytest.mark.parametrize("batch_size", [1, 2])
def test_accumulation_gives_the_weights_of_one_large_batch(batch_size):
    large = trained().state_dict()
    small = trained(replace(OPTIONS, accumulation=4 // batch_size), batch_size).state_dict()
    for name, tensor in large.items():
        torch.testing.assert_close(small[name], tensor, rtol=0, atol=1e-5)


def test_accumulation_of_unequal_batches_is_the_mean_over_images():
    options = replace(OPTIONS, max_iteration=1)
    whole, parts = Toy(), Toy()
    train(whole, [batch_of([1, 2, 3, 4])], build_optimizer(whole), options)
    cut = [batch_of([1, 2, 3]), batch_of([4])]
    train(parts, cut, build_optimizer(parts), replace(options, accumulation=2))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_one_step_is_that_of_the_weighted_loss():
    """Against autograd and the update rule written out; the warm-up's first rate is a tenth."""
    network, by_hand = Toy(), Toy()
    seen = []
    train(network, batches(4), build_optimizer(network), replace(OPTIONS, max_iteration=1), on_first_batch=seen.append)
    assert [len(batch.draws) for batch in seen] == [4]
    draws = [SeededDraws(1, 0, i, int(f)) for i, f in zip(seen[0].image_ids, seen[0].flipped, strict=True)]
    output = by_hand(replace(seen[0], draws=draws))
    (output.losses["first_loss"] + 0.5 * output.losses["second_loss"]).backward()
    for name, parameter in by_hand.named_parameters():
        factor = 2 if name in ("conv.bias", "head.bias") else 1
        decay = 1e-4 if name in ("conv.weight", "head.weight") else 0
        expected = parameter - factor * 0.005 * (parameter.grad + decay * parameter)
        torch.testing.assert_close(network.get_parameter(name), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_gradient_is_cut_to_its_greatest_norm(precision):
    """Over all weights together, in the loss' own units: fp16 scales the loss by 65536, which must not count."""

    def change(clip_gradient):
        weights = {"first_loss": 0.01, "second_loss": 0.01}  # so that nothing overflows
        options = replace(OPTIONS, max_iteration=1, precision=precision, clip_gradient=clip_gradient)
        network = Toy()
        optimizer = torch.optim.SGD([{"params": list(network.parameters()), "factor": 1.0}])
        train(network, batches(4), optimizer, replace(options, loss_weights=weights))
        before = dict(Toy().named_parameters())
        return torch.cat([(before[name] - w).flatten() for name, w in network.named_parameters()]).detach() / 0.005

    free = change(None)
    norm = float(free.norm())
    assert norm > 0.01
    torch.testing.assert_close(change(norm / 4), free / 4, rtol=0.01, atol=norm / 1000)
    torch.testing.assert_close(change(norm * 2), free, rtol=0, atol=norm / 1000)


def test_momentum_is_divided_at_the_decay_and_only_for_the_step_schedule(monkeypatch):
    calls = []
    network = Toy()
    optimizer = build_optimizer(network)
    monkeypatch.setattr(optimizer, "divide_momentum", lambda by: calls.append((by, optimizer.param_groups[0]["lr"])))
    train(network, batches(4), optimizer, OPTIONS)
    # After the sixth update, which still had the full rate.
    assert calls == [(10, 0.05)]
    train(network, batches(4), optimizer, replace(OPTIONS, lr_schedule="poly"))
    assert len(calls) == 1


def test_training_ends_at_the_last_step_and_not_with_the_epoch():
    log = Recorder()
    options = replace(OPTIONS, max_iteration=3, steps_per_epoch=5, display_iter=1)
    train(network := Toy(), batches(4), build_optimizer(network), options, log=log)
    assert [line["iteration"] for line in log.lines] == [1, 2, 3]


def test_losses_fall():
    network = Toy()
    log = Recorder()
    train(
        network, batches(4), build_optimizer(network), replace(OPTIONS, max_iteration=200, decay_iterations=()), log=log
    )
    totals = [line["total"] for line in log.lines]
    assert totals[-1] < 0.5 * totals[0]


class Poisoned(Toy):
    """One image turns one loss into NaN or infinity."""

    value = math.nan

    def forward(self, batch):
        output = super().forward(batch)
        if 104 in batch.image_ids:
            output.losses["second_loss"] = output.losses["second_loss"] * self.value
        return output


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_loss_stops_before_the_step(value):
    stream = [batch_of([101, 102]), batch_of([103, 105]), batch_of([101, 106]), batch_of([104, 107])]
    network, before = Poisoned(), Toy()
    network.value = value
    options = replace(OPTIONS, max_iteration=2, accumulation=2)
    with pytest.raises(TrainingError, match=r"step 1: second_loss is (nan|inf) on image 104, 107: .*train\.lr"):
        train(network, stream, build_optimizer(network), options)
    train(before, stream[:2], build_optimizer(before), replace(options, max_iteration=1))
    assert same_weights(network, before)


def test_draws_follow_from_seed_step_image_and_flip():
    class Keeps(Toy):
        def forward(self, batch):
            kept.extend(d.first(torch.ones(1000, dtype=torch.bool), 5).tolist() for d in batch.draws)
            return super().forward(batch)

    expected = [
        SeededDraws(1, step, image_id, int(batch.flipped[0])).first(torch.ones(1000, dtype=torch.bool), 5).tolist()
        for step, batch in zip(range(10), batches(4), strict=False)
        for image_id in batch.image_ids
    ]
    for batch_size in (1, 4):
        kept: list[list[int]] = []
        trained(replace(OPTIONS, accumulation=4 // batch_size), batch_size, network=Keeps())
        assert kept == expected


def test_batches_that_end_early_are_a_bug_that_is_named():
    network = Toy()
    with pytest.raises(ValueError, match="ended at step 2 of 10"):
        train(network, [batch_of([1])] * 5, build_optimizer(network), replace(OPTIONS, accumulation=2))


def test_validation_moves_nothing_and_repeats_itself():
    log, quiet = Recorder(), Recorder()
    looked = trained(network=Toy(batch_norm=True, dropout=0.2), validation=[batch_of([1, 2]), batch_of([3])], log=log)
    plain = trained(network=Toy(batch_norm=True, dropout=0.2), log=quiet)
    assert same_weights(looked, plain) and looked.training and looked.norm.training
    lines = [line for line in log.lines if "val_total" in line]
    assert [(line["iteration"], line["epoch"]) for line in lines] == [(4, 0), (8, 1), (10, 2)]
    assert lines[0].keys() == {
        "iteration", "epoch", "val_total", "val_first_loss", "val_second_loss", "val_accuracy", "time",
    }  # fmt: skip
    assert lines[0]["val_total"] == pytest.approx(lines[0]["val_first_loss"] + 0.5 * lines[0]["val_second_loss"])
    frozen = replace(OPTIONS, lr=0.0)
    log = Recorder()
    trained(frozen, network=Toy(dropout=0.2), validation=[batch_of([1, 2]), batch_of([3])], log=log)
    values = [line["val_total"] for line in log.lines if "val_total" in line]
    assert values[0] == values[1] == values[2]


def test_validation_weighs_images_not_batches():
    frozen = replace(OPTIONS, max_iteration=1, lr=0.0)
    results = []
    for cut in ([batch_of([1, 2, 3])], [batch_of([1, 2]), batch_of([3])]):
        log = Recorder()
        trained(frozen, validation=cut, log=log)
        results.append(log.lines[-1]["val_total"])
    assert results[0] == pytest.approx(results[1], abs=1e-6)


def test_what_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="upsnet")
    with TrainingLog(tmp_path / "out" / "metrics.jsonl", tmp_path / "board") as log:
        trained(log=log, validation=[batch_of([1])])
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "total" in line]
    assert [line["iteration"] for line in training] == [5, 10]
    assert training[0].keys() == {
        "iteration", "epoch", "lr", "total", "first_loss", "second_loss", "accuracy", "images_per_second",
        "data_seconds", "memory", "time",
    }  # fmt: skip
    assert training[0]["total"] == pytest.approx(training[0]["first_loss"] + 0.5 * training[0]["second_loss"])
    assert training[1]["lr"] == learning_rate(9, 0.05, 10, (6,), 3)
    assert training[0]["memory"] > 10 and training[0]["images_per_second"] > 0

    scalars = EventAccumulator(str(tmp_path / "board"))
    scalars.Reload()
    assert set(scalars.Tags()["scalars"]) == {
        "train_total_loss", "train_first_loss", "train_second_loss", "train_accuracy", "val_first_loss",
        "val_second_loss", "val_accuracy",
    }  # fmt: skip
    assert [event.step for event in scalars.Scalars("train_total_loss")] == list(range(1, 11))

    texts = [record.getMessage() for record in caplog.records]
    number = r"-?\d+\.\d+"
    values = rf"first_loss={number},\tsecond_loss={number},\taccuracy={number},\t"
    speed = rf"Speed: {number} samples/sec\tData: {number} sec/sample"
    assert re.fullmatch(rf"Batch \[5\]\t{speed}\tTrain-{values}", texts[1])
    assert re.fullmatch(rf"Batch \[4\]\t Epoch\[0\]\tVal-{values}", texts[0])
    # The text log gives means since the epoch began: at step 5 those of the first step of the second epoch.
    events = [event.value for event in scalars.Scalars("train_first_loss")]
    assert float(re.search(rf"first_loss=({number})", texts[1])[1]) == pytest.approx(events[4], abs=1e-5)
    assert training[0]["first_loss"] == pytest.approx(sum(events[:5]) / 5, abs=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_trains(precision):
    log = Recorder()
    network = trained(replace(OPTIONS, precision=precision, max_iteration=60), log=log)
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    totals = [line["total"] for line in log.lines]
    assert totals[-1] < 0.8 * totals[0]


def test_every_image_of_the_toy_set_is_seen():
    network = trained(replace(OPTIONS, max_iteration=40))
    assert {image_id for image_id, _ in network.seen} == set(range(100, 100 + IMAGES))
