"""Batches from several processes, pinned for a GPU; an error that the user can mend arrives as it was raised."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from upsnet.dataset.batches import collate, start_loader_process
from upsnet.structures.errors import UserError
from upsnet.structures.sample import Batch, Sample


class BatchLoader:
    """The batches of a sampler, in its order; it can be iterated again and again.

    Raises:
        UserError: while iterating, where a sample cannot be made.
    """

    def __init__(self, samples: Dataset[Sample], sampler: Sampler[Any], num_workers: int = 0) -> None:
        """Args:
        samples: takes the entries that the sampler's lists hold.
        num_workers: loader processes; 0: load in this one.
        """
        self._loader: DataLoader[Batch | UserError] = DataLoader(
            _Batches(samples),
            batch_size=None,  # an item is a batch already
            sampler=sampler,
            num_workers=num_workers,
            worker_init_fn=start_loader_process,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def __len__(self) -> int:
        return len(self._loader)


class _Batches(Dataset[Batch | UserError]):
    """Lists of entries → batches. Errors travel as values: torch would put a traceback into their message."""

    def __init__(self, samples: Dataset[Sample]) -> None:
        self._samples = samples

    def __getitem__(self, entries: list[Any]) -> Batch | UserError:
        try:
            return collate([self._samples[entry] for entry in entries])
        except UserError as error:
            return error
