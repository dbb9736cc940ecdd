"""Truths of a COCO panoptic file read in the plainest way, and predictions made from them."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from upsnet.evaluation.result_files import ResultWriter
from upsnet.structures.categories import Categories
from upsnet.structures.results import Detections, Prediction, Segment, Truth, segments_of
from upsnet.structures.sample import VOID


def read_categories(path: Path) -> Categories:
    return Categories.from_coco(json.loads(path.read_text())["categories"], path.name)


def read_truths(path: Path, folder: Path | None = None) -> list[Truth]:
    """All photos of a panoptic json in file order; instance annotations come from the PNG."""
    content = json.loads(path.read_text())
    categories = Categories.from_coco(content["categories"], path.name)
    truths = []
    for record in content["annotations"]:
        rgb = np.asarray(
            Image.open((folder or path.with_suffix("")) / record["file_name"]).convert("RGB"), dtype=np.int32
        )
        ids = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
        semantic = np.full(ids.shape, VOID, dtype=np.int16)
        segments, annotations = [], []
        for info in record["segments_info"]:
            semantic_id = categories.semantic_id(info["category_id"])
            crowd = bool(info["iscrowd"])
            segments.append(Segment(info["id"], semantic_id, info["area"], tuple(info["bbox"]), None, crowd))
            semantic[ids == info["id"]] = semantic_id
            if categories[semantic_id].is_thing:
                rle = coco_mask.encode(np.asfortranarray(ids == info["id"]))
                annotations.append({**info, "segmentation": {**rle, "counts": rle["counts"].decode()}})
        truths.append(Truth(record["image_id"], record["file_name"], ids, segments, semantic, annotations))
    return truths


def as_prediction(
    truth: Truth, segment_map: np.ndarray | None = None, classes: dict[int, int] | None = None
) -> Prediction:
    """The truth without its crowds as prediction, or another map of the same ids (with other semantic ids)."""
    classes = {s.id: s.semantic_id for s in truth.segments} | (classes or {})
    if segment_map is None:
        segment_map = truth.segment_map
    crowds = [s.id for s in truth.segments if s.is_crowd]
    segment_map = np.where(np.isin(segment_map, crowds), 0, segment_map).astype(np.int32)
    return Prediction(
        truth.image_id, truth.file_name, segment_map, segments_of(segment_map, classes), semantic_map=truth.semantic_map
    )


def with_instances(prediction: Prediction, categories: Categories, scores: Iterable[float]) -> Prediction:
    """The prediction with its things as detections."""
    boxes, classes, masks = [], [], []
    for segment in prediction.segments:
        if categories[segment.semantic_id].is_thing:
            x, y, w, h = segment.bbox
            boxes.append((x, y, x + w - 1, y + h - 1))
            classes.append(categories.thing_class(categories[segment.semantic_id].id))
            masks.append(coco_mask.encode(np.asfortranarray(prediction.segment_map == segment.id)))
    scores = [score for score, _ in zip(scores, boxes, strict=False)]
    instances = Detections(
        np.asarray(boxes, np.float32).reshape(-1, 4),
        np.asarray(classes, np.int64),
        np.asarray(scores, np.float32),
        masks,
    )
    return replace(prediction, instances=instances)


def store_results(folder: Path, predictions: Iterable[Prediction], categories: Categories) -> None:
    """A finished result folder."""
    with ResultWriter(folder, categories) as writer:
        for prediction in predictions:
            writer.add(prediction)
