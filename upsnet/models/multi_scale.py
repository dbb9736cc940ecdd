"""Test-time fusion of several views of a photo: other scales, and the photo mirrored.

The reference view is the photo at the first scale, as it is. What the other views say is carried onto it: their boxes
are joined and suppressed together, their class probabilities and mask probabilities averaged; the panoptic head then
fuses once. A test with one view takes the same road, on which every function of this file is then the identity, bit
for bit. UPSNet's paper gives a result of such a test (Cityscapes, PQ 61.8), its authors' code has none.

Where things lie. Pixel i covers [i, i + 1]; positions in a view are positions in the photo times its scale, as OpenCV
resizes, and mirroring is about the photo's middle, not about that of the rounded or padded view. Boxes go another way:
the network learns photo boxes times the scale, both ends alike, and mirrored as x → width - 1 - x in photo pixels; so
that is how its boxes are carried.

Where probabilities are averaged. At stride 4 of the reference, the resolution of the plain path's scores: 36 MB for
COCO (133 classes, 800×1344), 10 MB for Cityscapes (19 classes, 1024×2048), where the full resolution would take 16
times as much. So the reference bounds the detail: put the largest scale first to keep what it shows.

What has to stay in memory. Masks are asked for when the boxes of all views are known, so each view's P2..P5 is kept:
92 MB at 800×1344, 178 MB at 1024×2048 (256 channels, float32), less than the passing maps of a single view. Computing
them again would cost backbone and pyramid twice.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from upsnet.models.boxes import clip
from upsnet.models.panoptic_head import SEMANTIC_STRIDE
from upsnet.structures.sample import Batch


@dataclass(frozen=True, slots=True)
class Frame:
    """How a view shows its photo.

    size: height and width at network scale, without padding. scale: network pixels per photo pixel. photo_width: in
    photo pixels.
    """

    size: tuple[int, int]
    scale: float
    flipped: bool
    photo_width: int

    @staticmethod
    def of(batch: Batch, image: int) -> "Frame":
        return Frame(batch.sizes[image], batch.scales[image], batch.flipped[image], batch.original_sizes[image][1])


def carry_boxes(boxes: Tensor, source: Frame, target: Frame) -> Tensor:
    """N×4 boxes of one view of a photo in another one, cut to it."""
    boxes = boxes * (target.scale / source.scale)
    if source.flipped != target.flipped:
        last = (target.photo_width - 1) * target.scale
        x1, y1, x2, y2 = boxes.unbind(dim=1)
        boxes = torch.stack([last - x2, y1, last - x1, y2], dim=1)
    return clip(boxes, target.size)


def carry_scores(scores: Tensor, source: Frame, target: Frame, shape: tuple[int, int]) -> Tensor:
    """Scores of one view of a photo on the grid of another one, bilinear; what lies beyond the source repeats its edge.

    Args:
        scores: S×h×w at stride 4, padding included.
        shape: rows and columns of the target's grid at stride 4, padding included.
    """
    height, width = scores.shape[-2:]
    rows = _centers(shape[0], target)
    columns = _centers(shape[1], target)
    if source.flipped != target.flipped:
        columns = source.photo_width - columns
    scores = _sample(scores, _positions(rows, source, height), dim=1)
    return _sample(scores, _positions(columns, source, width), dim=2)


def _centers(cells: int, frame: Frame) -> Tensor:
    """Where the middles of a view's cells lie in the photo (mirrored or not), with the photo's edge at 0; float64."""
    return (torch.arange(cells, dtype=torch.float64) + 0.5) * SEMANTIC_STRIDE / frame.scale


def _positions(places: Tensor, frame: Frame, cells: int) -> Tensor:
    """Places in the photo as fractional numbers of a view's cells."""
    return (places * frame.scale / SEMANTIC_STRIDE - 0.5).clamp(0, cells - 1)


def _sample(scores: Tensor, positions: Tensor, dim: int) -> Tensor:
    """Linear interpolation along one dimension; whole positions give their cells unchanged."""
    nearest = positions.round()
    positions = torch.where((positions - nearest).abs() < 1e-9, nearest, positions)  # cell → photo → cell rounds
    before = positions.floor()
    weights = (positions - before).to(scores.dtype).to(scores.device)
    first = before.long().to(scores.device)
    after = (first + 1).clamp(max=scores.shape[dim] - 1)
    weights = weights.view([-1 if d == dim else 1 for d in range(scores.dim())])
    return torch.lerp(scores.index_select(dim, first), scores.index_select(dim, after), weights)


def mix_scores(mean: Tensor, other: Tensor, count: int) -> Tensor:
    """One view more in the mean of the class probabilities, as logits.

    The panoptic head compares logits with the zeros outside the boxes of instances and adds mask logits to them, so
    their level matters, which probabilities do not have. It comes back as the mean of the views' normalisers: logits =
    log(mean of softmax) + mean of logsumexp. Views that agree so give their own logits, and the head meets numbers of
    the kind that it was trained with. All is done with logarithms: nothing underflows, however sure a view is.

    Args:
        mean: S×h×w logits, the mean of `count` views. other: S×h×w logits of the next one.
    """
    share = 1 / (count + 1)
    mean_level, other_level = mean.logsumexp(dim=0), other.logsumexp(dim=0)
    mixed = torch.logaddexp(mean - mean_level + math.log(1 - share), other - other_level + math.log(share))
    # The logits that `mix_scores` returns have their mean level as their normaliser, so it needs no bookkeeping.
    return mixed + torch.lerp(mean_level, other_level, share)


def mix_masks(mean: Tensor, other: Tensor, count: int) -> Tensor:
    """One view more in the mean of the mask probabilities, as logits: of any shape, `count` as in `mix_scores`.

    A sigmoid is the softmax of a logit and 0.
    """
    nothing = torch.zeros_like(mean)
    inside, outside = mix_scores(torch.stack([mean, nothing]), torch.stack([other, nothing]), count)
    return inside - outside
