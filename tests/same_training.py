"""A training by the real command whose result others must reach: the tiny recipe, 20 steps of 4 images."""

import json
from pathlib import Path
from typing import Any

import torch

from tests.processes import ROOT

TRAIN = str(ROOT / "upsnet/upsnet_end2end_train.py")
STEPS = ["train.max_iteration=20", "train.snapshot_step=20", "train.total_batch=4", "train.lr=0.002"]
UNTOLD = {"images_per_second", "memory", "time", "data_seconds"}


def told(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what differs from run to run."""
    lines = [json.loads(line) for line in (folder / "tiny/train/metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in UNTOLD} for line in lines]


def assert_same_training(folder: Path, other: Path, steps: int) -> None:
    """Trained weights and losses byte for byte; running statistics, which come from other sums, to 1e-5."""
    one, two = (
        torch.load(each / f"tiny/train/tiny_{steps}.pth", weights_only=True)["weights"] for each in (folder, other)
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if "running_" in name:
            torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(two[name], tensor), name
    assert told(folder) == told(other) and len(told(folder)) == steps
