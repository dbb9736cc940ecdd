"""Average precision of boxes and masks by COCO's rule: pycocotools, or faster-coco-eval where it is installed.

The two agree to 1e-12, far beyond the digits that are printed; tests/evaluation/test_instance_ap.py compares them.
"""

import contextlib
import io
import logging
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from upsnet.evaluation.detection_files import text_rle
from upsnet.evaluation.json_files import read_json
from upsnet.structures.categories import Categories
from upsnet.structures.errors import DataError
from upsnet.structures.results import Prediction, Truth

logger = logging.getLogger("upsnet")

NUMBERS = ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l", "ar1", "ar10", "ar100", "ar_s", "ar_m", "ar_l")

KEPT = {"category_id", "bbox", "area", "iscrowd"}
"""What pycocotools looks at in a true instance, besides its mask."""


class InstanceAP:
    """Gathers the true instances photo by photo; the score is made at the end, from the detections on disk."""

    def __init__(self, categories: Categories, results: Path, kind: str) -> None:
        """
        Args:
            results: COCO results json; it is read by `summary` only.
            kind: "bbox" or "segm".
        """
        self._categories, self._results, self._kind = categories, results, kind
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, prediction: Prediction, truth: Truth) -> None:
        """Keeps the true instances of one photo."""
        self.count(self.measure(prediction, truth))

    def measure(self, prediction: Prediction, truth: Truth) -> dict[str, Any]:
        """What `count` wants of one photo, as json holds it."""
        if prediction.instances is None:
            raise ValueError(f"image {prediction.image_id}: the prediction has no instances")
        height, width = truth.segment_map.shape
        annotations = []
        for annotation in truth.annotations:
            kept = {key: value for key, value in annotation.items() if key in KEPT}
            if self._kind == "segm":
                # Polygons take many times the memory of the RLE that pycocotools makes of them anyway.
                kept["segmentation"] = text_rle(_rle(annotation["segmentation"], height, width))
            annotations.append({**kept, "image_id": truth.image_id})
        return {"image": {"id": truth.image_id, "height": height, "width": width}, "annotations": annotations}

    def count(self, measured: dict[str, Any]) -> None:
        """Keeps what `measure` has found."""
        self._images.append(measured["image"])
        for annotation in measured["annotations"]:
            # Ids that were made up photo by photo may repeat; pycocotools needs them unique and not 0.
            self._annotations.append({**annotation, "id": len(self._annotations) + 1})

    def summary(self) -> dict[str, float | None]:
        """Scores × 100 in full precision, from the finished results file.

        Returns:
            `NUMBERS`: AP over IoU 0.5:0.95, at 0.5, at 0.75, of small, medium and large objects; recall with 1, 10
            and 100 detections, and by size. None where no object counts.

        Raises:
            PlaceError: the results cannot be read.
            DataError: they are damaged.
        """
        categories = [{"id": c.id, "name": c.name} for c in self._categories if c.is_thing]
        return coco_scores(self._images, self._annotations, categories, self._results, self._kind)


def _rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """As pycocotools' `annToRLE`."""
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def coco_scores(
    images: Sequence[dict[str, Any]],
    annotations: Sequence[dict[str, Any]],
    categories: Sequence[dict[str, Any]],
    results: Path,
    kind: str,
) -> dict[str, float | None]:
    """The twelve numbers of the COCO summary × 100, None where pycocotools says -1.

    pycocotools is asked class by class, since the classes do not touch each other before the last mean: what it keeps
    for each class and image would otherwise be the largest thing in memory.

    Args:
        images: records of all images that were tested, with `id`, `height` and `width`.
        annotations: COCO instance annotations of these images.
        categories: COCO category records.
        results: COCO results json.
        kind: "bbox" or "segm".

    Raises:
        PlaceError: the results cannot be read.
        DataError: they are damaged, or hold an image that was not tested.
    """
    image_ids = {image["id"] for image in images}
    found = _by_category(_read_results(results, "bbox" if kind == "bbox" else "segmentation", image_ids))
    wanted = _by_category(annotations)
    tool, data_class, eval_class = _tool()
    logger.info("average precision (%s) by %s: %d images, %d true instances", kind, tool, len(images), len(annotations))
    category_ids = sorted(category["id"] for category in categories)
    if not category_ids:
        return dict.fromkeys(NUMBERS)
    precision, recall = [], []
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports by print
        for category_id in tqdm(category_ids, desc=f"average precision ({kind})", unit="class", dynamic_ncols=True):
            true_records, records = wanted.pop(category_id, []), found.pop(category_id, [])
            touched = {record["image_id"] for record in (*true_records, *records)}
            common = {"images": [i for i in images if i["id"] in touched], "categories": [{"id": category_id}]}
            truth = _indexed(data_class(), {**common, "annotations": true_records})
            # loadRes does not take an empty list.
            given = truth.loadRes(records) if records else _indexed(data_class(), {**common, "annotations": []})
            scores = eval_class(truth, given, kind)
            scores.evaluate()
            scores.accumulate()
            precision.append(scores.eval["precision"])
            recall.append(scores.eval["recall"])
        total = COCOeval(iouType=kind)
        total.eval = {"precision": np.concatenate(precision, axis=2), "recall": np.concatenate(recall, axis=1)}
        total.summarize()
    return {name: None if value < 0 else 100.0 * float(value) for name, value in zip(NUMBERS, total.stats, strict=True)}


def _tool() -> tuple[str, Any, Any]:
    """Name, data class and evaluation class of the tool that counts."""
    try:
        from faster_coco_eval import COCO as FasterCOCO
        from faster_coco_eval import COCOeval_faster
    except ImportError:
        return f"pycocotools {version('pycocotools')}", COCO, COCOeval
    return f"faster-coco-eval {version('faster-coco-eval')}", FasterCOCO, COCOeval_faster


def _indexed(data: Any, dataset: dict[str, Any]) -> Any:
    data.dataset = dataset
    data.createIndex()
    return data


def _by_category(records: Iterable[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["category_id"], []).append(record)
    return groups


def _read_results(path: Path, key: str, image_ids: set[int]) -> list[dict[str, Any]]:
    records = read_json(path)
    needed = {"image_id", "category_id", "score", key}
    if not isinstance(records, list) or not all(isinstance(r, dict) and needed <= r.keys() for r in records):
        raise DataError(
            f"{path}: is not a list of COCO results, each with {', '.join(sorted(needed))}: run the test again"
        )
    for record in records:
        if record["image_id"] not in image_ids:
            raise DataError(f"{path}: image {record['image_id']} is not among the images tested: run the test again")
    return records
