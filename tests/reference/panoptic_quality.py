"""The slow, obvious twin of the panoptic evaluator: a mask for every segment, a loop over every pair."""

from collections import Counter

import numpy as np

from upsnet.structures.results import Prediction, Truth


def slow_overlaps(first: np.ndarray, second: np.ndarray) -> list[tuple[int, int, int]]:
    """(id of first, id of second, pixels that have both), ascending: a loop over the pixels."""
    counts: Counter = Counter()
    for y in range(first.shape[0]):
        for x in range(first.shape[1]):
            counts[int(first[y, x]), int(second[y, x])] += 1
    return [(a, b, counts[a, b]) for a, b in sorted(counts)]


def slow_match(prediction: Prediction, truth: Truth) -> dict:
    """{"tp": {(truth id, prediction id): IoU}, "fn": ids, "fp": ids, "ignored": ids}."""
    void = truth.segment_map == 0
    matched = {}
    for wanted in truth.segments:
        for given in prediction.segments:
            if wanted.is_crowd or wanted.semantic_id != given.semantic_id:
                continue
            wanted_mask = truth.segment_map == wanted.id
            given_mask = prediction.segment_map == given.id
            both = (wanted_mask & given_mask).sum()
            either = (wanted_mask | (given_mask & ~void)).sum()
            if both / either > 0.5:
                matched[wanted.id, given.id] = both / either
    found = [truth_id for truth_id, _ in matched]
    used = [prediction_id for _, prediction_id in matched]

    false_positives, ignored = set(), set()
    for given in prediction.segments:
        if given.id in used:
            continue
        given_mask = prediction.segment_map == given.id
        crowds = [s for s in truth.segments if s.is_crowd and s.semantic_id == given.semantic_id]
        excuse = void.copy()
        if crowds:
            excuse |= truth.segment_map == crowds[-1].id
        if (given_mask & excuse).sum() / given_mask.sum() > 0.5:
            ignored.add(given.id)
        else:
            false_positives.add(given.id)
    missed = {s.id for s in truth.segments if not s.is_crowd and s.id not in found}
    return {"tp": matched, "fn": missed, "fp": false_positives, "ignored": ignored}


def slow_summary(pairs: list[tuple[Prediction, Truth]], num_classes: int) -> dict:
    """PQ, SQ, RQ (0..1) over all classes that occur, and [PQ, TP, FP, FN] of each class."""
    per_class = {}
    for semantic_id in range(num_classes):
        ious, tp, fp, fn = 0.0, 0, 0, 0
        for prediction, truth in pairs:
            result = slow_match(prediction, truth)
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
            per_class[semantic_id] |= {"tp": tp, "fp": fp, "fn": fn}
    means = {key: sum(row[key] for row in per_class.values()) / len(per_class) for key in ("pq", "sq", "rq")}
    return {**means, "n": len(per_class), "per_class": per_class}
