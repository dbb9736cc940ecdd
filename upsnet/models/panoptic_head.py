"""Panoptic head of UPSNet (section 3.3): it has no parameters.

One channel for each stuff class and each instance, and one for "unknown". An instance's channel is the sum of its
semantic logit inside its box (`X_seg`, eq. 1) and its mask logit pasted into its box (`X_mask`); the unknown channel is
what the semantic head sees of things that no instance explains (eq. 2). Training and test differ, as in the
original: training works at stride 4 on ground-truth boxes, a part of which is dropped so that "unknown" has something
to learn; testing works at full resolution and first removes instances that lie behind others of their class.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from upsnet.models.box_head import Candidates
from upsnet.operators.panoptic_head import fuse_panoptic
from upsnet.structures.draws import Draws
from upsnet.structures.sample import VOID

SEMANTIC_STRIDE = 4
"""Network pixels per pixel of the semantic scores."""


# -- training ----------------------------------------------------------------------------------------------------------


def keep_instances(count: int, fraction: float, draws: Draws) -> Tensor:
    """Which of `count` instances take part: max(int(fraction · count), 1) of them, in random order; none of none."""
    kept = max(int(fraction * count), 1) if count else 0
    return draws.first(torch.ones(count, dtype=torch.bool), kept)


def panoptic_logits(
    scores: Tensor, boxes: Tensor, classes: Tensor, mask_logits: Tensor, num_stuff: int, unknown: bool
) -> Tensor:
    """Logits of one image for training: (num_stuff + N + 1)×h×w; the last, unknown, only where asked for.

    Args:
        scores: S×h×w semantic scores at stride 4.
        boxes: N×4 at network scale. classes: N, 1..C-1. mask_logits: N×M×M of each instance's class.
    """
    channels = [scores[:num_stuff]]
    explained = torch.zeros_like(scores[0])
    if len(boxes):
        segments, masks = _planes(scores.index_select(0, num_stuff - 1 + classes), boxes / SEMANTIC_STRIDE, mask_logits)
        channels.append(segments + masks)
        explained = segments.amax(dim=0)
    if unknown:
        channels.append((scores[num_stuff:].amax(dim=0) - explained)[None])
    return torch.cat(channels)


def _planes(scores: Tensor, boxes: Tensor, mask_logits: Tensor) -> tuple[Tensor, Tensor]:
    """What `segment_patch` and `resized_mask` give, for all instances at once and without asking for their places.

    Args:
        scores: N×h×w of each instance's class. boxes: N×4 in pixels of the scores. mask_logits: N×M×M.

    Returns:
        N×h×w semantic logits inside the boxes, and N×h×w mask logits.
    """
    side, device = mask_logits.shape[-1], boxes.device
    covered, weights = [], []
    for axis in (1, 0):
        pixel = torch.arange(scores.shape[2 - axis], device=device)
        start, end = boxes[:, axis, None], boxes[:, axis + 2, None]
        covered.append((pixel >= start.trunc()) & (pixel <= end.round()))
        first, last = start.trunc(), end.trunc()
        # Bilinear enlargement as a product of matrices: hat functions around the place of each pixel among the M. The
        # scale and the place are rounded once each, as `interpolate` does; a number over a tensor is rounded twice.
        length = (last - first + 1).clamp(min=1)
        scale = torch.full_like(length, side) / length
        place = ((pixel - first + 0.5).double() * scale.double() - 0.5).float().clamp(0, side - 1)
        hats = (1 - (place[..., None] - torch.arange(side, device=device)).abs()).clamp(min=0)
        inside = (pixel >= first) & (pixel <= last)
        weights.append((hats * inside[..., None]).to(mask_logits.dtype))
    with torch.autocast(scores.device.type, enabled=False):
        masks = weights[0] @ mask_logits @ weights[1].transpose(1, 2)
    return torch.where(covered[0][:, :, None] & covered[1][:, None], scores, 0.0), masks


def panoptic_target(semantic: Tensor, masks: Tensor, num_stuff: int, unknown: bool) -> Tensor:
    """The channel that each pixel is to have: h×w int64, VOID where the loss is not to look.

    Args:
        semantic: h×w semantic ids at stride 4.
        masks: n×h×w bool of the kept instances, in the order of their channels; later ones overwrite earlier ones.
    """
    # A thing's pixel that no kept mask covers is what "unknown" is for.
    rest = num_stuff + len(masks) if unknown else VOID
    target = torch.where(semantic < num_stuff, semantic.long(), rest)
    if len(masks) == 0:
        return target
    numbers = torch.arange(1, len(masks) + 1, dtype=torch.int16, device=masks.device)
    last = (masks * numbers[:, None, None]).amax(dim=0)  # 0 where there is none
    return torch.where(last > 0, num_stuff - 1 + last, target)


def panoptic_loss(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax cross-entropy of one image and its pixel accuracy.

    The mean is over all pixels, padding included; pixels without a label count as 0. Accuracy: over labelled pixels.
    """
    if len(logits) == 0:  # neither stuff classes nor instances nor unknown: there is nothing to tell apart
        return logits.sum(), logits.detach().sum()
    loss = F.cross_entropy(logits[None], target[None], ignore_index=VOID, reduction="sum") / target.numel()
    labelled = target != VOID
    correct = (logits.detach().argmax(dim=0) == target) & labelled
    return loss, correct.sum() / labelled.sum().clamp(min=1)


# -- test --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PanopticMap:
    """Fused labels of one image at network resolution.

    channels: H×W int16; 0..num_stuff-1 is stuff, num_stuff + i the i-th instance, VOID unknown.
    semantic: H×W int16, arg-max of the semantic scores.
    instances: the instances that were kept, by descending score.
    """

    channels: Tensor
    semantic: Tensor
    instances: Candidates


def fuse(
    scores: Tensor,
    size: tuple[int, int],
    candidates: Candidates,
    mask_logits: Tensor,
    num_stuff: int,
    unknown: bool = True,
) -> PanopticMap:
    """The panoptic map of one image; the host waits for the device once, for the number of instances.

    Args:
        scores: S×h×w semantic scores at any stride.
        size: height and width of the map, those of the network's input.
        candidates: N by descending score at network scale. mask_logits: N×M×M.
    """
    channels, semantic, kept = fuse_panoptic(
        scores, size, candidates.boxes, candidates.classes, mask_logits, num_stuff, unknown
    )
    return PanopticMap(channels, semantic, candidates.select(torch.nonzero(kept).flatten()))
