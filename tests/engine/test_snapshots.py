import errno
import io
import itertools
import json
import multiprocessing
import os
import random
import time
from dataclasses import replace

import pytest
import torch

from tests.engine.toy import OPTIONS, Toy, batches, same_weights
from upsnet.checkpoints.files import read_weights
from upsnet.checkpoints.loading import load_into
from upsnet.engine.optimizer import build_optimizer
from upsnet.engine.snapshots import ResumeState, Snapshots, check_whole, resume, state_path
from upsnet.engine.train import train
from upsnet.structures import places
from upsnet.structures.categories import Categories, Category
from upsnet.structures.errors import PlaceError, WeightsError

CATEGORIES = Categories([Category(7, "cat", True, (1, 2, 3)), Category(90, "sky", False, (4, 5, 6))])


@pytest.fixture
def snapshots(tmp_path):
    return Snapshots(tmp_path / "out", "toy_", CATEGORIES, "seed: 1\n")


def save(snapshots, iteration=4, network=None):
    network = network or Toy()
    return snapshots.save(network, build_optimizer(network), ResumeState(iteration, 1))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_ten_steps_are_five_and_five_byte_for_byte(snapshots, kind, precision):
    options = replace(OPTIONS, snapshot_step=5, precision=precision, clip_gradient=0.5, ema=0.7)
    whole = Toy(dropout=0.2, batch_norm=True)
    train(whole, batches(4), build_optimizer(whole, kind), options, snapshots)
    assert sorted(path.name for path in snapshots.folder.iterdir()) == [
        "snapshots.json", "toy_10.pth", "toy_10.state.pth", "toy_5.pth", "toy_5.state.pth",
    ]  # fmt: skip
    written = {name: (snapshots.folder / name).read_bytes() for name in ("toy_10.pth", "toy_10.state.pth")}

    again = Toy(dropout=0.2, batch_norm=True)
    with torch.no_grad():
        again.conv.weight.zero_()
    optimizer = build_optimizer(again, kind)
    start = resume(snapshots.path(5), optimizer)
    load_into(again, read_weights(snapshots.path(5)).state, "5")
    assert (start.iteration, start.seed) == (5, 1)
    train(again, batches(4, first_step=5), optimizer, options, snapshots, start=start)
    assert same_weights(whole, again)
    assert written == {name: (snapshots.folder / name).read_bytes() for name in written}


def test_the_last_step_is_saved_once_more(snapshots):
    network = Toy()
    train(network, batches(4), build_optimizer(network), replace(OPTIONS, max_iteration=7, snapshot_step=3), snapshots)
    assert sorted(int(p.stem.removeprefix("toy_")) for p in snapshots.folder.glob("toy_?.pth")) == [3, 6, 7]


def test_what_a_snapshot_holds(snapshots):
    network = Toy()
    path = save(snapshots, network=network)
    assert path == snapshots.folder / "toy_4.pth"
    content = torch.load(path, weights_only=True)
    assert content.keys() == {"weights", "categories", "recipe", "iteration", "format_version"}
    assert content["recipe"] == "seed: 1\n" and content["iteration"] == 4
    assert torch.load(state_path(path), weights_only=True)["iteration"] == 4
    read = read_weights(path)
    assert read.categories == CATEGORIES
    assert read.state.keys() == network.state_dict().keys()


@pytest.mark.parametrize("file", [1, 2])
@pytest.mark.parametrize("call", ["write", "sync"])
def test_full_disk_leaves_nothing_half_written(snapshots, monkeypatch, file, call):
    """The disk is full at the first or second file, noticed when writing or only when syncing."""
    save(snapshots)
    before = {p.name: p.read_bytes() for p in snapshots.folder.iterdir()}
    network = Toy()
    network.conv.weight.data.zero_()
    for iteration in (4, 8):
        fails = _FailsAt(file)
        with monkeypatch.context() as patch, pytest.raises(PlaceError) as caught:
            if call == "sync":
                patch.setattr(os, "fsync", fails)
            else:
                patch.setattr(places, "open", lambda *arguments, fails=fails: _Full(fails, *arguments), raising=False)
            save(snapshots, iteration, network)
        assert f"toy_{iteration}.pth: No space left on device" in str(caught.value)
        assert {p.name: p.read_bytes() for p in snapshots.folder.iterdir()} == before


