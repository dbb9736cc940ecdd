"""Box head: classes and boxes of RoIs (Fast R-CNN, with the two fully connected layers of FPN)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upsnet.models.boxes import clip, decode
from upsnet.models.layers import FusedLinear, NormKind, make_norm, smooth_l1, zero_bias
from upsnet.models.matching import IGNORED, SampledRoIs
from upsnet.operators import nms_flags, pyramid_roi_align

POOLED_SIZE = 7
SIGMA = 1.0


class BoxHead(nn.Module):
    """RoIs → class logits R×C (0 is background) and offsets R×C×4, one box for each class.

    Args:
        num_classes: C, thing classes and background.
        width: units of the two hidden layers.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 1024, norm: NormKind = "none") -> None:
        super().__init__()
        self.fc6 = nn.Linear(in_channels * POOLED_SIZE**2, width)
        self.norm6 = make_norm(norm, width)
        self.fc7 = nn.Linear(width, width)
        self.norm7 = make_norm(norm, width)
        self.class_logits = nn.Linear(width, num_classes)
        self.deltas = nn.Linear(width, 4 * num_classes)
        for layer in (self.fc6, self.fc7):
            nn.init.kaiming_uniform_(layer.weight, a=1)
        nn.init.normal_(self.class_logits.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        zero_bias(self.fc6, self.fc7, self.class_logits, self.deltas)

    def forward(self, levels: Sequence[Tensor], rois: Tensor) -> tuple[Tensor, Tensor]:
        """levels: P2..P5. rois: R×5 (image, box at network scale)."""
        pooled = pyramid_roi_align(levels, rois, POOLED_SIZE)
        if not isinstance(self.fc6, FusedLinear):  # which takes maps as they lie
            pooled = pooled.flatten(1)
        hidden = F.relu(_on_vectors(self.norm6, self.fc6(pooled)))
        hidden = F.relu(_on_vectors(self.norm7, self.fc7(hidden)))
        logits, deltas = self.class_logits(hidden).float(), self.deltas(hidden).float()
        return logits, deltas.view(*logits.shape, 4)


def _on_vectors(norm: nn.Module, x: Tensor) -> Tensor:
    """Applies a norm made for maps to R×C vectors."""
    return norm(x[:, :, None, None])[:, :, 0, 0]


def box_losses(logits: Tensor, deltas: Tensor, sampled: Sequence[SampledRoIs]) -> tuple[Tensor, Tensor, Tensor]:
    """Classification loss, box loss and accuracy, means over the images.

    Classification: softmax cross-entropy, mean over an image's RoIs. Box: smooth L1 of the class' own offsets, summed
    over foreground and divided by the number of RoIs (Fast R-CNN, eq. 1-3).

    Args:
        logits: R×C, deltas: R×C×4, the slots of all images one after another.
    """
    class_losses, box_losses, accuracies = [], [], []
    counts = [len(rois.labels) for rois in sampled]
    for image_logits, image_deltas, rois in zip(logits.split(counts), deltas.split(counts), sampled, strict=True):
        count = (rois.labels != IGNORED).sum().clamp(min=1)
        class_loss = F.cross_entropy(image_logits, rois.labels, ignore_index=IGNORED, reduction="sum")
        class_losses.append(class_loss / count)
        slots = torch.arange(len(rois.box_targets), device=deltas.device)
        classes = rois.labels[slots]
        difference = image_deltas[slots, classes.clamp(min=0)] - rois.box_targets
        box_losses.append(smooth_l1(difference.masked_fill(classes[:, None] <= 0, 0), SIGMA).sum() / count)
        accuracies.append((image_logits.detach().argmax(dim=1) == rois.labels).float().sum() / count)
    return torch.stack(class_losses).mean(), torch.stack(box_losses).mean(), torch.stack(accuracies).mean()


@dataclass(frozen=True)
class DetectionOptions:
    """Selection of detections: score above a threshold, suppression, and the `max_detections` best."""

    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_detections: int = 100
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Detected boxes of one image. boxes: N×4 at network scale. scores: N, 0..1. classes: N, 1..C-1."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    def select(self, indices: Tensor) -> "Candidates":
        return Candidates(self.boxes[indices], self.scores[indices], self.classes[indices])

    @staticmethod
    def none(device: torch.device) -> "Candidates":
        """No candidate."""
        boxes = torch.zeros(0, 4, device=device)
        return Candidates(boxes, boxes[:, 0], boxes[:, 0].long())

    @staticmethod
    def joined(parts: Sequence["Candidates"]) -> "Candidates":
        """The candidates of all parts, of which there is at least one."""
        return Candidates(
            torch.cat([part.boxes for part in parts]),
            torch.cat([part.scores for part in parts]),
            torch.cat([part.classes for part in parts]),
        )


def decode_above(
    rois: Tensor,
    probabilities: Tensor,
    deltas: Tensor,
    size: tuple[int, int],
    threshold: float,
    box_weights: tuple[float, float, float, float],
) -> Candidates:
    """Every pair of RoI and class with more than the threshold, as a box of one image; RoI by RoI.

    Args:
        rois: R×4 at network scale. probabilities: R×C softmax. deltas: R×C×4. size: height, width without padding.
    """
    roi, label = torch.nonzero(probabilities[:, 1:] > threshold, as_tuple=True)
    label = label + 1
    boxes = clip(decode(rois[roi], deltas[roi, label], box_weights), size)
    return Candidates(boxes, probabilities[roi, label], label)


def suppress(found: Candidates, options: DetectionOptions, class_agnostic: bool) -> Tensor:
    """Which boxes of one image become detections. Waits for the device once, however many there are.

    Args:
        class_agnostic: suppress across classes and order by descending score, as the panoptic head wants them;
            otherwise within each class, in order of class, then score.

    Returns:
        Positions in `found`: at most `max_detections`, or more where scores tie with the last one.
    """
    order = found.scores.argsort(descending=True, stable=True)
    if not class_agnostic:
        order = order[found.classes[order].argsort(stable=True)]
    ordered = found.select(order)
    groups = None if class_agnostic else ordered.classes
    above = ordered.scores > options.score_threshold
    kept = nms_flags(ordered.boxes, options.nms_threshold, groups, above, inclusive=True)
    if len(found) > options.max_detections:
        least = torch.where(kept, ordered.scores, -1).topk(options.max_detections).values[-1]
        kept = kept & (ordered.scores >= least)
    return order[kept.nonzero().squeeze(1)]


def joined_positions(count: int, lists: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What is in any of several lists of positions 0..count-1, ascending, and where it has the members of each list.

    Waits for the device once.
    """
    wanted = lists[0].new_zeros(count, dtype=torch.bool)
    for positions in lists:
        wanted.index_fill_(0, positions, True)
    places = wanted.cumsum(dim=0) - 1
    return wanted.nonzero().squeeze(1), [places[positions] for positions in lists]
