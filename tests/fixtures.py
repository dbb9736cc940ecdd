"""Numbers produced by the original UPSNet (`reference/oracle_fixtures`), as dictionaries of arrays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CONFIGURATIONS = ("resnet50_coco_16gpu", "resnet50_cityscapes_16gpu")


def load_units(shared: Callable[[str], Path], configuration: str) -> dict[str, NDArray[Any]]:
    """The single pieces of one configuration; the test skips where the file is not there."""
    path = shared(f"reference/oracle_fixtures/units_{configuration}.npz")
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def piece(units: dict[str, NDArray[Any]], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and outputs of one piece; numbers as tensors, text as str."""
    sides: list[dict[str, Any]] = [{}, {}]
    for key, value in units.items():
        owner, _, rest = key.partition("::")
        if owner == name:
            side, _, field = rest.partition("::")
            sides[side == "out"][field] = str(value) if value.dtype.kind in "US" else torch.from_numpy(np.array(value))
    assert sides[0] or sides[1], f"no piece '{name}' in the file"
    return sides[0], sides[1]


class NumpyDraws:
    """Draws of the original: numpy's legacy generator, `choice` without replacement."""

    def __init__(self, seed: int) -> None:
        self.state = np.random.RandomState(seed)

    def first(self, eligible: Tensor, size: int) -> Tensor:
        candidates, others = np.flatnonzero(eligible), np.flatnonzero(~eligible)
        return torch.from_numpy(np.concatenate([self.choose(candidates, size), others])[:size])

    def choose(self, candidates: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """The first `size` of the candidates in random order, or all of them. Without candidates nothing is drawn."""
        if len(candidates) == 0:
            return candidates
        return self.state.choice(candidates, size=min(size, len(candidates)), replace=False)


class NumpyAnchorDraws(NumpyDraws):
    """Its draws of anchors, positives first: only where there are too many, and of the positives those that go."""

    positives: int | None = None

    def choose(self, candidates: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        if self.positives is not None:
            wanted = size - self.positives
            return super().choose(candidates, wanted) if len(candidates) > wanted else candidates
        self.positives = min(len(candidates), size)
        excess = len(candidates) - self.positives
        return np.setdiff1d(candidates, super().choose(candidates, excess)) if excess else candidates


def street_picture(label: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The BGR picture behind the Cityscapes `losses_*.npz`, of which the files hold the label but only a digest.

    Found from the digest: a colour for each label and blurred noise, from the generator that first shook the corners
    of the eight polygons. All 512 recorded values, the sum and the deviation of the picture are met exactly.
    """
    draws = np.random.RandomState(3)
    draws.uniform(-2, 2, size=8 * 24 * 2)
    colours = draws.randint(0, 255, size=(256, 3)).astype(np.float32)
    noise = cv2.GaussianBlur(draws.randn(*label.shape, 3).astype(np.float32), (0, 0), 2.0)
    return np.clip(colours[label] + np.float32(60) * noise, 0, 255).astype(np.uint8)
