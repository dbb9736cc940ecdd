from dataclasses import fields, is_dataclass

import pytest
import torch

from upsnet.structures.masks import Masks
from upsnet.structures.sample import Batch, Instances

NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = [torch.device("meta"), pytest.param(torch.device("cuda"), marks=NEEDS_CUDA)]


def batch_of(images=2, views=1):
    def instances(count):
        boxes, classes = torch.rand(count, 4), torch.arange(count)
        return Instances(boxes, classes, classes > 1, Masks([]))

    return Batch(
        images=torch.rand(images, 3, 32, 32),
        sizes=[(30, 31)] * images,
        image_ids=list(range(images)),
        file_names=["a.jpg"] * images,
        original_sizes=[(60, 62)] * images,
        scales=[0.5] * images,
        flipped=[False] * images,
        instances=[instances(k) for k in range(images)],
        semantic=torch.zeros(images, 32, 32, dtype=torch.int16),
        quarter_masks=[torch.zeros(k, 8, 8, dtype=torch.bool) for k in range(images)],
        views=[batch_of(images, 0) for _ in range(views)],
    )


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if is_dataclass(value):
        return [tensor for field in fields(value) for tensor in tensors_in(getattr(value, field.name))]
    return [tensor for each in value for tensor in tensors_in(each)] if isinstance(value, list) else []


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_every_map_moves_and_instances_stay_on_the_host(device):
    batch = batch_of()
    moved = tensors_in(batch.to(device))
    assert len(moved) == len(tensors_in(batch)) == 2 * (2 + 3 * 2 + 2)
    places = [tensor.device.type for tensor in moved]
    assert places.count(device.type) == 2 * (2 + 2) and places.count("cpu") == 2 * 3 * 2
    for on_device, view in ((batch.to(device), batch), (batch.to(device).views[0], batch.views[0])):
        assert {each.device.type for each in tensors_in(on_device.instances)} == {"cpu"}
        assert all(
            torch.equal(a, b) for a, b in zip(tensors_in(on_device.instances), tensors_in(view.instances), strict=True)
        )
    assert batch.to(device).file_names == batch.file_names


def test_every_map_is_pinned(monkeypatch):
    pinned = []

    def pin(tensor):
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = batch_of()
    found = tensors_in(batch.pin_memory())
    ours, given = ({id(tensor) for tensor in tensors} for tensors in (pinned, tensors_in(batch)))
    assert len(found) == 20 and len(ours) == 8 and {id(tensor) for tensor in found} <= ours | given
    assert all(torch.equal(a, b) for a, b in zip(found, tensors_in(batch), strict=True))


def test_what_is_missing_stays_missing():
    batch = batch_of(views=0)
    batch.instances = batch.semantic = batch.quarter_masks = None
    moved = batch.to(torch.device("cpu"))
    assert moved.instances is moved.semantic is moved.quarter_masks is None
