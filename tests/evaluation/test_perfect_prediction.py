"""The truth itself, fed to every evaluator by the project's own data set: full marks, nothing skipped."""

import numpy as np
import pytest

from tests.reference.panoptic_files import as_prediction, store_results, with_instances
from upsnet.dataset.coco_panoptic import CocoPanoptic
from upsnet.dataset.image_sets import coco_image_sets
from upsnet.dataset.shapes import write_shapes
from upsnet.evaluation.detection_files import DETECTION_KINDS, detection_file
from upsnet.evaluation.instance_ap import InstanceAP
from upsnet.evaluation.panoptic_quality import PanopticQuality
from upsnet.evaluation.semantic_iou import SemanticIoU


@pytest.fixture(params=["shapes", "coco_mini"])
def dataset(request, shared, tmp_path):
    if request.param == "coco_mini":
        return CocoPanoptic(coco_image_sets(shared("data/coco_mini"), "val2017"))
    write_shapes(tmp_path, train=1, val=12, seed=3)
    return CocoPanoptic(coco_image_sets(tmp_path, "val"))


def test_full_marks(dataset, tmp_path):
    categories = dataset.categories
    quality, semantic = PanopticQuality(categories), SemanticIoU(categories)
    aps = [InstanceAP(categories, detection_file(tmp_path, kind), kind) for kind in DETECTION_KINDS]
    predictions, wanted, found = [], 0, 0
    for i in range(len(dataset)):
        truth = dataset.truth(i)
        prediction = with_instances(as_prediction(truth), categories, np.linspace(0.9, 0.5, 200))
        predictions.append(prediction)
        matching = quality.add(prediction, truth)
        semantic.add(prediction, truth)
        for ap in aps:
            ap.add(prediction, truth)
        wanted += sum(not segment.is_crowd for segment in truth.segments)
        found += len(matching.matched)
        assert not matching.ignored
    assert found == wanted > 0
    panoptic = quality.summary()
    assert [panoptic[group][key] for group in ("all", "things", "stuff") for key in ("pq", "sq", "rq")] == [100.0] * 9
    assert semantic.summary()["miou_present"] == semantic.summary()["aacc"] == 100.0
    store_results(tmp_path, predictions, categories)
    assert [ap.summary()["ap"] for ap in aps] == [pytest.approx(100.0)] * 2
