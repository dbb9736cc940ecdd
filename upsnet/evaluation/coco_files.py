"""Panoptic files of COCO's format: a json with a record for each photo, and one PNG a photo."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upsnet.structures.categories import Categories
from upsnet.structures.errors import DataError
from upsnet.structures.pictures import read_segment_map
from upsnet.structures.results import Prediction, Segment


def records_by_image(content: dict[str, Any], source: Path) -> dict[int, dict[str, Any]]:
    """The `annotations` of a COCO panoptic file by image id.

    Raises:
        DataError: the list or a key of a record is missing, or an image has two records.
    """
    if not isinstance(content.get("annotations"), list):
        raise DataError(f"{source}: has no list 'annotations': this is not a COCO panoptic file")
    records: dict[int, dict[str, Any]] = {}
    for position, record in enumerate(content["annotations"]):
        if not isinstance(record, dict):
            raise DataError(f"{source}: annotation number {position} is no object: this is not a COCO panoptic file")
        if "segments_info" not in record and "category_id" in record:
            raise DataError(
                f"{source}: holds instances (annotations with 'category_id'), not panoptic segments ('segments_info'): "
                f"give a COCO panoptic file"
            )
        for key in ("image_id", "file_name", "segments_info"):
            if key not in record:
                name = f"of image {record['image_id']}" if "image_id" in record else f"number {position}"
                raise DataError(f"{source}: annotation {name} has no '{key}': add it (COCO panoptic format)")
        if record["image_id"] in records:
            raise DataError(f"{source}: image {record['image_id']} has two annotations: keep one")
        records[record["image_id"]] = record
    return records


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
        DataError: the PNG is missing or damaged, a segment lacks a key or has a class that is not in the table.
    """
    segments = []
    for info in record["segments_info"]:
        where = f"{source}: image {record['image_id']}, segment {info.get('id', 'without id')}"
        for key in ("id", "category_id"):
            if key not in info:
                raise DataError(f"{where}: has no '{key}': add it (COCO panoptic format)")
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
