import json
import math

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from tests.reference.panoptic_files import as_prediction, read_categories, read_truths
from tests.reference.panoptic_pairs import CATEGORIES, prediction_of, random_pair, strange_pair, truth_of
from tests.reference.panoptic_quality import slow_match, slow_summary
from upsnet.evaluation.panoptic_quality import PanopticQuality, match_segments, quality_of
from upsnet.structures.categories import Categories, Category
from upsnet.structures.errors import DataError
from upsnet.structures.results import Prediction, segments_of


def ids_of(segments):
    return {segment.id for segment in segments}


def outcome(prediction, truth, **options):
    matching = match_segments(prediction, truth, CATEGORIES, **options)
    matched = {(m.truth.id, m.prediction.id): m.iou for m in matching.matched}
    named = (ids_of(matching.missed), ids_of(matching.invented), ids_of(matching.ignored))
    return {"tp": matched, **dict(zip(("fn", "fp", "ignored"), named, strict=True))}


def assert_equals_twin(pairs, official):
    """Every photo alone, and the sums over all."""
    quality = PanopticQuality(CATEGORIES)
    kinds = {"tp": 0, "fn": 0, "fp": 0, "ignored": 0}
    for prediction, truth in pairs:
        fast, slow = outcome(prediction, truth, official=official), slow_match(prediction, truth, official)
        assert fast["tp"].keys() == slow["tp"].keys()
        assert all(iou == slow["tp"][pair] or abs(iou - slow["tp"][pair]) < 1e-12 for pair, iou in fast["tp"].items())
        assert all(fast[kind] == slow[kind] for kind in ("fn", "fp", "ignored"))
        quality.add_matching(match_segments(prediction, truth, CATEGORIES, official))
        kinds = {kind: count + len(fast[kind]) for kind, count in kinds.items()}
    assert min(kinds.values()) > 100, "the random cases must exercise every outcome"
    return quality.summary(), slow_summary(pairs, len(CATEGORIES), official)


def test_a_thousand_random_pairs_equal_the_slow_twin():
    summary, slow = assert_equals_twin([random_pair(seed) for seed in range(1000)], official=False)
    for key in ("pq", "sq", "rq"):
        assert summary["all"][key] == pytest.approx(100 * slow[key], abs=1e-10)
    for semantic_id, row in enumerate(summary["per_class"]):
        expected = slow["per_class"][semantic_id]
        assert [row[k] for k in ("tp", "fp", "fn")] == [expected[k] for k in ("tp", "fp", "fn")]
        assert row["sq"] / 100 * row["tp"] == pytest.approx(expected["iou"], rel=1e-12)


def test_a_thousand_contradictions_equal_the_slow_twin_or_are_refused():
    """With `official` the numbers are those of a tool that notices none of them."""
    pairs = [strange_pair(seed) for seed in range(1000)]
    finite = [pair for pair in pairs if math.inf not in slow_match(*pair, official=True)["tp"].values()]
    assert 0 < len(pairs) - len(finite) < 100
    summary, slow = assert_equals_twin(finite, official=True)
    for semantic_id, row in enumerate(summary["per_class"]):
        expected = slow["per_class"][semantic_id]
        assert [row[k] for k in ("tp", "fp", "fn")] == [expected[k] for k in ("tp", "fp", "fn")]
        assert row["sq"] / 100 * row["tp"] == pytest.approx(expected["iou"], rel=1e-12)
    for prediction, truth in pairs:
        official = outcome(prediction, truth, official=True)["tp"]
        assert official.keys() == slow_match(prediction, truth, official=True)["tp"].keys()
    assert sum(is_refused(*pair) for pair in pairs) > 500


def is_refused(prediction, truth):
    ids = [segment.id for segment in truth.segments]
    given = [segment.id for segment in prediction.segments]
    fits = sorted(ids) == [i for i in np.unique(truth.segment_map).tolist() if i] and len(set(given)) == len(given)
    if fits and 0 not in given:
        outcome(prediction, truth)
        return False
    with pytest.raises(DataError):
        outcome(prediction, truth)
    return True


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


