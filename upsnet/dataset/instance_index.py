"""A COCO instances json in flat arrays: boxes as they are, polygons as polygons, everything else as compressed RLE."""

import logging
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from upsnet.dataset.index import Ints, PanopticIndex, Texts, bytes_of
from upsnet.dataset.json_records import records_of
from upsnet.structures.categories import Categories
from upsnet.structures.errors import DataError
from upsnet.structures.masks import Mask, mask_from_coco

logger = logging.getLogger("upsnet")


@dataclass(frozen=True, slots=True)
class InstanceIndex:
    """The A annotations of an instances json, grouped by the images of a `PanopticIndex` (N), in file order within.

    offsets: N+1. ids, category_ids, areas: A. boxes: A×4 float64 as in the file (x, y, width, height).
    polygons: A×2, first and last+1 polygon; none for RLEs. corner_offsets: where each polygon starts in `corners`
    (x0, y0, x1, …). rle: A, position in rle_counts and rle_sizes (height, width), or -1.
    """

    source: Path
    offsets: Ints
    ids: Ints
    category_ids: NDArray[np.int32]
    thing_classes: NDArray[np.int16]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    is_crowd: NDArray[np.bool_]
    ignore: NDArray[np.bool_]
    polygons: Ints
    corner_offsets: Ints
    corners: NDArray[np.float64]
    rle: NDArray[np.int32]
    rle_counts: Texts
    rle_sizes: NDArray[np.int32]

    @property
    def nbytes(self) -> int:
        return bytes_of(self)

    def annotations_of(self, row: int) -> Ints:
        """The annotations of an image."""
        return np.arange(self.offsets[row], self.offsets[row + 1])

    def segmentation(self, row: int) -> Any:
        """The `segmentation` of an annotation as COCO writes it: list of polygons, or compressed RLE."""
        if (rle := self.rle[row]) >= 0:
            return {"size": self.rle_sizes[rle].tolist(), "counts": self.rle_counts[rle]}
        return [polygon.tolist() for polygon in self._polygons(row)]

    def mask(self, row: int, height: int, width: int) -> Mask:
        """The mask of an annotation in a photo of this size."""
        return mask_from_coco(self.segmentation(row), height, width)

    def record(self, row: int, image_id: int) -> dict[str, Any]:
        """The annotation as a COCO record."""
        return {
            "id": int(self.ids[row]),
            "image_id": image_id,
            "category_id": int(self.category_ids[row]),
            "bbox": self.boxes[row].tolist(),
            "area": float(self.areas[row]),
            "iscrowd": int(self.is_crowd[row]),
            "segmentation": self.segmentation(row),
        }

    def _polygons(self, row: int) -> list[NDArray[np.float64]]:
        first, end = self.polygons[row]
        return [self.corners[self.corner_offsets[p] : self.corner_offsets[p + 1]] for p in range(first, end)]


@dataclass(slots=True)
class _Columns:
    """What is collected while reading, in file order."""

    image_ids: "array[int]" = field(default_factory=lambda: array("q"))
    ids: "array[int]" = field(default_factory=lambda: array("q"))
    category_ids: "array[int]" = field(default_factory=lambda: array("i"))
    numbers: "array[float]" = field(default_factory=lambda: array("d"))
    is_crowd: "array[int]" = field(default_factory=lambda: array("b"))
    ignore: "array[int]" = field(default_factory=lambda: array("b"))
    polygon_ends: "array[int]" = field(default_factory=lambda: array("q", [0]))
    corner_ends: "array[int]" = field(default_factory=lambda: array("q", [0]))
    corners: "array[float]" = field(default_factory=lambda: array("d"))
    rle: "array[int]" = field(default_factory=lambda: array("i"))
    rle_counts: list[str] = field(default_factory=list)
    rle_sizes: list[list[int]] = field(default_factory=list)
    without_mask: int = 0


def read_instances(path: Path, categories: Categories, images: PanopticIndex) -> InstanceIndex:
    """Reads and checks an instances json against the panoptic json of the same images.

    Annotations whose polygons all have fewer than three corners are left out, with one warning.

    Raises:
        DataError: it is missing or broken, or contradicts the panoptic json: other images, categories or sizes, or no
            annotation at all where that one has things.
    """
    columns = _Columns()
    for key, record in records_of(path):
        if key == "annotations":
            _read(path, record, columns)
    if not columns.ids and images.has_box.any():
        raise DataError(
            f"{path}: has no annotations, but {images.source} has things: copy or download it again, or remove it"
        )
    if columns.without_mask:
        logger.warning("%s: %d annotations have no polygon with three corners: left out", path, columns.without_mask)
    return _assemble(path, categories, images, columns)


