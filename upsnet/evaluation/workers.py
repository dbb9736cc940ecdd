"""Work on many images in several processes."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import cv2

from upsnet.structures.errors import PlaceError

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 8
"""Items for each process that wait or are done early; bounds what lies in memory."""
MIN_ITEMS = 50
"""For fewer items than this another process is not worth its start."""


def default_workers(items: int) -> int:
    """A process for every core that this one may use, fewer for few items."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, items // MIN_ITEMS))


def map_in_order(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """function(item) of every item, in the order of the items whatever the number of processes.

    Args:
        function: can be pickled. What it raises is raised here, for the first item that fails.
        workers: processes; with 1, all happens in this one.

    Raises:
        PlaceError: a process was killed, or `workers` is less than 1.
    """
    if workers < 1:
        raise PlaceError(f"{workers} workers cannot work: ask for at least 1")
    if workers == 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(min(workers, max(1, len(items))), initializer=_start)
    try:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise PlaceError("a worker process was killed, perhaps for want of memory: ask for fewer workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start() -> None:
    """Begins a worker: it leaves Ctrl-C to its parent, keeps to one core and does not outlive its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
