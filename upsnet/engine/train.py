"""The training loop."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from tqdm import tqdm

from upsnet.engine.bad_batch import bad_loss, training_error
from upsnet.engine.log import Means, TrainingLog, peak_memory
from upsnet.engine.optimizer import CaffeSGD, set_learning_rate
from upsnet.engine.options import LoopOptions
from upsnet.engine.precision import autocast
from upsnet.engine.progress import Progress, StepValues
from upsnet.engine.running_statistics import RunningStatistics
from upsnet.engine.signals import StopSignals
from upsnet.engine.snapshots import ResumeState, Snapshots
from upsnet.engine.standing import Standing
from upsnet.engine.together import Together
from upsnet.engine.weight_average import WeightAverage
from upsnet.engine.workers import SingleWorker, Workers
from upsnet.structures.draws import SeededDraws, seed_of
from upsnet.structures.errors import Stopped
from upsnet.structures.results import TrainingOutput
from upsnet.structures.sample import Batch

logger = logging.getLogger("upsnet")

VALIDATION_STEP = -1
"""The step in the key of validation's random draws: the same draws after every epoch."""


Test = Callable[[Callable[[], bool]], float | None]
"""Panoptic quality × 100 of the network that is trained, on every worker; it asks whether to stop, and then gives None.
"""


