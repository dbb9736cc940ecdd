"""An image set with labels: its index, and what is read for one image of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from upsnet.dataset.image_sets import ImageSet
from upsnet.dataset.index import PanopticIndex
from upsnet.dataset.index_cache import IndexCache
from upsnet.dataset.instance_index import InstanceIndex
from upsnet.dataset.photo_set import PhotoSet, check_folder
from upsnet.dataset.shards import ShardFolder, open_shards
from upsnet.structures.categories import Categories
from upsnet.structures.errors import DataError
from upsnet.structures.masks import Bitmap, Masks
from upsnet.structures.pictures import read_segment_map
from upsnet.structures.results import Segment, Truth
from upsnet.structures.sample import VOID, Instances
from upsnet.structures.segment_runs import SegmentRuns


@dataclass(frozen=True, slots=True)
class Labels:
    """The panoptic label of one photo: segment map, its runs, and the semantic id of each id in `runs.ids`."""

    segment_map: NDArray[np.int32]
    runs: SegmentRuns
    semantic_ids: NDArray[np.int16]

    def semantic_map(self) -> NDArray[np.int16]:
        """H×W semantic ids, VOID where there is no label."""
        return self.runs.paint(self.semantic_ids)


class AnnotatedSet(PhotoSet):
    """Photos with panoptic labels. Without an instances json, instances and COCO annotations come from the PNGs."""

    index: PanopticIndex

    def __init__(self, files: ImageSet) -> None:
        photos, labels = _folders(files)
        check_folder(photos)
        check_folder(labels)
        cache = IndexCache(files.index_dir)
        self.categories, index = cache.panoptic(files.panoptic_json)
        super().__init__(photos, index)
        self.label_pngs = labels
        self.instance_index: InstanceIndex | None = None
        if files.instances_json is not None:
            self.instance_index = cache.instances(files.instances_json, self.categories, index)

    @property
    def nbytes(self) -> int:
        return self.index.nbytes + (self.instance_index.nbytes if self.instance_index else 0)

    def labels(self, row: int) -> Labels:
        """Reads the panoptic PNG and holds it against the json.

        Raises:
            DataError: the PNG is missing, damaged or of another size, or its ids are not those of the json.
        """
        index, image_id = self.index, self.index.image_ids[row]
        path = self.label_pngs / index.png_names[row]
        try:
            segment_map = read_segment_map(path, self.size(row))
        except DataError as error:
            raise DataError(f"image {image_id}: {error}") from None
        runs = SegmentRuns.of(segment_map)
        rows = index.segments_of(row)
        ids = index.segment_ids[rows]
        if len(strange := np.setdiff1d(runs.ids[runs.ids > 0], ids)):
            raise DataError(
                f"image {image_id}: {path} has pixels of segment {strange[0]}, but {index.source} has no record of it: "
                f"add the record or make the pixels void (0)"
            )
        if len(missing := np.setdiff1d(ids, runs.ids)):
            raise DataError(
                f"image {image_id}: {index.source} records segment {missing[0]}, of which {path} has no pixel: "
                f"remove the record or correct the PNG"
            )
        semantic_ids = np.full(len(runs.ids), VOID, dtype=np.int16)
        semantic_ids[np.searchsorted(runs.ids, ids)] = index.semantic_ids[rows]
        return Labels(segment_map, runs, semantic_ids)

    def truth(self, row: int, first_id: int) -> Truth:
        """The labels of an image, unscaled. Annotations that are made from the PNG get ids from first_id on."""
        index, labels = self.index, self.labels(row)
        rows = index.segments_of(row)
        crowds = set(index.segment_ids[rows][index.is_crowd[rows]].tolist())
        runs = labels.runs
        segments = [
            Segment(segment_id, semantic_id, area, (x, y, w, h), None, segment_id in crowds)
            for segment_id, semantic_id, area, (x, y, w, h) in zip(
                runs.ids.tolist(), labels.semantic_ids.tolist(), runs.areas.tolist(), runs.boxes.tolist(), strict=True
            )
            if segment_id != 0
        ]
        image_id = int(index.image_ids[row])
        truth = Truth(image_id, index.photo_names[row], labels.segment_map, segments, labels.semantic_map())
        if (instances := self.instance_index) is not None:
            truth.annotations = [instances.record(a, image_id) for a in instances.annotations_of(row)]
        else:
            truth.annotations = _records_of_things(truth, self.categories, first_id)
        return truth

    def instances(self, row: int, labels: Labels, min_area: float = -1) -> Instances:
        """The things of an image that are targets: those whose box is at least two pixels wide and high."""
        if self.instance_index is not None:
            return self._instances_of_json(self.instance_index, row, min_area)
        return self._instances_of_png(row, labels)

    def has_usable_thing(self, min_area: float = -1) -> NDArray[np.bool_]:
        """For each image: does it hold a target that is not a crowd? By the jsons alone, without reading PNGs."""
        images = self.index
        if (index := self.instance_index) is None:
            owner, usable = np.repeat(np.arange(len(images)), np.diff(images.offsets)), images.has_box
        else:
            owner = np.repeat(np.arange(len(images)), np.diff(index.offsets))
            _, usable = usable_boxes(
                index, np.arange(len(owner)), images.heights[owner], images.widths[owner], min_area
            )
            usable = usable & ~index.is_crowd
        return np.bincount(owner[usable], minlength=len(images)) > 0

    def _instances_of_json(self, index: InstanceIndex, row: int, min_area: float) -> Instances:
        height, width = self.size(row)
        annotations = index.annotations_of(row)
        boxes, usable = usable_boxes(index, annotations, height, width, min_area)
        kept = annotations[usable]
        return Instances(
            boxes=torch.from_numpy(boxes[usable].astype(np.float32)),
            classes=torch.from_numpy(index.thing_classes[kept].astype(np.int64)),
            is_crowd=torch.from_numpy(index.is_crowd[kept]),
            masks=Masks([index.mask(a, height, width) for a in kept]),
        )

    def _instances_of_png(self, row: int, labels: Labels) -> Instances:
        """In the order of the json."""
        first, rows = self.categories.num_stuff, self.index.segments_of(row)
        ids, semantic_ids = self.index.segment_ids[rows], self.index.semantic_ids[rows]
        x, y, w, h = labels.runs.boxes[np.searchsorted(labels.runs.ids, ids)].T
        kept = np.flatnonzero((semantic_ids >= first) & (w > 1) & (h > 1))
        masks = []
        for k in kept:
            cut = labels.segment_map[y[k] : y[k] + h[k], x[k] : x[k] + w[k]]
            masks.append(Bitmap(int(x[k]), int(y[k]), cut == ids[k]))
        boxes = np.stack([x, y, x + w - 1, y + h - 1], axis=1)[kept].astype(np.float32)
        return Instances(
            boxes=torch.from_numpy(boxes),
            classes=torch.from_numpy(semantic_ids[kept].astype(np.int64) - first + 1),
            is_crowd=torch.from_numpy(self.index.is_crowd[rows][kept]),
            masks=Masks(masks),
        )


def usable_boxes(
    index: InstanceIndex, rows: NDArray[np.int64], heights: Any, widths: Any, min_area: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Boxes (x1, y1, x2, y2; inclusive pixels, clipped to the photo) of annotations, and which of them are targets."""
    x, y, w, h = index.boxes[rows].T
    x1, y1 = np.clip(x, 0, widths - 1), np.clip(y, 0, heights - 1)
    x2 = np.clip(x + np.maximum(w - 1, 0), 0, widths - 1)
    y2 = np.clip(y + np.maximum(h - 1, 0), 0, heights - 1)
    areas = index.areas[rows]
    usable = (areas > 0) & (areas >= min_area) & (x2 > x1) & (y2 > y1) & ~index.ignore[rows]
    return np.stack([x1, y1, x2, y2], axis=1), usable


def _records_of_things(truth: Truth, categories: Categories, first_id: int) -> list[dict[str, Any]]:
    """COCO instance annotations made from the panoptic segments; ids are distinct over the whole data set."""
    records: list[dict[str, Any]] = []
    for segment in truth.segments:
        category = categories[segment.semantic_id]
        if not category.is_thing:
            continue
        mask = np.asfortranarray(truth.segment_map == segment.id, dtype=np.uint8)
        rle = coco_mask.encode(mask)
        records.append(
            {
                "id": first_id + len(records),
                "image_id": truth.image_id,
                "category_id": category.id,
                "bbox": [float(value) for value in segment.bbox],
                "area": float(segment.area),
                "iscrowd": int(segment.is_crowd),
                "segmentation": {"size": list(truth.segment_map.shape), "counts": rle["counts"].decode()},
            }
        )
    return records


def _folders(files: ImageSet) -> tuple[Path | ShardFolder, Path | ShardFolder]:
    """Of photos and labels."""
    if files.shards is None:
        return files.image_dir, files.png_dir
    shards = open_shards(files.shards)
    if shards.labels is None:
        raise DataError(f"{files.shards}: holds no labels: write the shards anew by `upsnet prepare coco --shards`")
    return shards.photos, shards.labels
