"""Mean intersection over union of semantic maps."""

from typing import Any

import numpy as np

from upsnet.structures.categories import Categories
from upsnet.structures.errors import DataError
from upsnet.structures.results import Prediction, Truth


class SemanticIoU:
    """Gathers the confusion matrix over all pixels that have a label; memory does not grow with the photos."""

    def __init__(self, categories: Categories) -> None:
        self._categories = categories
        size = len(categories)
        # Rows: truth. Columns: prediction; the last one counts labelled pixels without a predicted class.
        self._confusion = np.zeros((size, size + 1), dtype=np.int64)

    def add(self, prediction: Prediction, truth: Truth) -> None:
        """Counts one photo; errors as in `measure`."""
        self.count(self.measure(prediction, truth))

    def measure(self, prediction: Prediction, truth: Truth) -> dict[str, list[int]]:
        """What `count` wants of one photo, as json holds it: the cells of the matrix that are not 0, and their pixels.

        Raises:
            DataError: the maps differ in size, or one holds a class that the table does not have.
        """
        if prediction.semantic_map is None:
            raise ValueError(f"image {prediction.image_id}: the prediction has no semantic map")
        found, wanted = prediction.semantic_map.shape, truth.semantic_map.shape
        if found != wanted:
            raise DataError(
                f"image {truth.image_id}: the semantic map has {found[0]}×{found[1]} pixels (height × width), the "
                f"truth {wanted[0]}×{wanted[1]}: predictions must have the photo's own size"
            )
        size = len(self._categories)
        labelled = truth.semantic_map >= 0
        rows = truth.semantic_map[labelled].astype(np.int64)
        columns = prediction.semantic_map[labelled].astype(np.int64)
        columns[columns < 0] = size
        for side, classes, last in (("truth", rows, size - 1), ("prediction", columns, size)):
            if classes.size and classes.max() > last:
                raise DataError(
                    f"image {truth.image_id}: the semantic map of the {side} holds class {classes.max()}, the class "
                    f"table has {size} classes"
                )
        counts = np.bincount(rows * (size + 1) + columns)
        cells = counts.nonzero()[0]
        return {"cells": cells.tolist(), "pixels": counts[cells].tolist()}

    def count(self, measured: dict[str, list[int]]) -> None:
        """Counts what `measure` has found."""
        cells, pixels = (np.asarray(measured[name], dtype=np.int64) for name in ("cells", "pixels"))
        self._confusion.reshape(-1)[cells] += pixels

    def summary(self) -> dict[str, Any]:
        """Scores × 100, in full precision.

        Returns:
            `miou`: mean over all classes, one that never occurs counts 0. `miou_present`: mean over the classes that
            occur in truth or prediction. `aacc`: correct pixels. `macc`: mean accuracy of the classes that occur in
            the truth. `per_class`, in semantic order: {"category_id", "name", "iou", "acc", "pixels"}, pixels being
            those of the truth; IoU = tp / max(1, truth + prediction - tp). A mean over nothing is None.
        """
        correct = self._confusion.diagonal()
        truth = self._confusion.sum(axis=1)
        union = truth + self._confusion[:, :-1].sum(axis=0) - correct
        iou = 100.0 * correct / np.maximum(union, 1)
        accuracy = 100.0 * correct / np.maximum(truth, 1)
        columns = zip(self._categories, iou.tolist(), accuracy.tolist(), truth.tolist(), strict=True)
        per_class = [
            {"category_id": category.id, "name": category.name, "iou": of_iou, "acc": of_accuracy, "pixels": pixels}
            for category, of_iou, of_accuracy, pixels in columns
        ]
        return {
            "miou": float(iou.mean()) if truth.any() else None,
            "miou_present": float(iou[union > 0].mean()) if truth.any() else None,
            "aacc": float(100.0 * correct.sum() / truth.sum()) if truth.any() else None,
            "macc": float(accuracy[truth > 0].mean()) if truth.any() else None,
            "per_class": per_class,
        }
