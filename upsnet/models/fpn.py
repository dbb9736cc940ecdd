"""Feature pyramid network (Lin et al. 2017) with UPSNet's global-average branch."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from upsnet.models.layers import NormKind, convolve, make_norm, zero_bias


class FPN(nn.Module):
    """(C2, C3, C4, C5) → [P2, P3, P4, P5, P6] with `channels` channels at strides 4, 8, 16, 32, 64.

    Args:
        in_channels: channels of C2..C5.
        global_average: adds a linear map of the mean of C5, over the padded map, to the lateral of P5 (UPSNet, 3.1).
        upsample: how the top-down path enlarges.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 256,
        global_average: bool = False,
        upsample: Literal["nearest", "bilinear"] = "nearest",
        norm: NormKind = "none",
    ) -> None:
        super().__init__()
        self.channels = channels
        self.upsample = upsample
        self.lateral = nn.ModuleList(_ConvNorm(c, channels, 1, norm) for c in in_channels)
        self.output = nn.ModuleList(_ConvNorm(channels, channels, 3, norm) for _ in in_channels)
        self.global_average = nn.Linear(in_channels[-1], channels) if global_average else None

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        top = self.lateral[-1](features[-1])
        if self.global_average is not None:
            top = top + self.global_average(features[-1].mean(dim=(2, 3)))[:, :, None, None]
        laterals = [top]  # from P5 down to P2
        for lateral, feature in zip(self.lateral[-2::-1], features[-2::-1], strict=True):
            laterals.append(lateral(feature, add=self._enlarge(laterals[-1], feature)))
        levels = [output(lateral) for output, lateral in zip(self.output, reversed(laterals), strict=True)]
        return [*levels, F.max_pool2d(levels[-1], 1, stride=2)]

    def _enlarge(self, top: Tensor, like: Tensor) -> Tensor:
        if self.upsample == "nearest":
            return F.interpolate(top, size=like.shape[-2:], mode="nearest")
        return F.interpolate(top, size=like.shape[-2:], mode="bilinear", align_corners=False)


class _ConvNorm(nn.Module):
    """A convolution that keeps the size, and normalisation."""

    def __init__(self, in_channels: int, out_channels: int, size: int, norm: NormKind) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, size, padding=size // 2)
        self.norm = make_norm(norm, out_channels)
        nn.init.kaiming_uniform_(self.conv.weight, a=1)
        zero_bias(self.conv)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return convolve(self.conv, self.norm, x, add, relu=False)
