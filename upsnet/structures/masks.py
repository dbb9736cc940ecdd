"""Ground-truth masks: polygons stay polygons, everything else is a cut-out bitmap.

A mask lives in the pixel coordinates of the original photo. Two questions are asked of it: what does it look like
inside a box (`crop`, the target of the mask head), and on the whole photo (`draw`, the target of the panoptic head).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

Bool = NDArray[np.bool_]
Float = NDArray[np.float64]


class Mask(Protocol):
    """One mask; `Polygons` and `Bitmap` are the two kinds."""

    def bounds(self) -> tuple[float, float, float, float]:
        """x1, y1, x2, y2 of the extreme vertices or, for bitmaps, of the extreme pixels (inclusive)."""

    def crop(self, box: Float, size: int) -> Bool:
        """The mask seen through a box (x1, y1, x2, y2), as size×size: x' = (x - x1) · size / max(x2 - x1, 1)."""

    def draw(self, height: int, width: int) -> Bool:
        """The mask on a canvas of height×width."""

    def flip(self, width: int) -> "Mask":
        """The mask mirrored left to right on a photo of this width."""


@dataclass(frozen=True, slots=True)
class Polygons:
    """The union of polygons, each a flat array x0, y0, x1, y1, … with at least three corners."""

    polygons: tuple[Float, ...]

    def bounds(self) -> tuple[float, float, float, float]:
        corners = np.concatenate(self.polygons).reshape(-1, 2)
        (x1, y1), (x2, y2) = corners.min(axis=0), corners.max(axis=0)
        return float(x1), float(y1), float(x2), float(y2)

    def crop(self, box: Float, size: int) -> Bool:
        # No +1 in this frame, single precision, and pycocotools' fill rule: as in the original's mask targets.
        corner, opposite = np.asarray(box, dtype=np.float32).reshape(2, 2)
        sides = np.maximum(opposite - corner, np.float32(1))
        moved = [
            ((polygon.astype(np.float32).reshape(-1, 2) - corner) * np.float32(size) / sides).ravel().tolist()
            for polygon in self.polygons
        ]
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(moved, size, size))).astype(bool)

    def draw(self, height: int, width: int) -> Bool:
        # PIL's fill with outline, coordinates as they are: the original draws its panoptic targets this way.
        canvas = Image.new("L", (width, height), 0)
        pen = ImageDraw.Draw(canvas)
        for polygon in self.polygons:
            pen.polygon(polygon.tolist(), outline=1, fill=1)
        return np.asarray(canvas, dtype=bool)

    def flip(self, width: int) -> "Polygons":
        mirrored = []
        for polygon in self.polygons:
            corners = polygon.copy()
            corners[0::2] = width - corners[0::2] - 1
            mirrored.append(corners)
        return Polygons(tuple(mirrored))


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A bitmap cut to its bounding box; its top-left pixel lies at (x, y) of the photo."""

    x: int
    y: int
    pixels: Bool

    @classmethod
    def from_map(cls, mask: Bool) -> "Bitmap":
        """Cuts an H×W mask to its bounding box. An empty mask becomes a 0×0 bitmap."""
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if len(rows) == 0:
            return cls(0, 0, np.zeros((0, 0), dtype=bool))
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        return cls(int(left), int(top), np.ascontiguousarray(mask[top:bottom, left:right], dtype=bool))

    def bounds(self) -> tuple[float, float, float, float]:
        height, width = self.pixels.shape
        return float(self.x), float(self.y), float(self.x + width - 1), float(self.y + height - 1)

    def crop(self, box: Float, size: int) -> Bool:
        # The value at the centre of each of the size×size bins.
        height, width = self.pixels.shape
        steps = (np.arange(size) + 0.5) / size
        columns = np.floor(box[0] + steps * max(box[2] - box[0], 1.0)).astype(np.int64) - self.x
        rows = np.floor(box[1] + steps * max(box[3] - box[1], 1.0)).astype(np.int64) - self.y
        inside = np.outer((rows >= 0) & (rows < height), (columns >= 0) & (columns < width))
        if not inside.any():
            return inside
        return inside & self.pixels[np.ix_(rows.clip(0, height - 1), columns.clip(0, width - 1))]

    def draw(self, height: int, width: int) -> Bool:
        canvas = np.zeros((height, width), dtype=bool)
        # The canvas may be a pixel smaller than the photo (it is computed back from the network's size).
        rows, columns = (
            max(min(self.pixels.shape[0], height - self.y), 0),
            max(min(self.pixels.shape[1], width - self.x), 0),
        )
        canvas[self.y : self.y + rows, self.x : self.x + columns] = self.pixels[:rows, :columns]
        return canvas

    def flip(self, width: int) -> "Bitmap":
        return Bitmap(width - self.x - self.pixels.shape[1], self.y, np.ascontiguousarray(self.pixels[:, ::-1]))


def mask_from_coco(segmentation: Any, height: int, width: int) -> Mask:
    """A mask from a COCO `segmentation`: list of polygons, or RLE (compressed or not).

    Polygons with fewer than three corners are left out, as pycocotools leaves them out.

    Raises:
        ValueError: no polygon is left, or the RLE does not have this size.
    """
    if isinstance(segmentation, list):
        polygons = tuple(np.asarray(p, dtype=np.float64) for p in segmentation if len(p) >= 6)
        if not polygons:
            raise ValueError("the segmentation has no polygon with three corners")
        return Polygons(polygons)
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"the RLE has size {list(segmentation['size'])}, the photo {[height, width]}")
    if isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, height, width)
    return Bitmap.from_map(coco_mask.decode(segmentation).astype(bool))


class Masks(Sequence[Mask]):
    """The masks of one photo's instances."""

    def __init__(self, masks: Sequence[Mask]) -> None:
        self._masks = list(masks)

    def crop(self, boxes: Float, size: int) -> Bool:
        """Mask i seen through box i: N×4 boxes → N×size×size."""
        if len(boxes) != len(self):
            raise ValueError(f"{len(self)} masks need as many boxes, got {len(boxes)}")
        crops = [mask.crop(box, size) for mask, box in zip(self._masks, np.asarray(boxes, np.float64), strict=True)]
        return np.stack(crops) if crops else np.zeros((0, size, size), dtype=bool)

    def bounds(self) -> NDArray[np.float32]:
        """N×4 boxes around the masks, see `Mask.bounds`."""
        return np.asarray([mask.bounds() for mask in self._masks], dtype=np.float32).reshape(-1, 4)

    def draw(self, height: int, width: int) -> Bool:
        """N×height×width."""
        drawn = [mask.draw(height, width) for mask in self._masks]
        return np.stack(drawn) if drawn else np.zeros((0, height, width), dtype=bool)

    def flip(self, width: int) -> "Masks":
        return Masks([mask.flip(width) for mask in self._masks])

    def select(self, indices: Sequence[int]) -> "Masks":
        """The masks at these positions, in this order."""
        return Masks([self._masks[int(i)] for i in indices])

    def __getitem__(self, index: Any) -> Any:
        return self._masks[index]

    def __iter__(self) -> Iterator[Mask]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)
