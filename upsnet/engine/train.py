"""The training loop."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from tqdm import tqdm

from upsnet.engine.log import Means, TrainingLog, peak_memory
from upsnet.engine.optimizer import CaffeSGD, set_learning_rate
from upsnet.engine.options import LoopOptions
from upsnet.engine.precision import autocast
from upsnet.engine.progress import Progress, StepValues
from upsnet.engine.running_statistics import RunningStatistics
from upsnet.engine.snapshots import ResumeState, Snapshots
from upsnet.engine.standing import Standing
from upsnet.engine.weight_average import WeightAverage
from upsnet.engine.workers import SingleWorker, Workers
from upsnet.structures.draws import SeededDraws, seed_of
from upsnet.structures.errors import UserError
from upsnet.structures.results import TrainingOutput
from upsnet.structures.sample import Batch

logger = logging.getLogger("upsnet")

VALIDATION_STEP = -1
"""The step in the key of validation's random draws: the same draws after every epoch."""


class TrainingError(UserError):
    """Training cannot go on."""


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
    workers: Workers | None = None,
) -> None:
    """Trains a network, which must already be on its device, up to `options.max_iteration` steps in all.

    Args:
        batches: this worker's training batches without end, beginning with those of the first step to be done.
        optimizer: its groups carry `factor`, see `parameter_groups`.
        snapshots: where rank 0 keeps snapshots: every `snapshot_step` steps and at the end.
        log: of rank 0; the others have none.
        start: what `snapshots.resume` returned.
        validation: this worker's batches whose losses are logged after every epoch and at the end; it is iterated each
            time.
        on_first_batch: is shown the first batch as the network sees it.
        workers: None: this process works alone.

    Raises:
        TrainingError: a loss is not finite, on whatever worker. The weights are those before the step.
        PlaceError: the log or a snapshot cannot be written.
    """
    device = next(network.parameters()).device
    workers = workers or SingleWorker()
    log = log or TrainingLog()
    scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
    iteration = _restore(start, scaler, options)
    progress = Progress(log, options, device)
    stream = iter(batches)
    network.train()
    shared, optimizer = workers.share(network, optimizer, options.accumulation)
    statistics = RunningStatistics(network, workers)
    average = WeightAverage(network, options.ema, start.raw_weights if start else None)
    standing = Standing(network, optimizer, scaler, average, options.seed, iteration)
    with _bar(workers, total=options.max_iteration, initial=iteration, desc="train", unit="step") as bar:
        while iteration < options.max_iteration:
            began = time.perf_counter()
            step_batches = _next_batches(stream, options, iteration)
            waited = time.perf_counter() - began
            if on_first_batch is not None:
                on_first_batch(step_batches[0])
                on_first_batch = None
            set_learning_rate(optimizer, rate := options.learning_rate(iteration))
            outputs = accumulate_gradients(shared, step_batches, options, scaler, iteration, workers)
            workers.finish_gradients(optimizer)
            statistics.merge()
            values = _finite_values(workers.gather(_told(outputs, step_batches, waited)), iteration)
            _step(optimizer, scaler, workers, options.clip_gradient)
            iteration = standing.advance()
            _follow_decay(optimizer, options, iteration)

            progress.step(iteration, rate, values, time.perf_counter() - began)
            bar.set_postfix_str(progress.text(), refresh=False)
            bar.update()
            last = iteration == options.max_iteration
            if iteration % options.steps_per_epoch == 0 or last:
                _end_epoch(standing, progress, validation, options, workers)
            if snapshots is not None and workers.rank == 0 and (iteration % options.snapshot_step == 0 or last):
                standing.save(snapshots)
            if not last:
                workers.end_step(standing.packed)


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
) -> StepValues:
    """Losses and metrics as means over the images of all workers' batches. The network comes back in training mode."""
    workers = workers or SingleWorker()
    network.train()
    for module in network.modules():
        # Losses exist in training mode only, but looking at validation images must not move statistics.
        if isinstance(module, _BatchNorm | _DropoutNd):
            module.eval()
    seen: list[MicroBatch] = []
    with torch.no_grad():
        for batch in _bar(workers, batches, desc="validate", unit="batch", leave=False):
            with autocast(device, options.precision):
                output = network(_with_draws(batch, options.seed, VALIDATION_STEP).to(device))
            seen += _micro_batches([output], [batch])
    network.train()
    # In one order, however many workers there are: sums of floats depend on it.
    return _means([sorted(chain.from_iterable(workers.gather(seen)), key=lambda part: part.image_ids)])


def _bar(workers: Workers, batches: Iterable[Batch] = (), **options: Any) -> "tqdm[Batch]":
    return tqdm(batches, **options, dynamic_ncols=True, disable=workers.rank > 0)


def _restore(start: ResumeState | None, scaler: torch.amp.GradScaler, options: LoopOptions) -> int:
    if start is None:
        return 0
    if start.seed != options.seed:
        logger.warning("the snapshot was trained with seed %d, going on with seed %d", start.seed, options.seed)
    if start.scaler:
        scaler.load_state_dict(start.scaler)
    return start.iteration


def _end_epoch(
    standing: Standing, progress: Progress, validation: Iterable[Batch] | None, options: LoopOptions, workers: Workers
) -> None:
    if validation is not None:
        device = next(standing.network.parameters()).device
        with standing.average.applied():
            seen = validation_values(standing.network, validation, options, device, workers)
        progress.validated(standing.iteration, seen)
    progress.end_epoch()


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
    """What a worker tells the others in a step: of its micro-batches, for how many seconds it waited for them, and its
    peak memory in MiB."""

    parts: list[MicroBatch]
    waited: float
    memory: float


def _micro_batches(outputs: Sequence[TrainingOutput], batches: Sequence[Batch]) -> list[MicroBatch]:
    return [MicroBatch(*values, batch.image_ids) for values, batch in zip(_numbers(outputs), batches, strict=True)]


def _told(outputs: Sequence[TrainingOutput], batches: Sequence[Batch], waited: float) -> Told:
    device = next(iter(outputs[0].losses.values())).device
    return Told(_micro_batches(outputs, batches), waited, peak_memory(device))


def _finite_values(told: Sequence[Told], iteration: int) -> StepValues:
    """Means over the step's images; stops at the first loss that is not finite."""
    of_workers = [of_worker.parts for of_worker in told]
    for part in chain.from_iterable(of_workers):
        for name, value in part.losses.items():
            if not math.isfinite(value):
                ids = ", ".join(map(str, part.image_ids))
                raise TrainingError(
                    f"step {iteration}: {name} is {value} on image {ids}: training stops before this step; "
                    f"lower train.lr or look at this image"
                )
    waited, memory = max(of_worker.waited for of_worker in told), max(of_worker.memory for of_worker in told)
    return replace(_means(of_workers), waited=waited, memory=memory)


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
