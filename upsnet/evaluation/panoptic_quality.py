"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", CVPR 2019, equations 1 and 2), by COCO's official rule.

A predicted segment matches a true one of the same class if their IoU is strictly above 0.5. The union leaves out
pixels without truth (void). A match is then unique, so that no assignment problem arises.

Boundary panoptic quality (Cheng et al., "Boundary IoU", CVPR 2021) takes the smaller of the IoU of the segments and the
IoU of their boundaries; nothing else differs.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upsnet.evaluation.boundary import boundary_map
from upsnet.operators.overlaps import count_overlaps
from upsnet.structures.categories import Categories
from upsnet.structures.errors import DataError
from upsnet.structures.panoptic_png import VOID_ID
from upsnet.structures.results import Prediction, Segment, Truth


class Overlaps:
    """How many pixels the segments of two H×W maps share; areas come from the maps alone."""

    def __init__(self, truth_map: NDArray[np.int32], prediction_map: NDArray[np.int32]) -> None:
        self.pixels, self.truth_area, self.prediction_area = count_overlaps(truth_map, prediction_map)

    def of(self, truth_id: int, prediction_id: int) -> int:
        """Pixels that lie in both segments."""
        return self.pixels.get((truth_id, prediction_id), 0)

    def iou(self, truth_id: int, prediction_id: int) -> float:
        """Intersection over union, void pixels left out of the union; 0..1 with counted areas."""
        shared = self.of(truth_id, prediction_id)
        in_void = self.of(VOID_ID, prediction_id)
        union = self.truth_area[truth_id] + self.prediction_area[prediction_id] - shared - in_void
        return shared / union if union else math.inf  # only a union of believed areas can be 0


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


def match_segments(
    prediction: Prediction, truth: Truth, categories: Categories, official: bool = False, boundary: bool = False
) -> Matching:
    """Matches the segments of one photo.

    A true segment without a match is missed unless it is a crowd. A prediction without a match is invented unless
    strictly more than half of it lies in void or in the crowd of its class (where a class has several crowds, the
    official tool looks at the last one only, and so does this).

    Args:
        official: what contradicts itself in the truth gives the number that the official tool gives, even an IoU above
            1: `Segment.area` of the truth is believed; ids of its map without segment are neither void nor segment,
            its segments without pixels are missed; of segments with one id the last counts; id 0 may be a segment.
        boundary: IoU is the smaller of the segments' and their boundaries'.

    Raises:
        DataError: the maps differ in size, or a map and its segments do not fit (an id without segment, a segment
            without pixels, an id given twice, an unknown class); with `official`, only the first two and the unknown
            class are refused, and the first two only of the prediction.
    """
    maps = _maps(prediction, truth)
    overlaps = Overlaps(*maps)
    image = f"image {truth.image_id}"
    truth_segments = _by_id(truth.segments, categories, f"{image}, truth segment", official)
    predicted = _by_id(prediction.segments, categories, f"{image}, prediction segment", official)
    if official:
        overlaps.truth_area |= {segment.id: segment.area for segment in truth_segments.values()}
    else:
        _check_map(truth_segments, overlaps.truth_area, f"{image}, truth segment")
    _check_map(predicted, overlaps.prediction_area, f"{image}, prediction segment")

    matching = Matching(overlaps)
    matching.matched = _matches(overlaps, truth_segments, predicted)
    if boundary:
        edges = Overlaps(*(boundary_map(segment_map) for segment_map in maps))
        capped = [replace(m, iou=min(m.iou, edges.iou(m.truth.id, m.prediction.id))) for m in matching.matched]
        matching.matched = [match for match in capped if match.iou > 0.5]
    _sort_the_rest(matching, truth_segments.values(), predicted.values())
    return matching


def _matches(overlaps: Overlaps, truth_segments: dict[int, Segment], predicted: dict[int, Segment]) -> list[Match]:
    """The true positives."""
    matches = []
    for truth_id, prediction_id in overlaps.pixels:
        wanted, given = truth_segments.get(truth_id), predicted.get(prediction_id)
        if wanted is None or given is None or wanted.is_crowd or wanted.semantic_id != given.semantic_id:
            continue
        iou = overlaps.iou(truth_id, prediction_id)
        if iou > 0.5:
            matches.append(Match(wanted, given, iou))
    return matches


