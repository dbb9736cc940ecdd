"""Panoptic files of COCO's format: one PNG a photo and its record, and the score of one such file against another."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from upsnet.evaluation.json_files import read_json, write_json
from upsnet.evaluation.panoptic_quality import PanopticQuality
from upsnet.structures.categories import Categories
from upsnet.structures.errors import DataError, PlaceError
from upsnet.structures.pictures import read_segment_map
from upsnet.structures.results import Prediction, Segment, Truth
from upsnet.structures.sample import VOID

logger = logging.getLogger("upsnet")


def evaluate_files(pred_json: Path, gt_json: Path, out: Path | None = None) -> dict[str, Any]:
    """Scores a COCO panoptic file against another; each has its PNGs in the folder of its name without `.json`.

    Args:
        pred_json: predictions, `annotations` for every photo of the truth.
        gt_json: truth; its `categories` are the class table.
        out: where to write the summary, if anywhere.

    Returns:
        {"panoptic": summary}, see `PanopticQuality.summary`.

    Raises:
        PlaceError: a file cannot be read or written.
        DataError: a file is damaged, a photo has no prediction, or PNG and record contradict each other.
    """
    truth_file, prediction_file = _content(gt_json), _content(pred_json)
    if "categories" not in truth_file:
        raise DataError(f"{gt_json}: has no 'categories': give a COCO panoptic file as truth")
    categories = Categories.from_coco(truth_file["categories"], str(gt_json))
    wanted = records_by_image(truth_file, gt_json)
    given = records_by_image(prediction_file, pred_json)
    if not wanted:
        raise DataError(f"{gt_json}: 'annotations' is empty: there is nothing to score")
    for image_id in wanted:
        if image_id not in given:
            raise DataError(f"{pred_json}: image {image_id} of {gt_json.name} has no annotation: predict every image")
    if surplus := len(given.keys() - wanted.keys()):
        logger.warning("%s: %d images are not in %s and are not scored", pred_json, surplus, gt_json.name)

    quality = PanopticQuality(categories)
    for image_id, record in tqdm(wanted.items(), desc="panoptic quality", unit="image"):
        truth_map, truth_segments = read_panoptic(record, gt_json, categories)
        prediction_map, segments = read_panoptic(given[image_id], pred_json, categories)
        # The semantic map plays no part in panoptic quality.
        nothing = np.full(truth_map.shape, VOID, dtype=np.int16)
        quality.add(
            Prediction(image_id, given[image_id]["file_name"], prediction_map, segments),
            Truth(image_id, record["file_name"], truth_map, truth_segments, nothing),
        )
    summary = {"panoptic": quality.summary()}
    if out is not None:
        write_json(out, summary)
    return summary


def records_by_image(content: dict[str, Any], source: Path) -> dict[int, dict[str, Any]]:
    """The `annotations` of a COCO panoptic file by image id.

    Raises:
        DataError: the list or a key of a record is missing, or an image has two records.
    """
    if not isinstance(content.get("annotations"), list):
        raise DataError(f"{source}: has no list 'annotations': this is not a COCO panoptic file")
    records: dict[int, dict[str, Any]] = {}
    for position, record in enumerate(content["annotations"]):
        for key in ("image_id", "file_name", "segments_info"):
            if key not in record:
                name = f"of image {record['image_id']}" if "image_id" in record else f"number {position}"
                raise DataError(f"{source}: annotation {name} has no '{key}': add it (COCO panoptic format)")
        if record["image_id"] in records:
            raise DataError(f"{source}: image {record['image_id']} has two annotations: keep one")
        records[record["image_id"]] = record
    return records


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
    path = source.with_suffix("") / record["file_name"]
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


def _content(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise PlaceError(f"{path}: there is no such file: check the path")
    if not path.with_suffix("").is_dir():
        raise PlaceError(f"{path.with_suffix('')}: there is no such folder: the PNGs of {path.name} must lie there")
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: is a {type(content).__name__}, not an object: this is not a COCO panoptic file")
    return content
