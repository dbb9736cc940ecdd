"""The test command on several workers, which here are threads: files and scores are those of one worker."""

import json
import logging
import shutil
import sys
import threading

import pytest
import torch

from tests.engine.thread_workers import together
from tests.processes import ROOT, TORCHRUN, run
from tests.tiny import copy_run, upsnet
from upsnet import builders, commands
from upsnet.commands import testing, training
from upsnet.config import load_recipe
from upsnet.structures.errors import PlaceError

TEST = str(ROOT / "upsnet/upsnet_end2end_test.py")


@pytest.fixture
def done(tiny_run, tmp_path, monkeypatch):
    """A copy of the finished run. Threads that all log for themselves must leave the logger as it was."""
    logger = logging.getLogger("upsnet")
    monkeypatch.setattr(logger, "propagate", logger.propagate)
    yield copy_run(tiny_run, tmp_path)
    logger.handlers.clear()


@pytest.fixture
def run_on(monkeypatch):
    """Runs `commands.test` on several workers; what it returns on each. own: further changes for each worker."""
    this = threading.local()
    monkeypatch.setattr(builders, "build_workers", lambda *_, **__: (this.workers, torch.device("cpu")))

    def run_on(count, recipe, *changes, own=None, **options):
        def work(workers):
            this.workers = workers
            made = load_recipe(str(recipe), [*changes, *(own[workers.rank] if own else [])])
            try:
                return commands.test(made, **options)
            except BaseException:
                workers.abandon()
                raise

        return together(count, work)

    return run_on


def results_of(recipe):
    return recipe.parent / "out/tiny/val/results"


def files_of(folder):
    """The bytes of every file."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "count, changes", [(2, []), (3, ["test.batch_size=1", "dataset.limit=2"]), (3, ["test.batch_size=4"])]
)
def test_files_and_scores_are_those_of_one_worker(done, run_on, capsys, count, changes):
    shutil.rmtree(results_of(done))
    (summary,) = run_on(1, done, *changes)
    alone, told = files_of(results_of(done)), capsys.readouterr().out
    shutil.rmtree(results_of(done))
    assert run_on(count, done, *changes) == [summary, *[{}] * (count - 1)]
    assert files_of(results_of(done)) == alone and "summary.json" in alone
    assert capsys.readouterr().out == told and "AP50" in told


def test_what_an_earlier_test_left_does_not_count(done, run_on):
    before = files_of(results_of(done))
    leftover = results_of(done) / "parts"
    leftover.mkdir()
    (leftover / "1.json").write_text('[\n{"image_id": 3}\n]\n')
    run_on(2, done)
    assert files_of(results_of(done)) == before and not leftover.exists()
    leftover.mkdir()
    run_on(1, done)
    assert not leftover.exists()


def test_stored_results_are_scored_by_rank_0_alone(done, run_on):
    before = files_of(results_of(done))
    (results_of(done) / "summary.json").unlink()
    shutil.rmtree(done.parent / "out/tiny/train")
    summary, other = run_on(2, done, eval_only=True)
    assert other == {} and summary == json.loads(before["summary.json"]) and files_of(results_of(done)) == before


def test_pictures_are_shared_out(done, run_on):
    pictures = []
    for count in (1, 2):
        shutil.rmtree(results_of(done))
        assert run_on(count, done, "test.vis_mask=true") == [{}] * count
        pictures.append(files_of(results_of(done)))
    assert pictures[0] == pictures[1] and len(pictures[0]) == 6


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_fails_leaves_no_results_that_look_whole(done, run_on, monkeypatch, rank):
    class Full(testing.PartWriter):
        def __init__(self, folder, worker, *others):
            super().__init__(folder, worker, *others)
            self.worker, self.photos = worker, 0

        def add(self, prediction, measured):
            super().add(prediction, measured)
            self.photos += 1
            if (self.worker, self.photos) == (rank, 2):
                raise PlaceError("the disk of this worker is full")

    shutil.rmtree(results_of(done))
    monkeypatch.setattr(testing, "PartWriter", Full)
    with pytest.raises(PlaceError, match="the disk of this worker is full"):
        run_on(2, done)
    left = {path for path in results_of(done).rglob("*") if path.is_file()}
    assert left, "the other worker's, and PNGs"
    assert not any(path.name in ("index.json", f"{rank}.json") or path.parent == results_of(done) for path in left)
    assert upsnet("report", "--cfg", done).code == 2


def test_workers_that_share_no_folder_hear_so_before_the_first_image(done, run_on, tmp_path):
    own = [[], [f"output_path={tmp_path}/elsewhere"]]
    weights = done.parent / "out/tiny/train/tiny_2.pth"
    with pytest.raises(
        PlaceError, match=r"1\.json: the results of worker 1 do not arrive where worker 0 runs: set out"
    ):
        run_on(2, done, own=own, weights=weights)
    assert not (results_of(done) / "index.json").exists()


def test_validation_images_are_shared_out_by_a_training(done):
    recipe = load_recipe(str(done), ["test.batch_size=1"])
    dataset = builders.build_training_set(recipe)

    def seen(workers):
        return [batch.image_ids for batch in training._validation_batches(recipe, dataset, workers)]

    (alone,) = together(1, seen)
    first, second = together(2, seen)
    assert first == alone[::2] and second == alone[1::2] and len(alone) == 6


def test_a_plain_test_for_several_gpus_becomes_a_launch_but_not_to_score_what_is_stored(done, monkeypatch):
    launched = []
    monkeypatch.setattr(commands, "launch_on_several_gpus", lambda recipe, **options: launched.append(options))
    assert upsnet("test", "--cfg", done, "--eval_only").code == 0 and launched == []
    assert upsnet("test", "--cfg", done).code == 0 and launched == [{"for_training": False}]


@pytest.mark.slow
def test_torchrun_on_two_workers_tests_like_one(done, tiny_run):
    shutil.rmtree(results_of(done))
    code, out, err = run(*TORCHRUN, TEST, "--cfg", done)
    assert code == 0 and out.strip() == tiny_run.tested.out.strip(), err
    assert err.count("2 workers share the images out") == 1
    code, alone, err = run(sys.executable, TEST, "--cfg", done, f"output_path={done.parent}/alone", "--weight_path",
                           done.parent / "out/tiny/train/tiny_2.pth")  # fmt: skip
    assert code == 0 and alone.splitlines()[:-1] == out.splitlines()[:-1], err
    assert files_of(done.parent / "alone/tiny/val/results") == files_of(results_of(done))
