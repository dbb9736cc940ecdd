"""The networks of the shipped recipes have as many tensors of every shape as the original's checkpoints."""

import json
from collections import Counter

import pytest
import torch

from upsnet.builders import build_network
from upsnet.config import load_recipe
from upsnet.structures.categories import Categories, Category

RECIPES = [
    "upsnet_resnet50_coco_16gpu",
    "upsnet_resnet50_coco_8gpu",
    "upsnet_resnet50_coco_4gpu",
    "upsnet_resnet101_dcn_coco_3x_16gpu",
    "upsnet_resnet50_cityscapes_16gpu",
    "upsnet_resnet50_cityscapes_4gpu",
    "upsnet_resnet101_cityscapes_w_coco_16gpu",
]


def categories_of(recipe):
    """As many classes as the recipe says."""
    things = recipe.dataset.num_classes - 1
    count = recipe.dataset.num_seg_classes
    return Categories(Category(i, f"class {i}", i < things, (0, 0, 0)) for i in range(count))


@pytest.mark.parametrize("name", RECIPES)
def test_shapes(name, shared):
    table = json.loads(shared(f"reference/checkpoint_keys/{name}.json").read_text())
    recipe = load_recipe(name)
    with torch.device("meta"):
        network = build_network(recipe, categories_of(recipe))
    shapes = {key: tuple(shape) for key, (shape, _) in table["entries"].items()}
    assert Counter(tuple(value.shape) for value in network.state_dict().values()) == Counter(shapes.values())

    parameters = set(shapes) - set(table["buffers"])
    trainable = parameters - set(table["frozen_parameters"])
    assert Counter(tuple(p.shape) for p in network.parameters()) == Counter(shapes[key] for key in parameters)
    ours = Counter(tuple(p.shape) for p in network.parameters() if p.requires_grad)
    assert ours == Counter(shapes[key] for key in trainable)
