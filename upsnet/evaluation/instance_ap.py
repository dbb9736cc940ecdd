"""Average precision of boxes and masks by pycocotools (COCO's rule)."""

import contextlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from upsnet.evaluation.json_files import read_json
from upsnet.structures.categories import Categories
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
        if prediction.instances is None:
            raise ValueError(f"image {prediction.image_id}: the prediction has no instances")
        height, width = truth.segment_map.shape
        self._images.append({"id": truth.image_id, "height": height, "width": width})
        for annotation in truth.annotations:
            kept = {key: value for key, value in annotation.items() if key in KEPT}
            if self._kind == "segm":
                # Polygons take many times the memory of the RLE that pycocotools makes of them anyway.
                kept["segmentation"] = _rle(annotation["segmentation"], height, width)
            # Ids that were made up photo by photo may repeat; pycocotools needs them unique and not 0.
            self._annotations.append({**kept, "image_id": truth.image_id, "id": len(self._annotations) + 1})

    def summary(self) -> dict[str, float | None]:
        """Scores × 100 in full precision, from the finished results file.

        Returns:
            `NUMBERS`: AP over IoU 0.5:0.95, at 0.5, at 0.75, of small, medium and large objects; recall with 1, 10
            and 100 detections, and by size. None where no object counts.

        Raises:
            PlaceError: the results cannot be read.
            DataError: they are damaged.
        """
        logger.info(
            "average precision (%s): %d images, %d true instances",
            self._kind,
            len(self._images),
            len(self._annotations),
        )
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

    Args:
        images: records of all images that were tested, with `id`, `height` and `width`.
        annotations: COCO instance annotations of these images.
        categories: COCO category records.
        results: COCO results json.
        kind: "bbox" or "segm".
    """
    records = read_json(results)
    common = {"images": list(images), "categories": list(categories)}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports by print
        truth = _coco({**common, "annotations": list(annotations)})
        # loadRes does not take an empty list.
        found = truth.loadRes(records) if records else _coco({**common, "annotations": []})
        scores = COCOeval(truth, found, kind)
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    return {
        name: None if value < 0 else 100.0 * float(value) for name, value in zip(NUMBERS, scores.stats, strict=True)
    }


def _coco(dataset: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco
