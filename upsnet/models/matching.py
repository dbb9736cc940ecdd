"""Which anchors and which proposals learn from which ground truth: pure functions of boxes and random draws.

There are two sets of rules. With `as_original` they are those of the original UPSNet, its oddities included; without it
the oddities are mended. Each is marked where it happens, and `docs/fidelity.md` lists them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from upsnet.models.boxes import box_coverage, box_iou, encode
from upsnet.structures.draws import Draws
from upsnet.structures.masks import Masks

IGNORED = -1


@dataclass(frozen=True)
class AnchorSampling:
    """Options of `match_anchors`.

    straddle: pixels by which an anchor may leave the image; negative keeps all anchors.
    as_original: the original's oddities, see `match_anchors`.
    crowd_overlap: share of an anchor inside a crowd's box above which it is no background.
    """

    batch_size: int = 256
    positive_fraction: float = 0.5
    positive_overlap: float = 0.7
    negative_overlap: float = 0.3
    straddle: float = 0.0
    as_original: bool = False
    crowd_overlap: float = 0.7


def match_anchors(
    anchors: Tensor, truth: Tensor, crowds: Tensor, size: tuple[int, int], options: AnchorSampling, draws: Draws
) -> tuple[Tensor, Tensor]:
    """Labels and regression targets of anchors (Faster R-CNN, section 3.1.2).

    As in the original, the best anchors of a box count even if they do not touch it, no anchor is background unless
    there are more candidates than places, candidates are also those that are or were positive, and crowds play no part.
    Otherwise a best anchor must overlap its box, background is never an anchor that is or was positive or lies mostly
    inside a crowd, and where the candidates are few all of them are taken.

    Args:
        anchors: A×4. truth: G×4 boxes that are not crowds. crowds: K×4 boxes that are. All at network scale.
        size: height and width of the image without padding.

    Returns:
        A int64 labels (1 object, 0 background, IGNORED) and A×4 offsets, meaningful where the label is 1.
    """
    inside = _inside(anchors, size, options.straddle)
    positive = torch.zeros_like(inside)
    best_overlap, targets = torch.zeros_like(anchors[:, 0]), torch.zeros_like(anchors)
    if len(truth) and len(anchors):
        overlaps = box_iou(anchors, truth).masked_fill_(~inside[:, None], -1)
        best_overlap, best_truth = overlaps.max(dim=1)
        is_best = overlaps == overlaps.amax(dim=0)  # ties included
        if not options.as_original:
            is_best &= overlaps > 0
        positive = inside & (is_best.any(dim=1) | (best_overlap >= options.positive_overlap))
        targets = torch.where(positive[:, None], encode(anchors, truth[best_truth]), 0.0)

    is_candidate = inside & (best_overlap < options.negative_overlap)
    if not options.as_original:
        in_crowd = (box_coverage(anchors, crowds) > options.crowd_overlap).any(dim=1)
        is_candidate &= ~positive & ~in_crowd
    labels = torch.full((len(anchors),), IGNORED, dtype=torch.int64, device=anchors.device)
    most = int(options.positive_fraction * options.batch_size)
    num_positive = positive.sum().clamp(max=most)
    _set_first(labels, draws.first(positive, most), num_positive, 1)
    wanted, candidates = options.batch_size - num_positive, is_candidate.sum()
    too_few = 0 if options.as_original else candidates
    num_negative = torch.where(candidates > wanted, wanted, too_few)
    _set_first(labels, draws.first(is_candidate, options.batch_size), num_negative, 0)
    return labels, targets


def _set_first(labels: Tensor, places: Tensor, count: Tensor, label: int) -> None:
    """Gives the label to the first `count` of these places."""
    is_first = torch.arange(len(places), device=places.device) < count
    labels[places] = torch.where(is_first, label, labels[places])


def _inside(anchors: Tensor, size: tuple[int, int], straddle: float) -> Tensor:
    if straddle < 0:
        return torch.ones(len(anchors), dtype=torch.bool, device=anchors.device)
    height, width = size
    x1, y1, x2, y2 = anchors.unbind(1)
    return (x1 >= -straddle) & (y1 >= -straddle) & (x2 < width + straddle) & (y2 < height + straddle)


@dataclass(frozen=True)
class RoISampling:
    """Options of `sample_rois`. Background RoIs have an overlap in [background_low, background_high).

    as_original: the original's oddities, see `sample_rois`.
    crowd_overlap: share of a proposal inside a crowd's box above which it is not sampled.
    """

    batch_size: int = 512
    foreground_fraction: float = 0.25
    foreground_overlap: float = 0.5
    background_high: float = 0.5
    background_low: float = 0.0
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    as_original: bool = False
    crowd_overlap: float = 0.7


@dataclass(frozen=True, slots=True)
class SampledRoIs:
    """R slots for the RoIs of one image for the box head, in original pixels: foreground first, then background.

    Where the image gives fewer RoIs the last slots are empty; how many, only the device knows.

    boxes: R×4. labels: R; 0 is background, IGNORED an empty slot.
    box_targets: F×4 offsets of the first F slots, meaningful where the label is above 0; behind them is no foreground.
    owners: F positions among the instances that are not crowds, each RoI's own; None as in the original, where the mask
        target is looked up anew.
    """

    boxes: Tensor
    labels: Tensor
    box_targets: Tensor
    owners: Tensor | None = None

    def trimmed(self) -> "SampledRoIs":
        """The same without empty slots; waits for the device."""
        count, foreground = int((self.labels != IGNORED).sum()), int((self.labels > 0).sum())
        owners = None if self.owners is None else self.owners[:foreground]
        return SampledRoIs(self.boxes[:count], self.labels[:count], self.box_targets[:foreground], owners)

    def foreground(self) -> Tensor:
        """What the host has to know of the first F slots, as one tensor: F×6, box, label and owner (-1: None)."""
        slots = len(self.box_targets)
        owners = torch.full_like(self.labels[:slots], -1) if self.owners is None else self.owners
        return torch.cat([self.boxes[:slots], self.labels[:slots, None], owners[:, None]], dim=1)


def sample_rois(
    proposals: Tensor,
    truth: Tensor,
    classes: Tensor,
    is_crowd: Tensor,
    options: RoISampling,
    draws: Draws,
    valid: Tensor | None = None,
) -> SampledRoIs:
    """Draws foreground and background RoIs from the ground-truth boxes and the proposals (Fast R-CNN, section 2.3).

    As in the original, a proposal that lies on a crowd becomes foreground of the crowd's class; only the crowd's own
    box is left out. Otherwise crowds are matched with nothing, and a proposal mostly inside one is not sampled.

    Args:
        proposals: P×4 in original pixels.
        truth: G×4 ground-truth boxes, crowds included. classes: G, 1..C-1. is_crowd: G bool.
        valid: P bool, False where a proposal is padding; None: all are there.
    """
    boxes = torch.cat([truth, proposals])
    best_overlap, best_truth = torch.zeros_like(boxes[:, 0]), torch.zeros_like(boxes[:, 0], dtype=torch.int64)
    if len(truth):
        overlaps = box_iou(boxes, truth)
        if not options.as_original:
            overlaps.masked_fill_(is_crowd, 0)
        best_overlap, best_truth = overlaps.max(dim=1)
        best_truth[: len(truth)] = torch.arange(len(truth), device=boxes.device)
        best_overlap[: len(truth)] = torch.where(is_crowd, -1.0, 1.0)
        if not options.as_original:
            in_crowd = ((box_coverage(proposals, truth) > options.crowd_overlap) & is_crowd).any(dim=1)
            best_overlap[len(truth) :].masked_fill_(in_crowd, -1)
    if valid is not None:
        best_overlap[len(truth) :].masked_fill_(~valid, -1)

    is_foreground = best_overlap >= options.foreground_overlap
    is_background = (best_overlap >= options.background_low) & (best_overlap < options.background_high)
    most = round(options.foreground_fraction * options.batch_size)
    foreground, background = draws.first(is_foreground, most), draws.first(is_background, options.batch_size)
    slots = torch.arange(len(background), device=boxes.device)
    num_foreground = is_foreground.sum().clamp(max=most)
    from_foreground = slots < num_foreground
    in_order = torch.where(from_foreground, slots, len(foreground) + slots - num_foreground)
    chosen = torch.cat([foreground, background])[in_order]
    labels = torch.where(slots < num_foreground + is_background.sum(), 0, IGNORED)
    if len(truth) == 0:
        return SampledRoIs(boxes[chosen], labels, boxes.new_zeros(0, 4), None if options.as_original else chosen[:0])
    owners = best_truth[chosen]
    labels = torch.where(from_foreground, classes[owners], labels)
    front = slice(len(foreground))
    targets = encode(boxes[chosen[front]], truth[owners[front]], options.box_weights)
    singles = (~is_crowd).cumsum(0) - 1
    return SampledRoIs(boxes[chosen], labels, targets, None if options.as_original else singles[owners[front]])


def mask_targets(boxes: Tensor, masks: Masks, size: int, owners: Tensor | None = None) -> Tensor:
    """What the mask head is to see in each RoI (Mask R-CNN, section 3): F×4 boxes → F×size×size float32 in {0, 1}.

    Masks are drawn by the host, so all of this is on the host.

    Args:
        boxes: F×4 foreground RoIs in original pixels.
        masks: the masks of the instances that are not crowds, at least one.
        owners: F positions in `masks`; None: each RoI takes the mask whose own box overlaps it most, whatever the
            class, as in the original.
    """
    if owners is None:
        owners = box_iou(boxes, torch.from_numpy(masks.bounds())).argmax(dim=1)
    crops = masks.select(owners.numpy().tolist()).crop(boxes.double().numpy(), size)
    return torch.from_numpy(crops).float()
