"""Detections as COCO results: boxes in one json list, masks in another, both in the same order."""

from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from upsnet.evaluation.json_files import JsonListReader
from upsnet.structures.categories import Categories
from upsnet.structures.errors import DataError
from upsnet.structures.results import Detections

DETECTION_KINDS = ("bbox", "segm")
"""pycocotools' names of what a detection file holds: boxes or masks."""


def detection_file(folder: Path, kind: str) -> Path:
    """Where the detections of a kind lie in a result folder."""
    return folder / f"{kind}_results.json"


def detection_records(instances: Detections, image_id: int, categories: Categories, kind: str) -> list[dict[str, Any]]:
    """Detections as COCO result records with `bbox` (x, y, w = x2 - x1 + 1, h) or `segmentation` (RLE), not both.

    pycocotools takes the size of an object from its box if a record has one, so masks must come without.
    """
    records = []
    boxes = instances.boxes.astype(np.float64)
    for i, (thing_class, score) in enumerate(zip(instances.classes.tolist(), instances.scores.tolist(), strict=True)):
        record: dict[str, Any] = {"image_id": image_id, "category_id": categories.of_thing(thing_class).id}
        if kind == "bbox":
            x1, y1, x2, y2 = boxes[i].tolist()
            record["bbox"] = [x1, y1, x2 - x1 + 1, y2 - y1 + 1]
        else:
            record["segmentation"] = text_rle(instances.masks[i])
        records.append({**record, "score": score})
    return records


class DetectionReader:
    """Reads boxes and masks side by side, photo by photo, in the order in which they were written."""

    def __init__(self, folder: Path, categories: Categories) -> None:
        """
        Raises:
            PlaceError: a file is missing or cannot be read.
        """
        self._categories = categories
        self._path = detection_file(folder, "segm")
        self._boxes = JsonListReader(detection_file(folder, "bbox"))
        self._masks = JsonListReader(self._path)

    def of_image(self, image_id: int, size: tuple[int, ...] | None = None) -> Detections:
        """The detections of the next photo, which must be this one if it has any.

        Args:
            size: height and width of the photo, if they are known.

        Raises:
            DataError: a file is damaged, or the two do not fit each other or the photo.
        """
        boxes, masks = self._boxes.of_image(image_id), self._masks.of_image(image_id)
        damaged = DataError(
            f"{self._path}: image {image_id}: does not fit bbox_results.json or the photo: "
            f"run the test without --eval_only"
        )
        if len(boxes) != len(masks):
            raise damaged
        try:
            corners = [
                (x, y, x + width - 1, y + height - 1) for x, y, width, height in (record["bbox"] for record in boxes)
            ]
            if any(_label(box) != _label(mask) for box, mask in zip(boxes, masks, strict=True)):
                raise damaged
            found = [_checked_rle(record["segmentation"], size) for record in masks]
            return Detections(
                np.asarray(corners, dtype=np.float32).reshape(-1, 4),
                np.asarray([self._categories.thing_class(record["category_id"]) for record in boxes], dtype=np.int64),
                np.asarray([_finite(record["score"]) for record in boxes], dtype=np.float32),
                found,
            )
        except (KeyError, TypeError, ValueError):
            raise damaged from None

    def check_end(self) -> None:
        """To be called after the last photo.

        Raises:
            DataError: a detection is left: it belongs to no photo, or to one in another order.
        """
        self._boxes.check_end()
        self._masks.check_end()


def _label(record: dict[str, Any]) -> tuple[Any, Any]:
    return record["category_id"], record["score"]


def _finite(score: float) -> float:
    if not isfinite(score):
        raise ValueError
    return score


def _checked_rle(rle: dict[str, Any], size: tuple[int, ...] | None) -> dict[str, Any]:
    """pycocotools would compare masks of different sizes without a word."""
    if not isinstance(rle["counts"], str) or tuple(rle["size"]) != (size or tuple(rle["size"])):
        raise ValueError
    return rle


def text_rle(rle: dict[str, Any]) -> dict[str, Any]:
    """A COCO RLE as json holds it: pycocotools encodes to bytes and reads both."""
    counts = rle["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(length) for length in rle["size"]], "counts": text}