def _sort_the_rest(matching: Matching, truth_segments: Collection[Segment], predicted: Collection[Segment]) -> None:
    """Sorts what is not matched into missed, invented and ignored segments."""
    overlaps = matching.overlaps
    found = {match.truth.id for match in matching.matched}
    used = {match.prediction.id for match in matching.matched}
    matching.missed = [s for s in truth_segments if not s.is_crowd and s.id not in found]
    last_crowd = {s.semantic_id: s.id for s in truth_segments if s.is_crowd}
    for segment in predicted:
        if segment.id in used:
            continue
        excused = overlaps.of(VOID_ID, segment.id)
        if segment.semantic_id in last_crowd:
            excused += overlaps.of(last_crowd[segment.semantic_id], segment.id)
        mostly_excused = 2 * excused > overlaps.prediction_area[segment.id]
        (matching.ignored if mostly_excused else matching.invented).append(segment)


def _maps(prediction: Prediction, truth: Truth) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The segment maps of truth and prediction, which must have one size."""
    if prediction.segment_map is None:
        raise ValueError(f"image {prediction.image_id}: the prediction has no segment map")
    found, wanted = prediction.segment_map.shape, truth.segment_map.shape
    if found != wanted:
        raise DataError(
            f"image {truth.image_id}: the prediction has {found[0]}×{found[1]} pixels (height × width), the truth "
            f"{wanted[0]}×{wanted[1]}: predictions must have the photo's own size"
        )
    return truth.segment_map, prediction.segment_map


def _by_id(segments: list[Segment], categories: Categories, where: str, official: bool) -> dict[int, Segment]:
    """The segments by id, in their order. Where the official tool does not look, it keeps the last of a doubled id."""
    by_id: dict[int, Segment] = {}
    for segment in segments:
        if segment.id == VOID_ID and not official:
            raise DataError(f"{where} 0: id 0 stands for pixels without label: give the segment another id")
        if segment.id in by_id and not official:
            raise DataError(f"{where} {segment.id}: two segments have this id: every segment needs an id of its own")
        if not 0 <= segment.semantic_id < len(categories):
            raise DataError(
                f"{where} {segment.id}: the class table has {len(categories)} classes, none is {segment.semantic_id}"
            )
        by_id[segment.id] = segment
    return by_id


def _check_map(segments: dict[int, Segment], area: dict[int, int], where: str) -> None:
    """Segments and map must hold the same ids."""
    for segment_id in segments:
        if segment_id not in area:
            raise DataError(f"{where} {segment_id}: no pixel of the map has this id: remove the record or mend the PNG")
    for segment_id in area:
        if segment_id != VOID_ID and segment_id not in segments:
            raise DataError(
                f"{where} {segment_id}: the map holds this id but no record describes it: add the record or mend the "
                f"PNG"
            )


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
        self.add_matching(matching)
        return matching

    def add_matching(self, matching: Matching) -> None:
        """Counts one photo whose segments are matched already."""
        self.count(_measured(matching))

    def measure(self, prediction: Prediction, truth: Truth) -> dict[str, Any]:
        """What `count` wants of one photo, as json holds it; errors as in `match_segments`."""
        return _measured(match_segments(prediction, truth, self._categories))

    def count(self, measured: dict[str, Any]) -> None:
        """Counts what `measure` has found."""
        for semantic_id, iou in measured["matched"]:
            self._iou[semantic_id] += iou
            self._counts[0, semantic_id] += 1
        for row, kind in ((1, "invented"), (2, "missed")):
            for semantic_id in measured[kind]:
                self._counts[row, semantic_id] += 1

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


def _measured(matching: Matching) -> dict[str, Any]:
    """`matched`: class and IoU of each; `invented`, `missed`: the class of each."""
    return {
        "matched": [(match.truth.semantic_id, match.iou) for match in matching.matched],
        "invented": [segment.semantic_id for segment in matching.invented],
        "missed": [segment.semantic_id for segment in matching.missed],
    }


def _mean(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    present = [row for row in rows if row["tp"] + row["fp"] + row["fn"] > 0]
    means = {key: sum(row[key] for row in present) / len(present) if present else None for key in ("pq", "sq", "rq")}
    return {**means, "n": len(present)}
