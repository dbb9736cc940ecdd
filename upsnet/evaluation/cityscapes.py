"""Average precision of masks by Cityscapes' rule, computed by the official functions.

It differs from COCO's in what counts: instances of at least 100 pixels; a false positive is forgiven if it lies in
void, in groups and in small instances to more than the IoU threshold; recall-precision curves are integrated as they
are. The official program reads a picture for each detection; here only its pixel counts are formed, photo by photo.
"""

import warnings
from collections.abc import Callable
from copy import copy
from math import isnan
from typing import Any

import numpy as np
from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as official
from cityscapesscripts.helpers.labels import id2label, labels
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from tqdm import tqdm

from upsnet.structures.categories import Categories
from upsnet.structures.errors import DataError
from upsnet.structures.results import Detections, Prediction, Truth

VOID_IDS = tuple(label.id for label in labels if label.ignoreInEval and label.id >= 0)
"""Labels that are not scored. Caravans and trailers with a number of their own (29001) are no void, as officially."""


class CityscapesAP:
    """Gathers what each detection shares with each true instance; memory grows by some numbers for each detection."""

    def __init__(self, categories: Categories, instance_ids_of: Callable[[str], NDArray[Any]]) -> None:
        """
        Args:
            categories: their ids are Cityscapes' label ids.
            instance_ids_of: the official instance-id image (H×W) of a photo's file name.
        """
        self._categories = categories
        self._instance_ids_of = instance_ids_of
        self._options = copy(official.args)
        official.setInstanceLabels(self._options)
        self._matches: dict[int, dict[str, Any]] = {}

    def add(self, prediction: Prediction, truth: Truth) -> None:
        """Counts the pixels of one photo; errors as in `measure`."""
        self.count(self.measure(prediction, truth))

    def measure(self, prediction: Prediction, truth: Truth) -> dict[str, Any]:
        """What `count` wants of one photo, as json holds it.

        Raises:
            DataError: the instance-id image is missing or damaged, or the masks have another size.
        """
        if prediction.instances is None:
            raise ValueError(f"image {prediction.image_id}: the prediction has no instances")
        ids = self._instance_ids_of(truth.file_name)
        for mask in prediction.instances.masks:
            if tuple(mask["size"]) != ids.shape:
                raise DataError(
                    f"image {truth.image_id}: a mask has {mask['size'][0]}×{mask['size'][1]} pixels (height × width), "
                    f"the truth {ids.shape[0]}×{ids.shape[1]}: predictions must have the photo's own size"
                )
        return {"image_id": truth.image_id, "matches": self._match(prediction.instances, ids)}

    def count(self, measured: dict[str, Any]) -> None:
        """Keeps what `measure` has found."""
        self._matches[measured["image_id"]] = measured["matches"]

    def summary(self) -> dict[str, Any]:
        """Scores × 100 in full precision.

        Returns:
            `ap`: mean over IoU 0.5:0.95 and the classes that occur; `ap50`: at 0.5; `per_class`: {"category_id",
            "name", "ap", "ap50"}. None where no true instance counts.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a mean over nothing
            precisions = [
                [self._precision(name, overlap) for overlap in self._options.overlaps.tolist()]
                for name in tqdm(self._options.instLabels, desc="Cityscapes' precision", unit="class", leave=False)
            ]
            found = official.computeAverages(np.array([precisions]), self._options)
        return {
            "ap": _percent(found["allAp"]),
            "ap50": _percent(found["allAp50%"]),
            "per_class": [
                {
                    "category_id": category.id,
                    "name": category.name,
                    "ap": _percent(found["classes"][category.name]["ap"]),
                    "ap50": _percent(found["classes"][category.name]["ap50%"]),
                }
                for category in self._categories
                if category.is_thing
            ],
        }

    def _precision(self, class_name: str, overlap: float) -> float:
        """Average precision of one class at one IoU threshold, 0..1; nan where no true instance counts."""
        options = copy(self._options)
        options.instLabels, options.overlaps = [class_name], [overlap]
        try:
            return float(official.evaluateMatches(self._matches, options)[0, 0, 0])
        except IndexError:
            # The official program stops where nothing is found and every detection is forgiven.
            return 0.0

    def _match(self, found: Detections, ids: NDArray[Any]) -> dict[str, Any]:
        """One photo in the form in which the official program keeps it."""
        truths: dict[str, list[dict[str, Any]]] = {name: [] for name in self._options.instLabels}
        predictions: dict[str, list[dict[str, Any]]] = {name: [] for name in self._options.instLabels}
        for value, count in zip(*(column.tolist() for column in np.unique(ids, return_counts=True)), strict=True):
            name = id2label[value if value < 1000 else value // 1000].name
            if name in truths:
                # The last two are for scores by distance, which need depth maps.
                truths[name].append({"instID": value, "pixelCount": count, "medDist": -1, "distConf": 0.0})
        matched: dict[int, list[dict[str, Any]]] = {}
        for thing_class, score, mask in zip(found.classes.tolist(), found.scores.tolist(), found.masks, strict=True):
            name = self._categories.of_thing(thing_class).name
            shared = _pixels_by_id(mask, ids)
            prediction = {"pixelCount": int(shared.sum()), "confidence": score}
            touched = [truth for truth in truths[name] if shared[truth["instID"]]]
            for truth in touched:
                both = {**prediction, "intersection": int(shared[truth["instID"]])}
                matched.setdefault(truth["instID"], []).append(both)
            if prediction["pixelCount"]:
                prediction["voidIntersection"] = int(shared[list(VOID_IDS)].sum())
                prediction["matchedGt"] = [{**truth, "intersection": int(shared[truth["instID"]])} for truth in touched]
                predictions[name].append(prediction)
        for truth in (truth for of_class in truths.values() for truth in of_class):
            truth["matchedPred"] = matched.get(truth["instID"], [])
        return {"groundTruth": truths, "prediction": predictions}


def _pixels_by_id(mask: dict[str, Any], ids: NDArray[Any]) -> NDArray[np.int64]:
    """How many pixels of a mask (COCO RLE) have each id, from 0 to the greatest that occurs, VOID_IDS at least."""
    x, y, width, height = (int(side) for side in coco_mask.toBbox(mask))
    cut = (slice(y, y + height), slice(x, x + width))
    inside = coco_mask.decode(mask)[cut].astype(bool)
    return np.bincount(ids[cut][inside], minlength=max(int(ids.max()), *VOID_IDS) + 1)


def _percent(value: float) -> float | None:
    return None if isnan(value) else 100.0 * float(value)
