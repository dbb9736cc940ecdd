import numpy as np
import pytest
from PIL import Image

from upsnet.evaluation.semantic_iou import SemanticIoU
from upsnet.structures.categories import Categories, Category
from upsnet.structures.errors import DataError
from upsnet.structures.results import Prediction, Truth


def classes(count):
    return Categories([Category(i + 1, str(i), False, (0, 0, 0)) for i in range(count)])


def pair(prediction, truth):
    prediction, truth = (np.atleast_2d(np.asarray(m, dtype=np.int16)) for m in (prediction, truth))
    nothing = np.zeros(truth.shape, dtype=np.int32)
    return Prediction(5, "a.jpg", semantic_map=prediction), Truth(5, "a.jpg", nothing, [], truth)


def slow_iou(pairs, count):
    """IoU of every class by a mask for each."""
    scores = []
    for c in range(count):
        both = sum(((p.semantic_map == c) & (t.semantic_map == c)).sum() for p, t in pairs)
        either = sum((((p.semantic_map == c) | (t.semantic_map == c)) & (t.semantic_map >= 0)).sum() for p, t in pairs)
        scores.append(100.0 * both / max(1, either))
    return scores


def test_equals_slow_twin():
    draws = np.random.default_rng(0)
    # Class 5 never occurs in the truth, class 6 nowhere; -1 is void in the truth and "no answer" in the prediction.
    pairs = [pair(draws.integers(-1, 6, (9, 7)), draws.integers(-1, 5, (9, 7))) for _ in range(20)]
    iou = SemanticIoU(classes(7))
    for prediction, truth in pairs:
        iou.add(prediction, truth)
    summary = iou.summary()
    expected = slow_iou(pairs, 7)
    assert [row["iou"] for row in summary["per_class"]] == pytest.approx(expected, abs=1e-12)
    assert summary["miou"] == pytest.approx(np.mean(expected), abs=1e-12)
    assert summary["miou_present"] == pytest.approx(np.mean(expected[:6]), abs=1e-12)
    labelled = sum((t.semantic_map >= 0).sum() for _, t in pairs)
    correct = sum(((t.semantic_map >= 0) & (t.semantic_map == p.semantic_map)).sum() for p, t in pairs)
    assert summary["aacc"] == pytest.approx(100.0 * correct / labelled, abs=1e-12)


def test_small_example():
    iou = SemanticIoU(classes(4))
    iou.add(*pair([0, 0, 1, -1, 2, 3], [0, 1, 1, 1, 2, -1]))
    summary = iou.summary()
    assert [row["iou"] for row in summary["per_class"]] == pytest.approx([50.0, 100 / 3, 100.0, 0.0])
    assert summary["macc"] == pytest.approx((100 + 100 / 3 + 100) / 3)
    assert summary["aacc"] == pytest.approx(60.0)
    assert [row["pixels"] for row in summary["per_class"]] == [1, 3, 1, 0]


def test_nothing_labelled():
    iou = SemanticIoU(classes(2))
    iou.add(*pair([0, 1], [-1, -1]))
    assert [iou.summary()[key] for key in ("miou", "miou_present", "aacc", "macc")] == [None] * 4


def test_refusals():
    iou = SemanticIoU(classes(2))
    with pytest.raises(DataError, match="image 5: the semantic map has 1×3 pixels"):
        iou.add(*pair([0, 1, 1], [0, 1]))
    with pytest.raises(DataError, match="image 5: the semantic map of the prediction holds class 7"):
        iou.add(*pair([0, 7], [0, 1]))
    with pytest.raises(DataError, match="image 5: the semantic map of the truth holds class 2"):
        iou.add(*pair([0, 1], [2, 1]))


def test_ade20k_known_answer(shared):
    files = sorted((shared("data/ade20k_samples") / "annotations").glob("*.png"))
    iou = SemanticIoU(classes(150))
    for path in files:
        labels = np.asarray(Image.open(path), dtype=np.int16) - 1
        iou.add(*pair(labels, labels))
    summary = iou.summary()
    assert len(files) == 3 and summary["miou"] == pytest.approx(10.0) and summary["aacc"] == 100.0
    assert summary["miou_present"] == 100.0
