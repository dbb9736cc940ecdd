"""The score of one COCO panoptic file against another, photo by photo and in several processes."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from upsnet.evaluation.coco_files import png_folder, read_panoptic, records_by_image
from upsnet.evaluation.json_files import read_json
from upsnet.evaluation.panoptic_quality import Matching, PanopticQuality, match_segments
from upsnet.evaluation.workers import default_workers, map_in_order
from upsnet.structures.categories import Categories
from upsnet.structures.errors import DataError, PlaceError
from upsnet.structures.results import Prediction, Truth
from upsnet.structures.sample import VOID

Record = dict[str, Any]
"""One of the `annotations`."""

logger = logging.getLogger("upsnet")


def evaluate_files(
    pred_json: Path,
    gt_json: Path,
    official: bool = False,
    boundary: bool = False,
    workers: int | None = 1,
) -> dict[str, Any]:
    """Scores a COCO panoptic file against another; the PNGs of each lie where `png_folder` says.

    The maps of a few photos lie in memory at a time. The result does not depend on the number of processes.

    Args:
        pred_json: predictions, `annotations` for every photo of the truth.
        gt_json: truth; its `categories` are the class table.
        official: a truth that contradicts itself is not refused but gives the number that the official tool gives: the
            areas of its json are believed and more, see `match_segments`; segments of an unknown class count nowhere.
        boundary: boundary panoptic quality as well.
        workers: processes that read and match; None: one for every core.

    Returns:
        {"panoptic": summary}, see `PanopticQuality.summary`; with `boundary`, "boundary" is another.

    Raises:
        PlaceError: a file cannot be read.
        DataError: a file is damaged, a photo has no prediction, or PNG and record contradict each other.
    """
    truth_file, prediction_file = _content(gt_json), _content(pred_json)
    wanted = records_by_image(truth_file, gt_json)
    given = records_by_image(prediction_file, pred_json)
    if "categories" not in truth_file:
        raise DataError(f"{gt_json}: has no 'categories': give a COCO panoptic file as truth")
    categories = Categories.from_coco(truth_file["categories"], str(gt_json))
    _check_images(wanted, given, gt_json, pred_json)
    for path, records in ((gt_json, wanted), (pred_json, given)):
        _check_pngs(path, next(iter(records.values())))

    qualities = {"panoptic": PanopticQuality(categories)}
    if boundary:
        qualities["boundary"] = PanopticQuality(categories)
    match = _PhotoMatcher(gt_json, pred_json, categories, official, boundary)
    pairs = [(record, given[image_id]) for image_id, record in wanted.items()]
    matchings = map_in_order(match, pairs, default_workers(len(pairs)) if workers is None else workers)
    for of_photo in tqdm(matchings, desc="panoptic quality", unit="image", total=len(pairs)):
        for quality, matching in zip(qualities.values(), of_photo, strict=True):
            quality.add_matching(matching)
    return {name: quality.summary() for name, quality in qualities.items()}


@dataclass(frozen=True, slots=True)
class _PhotoMatcher:
    """Reads the maps of one photo and matches their segments; goes to the worker processes."""

    gt_json: Path
    pred_json: Path
    categories: Categories
    official: bool
    boundary: bool

    def __call__(self, records: tuple[Record, Record]) -> list[Matching]:
        """The matching by IoU and, if wanted, the one by boundaries, of a record of the truth and one given."""
        wanted, given = records
        if self.official:
            wanted = self._as_the_official_tool_reads(wanted)
        truth_map, truth_segments = read_panoptic(wanted, self.gt_json, self.categories)
        prediction_map, segments = read_panoptic(given, self.pred_json, self.categories)
        # The semantic map plays no part in panoptic quality.
        nothing = np.full(truth_map.shape, VOID, dtype=np.int16)
        truth = Truth(wanted["image_id"], wanted["file_name"], truth_map, truth_segments, nothing)
        prediction = Prediction(given["image_id"], given["file_name"], prediction_map, segments)
        kinds = (False, True) if self.boundary else (False,)
        matchings = [match_segments(prediction, truth, self.categories, self.official, kind) for kind in kinds]
        if not self.official:
            self._check_areas(wanted, matchings[0].overlaps.truth_area)
        return matchings

    def _check_areas(self, record: Record, counted: dict[int, int]) -> None:
        for info in record["segments_info"]:
            if info.get("area", counted[info["id"]]) != counted[info["id"]]:
                raise DataError(
                    f"{self._where(record, info)}: 'area' says {info['area']}, but {counted[info['id']]} pixels of the "
                    f"PNG have this id: mend the record, or use --official to believe it"
                )

    def _as_the_official_tool_reads(self, record: Record) -> Record:
        """Without the segments that it counts nowhere, and certain to have the areas that it believes."""
        known = [s for s in record["segments_info"] if s["category_id"] in self.categories]
        for info in known:
            if not isinstance(info.get("area"), int | float):
                raise DataError(f"{self._where(record, info)}: has no 'area', which --official believes: add it")
        return {**record, "segments_info": known}

    def _where(self, record: Record, info: dict[str, Any]) -> str:
        return f"{self.gt_json}: image {record['image_id']}, segment {info['id']}"


def _check_images(wanted: dict[int, Record], given: dict[int, Record], gt_json: Path, pred_json: Path) -> None:
    if not wanted:
        raise DataError(f"{gt_json}: 'annotations' is empty: there is nothing to score")
    for image_id in wanted:
        if image_id not in given:
            raise DataError(f"{pred_json}: image {image_id} of {gt_json.name} has no annotation: predict every image")
    if surplus := len(given.keys() - wanted.keys()):
        logger.warning("%s: %d images are not in %s and are not scored", pred_json, surplus, gt_json.name)


def _check_pngs(path: Path, record: Record) -> None:
    """Refuses a file whose PNGs are nowhere; that single ones are missing is noticed when they are read."""
    folder = path.with_suffix("")
    if not folder.is_dir() and not (png_folder(path) / record["file_name"]).is_file():
        raise PlaceError(f"{folder}: there is no such folder: the PNGs of {path.name} must lie there or beside it")


def _content(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise PlaceError(f"{path}: there is no such file: check the path")
    content = read_json(path)
    if not isinstance(content, dict):
        kind = "list, as detections are" if isinstance(content, list) else type(content).__name__
        raise DataError(f"{path}: is a {kind}, not an object: give a COCO panoptic file")
    return content
