"""RoIAlign (Mask R-CNN, section 3) over the levels of a feature pyramid: native where covered, else torchvision's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import roi_align

from upsnet.operators import library
from upsnet.operators.images import empty_images

CANONICAL_SIZE = 224.0
"""Side of a box, in network pixels, that is pooled from level 4 (FPN, eq. 1)."""
FINEST_STRIDE = 4
SAMPLES = 2
NO_LEVEL = -1


def roi_levels(boxes: Tensor, num_levels: int = 4) -> Tensor:
    """Level 0..num_levels-1 (P2, P3, …) of N×4 inclusive boxes at network scale (FPN, eq. 1 with k0 = 4)."""
    side = torch.sqrt((boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1))
    # The small term stands inside the logarithm: so the released weights were trained.
    return torch.floor(2 + torch.log2(side / CANONICAL_SIZE + 1e-6)).clamp(0, num_levels - 1).long()


def pyramid_roi_align(features: Sequence[Tensor], rois: Tensor, output_size: int, aligned: bool = False) -> Tensor:
    """Pools every RoI from the level that fits its size.

    The mean of 2×2 bilinear samples a bin; a sample more than a pixel beyond the border counts as 0. Features keep
    their dtype under autocast, and half precision is summed in float32. Gradients go to the features alone; on the CPU
    they are bitwise the same for any number of threads, on CUDA, where threads add as they come, not from run to run.

    Args:
        features: levels B×C×H×W at strides 4, 8, 16, …, of one dtype; channels-last is the fast memory format.
        rois: R×5 (image index, x1, y1, x2, y2) at network scale, float32. A box with a coordinate that is infinite or
            not a number gives 0.
        output_size: side of the pooled squares.
        aligned: pixel centres lie at halves, as with torchvision's option. Without it they lie at whole numbers, and a
            box is at least one pixel of its level long: the convention of the original.

    Returns:
        R×C×output_size×output_size in the order of the RoIs, in the features' dtype, and channels-last if the first
        level is.

    Raises:
        ValueError: a shape or dtype that does not fit, by the tensor's name.
        RuntimeError: on the CPU, a RoI of an image that is not there; on CUDA, where nobody waits to look, it gives 0.
    """
    _check(features, rois, output_size)
    # The eight bits of bfloat16 would move a box at 1000 pixels by up to 4.
    rois = rois.to(torch.promote_types(features[0].dtype, torch.float32))
    levels = roi_levels(rois[:, 1:], len(features)).masked_fill(~rois.isfinite().all(dim=1), NO_LEVEL)
    scales = [1 / (FINEST_STRIDE * 2**level) for level in range(len(features))]
    if library.covers("pyramid_roi_align", *features):
        result: Tensor = torch.ops.upsnet.pyramid_roi_align(features, rois, levels, scales, output_size, aligned)
        return result
    return _level_by_level(features, rois, levels, scales, output_size, aligned)


def _level_by_level(
    features: Sequence[Tensor], rois: Tensor, levels: Tensor, scales: list[float], output_size: int, aligned: bool
) -> Tensor:
    """The fallback: torchvision's operator on each level's boxes."""
    of_image = (rois[:, 0] >= 0) & (rois[:, 0] < features[0].shape[0])
    if rois.device.type == "cpu" and not of_image.all():
        raise RuntimeError(f"pyramid_roi_align: rois name an image that is not among {features[0].shape[0]}")
    levels = levels.masked_fill(~of_image, NO_LEVEL)
    pooled = _pooled(features, rois, output_size).zero_()
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        members = torch.nonzero(levels == level).flatten()
        part = roi_align(feature.to(rois.dtype), rois[members], output_size, scale, SAMPLES, aligned)
        pooled.index_copy_(0, members, part.to(pooled.dtype))
    return pooled


def _pooled(features: Sequence[Tensor], rois: Tensor, output_size: int) -> Tensor:
    """The result's memory."""
    return empty_images(features[0], (rois.shape[0], features[0].shape[1], output_size, output_size))


def _check(features: Sequence[Tensor], rois: Tensor, output_size: int) -> None:
    if output_size < 1 or len(features) == 0:
        raise ValueError(f"pyramid_roi_align: output_size {output_size} and the number of levels must be positive")
    for level, feature in enumerate(features):
        if feature.dim() != 4 or feature.shape[:2] != features[0].shape[:2]:
            raise ValueError(
                f"pyramid_roi_align: features[{level}] has shape {tuple(feature.shape)}, four dimensions and the "
                "images and channels of features[0] are expected"
            )
        if 0 in feature.shape[2:]:
            raise ValueError(f"pyramid_roi_align: features[{level}] has shape {tuple(feature.shape)}, without a pixel")
        if feature.dtype != features[0].dtype:
            raise ValueError(f"pyramid_roi_align: features[{level}] is {feature.dtype}, not {features[0].dtype}")
    if rois.dim() != 2 or rois.shape[1] != 5:
        raise ValueError(f"pyramid_roi_align: rois has shape {tuple(rois.shape)}, (R, 5) is expected")


# -- what torch is to know about the native operator -------------------------------------------------------------------


def _shape(
    features: Sequence[Tensor], rois: Tensor, levels: Tensor, scales: list[float], output_size: int, aligned: bool
) -> Tensor:
    return _pooled(features, rois, output_size)


def _shape_of_gradients(
    grad: Tensor, features: Sequence[Tensor], rois: Tensor, levels: Tensor, scales: list[float], aligned: bool
) -> list[Tensor]:
    return [empty_images(feature, feature.shape) for feature in features]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, rois, levels, ctx.scales, _, ctx.aligned = inputs
    ctx.save_for_backward(rois, levels, *features)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rois, levels, *features = ctx.saved_tensors
    gradients = torch.ops.upsnet.pyramid_roi_align_backward(grad, features, rois, levels, ctx.scales, ctx.aligned)
    return gradients, None, None, None, None, None


def _in_autocast(dtype: torch.dtype, features: Sequence[Tensor], rois: Tensor, *others: Any) -> tuple[Any, ...]:
    return features, rois.to(torch.promote_types(features[0].dtype, torch.float32)), *others


library.register("pyramid_roi_align", _shape, _gradient, _save_for_backward, _in_autocast)
library.register("pyramid_roi_align_backward", _shape_of_gradients, library.differentiated_once)
