"""Test-time fusion of several views of a photo: other scales, and the photo mirrored.

The reference view is the photo at the first scale, as it is. What the other views say is carried onto it: their boxes
are joined and suppressed together, their class probabilities and mask probabilities averaged; the panoptic head then
fuses once. A test with one view takes the same road, on which every function of this file is the identity, bit for
bit. UPSNet's paper gives a result of such a test (Cityscapes, PQ 61.8), its authors' code has none.

Where things lie. Pixel i covers [i, i + 1]; positions in a view are positions in the photo times its scale, as OpenCV
resizes, and mirroring is about the photo's middle, not about that of the rounded or padded view. Boxes go another way:
the network learns photo boxes times the scale, both ends alike, and mirrored as x → width - 1 - x in photo pixels, and
polygons with them; so that is how its boxes and masks are carried. Masks learned from bitmaps, which are mirrored about
the middle, come back one photo pixel aside of their partners.

What has to stay in memory. Masks are asked for when the boxes of all views are known, so each view's P2..P5 are kept,
and its scores at stride 4: 128 MB for COCO (133 classes, 800×1344, 256 channels, float32), 188 MB for Cityscapes (19
classes, 1024×2048). A single view needs several times as much in passing; computing the features again would cost
backbone and pyramid twice. The mean is formed at every pixel, 572 MB for COCO and 159 MB for Cityscapes: at stride 4 it
lost up to 2 points of PQ on the synthetic shapes, since at borders the mean of softmaxes is no plane between cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from upsnet.models.boxes import clip
from upsnet.models.panoptic_head import SEMANTIC_STRIDE
from upsnet.structures.sample import Batch

LEAST = 1e-37
"""Least mean probability: float32 tells it from 0."""

_STRIP = 64
"""Rows of the mean that are formed at a time."""


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


def carry_scores(scores: Tensor, source: Frame, target: Frame, rows: range, columns: range) -> Tensor:
    """Scores of one view of a photo at network pixels of another one, bilinear; beyond the source its edge is repeated.

    Args:
        scores: S×h×w at stride 4, padding included.
        rows, columns: of the target.
    """
    y, x = _places(rows, target), _places(columns, target)
    if source.flipped != target.flipped:
        x = source.photo_width - x
    return _sample(_sample(scores, _cells(y, source), dim=1), _cells(x, source), dim=2)


def _places(pixels: range, frame: Frame) -> Tensor:
    """Where the middles of pixels lie in the photo, mirrored where the view is, with the photo's edge at 0; float64."""
    return (torch.arange(pixels.start, pixels.stop, dtype=torch.float64) + 0.5) / frame.scale


def _cells(places: Tensor, frame: Frame) -> Tensor:
    """Places in the photo as fractional numbers of a view's cells at stride 4."""
    return places * frame.scale / SEMANTIC_STRIDE - 0.5


def _sample(scores: Tensor, cells: Tensor, dim: int) -> Tensor:
    """Linear interpolation along one dimension."""
    last = scores.shape[dim] - 1
    cells = cells.clamp(0, last)
    before = cells.floor()
    weights = (cells - before).to(scores.device, scores.dtype)
    first = before.long().to(scores.device)
    shape = [-1 if d == dim else 1 for d in range(scores.dim())]
    return torch.lerp(
        scores.index_select(dim, first), scores.index_select(dim, (first + 1).clamp(max=last)), weights.view(shape)
    )


def mean_scores(scores: Sequence[Tensor], frames: Sequence[Frame], size: tuple[int, int]) -> Tensor:
    """Logits of the mean class probabilities of all views: S×H×W for the reference; of one view its scores as they are.

    The panoptic head compares logits with the zeros outside the boxes of instances and adds mask logits to them, so
    their level matters, which probabilities do not have. It comes back as the mean of the views' normalisers: logits =
    log(mean of softmax) + mean of logsumexp. Views that agree so give their own logits, and the head meets numbers of
    the kind that it was trained with.

    Args:
        scores: of each view S×h×w at stride 4, padding included; the reference first.
        frames: of each view.
        size: H, W, the padded size of the reference.
    """
    if len(scores) == 1:
        return scores[0]
    mean = scores[0].new_empty(len(scores[0]), *size)
    for top in range(0, size[0], _STRIP):
        rows = range(top, min(top + _STRIP, size[0]))
        strip = mean[:, rows.start : rows.stop].zero_()
        level = torch.zeros_like(strip[0])
        for of_view, frame in zip(scores, frames, strict=True):
            logits = carry_scores(of_view, frame, frames[0], rows, range(size[1]))
            normaliser = logits.logsumexp(dim=0)
            strip += (logits - normaliser).exp()
            level += normaliser
        strip.div_(len(scores)).clamp_(min=LEAST).log_().add_(level / len(scores))
    return mean


def mean_masks(logits: Sequence[Tensor]) -> Tensor:
    """Logits of the mean mask probabilities of all views, of any shape; of one view its logits as they are.

    Formed with logarithms, so nothing underflows however sure a view is.
    """
    if len(logits) == 1:
        return logits[0]
    views = torch.stack(list(logits))
    return F.logsigmoid(views).logsumexp(dim=0) - F.logsigmoid(-views).logsumexp(dim=0)
