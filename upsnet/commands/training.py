"""`upsnet train`: from a recipe to snapshots."""

import logging
from collections.abc import Callable
from contextlib import closing
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
from torch import nn

from upsnet import builders
from upsnet.commands.starting import begin_run, starting_point
from upsnet.commands.startup import say_how_many_workers, say_where
from upsnet.commands.testing import truth_of
from upsnet.config import Recipe, dump_recipe, paths
from upsnet.dataset.coco_panoptic import CocoPanoptic
from upsnet.dataset.loading import BatchLoader
from upsnet.engine.bad_batch import write_batch
from upsnet.engine.inference_loop import score_in_memory
from upsnet.engine.log import TrainingLog, logging_to
from upsnet.engine.options import LoopOptions
from upsnet.engine.snapshots import Snapshots, complete_snapshots
from upsnet.engine.standing import unpack
from upsnet.engine.train import Test
from upsnet.engine.train import train as run_training
from upsnet.engine.workers import Workers
from upsnet.evaluation.panoptic_quality import PanopticQuality
from upsnet.structures.errors import DataError, RecipeError
from upsnet.structures.pictures import write_png
from upsnet.structures.results import Output
from upsnet.structures.sample import Batch
from upsnet.visualize import draw_batch

logger = logging.getLogger("upsnet")


def train(recipe: Recipe) -> Path:
    """Trains a recipe and returns the path of the last snapshot's weights.

    Raises:
        UserError: the recipe, the data, the weights or the place to write to is at fault.
    """
    if recipe.train.begin_iteration > 0 and recipe.train.resume is not True:
        raise RecipeError(
            f"train.begin_iteration is {recipe.train.begin_iteration}, but train.resume is "
            f"{recipe.train.resume or 'false'}: set train.resume=true to go on from that step, or leave "
            f"train.begin_iteration out"
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
        snapshots = Snapshots(
            folder, recipe.model_prefix, dataset.categories, dump_recipe(recipe), recipe.train.keep_snapshots
        )
        if carried is None:
            start = starting_point(recipe, network, optimizer, snapshots, workers)
        else:
            start = unpack(carried, network, optimizer)
            logger.info("the workers have changed: going on after step %d", start.iteration)
        _say_what_is_trained(recipe, dataset, network, options, workers.count)
        _say_what_will_not_come(recipe)
        if start is not None and start.iteration >= options.max_iteration:
            logger.info("finished already: there are snapshots up to step %d, train.max_iteration", start.iteration)
            return snapshots.path(start.iteration)
        if start is None and ((folder / "metrics.jsonl").exists() or complete_snapshots(folder)):
            logger.warning("an earlier run in %s is replaced; train.resume=true would go on with it", folder)
        validation = _validation_batches(recipe, dataset, workers) if recipe.train.eval_data else None
        test = _test(recipe, network, dataset, workers) if recipe.train.test_step is not None else None
        if carried is None:
            begin_run(snapshots, start, workers)
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
                store_batch=lambda batch, step: _store_bad_batch(batch, dataset, folder / f"bad_batch_{step}.pth"),
                test=test,
                workers=workers,
            )
        return snapshots.path(options.max_iteration)


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
    _check_classes(recipe, dataset, training_set)
    return builders.build_test_loader(recipe, dataset, workers.rank, workers.count)


def _test(recipe: Recipe, network: nn.Module, training_set: CocoPanoptic, workers: Workers) -> Test:
    dataset = builders.build_test_set(recipe)
    if not dataset.has_truth:
        raise RecipeError(
            f"train.test_step is {recipe.train.test_step}, but {recipe.dataset.test_image_set} has no labels to test "
            f"with: choose another dataset.test_image_set, or leave train.test_step out"
        )
    _check_classes(recipe, dataset, training_set)
    loader = builders.build_test_loader(recipe, dataset, workers.rank, workers.count)
    image_ids, only_panoptic = builders.test_order(recipe, dataset), frozenset[Output]({"panoptic"})

    def test(stopped: Callable[[], bool]) -> float | None:
        quality = PanopticQuality(dataset.categories)
        summary = score_in_memory(
            network, loader, image_ids, truth_of(dataset), quality, workers, recipe.test.precision, only_panoptic,
            stopped,
        )  # fmt: skip
        return None if summary is None else float(summary["all"]["pq"] or 0.0)

    return test


def _check_classes(recipe: Recipe, dataset: CocoPanoptic, training_set: CocoPanoptic) -> None:
    if dataset.categories != training_set.categories:
        raise DataError(
            f"{recipe.dataset.dataset_path}: {recipe.dataset.test_image_set} has other categories than "
            f"{recipe.dataset.image_set}: correct one of the panoptic json files"
        )


def _count_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _draw_first_batch(batch: Batch, dataset: CocoPanoptic, folder: Path) -> None:
    path = folder / "first_batch.png"
    _draw(batch, dataset, path)
    logger.info("the first batch as the network sees it: %s", path)


def _store_bad_batch(batch: Batch, dataset: CocoPanoptic, path: Path) -> tuple[Path, Path]:
    write_batch(path, batch)
    picture = path.with_suffix(".png")
    _draw(batch, dataset, picture)
    return path, picture


def _draw(batch: Batch, dataset: CocoPanoptic, path: Path) -> None:
    assert dataset.transform is not None
    write_png(path, draw_batch(batch, dataset.categories, dataset.transform.picture))