class _FailsAt:
    """Its n-th call finds the disk full."""

    def __init__(self, n):
        self.left = n

    def __call__(self, *_):
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _Full(io.FileIO):
    """A file of which half may be written when the disk is full."""

    def __init__(self, fails, *arguments):
        super().__init__(*arguments)
        self.fails = fails

    def write(self, data):
        super().write(data[: len(data) // 2])
        self.fails()
        return super().write(data[len(data) // 2 :])


def test_stopped_between_the_renames_is_no_complete_pair(snapshots, monkeypatch):
    path = save(snapshots)
    rename, calls = os.replace, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(PlaceError):
        save(snapshots)
    assert calls == [path, state_path(path)]
    assert sorted(p.name for p in snapshots.folder.iterdir()) == ["snapshots.json", path.name]
    with pytest.raises(WeightsError, match=r"toy_4\.state\.pth is missing"):
        network = Toy()
        resume(path, build_optimizer(network))


def test_what_can_be_resumed_is_listed(snapshots):
    network = Toy()
    with pytest.raises(WeightsError, match=r"toy_10\.pth is missing, .* train from the start without train\.resume"):
        resume(snapshots.path(10), build_optimizer(network))
    for iteration in (2, 12, 4):
        snapshots.save(network, build_optimizer(network), ResumeState(iteration, 1))
    state_path(snapshots.path(4)).unlink()
    with pytest.raises(WeightsError, match=r"toy_10\.pth is missing.* a complete one \(toy_2\.pth, toy_12\.pth\)"):
        resume(snapshots.path(10), build_optimizer(network))
    with pytest.raises(WeightsError, match=r"toy_4\.state\.pth is missing.* \(toy_2\.pth, toy_12\.pth\)"):
        resume(snapshots.path(4), build_optimizer(network))


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PlaceError, match=r"toy_4\.pth: .*make room"):
        save(Snapshots(tmp_path / "file" / "out", "toy_", CATEGORIES, ""))


def test_resume_that_does_not_fit(snapshots):
    path = save(snapshots)
    network = Toy()
    with pytest.raises(WeightsError, match=r"CaffeSGD.*AdamW"):
        resume(path, build_optimizer(network, "adamw"))
    network.head.requires_grad_(False)
    with pytest.raises(WeightsError, match="trainable parameters"):
        resume(path, build_optimizer(network))
    with pytest.raises(WeightsError, match=r"toy_99\.pth is missing"):
        resume(snapshots.path(99), build_optimizer(network))
    torch.save({**torch.load(state_path(path), weights_only=True), "format_version": 99}, state_path(path))
    with pytest.raises(WeightsError, match=r"toy_4\.state\.pth has format version 99"):
        resume(path, build_optimizer(Toy()))
    torch.save({"epoch": 1}, state_path(path))
    with pytest.raises(WeightsError, match="not the training state"):
        resume(path, build_optimizer(network))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_how_to_step_is_told_by_the_recipe_not_by_the_snapshot(snapshots, kind):
    network = Toy()
    optimizer = build_optimizer(network, kind)
    if kind == "adamw":
        for group in optimizer.param_groups:
            group["fused"] = None  # as it was once
    train(network, batches(4), optimizer, replace(OPTIONS, max_iteration=4), snapshots)
    again = build_optimizer(network, kind, weight_decay=0.5)
    options = [{name: value for name, value in group.items() if name != "params"} for group in again.param_groups]
    start = resume(snapshots.path(4), again)
    assert options == [{name: group[name] for name in group if name != "params"} for group in again.param_groups]
    assert {group["kind"]: group["weight_decay"] for group in again.param_groups}["weight"] == 0.5
    assert len(again.state) == len(list(network.parameters()))
    train(network, batches(4, first_step=4), again, replace(OPTIONS, max_iteration=5), start=start)


def test_another_seed_is_told(snapshots, caplog):
    network = Toy()
    optimizer = build_optimizer(network)
    start = resume(save(snapshots), optimizer)
    train(network, batches(4), optimizer, replace(OPTIONS, seed=9, max_iteration=5), start=start)
    assert "seed 1" in caplog.text and "seed 9" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_snapshots_of_a_gpu_are_read_without_one(snapshots, precision):
    options = replace(OPTIONS, precision=precision, max_iteration=5)
    network = Toy().cuda()
    train(network, batches(4), build_optimizer(network), options, snapshots)
    for device in ("cpu", "cuda"):
        again = Toy().to(device)
        optimizer = build_optimizer(again)
        assert resume(snapshots.path(5), optimizer).iteration == 5
        load_into(again, read_weights(snapshots.path(5)).state, "5")
        assert same_weights(again.cpu(), network.cpu())


# -- which ones are kept, and which is gone on from --------------------------------------------------------------------


def kept(snapshots):
    """The steps of the complete pairs; there is nothing else but the record."""
    names = {path.name for path in snapshots.folder.iterdir()} - {"snapshots.json"}
    steps = sorted(int(name.removeprefix("toy_").removesuffix(".state.pth")) for name in names if "state" in name)
    assert names == {f"toy_{step}{end}" for step in steps for end in (".pth", ".state.pth")}
    return steps


def test_the_last_ones_are_kept_and_the_best(snapshots):
    snapshots = replace(snapshots, keep=2)
    snapshots.begin(None)
    for step in (1, 2, 3):
        save(snapshots, step)
        if step == 2:
            assert snapshots.is_best(10.0)
            snapshots.set_best(2, 10.0)
            assert not snapshots.is_best(10.0) and snapshots.is_best(10.1)
    assert kept(snapshots) == [2, 3]
    for step in (4, 5):
        save(snapshots, step)
    assert kept(snapshots) == [2, 4, 5]
    snapshots.set_best(5, 11.0)
    assert kept(snapshots) == [4, 5]
    save(snapshots, 6)
    record = json.loads((snapshots.folder / "snapshots.json").read_text())
    assert record == {"launch": [], "snapshots": [4, 5, 6], "best": 5, "pq": 11.0} and kept(snapshots) == [5, 6]


def test_all_are_kept_unless_it_is_said(snapshots):
    for step in range(1, 6):
        save(snapshots, step)
    assert kept(snapshots) == [1, 2, 3, 4, 5]


def test_an_earlier_run_is_neither_gone_on_from_nor_removed(snapshots):
    for step in (2, 4, 90):
        save(snapshots, step)
    snapshots.set_best(90, 50.0)
    snapshots = replace(snapshots, keep=1)
    snapshots.begin(None)
    assert snapshots.newest_whole() is None and snapshots.is_best(1.0)
    save(snapshots, 3)
    save(snapshots, 5)
    assert kept(snapshots) == [2, 4, 5, 90] and snapshots.newest_whole() == snapshots.path(5)


def test_a_run_that_goes_on_keeps_what_was_before_and_replaces_what_came_later(snapshots):
    for step in (2, 4, 6):
        save(snapshots, step)
    snapshots.set_best(6, 50.0)
    snapshots.begin(4, ["job", "host:7"])
    assert snapshots.newest_whole() == snapshots.path(4) and snapshots.is_best(1.0)
    assert snapshots.is_of_launch({"other", "host:7"}) and not snapshots.is_of_launch({"other"})
    snapshots.set_best(2, 40.0)
    snapshots.begin(4)
    assert not snapshots.is_best(39.0)


def test_a_folder_without_record_counts_as_it_is(snapshots):
    """As snapshots were before, or as somebody has copied them."""
    assert snapshots.newest_whole() is None
    for step in (9, 10):
        save(snapshots, step)
    (snapshots.folder / "snapshots.json").unlink()
    assert snapshots.newest_whole() == snapshots.path(10) and not snapshots.is_of_launch([""])
    (snapshots.folder / "snapshots.json").write_text('{"launch"')
    with pytest.raises(WeightsError, match=r"snapshots\.json is damaged: remove it"):
        snapshots.newest_whole()


@pytest.mark.parametrize("file", ["weights", "state"])
@pytest.mark.parametrize("harm", ["cut", "flip", "gone", "exchanged"])
def test_a_damaged_snapshot_is_named_and_the_one_before_used(snapshots, caplog, file, harm):
    for step in (1, 2):
        save(snapshots, step)
    other = Toy()
    other.conv.weight.data.zero_()
    save(snapshots, 3, other)
    newest = snapshots.path(3) if file == "weights" else state_path(snapshots.path(3))
    whole = newest.read_bytes()
    if harm == "gone":
        newest.unlink()
    elif harm == "exchanged":  # whole files that do not belong together
        (snapshots.folder / newest.name.replace("3", "2")).replace(newest)
    else:
        newest.write_bytes(whole[:-30] if harm == "cut" else _flipped(whole, whole.index(b"iteration")))
    assert snapshots.newest_whole() == snapshots.path(1 if harm == "exchanged" else 2)
    assert newest.name in caplog.text and "the snapshot before it is used" in caplog.text


def test_every_byte_of_a_snapshot_is_looked_at(snapshots):
    """A flipped bit anywhere in the weights is noticed; in the training state, or it changes nothing."""
    path = save(snapshots)
    weights, state = path.read_bytes(), state_path(path).read_bytes()
    for place in range(0, len(weights), 97):
        path.write_bytes(_flipped(weights, place))
        with pytest.raises(WeightsError, match=r"toy_4\.pth"):
            check_whole(path)
    path.write_bytes(weights)
    expected, harmless = check_whole(path), 0
    for place in range(0, len(state), 7):
        state_path(path).write_bytes(_flipped(state, place))
        try:
            found = check_whole(path)
        except WeightsError:
            continue
        harmless += 1
        assert found.keys() == expected.keys() and _plain(found) == _plain(expected), place
    assert harmless < len(state) / 7 / 2  # fillings between entries, and their dates


def _plain(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _flipped(data, place):
    return data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]


def test_what_a_killed_run_has_left_is_removed(snapshots):
    path = save(snapshots)
    for name in (".toy_4.pth.77.tmp", ".toy_4.state.pth.77.tmp", ".snapshots.json.77.tmp", ".other.77.tmp"):
        (snapshots.folder / name).write_bytes(b"half")
    snapshots.begin(4)
    left = {each.name for each in snapshots.folder.iterdir()}
    assert left == {path.name, state_path(path).name, "snapshots.json", ".other.77.tmp"}


def test_killed_while_old_ones_are_removed(snapshots):
    """The record names what is half gone; it is neither used nor in the way."""
    snapshots = replace(snapshots, keep=2)
    for step in (1, 2, 3):
        save(snapshots, step)
    state_path(snapshots.path(3)).unlink()
    assert snapshots.newest_whole() == snapshots.path(2)
    snapshots.path(2).unlink()
    save(snapshots, 4)
    save(snapshots, 5)
    assert snapshots.newest_whole() == snapshots.path(5)


def _save_for_ever(snapshots, start, begun):
    network = Toy()
    optimizer = build_optimizer(network)
    snapshots.begin(start)
    begun.set()
    for step in itertools.count(start + 1):
        snapshots.save(network, optimizer, ResumeState(step, 1))


@pytest.mark.slow
def test_killed_at_any_moment_a_whole_snapshot_is_there(snapshots):
    """A process saves without a pause and is killed fifty times, each one going on from what the last one left."""
    snapshots = replace(snapshots, keep=2)
    save(snapshots, 1)
    draws, newest, processes = random.Random(5), 1, multiprocessing.get_context("fork")
    for _ in range(50):
        begun = processes.Event()
        process = processes.Process(target=_save_for_ever, args=(snapshots, newest, begun), daemon=True)
        process.start()
        assert begun.wait(60)
        time.sleep(draws.uniform(0, 0.2))
        process.kill()
        process.join()
        path = snapshots.newest_whole()
        network = Toy()
        start = resume(path, build_optimizer(network))
        load_into(network, read_weights(path).state, "killed")
        assert same_weights(network, Toy()) and start.iteration >= newest and path == snapshots.path(start.iteration)
        newest = start.iteration
    assert newest > 10
