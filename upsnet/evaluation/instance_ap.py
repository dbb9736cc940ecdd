"""Average precision of boxes and masks by pycocotools (COCO's rule)."""

import contextlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from upsnet.evaluation.json_files import JsonListWriter, read_json
from upsnet.structures.categories import Categories
from upsnet.structures.results import Detections, Prediction, Truth

KINDS = {"bbox": "box", "segm": "mask"}
"""pycocotools' name of a kind of score → its name in the summary."""

logger = logging.getLogger("upsnet")

NUMBERS = ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l", "ar1", "ar10", "ar100", "ar_s", "ar_m", "ar_l")


class InstanceAP:
    """Detections go to disk photo by photo, as COCO results json; the score is made from there at the end."""

    def __init__(self, categories: Categories, folder: Path, store: bool = True) -> None:
        """
        Args:
            folder: of `bbox_results.json` and `segm_results.json`.
            store: False: the detections come from these two files, which are scored as they are.

        Raises:
            PlaceError: the folder cannot be written.
        """
        self._categories = categories
        self._files = {kind: result_file(folder, kind) for kind in KINDS}
        self._writers = {kind: JsonListWriter(path) for kind, path in self._files.items()} if store else {}
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._closed = False

    def add(self, prediction: Prediction, truth: Truth) -> None:
        """Stores the detections of one photo, if they are to be stored, and keeps its true instances."""
        if prediction.instances is None:
            raise ValueError(f"image {prediction.image_id}: the prediction has no instances")
        for kind, writer in self._writers.items():
            for record in to_coco(prediction.instances, truth.image_id, self._categories, kind):
                writer.write(record)
        height, width = truth.segment_map.shape
        self._images.append({"id": truth.image_id, "height": height, "width": width})
        for annotation in truth.annotations:
            # Ids that were made up photo by photo may repeat; pycocotools needs them unique and not 0.
            self._annotations.append({**annotation, "image_id": truth.image_id, "id": len(self._annotations) + 1})

    def close(self) -> None:
        """Gives the result files their names; `summary` does it, too.

        Raises:
            PlaceError: the disk is full.
        """
        if not self._closed:
            self._closed = True
            for writer in self._writers.values():
                writer.close()

    def discard(self) -> None:
        """Removes what was written so far, after an error elsewhere."""
        if not self._closed:
            self._closed = True
            for writer in self._writers.values():
                writer.discard()

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Scores × 100 in full precision.

        Returns:
            `box` and `mask`, each with `NUMBERS`: AP over IoU 0.5:0.95, at 0.5, at 0.75, of small,
            medium and large objects; recall with 1, 10 and 100 detections, and by size. None where no object counts.
        """
        self.close()
        logger.info("average precision: %d images, %d true instances", len(self._images), len(self._annotations))
        categories = [{"id": c.id, "name": c.name} for c in self._categories if c.is_thing]
        return {
            KINDS[kind]: coco_scores(self._images, self._annotations, categories, path, kind)
            for kind, path in self._files.items()
        }


def result_file(folder: Path, kind: str) -> Path:
    """Where the detections of a kind ("bbox" or "segm") lie in a result folder."""
    return folder / f"{kind}_results.json"


def to_coco(instances: Detections, image_id: int, categories: Categories, kind: str) -> list[dict[str, Any]]:
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
            record["segmentation"] = _text_rle(instances.masks[i])
        records.append({**record, "score": score})
    return records


def _text_rle(rle: dict[str, Any]) -> dict[str, Any]:
    counts = rle["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(length) for length in rle["size"]], "counts": text}


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
