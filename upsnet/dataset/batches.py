"""Which photos meet in a batch, and how they are put together."""

import signal
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import cv2
import torch
from torch import Tensor
from torch.utils.data import Sampler

from upsnet.dataset.transforms import padded_size
from upsnet.structures.draws import seed_of
from upsnet.structures.sample import VOID, Batch, Sample, Targets

SECONDS_AFTER_SIGTERM = 3
"""So long a loader process goes on, so that the step in progress can be finished."""


class Draw(NamedTuple):
    """An entry of the data set in one step of the training: what a random draw may depend on."""

    entry: int
    step: int


def collate(samples: Sequence[Sample], stride: int = 32) -> Batch:
    """Puts samples into one batch, padded at the right and bottom to a common multiple of `stride`.

    Images are padded with 0, semantic maps with VOID, quarter masks (to a quarter of the padded size) with False. A
    kind of target that one of the samples lacks is left out. Further views become batches in the same way.
    """
    height, width = padded_size((max(s.size[0] for s in samples), max(s.size[1] for s in samples)), stride)
    targets = [sample.targets or Targets() for sample in samples]
    instances = [target.instances for target in targets if target.instances is not None]
    semantic = [target.semantic for target in targets if target.semantic is not None]
    quarters = [target.quarter_masks for target in targets if target.quarter_masks is not None]
    return Batch(
        images=_stack([sample.image for sample in samples], height, width, 0),
        sizes=[sample.size for sample in samples],
        image_ids=[sample.image_id for sample in samples],
        file_names=[sample.file_name for sample in samples],
        original_sizes=[sample.original_size for sample in samples],
        scales=[sample.scale for sample in samples],
        flipped=[sample.flipped for sample in samples],
        instances=instances if len(instances) == len(samples) else None,
        semantic=_stack(semantic, height, width, VOID) if len(semantic) == len(samples) else None,
        quarter_masks=(
            [_stack([masks], height // 4, width // 4, 0)[0] for masks in quarters]
            if len(quarters) == len(samples)
            else None
        ),
        views=[collate(view, stride) for view in zip(*(sample.views for sample in samples), strict=True)],
    )


def _stack(entries: Sequence[Tensor], height: int, width: int, value: int) -> Tensor:
    """Each entry in the top left corner of …×height×width, filled up with `value`."""
    stacked = entries[0].new_full((len(entries), *entries[0].shape[:-2], height, width), value)
    for place, entry in zip(stacked, entries, strict=True):
        place[..., : entry.shape[-2], : entry.shape[-1]] = entry
    return stacked


class TrainingSampler(Sampler[list[Draw]]):
    """Micro-batches of an endless training: epoch after epoch, without a gap between them.

    Step k takes the positions k·T … (k+1)·T-1 of that row, T = batch_size · accumulation · num_workers; workers and,
    within them, micro-batches take consecutive parts. So every way to the same T sees the same photos in a step, and a
    resumed run goes on where it stopped.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        accumulation: int = 1,
        worker: int = 0,
        num_workers: int = 1,
        seed: int = 0,
        start_step: int = 0,
        steps: int = 1,
        shuffle: bool = True,
    ) -> None:
        """Args:
        length: entries of the data set. worker: rank of this process, of num_workers.
        shuffle: every epoch has a random order of its own; else that of the data set.
        start_step, steps: the steps start_step … steps-1 are given, `accumulation` micro-batches for each.
        """
        if length < 1:
            raise ValueError("a sampler needs at least one entry")
        self.length, self.batch_size, self.accumulation = length, batch_size, accumulation
        self.worker, self.num_workers = worker, num_workers
        self.seed, self.start_step, self.steps, self.shuffle = seed, start_step, steps, shuffle
        self._epochs: dict[int, Tensor] = {}

    def __iter__(self) -> Iterator[list[Draw]]:
        share = self.batch_size * self.accumulation
        for step in range(self.start_step, self.steps):
            first = (step * self.num_workers + self.worker) * share
            for start in range(first, first + share, self.batch_size):
                yield [Draw(self.index_at(position), step) for position in range(start, start + self.batch_size)]

    def __len__(self) -> int:
        """Number of micro-batches."""
        return max(self.steps - self.start_step, 0) * self.accumulation

    def replacement(self, draw: Draw, attempt: int) -> Draw:
        """Another entry in place of one that cannot be read: a function of seed, step, entry and attempt."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, draw.step, draw.entry, attempt))
        return Draw(int(torch.randint(self.length, (1,), generator=generator)), draw.step)

    def index_at(self, position: int) -> int:
        """The entry at a position of the endless row."""
        epoch, offset = divmod(position, self.length)
        if not self.shuffle:
            return offset
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            self._epochs = {e: order for e, order in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = torch.randperm(self.length, generator=generator)
        return int(self._epochs[epoch][offset])


class SamePaddedSizeSampler(Sampler[list[int]]):
    """Batches for testing: every index once, together only with images of the same padded size.

    The global-average branch of the FPN sees the padding, so an image must not be padded beyond its own size. The
    batches are dealt out to the workers one by one, so that they are the same however many workers there are.
    """

    def __init__(
        self, padded_sizes: Sequence[Hashable], batch_size: int, worker: int = 0, num_workers: int = 1
    ) -> None:
        """Args:
        padded_sizes: of each image, (H, W), or those of all its views.
        worker: rank of this process, of num_workers.
        """
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for index, padded in enumerate(padded_sizes):
            groups[padded].append(index)
        parts = (group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size))
        self._batches = sorted(parts)[worker::num_workers]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def start_loader_process(_: int) -> None:
    """`worker_init_fn` of data loaders: no threads inside loader processes, which are as many as there are cores; and
    what a signal to the whole group makes of a training is its main process' to say, which may still want a batch.
    """
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_AFTER_SIGTERM))
