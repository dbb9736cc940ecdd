"""Released UPSNet weights: their names and ours, their class tables, and writing ours as they are written."""

from collections.abc import Mapping

import torch
from torch import Tensor

from upsnet.checkpoints import resnet
from upsnet.checkpoints.names import NameTable
from upsnet.structures.categories import Categories
from upsnet.structures.class_tables import class_table
from upsnet.structures.errors import WeightsError

_BLOCK = "resnet_backbone.res{stage}.layers.{block}"
_CONV, _OUR_CONV = "fcn_head.fcn_subnet.conv.{layer}.0", "semantic_head.layers.{layer}"

_NAMES = NameTable(
    *resnet.layers(stem="resnet_backbone.conv1.", block=_BLOCK),
    (f"{_BLOCK}.conv{{n}}_offset", f"{resnet.OUR_BLOCK}.conv{{n}}.offset"),
    ("fpn.fpn_gap", "fpn.global_average"),
    ("fpn.fpn_p{level}_1x1", "fpn.lateral.{level-2}.conv"),
    ("fpn.fpn_p{level}", "fpn.output.{level-2}.conv"),
    ("rpn.conv_proposal.0", "rpn.conv"),
    ("rpn.cls_score", "rpn.objectness"),
    ("rpn.bbox_pred", "rpn.deltas"),
    ("rcnn.fc{n}.0", "box_head.fc{n}"),
    ("rcnn.cls_score", "box_head.class_logits"),
    ("rcnn.bbox_pred", "box_head.deltas"),
    ("mask_branch.mask_conv{n}.0", "mask_head.convs.{n-1}.conv"),
    ("mask_branch.mask_deconv1.0", "mask_head.deconv"),
    ("mask_branch.mask_score", "mask_head.score"),
    (f"{_CONV}.conv_offset", f"{_OUR_CONV}.conv.offset"),
    (f"{_CONV}.conv", f"{_OUR_CONV}.conv"),
    ("fcn_head.score", "semantic_head.score"),
)

_CLASS_TABLES = {(81, 133): "coco", (9, 19): "Cityscapes"}
"""Data sets of the released files by their class counts C and S."""


def our_name(name: str) -> str | None:
    """Our name of a released file's tensor: `fpn.fpn_p5.bias` → `fpn.output.3.conv.bias`; None: no such layer."""
    return _NAMES.to_right(name)


def released_name(name: str) -> str | None:
    """The released name of one of our tensors; None: the original's name of such a layer is not known."""
    return _NAMES.to_left(name)


def released_classes(counts: tuple[int, int] | None) -> Categories | None:
    """The class table of a released file by its class counts (C, S), None for counts of no released file."""
    dataset = _CLASS_TABLES.get(counts) if counts else None
    return class_table(dataset) if dataset else None


def to_released(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights under our names → the same under the released names.

    Counters of batch norm, which files of old versions of torch lack, are added as 0.

    Args:
        source: the file's name, for messages.

    Raises:
        WeightsError: the network has layers for which the original's names are not known, such as group norm.
    """
    named = {}
    for name, tensor in state.items():
        theirs = released_name(name)
        is_other_norm = ".norm" in name and f"{name.rpartition('.')[0]}.running_mean" not in state
        if theirs is None or is_other_norm:
            raise WeightsError(
                f"{source} cannot be written under the released names: none is known for {name}; "
                f"write it with --to safetensors"
            )
        named[theirs] = tensor
    for name in [name for name in named if name.endswith(".running_mean")]:
        named.setdefault(name.removesuffix("running_mean") + "num_batches_tracked", torch.tensor(0))
    return named
