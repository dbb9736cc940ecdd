"""`python -m upsnet.operators`: which path each operator takes on this machine, and a small self-check."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torchvision
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F

from upsnet.operators import (
    batched_nms,
    caffe_sgd_,
    count_overlaps,
    deform_conv2d,
    describe,
    fuse_panoptic,
    library,
    paste_masks,
    pyramid_roi_align,
)

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Check:
    """An operator held against something that does not share its code.

    native: the native operator behind it. fallback: what serves in its place. difference: device → how far the result
    lies from the other's, 0 where both agree. on_cuda: whether there is a native kernel for CUDA.
    """

    native: str
    fallback: str
    difference: Callable[[str], float]
    on_cuda: bool = True


def check_deform_conv2d(device: str) -> float:
    """Against torchvision, value and gradients."""
    tensors = [_random(shape).to(device).requires_grad_() for shape in ((2, 20, 9, 13), (2, 18, 9, 13), (17, 20, 3, 3))]

    def run(operator: Callable[..., Tensor]) -> list[Tensor]:
        output = operator(*tensors, padding=1)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), tensors)]

    return _largest(run(deform_conv2d), run(torchvision.ops.deform_conv2d))


def check_pyramid_roi_align(device: str) -> float:
    """Against torchvision's RoIAlign on the only level, value and gradient."""
    feature = _random((2, 20, 30, 40)).to(device).requires_grad_()
    rois = torch.cat([torch.tensor([[0.0], [1.0], [1.0]]), 20 + 80 * _boxes(3, 0.5)], dim=1).to(device)

    def run(pooled: Tensor) -> list[Tensor]:
        return [pooled.detach(), torch.autograd.grad(pooled.square().sum(), feature)[0]]

    theirs = torchvision.ops.roi_align(feature, rois, 7, spatial_scale=0.25, sampling_ratio=2)
    return _largest(run(pyramid_roi_align([feature], rois, 7)), run(theirs))


def check_nms(device: str) -> float:
    """Against torchvision: boxes in which both differ."""
    boxes, scores = (60 * _boxes(500, 0.6)).to(device), torch.rand(500, generator=_draw()).to(device)
    groups = torch.zeros(500, dtype=torch.int64, device=device)
    ours, theirs = batched_nms(boxes, scores, groups, 0.5), torchvision.ops.nms(boxes, scores, 0.5)
    return float(len(set(ours.tolist()) ^ set(theirs.tolist())))


def check_fuse_panoptic(device: str) -> float:
    """Against the arg-max over all channels, for one instance that fills the map: the share of other pixels."""
    scores, mask = (_random(shape).to(device) for shape in ((5, 8, 10), (1, 28, 28)))
    box, thing = torch.tensor([[0.0, 0.0, 39.0, 31.0]], device=device), torch.tensor([1], device=device)
    enlarged = F.interpolate(scores[None], size=(32, 40), mode="bilinear")[0]
    instance = enlarged[3] + F.interpolate(mask[None], size=(32, 40), mode="bilinear")[0, 0]
    unknown = enlarged[3:].amax(dim=0) - enlarged[3]
    expected = torch.cat([enlarged[:3], instance[None], unknown[None]]).argmax(dim=0)
    channels, semantic, _ = fuse_panoptic(scores, (32, 40), box, thing, mask, num_stuff=3)
    wrong = (channels % 5 != expected % 5) | (semantic != enlarged.argmax(dim=0))
    return float(wrong.float().mean())


def check_paste_masks(device: str) -> float:
    """A mask without doubt on a photo, against the pixels that it must have."""
    (rle,) = paste_masks(torch.ones(1, 28, 28, device=device), np.array([[3, 2, 9, 8]], np.float32), (12, 16))
    expected = np.zeros((12, 16), np.uint8)
    expected[1:9, 2:10] = 1  # the box grows by 2/28 and loses its fractions
    return float(np.abs(coco_mask.decode(rle).astype(int) - expected).sum())


def check_caffe_sgd(device: str) -> float:
    """A step, against its formula."""
    weight, gradient, buffer = (tensor.to(device) for tensor in _random((3, 40)))
    expected = 0.9 * buffer + 0.1 * (gradient + 0.01 * weight)
    kept = weight.clone()
    caffe_sgd_([weight], [gradient], [buffer], 0.1, 0.9, 0.01)
    return _largest([buffer, weight], [expected, kept - expected])


def check_count_overlaps(_: str) -> float:
    """Overlaps of two random maps in which we and a plain sort differ."""
    first, second = np.random.default_rng(0).integers(-3, 4, (2, 50, 70), dtype=np.int32).repeat(5, axis=2)
    pairs, pixels = np.unique(np.stack([first.ravel(), second.ravel()]), axis=1, return_counts=True)
    expected = dict(zip(zip(*pairs.tolist(), strict=True), pixels.tolist(), strict=True))
    return float(len(count_overlaps(first, second)[0].items() ^ expected.items()))


CHECKS = {
    "deform_conv2d": Check("deform_conv2d", "torchvision", check_deform_conv2d),
    "pyramid_roi_align": Check("pyramid_roi_align", "torchvision", check_pyramid_roi_align),
    "nms": Check("nms_flags", "torchvision", check_nms),
    "fuse_panoptic": Check("fuse_panoptic", "PyTorch", check_fuse_panoptic),
    "paste_masks": Check("paste_masks", "pycocotools", check_paste_masks, on_cuda=False),
    "caffe_sgd_": Check("caffe_sgd_", "PyTorch", check_caffe_sgd),
    "count_overlaps": Check("count_overlaps", "numpy", check_count_overlaps, on_cuda=False),
}


def path_of(check: Check, device: str) -> str:
    """What serves an operator for float32 tensors on a device."""
    if check.native == "count_overlaps":
        return "native" if library.count_overlaps else check.fallback
    return "native" if library.covers(check.native, torch.zeros(1, device=device)) else check.fallback


def main() -> int:
    """Prints the report; 0 if every operator agrees with what it is held against."""
    print(describe())
    print(library.describe_counting())
    agree = True
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name, check in CHECKS.items():
            if device == "cuda" and not check.on_cuda:
                continue
            difference = check.difference(device)
            agree = agree and difference < TOLERANCE
            print(f"{device:5s} {name:18s} {path_of(check, device):12s} differs by {difference:.1e}")
    print("self-check passed" if agree else "self-check FAILED: build again, or set UPSNET_NATIVE=0")
    return 0 if agree else 1


def _draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=_draw())


def _boxes(count: int, side: float) -> Tensor:
    """N×4 boxes with corners in 0..1 and sides below `side`."""
    corner, size = torch.rand(2, count, 2, generator=_draw())
    return torch.cat([corner, corner + side * size], dim=1)


def _largest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, relative to the largest value."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    sys.exit(main())
