"""The panoptic head at test time (UPSNet, sections 3.3 and 3.4): from scores and masks straight to the label maps.

The geometry of boxes, which training shares, and the plain path stand here as well.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from upsnet.operators import library
from upsnet.structures.sample import VOID

Patch = tuple[slice, slice]


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


def fuse_panoptic(
    scores: Tensor,
    size: tuple[int, int],
    boxes: Tensor,
    classes: Tensor,
    mask_logits: Tensor,
    num_stuff: int,
    unknown: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask removal and the arg-max over the panoptic logits of one image.

    A channel for each stuff class is its score; one for each instance the sum of its semantic logit inside its box and
    its mask logit resized to its box, 0 elsewhere; one for "unknown" the greatest score of things minus the greatest
    semantic logit of an instance (UPSNet, eq. 1 and 2). Of equal channels the first wins; "unknown" is the last.
    Before, instances go whose mask (logit > 0) is empty, or covered to more than 0.3 by those of stronger instances of
    their class (section 3.4). If all go, the strongest stays with its semantic logit alone.

    The native operator samples as it goes: it forms no enlarged plane, and on a GPU the host asks it nothing.

    Args:
        scores: (S, h, w) semantic scores at any stride, all stuff first; any layout.
        size: height and width of the map.
        boxes: (N, 4) x1, y1, x2, y2 in pixels of the map, last pixels included; by descending score.
        classes: (N,) integers, 1..S - num_stuff.
        mask_logits: (N, M, M), of each instance's class.
        num_stuff: number of stuff classes; num_stuff + N below 32768.
        unknown: whether there is an "unknown" channel.

    Returns:
        channels: (height, width) int16; 0..num_stuff-1 stuff, num_stuff + i the i-th kept instance, VOID unknown.
        semantic: (height, width) int16, arg-max of the scores.
        kept: (N,) bool, the instances that were kept.

    Raises:
        ValueError: a shape or number that does not fit, by its name.
    """
    _check(scores, size, boxes, classes, mask_logits, num_stuff)
    # Half precision is too coarse for places, and for scores that are compared.
    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in (scores, boxes, mask_logits)]
    scores, boxes, mask_logits = wide
    if library.covers("fuse_panoptic", *wide):
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.upsnet.fuse_panoptic(
            scores, *size, boxes, classes.long(), mask_logits, num_stuff, unknown
        )
        return found
    return fuse_plain(scores, size, boxes, classes, mask_logits, num_stuff, unknown)


def _check(
    scores: Tensor, size: tuple[int, int], boxes: Tensor, classes: Tensor, mask_logits: Tensor, num_stuff: int
) -> None:
    def refuse(name: str, found: object, expected: str) -> None:
        raise ValueError(f"fuse_panoptic: {name} {found}, {expected} is expected")

    count = boxes.shape[0] if boxes.dim() else 0
    if scores.dim() != 3 or 0 in scores.shape[1:]:
        refuse("scores has shape", tuple(scores.shape), "(S, h, w) with h, w > 0")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        refuse("boxes has shape", tuple(boxes.shape), "(N, 4)")
    if classes.shape != (count,):
        refuse("classes has shape", tuple(classes.shape), f"({count},)")
    if mask_logits.dim() != 3 or len(mask_logits) != count or len({0, *mask_logits.shape[1:]}) != 2:
        refuse("mask_logits has shape", tuple(mask_logits.shape), f"({count}, M, M) with M > 0")
    if min(size) < 1:
        refuse("size is", tuple(size), "a map of at least one pixel")
    if not 0 <= num_stuff <= len(scores):
        refuse("num_stuff is", num_stuff, f"0..{len(scores)}")
    if max(num_stuff + count, len(scores)) > torch.iinfo(torch.int16).max:
        refuse("num_stuff + N is", num_stuff + count, "less than 32768")


# -- the plain path ----------------------------------------------------------------------------------------------------


