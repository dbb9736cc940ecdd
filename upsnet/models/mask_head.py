"""Mask head (Mask R-CNN, figure 4 right): a 28×28 mask for each class and RoI."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upsnet.models.layers import ConvBlock, FusedConv, NormKind, zero_bias
from upsnet.operators import pyramid_roi_align

CHUNK = 32
"""RoIs that are computed together at test time on a CPU: what lies between two layers then stays in its cache."""


class MaskHead(nn.Module):
    """RoIs and their classes → mask logits R×mask_size×mask_size of the RoI's own class.

    Args:
        num_classes: C; channel 0 of the score layer, the background, is never used.
        width: channels of the four convolutions.
        mask_size: side of the masks, twice the side of the pooled features.
    """

    def __init__(
        self, in_channels: int, num_classes: int, width: int = 256, mask_size: int = 28, norm: NormKind = "none"
    ) -> None:
        super().__init__()
        self.pooled_size = mask_size // 2
        self.convs = nn.Sequential(*(ConvBlock(in_channels if i == 0 else width, width, norm) for i in range(4)))
        self.deconv = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.score = nn.Conv2d(width, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                zero_bias(module)

    def forward(self, levels: Sequence[Tensor], rois: Tensor, classes: Tensor) -> Tensor:
        """levels: P2..P5. rois: R×5 (image, box at network scale). classes: R, 1..C-1."""
        pooled = pyramid_roi_align(levels, rois, self.pooled_size)
        chunk = len(pooled) if self.training or pooled.device.type != "cpu" else CHUNK
        parts = zip(pooled.split(max(chunk, 1)), classes.split(max(chunk, 1)), strict=True)
        return torch.cat([self._logits(*part) for part in parts])

    def _logits(self, pooled: Tensor, classes: Tensor) -> Tensor:
        hidden = self.convs(pooled)
        if isinstance(self.deconv, FusedConv):
            cells = self.deconv(hidden, relu=True)
        else:
            cells = F.relu(F.conv2d(hidden, *cells_of(self.deconv)), inplace=True)
        rois, _, height, width = cells.shape
        # Only one of the C channels is asked for: apply its row of the 1×1 score layer alone.
        row = self.score.weight[:, :, 0, 0].to(cells.dtype)[classes]
        cells = cells.permute(0, 2, 3, 1).reshape(rois, height * width * 4, row.shape[1])
        logits = torch.bmm(cells, row[:, :, None]).float().view(rois, height, width, 2, 2)
        assert self.score.bias is not None
        return logits.transpose(2, 3).reshape(rois, 2 * height, 2 * width) + self.score.bias[classes, None, None]


def cells_of(deconv: nn.ConvTranspose2d) -> tuple[Tensor, Tensor | None]:
    """A 2×2 transposed convolution with stride 2, whose patches do not overlap, as an ordinary 1×1 convolution.

    Returns:
        weight (4·O, I, 1, 1) and bias (4·O,): all outputs of the upper left cell, the upper right, the lower ones.
    """
    weight = deconv.weight.permute(2, 3, 1, 0).reshape(-1, deconv.in_channels, 1, 1)
    return weight, None if deconv.bias is None else deconv.bias.repeat(4)


def mask_loss(logits: Tensor, targets: Tensor, counts: Sequence[int]) -> Tensor:
    """Sigmoid cross-entropy: mean over the pixels of an image's RoIs, then over the images.

    Args:
        logits, targets: R×M×M, the RoIs of all images one after another.
        counts: RoIs of each image; an image without one has loss 0.
    """
    losses = []
    for image_logits, image_targets in zip(logits.split(list(counts)), targets.split(list(counts)), strict=True):
        total = F.binary_cross_entropy_with_logits(image_logits, image_targets, reduction="sum")
        losses.append(total / (image_targets.numel() + 1e-10))
    return torch.stack(losses).mean()
