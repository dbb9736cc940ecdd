"""`upsnet train`: from a recipe to snapshots."""

import logging
from contextlib import closing
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
from torch import nn

from upsnet import builders
from upsnet.checkpoints.download_weights import command_for
from upsnet.checkpoints.files import read_weights
from upsnet.commands.startup import say_how_many_workers, say_where
from upsnet.config import Recipe, dump_recipe, paths
from upsnet.dataset.coco_panoptic import CocoPanoptic
from upsnet.dataset.loading import BatchLoader
from upsnet.engine.log import TrainingLog, logging_to
from upsnet.engine.options import LoopOptions
from upsnet.engine.snapshots import ResumeState, Snapshots, complete_snapshots, resume
from upsnet.engine.standing import unpack
from upsnet.engine.train import train as run_training
from upsnet.engine.workers import Workers
from upsnet.models.upsnet import UPSNet
from upsnet.structures.categories import Categories
from upsnet.structures.errors import DataError, RecipeError, WeightsError
from upsnet.structures.pictures import write_png
from upsnet.structures.sample import Batch
from upsnet.visualize import draw_batch

logger = logging.getLogger("upsnet")


def train(recipe: Recipe) -> Path:
    """Trains a recipe and returns the path of the last snapshot's weights.

    Raises:
        UserError: the recipe, the data, the weights or the place to write to is at fault.
    """
    if recipe.train.begin_iteration > 0 and not recipe.train.resume:
        raise RecipeError(
            f"train.begin_iteration is {recipe.train.begin_iteration}, but train.resume is false: "
            f"set train.resume=true to go on from that step, or leave train.begin_iteration out"
        )
    workers, device = builders.build_workers(recipe)
    with closing(workers):
        return workers.run(partial(_train, recipe, workers, device))


def _train(recipe: Recipe, workers: Workers, device: torch.device, carried: bytes | None) -> Path:
    """The training of these workers. carried: what an earlier set of workers has kept for this one."""
    now = datetime.now()
    folder = paths.training_folder(recipe)
    is_first = workers.rank == 0
    with logging_to(paths.log_file(recipe, folder, now) if is_first else None, is_first):
        dataset = builders.build_training_set(recipe)
        network = builders.build_network(recipe, dataset.categories).to(device)
        builders.share_norms_of(recipe, network, workers)
        optimizer = builders.build_optimizer_of(recipe, network)
        options = builders.engine_options(recipe, len(dataset), workers.count)
        say_where(device)
        say_how_many_workers(recipe, workers.count)
        if carried is None:
            start = _starting_point(recipe, network, optimizer, dataset.categories)
        else:
            start = unpack(carried, network, optimizer)
            logger.info("the workers have changed: going on after step %d", start.iteration)
        _say_what_is_trained(recipe, dataset, network, options, workers.count)
        _say_what_will_not_come(recipe)
        snapshots = Snapshots(folder, recipe.model_prefix, dataset.categories, dump_recipe(recipe))
        if start is None and ((folder / "metrics.jsonl").exists() or complete_snapshots(folder)):
            logger.warning("an earlier run in %s is replaced; train.resume=true would go on with it", folder)
        validation = _validation_batches(recipe, dataset, workers) if recipe.train.eval_data else None
        begin = start.iteration if start else 0
        tensorboard = paths.tensorboard_folder(recipe, now)
        with TrainingLog(folder / "metrics.jsonl", tensorboard, begin) if is_first else TrainingLog() as log:
            run_training(
                network,
                builders.build_training_loader(recipe, dataset, begin, workers.rank, workers.count),
                optimizer,
                options,
                snapshots,
                log,
                start,
                validation,
                on_first_batch=(lambda batch: _draw_first_batch(batch, dataset, folder)) if is_first else None,
                workers=workers,
            )
        return snapshots.path(options.max_iteration)


def _starting_point(
    recipe: Recipe, network: UPSNet, optimizer: torch.optim.Optimizer, categories: Categories
) -> ResumeState | None:
    """Puts weights into the network: those of the snapshot that is resumed, else the pretrained ones, if any."""
    if recipe.train.resume:
        path = paths.snapshot_file(recipe, recipe.train.begin_iteration)
        start = resume(path, optimizer)
        builders.load_trained(recipe, network, read_weights(path), categories)
        if start.iteration >= recipe.train.max_iteration:
            raise RecipeError(
                f"train.max_iteration is {recipe.train.max_iteration}, but the snapshot to resume from has "
                f"{start.iteration} steps already: raise it"
            )
        logger.info("resuming after step %d", start.iteration)
        return start
    if recipe.network.pretrained is not None:
        _check_pretrained(recipe, Path(recipe.network.pretrained))
        builders.start_from_pretrained(recipe, network, categories)
    return None


def _check_pretrained(recipe: Recipe, path: Path) -> None:
    if not path.is_file():
        command = command_for(path)
        depth = recipe.symbol.split("_")[1]
        raise WeightsError(
            f"network.pretrained: there is no weight file {path}: "
            f"{f'run {command}' if command else f'put a ResNet-{depth} there'}, or train from scratch "
            f"with network.pretrained=null network.backbone_fix_bn=false network.backbone_freeze_at=0"
        )


def _say_what_will_not_come(recipe: Recipe) -> None:
    train = recipe.train
    if train.lr_schedule == "step" and train.decay_iteration and train.decay_iteration[0] >= train.max_iteration:
        what, step = "decay_iteration", train.decay_iteration[0]
    elif train.warmup_iteration >= train.max_iteration:
        what, step = "warmup_iteration", train.warmup_iteration
    else:
        return
    logger.warning(
        "train.%s is %d, but training ends at step %d: the schedule belongs to a longer training",
        what,
        step,
        train.max_iteration,
    )


def _say_what_is_trained(
    recipe: Recipe, dataset: CocoPanoptic, network: nn.Module, options: LoopOptions, workers: int
) -> None:
    logger.info(
        "data: %d images (%d entries with mirrored copies) of %s, %d thing and %d stuff classes",
        dataset.num_photos,
        len(dataset),
        recipe.dataset.dataset_path,
        dataset.categories.num_things,
        dataset.categories.num_stuff,
    )
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    logger.info("parameters: %.2f of %.2f million are trained", trained / 1e6, _count_parameters(network) / 1e6)
    logger.info("losses: %s", ", ".join(f"{weight:g} {name}" for name, weight in options.loss_weights.items()))
    batch_size = recipe.train.batch_size
    logger.info(
        "total batch %d = %d worker%s × %d images × %d micro-batches; %d steps an epoch, %d steps in all",
        workers * batch_size * options.accumulation,
        workers,
        "s" if workers > 1 else "",
        batch_size,
        options.accumulation,
        options.steps_per_epoch,
        options.max_iteration,
    )


def _validation_batches(recipe: Recipe, training_set: CocoPanoptic, workers: Workers) -> BatchLoader:
    dataset = builders.build_test_set(recipe, targets=True)
    if dataset.categories != training_set.categories:
        raise DataError(
            f"{recipe.dataset.dataset_path}: {recipe.dataset.test_image_set} has other categories than "
            f"{recipe.dataset.image_set}: correct one of the panoptic json files"
        )
    return builders.build_test_loader(recipe, dataset, workers.rank, workers.count)


def _count_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _draw_first_batch(batch: Batch, dataset: CocoPanoptic, folder: Path) -> None:
    assert dataset.transform is not None
    path = folder / "first_batch.png"
    write_png(path, draw_batch(batch, dataset.categories, dataset.transform.picture))
    logger.info("the first batch as the network sees it: %s", path)
