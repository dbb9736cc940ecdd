import json

import numpy as np
import pytest
from PIL import Image

from tests.reference.panoptic_files import as_prediction, read_categories, read_truths
from tests.reference.panoptic_quality import slow_match, slow_summary
from upsnet.evaluation.panoptic_quality import PanopticQuality, match_segments, quality_of
from upsnet.structures.categories import Categories, Category
from upsnet.structures.errors import DataError
from upsnet.structures.results import Prediction, Segment, Truth, segments_of
from upsnet.structures.sample import VOID

CATEGORIES = Categories([Category(10 * i + 1, f"class {i}", i >= 2, (i, i, i)) for i in range(4)])


def truth_of(ids, classes, crowds=()):
    """A truth from a map, {id: class} and the ids of the crowds, in the order of `classes`."""
    ids = np.atleast_2d(np.asarray(ids, dtype=np.int32))
    area = {i: int((ids == i).sum()) for i in classes}
    segments = [Segment(i, c, area[i], (0, 0, 0, 0), None, i in crowds) for i, c in classes.items()]
    return Truth(1, "photo.jpg", ids, segments, np.full(ids.shape, VOID, np.int16))


def prediction_of(ids, classes):
    ids = np.atleast_2d(np.asarray(ids, dtype=np.int32))
    return Prediction(1, "photo.jpg", ids, [Segment(i, c, 999, (0, 0, 0, 0)) for i, c in classes.items()])


def ids_of(segments):
    return {segment.id for segment in segments}


def outcome(prediction, truth):
    matching = match_segments(prediction, truth, CATEGORIES)
    matched = {(m.truth.id, m.prediction.id): m.iou for m in matching.matched}
    named = (ids_of(matching.missed), ids_of(matching.invented), ids_of(matching.ignored))
    return {"tp": matched, **dict(zip(("fn", "fp", "ignored"), named, strict=True))}


def random_map(draws, ids, shape):
    """Rectangles on void; some ids may get no pixel and are left out."""
    canvas = np.zeros(shape, dtype=np.int32)
    for i in ids:
        y, x = draws.integers(0, shape[0]), draws.integers(0, shape[1])
        canvas[y : y + draws.integers(1, 9), x : x + draws.integers(1, 9)] = i
    return canvas


def random_pair(seed):
    """A truth with crowds and void and a prediction that resembles it; ids use all 24 bits."""
    draws = np.random.default_rng(seed)
    shape = (int(draws.integers(1, 14)), int(draws.integers(1, 14)))
    ids = draws.choice(2**24 - 1, size=draws.integers(0, 7), replace=False) + 1
    truth_map = random_map(draws, ids.tolist(), shape)
    prediction_map = np.roll(truth_map, draws.integers(0, 3), axis=int(draws.integers(0, 2)))
    prediction_map[random_map(draws, [1], shape) == 1] = draws.choice([0, 5, *ids.tolist()])
    present = [i for i in np.unique(truth_map).tolist() if i]
    classes = {i: int(draws.integers(0, 4)) for i in draws.permutation(present).tolist()}
    crowds = [i for i in present if classes[i] >= 2 and draws.random() < 0.4]
    given = [i for i in np.unique(prediction_map).tolist() if i]
    same = {i: classes[i] if i in classes and draws.random() < 0.8 else int(draws.integers(0, 4)) for i in given}
    return prediction_of(prediction_map, same), truth_of(truth_map, classes, crowds)


def test_equals_slow_twin():
    pairs = [random_pair(seed) for seed in range(400)]
    quality = PanopticQuality(CATEGORIES)
    kinds = {"tp": 0, "fn": 0, "fp": 0, "ignored": 0}
    for prediction, truth in pairs:
        fast, slow = outcome(prediction, truth), slow_match(prediction, truth)
        assert fast["tp"].keys() == slow["tp"].keys()
        assert all(abs(iou - slow["tp"][pair]) < 1e-12 for pair, iou in fast["tp"].items())
        assert all(fast[kind] == slow[kind] for kind in ("fn", "fp", "ignored"))
        quality.add(prediction, truth)
        kinds = {kind: count + len(fast[kind]) for kind, count in kinds.items()}
    assert min(kinds.values()) > 50, "the random cases must exercise every outcome"
    summary, slow_means = quality.summary(), slow_summary(pairs, 4)
    for key in ("pq", "sq", "rq"):
        assert summary["all"][key] == pytest.approx(100 * slow_means[key], abs=1e-10)
    for semantic_id, row in enumerate(summary["per_class"]):
        expected = slow_means["per_class"][semantic_id]
        assert [row[k] for k in ("tp", "fp", "fn")] == [expected[k] for k in ("tp", "fp", "fn")]


