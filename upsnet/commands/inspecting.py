"""`upsnet weights`: what a weight file is, and the same weights in another form."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from upsnet import builders
from upsnet.checkpoints.conventions import WORDS, known_convention
from upsnet.checkpoints.files import Kind, WeightFile, read_weights
from upsnet.checkpoints.writing import Form, default_place, write_weights
from upsnet.config import load_recipe, shipped_recipes
from upsnet.models.resnet import DEPTHS
from upsnet.structures.class_tables import class_table
from upsnet.structures.errors import PlaceError

_NOT_TRAINED = ("running_mean", "running_var", "num_batches_tracked")


def weights(path: Path, form: Form | None = None, out: Path | None = None) -> None:
    """Prints what a weight file is and which shipped recipes it fits; with `form`, writes it in that form instead.

    Args:
        out: where to; default: beside the file.

    Raises:
        UserError: the file cannot be read or written so.
    """
    if form is None and out is not None:
        raise PlaceError(f"--out {out} has nothing to be written to it: add --to original or --to safetensors")
    file = read_weights(path)
    if form is not None:
        out = out or default_place(path, form)
        write_weights(file, form, out)
        print(f"{path} ({file.kind}) as {form}: {out}")
        return
    fitting = _fitting_recipes(file)
    for title, text in _description(file).items():
        print(f"{title:15} {text}")
    for use, names in fitting.items():
        print(f"{use} of these recipes:{'' if names else ' none'}", *names, sep="\n  ")


def _description(file: WeightFile) -> dict[str, str]:
    state = file.state
    parameters = sum(tensor.numel() for name, tensor in state.items() if not name.endswith(_NOT_TRAINED))
    stored = ", ".join(f"{count} {dtype}" for dtype, count in sorted(file.dtypes.items()))
    rows = {
        "file": str(file.path),
        "kind": file.kind.value,
        "format": file.format,
        "tensors": f"{sum(file.dtypes.values())} ({stored}), {parameters / 1e6:.2f} million parameters used",
    }
    if file.kind is Kind.UNKNOWN:
        rows["names"] = ", ".join(list(state)[:3]) + ", …"
        return rows
    if file.kind is Kind.RESNET:
        rows["convention"] = _convention(file)
    rows["backbone"] = _backbone(state)
    if file.class_counts is not None:
        rows["classes"] = _classes(file, file.class_counts)
        rows["pyramid"] = f"{'with' if 'fpn.global_average.weight' in state else 'no'} global average (fpn_with_gap)"
        layers = _numbers(state, r"semantic_head.layers.(\d+).conv.weight")
        rows["semantic head"] = f"{len(layers)} layers (fcn_num_layers)"
    if file.iteration is not None:
        rows["training step"] = str(file.iteration)
    if file.recipe is not None:
        rows["recipe"] = "stored inside"
    return rows


def _convention(file: WeightFile) -> str:
    known = known_convention(file)
    if known is None:
        return "unknown: set network.pretrained_convention to caffe or torchvision"
    keys = ("network.use_caffe_model", "network.backbone_stride_in_1x1")
    settings = " ".join(f"{key}={str(known.convention == 'caffe').lower()}" for key in keys)
    return f"{known.convention} ({WORDS[known.convention]}), known from {known.source}; wants {settings}"


def _backbone(state: Mapping[str, Tensor]) -> str:
    blocks = tuple(len(_numbers(state, rf"backbone.res{stage}.(\d+).conv1.weight")) for stage in range(2, 6))
    has_bottlenecks = "backbone.res2.0.conv3.weight" in state
    depths = [d for d, shape in DEPTHS.items() if shape.blocks == blocks and shape.bottleneck == has_bottlenecks]
    deformable = _numbers(state, r"backbone.res(\d).\d+.conv2.offset.weight")
    stages = ", ".join(f"res{stage}" for stage in deformable) or "none"
    return f"ResNet-{depths[0] if depths else f'? (blocks {blocks})'}, deformable stages: {stages}"


def _classes(file: WeightFile, counts: tuple[int, int]) -> str:
    text = f"C = {counts[0]}, S = {counts[1]}: {counts[0] - 1} things, {counts[1] - counts[0] + 1} stuff"
    if file.categories is None:
        return f"{text}, without names"
    for dataset in ("coco", "Cityscapes"):
        table = class_table(dataset)
        if table is not None and table.same_classes(file.categories):
            return f"{text}, those of {dataset}"
    return f"{text}, named inside"


def _fitting_recipes(file: WeightFile) -> dict[str, list[str]]:
    fits = {name: builders.fit(load_recipe(name), file) for name in shipped_recipes()}
    return {
        "fits as --weight_path": [name for name, use in fits.items() if use == "--weight_path"],
        "fits only as network.pretrained": [name for name, use in fits.items() if use == "network.pretrained"],
    }


def _numbers(names: Iterable[str], pattern: str) -> list[int]:
    """The different numbers at the group of a pattern, ascending."""
    return sorted({int(match[1]) for name in names if (match := re.fullmatch(pattern, name))})
