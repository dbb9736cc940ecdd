"""From the way in which a process was started to the workers that it belongs to."""

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch

from upsnet.builders.network import choose_device
from upsnet.config import Recipe
from upsnet.engine.torch_workers import TorchWorkers
from upsnet.engine.workers import SingleWorker, Workers
from upsnet.structures.errors import RecipeError

Launcher = Literal["plain", "torchrun", "horovodrun"]


def launcher_of(environment: Mapping[str, str]) -> Launcher:
    """What started a process, by the variables that it left."""
    if "HOROVOD_RANK" in environment or "HOROVOD_ELASTIC" in environment:
        return "horovodrun"
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} <= environment.keys():
        return "torchrun"
    return "plain"


class Launch(NamedTuple):
    """names: of the launch by torchrun that a process is part of, none for others. earlier: those of them that only
    workers of the same launch can have had before."""

    names: Sequence[str] = ()
    earlier: Sequence[str] = ()


def launch_of(environment: Mapping[str, str]) -> Launch:
    """torchrun starts all workers anew when one is lost, and when a machine comes; then it counts no restart, and on
    other machines than the lost worker's it counts none either. But its own process on a machine stays."""
    if launcher_of(environment) != "torchrun":
        return Launch()
    name = environment.get("TORCHELASTIC_RUN_ID", "none")
    agent = f"{name}:{socket.gethostname()}:{os.getppid()}"
    is_restart = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if name == "none":  # not given by the user
        return Launch([agent], [agent])
    return Launch([agent, name], [agent, name] if is_restart else [agent])


def build_workers(recipe: Recipe, for_training: bool = True) -> tuple[Workers, torch.device]:
    """The workers that this process is one of, and the device that it computes on.

    Args:
        for_training: False: `train.use_horovod` says nothing.

    Raises:
        RecipeError: the launcher and the recipe contradict each other, or there is no device for this worker.
    """
    launcher = launcher_of(os.environ)
    if for_training:
        _check_launcher(recipe, launcher)
    if launcher == "plain":
        return SingleWorker(), choose_device(recipe)
    if launcher == "horovodrun":
        device = choose_device(recipe, local_rank=int(os.environ["HOROVOD_LOCAL_RANK"]))
        return _horovod_workers(recipe, device), device
    device = choose_device(recipe, local_rank=int(os.environ["LOCAL_RANK"]))
    return TorchWorkers(device), device


def gpus_of_a_plain_launch(recipe: Recipe) -> list[int]:
    """The devices of `gpus` that a plain launch wants a worker for each of; fewer than two: this process will do.

    Raises:
        RecipeError: one of several devices is not there.
    """
    gpus = [int(number) for number in recipe.gpus.split(",")]
    if launcher_of(os.environ) != "plain" or len(gpus) == 1 or not torch.cuda.is_available():
        return []
    found = torch.cuda.device_count()
    if missing := [gpu for gpu in gpus if gpu >= found]:
        there = ",".join(map(str, range(found)))
        raise RecipeError(f"gpus: device {missing[0]} is not there, this machine has {found}: add gpus='{there}'")
    return gpus


def _check_launcher(recipe: Recipe, launcher: Launcher) -> None:
    if launcher == "torchrun" and recipe.train.use_horovod:
        raise RecipeError(
            "this is a launch by torchrun, but train.use_horovod is true: add train.use_horovod=false to the command"
        )
    if launcher == "horovodrun" and not recipe.train.use_horovod:
        raise RecipeError(
            "this is a launch by horovodrun, but train.use_horovod is false: add train.use_horovod=true to the command"
        )


def _horovod_workers(recipe: Recipe, device: torch.device) -> Workers:
    try:
        from upsnet.engine.horovod_workers import HorovodWorkers
    except ImportError as error:
        raise RecipeError(
            f"this is a launch by horovodrun, but Horovod cannot be loaded here ({error}): run ./init.sh horovod"
        ) from error
    return HorovodWorkers(device, recipe.train.horovod_compression)
