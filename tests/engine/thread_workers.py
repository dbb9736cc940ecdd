"""Workers that are threads of one process: real sums and exchanges, without the time that processes take to start."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Barrier, BrokenBarrierError
from typing import Any


class ThreadWorkers:
    def __init__(self, rank: int, count: int, board: list[Any], barrier: Barrier) -> None:
        self.rank = self.local_rank = rank
        self.count = count
        self._board, self._barrier = board, barrier

    def share(self, network, optimizer, accumulation):
        self._accumulation = accumulation
        return network, optimizer

    def micro_batch(self, network, last):
        return nullcontext()

    def finish_gradients(self, optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad = self.sum(parameter.grad)

    def stepping(self, optimizer):
        return nullcontext()

    def end_step(self, keep):
        pass

    def gather(self, value):
        self._board[self.rank] = value
        self._barrier.wait()
        values = list(self._board)
        self._barrier.wait()
        return values

    def sum(self, tensor):
        first, *others = self.gather(tensor)
        total = first.clone()
        for other in others:
            total += other
        return total

    def close(self):
        pass

    def abandon(self):
        """Ends the waiting of the others, as a launcher ends them when a worker fails."""
        self._barrier.abort()


def together(count: int, work: Callable[[ThreadWorkers], Any]) -> list[Any]:
    """What `work` returns for each of `count` workers; the first error of one is raised."""
    board, barrier = [None] * count, Barrier(count, timeout=60)
    workers = [ThreadWorkers(rank, count, board, barrier) for rank in range(count)]
    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(work, worker) for worker in workers]
    errors = [error for one in running if (error := one.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, BrokenBarrierError)):
        raise error
    return [one.result() for one in running]
