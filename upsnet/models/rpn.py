"""Region proposal network (Faster R-CNN, section 3.1) over the levels of a feature pyramid."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upsnet.models.anchors import base_anchors, grid_anchors
from upsnet.models.boxes import clip, decode, widths_heights
from upsnet.models.layers import convolve, smooth_l1, zero_bias
from upsnet.models.matching import IGNORED, AnchorSampling, match_anchors
from upsnet.operators import nms_flags
from upsnet.structures.draws import Draws

SIGMA = 3.0
"""Corner of the smooth L1 loss of the anchors."""


@dataclass(frozen=True)
class ProposalOptions:
    """How raw anchors become proposals; each level is suppressed on its own.

    pre_nms, post_nms: how many boxes enter and leave the suppression of a level; post_nms also bounds them all.
    min_size: proposals with a smaller side, in pixels of the original photo, are dropped.
    """

    nms_threshold: float = 0.7
    pre_nms: int = 1000
    post_nms: int = 1000
    min_size: float = 0.0


@dataclass(frozen=True, slots=True)
class RPNOutput:
    """logits: for each level B×A×h×w. deltas: for each level B×4A×h×w, channel 4·anchor + coordinate. anchors: for
    each level (h·w·A)×4."""

    logits: list[Tensor]
    deltas: list[Tensor]
    anchors: list[Tensor]

    def of_image(self, image: int) -> tuple[list[Tensor], list[Tensor]]:
        """Per level: N logits and N×4 deltas of one image, in the order of the anchors."""
        logits = [level[image].permute(1, 2, 0).reshape(-1) for level in self.logits]
        deltas = [level[image].permute(1, 2, 0).reshape(-1, 4) for level in self.deltas]
        return logits, deltas


class RPN(nn.Module):
    """The head, shared by all levels."""

    def __init__(
        self,
        channels: int,
        strides: Sequence[int] = (4, 8, 16, 32, 64),
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        scales: Sequence[float] = (8.0,),
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        for stride in self.strides:
            # Derived from the arguments, so not part of the weights.
            self.register_buffer(f"base_anchors_{stride}", base_anchors(stride, ratios, scales), persistent=False)
        num_anchors = len(ratios) * len(scales)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, num_anchors, 1)
        self.deltas = nn.Conv2d(channels, 4 * num_anchors, 1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            zero_bias(layer)

    def forward(self, levels: Sequence[Tensor]) -> RPNOutput:
        hidden = [convolve(self.conv, None, level) for level in levels]
        anchors = [
            grid_anchors(self.get_buffer(f"base_anchors_{stride}"), level.shape[-2], level.shape[-1], stride)
            for stride, level in zip(self.strides, levels, strict=True)
        ]
        # Scores and boxes leave autocast here: proposals and losses are formed in float32.
        logits = [self.objectness(h).float() for h in hidden]
        deltas = [self.deltas(h).float() for h in hidden]
        return RPNOutput(logits, deltas, anchors)


@dataclass(frozen=True, slots=True)
class Proposals:
    """Of a batch, of a size that does not depend on what was found, so that nothing has to be asked of the device.

    boxes: B×P×4 at network scale. scores: B×P, 0..1, descending. valid: B×P bool; those that are not stand last, as
    zeros. P is the smaller one of `post_nms` and the number of boxes that enter the suppression.
    """

    boxes: Tensor
    scores: Tensor
    valid: Tensor

    def trimmed(self) -> list[Tensor]:
        """N×4 boxes of each image without padding; waits for the device once."""
        counts = self.valid.sum(dim=1).tolist()
        return [boxes[:count] for boxes, count in zip(self.boxes, counts, strict=True)]


@torch.no_grad()
def propose(
    output: RPNOutput, sizes: Sequence[tuple[int, int]], scales: Sequence[float], options: ProposalOptions
) -> Proposals:
    """Proposals of a batch: of each level the best anchors, moved; all levels and images suppressed in one go.

    Args:
        sizes: for each image height and width without padding; boxes are cut to it.
        scales: network pixels per photo pixel, for `min_size`.
    """
    scores, groups, moved = _best_of_levels(output, options.pre_nms)
    boxes = torch.stack([clip(of_image, size) for of_image, size in zip(moved, sizes, strict=True)])
    valid = None
    if options.min_size > 0:
        sides = torch.minimum(*widths_heights(boxes))
        limits = [options.min_size * scale for scale in scales]
        valid = torch.stack([side >= limit for side, limit in zip(sides, limits, strict=True)]).flatten()
    kept = nms_flags(boxes.flatten(0, 1), options.nms_threshold, groups.flatten(), valid, inclusive=True)
    kept = kept.view_as(scores)
    scores, order = torch.where(kept, scores, -1).sort(dim=1, descending=True, stable=True)
    order = order[:, : options.post_nms]
    valid = kept.gather(1, order)
    boxes = boxes.gather(1, order[:, :, None].expand(-1, -1, 4))
    return Proposals(
        torch.where(valid[:, :, None], boxes, 0), torch.where(valid, scores[:, : options.post_nms], 0), valid
    )


def _best_of_levels(output: RPNOutput, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` best anchors of each level, moved: B×K scores, each level's descending; B×K numbers of image and
    level; B×K×4 boxes."""
    scores, groups, deltas, anchors = [], [], [], []
    levels = zip(output.logits, output.deltas, output.anchors, strict=True)
    for level, (level_logits, level_deltas, level_anchors) in enumerate(levels):
        images, kinds, _, width = level_logits.shape
        # Ranked as logits: a sigmoid rounds neighbours to ties, which rounding errors would then decide.
        best_logits, best = _by_anchor(level_logits).topk(min(count, len(level_anchors)))
        cell, image = best // kinds, torch.arange(images, device=best.device)[:, None]
        # One image at a time: CPUs round the last elements of a tensor otherwise, and no score may hang on its batch.
        scores.append(torch.stack([of_image.sigmoid() for of_image in best_logits]))
        groups.append((image * len(output.logits) + level).expand_as(best))
        deltas.append(level_deltas.unflatten(1, (kinds, 4))[image, best % kinds, :, cell // width, cell % width])
        anchors.append(level_anchors[best])
    boxes = decode(torch.cat(anchors, dim=1), torch.cat(deltas, dim=1))
    return torch.cat(scores, dim=1), torch.cat(groups, dim=1), boxes


def _by_anchor(logits: Tensor) -> Tensor:
    """B×A×h×w → B×(h·w·A), the order of the anchors."""
    return logits.permute(0, 2, 3, 1).flatten(1)


def rpn_losses(
    output: RPNOutput,
    truth: Sequence[Tensor],
    crowds: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    options: AnchorSampling,
    draws: Sequence[Draws],
) -> tuple[Tensor, Tensor]:
    """Classification and box loss, means over the images.

    Classification: sigmoid cross-entropy summed over the sampled anchors and divided by the constant
    `options.batch_size`. Box: smooth L1 summed over positives and divided by the number of sampled anchors.

    Args:
        truth: for each image G×4 boxes that are not crowds; crowds: K×4 boxes that are. At network scale.
        sizes: for each image height and width without padding.
    """
    anchors = torch.cat(output.anchors)
    class_losses, box_losses = [], []
    for image, given in enumerate(zip(truth, crowds, sizes, draws, strict=True)):
        boxes, crowd_boxes, size, image_draws = given
        labels, targets = match_anchors(anchors, boxes, crowd_boxes, size, options, image_draws)
        logits, deltas = (torch.cat(parts) for parts in output.of_image(image))
        # Sums over all anchors with most terms 0: how many are sampled, only the device knows.
        sampled, positive = labels != IGNORED, labels == 1
        class_loss = F.binary_cross_entropy_with_logits(logits, labels.float(), sampled.float(), reduction="sum")
        class_losses.append(class_loss / options.batch_size)
        box_loss = smooth_l1((deltas - targets).masked_fill(~positive[:, None], 0), SIGMA).sum()
        box_losses.append(box_loss / sampled.sum().clamp(min=1))
    return torch.stack(class_losses).mean(), torch.stack(box_losses).mean()
