"""Batches from several processes, pinned for a GPU; an error that the user can mend arrives as it was raised."""

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from upsnet.dataset.batches import collate, start_loader_process
from upsnet.structures.errors import DataError, PlaceError, UserError
from upsnet.structures.sample import Batch, Sample

REPLACEMENTS = 10
"""So many other images are tried in place of one that cannot be read."""


class BatchLoader:
    """The batches of a sampler, in its order; it can be iterated again and again.

    Raises:
        UserError: while iterating, where a sample cannot be made or a loader process has died.
    """

    def __init__(
        self,
        samples: Dataset[Sample],
        sampler: Sampler[Any],
        num_workers: int = 0,
        replacement: Callable[[Any, int], Any] | None = None,
    ) -> None:
        """Args:
        samples: takes the entries that the sampler's lists hold.
        num_workers: loader processes; 0: load in this one.
        replacement: the entry that takes the place of one that cannot be read, at the n-th attempt; None: an error.
        """
        self._loader: DataLoader[Batch | UserError] = DataLoader(
            _Batches(samples, replacement),
            batch_size=None,  # an item is a batch already
            sampler=sampler,
            num_workers=num_workers,
            worker_init_fn=start_loader_process,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[Batch]:
        processes: list[BaseProcess] = []
        batches: Iterator[Batch | UserError] | None = None
        try:
            while True:
                with _deaths_told(processes):
                    if batches is None:
                        others = multiprocessing.active_children()
                        batches = iter(self._loader)
                        processes += [child for child in multiprocessing.active_children() if child not in others]
                    batch = next(batches, None)
                if batch is None:
                    return
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        finally:
            batches = None  # ends the processes now, even where the traceback of an error keeps this frame

    def __len__(self) -> int:
        return len(self._loader)


class _Batches(Dataset[Batch | UserError]):
    """Lists of entries → batches. Errors travel as values: torch would put a traceback into their message."""

    def __init__(self, samples: Dataset[Sample], replacement: Callable[[Any, int], Any] | None = None) -> None:
        self._samples, self._replacement = samples, replacement

    def __getitem__(self, entries: list[Any]) -> Batch | UserError:
        skipped: list[str] = []
        try:
            batch = collate([self._sample(entry, skipped) for entry in entries])
        except UserError as error:
            return error
        return replace(batch, skipped=skipped) if skipped else batch

    def _sample(self, entry: Any, skipped: list[str]) -> Sample:
        """The sample of an entry, else of the first of its replacements that can be read."""
        if self._replacement is None:
            return self._samples[entry]
        wanted = entry
        for attempt in range(REPLACEMENTS):
            try:
                return self._samples[entry]
            except DataError as error:
                skipped.append(str(error))
                entry = self._replacement(wanted, attempt)
        return self._samples[entry]


@contextmanager
def _deaths_told(processes: list[BaseProcess]) -> Iterator[None]:
    """Inside, the death of a loader process is a PlaceError that names its reason.

    torch's own handler of SIGCHLD raises wherever the program is. Ours serves only while we wait for a batch, since at
    other times the other workers of a training would be left waiting.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:
        before = signal.signal(signal.SIGCHLD, lambda *_: _check_alive(processes)) or signal.SIG_DFL
    try:
        _check_alive(processes)
        yield
    except (RuntimeError, OSError, EOFError):  # torch has noticed it first, or memory could not be handed over
        ending = wait([process.sentinel for process in processes], timeout=1)
        for process in processes:
            if process.sentinel in ending:
                process.join(1)
        _check_alive(processes)
        raise
    finally:
        if in_main_thread:
            signal.signal(signal.SIGCHLD, before)


def _check_alive(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.exitcode:  # None while it lives, 0 at a good end
            killed = process.exitcode < 0
            how = f"killed by {signal.Signals(-process.exitcode).name}" if killed else f"ended: {process.exitcode}"
            raise PlaceError(
                f"a process that loads images has died (pid {process.pid}, {how}), perhaps for want of memory: lower "
                f"dataset.num_workers or make room in memory and /dev/shm"
            )
