"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", CVPR 2019, equations 1 and 2), by COCO's official rule.

A predicted segment matches a true one of the same class if their IoU is strictly above 0.5. The union leaves out
pixels without truth (void). A match is then unique, so that no assignment problem arises.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upsnet.structures.categories import Categories
from upsnet.structures.errors import DataError
from upsnet.structures.results import Prediction, Segment, Truth

MAP_VOID = 0
"""Id of pixels without a segment, in truth and prediction alike."""


class Overlaps:
    """How many pixels the segments of two H×W maps share; areas come from the maps alone."""

    def __init__(self, truth_map: NDArray[np.int32], prediction_map: NDArray[np.int32]) -> None:
        pairs = (truth_map.astype(np.int64) << 32) | prediction_map
        keys, counts = np.unique(pairs.ravel(), return_counts=True)
        truth_ids, prediction_ids = (keys >> 32).tolist(), (keys & 0xFFFFFFFF).tolist()
        self.pixels = dict(zip(zip(truth_ids, prediction_ids, strict=True), counts.tolist(), strict=True))
        self.truth_area: Counter[int] = Counter()
        self.prediction_area: Counter[int] = Counter()
        for (truth_id, prediction_id), count in self.pixels.items():
            self.truth_area[truth_id] += count
            self.prediction_area[prediction_id] += count

    def of(self, truth_id: int, prediction_id: int) -> int:
        """Pixels that lie in both segments."""
        return self.pixels.get((truth_id, prediction_id), 0)

    def iou(self, truth_id: int, prediction_id: int) -> float:
        """Intersection over union, void pixels left out of the union; 0..1."""
        shared = self.of(truth_id, prediction_id)
        in_void = self.of(MAP_VOID, prediction_id)
        return shared / (self.truth_area[truth_id] + self.prediction_area[prediction_id] - shared - in_void)


@dataclass(frozen=True, slots=True)
class Match:
    """A true positive; iou is in (0.5, 1]."""

    truth: Segment
    prediction: Segment
    iou: float


@dataclass(slots=True)
class Matching:
    """What became of every segment of one photo.

    matched: true positives. missed: false negatives. invented: false positives. ignored: predictions that lie mostly
    in void or in a crowd of their class and count nowhere. True crowds stand in none of the lists.
    """

    overlaps: Overlaps
    matched: list[Match] = field(default_factory=list)
    missed: list[Segment] = field(default_factory=list)
    invented: list[Segment] = field(default_factory=list)
    ignored: list[Segment] = field(default_factory=list)


def match_segments(prediction: Prediction, truth: Truth, categories: Categories) -> Matching:
    """Matches the segments of one photo.

    A true segment without a match is missed unless it is a crowd. A prediction without a match is invented unless
    strictly more than half of it lies in void or in the crowd of its class (where a class has several crowds, the
    official tool looks at the last one only, and so does this).

    Raises:
        DataError: the maps differ in size, or a map and its segments do not fit (an id without segment, a segment
            without pixels, an id given twice, an unknown class).
    """
    overlaps = _count_overlaps(prediction, truth)
    truth_segments = _by_id(truth.segments, overlaps.truth_area, categories, "truth", truth.image_id)
    predicted = _by_id(prediction.segments, overlaps.prediction_area, categories, "prediction", truth.image_id)

    matching = Matching(overlaps)
    found: set[int] = set()
    used: set[int] = set()
    for truth_id, prediction_id in overlaps.pixels:
        wanted, given = truth_segments.get(truth_id), predicted.get(prediction_id)
        if wanted is None or given is None or wanted.is_crowd or wanted.semantic_id != given.semantic_id:
            continue
        iou = overlaps.iou(truth_id, prediction_id)
        if iou > 0.5:
            matching.matched.append(Match(wanted, given, iou))
            found.add(truth_id)
            used.add(prediction_id)

    matching.missed = [s for s in truth.segments if not s.is_crowd and s.id not in found]
    last_crowd = {segment.semantic_id: segment.id for segment in truth.segments if segment.is_crowd}
    for segment in prediction.segments:
        if segment.id in used:
            continue
        excused = overlaps.of(MAP_VOID, segment.id)
        if segment.semantic_id in last_crowd:
            excused += overlaps.of(last_crowd[segment.semantic_id], segment.id)
        mostly_excused = 2 * excused > overlaps.prediction_area[segment.id]
        (matching.ignored if mostly_excused else matching.invented).append(segment)
    return matching


