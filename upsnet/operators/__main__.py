"""`python -m upsnet.operators`: which path each operator takes on this machine, and a small self-check."""

import sys

import numpy as np
import torch
import torchvision
from torch import Tensor

from upsnet.operators import batched_nms, count_overlaps, deform_conv2d, describe, library

TOLERANCE = 1e-4


def paths(device: str) -> dict[str, str]:
    """Name of the library that serves each operator for float32 tensors on `device`."""
    tensor = torch.zeros(1, 4, 1, 1, device=device)
    native = {
        "deform_conv2d": library.covers("deform_conv2d", tensor, tensor),
        "nms": library.covers("nms_flags", tensor),
        "pyramid_roi_align": library.covers("pyramid_roi_align", tensor),
    }
    return {name: "native" if covered else "torchvision" for name, covered in native.items()}


def check_deform_conv2d(device: str) -> float:
    """Largest difference from torchvision, value and gradients, relative to the largest value."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 20, 9, 13), (2, 18, 9, 13), (17, 20, 3, 3))
    tensors = [torch.randn(shape, generator=draw).to(device).requires_grad_() for shape in shapes]

    def run(operator: object) -> list[Tensor]:
        output = operator(*tensors, padding=1)  # type: ignore[operator]
        return [output.detach(), *torch.autograd.grad(output.square().sum(), tensors)]

    pairs = zip(run(deform_conv2d), run(torchvision.ops.deform_conv2d), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def check_nms(device: str) -> float:
    """Number of boxes on which we and torchvision differ."""
    draw = torch.Generator().manual_seed(0)
    corner, side = (torch.rand(500, 2, generator=draw) * size for size in (60, 40))
    boxes, scores = torch.cat([corner, corner + side], 1).to(device), torch.rand(500, generator=draw).to(device)
    groups = torch.zeros(500, dtype=torch.int64, device=device)
    ours, theirs = batched_nms(boxes, scores, groups, 0.5), torchvision.ops.nms(boxes, scores, 0.5)
    return float(len(set(ours.tolist()) ^ set(theirs.tolist())))


def check_count_overlaps() -> int:
    """Number of overlaps of two random maps in which we and a plain sort differ."""
    first, second = np.random.default_rng(0).integers(-3, 4, (2, 50, 70), dtype=np.int32).repeat(5, axis=2)
    pairs, pixels = np.unique(np.stack([first.ravel(), second.ravel()]), axis=1, return_counts=True)
    expected = dict(zip(zip(*pairs.tolist(), strict=True), pixels.tolist(), strict=True))
    return len(count_overlaps(first, second)[0].items() ^ expected.items())


def main() -> int:
    """Prints the report; 0 if every operator agrees with torchvision, and the counting with numpy."""
    print(describe())
    print(library.describe_counting())
    wrong, path = check_count_overlaps(), "native" if library.count_overlaps else "numpy"
    print(f"{'cpu':5s} {'count_overlaps':18s} {path:12s} differs from a plain sort in {wrong} overlaps")
    agree = wrong == 0
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        differences = {"deform_conv2d": check_deform_conv2d(device), "nms": check_nms(device)}
        for name, path in paths(device).items():
            difference = differences.get(name, 0.0)
            agree = agree and difference < TOLERANCE
            note = f"differs from torchvision by {difference:.1e}" if name in differences else ""
            print(f"{device:5s} {name:18s} {path:12s} {note}".rstrip())
    print("self-check passed" if agree else "self-check FAILED: build again, or set UPSNET_NATIVE=0")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
