"""One function a command: recipe → builders → engine → files. The only room that knows all others."""

from upsnet.commands.demo import DEMO_RECIPE, DEMO_TRAIN, DEMO_VAL, demo, shapes
from upsnet.commands.inspecting import weights
from upsnet.commands.launch import launch_on_several_gpus
from upsnet.commands.predicting import predict
from upsnet.commands.preparing import prepare_cityscapes, prepare_coco, shard_coco
from upsnet.commands.reporting import report
from upsnet.commands.scoring import evaluate
from upsnet.commands.submitting import submission
from upsnet.commands.testing import test
from upsnet.commands.training import train

__all__ = [
    "DEMO_RECIPE",
    "DEMO_TRAIN",
    "DEMO_VAL",
    "demo",
    "evaluate",
    "launch_on_several_gpus",
    "predict",
    "prepare_cityscapes",
    "prepare_coco",
    "report",
    "shapes",
    "shard_coco",
    "submission",
    "test",
    "train",
    "weights",
]
