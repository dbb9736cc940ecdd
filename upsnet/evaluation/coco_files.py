"""Panoptic files of COCO's format: a json with a record for each photo, and one PNG a photo."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upsnet.structures.categories import Categories
from upsnet.structures.errors import DataError
from upsnet.structures.pictures import read_segment_map
from upsnet.structures.results import Prediction, Segment

RECORD = {"image_id": int | float | str, "file_name": str, "segments_info": list}
"""Keys of an annotation and what each holds; Cityscapes' image ids are texts."""
SEGMENT = {"id": int | float, "category_id": int | float}
"""Keys of each of its segments that nothing can be done without."""


def records_by_image(content: dict[str, Any], source: Path) -> dict[int, dict[str, Any]]:
    """The `annotations` of a COCO panoptic file by image id.

    Raises:
        DataError: the list or a key of a record or segment is missing or of another kind, or an image has two records.
    """
    if not isinstance(content.get("annotations"), list):
        raise DataError(f"{source}: has no list 'annotations': this is not a COCO panoptic file")
    records: dict[int, dict[str, Any]] = {}
    for position, record in enumerate(content["annotations"]):
        where = f"{source}: annotation number {position}"
        if isinstance(record, dict):
            where = f"{source}: annotation of image {record['image_id']}" if "image_id" in record else where
            if "segments_info" not in record and "category_id" in record:
                raise DataError(
                    f"{source}: holds instances (annotations with 'category_id'), not panoptic segments "
                    f"('segments_info'): give a COCO panoptic file"
                )
        _check_keys(record, RECORD, where)
        for info in record["segments_info"]:
            number = info.get("id", "without id") if isinstance(info, dict) else "without id"
            _check_keys(info, SEGMENT, f"{source}: image {record['image_id']}, segment {number}:")
        if record["image_id"] in records:
            raise DataError(f"{source}: image {record['image_id']} has two annotations: keep one")
        records[record["image_id"]] = record
    return records


def _check_keys(record: Any, kinds: Mapping[str, type | UnionType], where: str) -> None:
    if not isinstance(record, dict):
        raise DataError(f"{where} is no object: this is not a COCO panoptic file")
    for key, kind in kinds.items():
        if key not in record:
            raise DataError(f"{where} has no '{key}': add it (COCO panoptic format)")
        if not isinstance(record[key], kind):
            raise DataError(f"{where} has {json.dumps(record[key])[:60]} as '{key}': mend it (COCO panoptic format)")


def png_folder(source: Path) -> Path:
    """Where the PNGs of the COCO panoptic file `source` lie: in the folder of its name, else beside it.

    Beside it is where `PanopticResult.save` puts the one PNG of a photo.
    """
    folder = source.with_suffix("")
    return folder if folder.is_dir() else source.parent


def read_panoptic(
    record: dict[str, Any], source: Path, categories: Categories
) -> tuple[NDArray[np.int32], list[Segment]]:
    """The segment map (H×W) and the segments of one annotation of the COCO panoptic file `source`.

    Whether map and segments fit is checked where they are matched. Areas and boxes are those of the record, or 0.

    Raises:
        DataError: the PNG is missing or damaged, or a segment has a class that is not in the table.
    """
    segments = []
    for info in record["segments_info"]:
        where = f"{source}: image {record['image_id']}, segment {info['id']}"
        if info["category_id"] not in categories:
            raise DataError(f"{where}: category {info['category_id']} is not in the class table: mend the id")
        semantic_id = categories.semantic_id(info["category_id"])
        try:
            x, y, width, height = (int(value) for value in info.get("bbox", (0, 0, 0, 0)))
        except (TypeError, ValueError):
            raise DataError(f"{where}: 'bbox' must be x, y, width and height, not {info['bbox']}") from None
        box = (x, y, width, height)
        is_crowd = bool(info.get("iscrowd", 0))
        segments.append(Segment(info["id"], semantic_id, info.get("area", 0), box, info.get("score"), is_crowd))
    path = png_folder(source) / record["file_name"]
    try:
        return read_segment_map(path), segments
    except DataError as error:
        raise DataError(f"image {record['image_id']}: {error}") from None


def panoptic_record(prediction: Prediction, png_name: str, categories: Categories) -> dict[str, Any]:
    """The COCO annotation of a prediction's segments."""
    infos = []
    for segment in prediction.segments:
        info = {
            "id": segment.id,
            "category_id": categories[segment.semantic_id].id,
            "area": segment.area,
            "bbox": list(segment.bbox),
            "iscrowd": 0,
        }
        infos.append(info if segment.score is None else {**info, "score": segment.score})
    return {"image_id": prediction.image_id, "file_name": png_name, "segments_info": infos}
