import numpy as np
import pytest

from upsnet.evaluation.error_analysis import CAUSES, ErrorAnalysis
from upsnet.evaluation.panoptic_quality import PanopticQuality
from upsnet.structures.categories import Categories, Category
from upsnet.structures.results import Prediction, Segment, Truth
from upsnet.structures.sample import VOID

CATEGORIES = Categories([Category(i + 10, f"class {i}", i > 0, (i, i, i)) for i in range(4)])


def analyse(pairs):
    """Analysis and quality of [(prediction ids, {id: class}, truth ids, {id: class}, crowds)]; last photo's causes."""
    analysis, quality, causes = ErrorAnalysis(CATEGORIES), PanopticQuality(CATEGORIES), {}
    for given_map, given, true_map, true, crowds in pairs:
        given_map, true_map = (np.atleast_2d(np.asarray(m, np.int32)) for m in (given_map, true_map))
        prediction = Prediction(1, "", given_map, [Segment(i, c, 0, (0, 0, 0, 0)) for i, c in given.items()])
        segments = [Segment(i, c, 0, (0, 0, 0, 0), None, i in crowds) for i, c in true.items()]
        truth = Truth(1, "", true_map, segments, np.full(true_map.shape, VOID, np.int16))
        causes = analysis.add(prediction, truth, quality.add(prediction, truth))
    return analysis.summary(), quality.summary(), causes


def test_every_cause():
    summary, _, causes = analyse(
        [
            (
                [1] * 9 + [0] + [2] * 4 + [0] * 6 + [3] * 8 + [0] * 2 + [0] * 10 + [4] * 3 + [0] * 7,
                {1: 1, 2: 1, 3: 2, 4: 3},
                [11] * 10 + [12] * 10 + [13] * 10 + [14] * 10 + [15] * 10,
                {11: 1, 12: 1, 13: 1, 14: 1, 15: 0},
                (),
            )
        ]
    )
    assert causes == {
        ("truth", 12): "badly_outlined",
        ("prediction", 2): "badly_outlined",
        ("truth", 13): "confused",
        ("prediction", 3): "confused",
        ("truth", 14): "missed",
        ("truth", 15): "missed",
        ("prediction", 4): "invented",
    }
    rows = {row["name"]: row for row in summary["per_class"]}
    assert [rows["class 1"][key] for key in ("matched", *CAUSES)] == [1, 1, 0, 2, 1]
    assert rows["class 1"]["confused_with"] == [{"category_id": 12, "name": "class 2", "count": 1}]
    assert rows["class 2"]["confused_with"] == [{"category_id": 11, "name": "class 1", "count": 1}]
    # D = 1 match + (3 missed + 1 invented) / 2 = 3
    assert rows["class 1"]["pq"] == pytest.approx(90 / 3)
    assert rows["class 1"]["lost"] == pytest.approx(
        {"missed": 50 / 3, "invented": 0, "badly_outlined": 100 / 3, "confused": 50 / 3, "imprecise": 10 / 3}
    )


def test_thresholds():
    slight = ([1] * 10 + [0] * 90, {1: 1}, [11] * 100, {11: 1}, ())
    assert analyse([slight])[2] == {("truth", 11): "badly_outlined", ("prediction", 1): "badly_outlined"}
    less = ([1] * 9 + [0] * 91, {1: 1}, [11] * 100, {11: 1}, ())
    assert analyse([less])[2] == {("truth", 11): "missed", ("prediction", 1): "invented"}
    half_of_other_class = ([1] * 5 + [0] * 5, {1: 2}, [11] * 10, {11: 1}, ())
    assert analyse([half_of_other_class])[2] == {("truth", 11): "missed", ("prediction", 1): "invented"}
    crowd_of_other_class = ([1] * 10, {1: 2}, [11] * 10, {11: 1}, (11,))
    assert analyse([crowd_of_other_class])[2] == {("prediction", 1): "invented"}


def test_lost_points_add_up_to_100():
    draws = np.random.default_rng(3)
    pairs = []
    for _ in range(60):
        true_map = draws.integers(0, 4, (3, 3)).repeat(3, axis=0).repeat(3, axis=1)
        given_map = np.where(draws.random((9, 9)) < 0.7, true_map, draws.integers(0, 4, (9, 9)))
        true = {i: int(draws.integers(0, 4)) for i in range(1, 4) if (true_map == i).any()}
        # Segment 2 gets a class at random, the others their own where they have one.
        own = {i: c for i, c in true.items() if i != 2}
        given = {i: own.get(i, int(draws.integers(0, 4))) for i in range(1, 4) if (given_map == i).any()}
        pairs.append((given_map, given, true_map, true, ()))
    summary, quality, _ = analyse(pairs)
    by_id = {row["category_id"]: row for row in quality["per_class"]}
    for row in summary["per_class"]:
        assert row["pq"] == pytest.approx(by_id[row["category_id"]]["pq"], abs=1e-10)
        assert row["pq"] + sum(row["lost"].values()) == pytest.approx(100.0, abs=1e-10)
        false = by_id[row["category_id"]]["fp"] + by_id[row["category_id"]]["fn"]
        assert sum(row[cause] for cause in CAUSES) == false > 0
    for group in ("all", "things", "stuff"):
        assert quality[group]["pq"] + sum(summary[group].values()) == pytest.approx(100.0, abs=1e-10)


def test_nothing_at_all():
    summary, _, _ = analyse([])
    assert summary == {"all": {}, "things": {}, "stuff": {}, "per_class": []}
