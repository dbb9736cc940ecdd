"""ResNet (He et al., table 1), with the options that UPSNet's backbone has: frozen stages, deformable stages, the
stride in the first 1×1 convolution of a block (as in the caffe release) or in its 3×3 (as in torchvision)."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from upsnet.models.layers import DeformConv2d, NormKind, convolve, make_norm


@dataclass(frozen=True)
class ResNetDepth:
    """Blocks in res2..res5 and whether they are bottlenecks."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool


DEPTHS = {
    18: ResNetDepth((2, 2, 2, 2), bottleneck=False),
    34: ResNetDepth((3, 4, 6, 3), bottleneck=False),
    50: ResNetDepth((3, 4, 6, 3), bottleneck=True),
    101: ResNetDepth((3, 4, 23, 3), bottleneck=True),
}


class Stem(nn.Module):
    """7×7 convolution and max pooling: stride 4."""

    def __init__(self, in_channels: int, out_channels: int, norm: NormKind) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 7, stride=2, padding=3, bias=False)
        self.norm = make_norm(norm, out_channels)

    def forward(self, image: Tensor) -> Tensor:
        return F.max_pool2d(convolve(self.conv, self.norm, image), 3, stride=2, padding=1)


class Downsample(nn.Module):
    """The 1×1 projection of a shortcut whose shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: NormKind) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
        self.norm = make_norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self.conv, self.norm, x, relu=False)


def _conv3x3(channels_in: int, channels_out: int, stride: int, deformable: bool) -> nn.Module:
    if deformable:
        return DeformConv2d(channels_in, channels_out, 3, stride, bias=False)
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions; the second can be deformable."""

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int,
        norm: NormKind,
        deformable: bool,
        stride_in_1x1: bool,
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, planes, stride, deformable=False)
        self.norm1 = make_norm(norm, planes)
        self.conv2 = _conv3x3(planes, planes, 1, deformable)
        self.norm2 = make_norm(norm, planes)
        self.downsample = (
            Downsample(in_channels, planes, stride, norm) if stride != 1 or in_channels != planes else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = convolve(self.conv1, self.norm1, x)
        return convolve(self.conv2, self.norm2, y, add=self.downsample(x))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions; the 3×3 can be deformable."""

    expansion: ClassVar[int] = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int,
        norm: NormKind,
        deformable: bool,
        stride_in_1x1: bool,
    ) -> None:
        super().__init__()
        out_channels = planes * self.expansion
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, planes, 1, stride=first, bias=False)
        self.norm1 = make_norm(norm, planes)
        self.conv2 = _conv3x3(planes, planes, second, deformable)
        self.norm2 = make_norm(norm, planes)
        self.conv3 = nn.Conv2d(planes, out_channels, 1, bias=False)
        self.norm3 = make_norm(norm, out_channels)
        self.downsample = (
            Downsample(in_channels, out_channels, stride, norm)
            if stride != 1 or in_channels != out_channels
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = convolve(self.conv1, self.norm1, x)
        y = convolve(self.conv2, self.norm2, y)
        return convolve(self.conv3, self.norm3, y, add=self.downsample(x))


class ResNet(nn.Module):
    """The body of a ResNet: image → (C2, C3, C4, C5) at strides 4, 8, 16, 32.

    Args:
        depth: 18, 34, 50 or 101.
        norm: "frozen_batch_norm" for pretrained weights, "batch_norm" or "group_norm" to train from scratch.
        stride_in_1x1: bottlenecks halve the map in their first 1×1 convolution; False: in the 3×3. Without
            meaning for depths 18 and 34, whose blocks have no 1×1 convolution.
        freeze_at: 0 trains everything, 1 freezes the stem, n ≥ 2 the stem and res2..resn.
        deformable_from: blocks of every stage with this number or a greater one are deformable; more than 5: none.
        deformable_last: the last blocks of res3 and res4 are deformable.
        checkpointing: in training only the input of each trained block is kept for the backward pass, which computes
            the block anew (Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost); the results are the same.
    """

    def __init__(
        self,
        depth: int,
        norm: NormKind = "frozen_batch_norm",
        stride_in_1x1: bool = True,
        freeze_at: int = 2,
        deformable_from: int = 100,
        deformable_last: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        shape = DEPTHS[depth]
        self.freeze_at, self.checkpointing = freeze_at, checkpointing
        self.stem = Stem(3, 64, norm)
        channels = 64
        self.out_channels: list[int] = []
        for i, blocks in enumerate(shape.blocks):
            number = i + 2
            stage = _make_stage(
                channels,
                64 * 2**i,
                stride=1 if number == 2 else 2,
                norm=norm,
                bottleneck=shape.bottleneck,
                deformable=[
                    number >= deformable_from or (deformable_last and number in (3, 4) and block == blocks - 1)
                    for block in range(blocks)
                ],
                stride_in_1x1=stride_in_1x1,
            )
            channels = 64 * 2**i * (Bottleneck.expansion if shape.bottleneck else 1)
            self.out_channels.append(channels)
            self.add_module(f"res{number}", stage)
        self._initialise()
        for part in self._frozen_parts():
            part.requires_grad_(False)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _frozen_parts(self) -> list[nn.Module]:
        stages = [self.get_submodule(f"res{number}") for number in range(2, min(self.freeze_at, 5) + 1)]
        return [self.stem, *stages] if self.freeze_at >= 1 else []

    def train(self, mode: bool = True) -> "ResNet":
        """Training mode, except for frozen parts: their statistics must not move."""
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        return self

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.stem(image)
        if self.freeze_at >= 1:
            x = x.detach()
        features = []
        for number in range(2, 6):
            stage = self.get_submodule(f"res{number}")
            if self.checkpointing and number > self.freeze_at and self.training and torch.is_grad_enabled():
                for block in stage.children():
                    x = _checkpointed(block, x)
            else:
                x = stage(x)
            if number <= self.freeze_at:
                x = x.detach()
            features.append(x)
        return features


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """block(x), of which only x is kept."""

    def contexts() -> tuple[nullcontext[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_set_aside(block)

    # A block draws nothing, so there is no generator to put back.
    result = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    assert isinstance(result, Tensor)
    return result


@contextmanager
def _statistics_set_aside(block: nn.Module) -> Iterator[None]:
    """Running statistics do not move inside: a block that is computed anew has moved them already."""
    own = [
        (norm, name, buffer)
        for norm in block.modules()
        if isinstance(norm, _BatchNorm)
        for name, buffer in norm.named_buffers(recurse=False)
    ]
    for norm, name, buffer in own:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in own:
            setattr(norm, name, buffer)


def _make_stage(
    in_channels: int,
    planes: int,
    stride: int,
    norm: NormKind,
    bottleneck: bool,
    deformable: Sequence[bool],
    stride_in_1x1: bool,
) -> nn.Sequential:
    block = Bottleneck if bottleneck else BasicBlock
    layers: list[nn.Module] = []
    for i, deform in enumerate(deformable):
        layers.append(block(in_channels, planes, stride if i == 0 else 1, norm, deform, stride_in_1x1))
        in_channels = planes * block.expansion
    return nn.Sequential(*layers)
