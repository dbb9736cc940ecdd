"""Why panoptic quality is lost: every false negative and false positive gets one cause.

IoU is that of the panoptic quality (void left out of the union). Causes, first that fits:

* confused: true segment and prediction have different classes and IoU > 0.5. A wrong name on the right pixels.
* badly outlined: true segment and prediction have the same class and 0.1 ≤ IoU ≤ 0.5; also a prediction that overlaps
  so with a segment that another prediction matched, and two things that were taken for one.
* missed (a true segment) or invented (a prediction): everything else.

Crowds are no partners. The threshold of 0.1 is that of TIDE (Bolya et al., ECCV 2020) for "nothing there".

The causes add up. With D = TP + FP/2 + FN/2,  100 - PQ = 100/D · (sum over matches of (1 - IoU) + FP/2 + FN/2):
each false segment costs 50/D points, each match 100 · (1 - IoU)/D, which is booked as "imprecise".
"""

from collections import Counter
from typing import Any

import numpy as np

from upsnet.evaluation.panoptic_quality import Matching
from upsnet.structures.categories import Categories
from upsnet.structures.results import Prediction, Segment, Truth

CAUSES = ("missed", "invented", "badly_outlined", "confused")
NOTABLE_IOU = 0.1


class ErrorAnalysis:
    """Gathers the causes over a data set; memory does not grow with the number of photos."""

    def __init__(self, categories: Categories) -> None:
        self._categories = categories
        self._causes = np.zeros((len(categories), len(CAUSES)), dtype=np.int64)
        self._matches = np.zeros(len(categories), dtype=np.int64)
        self._iou = np.zeros(len(categories), dtype=np.float64)
        self._confusions: list[Counter[int]] = [Counter() for _ in categories]

    def add(self, prediction: Prediction, truth: Truth, matching: Matching) -> dict[tuple[str, int], str]:
        """Counts one photo.

        Returns:
            The cause of every unmatched segment: ("truth", id) or ("prediction", id) → one of `CAUSES`.
        """
        for match in matching.matched:
            self._matches[match.truth.semantic_id] += 1
            self._iou[match.truth.semantic_id] += match.iou
        predicted = {segment.id: segment for segment in prediction.segments}
        wanted = {segment.id: segment for segment in truth.segments if not segment.is_crowd}
        # The segments of the other side that each segment touches, with the IoU.
        partners: dict[tuple[str, int], list[tuple[Segment, float]]] = {}
        for truth_id, prediction_id in matching.overlaps.pixels:
            if truth_id in wanted and prediction_id in predicted:
                iou = matching.overlaps.iou(truth_id, prediction_id)
                partners.setdefault(("truth", truth_id), []).append((predicted[prediction_id], iou))
                partners.setdefault(("prediction", prediction_id), []).append((wanted[truth_id], iou))

        causes = {}
        sides = (("truth", "missed", matching.missed), ("prediction", "invented", matching.invented))
        for side, otherwise, segments in sides:
            for segment in segments:
                cause, other = _cause_of(segment, partners.get((side, segment.id), []), otherwise)
                causes[side, segment.id] = cause
                self._causes[segment.semantic_id, CAUSES.index(cause)] += 1
                if other is not None:
                    self._confusions[segment.semantic_id][other.semantic_id] += 1
        return causes

    def summary(self) -> dict[str, Any]:
        """What was lost where.

        Returns:
            `per_class`, in semantic order, only classes that occur: {"category_id", "name", "isthing", "pq", "matched",
            "missed", "invented", "badly_outlined", "confused", "lost", "confused_with"}. The counts are segments, true
            and predicted ones together. `lost`: PQ points (0..100) by cause and "imprecise", together 100 - pq.
            `confused_with`: [{"category_id", "name", "count"}], most frequent first.
            `all`, `things`, `stuff`: mean points lost by cause over those classes, {} where there is none.
        """
        weights = self._matches + 0.5 * self._causes.sum(axis=1)
        per_class = [self._of_class(i, weights[i]) for i in np.flatnonzero(weights > 0).tolist()]
        return {
            "all": _mean_lost(per_class),
            "things": _mean_lost([row for row in per_class if row["isthing"]]),
            "stuff": _mean_lost([row for row in per_class if not row["isthing"]]),
            "per_class": per_class,
        }

    def _of_class(self, semantic_id: int, weight: float) -> dict[str, Any]:
        category = self._categories[semantic_id]
        counts = dict(zip(CAUSES, self._causes[semantic_id].tolist(), strict=True))
        lost = {cause: float(50.0 * count / weight) for cause, count in counts.items()}
        lost["imprecise"] = float(100.0 * (self._matches[semantic_id] - self._iou[semantic_id]) / weight)
        confused_with = [
            {"category_id": self._categories[other].id, "name": self._categories[other].name, "count": count}
            for other, count in self._confusions[semantic_id].most_common()
        ]
        return {
            "category_id": category.id,
            "name": category.name,
            "isthing": category.is_thing,
            "pq": float(100.0 * (self._iou[semantic_id] / weight)),
            "matched": int(self._matches[semantic_id]),
            **counts,
            "lost": lost,
            "confused_with": confused_with,
        }


def _cause_of(segment: Segment, partners: list[tuple[Segment, float]], otherwise: str) -> tuple[str, Segment | None]:
    """The cause and, for a confusion, the segment that it was confused with."""
    for other, iou in partners:
        if other.semantic_id != segment.semantic_id and iou > 0.5:
            return "confused", other
    if any(other.semantic_id == segment.semantic_id and iou >= NOTABLE_IOU for other, iou in partners):
        return "badly_outlined", None
    return otherwise, None


def _mean_lost(rows: list[dict[str, Any]]) -> dict[str, float]:
    if not rows:
        return {}
    return {cause: sum(row["lost"][cause] for row in rows) / len(rows) for cause in (*CAUSES, "imprecise")}
