"""What one worker alone has met ends all of them, in one sentence, instead of leaving the others waiting."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from upsnet.engine.workers import Workers
from upsnet.structures.errors import UserError

logger = logging.getLogger("upsnet")

T = TypeVar("T")


class Together:
    """Exchanges between workers in which errors travel along."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._error: UserError | None = None

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """An error inside that a user can mend is kept for the next exchange; it is raised there."""
        try:
            yield
        except UserError as error:
            self._error = self._error or error

    def exchange(self, value: T) -> list[T]:
        """The small values of all workers in the order of their ranks.

        Raises:
            UserError: a worker has kept one; that of the lowest rank, on all of them. With several workers it is in the
                log already, and marked as told.
        """
        values, errors = zip(*self._workers.gather((value, self._error)), strict=True)
        for error in filter(None, errors):
            if self._workers.count > 1:
                if self._workers.rank == 0:
                    logger.error("%s", error)
                self._workers.gather(None)  # the launcher ends the others, the first one too, as soon as one has ended
                error.told = True
            raise error
        return list(values)
