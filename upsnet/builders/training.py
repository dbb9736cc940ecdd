"""From a recipe to what the training loop wants."""

import logging

import torch

from upsnet.config import Recipe
from upsnet.engine.optimizer import build_optimizer
from upsnet.engine.options import LoopOptions
from upsnet.engine.shared_norms import share_norms
from upsnet.engine.workers import Workers
from upsnet.models.upsnet import UPSNet
from upsnet.structures.errors import RecipeError

logger = logging.getLogger("upsnet")

ROI_LOSS_SHARE = 0.2
"""Weight of the semantic loss on crops, as a share of the semantic loss' own (UPSNet, section 3.2)."""


def loss_weights(recipe: Recipe) -> dict[str, float]:
    """Factor of every loss in the total."""
    train = recipe.train
    weights = {
        "rpn_cls_loss": 1.0,
        "rpn_bbox_loss": 1.0,
        "cls_loss": 1.0,
        "bbox_loss": train.bbox_loss_weight,
        "mask_loss": 1.0,
        "fcn_loss": train.fcn_loss_weight,
        "panoptic_loss": train.panoptic_loss_weight,
    }
    if train.fcn_with_roi_loss:
        weights["fcn_roi_loss"] = train.fcn_loss_weight * ROI_LOSS_SHARE
    return weights


def accumulation(recipe: Recipe, workers: int = 1) -> int:
    """Micro-batches of each worker in one optimiser step.

    Raises:
        RecipeError: `total_batch` is no multiple of workers × batch_size.
    """
    share = workers * recipe.train.batch_size
    total = recipe.train.total_batch or share
    if total % share:
        raise RecipeError(
            f"train.total_batch ({total}) is no multiple of workers × batch_size ({workers} × "
            f"{recipe.train.batch_size}): change one of them"
        )
    return total // share


def build_optimizer_of(recipe: Recipe, network: UPSNet) -> torch.optim.Optimizer:
    """The recipe's optimiser over the network's trainable parameters."""
    train = recipe.train
    return build_optimizer(network, train.optimizer, train.momentum, train.wd)


def share_norms_of(recipe: Recipe, network: UPSNet, workers: Workers) -> None:
    """With `network.use_syncbn` the trained batch norms of several workers look at the images of all of them."""
    if not recipe.network.use_syncbn or workers.count == 1:
        return
    if workers.batch_norm is None:
        logger.warning("network.use_syncbn: there is no such norm for CPUs: norms look at each worker's own images")
    else:
        share_norms(network, workers.batch_norm)


def engine_options(recipe: Recipe, epoch_length: int, workers: int = 1) -> LoopOptions:
    """The training loop's options. epoch_length: entries of the training set, mirrored copies included."""
    train = recipe.train
    passes = accumulation(recipe, workers)
    total_batch = workers * train.batch_size * passes
    return LoopOptions(
        max_iteration=train.max_iteration,
        steps_per_epoch=max(-(-epoch_length // total_batch), 1),
        lr=train.lr,
        lr_schedule=train.lr_schedule,
        decay_iterations=train.decay_iteration,
        warmup_iterations=train.warmup_iteration,
        accumulation=passes,
        loss_weights=loss_weights(recipe),
        precision=train.precision,
        clip_gradient=train.clip_gradient,
        ema=train.ema,
        seed=recipe.seed,
        display_iter=train.display_iter,
        snapshot_step=train.snapshot_step,
        test_step=train.test_step,
    )
