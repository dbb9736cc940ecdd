"""Masks of detections on the photo, as COCO's run lengths."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F

from upsnet.operators import library


def paste_masks(
    probabilities: Tensor, boxes: NDArray[np.float32], size: tuple[int, int], threshold: float = 0.5
) -> list[dict[str, Any]]:
    """Masks on the photo as COCO RLE (compressed, `counts` as text).

    Each mask gets a frame of one zero and its box grows by the same share around its centre (half sides without +1);
    the grown box is truncated to integers. There the mask is sampled bilinearly; a pixel strictly above the threshold
    belongs to it. Both paths give the same but where a value lies within 1e-6 of the threshold.

    Args:
        probabilities: N×M×M, 0..1, on any device. boxes: N×4 in photo pixels. size: height and width of the photo.

    Raises:
        ValueError: a shape that does not fit, by the argument's name.
    """
    _check(probabilities, boxes, size)
    side = probabilities.shape[-1]
    framed = F.pad(probabilities.cpu().float(), (1, 1, 1, 1))
    grown = _grow(boxes, (side + 2) / side).astype(np.int32)
    if not library.covers("paste_masks", framed):
        return [_paste(mask, box, size, threshold) for mask, box in zip(framed, grown.tolist(), strict=True)]
    texts, ends = torch.ops.upsnet.paste_masks(framed, torch.from_numpy(grown).long(), *size, threshold)
    text = texts.numpy().tobytes().decode("ascii")
    return [{"size": list(size), "counts": text[start:end]} for start, end in pairwise([0, *ends.tolist()])]


def _check(probabilities: Tensor, boxes: NDArray[np.float32], size: tuple[int, int]) -> None:
    if probabilities.dim() != 3 or not probabilities.shape[1] == probabilities.shape[2] > 0:
        raise ValueError(f"paste_masks: probabilities has shape {tuple(probabilities.shape)}, (N, M, M) is expected")
    if boxes.shape != (len(probabilities), 4):
        raise ValueError(f"paste_masks: boxes has shape {boxes.shape}, ({len(probabilities)}, 4) is expected")
    if min(size) < 1:
        raise ValueError(f"paste_masks: size is {size}, a photo has at least one pixel")


def _grow(boxes: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    half = (boxes[:, 2:] - boxes[:, :2]) * np.float32(0.5)
    center = (boxes[:, 2:] + boxes[:, :2]) * np.float32(0.5)
    half = half * np.float32(factor)
    return np.concatenate([center - half, center + half], axis=1)


def _paste(mask: Tensor, box: list[int], size: tuple[int, int], threshold: float) -> dict[str, Any]:
    x1, y1, x2, y2 = box
    height, width = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
    resized = F.interpolate(mask[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]
    canvas = np.zeros(size, dtype=np.uint8, order="F")
    # A box that clipping turned inside out by a fraction of a pixel covers nothing.
    top, bottom = max(y1, 0), min(y2 + 1, size[0])
    left, right = max(x1, 0), min(x2 + 1, size[1])
    if top < bottom and left < right:
        canvas[top:bottom, left:right] = (resized > threshold).numpy()[top - y1 : bottom - y1, left - x1 : right - x1]
    rle = coco_mask.encode(canvas)
    return {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")}


# -- what torch is to know about the native operator -------------------------------------------------------------------


def _shape(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float) -> tuple[Tensor, Tensor]:
    characters = torch.library.get_ctx().new_dynamic_size()
    return masks.new_empty(characters, dtype=torch.uint8), boxes.new_empty(masks.shape[0])


library.register("paste_masks", _shape)