def remove_hidden(
    boxes: Tensor, classes: Tensor, mask_logits: Tensor, size: tuple[int, int], max_overlap: float = 0.3
) -> tuple[list[int], list[tuple[Tensor, Patch]]]:
    """Drops instances that lie behind stronger ones of their class (UPSNet, section 3.4).

    Args:
        boxes: N×4 by descending score. classes: N. mask_logits: N×M×M.
        size: height and width of the map.
        max_overlap: an instance goes if more than this part of its mask is covered already.

    Returns:
        Positions of the kept instances, and their resized mask logits with the places where they lie.
    """
    kept, patches = [], []
    covered: dict[int, Tensor] = {}
    for i, (box, thing) in enumerate(zip(boxes.tolist(), classes.tolist(), strict=True)):
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


def fuse_plain(
    scores: Tensor,
    size: tuple[int, int],
    boxes: Tensor,
    classes: Tensor,
    mask_logits: Tensor,
    num_stuff: int,
    unknown: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fuse_panoptic` in PyTorch, plane by plane: the (stuff + instances)×H×W tensor does not exist here either.

    Takes and returns what `fuse_panoptic` does, but checks nothing.
    """
    kept, patches = remove_hidden(boxes, classes, mask_logits, size)
    if not kept and len(boxes):
        kept, patches = [0], [(scores.new_zeros(0, 0), (slice(0, 0), slice(0, 0)))]
    labels = [thing - 1 for thing in classes[kept].tolist()]
    stuff_value, stuff, _ = _running_argmax(scores[:num_stuff], size)
    thing_value, thing, own_planes = _running_argmax(scores[num_stuff:], size, frozenset(labels))
    semantic = torch.where(stuff_value >= thing_value, stuff, thing + num_stuff)

    value, channels = stuff_value, stuff
    explained = torch.zeros_like(value) if not kept else torch.full_like(value, -torch.inf)
    for i, (box, label) in enumerate(zip(boxes[kept].tolist(), labels, strict=True)):
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
    flags = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    flags[kept] = True
    return channels, semantic, flags


def _running_argmax(
    planes: Tensor, size: tuple[int, int], wanted: frozenset[int] = frozenset(), chunk: int = 16
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Maximum and its first channel over K×h×w planes, each enlarged to `size`; -inf and 0 where there is none.

    Returns also the enlarged planes of the `wanted` channels. They must come from here: enlarged anew they may differ
    in the last bit, and "unknown" is 0 exactly where an instance's own logit is the greatest.
    """
    best = planes.new_full(size, -torch.inf)
    channel = torch.zeros(size, dtype=torch.int16, device=planes.device)
    enlarged = {}
    for start in range(0, len(planes), chunk):
        part = F.interpolate(planes[None, start : start + chunk], size=size, mode="bilinear", align_corners=False)[0]
        enlarged.update({start + k: part[k].clone() for k in range(len(part)) if start + k in wanted})
        value, index = part.max(dim=0)
        better = value > best
        best = torch.where(better, value, best)
        channel = torch.where(better, (index + start).to(torch.int16), channel)
    return best, channel, enlarged


def _shape(
    scores: Tensor,
    height: int,
    width: int,
    boxes: Tensor,
    classes: Tensor,
    mask_logits: Tensor,
    num_stuff: int,
    unknown: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    labels = scores.new_empty(height, width, dtype=torch.int16)
    return labels, torch.empty_like(labels), boxes.new_empty(boxes.shape[0], dtype=torch.bool)


def _in_float32(
    dtype: torch.dtype,
    scores: Tensor,
    height: int,
    width: int,
    boxes: Tensor,
    classes: Tensor,
    mask_logits: Tensor,
    *rest: object,
) -> tuple[object, ...]:
    """Autocast lowers nothing here: labels are decided by small differences."""
    return scores.float(), height, width, boxes.float(), classes, mask_logits.float(), *rest


library.register("fuse_panoptic", _shape, autocast=_in_float32)
