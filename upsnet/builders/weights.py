"""From a recipe to weights in its network: pretrained ones to start from, or trained ones that must fit."""

import logging
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from upsnet.builders.network import build_network
from upsnet.checkpoints.conventions import WORDS, known_convention
from upsnet.checkpoints.files import Kind, WeightFile, read_weights
from upsnet.checkpoints.loading import LoadReport, backbone_differences, compare, load_into, load_pretrained
from upsnet.checkpoints.manifest import Convention
from upsnet.config import Recipe
from upsnet.config.yaml_text import read_section
from upsnet.models.upsnet import UPSNet
from upsnet.structures.categories import Categories, Category
from upsnet.structures.class_tables import class_table
from upsnet.structures.errors import RecipeError, WeightsError

logger = logging.getLogger("upsnet")

UNSEEN = (
    "use_caffe_model",
    "pixel_means",
    "backbone_stride_in_1x1",
    "fpn_upsample_method",
    "anchor_ratios",
    "anchor_scales",
    "bbox_reg_weights",
)
"""Keys of `network` on which trained weights depend without any tensor showing it."""

CONVENTION = ("use_caffe_model", "backbone_stride_in_1x1")
"""Those of them on which a backbone depends: its input and its strides."""


def start_from_pretrained(recipe: Recipe, network: UPSNet, categories: Categories) -> LoadReport:
    """Puts the weights of `network.pretrained`, which must be set, into the network, and logs what became of them.

    Raises:
        UserError: the file cannot be read, does not fit, or its convention is unknown or another one than the recipe's.
    """
    assert recipe.network.pretrained is not None
    file = read_weights(Path(recipe.network.pretrained))
    logger.info("network.pretrained %s: %s, %d tensors", file.path, file.kind, len(file.state))
    if file.kind is Kind.RESNET:
        _check_convention(recipe, file)
    elif differences := _unseen_differences(recipe, file, CONVENTION):
        raise WeightsError(f"{file.path} was trained with {differences[0]}: set the recipe to the file's convention")
    report = load_pretrained(network, file, categories, recipe.seed)
    for line in report.lines():
        logger.info("network.pretrained %s", line)
    return report


def load_trained(recipe: Recipe, network: nn.Module, file: WeightFile, categories: Categories) -> None:
    """Loads weights that must fit the network, the classes and, as far as the file tells, the recipe.

    Raises:
        WeightsError: they do not fit.
    """
    if file.kind is Kind.RESNET:
        raise WeightsError(
            f"{file.path} is a ResNet alone, without UPSNet's heads: give trained weights, and this file as "
            f"network.pretrained of a training"
        )
    for position, (theirs, ours) in enumerate(zip_longest(file.categories or categories, categories)):
        if theirs is None or ours is None or (theirs.name, theirs.is_thing) != (ours.name, ours.is_thing):
            was, wanted = (f"'{c.name}' (id {c.id})" if c else "nothing" for c in (theirs, ours))
            raise WeightsError(
                f"{file.path} was trained on other classes: number {position} is {was} there and {wanted} in the data: "
                f"use the data set that it was trained on"
            )
    load_into(network, file.state, str(file.path))
    if differences := _unseen_differences(recipe, file, UNSEEN):
        raise WeightsError(f"{file.path} was trained with {differences[0]}: use the recipe that it was trained with")


def _unseen_differences(recipe: Recipe, file: WeightFile, keys: Sequence[str]) -> list[str]:
    """Keys of `network` of which the recipe inside a snapshot says something else than this recipe, in words."""
    if file.recipe is None:
        return []
    was = read_section(file.recipe, f"the recipe inside {file.path}").get("network")
    now = recipe.model_dump(mode="json")["network"]
    return [
        f"network.{key} {was[key]}, this recipe says {now[key]}"
        for key in keys
        if isinstance(was, dict) and key in was and was[key] != now[key]
    ]


def fit(recipe: Recipe, file: WeightFile) -> Literal["--weight_path", "network.pretrained"] | None:
    """What a file can be to a recipe, by names, shapes, classes and the recipe it carries; nothing is loaded.

    Weights that fit as --weight_path do as network.pretrained, too. A ResNet's convention is not looked at.
    """
    if file.kind is Kind.UNKNOWN:
        return None
    categories = class_table(recipe.dataset.dataset) or file.categories or _unnamed_classes(file.class_counts or (2, 2))
    with torch.device("meta"):
        own = build_network(recipe, categories).state_dict()
    report = compare(own, file.state)
    if backbone_differences(report) or _unseen_differences(recipe, file, CONVENTION):
        return None
    has_these = file.categories is None or file.categories.same_classes(categories)
    is_whole = has_these and not report.differences() and not _unseen_differences(recipe, file, UNSEEN)
    return "--weight_path" if is_whole else "network.pretrained"


def _unnamed_classes(counts: tuple[int, int]) -> Categories:
    """A class table of these counts, C and S."""
    num_things, num_all = max(counts[0] - 1, 1), max(counts[1], 1)
    return Categories(Category(i, str(i), i < num_things, (0, 0, 0)) for i in range(num_all))


def _check_convention(recipe: Recipe, file: WeightFile) -> None:
    """A ResNet's convention must be known, and be that of the recipe's network and transform."""
    options = recipe.network
    known = known_convention(file, options.pretrained_convention)
    if known is None:
        kinds = " or ".join(f"{name} ({WORDS[name]})" for name in get_args(Convention))
        raise RecipeError(
            f"nothing tells the convention of {file.path}, and its tensors do not show it: "
            f"set network.pretrained_convention to {kinds}"
        )
    is_caffe = known.convention == "caffe"
    wanted = {"network.use_caffe_model": (options.use_caffe_model, is_caffe)}
    if "backbone.res2.0.conv3.weight" in file.state:  # it has bottlenecks
        wanted["network.backbone_stride_in_1x1"] = options.backbone_stride_in_1x1, is_caffe
    if wrong := [key for key, (is_set, should_be) in wanted.items() if is_set != should_be]:
        settings = " ".join(f"{key}={str(is_caffe).lower()}" for key in wrong)
        raise RecipeError(
            f"{file.path} is a ResNet of the {known.convention} convention ({WORDS[known.convention]}), known from "
            f"{known.source}; the recipe says otherwise: set {settings}"
        )
    logger.info("network.pretrained convention: %s, known from %s", known.convention, known.source)