def test_only_the_last_crowd_of_a_class_excuses():
    truth = truth_of([5, 5, 5, 6, 6, 6], {5: 2, 6: 2}, crowds=(5, 6))
    assert outcome(prediction_of([0, 0, 0, 1, 1, 0], {1: 2}), truth)["ignored"] == {1}
    assert outcome(prediction_of([1, 1, 0, 0, 0, 0], {1: 2}), truth)["fp"] == {1}
    # Last in the order of the records, whatever the ids.
    truth = truth_of([5, 5, 5, 6, 6, 6], {6: 2, 5: 2}, crowds=(5, 6))
    assert outcome(prediction_of([1, 1, 0, 0, 0, 0], {1: 2}), truth)["ignored"] == {1}


def test_a_crowd_excuses_its_own_class_only():
    truth = truth_of([5, 5, 5, 9], {5: 2, 9: 0}, crowds=(5,))
    assert outcome(prediction_of([1, 1, 1, 2], {1: 3, 2: 0}), truth)["fp"] == {1}
    assert outcome(prediction_of([1, 1, 1, 2], {1: 2, 2: 0}), truth)["ignored"] == {1}


def test_a_crowd_is_neither_matched_nor_missed():
    truth = truth_of([5, 5, 5], {5: 2}, crowds=(5,))
    assert outcome(prediction_of([1, 1, 1], {1: 2}), truth) == {"tp": {}, "fn": set(), "fp": set(), "ignored": {1}}
    assert outcome(prediction_of([0, 0, 0], {}), truth) == {"tp": {}, "fn": set(), "fp": set(), "ignored": set()}


def test_prediction_in_a_crowd_is_ignored_only_beyond_half():
    truth = truth_of([5, 5, 7, 7], {5: 2, 7: 0}, crowds=(5,))
    assert outcome(prediction_of([1, 1, 1, 1], {1: 2}), truth)["fp"] == {1}
    assert outcome(prediction_of([1, 1, 1, 0], {1: 2}), truth)["ignored"] == {1}


def test_void_and_crowd_excuse_together():
    truth = truth_of([0, 5, 7, 7], {5: 2, 7: 0}, crowds=(5,))
    assert outcome(prediction_of([1, 1, 1, 0], {1: 2}), truth)["ignored"] == {1}
    assert outcome(prediction_of([1, 0, 1, 0], {1: 2}), truth)["fp"] == {1}


def test_a_crowd_stays_in_the_union():
    """Only void leaves the union: 3 / (4 + 3 - 3) with the crowd's pixel in it."""
    truth = truth_of([7, 7, 7, 5], {7: 2, 5: 2}, crowds=(5,))
    assert outcome(prediction_of([1, 1, 1, 1], {1: 2}), truth)["tp"] == {(7, 1): 0.75}


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


def test_neither_stuff_nor_things_nor_anything():
    quality = PanopticQuality(CATEGORIES)
    nothing = {"pq": None, "sq": None, "rq": None, "n": 0}
    assert [quality.summary()[group] for group in ("all", "things", "stuff")] == [nothing] * 3
    quality.add(prediction_of([1, 1], {1: 3}), truth_of([7, 7], {7: 3}))
    summary = quality.summary()
    assert (
        summary["stuff"] == nothing and summary["things"] == summary["all"] | {"n": 1} and summary["all"]["pq"] == 100
    )


def test_areas_are_counted_not_believed():
    truth = truth_of([7, 7, 7, 7], {7: 0})
    truth.segments[0].area = 2
    assert outcome(prediction_of([1, 1, 1, 0], {1: 0}), truth)["tp"] == {(7, 1): 0.75}


# What the official tool does not notice, with the number that it gives.


def test_official_believes_a_halved_area():
    truth = truth_of([7, 7, 7, 7], {7: 0})
    truth.segments[0].area = 2
    # 4 / (4 + 2 - 4)
    assert outcome(prediction_of([1, 1, 1, 1], {1: 0}), truth, official=True)["tp"] == {(7, 1): 2.0}
    quality = PanopticQuality(CATEGORIES)
    quality.add_matching(match_segments(prediction_of([1, 1, 1, 1], {1: 0}), truth, CATEGORIES, official=True))
    assert quality.summary()["all"] == {"pq": 200.0, "sq": 200.0, "rq": 100.0, "n": 1}


