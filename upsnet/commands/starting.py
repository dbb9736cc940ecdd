"""Where a training begins: at a snapshot, with pretrained weights, or from scratch."""

import logging
import os
from pathlib import Path

import torch

from upsnet import builders
from upsnet.checkpoints.download_weights import command_for
from upsnet.checkpoints.files import read_weights
from upsnet.config import Recipe
from upsnet.engine.snapshots import ResumeState, Snapshots, complete_snapshots, resume, state_path
from upsnet.engine.together import Together
from upsnet.engine.workers import Workers
from upsnet.models.upsnet import UPSNet
from upsnet.structures.errors import PlaceError, RecipeError, WeightsError

logger = logging.getLogger("upsnet")


def starting_point(
    recipe: Recipe, network: UPSNet, optimizer: torch.optim.Optimizer, snapshots: Snapshots, workers: Workers
) -> ResumeState | None:
    """Puts weights into the network: those of the snapshot that is resumed, else the pretrained ones, if any.

    Workers that torchrun has started anew go on by themselves from what their launch has saved.
    """
    together = Together(workers)
    earlier = {name for launch in together.exchange(builders.launch_of(os.environ)) for name in launch.earlier}
    goes_on, newest = recipe.train.resume == "auto", None
    with together.keeping():
        goes_on = goes_on or (bool(earlier) and snapshots.is_of_launch(earlier))
        newest = snapshots.newest_whole() if goes_on and workers.rank == 0 else None
    goes_on, newest = together.exchange((goes_on, newest))[0]  # rank 0's word counts
    if goes_on:
        path = newest
        _say_if_nothing_is_found(newest, snapshots.folder)
        with together.keeping():
            _check_that_it_is_seen(newest, workers.rank)
        together.exchange(None)
    else:
        path = snapshots.path(recipe.train.begin_iteration) if recipe.train.resume else None
    if path is not None:
        return _resumed(recipe, network, optimizer, snapshots, path, may_be_finished=goes_on)
    if recipe.network.pretrained is not None:
        _check_pretrained(recipe, Path(recipe.network.pretrained))
        builders.start_from_pretrained(recipe, network, snapshots.categories)
    return None


def begin_run(snapshots: Snapshots, start: ResumeState | None, workers: Workers) -> None:
    """Rank 0 notes that the folder's run begins here. start: None: anew, and replaces what is there.

    Raises:
        PlaceError: the folder cannot be written.
    """
    together = Together(workers)
    names = {name for launch in together.exchange(builders.launch_of(os.environ)) for name in launch.names}
    with together.keeping():
        if workers.rank == 0:
            snapshots.begin(start.iteration if start else None, sorted(names))
    together.exchange(None)


def _resumed(
    recipe: Recipe,
    network: UPSNet,
    optimizer: torch.optim.Optimizer,
    snapshots: Snapshots,
    path: Path,
    may_be_finished: bool,
) -> ResumeState:
    start = resume(path, optimizer)
    builders.load_trained(recipe, network, read_weights(path), snapshots.categories)
    if start.iteration >= recipe.train.max_iteration and not may_be_finished:
        raise RecipeError(
            f"train.max_iteration is {recipe.train.max_iteration}, but the snapshot to resume from has "
            f"{start.iteration} steps already: raise it"
        )
    logger.info("resuming after step %d", start.iteration)
    return start


def _say_if_nothing_is_found(newest: Path | None, folder: Path) -> None:
    if newest is None:
        others = complete_snapshots(folder)
        hint = "; train.resume=true train.begin_iteration=N would go on from one of an earlier run" if others else ""
        logger.info("no snapshot of this run in %s to go on from: it starts from the beginning%s", folder, hint)


def _check_that_it_is_seen(newest: Path | None, rank: int) -> None:
    for file in (newest, state_path(newest)) if newest is not None else ():
        if not file.is_file():
            raise PlaceError(
                f"worker {rank} does not see {file}, from which worker 0 goes on: give all workers one output_path "
                f"in a folder that their machines share"
            )


def _check_pretrained(recipe: Recipe, path: Path) -> None:
    if not path.is_file():
        command = command_for(path)
        depth = recipe.symbol.split("_")[1]
        raise WeightsError(
            f"network.pretrained: there is no weight file {path}: "
            f"{f'run {command}' if command else f'put a ResNet-{depth} there'}, or train from scratch "
            f"with network.pretrained=null network.backbone_fix_bn=false network.backbone_freeze_at=0"
        )
