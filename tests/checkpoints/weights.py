"""Weight files of a small UPSNet and of the original's key tables, for tests."""

import json
from pathlib import Path

import torch

from upsnet.builders import build_network
from upsnet.config import Recipe, load_recipe
from upsnet.models.upsnet import UPSNet
from upsnet.structures.categories import Categories

SMALL = (
    "symbol=resnet_18_upsnet", "network.pretrained=null", "network.fpn_feature_dim=8", "network.fcn_feature_dim=8",
    "network.rcnn_feature_dim=8", "network.mask_feature_dim=8",
)  # fmt: skip


def small_recipe(name: str = "upsnet_resnet50_coco_16gpu", *overrides: str) -> Recipe:
    """A recipe with a narrow network of 18 layers and the classes of its data set."""
    return load_recipe(name, [*SMALL, *overrides])


def small_network(recipe: Recipe, categories: Categories, seed: int = 0) -> UPSNet:
    """The recipe's network, every tensor of which was drawn at random."""
    network = build_network(recipe, categories)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + (0.5 if "running_var" in name else -0.5))
    return network


def write_table(path: Path, table: Path, prefix: str = "", counters: bool = True) -> Path:
    """A file with the entries of a key table, all 0; each tensor is stored as one number."""
    entries = json.loads(table.read_text())["entries"]
    state = {
        prefix + name: torch.zeros((), dtype=getattr(torch, dtype)).expand(shape)
        for name, (shape, dtype) in entries.items()
        if counters or not name.endswith("num_batches_tracked")
    }
    torch.save(state, path)
    return path
