"""The slow, obvious twin of the panoptic evaluator: a mask for every segment, a loop over every pair."""

import math
from collections import Counter

import numpy as np

from upsnet.structures.results import Prediction, Segment, Truth


def slow_overlaps(first: np.ndarray, second: np.ndarray) -> list[tuple[int, int, int]]:
    """(id of first, id of second, pixels that have both), ascending: a loop over the pixels."""
    counts: Counter = Counter()
    for y in range(first.shape[0]):
        for x in range(first.shape[1]):
            counts[int(first[y, x]), int(second[y, x])] += 1
    return [(a, b, counts[a, b]) for a, b in sorted(counts)]


def slow_boundary(mask: np.ndarray, distance: int) -> np.ndarray:
    """The pixels of a mask with a pixel outside it, or beyond the edge of the picture, within a square around them."""
    height, width = mask.shape
    boundary = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            for v in range(y - distance, y + distance + 1):
                for u in range(x - distance, x + distance + 1):
                    is_outside = not (0 <= v < height and 0 <= u < width) or not mask[v, u]
                    boundary[y, x] |= mask[y, x] and is_outside
    return boundary


def slow_iou(given: np.ndarray, wanted: np.ndarray, void: np.ndarray) -> float:
    """IoU of two masks; pixels without truth are not in the union."""
    return (given & wanted).sum() / (wanted | (given & ~void)).sum()


def believing_iou(given: np.ndarray, wanted: np.ndarray, void: np.ndarray, area: float) -> float:
    """The official tool's: with the true segment's area as its record says."""
    shared = (given & wanted).sum()
    union = given.sum() + area - shared - (given & void).sum()
    return float(shared / union) if union else math.inf


def slow_match(prediction: Prediction, truth: Truth, official: bool = False, boundary: int = 0) -> dict:
    """{"tp": {(truth id, prediction id): IoU}, "fn": ids, "fp": ids, "ignored": ids}.

    official: believe areas, and let the last of several segments with one id stand where the first stood.
    boundary: the distance of boundary quality, 0 without.
    """
    void = truth.segment_map == 0
    wanted_segments, given_segments = truth.segments, prediction.segments
    if official:
        wanted_segments, given_segments = last_of_each(wanted_segments), last_of_each(given_segments)
    matched = {}
    for wanted in wanted_segments:
        for given in given_segments:
            wanted_mask = truth.segment_map == wanted.id
            given_mask = prediction.segment_map == given.id
            if wanted.is_crowd or wanted.semantic_id != given.semantic_id or not (wanted_mask & given_mask).any():
                continue
            if official:
                iou = believing_iou(given_mask, wanted_mask, void, wanted.area)
            else:
                iou = slow_iou(given_mask, wanted_mask, void)
            if boundary:
                edges = [slow_boundary(mask, boundary) for mask in (given_mask, wanted_mask)]
                iou = min(iou, slow_iou(*edges, void))
            if iou > 0.5:
                matched[wanted.id, given.id] = iou
    found = [truth_id for truth_id, _ in matched]
    used = [prediction_id for _, prediction_id in matched]

    false_positives, ignored = set(), set()
    for given in given_segments:
        if given.id in used:
            continue
        given_mask = prediction.segment_map == given.id
        excused = (given_mask & void).sum()
        crowds = [s for s in wanted_segments if s.is_crowd and s.semantic_id == given.semantic_id]
        if crowds:
            excused += (given_mask & (truth.segment_map == crowds[-1].id)).sum()
        if excused / given_mask.sum() > 0.5:
            ignored.add(given.id)
        else:
            false_positives.add(given.id)
    missed = {s.id for s in wanted_segments if not s.is_crowd and s.id not in found}
    return {"tp": matched, "fn": missed, "fp": false_positives, "ignored": ignored}


def last_of_each(segments: list[Segment]) -> list[Segment]:
    """For each id, in the order of first appearance, the last segment that has it."""
    order = []
    for segment in segments:
        if segment.id not in order:
            order.append(segment.id)
    return [[segment for segment in segments if segment.id == segment_id][-1] for segment_id in order]


def slow_summary(pairs: list[tuple[Prediction, Truth]], num_classes: int, official: bool = False) -> dict:
    """PQ, SQ, RQ (0..1) over all classes that occur, and {pq, sq, rq, iou (the sum), tp, fp, fn} of each class."""
    per_class = {}
    results = [slow_match(prediction, truth, official) for prediction, truth in pairs]
    for semantic_id in range(num_classes):
        ious, tp, fp, fn = 0.0, 0, 0, 0
        for (prediction, truth), result in zip(pairs, results, strict=True):
            class_of_truth = {s.id: s.semantic_id for s in truth.segments}
            class_of_prediction = {s.id: s.semantic_id for s in prediction.segments}
            for (truth_id, _), iou in result["tp"].items():
                if class_of_truth[truth_id] == semantic_id:
                    tp, ious = tp + 1, ious + iou
            fn += sum(class_of_truth[i] == semantic_id for i in result["fn"])
            fp += sum(class_of_prediction[i] == semantic_id for i in result["fp"])
        if tp + fp + fn:
            weight = tp + 0.5 * fp + 0.5 * fn
            per_class[semantic_id] = {"pq": ious / weight, "sq": ious / tp if tp else 0.0, "rq": tp / weight}
            per_class[semantic_id] |= {"iou": ious, "tp": tp, "fp": fp, "fn": fn}
    means = {key: sum(row[key] for row in per_class.values()) / len(per_class) for key in ("pq", "sq", "rq")}
    return {**means, "n": len(per_class), "per_class": per_class}