def _read(path: Path, record: Any, columns: _Columns) -> None:
    known = record if isinstance(record, dict) else {}
    where = f"{path}: annotation {known.get('id', '?')} of image {known.get('image_id', '?')}"
    try:
        ids = int(record["image_id"]), int(record["id"]), int(record["category_id"])
        numbers = [float(value) for value in (*record["bbox"], record["area"])]
        if len(numbers) != 5:
            raise ValueError
        if not _read_segmentation(record["segmentation"], columns):
            columns.without_mask += 1
            return
        columns.numbers.extend(numbers)
        columns.is_crowd.append(bool(record.get("iscrowd", 0)))
        columns.ignore.append(bool(record.get("ignore", 0)))
        for column, value in zip((columns.image_ids, columns.ids, columns.category_ids), ids, strict=True):
            column.append(value)
    except KeyError as error:
        raise DataError(f"{where} has no {error}: complete its record") from None
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise DataError(f"{where} is malformed: its box, area or segmentation is not as COCO writes it") from None


def _read_segmentation(segmentation: Any, columns: _Columns) -> bool:
    """Appends one segmentation; False if it holds no polygon with three corners."""
    if isinstance(segmentation, dict):
        height, width = (int(side) for side in segmentation["size"])
        counts = segmentation["counts"]
        if isinstance(counts, list):
            counts = coco_mask.frPyObjects(segmentation, height, width)["counts"].decode()
        columns.rle.append(len(columns.rle_counts))
        columns.rle_counts.append(str(counts))
        columns.rle_sizes.append([height, width])
    else:
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6 and len(polygon) % 2 == 0]
        if not polygons:
            return False
        for polygon in polygons:
            columns.corners.extend(polygon)
            columns.corner_ends.append(len(columns.corners))
        columns.rle.append(-1)
    columns.polygon_ends.append(len(columns.corner_ends) - 1)
    return True


def _assemble(path: Path, categories: Categories, images: PanopticIndex, columns: _Columns) -> InstanceIndex:
    owner, ids = np.array(columns.image_ids), np.array(columns.ids)
    image = np.searchsorted(images.image_ids, owner).clip(max=len(images) - 1)
    if len(strange := np.flatnonzero(images.image_ids[image] != owner)):
        i = strange[0]
        raise DataError(f"{path}: annotation {ids[i]} belongs to image {owner[i]}, which {images.source} does not list")
    order = np.argsort(image, kind="stable")
    known, position = np.unique(np.array(columns.category_ids), return_inverse=True)
    table = [_thing_class(categories, category_id) for category_id in known.tolist()]
    thing_classes = np.array(table, np.int16)[position]
    if len(unknown := np.flatnonzero(thing_classes < 1)):
        i = unknown[0]
        raise DataError(
            f"{path}: image {owner[i]}: annotation {ids[i]} has category {columns.category_ids[i]}, which is not a "
            f"thing class of {images.source}"
        )
    ends = np.array(columns.polygon_ends)
    rle, rle_sizes = np.array(columns.rle, np.int32), np.array(columns.rle_sizes, np.int32).reshape(-1, 2)
    _check_rle_sizes(path, images, image, ids, rle, rle_sizes)
    numbers = np.array(columns.numbers).reshape(-1, 5)[order]
    return InstanceIndex(
        source=path,
        offsets=np.searchsorted(image[order], np.arange(len(images) + 1)),
        ids=ids[order],
        category_ids=np.array(columns.category_ids, np.int32)[order],
        thing_classes=thing_classes[order],
        boxes=numbers[:, :4].copy(),
        areas=numbers[:, 4].copy(),
        is_crowd=np.array(columns.is_crowd, bool)[order],
        ignore=np.array(columns.ignore, bool)[order],
        polygons=np.stack([ends[:-1], ends[1:]], axis=1)[order],
        corner_offsets=np.array(columns.corner_ends),
        corners=np.frombuffer(columns.corners) if columns.corners else np.zeros(0),
        rle=rle[order],
        rle_counts=Texts(columns.rle_counts),
        rle_sizes=rle_sizes,
    )


def _check_rle_sizes(
    path: Path, images: PanopticIndex, image: Ints, ids: Ints, rle: NDArray[np.int32], sizes: NDArray[np.int32]
) -> None:
    """pycocotools would compare masks of different sizes without a word."""
    owners = np.flatnonzero(rle >= 0)
    wanted = np.stack([images.heights, images.widths], axis=1)[image[owners]]
    if len(wrong := np.flatnonzero((sizes[rle[owners]] != wanted).any(axis=1))):
        i, (height, width) = owners[wrong[0]], wanted[wrong[0]].tolist()
        raise DataError(
            f"{path}: image {images.image_ids[image[i]]}: annotation {ids[i]}: the RLE has size "
            f"{sizes[rle[i]].tolist()}, the photo [{height}, {width}]: correct or remove it"
        )


def _thing_class(categories: Categories, category_id: int) -> int:
    try:
        return categories.thing_class(category_id)
    except KeyError:
        return 0