def test_half_is_no_match_and_more_is():
    truth = truth_of([7, 7, 7, 8, 8, 8], {7: 0, 8: 1})
    half = outcome(prediction_of([1, 1, 1, 1, 1, 1], {1: 0}), truth)
    assert half == {"tp": {}, "fn": {7, 8}, "fp": {1}, "ignored": set()}
    more = outcome(prediction_of([1, 1, 1, 1, 1, 0], {1: 0}), truth)
    assert more["tp"] == {(7, 1): 0.6}


def test_void_is_not_in_the_union():
    truth = truth_of([7, 7, 0, 0, 0], {7: 0})
    assert outcome(prediction_of([1, 1, 1, 1, 1], {1: 0}), truth)["tp"] == {(7, 1): 1.0}


def test_prediction_in_void_is_ignored_only_beyond_half():
    truth = truth_of([0, 0, 7, 7, 7, 7, 7, 7], {7: 0})
    assert outcome(prediction_of([1, 1, 1, 1, 0, 0, 0, 0], {1: 1}), truth)["fp"] == {1}
    assert outcome(prediction_of([1, 1, 1, 0, 0, 0, 0, 0], {1: 1}), truth)["ignored"] == {1}


def test_crowds():
    truth = truth_of([5, 5, 5, 6, 6, 6, 9, 9], {5: 2, 6: 2, 9: 0}, crowds=(5, 6))
    # The official tool excuses the last crowd of a class only.
    assert outcome(prediction_of([0, 0, 0, 1, 1, 0, 2, 2], {1: 2, 2: 0}), truth)["ignored"] == {1}
    assert outcome(prediction_of([1, 1, 0, 0, 0, 0, 2, 2], {1: 2, 2: 0}), truth)["fp"] == {1}
    # A crowd excuses its own class only, cannot be matched and cannot be missed.
    other = outcome(prediction_of([0, 0, 0, 1, 1, 1, 2, 2], {1: 3, 2: 0}), truth)
    assert other["fp"] == {1} and other["fn"] == set()
    # Void and crowd together excuse.
    truth = truth_of([0, 5, 7, 7], {5: 2, 7: 0}, crowds=(5,))
    assert outcome(prediction_of([1, 1, 1, 0], {1: 2}), truth)["ignored"] == {1}


def test_nothing_predicted_and_nothing_true():
    nothing = prediction_of(np.zeros((3, 4)), {})
    assert outcome(nothing, truth_of(np.ones((3, 4)), {1: 0}))["fn"] == {1}
    assert outcome(nothing, truth_of(np.zeros((3, 4)), {})) == {"tp": {}, "fn": set(), "fp": set(), "ignored": set()}
    assert quality_of(match_segments(nothing, truth_of(np.zeros((3, 4)), {}), CATEGORIES)) == 1.0
    assert outcome(prediction_of(np.zeros((0, 0)), {}), truth_of(np.zeros((0, 0)), {}))["tp"] == {}


def test_quality_of_one_photo():
    truth = truth_of([7, 7, 7, 8, 8, 9], {7: 0, 8: 1, 9: 2})
    matching = match_segments(prediction_of([1, 1, 0, 2, 2, 3], {1: 0, 2: 1, 3: 3}), truth, CATEGORIES)
    assert quality_of(matching) == pytest.approx((2 / 3 + 1) / (2 + 0.5 + 0.5))


