"""From a recipe to the things it describes: the one room that knows recipe keys and constructors both."""

from upsnet.builders.data import (
    build_test_loader,
    build_test_set,
    build_training_loader,
    build_training_set,
    check_class_counts,
    test_order,
    test_views,
    training_transform,
)
from upsnet.builders.evaluation import build_evaluators
from upsnet.builders.network import build_network, choose_device, device_name, prepare_for_test
from upsnet.builders.submission import no_submission, write_submission
from upsnet.builders.training import (
    ROI_LOSS_SHARE,
    accumulation,
    build_optimizer_of,
    engine_options,
    loss_weights,
    share_norms_of,
)
from upsnet.builders.weights import fit, load_trained, start_from_pretrained
from upsnet.builders.workers import build_workers, gpus_of_a_plain_launch, launch_of

__all__ = [
    "ROI_LOSS_SHARE",
    "accumulation",
    "build_evaluators",
    "build_network",
    "build_optimizer_of",
    "build_test_loader",
    "build_test_set",
    "build_training_loader",
    "build_training_set",
    "build_workers",
    "check_class_counts",
    "choose_device",
    "device_name",
    "engine_options",
    "fit",
    "gpus_of_a_plain_launch",
    "launch_of",
    "load_trained",
    "loss_weights",
    "no_submission",
    "prepare_for_test",
    "share_norms_of",
    "start_from_pretrained",
    "test_order",
    "test_views",
    "training_transform",
    "write_submission",
]
