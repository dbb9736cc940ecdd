"""Processes that train or test one network together, as the loops see them; and the one that works alone.

Every loss is divided by all images of the step, whoever holds them, and gradients are added up. So a step is the same
whether its images lie in micro-batches of one worker or side by side on several.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

T = TypeVar("T")


class Workers(Protocol):
    """One process' view of all.

    rank: its number, 0..count-1; the one with rank 0 writes files and shows progress. local_rank: its number on its
    machine. count: how many there are.
    """

    @property
    def rank(self) -> int: ...

    @property
    def local_rank(self) -> int: ...

    @property
    def count(self) -> int: ...

    def run(self, work: Callable[[bytes | None], T]) -> T:
        """Does the work, given None. Where workers come and go: once more with every new set of them, given what the
        set before has kept, if it came to the end of a step; see `end_step`."""

    def share(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, accumulation: int
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """What to call and what to step so that gradients become sums over all workers; the weights stay where they
        are, and are those of rank 0.

        Args:
            accumulation: backward passes in one step.
        """

    @property
    def batch_norm(self) -> type[_BatchNorm] | None:
        """Batch norm over all workers; None: there is none, or none for this device."""

    def micro_batch(self, network: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Around a forward and backward pass of the shared network. last: no other follows in this step."""

    def finish_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Waits until the gradients are sums over all workers."""

    def stepping(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[object]:
        """Around the step of the shared optimiser, after `finish_gradients`."""

    def end_step(self, keep: Callable[[], bytes]) -> None:
        """After every step but the last one: here the work may stop, to be done by another set of workers.

        Args:
            keep: what these are to go on from, as it is when it is called: at the latest change of the weights.
        """

    def gather(self, value: T) -> list[T]:
        """The small values of all workers in the order of their ranks, on every one of them."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the workers' tensors of one shape. It may take the given one's place."""

    def close(self) -> None:
        """Leaves the others, at the end."""


class SingleWorker:
    """A process that works alone."""

    rank = local_rank = 0
    count = 1
    batch_norm = None

    def run(self, work: Callable[[bytes | None], T]) -> T:
        return work(None)

    def share(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, accumulation: int
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        return network, optimizer

    def micro_batch(self, network: nn.Module, last: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def finish_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def stepping(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[object]:
        return nullcontext()

    def end_step(self, keep: Callable[[], bytes]) -> None:
        pass

    def gather(self, value: T) -> list[T]:
        return [value]

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def close(self) -> None:
        pass
