"""Pasting of masks: as the loops say, and both paths the same texts."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch.nn import functional as F

from tests.reference import panoptic as twin
from upsnet.operators import library, paste_masks

PHOTO = (40, 55)
BOXES = {
    "inside": [10.3, 5.7, 30.2, 29.9],
    "one pixel": [7.0, 9.0, 7.0, 9.0],
    "one column": [7.0, 2.0, 7.0, 39.0],
    "last pixel": [54.0, 39.0, 54.0, 39.0],
    "whole photo": [0.0, 0.0, 54.0, 39.0],
    "over the border": [-20.0, -10.0, 12.0, 12.0],
    "outside": [80.0, 80.0, 90.0, 90.0],
    "far outside": [-80.0, -80.0, -60.0, -60.0],
    "no width": [20.001, 5.0, 19.999, 20.0],
    "inside out": [40.0, 30.0, 10.0, 3.0],
    "larger than the photo": [-50.0, -50.0, 200.0, 200.0],
}
SIZES = [PHOTO, (1, 1), (1, 30), (30, 1), (97, 210)]
native_in_use = library.native_in_use()
paths = pytest.mark.parametrize(
    "native", [pytest.param(True, marks=pytest.mark.skipif(not native_in_use, reason="no native library")), False]
)


@pytest.fixture
def path(native, monkeypatch):
    if not native:
        monkeypatch.setattr(library, "NOT_IN_USE_BECAUSE", "test")


def smooth_masks(count, side, seed=0):
    """Like a mask head's: large areas near 0 and 1 with soft borders."""
    coarse = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) * 3
    return F.interpolate(coarse, size=(side, side), mode="bicubic")[:, 0].sigmoid()


@paths
@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize("side", [1, 7, 28])
def test_like_the_loops(side, box, path):
    probabilities = torch.rand(1, side, side, generator=torch.Generator().manual_seed(0))
    (rle,) = paste_masks(probabilities, np.array([box], dtype=np.float32), PHOTO)
    assert isinstance(rle["counts"], str) and rle["size"] == list(PHOTO)
    expected, margin = twin.paste_mask(probabilities[0].numpy(), box, PHOTO)
    assert margin > 1e-6, "choose another seed: a value lies on the threshold"
    assert np.array_equal(coco_mask.decode(rle).astype(bool), expected)


@pytest.mark.parametrize("threshold", [0.3, 0.5])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("masks", [torch.rand, lambda n, s, _: smooth_masks(n, s), torch.zeros, torch.ones])
def test_both_paths_give_the_same_texts(masks, size, threshold, monkeypatch):
    draws = np.random.default_rng(1)
    sides = np.exp(draws.normal(0, 1, (40, 2))) * (size[1], size[0]) / 3
    corners = draws.uniform(-0.3, 1.2, (40, 2)) * (size[1], size[0]) - sides / 2
    boxes = np.concatenate([[*BOXES.values()], np.concatenate([corners, corners + sides], axis=1)]).astype(np.float32)
    torch.manual_seed(0)
    probabilities = masks(len(boxes), 28, 28)
    ours = paste_masks(probabilities, boxes, size, threshold)
    monkeypatch.setattr(library, "NOT_IN_USE_BECAUSE", "test")
    assert ours == paste_masks(probabilities, boxes, size, threshold)


def test_one_text_for_one_mask():
    """Masks that touch the photo's first and last pixel, columns that join, and nothing at all."""
    whole = np.array([[-50, -50, 200, 200]], dtype=np.float32)
    for value in (0.0, 1.0):
        (rle,) = paste_masks(torch.full((1, 28, 28), value), whole, PHOTO)
        full = np.full(PHOTO, value, dtype=np.uint8, order="F")
        assert rle["counts"] == coco_mask.encode(full)["counts"].decode()


@paths
def test_no_masks(path):
    assert paste_masks(torch.zeros(0, 28, 28), np.zeros((0, 4), dtype=np.float32), PHOTO) == []


@paths
def test_views_and_half_precision(path):
    masks = smooth_masks(6, 28)
    boxes = np.array([BOXES["inside"]] * 3, dtype=np.float32)
    expected = paste_masks(masks[::2].mT.contiguous(), boxes, PHOTO)
    assert paste_masks(masks[::2].mT, boxes, PHOTO) == expected
    halves = masks[:3].bfloat16()
    assert paste_masks(halves, boxes, PHOTO) == paste_masks(halves.float(), boxes, PHOTO)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_masks_on_a_gpu():
    masks, boxes = smooth_masks(3, 28), np.array([BOXES["inside"]] * 3, dtype=np.float32)
    assert paste_masks(masks.cuda(), boxes, PHOTO) == paste_masks(masks, boxes, PHOTO)


def test_threads_change_nothing():
    masks, boxes = smooth_masks(30, 28), np.tile(np.float32(BOXES["over the border"]), (30, 1))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = paste_masks(masks, boxes, PHOTO)
        torch.set_num_threads(4)
        assert paste_masks(masks, boxes, PHOTO) == expected
    finally:
        torch.set_num_threads(before)


@paths
def test_a_damaged_mask_covers_nothing(path):
    (rle,) = paste_masks(torch.full((1, 28, 28), float("nan")), np.array([BOXES["inside"]], dtype=np.float32), PHOTO)
    assert coco_mask.decode(rle).sum() == 0


@pytest.mark.skipif(not native_in_use, reason=library.NOT_IN_USE_BECAUSE)
def test_operator_checks_of_torch():
    boxes = torch.tensor([[1, 2, 30, 20], [50, 3, 70, 50]])
    torch.library.opcheck(torch.ops.upsnet.paste_masks.default, (smooth_masks(2, 30), boxes, *PHOTO, 0.5))


@pytest.mark.parametrize(
    ("probabilities", "boxes", "size", "word"),
    [
        ((2, 28), (2, 4), PHOTO, "probabilities"),
        ((2, 28, 27), (2, 4), PHOTO, "probabilities"),
        ((2, 0, 0), (2, 4), PHOTO, "probabilities"),
        ((2, 28, 28), (3, 4), PHOTO, "boxes"),
        ((2, 28, 28), (2, 5), PHOTO, "boxes"),
        ((2, 28, 28), (2, 4), (0, 5), "size"),
    ],
)
def test_wrong_shapes_are_refused_by_name(probabilities, boxes, size, word):
    with pytest.raises(ValueError, match=word):
        paste_masks(torch.zeros(probabilities), np.zeros(boxes, dtype=np.float32), size)