def train(
    network: nn.Module,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    options: LoopOptions,
    snapshots: Snapshots | None = None,
    log: TrainingLog | None = None,
    start: ResumeState | None = None,
    validation: Iterable[Batch] | None = None,
    on_first_batch: Callable[[Batch], None] | None = None,
    store_batch: Callable[[Batch, int], Sequence[Path]] | None = None,
    test: Test | None = None,
    workers: Workers | None = None,
) -> None:
    """Trains a network, which must already be on its device, up to `options.max_iteration` steps in all.

    Args:
        batches: this worker's training batches without end, beginning with those of the first step to be done.
        optimizer: its groups carry `factor`, see `parameter_groups`.
        snapshots: where rank 0 keeps snapshots: every `snapshot_step` steps, at the end and when a signal stops it.
        log: of rank 0; the others have none.
        start: what `snapshots.resume` returned.
        validation: this worker's batches whose losses are logged after every epoch and at the end; it is iterated each
            time.
        on_first_batch: is shown the first batch as the network sees it.
        store_batch: stores a batch whose loss is not finite, and says where; it is given the steps done, too.
        test: every `test_step` steps; the best snapshot is kept.
        workers: None: this process works alone.

    Raises:
        TrainingError: a loss is not finite, on whatever worker. The weights are those before the step.
        UserError: a batch cannot be loaded, the log or a snapshot cannot be written; on all workers, as the one before.
        Stopped: by SIGTERM or SIGINT to one of the workers, after the step in progress and a snapshot.
    """
    workers = workers or SingleWorker()
    device = next(network.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
    first = iteration = _restore(start, scaler, options)
    progress = Progress(log or TrainingLog(), options, device)
    network.train()
    shared, optimizer = workers.share(network, optimizer, options.accumulation)
    statistics, together = RunningStatistics(network, workers), Together(workers)
    average = WeightAverage(network, options.ema, start.raw_weights if start else None)
    standing = Standing(network, optimizer, scaler, average, options.seed, iteration)
    milestones = _Milestones(standing, progress, options, workers, together, snapshots, validation, test)
    with StopSignals() as signals, _bar_of_steps(workers, options, iteration) as bar:
        stream = iter(batches)  # here, since the processes that load inherit the handlers of signals
        while iteration < options.max_iteration:
            began = time.perf_counter()
            with together.keeping():
                step_batches = _next_batches(stream, options, iteration)
                waited = time.perf_counter() - began
                if on_first_batch and iteration == first:
                    on_first_batch(step_batches[0])
            if any(together.exchange(signals.wanted)):
                milestones.stop()
            set_learning_rate(optimizer, rate := options.learning_rate(iteration))
            outputs = accumulate_gradients(shared, step_batches, options, scaler, iteration, workers)
            workers.finish_gradients(optimizer)
            statistics.merge()
            told = together.exchange(_told(outputs, step_batches, waited))
            _check_finite(told, workers.rank, step_batches, iteration, together, store_batch)
            _step(optimizer, scaler, workers, options.clip_gradient)
            iteration = standing.advance()
            _follow_decay(optimizer, options, iteration)
            with together.keeping():
                progress.step(iteration, rate, _values(told), time.perf_counter() - began)
            bar.set_postfix_str(progress.text(), refresh=False)
            bar.update()
            milestones.passed(signals)


@dataclass(slots=True)
class _Milestones:
    """What is done between two steps, most of it after some steps only: validation, snapshots, test."""

    standing: Standing
    progress: Progress
    options: LoopOptions
    workers: Workers
    together: Together
    snapshots: Snapshots | None
    validation: Iterable[Batch] | None
    test: Test | None
    saved: int = -1
    """The step of the last snapshot."""

    def __post_init__(self) -> None:
        begun = self.standing.iteration
        if begun > 0 and self.snapshots is not None and self.snapshots.holds(begun):
            self.saved = begun

    def passed(self, signals: StopSignals) -> None:
        iteration, options = self.standing.iteration, self.options
        last = iteration == options.max_iteration
        if iteration % options.steps_per_epoch == 0 or last:
            self._end_epoch(signals)
        if iteration % options.snapshot_step == 0 or last:
            self._save()
        if options.test_step is not None and iteration % options.test_step == 0:
            self._test(signals)
        if not last:
            self.workers.end_step(self.standing.packed)
            return
        self.progress.end()
        self.together.exchange(None)

    def stop(self) -> None:
        """Raises: Stopped."""
        iteration = self.standing.iteration
        self._save()
        self.together.exchange(None)
        sentence = f"stopped by a signal after step {iteration}; the same command with train.resume=auto goes on there"
        self.progress.end()
        logger.warning("%s", sentence)
        self.together.exchange(None)  # told, before the launcher ends the others since one has ended
        raise Stopped(sentence)

    def _end_epoch(self, signals: StopSignals) -> None:
        if self.validation is not None:
            device = next(self.standing.network.parameters()).device
            with self.standing.average.applied():
                seen = validation_values(
                    self.standing.network, self.validation, self.options, device, self.workers, lambda: signals.wanted
                )
            if seen is not None:
                with self.together.keeping():
                    self.progress.validated(self.standing.iteration, seen)
        self.progress.end_epoch()

    def _test(self, signals: StopSignals) -> None:
        if self.test is None:
            return
        with self.standing.average.applied():
            pq = self.test(lambda: signals.wanted)
        if pq is None:
            return
        with self.together.keeping():
            self.progress.tested(self.standing.iteration, pq)
            if self.snapshots is not None and self.workers.rank == 0 and self.snapshots.is_best(pq):
                self._write(self.snapshots)
                self.snapshots.set_best(self.standing.iteration, pq)

    def _save(self) -> None:
        if self.snapshots is not None and self.workers.rank == 0:
            with self.together.keeping():
                self._write(self.snapshots)

    def _write(self, snapshots: Snapshots) -> None:
        # One that is there stays untouched: while a pair is replaced, it is not whole.
        if self.saved != self.standing.iteration:
            self.standing.save(snapshots)
            self.saved = self.standing.iteration


def accumulate_gradients(
    network: nn.Module,
    batches: Sequence[Batch],
    options: LoopOptions,
    scaler: torch.amp.GradScaler,
    iteration: int,
    workers: Workers,
) -> list[TrainingOutput]:
    """Adds to the gradients those of the mean loss over all images of the batches of all workers."""
    device = next(network.parameters()).device
    images = sum(len(batch) for batch in batches) * workers.count
    outputs = []
    for number, batch in enumerate(batches, start=1):
        # Layers that draw for themselves (dropout) do so by step and images, whichever worker has them.
        torch.manual_seed(seed_of(options.seed, iteration, *batch.image_ids))
        with workers.micro_batch(network, last=number == len(batches)):
            with autocast(device, options.precision):
                output: TrainingOutput = network(batch.to(device))
                weighted = [options.loss_weights.get(name, 1.0) * loss.float() for name, loss in output.losses.items()]
                total = torch.stack(weighted).sum() * (len(batch) / images)
            scaler.scale(total).backward()
        outputs.append(_detached(output))
    return outputs


def validation_values(
    network: nn.Module,
    batches: Iterable[Batch],
    options: LoopOptions,
    device: torch.device,
    workers: Workers | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> StepValues | None:
    """Losses and metrics as means over the images of all workers' batches. The network comes back in training mode.

    Args:
        stopped: asked before every batch; where it says so on a worker, nothing is given.
    """
    workers = workers or SingleWorker()
    together = Together(workers)
    network.train()
    for module in network.modules():
        # Losses exist in training mode only, but looking at validation images must not move statistics.
        if isinstance(module, _BatchNorm | _DropoutNd):
            module.eval()
    seen: list[MicroBatch] = []
    bar = _bar(workers, batches, desc="validate", unit="batch", leave=False)
    with together.keeping(), torch.no_grad():
        for batch in takewhile(lambda _: not stopped(), bar):
            with autocast(device, options.precision):
                output = network(_with_draws(batch, options.seed, VALIDATION_STEP).to(device))
            seen += _micro_batches([output], [batch])
    network.train()
    of_workers, stops = zip(*together.exchange((seen, stopped())), strict=True)
    # In one order, however many workers there are: sums of floats depend on it.
    whole = sorted(chain.from_iterable(of_workers), key=lambda part: part.image_ids)
    return None if any(stops) else _means([whole])


def _bar(workers: Workers, batches: Iterable[Batch] = (), **options: Any) -> "tqdm[Batch]":
    return tqdm(batches, **options, dynamic_ncols=True, disable=workers.rank > 0)


def _bar_of_steps(workers: Workers, options: LoopOptions, iteration: int) -> "tqdm[Batch]":
    return _bar(workers, total=options.max_iteration, initial=iteration, desc="train", unit="step")


def _restore(start: ResumeState | None, scaler: torch.amp.GradScaler, options: LoopOptions) -> int:
    if start is None:
        return 0
    if start.seed != options.seed:
        logger.warning("the snapshot was trained with seed %d, going on with seed %d", start.seed, options.seed)
    if start.scaler:
        scaler.load_state_dict(start.scaler)
    return start.iteration


def _step(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, workers: Workers, longest: float | None
) -> None:
    """longest: norm of all gradients together, to which longer ones are shortened; None: none is."""
    if longest is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], longest)
    with workers.stepping(optimizer):
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def _follow_decay(optimizer: torch.optim.Optimizer, options: LoopOptions, iteration: int) -> None:
    # The buffers of CaffeSGD hold the rate before the decay; those of AdamW hold none.
    decays = options.lr_schedule == "step" and iteration in options.decay_iterations
    if decays and isinstance(optimizer, CaffeSGD):
        optimizer.divide_momentum(10)