def test_official_divides_by_zero():
    truth = truth_of([7, 7, 0, 0], {7: 0})
    truth.segments[0].area = 0
    # 2 / (4 + 0 - 2 - 2)
    assert outcome(prediction_of([1, 1, 1, 1], {1: 0}), truth, official=True)["tp"] == {(7, 1): math.inf}


def test_official_takes_an_unknown_true_id_neither_for_void_nor_for_a_segment():
    truth = truth_of([7, 7, 7, 8], {7: 0})
    # 3 / (4 + 3 - 3): with void it would be 1.
    assert outcome(prediction_of([1, 1, 1, 1], {1: 0}), truth, official=True)["tp"] == {(7, 1): 0.75}
    found = outcome(prediction_of([1, 1, 1, 2], {1: 0, 2: 0}), truth, official=True)
    assert found == {"tp": {(7, 1): 1.0}, "fn": set(), "fp": {2}, "ignored": set()}


def test_official_misses_a_true_segment_without_pixels():
    truth = truth_of([7, 7], {7: 0, 8: 1, 9: 2}, crowds=(9,))
    assert outcome(prediction_of([1, 1], {1: 0}), truth, official=True)["fn"] == {8}


def test_official_lets_a_crowd_without_pixels_be_the_last():
    truth = truth_of([5, 5, 7], {7: 0, 5: 2, 9: 2}, crowds=(5, 9))
    assert outcome(prediction_of([1, 1, 2], {1: 2, 2: 0}), truth, official=True)["fp"] == {1}


def test_official_keeps_the_last_of_a_doubled_id():
    truth = truth_of([7, 7], {7: 0})
    truth.segments += truth_of([7, 7], {7: 1}).segments
    found = outcome(prediction_of([1, 1], {1: 1}), truth, official=True)
    assert found == {"tp": {(7, 1): 1.0}, "fn": set(), "fp": set(), "ignored": set()}


@pytest.mark.parametrize(
    ("prediction", "words"),
    [
        (prediction_of([1, 4], {1: 0}), "prediction segment 4: the map holds this id but no record"),
        (prediction_of([1, 1], {1: 0, 3: 0}), "prediction segment 3: no pixel"),
        (prediction_of([1, 1], {1: 44}), "prediction segment 1: the class table has 4"),
    ],
)
def test_official_refuses_contradictions_of_the_prediction(prediction, words):
    with pytest.raises(DataError, match=words):
        match_segments(prediction, truth_of([7, 7], {7: 0}), CATEGORIES, official=True)


# What ours refuses.


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


def test_the_other_forms_of_the_official_sample_are_the_same(shared):
    """Two-channel PNGs (category, instance) and detections of COCO's format, converted by the official tools."""
    folder = shared("data/eval_cases") / "panopticapi_sample"
    path = folder / "panoptic_examples.json"
    categories, truths = read_categories(path), read_truths(path)
    detections = json.loads((folder / "panoptic_coco_detection_format.json").read_text())["annotations"]
    for truth in truths:
        channels = np.asarray(Image.open(folder / "panoptic_examples_2ch_format" / truth.file_name), dtype=np.int32)
        from_channels = channels[..., 0] * 256 + channels[..., 1]
        classes = {int(i): categories.semantic_id(int(i) // 256) for i in np.unique(from_channels) if i}
        assert_perfect(prediction_of(from_channels, classes), truth, categories)
        from_detections, classes = np.zeros_like(from_channels), {}
        for number, record in enumerate((d for d in detections if d["image_id"] == truth.image_id), start=1):
            from_detections[coco_mask.decode(record["segmentation"]) == 1] = number
            classes[number] = categories.semantic_id(record["category_id"])
        assert_perfect(prediction_of(from_detections, classes), truth, categories)


def assert_perfect(prediction, truth, categories):
    matching = match_segments(prediction, truth, categories)
    assert len(matching.matched) == sum(not s.is_crowd for s in truth.segments) > 10 and quality_of(matching) == 1.0


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
