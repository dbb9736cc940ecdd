"""A network of a few numbers that keeps the house's interface, and batches for it."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upsnet.engine.log import TrainingLog
from upsnet.engine.options import LoopOptions
from upsnet.structures.draws import SeededDraws, seed_of
from upsnet.structures.results import Prediction, Segment, TrainingOutput, Truth
from upsnet.structures.sample import Batch

IMAGES = 12

OPTIONS = LoopOptions(
    max_iteration=10, steps_per_epoch=4, lr=0.05, decay_iterations=(6,), warmup_iterations=3,
    loss_weights={"second_loss": 0.5}, seed=1, display_iter=5,
)  # fmt: skip


class Toy(nn.Module):
    """Two losses, formed for each image from pixels that its draws choose, and averaged over the images."""

    def __init__(self, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if batch_norm else nn.GroupNorm(2, 4)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(4, 2, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        self.seen: list[tuple[int, bool]] = []

    def forward(self, batch: Batch) -> TrainingOutput | list[Prediction]:
        scores = self.head(self.dropout(F.relu(self.norm(self.conv(batch.images)))))
        if not self.training:
            return [self._predict(score, i, batch) for i, score in enumerate(scores)]
        self.seen += zip(batch.image_ids, batch.flipped, strict=True)
        pixels = torch.ones(scores.shape[-1] * scores.shape[-2], dtype=torch.bool)
        first, second = [], []
        for score, draws in zip(scores, batch.draws, strict=True):
            chosen = score.flatten(1)[:, draws.first(pixels, 8)]
            first.append((chosen[0] - 1).square().mean())
            second.append((chosen[1] + 1).abs().mean())
        losses = {"first_loss": torch.stack(first).mean(), "second_loss": torch.stack(second).mean()}
        return TrainingOutput(losses, {"accuracy": (scores > 0).float().mean()})

    def _predict(self, score: Tensor, i: int, batch: Batch) -> Prediction:
        segment_map = (score[0] > score[1]).int().numpy().astype(np.int32)
        return Prediction(batch.image_ids[i], batch.file_names[i], segment_map, [Segment(1, 0, 1, (0, 0, 1, 1))])


class Recorder(TrainingLog):
    """Keeps the lines instead of writing them."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def line(self, record):
        self.lines.append(record)


def image_of(image_id: int) -> Tensor:
    return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed_of(image_id)))


def batch_of(image_ids: Sequence[int], flipped: bool = False) -> Batch:
    images = torch.stack([image_of(i).flip(-1) if flipped else image_of(i) for i in image_ids])
    count = len(image_ids)
    return Batch(
        images,
        [(8, 8)] * count,
        list(image_ids),
        [f"{i}.jpg" for i in image_ids],
        [(8, 8)] * count,
        [1.0] * count,
        [flipped] * count,
    )


def batches(batch_size: int, images_per_step: int = 4, first_step: int = 0, seed: int = 0) -> Iterator[Batch]:
    """Endless; step k always holds the same images, however they are cut into batches."""
    step = first_step
    while True:
        draws = SeededDraws(seed, step)
        ids = [100 + draws.integer(IMAGES) for _ in range(images_per_step)]
        for start in range(0, images_per_step, batch_size):
            yield batch_of(ids[start : start + batch_size], flipped=step % 2 == 1)
        step += 1


def truth_of(image_id: int) -> Truth:
    blank = np.zeros((8, 8), dtype=np.int32)
    return Truth(image_id, f"{image_id}.jpg", blank, [], blank.astype(np.int16))


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Byte for byte."""
    theirs = b.state_dict()
    return all(tensor.numpy().tobytes() == theirs[name].numpy().tobytes() for name, tensor in a.state_dict().items())