def test_absent_classes_and_kinds_are_left_out_of_the_means():
    quality = PanopticQuality(CATEGORIES)
    truth = truth_of([7, 7, 8], {7: 0, 8: 1})
    quality.add(prediction_of([1, 1, 2], {1: 0, 2: 0}), truth)
    summary = quality.summary()
    assert summary["all"]["n"] == 2 and summary["stuff"]["pq"] == pytest.approx(100 * (1 / 1.5) / 2)
    assert summary["things"] == {"pq": None, "sq": None, "rq": None, "n": 0}
    assert summary["per_class"][2]["pq"] == 0.0 and summary["per_class"][1]["fn"] == 1


def test_areas_are_counted_not_believed():
    truth = truth_of([7, 7, 7, 7], {7: 0})
    truth.segments[0].area = 2
    assert outcome(prediction_of([1, 1, 1, 0], {1: 0}), truth)["tp"] == {(7, 1): 0.75}


@pytest.mark.parametrize(
    ("prediction", "words"),
    [
        (prediction_of([1, 4], {1: 0}), "image 1, prediction segment 4: the map holds this id but no record"),
        (prediction_of([1, 1], {1: 0, 3: 0}), "image 1, prediction segment 3: no pixel"),
        (prediction_of([1, 1], {1: 44}), "image 1, prediction segment 1: the class table has 4"),
        (prediction_of([1, 1, 1], {1: 0}), r"image 1: the prediction has 1×3 pixels .* the truth 1×2"),
        (prediction_of([0, 1], {0: 0, 1: 0}), "segment 0: id 0 stands for"),
    ],
)
def test_contradictions_are_refused(prediction, words):
    with pytest.raises(DataError, match=words):
        match_segments(prediction, truth_of([7, 7], {7: 0}), CATEGORIES)


def test_contradictions_of_the_truth_are_refused():
    good = prediction_of([1, 1], {1: 0})
    with pytest.raises(DataError, match="image 1, truth segment 8: the map holds"):
        match_segments(good, truth_of([7, 8], {7: 0}), CATEGORIES)
    with pytest.raises(DataError, match="image 1, truth segment 8: no pixel"):
        match_segments(good, truth_of([7, 7], {7: 0, 8: 0}), CATEGORIES)
    doubled = truth_of([7, 7], {7: 0})
    doubled.segments.append(doubled.segments[0])
    with pytest.raises(DataError, match="segment 7: two segments"):
        match_segments(good, doubled, CATEGORIES)


def shifted(ids, pixels):
    moved = np.zeros_like(ids)
    moved[:, pixels:] = ids[:, :-pixels]
    return moved


def merged_things(truth, categories):
    """All things of a class become the one with the lowest id."""
    ids = truth.segment_map.copy()
    lowest = {}
    for segment in sorted(truth.segments, key=lambda s: s.id):
        if categories[segment.semantic_id].is_thing and not segment.is_crowd:
            ids[ids == segment.id] = lowest.setdefault(segment.semantic_id, segment.id)
    return as_prediction(truth, ids)


def second_to_person(truth, categories):
    ordered = sorted(s.id for s in truth.segments if not s.is_crowd)
    return as_prediction(truth, classes=dict.fromkeys(ordered[1::2], categories.semantic_id(1)))


def without_small(truth):
    small = [s.id for s in truth.segments if s.area < 2000]
    return as_prediction(truth, np.where(np.isin(truth.segment_map, small), 0, truth.segment_map))


RULES = {
    "identity": lambda truth, categories: as_prediction(truth),
    "shift_right_8": lambda truth, categories: as_prediction(truth, shifted(truth.segment_map, 8)),
    "shift_right_32": lambda truth, categories: as_prediction(truth, shifted(truth.segment_map, 32)),
    "drop_area_below_2000": lambda truth, categories: without_small(truth),
    "merge_things_per_class": merged_things,
    "second_segments_to_person": second_to_person,
}


