"""What a training step of UPSNet-50 on COCO keeps in memory: does it fit a card of 11 GB at batch 1?

    python benchmarks/memory.py [--out table.md] [--short_side 800] [--long_side 1333] [--things 90] [--device cuda]

Counted on the CPU, from one step of the recipe on an image of noise with as many things as COCO's fullest photos have:
weights, gradients, momentum, what the forward pass saves for the backward pass (each storage once, weights not again),
and the greatest sum of all tensors alive at one time. With --device cuda the latter is what the allocator has taken
from the card at most: beside tensors, work space of convolutions and gaps between blocks. The context of CUDA, some
0.5 GB, is in neither.
"""

import argparse
import copy
import datetime
import sys
import weakref
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from benchmarks.operators import parser_of, positive, processor, show
from upsnet import builders
from upsnet.config import load_recipe
from upsnet.engine.optimizer import set_learning_rate
from upsnet.engine.precision import Precision, autocast
from upsnet.structures.class_tables import class_table
from upsnet.structures.draws import SeededDraws
from upsnet.structures.masks import Bitmap, Masks
from upsnet.structures.sample import Batch, Instances

RECIPE = "upsnet_resnet50_coco_16gpu"
CARD = 11 * 2**30
MIB = 2**20


def batch_of_noise(height: int, width: int, things: int) -> Batch:
    """One image with this many elliptic things of all sizes and random stuff, as the data set would give it."""
    generator = np.random.default_rng(0)
    categories = class_table("coco")
    assert categories is not None
    centres = generator.uniform((0.1, 0.1), (0.9, 0.9), (things, 2)) * (width, height)
    halves = generator.uniform(0.02, 0.3, (things, 2)) ** 1.5 * (width, height) + 4
    ys, xs = np.mgrid[:height, :width]
    maps = [((xs - x) / w) ** 2 + ((ys - y) / h) ** 2 < 1 for (x, y), (w, h) in zip(centres, halves, strict=True)]
    boxes = [(np.flatnonzero(m.any(0))[[0, -1]], np.flatnonzero(m.any(1))[[0, -1]]) for m in maps]
    instances = Instances(
        torch.tensor([[x[0], y[0], x[1], y[1]] for x, y in boxes], dtype=torch.float32),
        torch.from_numpy(generator.integers(1, categories.num_classes, things)),
        torch.zeros(things, dtype=torch.bool),
        Masks([Bitmap.from_map(m) for m in maps]),
    )
    padded = -(-height // 32) * 32, -(-width // 32) * 32
    semantic = torch.full((1, *padded), -1, dtype=torch.int16)
    semantic[0, :height, :width] = torch.from_numpy(np.kron(
        generator.integers(0, categories.num_stuff, (8, 8)), np.ones((-(-height // 8), -(-width // 8)), np.int16)
    )[:height, :width].astype(np.int16))  # fmt: skip
    quarters = torch.zeros(things, padded[0] // 4, padded[1] // 4, dtype=torch.bool)
    for plane, m in zip(quarters, maps, strict=True):
        small = torch.from_numpy(m[::4, ::4].copy())
        plane[: small.shape[0], : small.shape[1]] = small
    image = torch.from_numpy(generator.normal(0, 60, (1, 3, *padded)).astype(np.float32))
    return Batch(
        image, [(height, width)], [1], ["noise"], [(height, width)], [1.0], [False], [instances], semantic, [quarters],
        [SeededDraws(0)],
    )  # fmt: skip


class Storages:
    """Storages that are still there, each once: their bytes now, and the most at one time."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.there: dict[int, tuple[int, str]] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.there and size:
            self.there[key] = size, f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        del self.there[key]
        self.now -= size


class Alive(TorchDispatchMode):
    """Counts what operators make."""

    def __init__(self, storages: Storages) -> None:
        super().__init__()
        self._storages = storages

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._storages.add(leaf)
        return result


class Trained:
    """The recipe's network with momentum already there, and what a step of it keeps."""

    def __init__(self, device: torch.device, precision: Precision, checkpointing: bool) -> None:
        changes = [f"network.backbone_checkpointing={str(checkpointing).lower()}", "network.pretrained=null"]
        recipe, categories = load_recipe(RECIPE, changes), class_table("coco")
        assert categories is not None
        self.device, self.precision = device, precision
        self.network = builders.build_network(recipe, categories).to(device).train()
        self.optimizer = builders.build_optimizer_of(recipe, self.network)
        self.loss_weights = builders.loss_weights(recipe)
        set_learning_rate(self.optimizer, 1e-9)
        self.step(batch_of_noise(64, 64, 2))

    @property
    def fixed(self) -> list[Tensor]:
        return [*self.network.parameters(), *self.network.buffers()]

    @property
    def momentum(self) -> list[Tensor]:
        return [state["momentum_buffer"] for state in self.optimizer.state.values()]

    def step(self, batch: Batch) -> Storages:
        """A step; what was saved for the backward pass when the forward pass was over."""
        saved = Storages()
        weights = {tensor.untyped_storage()._cdata for tensor in self.fixed}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage()._cdata not in weights:
                saved.add(tensor)
            return tensor

        with autocast(self.device, self.precision):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                losses = self.network(batch.to(self.device)).losses
            total = torch.stack([self.loss_weights[name] * loss.float() for name, loss in losses.items()]).sum()
        del losses
        kept = copy.copy(saved)
        kept.there = dict(saved.there)
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return kept


def row_of(options: argparse.Namespace, precision: Precision, checkpointing: bool) -> tuple[str, str]:
    """A row of the table, and the largest things that are saved."""
    device = torch.device(options.device)
    trained = Trained(device, precision, checkpointing)
    batch = batch_of_noise(options.short_side, options.long_side, options.things)
    alive = Storages()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        kept = trained.step(batch)
        peak = torch.cuda.max_memory_reserved()
    else:
        for tensor in (*trained.fixed, *trained.momentum):
            alive.add(tensor)
        with Alive(alive):
            kept = trained.step(batch)
        peak = alive.peak
    momentum = bytes_of(trained.momentum)
    numbers = (bytes_of(trained.fixed), momentum, momentum, kept.now, peak)
    row = " | ".join(f"{number / MIB:.0f}" for number in numbers)
    fits = "yes" if peak < CARD else "NO"
    largest = ", ".join(f"{size / MIB:.0f} MiB {text}" for size, text in sorted(kept.there.values(), reverse=True)[:5])
    anew = "computed anew" if checkpointing else "kept"
    return f"| {precision} | {anew} | {row} | {peak / CARD:.0%} | {fits} |", f"{precision}, {anew}: {largest}"


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def table(options: argparse.Namespace) -> str:
    kinds = [(precision, anew) for precision in get_args(Precision)[:2] for anew in (False, True)]
    rows, largest = zip(*(row_of(options, *kind) for kind in tqdm(kinds, desc="steps")), strict=True)
    on_gpu = options.device == "cuda"
    return "\n".join(
        [
            "# Memory of a training step of UPSNet-50 on COCO",
            "",
            f"{datetime.date.today()}, {torch.cuda.get_device_name() if on_gpu else processor()}, torch "
            f"{torch.__version__}. Recipe {RECIPE}, one image of {options.short_side}×{options.long_side} pixels with "
            f"{options.things} things, batch 1. MiB; a card of 11 GB has {CARD // MIB}.",
            "",
            f"| precision | blocks of the backbone | weights | gradients | momentum | saved for backward | "
            f"{'most reserved' if on_gpu else 'most alive at a time'} | of 11 GB | fits |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            "The largest of what is saved:",
            "",
            *(f"* {line}" for line in largest),
            "",
        ]
    )


def main() -> None:
    parser = parser_of(__doc__, rounds=1)
    parser.add_argument("--short_side", type=positive, default=800)
    parser.add_argument("--long_side", type=positive, default=1333)
    parser.add_argument("--things", type=positive, default=90)
    options = parser.parse_args()
    show(table(options), options.out)


if __name__ == "__main__":
    main()