def _next_batches(stream: Iterator[Batch], options: LoopOptions, iteration: int) -> list[Batch]:
    batches = [_with_draws(batch, options.seed, iteration) for batch in islice(stream, options.accumulation)]
    if len(batches) < options.accumulation:
        raise ValueError(f"the training batches ended at step {iteration} of {options.max_iteration}")
    return batches


def _with_draws(batch: Batch, seed: int, step: int) -> Batch:
    draws = [
        SeededDraws(seed, step, image_id, flipped)
        for image_id, flipped in zip(batch.image_ids, batch.flipped, strict=True)
    ]
    return replace(batch, draws=draws)


class MicroBatch(NamedTuple):
    """What a forward pass said of its images."""

    losses: dict[str, float]
    metrics: dict[str, float]
    image_ids: list[int]


class Told(NamedTuple):
    """What a worker tells the others in a step: of its micro-batches, for how many seconds it waited for them, its peak
    memory in MiB, and why images were replaced."""

    parts: list[MicroBatch]
    waited: float
    memory: float
    skipped: list[str]


def _micro_batches(outputs: Sequence[TrainingOutput], batches: Sequence[Batch]) -> list[MicroBatch]:
    return [MicroBatch(*values, batch.image_ids) for values, batch in zip(_numbers(outputs), batches, strict=True)]


def _told(outputs: Sequence[TrainingOutput], batches: Sequence[Batch], waited: float) -> Told:
    device = next(iter(outputs[0].losses.values())).device
    skipped = [sentence for batch in batches for sentence in batch.skipped]
    return Told(_micro_batches(outputs, batches), waited, peak_memory(device), skipped)


def _check_finite(
    told: Sequence[Told],
    rank: int,
    batches: Sequence[Batch],
    iteration: int,
    together: Together,
    store: Callable[[Batch, int], Sequence[Path]] | None,
) -> None:
    """Stops all workers before the step if a loss is not finite; the first worker that has such a batch stores it."""
    bad = [of_worker for of_worker, each in enumerate(told) if any(bad_loss(part.losses) for part in each.parts)]
    if not bad:
        return
    with together.keeping():
        for part, batch in zip(told[rank].parts, batches, strict=True):
            if rank == bad[0] and (name := bad_loss(part.losses)):
                raise training_error(iteration, name, part.losses[name], batch, store)
    together.exchange(None)


def _values(told: Sequence[Told]) -> StepValues:
    """Means over the step's images."""
    waited, memory = max(of_worker.waited for of_worker in told), max(of_worker.memory for of_worker in told)
    skipped = [sentence for of_worker in told for sentence in of_worker.skipped]
    means = _means([of_worker.parts for of_worker in told])
    return replace(means, waited=waited, memory=memory, skipped=skipped)


def _means(of_workers: Sequence[Sequence[MicroBatch]]) -> StepValues:
    losses, metrics, images = Means(), Means(), 0
    for part in chain.from_iterable(of_workers):
        losses.add(part.losses, len(part.image_ids))
        metrics.add(part.metrics, len(part.image_ids))
        images += len(part.image_ids)
    return StepValues(losses.values(), metrics.values(), images)


def _detached(output: TrainingOutput) -> TrainingOutput:
    return TrainingOutput(
        {name: loss.detach() for name, loss in output.losses.items()},
        {name: metric.detach() for name, metric in output.metrics.items()},
    )


def _numbers(outputs: Sequence[TrainingOutput]) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Losses and metrics of each output, all in one transfer from the device: here the host waits for it."""
    tensors = [value for output in outputs for value in (*output.losses.values(), *output.metrics.values())]
    numbers = iter(torch.stack([value.detach().float() for value in tensors]).tolist())
    return [
        ({name: next(numbers) for name in output.losses}, {name: next(numbers) for name in output.metrics})
        for output in outputs
    ]
