"""What is told about a training run while it runs."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from upsnet.engine.log import Means, TrainingLog, peak_memory
from upsnet.engine.options import LoopOptions

logger = logging.getLogger("upsnet")


@dataclass(frozen=True, slots=True)
class StepValues:
    """Unweighted losses and metrics as means over `images` images."""

    losses: dict[str, float]
    metrics: dict[str, float]
    images: int


class Progress:
    """What is told about a run: means since the last line and since the epoch began, to log files and screen."""

    def __init__(self, log: TrainingLog, options: LoopOptions, device: torch.device) -> None:
        self._log, self._options, self._device = log, options, device
        self._epoch_means = Means()
        self._start_line()
        self._shown = ""

    def step(self, iteration: int, rate: float, values: StepValues, seconds: float) -> None:
        """Takes in a step, numbered after its update, and writes what is due."""
        total = self._options.total(values.losses)
        named = values.losses | values.metrics
        self._line_means.add({"total": total} | named)
        self._epoch_means.add(named)
        self._images += values.images
        self._seconds += seconds
        self._log.scalars(iteration, {"train_total_loss": total} | _prefixed("train_", named))
        speed = self._images / self._seconds
        memory = peak_memory(self._device)
        means = self._line_means.values()
        self._shown = f"lr={rate:.3g} img/s={speed:.2f} mem={memory / 1024:.1f}G " + " ".join(
            f"{name}={value:.3f}" for name, value in means.items()
        )
        if iteration % self._options.display_iter == 0 or iteration == self._options.max_iteration:
            where = {"iteration": iteration, "epoch": self._epoch(iteration), "lr": rate}
            self._log.line(
                where | means | {"images_per_second": speed, "memory": memory, "time": round(time.time(), 2)}
            )
            logger.info(
                "Batch [%d]\tSpeed: %.2f samples/sec\tTrain-%s", iteration, speed, _listed(self._epoch_means.values())
            )
            self._start_line()

    def validated(self, iteration: int, values: StepValues) -> None:
        """Writes the validation losses of the epoch that ends with this iteration."""
        epoch = self._epoch(iteration)
        named = values.losses | values.metrics
        record = _prefixed("val_", {"total": self._options.total(values.losses)} | named)
        self._log.scalars(iteration, _prefixed("val_", named))
        self._log.line({"iteration": iteration, "epoch": epoch} | record | {"time": round(time.time(), 2)})
        logger.info("Batch [%d]\t Epoch[%d]\tVal-%s", iteration, epoch, _listed(named))

    def end_epoch(self) -> None:
        self._epoch_means = Means()

    def text(self) -> str:
        """For the progress bar."""
        return self._shown

    def _start_line(self) -> None:
        self._line_means, self._images, self._seconds = Means(), 0, 0.0

    def _epoch(self, iteration: int) -> int:
        return (iteration - 1) // self._options.steps_per_epoch


def _prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in values.items()}


def _listed(values: Mapping[str, float]) -> str:
    return "".join(f"{name}={value:.6f},\t" for name, value in values.items())
