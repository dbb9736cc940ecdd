"""The real commands on two workers: torchrun in a process tree of its own."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from tests.processes import ROOT, clean_environment
from tests.tiny import write_tiny

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TRAIN = str(ROOT / "upsnet/upsnet_end2end_train.py")
STEPS = ["train.max_iteration=20", "train.snapshot_step=20", "train.total_batch=4", "train.lr=0.002"]
UNTOLD = {"images_per_second", "memory", "time", "data_seconds"}


def run(*command, seconds=180):
    """A process tree that does not outlive the test."""
    process = subprocess.Popen(
        [str(word) for word in command], cwd=ROOT, env=clean_environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def weights_of(folder):
    return torch.load(folder / "tiny/train/tiny_20.pth", weights_only=True)["weights"]


def told(folder):
    lines = [json.loads(line) for line in (folder / "tiny/train/metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in UNTOLD} for line in lines]


@pytest.mark.slow
def test_torchrun_on_two_workers_trains_like_one_with_twice_the_accumulation(tmp_path):
    """Trained weights and losses byte for byte; running statistics, which come from other sums, to 1e-5."""
    recipe = write_tiny(tmp_path)
    for name, launcher in (("one", [sys.executable]), ("two", TORCHRUN)):
        code, _, err = run(*launcher, TRAIN, "--cfg", recipe, *STEPS, f"output_path={tmp_path}/{name}")
        assert code == 0, err
        assert ("2 workers × 2 images × 1 micro-batches" in err) == (name == "two")
    one, two = (weights_of(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if "running_" in name:
            torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(two[name], tensor), name
    assert told(tmp_path / "one") == told(tmp_path / "two") and len(told(tmp_path / "one")) == 20


@pytest.mark.slow
def test_torchrun_of_a_recipe_for_horovod_says_what_to_add(tmp_path):
    recipe = write_tiny(tmp_path)
    code, _, err = run(*TORCHRUN, TRAIN, "--cfg", recipe, "train.use_horovod=true")
    assert code != 0 and "add train.use_horovod=false to the command" in err
    assert not (tmp_path / "out").exists()
