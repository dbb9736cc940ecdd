"""What a run writes while it runs: text log, metrics.jsonl, TensorBoard; and means and memory for it."""

import json
import logging
import re
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from upsnet.structures.places import replacing, writing

LINE_FORMAT = "%(asctime)s | %(filename)s | line %(lineno)d: %(message)s"


class _Console(logging.Handler):
    """Writes above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _LogFile(logging.FileHandler):
    """A disk that fills up is reported by the files that matter, not by a traceback for each log line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextmanager
def logging_to(path: Path | None, is_first: bool = True) -> Iterator[None]:
    """Inside, messages of the "upsnet" logger from level INFO go to stderr and, with a path, all go to this file.

    Of a worker that is not the first one, only errors go to stderr: the others say the same.

    Raises:
        PlaceError: the file or its folder cannot be made.
    """
    handlers: list[logging.Handler] = [_Console()]
    if path is not None:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(_LogFile(path, encoding="utf-8"))
    logger = logging.getLogger("upsnet")
    level, propagate = logger.level, logger.propagate
    # What is long, or printed anyway, is a DEBUG message: it goes to the file only.
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    handlers[0].setLevel(logging.INFO if is_first else logging.ERROR)
    for handler in handlers:
        handler.setFormatter(logging.Formatter(LINE_FORMAT))
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            with suppress(OSError):
                handler.close()
        logger.setLevel(level)
        logger.propagate = propagate


def read_metrics(metrics_file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, none if there is no such file; without half a line that a killed run has left."""
    lines = []
    with suppress(FileNotFoundError):
        for line in metrics_file.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines


class TrainingLog:
    """metrics.jsonl and TensorBoard of one training run; without paths it writes nothing.

    Lines of metrics.jsonl. Training, every `display_iter`: iteration, epoch, lr, total (weighted sum), each loss
    (unweighted) and metric as means since the line before, images_per_second, data_seconds (for which an image kept the
    training waiting; times images_per_second it is a share of the time), memory (peak MiB), time (Unix seconds); of
    several workers, data_seconds and memory are those of the one that has most.
    Validation: iteration, epoch, val_total, val_<name> for each loss and metric, time.
    """

    def __init__(
        self, metrics_file: Path | None = None, tensorboard_folder: Path | None = None, begin_iteration: int = 0
    ) -> None:
        """Opens the log of a run that starts at `begin_iteration`: later lines of an earlier run are dropped.

        Raises:
            PlaceError: a file or folder cannot be made.
        """
        self._metrics_file = metrics_file
        self._tensorboard: Any = None
        if metrics_file is not None:
            with writing(metrics_file):
                metrics_file.parent.mkdir(parents=True, exist_ok=True)
                _drop_lines_after(metrics_file, begin_iteration)
        if tensorboard_folder is not None:
            # Imported here, since it takes seconds and only training wants it.
            from torch.utils.tensorboard import SummaryWriter

            with writing(tensorboard_folder):
                self._tensorboard = SummaryWriter(str(tensorboard_folder))
        self._tensorboard_folder = tensorboard_folder

    def line(self, record: Mapping[str, Any]) -> None:
        """Appends one JSON line."""
        if self._metrics_file is not None:
            with writing(self._metrics_file), open(self._metrics_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Writes TensorBoard scalars."""
        if self._tensorboard is not None and self._tensorboard_folder is not None:
            with writing(self._tensorboard_folder):
                for name, value in values.items():
                    self._tensorboard.add_scalar(name, value, iteration)

    def close(self) -> None:
        if self._tensorboard is not None and self._tensorboard_folder is not None:
            with writing(self._tensorboard_folder):
                self._tensorboard.close()

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _drop_lines_after(metrics_file: Path, iteration: int) -> None:
    """Keeps the lines of a run that is resumed, up to where it is resumed."""
    kept = [line for line in read_metrics(metrics_file) if line["iteration"] <= iteration] if iteration > 0 else []
    with replacing(metrics_file) as part:
        part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


class Means:
    """Weighted running means of named values; a name that comes only sometimes is averaged over its own weights."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, values: Mapping[str, float], weight: float = 1.0) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + weight * value
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def values(self) -> dict[str, float]:
        return {name: total / self._weights[name] for name, total in self._sums.items()}


def reset_peak_memory(device: torch.device) -> None:
    """Peak memory counts from here on, as far as the system can be told so."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float:
    """Peak memory in MiB: that of the CUDA device, else that of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Where there is /proc, what it says: the other number can be that of the program which started this one.
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if peak := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE):
            return int(peak[1]) / 2**10
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident / 2**20 if sys.platform == "darwin" else resident / 2**10
