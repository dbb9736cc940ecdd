"""What a command says about the machine before it works."""

import logging
import os

import torch

from upsnet import builders
from upsnet.builders.workers import launcher_of
from upsnet.config import Recipe
from upsnet.operators import describe

logger = logging.getLogger("upsnet")


def say_where(device: torch.device) -> None:
    """Logs the device and which operators run natively."""
    logger.info("running on %s; %s", builders.device_name(device), describe())


def say_how_many_workers(recipe: Recipe, count: int) -> None:
    """Says so where a recipe made for several workers runs on one, since no launcher has started it."""
    if count > 1 or launcher_of(os.environ) != "plain":
        return
    if recipe.train.use_horovod:
        logger.info("train.use_horovod is true, but this is a plain launch: one worker, without Horovod")
    elif "," in recipe.gpus:
        logger.info("gpus lists several devices, but there is no CUDA here: one worker")
    else:
        return
    if recipe.train.total_batch is None:
        count = recipe.train.batch_size
        logger.info("train.total_batch is not set: a step sees %d images; set it if train.lr belongs to more", count)
