"""A plain launch of a recipe for several GPUs becomes a launch by torchrun."""

import os
import sys
from pathlib import Path

from upsnet import builders
from upsnet.config import Recipe


def launch_on_several_gpus(recipe: Recipe, for_training: bool) -> None:
    """Where the recipe's `gpus` lists several devices that are there, starts this program again with a worker on each,
    and does not return. `train.use_horovod` leaves the launch of a training to horovodrun.

    Raises:
        RecipeError: one of the devices is not there.
    """
    if for_training and recipe.train.use_horovod:
        return
    gpus = builders.gpus_of_a_plain_launch(recipe)
    if len(gpus) < 2:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(
        sys.executable, torchrun_command(len(gpus), sys.argv), os.environ | {"CUDA_VISIBLE_DEVICES": visible(gpus)}
    )


def torchrun_command(workers: int, arguments: list[str]) -> list[str]:
    """The command that runs a program with several workers on this machine. arguments: the program's, itself first."""
    program = ["-m", "upsnet"] if Path(arguments[0]).name == "__main__.py" else [arguments[0]]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    return [*torchrun, *program, *arguments[1:]]


def visible(gpus: list[int]) -> str:
    """CUDA_VISIBLE_DEVICES for these devices, whose numbers count those that are visible now."""
    now = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = now.split(",") if now else [str(gpu) for gpu in range(max(gpus) + 1)]
    return ",".join(names[gpu] for gpu in gpus)
