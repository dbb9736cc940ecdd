"""What is told about a training run while it runs."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from upsnet.engine.log import Means, TrainingLog, reset_peak_memory
from upsnet.engine.options import LoopOptions

logger = logging.getLogger("upsnet")

WAITS_TOO_LONG = 0.2
"""Share of the time spent on waiting for batches that is worth a warning."""


@dataclass(frozen=True, slots=True)
class StepValues:
    """Unweighted losses and metrics as means over `images` images.

    waited: seconds for which the step waited for its batches. memory: peak in MiB. Both of the worker that has most.
    skipped: why images could not be read in whose places others stand.
    """

    losses: dict[str, float]
    metrics: dict[str, float]
    images: int
    waited: float = 0.0
    memory: float = 0.0
    skipped: Sequence[str] = ()


class Progress:
    """What is told about a run: means since the last line and since the epoch began, to log files and screen."""

    def __init__(self, log: TrainingLog, options: LoopOptions, device: torch.device) -> None:
        self._log, self._options = log, options
        self._epoch_means = Means()
        self._start_line()
        self._shown = ""
        self._lines, self._has_warned = 0, False
        self._skipped: dict[str, int] = {}
        reset_peak_memory(device)

    def step(self, iteration: int, rate: float, values: StepValues, seconds: float) -> None:
        """Takes in a step, numbered after its update, and writes what is due."""
        total = self._options.total(values.losses)
        named = values.losses | values.metrics
        self._line_means.add({"total": total} | named)
        self._epoch_means.add(named)
        self._images += values.images
        self._seconds += seconds
        self._waited += values.waited
        self._name_skipped(values.skipped)
        self._log.scalars(iteration, {"train_total_loss": total} | _prefixed("train_", named))
        speed, share = self._images / self._seconds, self._waited / self._seconds
        means = self._line_means.values()
        self._shown = f"lr={rate:.3g} img/s={speed:.2f} data={share:.0%} mem={values.memory / 1024:.1f}G " + " ".join(
            f"{name}={value:.3f}" for name, value in means.items()
        )
        if iteration % self._options.display_iter == 0 or iteration == self._options.max_iteration:
            where = {"iteration": iteration, "epoch": self._epoch(iteration), "lr": rate}
            machine = {
                "images_per_second": speed,
                "data_seconds": self._waited / self._images,
                "memory": values.memory,
                "time": round(time.time(), 2),
            }
            self._log.line(where | means | machine)
            logger.info(
                "Batch [%d]\tSpeed: %.2f samples/sec\tData: %.3f sec/sample\tTrain-%s",
                iteration,
                speed,
                machine["data_seconds"],
                _listed(self._epoch_means.values()),
            )
            self._warn_of_waiting(share)
            self._start_line()

    def validated(self, iteration: int, values: StepValues) -> None:
        """Writes the validation losses of the epoch that ends with this iteration."""
        epoch = self._epoch(iteration)
        named = values.losses | values.metrics
        record = _prefixed("val_", {"total": self._options.total(values.losses)} | named)
        self._log.scalars(iteration, _prefixed("val_", named))
        self._log.line({"iteration": iteration, "epoch": epoch} | record | {"time": round(time.time(), 2)})
        logger.info("Batch [%d]\t Epoch[%d]\tVal-%s", iteration, epoch, _listed(named))

    def tested(self, iteration: int, pq: float) -> None:
        """Writes the panoptic quality × 100 after this iteration."""
        epoch = self._epoch(iteration)
        self._log.scalars(iteration, {"test_pq": pq})
        self._log.line({"iteration": iteration, "epoch": epoch, "test_pq": pq, "time": round(time.time(), 2)})
        logger.info("Batch [%d]\t Epoch[%d]\tTest-pq=%.6f", iteration, epoch, pq)

    def _name_skipped(self, reasons: Sequence[str]) -> None:
        """Every image that could not be read, once."""
        for reason in reasons:
            if reason not in self._skipped:
                logger.warning("skipped, another image takes its place: %s", reason)
            self._skipped[reason] = self._skipped.get(reason, 0) + 1

    def end(self) -> None:
        """Says how many images were skipped, if any."""
        if self._skipped:
            times = sum(self._skipped.values())
            logger.warning("%d bad images were skipped, %d times in all", len(self._skipped), times)

    def end_epoch(self) -> None:
        self._epoch_means = Means()

    def text(self) -> str:
        """For the progress bar."""
        return self._shown

    def _warn_of_waiting(self, share: float) -> None:
        """Once, and not for the first line, in which loader processes start."""
        self._lines += 1
        if share < WAITS_TOO_LONG or self._lines == 1 or self._has_warned:
            return
        self._has_warned = True
        logger.warning(
            "%.0f %% of the time training waits for images (data_seconds in the log): raise dataset.num_workers while "
            "there are cores to spare, and have the images on a local disk (upsnet prepare coco --shards)",
            100 * share,
        )

    def _start_line(self) -> None:
        self._line_means, self._images, self._seconds, self._waited = Means(), 0, 0.0, 0.0

    def _epoch(self, iteration: int) -> int:
        return (iteration - 1) // self._options.steps_per_epoch


def _prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in values.items()}


def _listed(values: Mapping[str, float]) -> str:
    return "".join(f"{name}={value:.6f},\t" for name, value in values.items())
