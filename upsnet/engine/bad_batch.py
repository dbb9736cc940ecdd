"""A loss that is not a finite number: training ends with a sentence that names it, its images and where they are."""

import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from upsnet.structures.errors import PlaceError, UserError
from upsnet.structures.places import write_temporary, writing
from upsnet.structures.sample import Batch


class TrainingError(UserError):
    """Training cannot go on."""


def bad_loss(losses: Mapping[str, float]) -> str | None:
    """The name of the first loss that is not finite."""
    return next((name for name, value in losses.items() if not math.isfinite(value)), None)


def training_error(
    iteration: int, name: str, value: float, batch: Batch, store: Callable[[Batch, int], Sequence[Path]] | None
) -> TrainingError:
    """The error for a loss that is not finite, before step `iteration`, on a batch that is stored for a look at it."""
    ids = ", ".join(map(str, batch.image_ids))
    try:
        places = " and ".join(map(str, store(batch, iteration))) if store is not None else ""
    except PlaceError as error:
        places = f"no file ({error})"
    stored = f", stored as the network saw it in {places}" if places else ""
    return TrainingError(
        f"step {iteration}: {name} is {value} on image {ids}: training stops before this step; "
        f"lower train.lr or look at {', '.join(batch.file_names)}{stored}"
    )


def write_batch(path: Path, batch: Batch) -> None:
    """Writes a batch as tensors and plain values, which torch loads with `weights_only=True`: its fields by name;
    without draws, and of the instances boxes, classes and marks of crowds.

    Raises:
        PlaceError: it cannot be written.
    """
    left_out = ("draws", "views", "instances")
    content = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name not in left_out}
    instances: list[dict[str, Tensor]] = [
        {"boxes": each.boxes, "classes": each.classes, "is_crowd": each.is_crowd} for each in batch.instances or ()
    ]
    buffer = io.BytesIO()
    torch.save(content | {"instances": instances}, buffer)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(write_temporary(path, buffer.getbuffer()), path)
