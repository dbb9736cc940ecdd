"""SIGTERM and SIGINT as a wish to stop, which a loop asks for when it suits."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

ONE_WISH = 2.0
"""Seconds in which further signals belong to the first: a launcher hands on what a terminal has sent to all already."""


class StopSignals:
    """Inside, the first SIGTERM or SIGINT makes `wanted` true; one that comes later ends the process at once.

    Outside, signals do what they did before. Python hands signals to its main thread; in others nothing is changed.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._before: dict[int, Any] = {}

    @property
    def wanted(self) -> bool:
        """Whether somebody wishes that the loop stops."""
        return self._first is not None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive) or signal.SIG_DFL
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif now - self._first > ONE_WISH:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
