"""The training loop."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from tqdm import tqdm

from upsnet.engine.log import Means, TrainingLog
from upsnet.engine.optimizer import CaffeSGD, set_learning_rate
from upsnet.engine.options import LoopOptions
from upsnet.engine.precision import autocast
from upsnet.engine.progress import Progress, StepValues
from upsnet.engine.snapshots import ResumeState, Snapshots
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
) -> None:
    """Trains a network, which must already be on its device, up to `options.max_iteration` steps in all.

    Args:
        batches: training batches without end, beginning with those of the first step to be done.
        optimizer: its groups carry `factor`, see `parameter_groups`.
        snapshots: where to keep snapshots: every `snapshot_step` steps and at the end.
        start: what `snapshots.resume` returned.
        validation: batches whose losses are logged after every epoch and at the end; it is iterated each time.
        on_first_batch: is shown the first batch as the network sees it.

    Raises:
        TrainingError: a loss is not finite. The weights are those before the step.
        PlaceError: the log or a snapshot cannot be written.
    """
    device = next(network.parameters()).device
    log = log or TrainingLog()
    scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
    iteration = _restore(start, scaler, options)
    progress = Progress(log, options, device)
    stream = iter(batches)
    network.train()
    with tqdm(total=options.max_iteration, initial=iteration, desc="train", unit="step", dynamic_ncols=True) as bar:
        while iteration < options.max_iteration:
            began = time.perf_counter()
            step_batches = _next_batches(stream, options, iteration)
            if on_first_batch is not None:
                on_first_batch(step_batches[0])
                on_first_batch = None

            # Layers that draw for themselves (dropout) do so from the step's own seed, so that a resume is exact.
            torch.manual_seed(seed_of(options.seed, iteration))
            rate = options.learning_rate(iteration)
            set_learning_rate(optimizer, rate)
            outputs = accumulate_gradients(network, step_batches, options, scaler, device)
            values = _finite_values(outputs, step_batches, iteration)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            iteration += 1
            if iteration in options.decay_iterations and options.lr_schedule == "step":
                _follow_decay(optimizer)

            progress.step(iteration, rate, values, time.perf_counter() - began)
            bar.set_postfix_str(progress.text(), refresh=False)
            bar.update()
            last = iteration == options.max_iteration
            if iteration % options.steps_per_epoch == 0 or last:
                if validation is not None:
                    progress.validated(iteration, validation_values(network, validation, options, device))
                progress.end_epoch()
            if snapshots is not None and (iteration % options.snapshot_step == 0 or last):
                path = snapshots.save(network, optimizer, ResumeState(iteration, options.seed, scaler.state_dict()))
                logger.info("saved %s", path)


def accumulate_gradients(
    network: nn.Module,
    batches: Sequence[Batch],
    options: LoopOptions,
    scaler: torch.amp.GradScaler,
    device: torch.device,
) -> list[TrainingOutput]:
    """Adds to the gradients those of the mean loss over all images of the batches."""
    images = sum(len(batch) for batch in batches)
    outputs = []
    for batch in batches:
        with autocast(device, options.precision):
            output: TrainingOutput = network(batch.to(device))
            weighted = [options.loss_weights.get(name, 1.0) * loss.float() for name, loss in output.losses.items()]
            total = torch.stack(weighted).sum() * (len(batch) / images)
        scaler.scale(total).backward()
        outputs.append(_detached(output))
    return outputs


def validation_values(
    network: nn.Module, batches: Iterable[Batch], options: LoopOptions, device: torch.device
) -> StepValues:
    """Losses and metrics as means over the images of the batches. The network comes back in training mode."""
    network.train()
    for module in network.modules():
        # Losses exist in training mode only, but looking at validation images must not move statistics.
        if isinstance(module, _BatchNorm | _DropoutNd):
            module.eval()
    losses, metrics, images = Means(), Means(), 0
    with torch.no_grad():
        for batch in tqdm(batches, desc="validate", unit="batch", leave=False, dynamic_ncols=True):
            with autocast(device, options.precision):
                output = network(_with_draws(batch, options.seed, VALIDATION_STEP).to(device))
            ((batch_losses, batch_metrics),) = _numbers([output])
            losses.add(batch_losses, len(batch))
            metrics.add(batch_metrics, len(batch))
            images += len(batch)
    network.train()
    return StepValues(losses.values(), metrics.values(), images)


def _restore(start: ResumeState | None, scaler: torch.amp.GradScaler, options: LoopOptions) -> int:
    if start is None:
        return 0
    if start.seed != options.seed:
        logger.warning("the snapshot was trained with seed %d, going on with seed %d", start.seed, options.seed)
    if start.scaler:
        scaler.load_state_dict(start.scaler)
    return start.iteration


def _follow_decay(optimizer: torch.optim.Optimizer) -> None:
    # The buffers of CaffeSGD hold the rate before the decay; those of AdamW hold none.
    if isinstance(optimizer, CaffeSGD):
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


def _finite_values(outputs: Sequence[TrainingOutput], batches: Sequence[Batch], iteration: int) -> StepValues:
    """Means over the step's images; stops at the first loss that is not finite."""
    losses, metrics, images = Means(), Means(), 0
    for (step_losses, step_metrics), batch in zip(_numbers(outputs), batches, strict=True):
        for name, value in step_losses.items():
            if not math.isfinite(value):
                ids = ", ".join(map(str, batch.image_ids))
                raise TrainingError(
                    f"step {iteration}: {name} is {value} on image {ids}: training stops before this step; "
                    f"lower train.lr or look at this image"
                )
        losses.add(step_losses, len(batch))
        metrics.add(step_metrics, len(batch))
        images += len(batch)
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
