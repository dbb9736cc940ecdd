"""A training step of UPSNet-50: native library on against off, and torchvision's Mask R-CNN R50-FPN for scale.

    python benchmarks/training.py --data DIR [--weights FILE] [--out table.md] [--rounds 5] [--device cuda]

DIR is in the official COCO layout, FILE a ResNet-50 in caffe's convention. A step is forward, backward and optimiser on
one photo of DIR with its labels. The native library is chosen when it is imported, so every contestant lives in a
process of its own; they take turns, a step each, so that a load on the machine meets all of them. Times are medians,
measured inside the processes. On CUDA follows the throughput at the recipe's full size.
"""

import argparse
import datetime
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from tqdm import tqdm

from benchmarks.operators import parser_of, positive, processor, show
from upsnet import builders
from upsnet.config import Recipe, load_recipe
from upsnet.dataset.batches import Draw, collate
from upsnet.dataset.coco_panoptic import CocoPanoptic
from upsnet.engine.precision import autocast
from upsnet.operators import describe
from upsnet.structures.draws import SeededDraws
from upsnet.structures.sample import Batch

RECIPE = "upsnet_resnet50_coco_16gpu"
RATE = 1e-6  # small, so that all rounds do the same work
STAGES = ("data", "forward", "backward", "optimizer")
FULL_SIZE, FULL_SIZE_BATCHES, FULL_SIZE_STEPS = 800, (1, 4, 16), 10
Seconds = dict[str, float]


class Stopwatch:
    """Seconds by name, the device's queue emptied at every reading."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: Seconds = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[name] = self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Ours:
    """The recipe's network, its loss and optimiser, and one photo."""

    def __init__(self, options: argparse.Namespace, short_side: int, precision: str = "fp32", images: int = 1) -> None:
        recipe = recipe_of(options, short_side)
        self.device, self.precision, self.images = torch.device(options.device), precision, images
        self.dataset, self.entry = photo_of(recipe, options.photo)
        self.network = builders.build_network(recipe, self.dataset.categories).to(self.device).train()
        if options.weights:
            builders.start_from_pretrained(recipe, self.network, self.dataset.categories)
        self.optimizer = builders.build_optimizer_of(recipe, self.network)
        for group in self.optimizer.param_groups:
            group["lr"] = RATE
        self.weights = builders.loss_weights(recipe)

    def batch(self) -> Batch:
        batch = collate([self.dataset[Draw(self.entry, 0)]] * self.images)
        return replace(batch, draws=[SeededDraws(image) for image in range(self.images)])

    def loss(self, batch: Batch) -> Tensor:
        with autocast(self.device, self.precision):
            losses = self.network(batch.to(self.device)).losses
            return torch.stack([self.weights[name] * loss.float() for name, loss in losses.items()]).sum()


