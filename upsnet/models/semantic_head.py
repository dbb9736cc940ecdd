"""Semantic head of UPSNet (section 3.2): deformable convolutions shared by P2..P5, then one linear classifier."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upsnet.models.layers import ConvBlock, NormKind, zero_bias
from upsnet.operators import pyramid_roi_align
from upsnet.structures.sample import VOID

ROI_SIZE = 28
BAND, CUDA_BAND = 8, 64
"""Rows of scores that the loss enlarges at a time: on a CPU so few that they stay in its cache."""


class SemanticHead(nn.Module):
    """P2..P5 → class scores B×S×h×w at stride 4.

    The classifier is a 1×1 convolution over the four levels, enlarged to P2 and concatenated. It commutes with
    bilinear enlargement, so each level is scored at its own size and the enlarged scores are added: the concatenated
    map never exists.

    Args:
        num_classes: S.
        width: channels of the last two layers; earlier ones keep `in_channels`.
        num_layers: deformable layers, at least 1.
    """

    def __init__(
        self, in_channels: int, num_classes: int, width: int = 128, num_layers: int = 3, norm: NormKind = "none"
    ) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential()
        for i in range(num_layers):
            out_channels = width if i >= num_layers - 2 else in_channels
            self.layers.append(ConvBlock(in_channels, out_channels, norm, deformable=True))
            in_channels = out_channels
        self.score = nn.Conv2d(4 * width, num_classes, 1)
        nn.init.normal_(self.score.weight, std=0.01)
        zero_bias(self.score)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        size = levels[0].shape[-2:]
        scores = None
        for i, level in enumerate(levels):
            x = self.layers(level)
            weight = self.score.weight[:, i * self.width : (i + 1) * self.width]
            score = F.conv2d(x, weight, self.score.bias if i == 0 else None)
            if i > 0:
                score = F.interpolate(score, size=size, mode="bilinear", align_corners=False)
            scores = score if scores is None else scores.add_(score)
        assert scores is not None
        return scores.float()


def semantic_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Softmax cross-entropy at full resolution: mean over the labelled pixels of an image, then over the images.

    Args:
        scores: B×S×h×w at stride 4. target: B×4h×4w semantic ids, VOID where there is none.
    """
    losses = []
    for image_scores, image_target in zip(scores, target, strict=True):
        total = _EnlargedCrossEntropy.apply(image_scores[None], image_target[None])
        losses.append(total / (image_target != VOID).sum().clamp(min=1))
    return torch.stack(losses).mean()


class _EnlargedCrossEntropy(torch.autograd.Function):
    """The sum of the cross-entropy over all pixels of scores enlarged by 4: 1×S×h×w, 1×4h×4w → scalar.

    Band of rows by band, loss and gradient at once: the S×4h×4w map, hundreds of megabytes, never exists.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, target: Tensor) -> Tensor:
        height = scores.shape[2]
        rows = BAND if scores.device.type == "cpu" else CUDA_BAND
        total = scores.new_zeros(())
        gradient = torch.zeros_like(scores, memory_format=torch.contiguous_format)
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            # One row more on either side, where there is one: the enlargement looks at neighbours.
            around = slice(max(start - 1, 0), min(stop + 1, height))
            inner = slice(4 * (start - around.start), 4 * (stop - around.start))
            band = scores[:, :, around].detach().contiguous().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                enlarged = F.interpolate(band, scale_factor=4, mode="bilinear", align_corners=False)[:, :, inner]
                labels = target[:, 4 * start : 4 * stop].long()
                loss = F.cross_entropy(enlarged, labels, ignore_index=VOID, reduction="sum")
            if ctx.needs_input_grad[0]:
                gradient[:, :, around] += torch.autograd.grad(loss, band)[0]
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # asked for by create_graph; the gradient that was kept would pass for a constant
            raise NotImplementedError("the semantic loss cannot be differentiated twice")
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None


def roi_loss(scores: Tensor, bias: Tensor, target: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    """Softmax cross-entropy of 28×28 crops around the things (UPSNet, section 3.2, "RoI loss"), mean over the images.

    Scoring the pooled features equals pooling the scores, since both are linear; only the classifier's bias must stay
    out of the pooling, which gives 0 beyond the border. The mean is over all elements of an image's crops; those
    without a label count as 0.

    Args:
        scores: B×S×h×w at stride 4, bias included. bias: S, the classifier's. target: B×4h×4w semantic ids.
        boxes: for each image G×4 boxes of its things, crowds left out, at network scale.
    """
    bias = bias[:, None, None]
    losses = []
    for image, image_boxes in enumerate(boxes):
        if len(image_boxes) == 0:
            losses.append(scores.sum() * 0.0)
            continue
        crops = pyramid_roi_align([scores[image, None] - bias], F.pad(image_boxes, (1, 0)), ROI_SIZE) + bias
        labels = _crop_labels(target[image], image_boxes)
        losses.append(F.cross_entropy(crops, labels, ignore_index=VOID, reduction="sum") / labels.numel())
    return torch.stack(losses).mean()


def _crop_labels(target: Tensor, boxes: Tensor) -> Tensor:
    """For each of G×4 boxes its labels, the end exclusive, resized to ROI_SIZE by nearest neighbour as OpenCV does."""
    start, end = boxes.round().double().chunk(2, dim=1)
    length = end + (start == end) - start
    # The step is the reciprocal of the enlargement, as OpenCV forms it: the quotient can differ in the last bit (and so
    # can a number divided by a tensor, which torch forms as a product).
    step = (torch.full_like(length, ROI_SIZE) / length).reciprocal()
    cells = torch.arange(ROI_SIZE, device=target.device, dtype=torch.float64)
    places = (start[:, :, None] + (cells * step[:, :, None]).floor()).long()
    columns, rows = (places[:, axis].clamp(0, target.shape[1 - axis] - 1) for axis in (0, 1))
    return target[rows[:, :, None], columns[:, None, :]].long()
