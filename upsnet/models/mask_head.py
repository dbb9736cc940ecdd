"""Mask head (Mask R-CNN, figure 4 right): a 28×28 mask for each class and RoI."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upsnet.models.layers import ConvBlock, NormKind, zero_bias
from upsnet.operators import pyramid_roi_align


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
        hidden = F.relu(self.deconv(self.convs(pyramid_roi_align(levels, rois, self.pooled_size))))
        # Only one of the C channels is asked for: apply its row of the 1×1 score layer alone.
        weight = self.score.weight[:, :, 0, 0].to(hidden.dtype)[classes]
        logits = torch.einsum("rchw,rc->rhw", hidden, weight).float()
        assert self.score.bias is not None
        return logits + self.score.bias[classes, None, None]


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