class MaskRCNN:
    """The same for torchvision's Mask R-CNN, on the same photo at the same size, from the same backbone."""

    def __init__(self, options: argparse.Namespace, short_side: int) -> None:
        recipe = recipe_of(options, short_side)
        self.device = torch.device(options.device)
        self.dataset, self.entry = photo_of(recipe, options.photo)
        # As maskrcnn_resnet50_fpn makes it for pretrained weights: norms frozen, res3 to res5 trained.
        backbone = resnet_fpn_backbone(
            backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
        )
        if options.weights:
            tensors = torch.load(options.weights, weights_only=True)
            backbone.body.load_state_dict({name: tensors[name].float() for name in backbone.body.state_dict()})
        self.network = torchvision.models.detection.MaskRCNN(
            backbone, self.dataset.categories.num_classes, min_size=short_side, max_size=recipe.train.max_size
        )
        self.network.to(self.device).train()
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, RATE, momentum=0.9, weight_decay=1e-4)

    def batch(self) -> tuple[Tensor, dict[str, Tensor]]:
        photo = torch.from_numpy(self.dataset.photo(self.entry)).permute(2, 0, 1) / 255
        targets = self.dataset[Draw(self.entry, 0)].targets
        assert targets is not None and targets.instances is not None
        things = targets.instances.without_crowd()
        masks = torch.from_numpy(things.masks.draw(*photo.shape[1:])).to(torch.uint8)
        corners = things.boxes + torch.tensor([0.0, 0.0, 1.0, 1.0])  # torchvision's ends are exclusive
        return photo, {"boxes": corners, "labels": things.classes, "masks": masks}

    def loss(self, batch: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        photo, target = batch
        target = {name: value.to(self.device) for name, value in target.items()}
        return torch.stack(list(self.network([photo.to(self.device)], [target]).values())).sum()


def update(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measured_step(trained: Ours | MaskRCNN) -> Seconds:
    watch = Stopwatch(trained.device)
    with watch("data"):
        batch = trained.batch()
    with watch("forward"):
        total = trained.loss(batch)
    with watch("backward"):
        total.backward()
    with watch("optimizer"):
        update(trained.optimizer)
    assert total.isfinite()
    return watch.seconds


CONTESTANTS: dict[str, tuple[type[Ours | MaskRCNN], str]] = {
    "ours": (Ours, "1"),
    "ours, native library off": (Ours, "0"),
    "torchvision Mask R-CNN": (MaskRCNN, "1"),
}
"""By name: what is trained, and UPSNET_NATIVE in its process."""


def recipe_of(options: argparse.Namespace, short_side: int) -> Recipe:
    changes = [
        f"dataset.dataset_path={options.data}",
        f"train.scales=[{short_side}]",
        "train.flip=false",
        f"network.pretrained={options.weights or 'null'}",
        "network.pretrained_convention=caffe",
        "network.pixel_means=[103.939,116.779,123.68]",  # those of this backbone
    ]
    return load_recipe(RECIPE, changes)


def photo_of(recipe: Recipe, image_id: int) -> tuple[CocoPanoptic, int]:
    dataset = builders.build_training_set(recipe)
    return dataset, next(i for i in range(len(dataset)) if dataset[Draw(i, 0)].image_id == image_id)


def serve(connection: Connection, name: str, options: argparse.Namespace) -> None:
    """A contestant's process: a step on every request; at the end its peak memory."""
    torch.set_num_threads(options.threads)
    trained = CONTESTANTS[name][0](options, options.short_side)
    connection.send(describe())
    while connection.recv() == "step":
        connection.send(measured_step(trained))
    if options.device == "cuda":
        connection.send(torch.cuda.max_memory_allocated() / 2**20)
    else:
        connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


class Contestant:
    """A process that does steps when it is asked."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.connection, other = multiprocessing.Pipe()
        os.environ["UPSNET_NATIVE"] = CONTESTANTS[name][1]
        arguments = (other, name, options)
        self.process = multiprocessing.get_context("spawn").Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        other.close()
        self.operators = self.connection.recv()
        self.steps: list[Seconds] = []

    def step(self, warm_up: bool) -> None:
        self.connection.send("step")
        seconds = self.connection.recv()
        if not warm_up:
            self.steps.append(seconds)

    def stop(self) -> float:
        """Ends the process; its peak memory in MiB."""
        self.connection.send("stop")
        peak: float = self.connection.recv()
        self.process.join()
        return peak

    def milliseconds(self, *stages: str) -> float:
        return statistics.median(sum(step[stage] for stage in stages) for step in self.steps) * 1e3


def race(options: argparse.Namespace) -> list[str]:
    """All contestants in turns, as lines of a table."""
    contestants = {name: Contestant(name, options) for name in CONTESTANTS}
    for turn in tqdm(range(options.rounds + 1), desc="rounds"):
        for contestant in contestants.values():
            contestant.step(warm_up=turn == 0)
    peaks = {name: contestant.stop() for name, contestant in contestants.items()}
    ours = contestants["ours"].milliseconds(*STAGES[1:])
    lines = [
        f"UPSNET_NATIVE=1: {contestants['ours'].operators}.",
        f"UPSNET_NATIVE=0: {contestants['ours, native library off'].operators}.",
        "",
        "| contestant | step, ms | ours / it | images/s | forward | backward | optimiser | data (apart) | peak, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, contestant in contestants.items():
        step = contestant.milliseconds(*STAGES[1:])
        shares = " | ".join(f"{contestant.milliseconds(stage) / step:.1%}" for stage in STAGES[1:])
        data = contestant.milliseconds("data")
        lines.append(
            f"| {name} | {step:.0f} | {ours / step:.2f} | {1e3 / step:.2f} | {shares} | {data:.0f} ms | "
            f"{peaks[name]:.0f} |"
        )
    return lines


def throughput(options: argparse.Namespace) -> list[str]:
    """Images a second at full size without reading photos, and without a stop between the stages; CUDA only."""
    head = f"Throughput at short side {FULL_SIZE} (asked: 53 images/s in bf16)"
    if options.device != "cuda":
        return [f"{head}: not run, no GPU."]
    lines = [f"{head}:", "", "| precision | batch | images/s | peak, MiB |", "|---|---|---|---|"]
    for precision in ("fp32", "bf16"):
        for images in FULL_SIZE_BATCHES:
            torch.cuda.reset_peak_memory_stats()
            trained = Ours(options, FULL_SIZE, precision, images)
            batch, seconds = trained.batch(), []
            for _ in range(FULL_SIZE_STEPS):
                start = time.perf_counter()
                total = trained.loss(batch)
                total.backward()
                update(trained.optimizer)
                assert math.isfinite(total.item())  # waits for the device, as the training loop does to log
                seconds.append(time.perf_counter() - start)
            peak = torch.cuda.max_memory_allocated() / 2**20
            lines.append(f"| {precision} | {images} | {images / statistics.median(seconds):.1f} | {peak:.0f} |")
    return lines


def table(options: argparse.Namespace) -> str:
    device = torch.cuda.get_device_name() if options.device == "cuda" else processor()
    return "\n".join(
        [
            "# A training step of UPSNet-50",
            "",
            f"{datetime.date.today()}, {device}, {options.threads} CPU threads, float32, torch {torch.__version__}, "
            f"torchvision {torchvision.__version__}, Python {platform.python_version()}.",
            f"Recipe {RECIPE}, short side {options.short_side}, batch 1, photo {options.photo} of {options.data.name}; "
            f"medians of {options.rounds} rounds, contestants taking turns.",
            *race(options),
            "",
            *throughput(options),
            "",
        ]
    )


def main() -> None:
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--photo", type=int, default=74, help="image id")
    parser.add_argument("--short_side", type=int, default=400)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    options = parser.parse_args()
    show(table(options), options.out)


if __name__ == "__main__":
    main()
