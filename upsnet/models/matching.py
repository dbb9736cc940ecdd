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
    labels = torch.full((len(anchors),), IGNORED, dtype=torch.int64, device=anchors.device)
    targets = torch.zeros_like(anchors)
    inside = torch.nonzero(_inside(anchors, size, options.straddle)).flatten()
    if len(inside) == 0:
        return labels, targets
    candidates = anchors[inside]
    inside_labels = labels[inside]
    best_overlap = torch.zeros(len(inside), device=anchors.device)
    if len(truth):
        overlaps = box_iou(candidates, truth)
        best_overlap, best_truth = overlaps.max(dim=1)
        is_best = overlaps == overlaps.max(dim=0).values  # ties included
        if not options.as_original:
            is_best &= overlaps > 0
        inside_labels[is_best.any(dim=1) | (best_overlap >= options.positive_overlap)] = 1
        targets[inside] = encode(candidates, truth[best_truth])

    is_candidate = best_overlap < options.negative_overlap
    if not options.as_original:
        in_crowd = (box_coverage(candidates, crowds) > options.crowd_overlap).any(dim=1)
        is_candidate &= (inside_labels == IGNORED) & ~in_crowd
    positives = torch.nonzero(inside_labels == 1).flatten()
    most = int(options.positive_fraction * options.batch_size)
    if len(positives) > most:
        inside_labels[draws.choose(positives, len(positives) - most)] = IGNORED
    wanted = options.batch_size - int((inside_labels == 1).sum())
    negatives = torch.nonzero(is_candidate).flatten()
    if len(negatives) > wanted:
        inside_labels[draws.choose(negatives, wanted)] = 0
    elif not options.as_original:
        inside_labels[negatives] = 0
    labels[inside] = inside_labels
    return labels, targets


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
    """RoIs of one image for the box head, in original pixels: foreground first, then background.

    boxes: R×4. labels: R, 0 is background. box_targets: F×4 offsets of the F foreground RoIs.
    owners: F positions among the instances that are not crowds, each RoI's own; None as in the original, where the mask
        target is looked up anew.
    """

    boxes: Tensor
    labels: Tensor
    box_targets: Tensor
    owners: Tensor | None = None

    @property
    def num_foreground(self) -> int:
        return len(self.box_targets)


def sample_rois(
    proposals: Tensor, truth: Tensor, classes: Tensor, is_crowd: Tensor, options: RoISampling, draws: Draws
) -> SampledRoIs:
    """Draws foreground and background RoIs from the ground-truth boxes and the proposals (Fast R-CNN, section 2.3).

    As in the original, a proposal that lies on a crowd becomes foreground of the crowd's class; only the crowd's own
    box is left out. Otherwise crowds are matched with nothing, and a proposal mostly inside one is not sampled.

    Args:
        proposals: P×4 in original pixels.
        truth: G×4 ground-truth boxes, crowds included. classes: G, 1..C-1. is_crowd: G bool.
    """
    crowds = truth[is_crowd]
    if not options.as_original:
        truth, classes, is_crowd = truth[~is_crowd], classes[~is_crowd], is_crowd[~is_crowd]
    boxes = torch.cat([truth, proposals])
    best_overlap = torch.zeros(len(boxes), device=boxes.device)
    best_truth = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    if len(truth):
        best_overlap, best_truth = box_iou(boxes, truth).max(dim=1)
        best_overlap[: len(truth)] = torch.where(is_crowd, -1.0, 1.0)
        best_truth[: len(truth)] = torch.arange(len(truth), device=boxes.device)
    if not options.as_original:
        in_crowd = (box_coverage(proposals, crowds) > options.crowd_overlap).any(dim=1)
        best_overlap[len(truth) :][in_crowd] = -1

    foreground = torch.nonzero(best_overlap >= options.foreground_overlap).flatten()
    most = round(options.foreground_fraction * options.batch_size)
    foreground = draws.choose(foreground, min(most, len(foreground)))
    background = torch.nonzero(
        (best_overlap >= options.background_low) & (best_overlap < options.background_high)
    ).flatten()
    background = draws.choose(background, min(options.batch_size - len(foreground), len(background)))

    chosen = torch.cat([foreground, background])
    labels = torch.zeros(len(chosen), dtype=torch.int64, device=boxes.device)
    targets = boxes.new_zeros(0, 4)
    if len(foreground):
        labels[: len(foreground)] = classes[best_truth[foreground]]
        targets = encode(boxes[foreground], truth[best_truth[foreground]], options.box_weights)
    return SampledRoIs(boxes[chosen], labels, targets, None if options.as_original else best_truth[foreground])


def mask_targets(boxes: Tensor, masks: Masks, size: int, owners: Tensor | None = None) -> Tensor:
    """What the mask head is to see in each RoI (Mask R-CNN, section 3): F×4 boxes → F×size×size float32 in {0, 1}.

    Args:
        boxes: F×4 foreground RoIs in original pixels.
        masks: the masks of the instances that are not crowds, at least one.
        owners: F positions in `masks`; None: each RoI takes the mask whose own box overlaps it most, whatever the
            class, as in the original.
    """
    corners = boxes.detach().cpu()
    if owners is None:
        owners = box_iou(corners, torch.from_numpy(masks.bounds())).argmax(dim=1)
    crops = masks.select(owners.tolist()).crop(corners.double().numpy(), size)
    return torch.from_numpy(crops).to(boxes.device, torch.float32)
