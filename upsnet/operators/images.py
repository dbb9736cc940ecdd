"""The two memory formats of image batches: contiguous (NCHW) and channels last (NHWC), as lib/native/shared/images.h
tells them apart."""

from collections.abc import Sequence

import torch
from torch import Tensor


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a batch N×C×H×W is channels last, and not contiguous as well, which one channel or one pixel makes it."""
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def empty_images(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory for a batch N×C×H×W in the dtype, on the device and in the memory format of another."""
    memory_format = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=memory_format)
