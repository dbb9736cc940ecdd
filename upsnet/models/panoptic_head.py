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
from upsnet.operators.panoptic_head import fuse_panoptic, resized_mask, segment_patch
from upsnet.structures.draws import Draws
from upsnet.structures.sample import VOID

SEMANTIC_STRIDE = 4
"""Network pixels per pixel of the semantic scores."""


# -- training ----------------------------------------------------------------------------------------------------------


def keep_instances(count: int, fraction: float, draws: Draws) -> Tensor:
    """Which of `count` instances take part: max(int(fraction · count), 1) of them, in random order; none of none."""
    kept = max(int(fraction * count), 1) if count else 0
    return draws.choose(torch.arange(count), kept)


def panoptic_logits(
    scores: Tensor, boxes: Tensor, classes: Tensor, mask_logits: Tensor, num_stuff: int, unknown: bool
) -> Tensor:
    """Logits of one image for training: (num_stuff + N + 1)×h×w; the last, unknown, only where asked for.

    Args:
        scores: S×h×w semantic scores at stride 4.
        boxes: N×4 at network scale. classes: N, 1..C-1. mask_logits: N×M×M of each instance's class.
    """
    size = (scores.shape[-2], scores.shape[-1])
    segment_planes, mask_planes = [], []
    for box, thing, logits in zip((boxes / SEMANTIC_STRIDE).tolist(), classes.tolist(), mask_logits, strict=True):
        rows, columns = segment_patch(box, size)
        plane = scores.new_zeros(size)
        plane[rows, columns] = scores[num_stuff - 1 + thing, rows, columns]
        segment_planes.append(plane)
        patch, (rows, columns) = resized_mask(logits, box, size)
        plane = scores.new_zeros(size)
        plane[rows, columns] = patch
        mask_planes.append(plane)
    channels = [scores[:num_stuff]]
    explained = scores.new_zeros(size)
    if segment_planes:
        segments = torch.stack(segment_planes)
        channels.append(segments + torch.stack(mask_planes))
        explained = segments.amax(dim=0)
    if unknown:
        channels.append((scores[num_stuff:].amax(dim=0) - explained)[None])
    return torch.cat(channels)


def panoptic_target(semantic: Tensor, masks: Tensor, num_stuff: int, unknown: bool) -> Tensor:
    """The channel that each pixel is to have: h×w int64, VOID where the loss is not to look.

    Args:
        semantic: h×w semantic ids at stride 4.
        masks: n×h×w bool of the kept instances, in the order of their channels; later ones overwrite earlier ones.
    """
    # A thing's pixel that no kept mask covers is what "unknown" is for.
    rest = num_stuff + len(masks) if unknown else VOID
    target = torch.where(semantic < num_stuff, semantic.long(), rest)
    for i, mask in enumerate(masks):
        target[mask] = num_stuff + i
    return target


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
