"""Layers that several parts of the network share."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upsnet.operators import deform_conv2d, fast_linear, fused_conv2d

NormKind = Literal["none", "group_norm", "batch_norm", "frozen_batch_norm"]


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with the stored statistics, in training too; weight and bias get no gradient."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def zero_bias(*layers: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> None:
    """Sets the biases of layers that have one to 0."""
    for layer in layers:
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def make_norm(kind: NormKind, channels: int) -> nn.Module:
    """The normalisation of this kind; "none" is the identity, group norm has 32 groups (Group Normalization, 4.1)."""
    if kind == "none":
        return nn.Identity()
    if kind == "group_norm":
        return nn.GroupNorm(32, channels)
    if kind == "batch_norm":
        return nn.BatchNorm2d(channels)
    return FrozenBatchNorm2d(channels)


class DeformConv2d(nn.Module):
    """Deformable convolution (Deformable ConvNets, section 2.1): a plain convolution predicts an offset for each tap.

    The main weight bears the name of an ordinary convolution's, so ordinary weights load into it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.stride, self.padding = stride, kernel_size // 2
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.offset = nn.Conv2d(in_channels, 2 * kernel_size**2, kernel_size, stride=stride, padding=self.padding)
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        nn.init.zeros_(self.offset.weight)
        zero_bias(self.offset)

    def forward(self, input: Tensor) -> Tensor:
        # In half precision the offsets are rounded, relative to their own size; the places that they are added to are
        # not. Offsets from a convolution in float32 would cost a quarter of the time and halve a small error.
        return deform_conv2d(input, self.offset(input), self.weight, self.bias, self.stride, self.padding)


class FusedConv(nn.Module):
    """A convolution of a network that only predicts (`models/inference.py`): it takes what follows it along."""

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]) -> None:
        super().__init__()
        self.stride, self.padding = stride, padding
        self.weight = constant(weight.contiguous(memory_format=torch.channels_last))
        self.bias = None if bias is None else constant(bias.to(weight.dtype))

    def forward(self, input: Tensor, add: Tensor | None = None, relu: bool = False) -> Tensor:
        return fused_conv2d(input, self.weight, self.bias, self.stride, self.padding, relu, add)


class FusedLinear(nn.Module):
    """A linear layer of such a network. It takes vectors R×K, or maps R×C×h×w with its weights in the order h, w, C:
    so channels-last maps lie."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = constant(weight)
        self.bias = None if bias is None else constant(bias.to(weight.dtype))

    def forward(self, input: Tensor) -> Tensor:
        rows = input.permute(0, 2, 3, 1).flatten(1) if input.dim() == 4 else input
        return fast_linear(rows, self.weight, self.bias)


def constant(tensor: Tensor) -> nn.Parameter:
    """A parameter that does not learn."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def convolve(
    conv: nn.Module, norm: nn.Module | None, input: Tensor, add: Tensor | None = None, relu: bool = True
) -> Tensor:
    """norm(conv(input)) + add, through a ReLU; at once where `conv` can. Nobody may need `add` any more."""
    if isinstance(conv, FusedConv) and (norm is None or isinstance(norm, nn.Identity)):
        return conv(input, add, relu)
    result = conv(input) if norm is None else norm(conv(input))
    if add is not None:
        result = result + add
    return F.relu(result, inplace=True) if relu else result


class ConvBlock(nn.Module):
    """3×3 convolution, plain or deformable, normalisation, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, norm: NormKind = "none", deformable: bool = False) -> None:
        super().__init__()
        self.conv: nn.Module = (
            DeformConv2d(in_channels, out_channels)
            if deformable
            else nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.norm = make_norm(norm, out_channels)

    def forward(self, input: Tensor) -> Tensor:
        return convolve(self.conv, self.norm, input)


def smooth_l1(difference: Tensor, sigma: float) -> Tensor:
    """Smooth L1 (Fast R-CNN, eq. 3) with its corner at 1/sigma²: 0.5 σ² d² below, |d| - 0.5/σ² above."""
    corner = 1.0 / sigma**2
    size = difference.abs()
    return torch.where(size < corner, 0.5 * sigma**2 * difference**2, size - 0.5 * corner)
