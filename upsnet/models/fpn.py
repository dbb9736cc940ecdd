"""Feature pyramid network (Lin et al. 2017) with UPSNet's global-average branch."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from upsnet.models.layers import NormKind, make_norm, zero_bias


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
        self.lateral = nn.ModuleList(_conv(c, channels, 1, norm) for c in in_channels)
        self.output = nn.ModuleList(_conv(channels, channels, 3, norm) for _ in in_channels)
        self.global_average = nn.Linear(in_channels[-1], channels) if global_average else None

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        laterals = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        if self.global_average is not None:
            laterals[-1] = laterals[-1] + self.global_average(features[-1].mean(dim=(2, 3)))[:, :, None, None]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + self._enlarge(laterals[i], laterals[i - 1])
        levels = [output(lateral) for output, lateral in zip(self.output, laterals, strict=True)]
        return [*levels, F.max_pool2d(levels[-1], 1, stride=2)]

    def _enlarge(self, top: Tensor, like: Tensor) -> Tensor:
        if self.upsample == "nearest":
            return F.interpolate(top, size=like.shape[-2:], mode="nearest")
        return F.interpolate(top, size=like.shape[-2:], mode="bilinear", align_corners=False)


def _conv(in_channels: int, out_channels: int, size: int, norm: NormKind) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, size, padding=size // 2)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    zero_bias(conv)
    return nn.Sequential(OrderedDict(conv=conv, norm=make_norm(norm, out_channels)))
