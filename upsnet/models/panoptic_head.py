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
from upsnet.structures.draws import Draws
from upsnet.structures.sample import VOID

Patch = tuple[slice, slice]

SEMANTIC_STRIDE = 4
"""Network pixels per pixel of the semantic scores."""


def segment_patch(box: list[float], size: tuple[int, int]) -> Patch:
    """Rows and columns that a box covers for its semantic logit: start truncated, end rounded (half to even) plus 1."""
    x1, y1, x2, y2 = box
    return _slices(int(y1), round(y2) + 1, size[0]), _slices(int(x1), round(x2) + 1, size[1])


def _slices(start: int, stop: int, length: int) -> slice:
    start = min(max(start, 0), length)
    return slice(start, min(max(stop, start), length))


def resized_mask(logits: Tensor, box: list[float], size: tuple[int, int]) -> tuple[Tensor, Patch]:
    """M×M mask logits resized to their box, cut to the map, and where they lie.

    The box is truncated to integers at both ends. Clipping at the border can turn a box inside out by a fraction of a
    pixel: such a box covers nothing, as in the original.
    """
    x1, y1, x2, y2 = (int(v) for v in box)
    rows, columns = _slices(y1, y2 + 1, size[0]), _slices(x1, x2 + 1, size[1])
    height, width = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
    resized = F.interpolate(logits[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]
    return resized[rows.start - y1 : rows.stop - y1, columns.start - x1 : columns.stop - x1], (rows, columns)


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

    channels: H×W int64; 0..num_stuff-1 is stuff, num_stuff + i the i-th instance, VOID unknown.
    semantic: H×W int64, arg-max of the semantic scores.
    instances: the instances that were kept, by descending score.
    """

    channels: Tensor
    semantic: Tensor
    instances: Candidates


def remove_hidden(
    candidates: Candidates, mask_logits: Tensor, size: tuple[int, int], max_overlap: float = 0.3
) -> tuple[list[int], list[tuple[Tensor, Patch]]]:
    """Drops instances that lie behind stronger ones of their class (UPSNet, section 3.4).

    Args:
        candidates: N by descending score, boxes at network scale. mask_logits: N×M×M.
        size: height and width of the map.
        max_overlap: an instance goes if more than this part of its mask is covered already.

    Returns:
        Positions of the kept candidates, and their resized mask logits with the places where they lie.
    """
    kept, patches = [], []
    covered: dict[int, Tensor] = {}
    boxes, classes = candidates.boxes.tolist(), candidates.classes.tolist()
    for i, (box, thing) in enumerate(zip(boxes, classes, strict=True)):
        patch, place = resized_mask(mask_logits[i], box, size)
        mask = patch > 0
        area = int(mask.sum())
        if area == 0:
            continue
        cover = covered.setdefault(thing, torch.zeros(size, dtype=torch.bool, device=mask.device))
        if int((mask & cover[place]).sum()) / area > max_overlap:
            continue
        cover[place] |= mask
        kept.append(i)
        patches.append((patch, place))
    return kept, patches


def fuse(
    scores: Tensor,
    size: tuple[int, int],
    candidates: Candidates,
    mask_logits: Tensor,
    num_stuff: int,
    unknown: bool = True,
) -> PanopticMap:
    """The panoptic map of one image.

    The arg-max runs over planes one at a time, so the (stuff + instances)×H×W tensor never exists.

    Args:
        scores: S×h×w semantic scores at any stride.
        size: height and width of the map, those of the network's input.
        candidates: N by descending score at network scale. mask_logits: N×M×M.
    """
    kept, patches = remove_hidden(candidates, mask_logits, size)
    if not kept and len(candidates):
        # Nothing but empty masks: the strongest candidate stays, with its semantic logit alone.
        kept, patches = [0], [(scores.new_zeros(0, 0), (slice(0, 0), slice(0, 0)))]
    instances = candidates.select(torch.tensor(kept, dtype=torch.int64, device=scores.device))
    labels = [thing - 1 for thing in instances.classes.tolist()]
    stuff_value, stuff, _ = _running_argmax(scores[:num_stuff], size)
    thing_value, thing, own_planes = _running_argmax(scores[num_stuff:], size, frozenset(labels))
    semantic = torch.where(stuff_value >= thing_value, stuff, thing + num_stuff)

    value, channels = stuff_value, stuff.clone()
    explained = torch.zeros_like(value) if not kept else torch.full_like(value, -torch.inf)
    for i, (box, label) in enumerate(zip(instances.boxes.tolist(), labels, strict=True)):
        place = segment_patch(box, size)
        plane = scores.new_zeros(size)
        plane[place] = own_planes[label][place]
        explained = torch.maximum(explained, plane)
        patch, place = patches[i]
        plane[place] += patch
        better = plane > value
        value = torch.where(better, plane, value)
        channels[better] = num_stuff + i
    if unknown:
        channels[thing_value - explained > value] = VOID
    return PanopticMap(channels, semantic, instances)


def _running_argmax(
    planes: Tensor, size: tuple[int, int], wanted: frozenset[int] = frozenset(), chunk: int = 16
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Maximum and its first channel over K×h×w planes, each enlarged to `size`; -inf and 0 where there is none.

    Returns also the enlarged planes of the `wanted` channels. They must come from here: enlarged anew they may differ
    in the last bit, and "unknown" is 0 exactly where an instance's own logit is the greatest.
    """
    best = planes.new_full(size, -torch.inf)
    channel = torch.zeros(size, dtype=torch.int64, device=planes.device)
    enlarged = {}
    for start in range(0, len(planes), chunk):
        part = F.interpolate(planes[None, start : start + chunk], size=size, mode="bilinear", align_corners=False)[0]
        enlarged.update({start + k: part[k].clone() for k in range(len(part)) if start + k in wanted})
        value, index = part.max(dim=0)
        better = value > best
        best = torch.where(better, value, best)
        channel = torch.where(better, index + start, channel)
    return best, channel, enlarged