def test_numbers_of_the_official_tool_on_real_photos(shared):
    path = shared("data/coco_mini") / "annotations" / "panoptic_val2017.json"
    cases = json.loads((shared("data/eval_cases") / "coco_mini_val_pq_expected.json").read_text())
    categories, truths = read_categories(path), read_truths(path)
    assert cases["expected"].keys() == RULES.keys()
    for name, expected in cases["expected"].items():
        quality = PanopticQuality(categories)
        ignored = 0
        for truth in truths:
            ignored += len(quality.add(RULES[name](truth, categories), truth).ignored)
        summary = quality.summary()
        for group, numbers in expected.items():
            got = summary[group.lower()]
            for key in ("pq", "sq", "rq"):
                assert got[key] / 100 == pytest.approx(numbers[key], abs=cases["tolerance"]), (name, group, key)
            assert got["n"] == numbers["n"]
        if name == "identity":
            assert summary["all"]["pq"] == 100.0 and ignored == 0
            assert sum(row["tp"] for row in summary["per_class"]) == sum(
                not s.is_crowd for truth in truths for s in truth.segments
            )


def test_numbers_of_the_original(shared):
    """Two-channel results (class, instance) of the original on two photos, scored by it and by the official tool."""
    fixture = np.load(shared("reference/oracle_fixtures") / "pq_coco.npz")
    sample = shared("data/eval_cases") / "panopticapi_sample"
    path = sample / "panoptic_examples.json"
    quality = PanopticQuality(read_categories(path))
    for i, truth in enumerate(read_truths(path)):
        result = fixture[f"out::pan_2ch{i}"].astype(np.int32)
        ids = np.where(result[..., 0] == 255, 0, 1 + 256 * result[..., 0] + result[..., 1])
        classes = {int(j): int(j - 1) // 256 for j in np.unique(ids) if j}
        quality.add(Prediction(truth.image_id, "", ids, segments_of(ids, classes)), truth)
    meta = json.loads(str(fixture["meta_json"]))
    summary = quality.summary()
    for source in ("original", "panopticapi"):
        for group in ("All", "Things", "Stuff"):
            for key, expected in meta[source][group].items():
                got = summary[group.lower()][key]
                assert (got if key == "n" else got / 100) == pytest.approx(expected, abs=1e-12)
    for semantic_id, expected in meta["original"]["per_class"].items():
        row = summary["per_class"][int(semantic_id)]
        assert row["pq"] / 100 == pytest.approx(expected["pq"], abs=1e-12)
        assert [row[k] for k in ("tp", "fp", "fn")] == [expected.get(k, 0) for k in ("tp", "fp", "fn")]


def test_numbers_of_deeplab2(shared):
    folder = shared("data/eval_cases") / "deeplab2_pq"
    content = json.loads((folder / "expected.json").read_text())
    colors = {tuple(map(int, rgb.split(","))): c for rgb, c in content["pred_class_colors_rgb"].items()}
    categories = Categories([Category(i + 1, str(i), True, (0, 0, 0)) for i in range(6)])

    def picture(name, mode):
        return np.asarray(Image.open(folder / name).convert(mode), dtype=np.int32)

    for case in content["cases"][:2]:
        quality = PanopticQuality(categories)
        for name in case["images"]:
            truth_file = next(f for f in content["gt_instance_to_class"] if f.startswith(name))
            class_of = {int(i): c for i, c in content["gt_instance_to_class"][truth_file].items()}
            instances = picture(truth_file, "L")
            truth_map = np.zeros_like(instances)
            for i, c in class_of.items():
                truth_map[instances == i] = 1 + i if c else 0
            truth = truth_of(truth_map, {1 + i: c - 1 for i, c in class_of.items() if c})
            rgb = picture(f"{name}_pred_class.png", "RGB")
            classes = np.zeros(rgb.shape[:2], np.int32)
            for color, c in colors.items():
                classes[(rgb == color).all(axis=-1)] = c
            ids = np.where(classes > 0, 256 * classes + picture(f"{name}_pred_instance.png", "L"), 0)
            given = {int(i): int(i) // 256 - 1 for i in np.unique(ids) if i}
            quality.add(prediction_of(ids, given), truth)
        summary = quality.summary()
        present = [row for row in summary["per_class"] if row["tp"] + row["fp"] + row["fn"]]
        got = [summary["all"][key] / 100 for key in ("pq", "sq", "rq")]
        got += [np.mean([row[key] for row in present]) for key in ("tp", "fn", "fp")]
        assert got == pytest.approx(case["expected"], abs=5e-5), case["name"]