def _count_overlaps(prediction: Prediction, truth: Truth) -> Overlaps:
    if prediction.segment_map is None:
        raise ValueError(f"image {prediction.image_id}: the prediction has no segment map")
    found, wanted = prediction.segment_map.shape, truth.segment_map.shape
    if found != wanted:
        raise DataError(
            f"image {truth.image_id}: the prediction has {found[0]}×{found[1]} pixels (height × width), the truth "
            f"{wanted[0]}×{wanted[1]}: predictions must have the photo's own size"
        )
    return Overlaps(truth.segment_map, prediction.segment_map)


def _by_id(
    segments: list[Segment], area: Counter[int], categories: Categories, side: str, image_id: int
) -> dict[int, Segment]:
    """The segments by id, after the check that segments and map hold the same ids."""
    by_id: dict[int, Segment] = {}
    for segment in segments:
        where = f"image {image_id}, {side} segment {segment.id}"
        if segment.id == MAP_VOID:
            raise DataError(f"{where}: id 0 stands for pixels without label: give the segment another id")
        if segment.id in by_id:
            raise DataError(f"{where}: two segments have this id: every segment needs an id of its own")
        if segment.id not in area:
            raise DataError(f"{where}: no pixel of the map has this id: remove the record or mend the PNG")
        if not 0 <= segment.semantic_id < len(categories):
            raise DataError(f"{where}: the class table has {len(categories)} classes, none is {segment.semantic_id}")
        by_id[segment.id] = segment
    for segment_id in area:
        if segment_id != MAP_VOID and segment_id not in by_id:
            raise DataError(
                f"image {image_id}, {side} segment {segment_id}: the map holds this id but no record describes it: "
                f"add the record or mend the PNG"
            )
    return by_id


def quality_of(matching: Matching) -> float:
    """PQ of one photo over all its segments, whatever their class: sum of IoU / (TP + FP/2 + FN/2), 0..1.

    1 where nothing was to be found and nothing was invented. Meant for finding the worst photos.
    """
    weight = len(matching.matched) + 0.5 * len(matching.invented) + 0.5 * len(matching.missed)
    return sum(match.iou for match in matching.matched) / weight if weight else 1.0


class PanopticQuality:
    """Gathers PQ over a data set; memory does not grow with the number of photos."""

    def __init__(self, categories: Categories) -> None:
        self._categories = categories
        self._iou = np.zeros(len(categories), dtype=np.float64)
        # Rows: true positives, false positives, false negatives.
        self._counts = np.zeros((3, len(categories)), dtype=np.int64)

    def add(self, prediction: Prediction, truth: Truth) -> Matching:
        """Counts one photo and returns how its segments were matched; errors as in `match_segments`."""
        matching = match_segments(prediction, truth, self._categories)
        for match in matching.matched:
            self._iou[match.truth.semantic_id] += match.iou
            self._counts[0, match.truth.semantic_id] += 1
        for row, segments in ((1, matching.invented), (2, matching.missed)):
            for segment in segments:
                self._counts[row, segment.semantic_id] += 1
        return matching

    def summary(self) -> dict[str, Any]:
        """PQ, SQ and RQ × 100, in full precision.

        Returns:
            `all`, `things`, `stuff`: {"pq", "sq", "rq", "n"}, means over the n classes with TP + FP + FN > 0 (None
            where n is 0). `per_class`, in semantic order: {"category_id", "name", "isthing", "pq", "sq", "rq", "tp",
            "fp", "fn"}; a class that never occurs has zeros.
        """
        per_class = [self._of_class(i) for i in range(len(self._categories))]
        return {
            "all": _mean(per_class),
            "things": _mean(row for row in per_class if row["isthing"]),
            "stuff": _mean(row for row in per_class if not row["isthing"]),
            "per_class": per_class,
        }

    def _of_class(self, semantic_id: int) -> dict[str, Any]:
        category = self._categories[semantic_id]
        tp, fp, fn = self._counts[:, semantic_id].tolist()
        iou = float(self._iou[semantic_id])
        weight = tp + 0.5 * fp + 0.5 * fn
        return {
            "category_id": category.id,
            "name": category.name,
            "isthing": category.is_thing,
            "pq": 100.0 * (iou / weight) if weight else 0.0,
            "sq": 100.0 * (iou / tp) if tp else 0.0,
            "rq": 100.0 * (tp / weight) if weight else 0.0,
            "tp": tp,
            "fp": fp,
            "fn": fn,
        }


def _mean(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    present = [row for row in rows if row["tp"] + row["fp"] + row["fn"] > 0]
    means = {key: sum(row[key] for row in present) / len(present) if present else None for key in ("pq", "sq", "rq")}
    return {**means, "n": len(present)}
