"""From COCO's classes to those of Cityscapes: which rows of the classifiers a network for Cityscapes starts from."""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from upsnet.checkpoints.files import WeightFile
from upsnet.structures.categories import Categories
from upsnet.structures.class_tables import class_table
from upsnet.structures.draws import seed_of

COCO_CLASS = {
    "road": "road",
    "sidewalk": "pavement-merged",
    "building": "building-other-merged",
    "wall": "wall-other-merged",
    "fence": "fence-merged",
    "pole": None,
    "traffic light": "traffic light",
    "traffic sign": None,
    "vegetation": "tree-merged",
    "terrain": None,
    "sky": "sky-other-merged",
    "person": "person",
    "rider": None,
    "car": "car",
    "truck": "truck",
    "bus": "bus",
    "train": "train",
    "motorcycle": "motorcycle",
    "bicycle": "bicycle",
}
"""For each class of Cityscapes the one of COCO from which UPSNet starts; None: random rows."""

_ROWS_OF_A_CLASS = {"box_head.class_logits": 1, "box_head.deltas": 4, "mask_head.score": 1}
"""Layers of the instance heads, and how many rows a class has: the box head gives four offsets."""


@dataclass(frozen=True, slots=True)
class ClassRows:
    """tensors: the classifiers' weights and biases for Cityscapes. drawn_classes: those whose rows are random."""

    tensors: dict[str, Tensor]
    drawn_classes: list[str]


def cityscapes_rows(file: WeightFile, categories: Categories, seed: int) -> ClassRows | None:
    """The classifiers of an UPSNet that was trained on COCO, for the classes of Cityscapes.

    Random rows are normal with the mean and the deviation of the file's whole tensor, and a function of the seed and
    the tensor's name.

    Returns:
        None unless the file has COCO's classes and `categories` are those of Cityscapes.
    """
    coco, cityscapes = class_table("coco"), class_table("Cityscapes")
    assert coco is not None and cityscapes is not None
    if file.categories is None or not file.categories.same_classes(coco) or not categories.same_classes(cityscapes):
        return None
    if file.class_counts != (coco.num_classes, coco.num_seg_classes):  # it contradicts itself
        return None
    position: dict[str | None, int] = {category.name: i for i, category in enumerate(coco)}
    semantic = [position.get(COCO_CLASS[category.name]) for category in categories]
    things = [None if i is None else i - coco.num_stuff + 1 for i in semantic[categories.num_stuff :]]
    wanted = {"semantic_head.score": semantic} | {layer: [0, *things] for layer in _ROWS_OF_A_CLASS}  # 0: background
    tensors = {}
    for layer, classes in wanted.items():
        for name in {f"{layer}.weight", f"{layer}.bias"} & file.state.keys():
            generator = torch.Generator().manual_seed(seed_of(seed, zlib.crc32(name.encode())))
            tensors[name] = _take(file.state[name], classes, _ROWS_OF_A_CLASS.get(layer, 1), generator)
    drawn = [category.name for category, i in zip(categories, semantic, strict=True) if i is None]
    return ClassRows(tensors, drawn)


def _take(source: Tensor, classes: list[int | None], rows: int, generator: torch.Generator) -> Tensor:
    """Blocks of `rows` rows, one for each class; random ones where the class is None."""
    blocks = source.unflatten(0, (-1, rows))
    deviation, mean = torch.std_mean(source.double(), correction=0)
    taken = [
        blocks[k]
        if k is not None
        else (torch.randn(blocks[0].shape, generator=generator, dtype=torch.float64) * deviation + mean).float()
        for k in classes
    ]
    return torch.cat(taken)
