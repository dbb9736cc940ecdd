"""The real commands on two workers: torchrun in a process tree of its own."""

import sys

import pytest

from tests.processes import TORCHRUN, run
from tests.same_training import STEPS, TRAIN, assert_same_training
from tests.tiny import write_tiny


@pytest.mark.slow
def test_torchrun_on_two_workers_trains_like_one_with_twice_the_accumulation(tmp_path):
    recipe = write_tiny(tmp_path)
    for name, launcher in (("one", [sys.executable]), ("two", TORCHRUN)):
        code, _, err = run(*launcher, TRAIN, "--cfg", recipe, *STEPS, f"output_path={tmp_path}/{name}")
        assert code == 0, err
        assert ("2 workers × 2 images × 1 micro-batches" in err) == (name == "two")
    assert_same_training(tmp_path / "one", tmp_path / "two", 20)


@pytest.mark.slow
def test_torchrun_of_a_recipe_for_horovod_says_what_to_add(tmp_path):
    recipe = write_tiny(tmp_path)
    code, _, err = run(*TORCHRUN, TRAIN, "--cfg", recipe, "train.use_horovod=true")
    assert code != 0 and "add train.use_horovod=false to the command" in err
    assert not (tmp_path / "out").exists()
