"""Writing an UPSNet's weights for others: under the released names, or as safetensors."""

import io
import json
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch

from upsnet.checkpoints.files import FORMAT_VERSION, RECORD, Kind, WeightFile
from upsnet.checkpoints.released import to_released
from upsnet.structures.errors import PlaceError, WeightsError
from upsnet.structures.places import replacing

Form = Literal["original", "safetensors"]
"""original: a state_dict under the released names; safetensors: our names, class table and recipe in the metadata."""


def default_place(path: Path, form: Form) -> Path:
    """Where a file goes when nobody says: beside the one that it is made of."""
    return path.with_name(f"{path.stem}_original.pth") if form == "original" else path.with_suffix(".safetensors")


def write_weights(file: WeightFile, form: Form, out: Path) -> None:
    """Writes the weights of an UPSNet; a file that stands there is replaced, but never the one that was read.

    Raises:
        WeightsError: the file holds no UPSNet, or one whose layers have no released names.
        PlaceError: `out` is the file itself, or cannot be written.
    """
    if file.kind not in (Kind.RELEASED, Kind.OURS):
        what = "a ResNet alone" if file.kind is Kind.RESNET else "no UPSNet"
        raise WeightsError(f"{file.path} is {what}: only a whole UPSNet can be written in another form")
    if out.resolve() == file.path.resolve():
        raise PlaceError(f"{out} is the file that is read and would be overwritten: give another --out")
    data = _original(file) if form == "original" else _safetensors(file)
    with replacing(out) as part:
        part.write_bytes(data)


def _original(file: WeightFile) -> memoryview:
    buffer = io.BytesIO()
    # The torch that the original runs on reads the older format only.
    torch.save(to_released(file.state, str(file.path)), buffer, _use_new_zipfile_serialization=False)
    return buffer.getbuffer()


def _safetensors(file: WeightFile) -> bytes:
    record = {
        "format_version": FORMAT_VERSION,
        "categories": file.categories and file.categories.to_coco(),
        "recipe": file.recipe,
        "iteration": file.iteration,
    }
    tensors = {name: tensor.contiguous() for name, tensor in file.state.items()}
    return safetensors.torch.save(tensors, {RECORD: json.dumps(record)})
