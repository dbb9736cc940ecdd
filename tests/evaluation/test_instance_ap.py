import json
from dataclasses import replace

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from tests.miniature import write_miniature
from tests.reference.panoptic_files import (
    as_prediction,
    read_categories,
    read_truths,
    store_results,
    with_instances,
)
from upsnet.evaluation.detection_files import DETECTION_KINDS, detection_file
from upsnet.evaluation.instance_ap import NUMBERS, InstanceAP, coco_scores
from upsnet.structures.errors import DataError, PlaceError
from upsnet.structures.results import Detections


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    path = write_miniature(tmp_path_factory.mktemp("data")) / "annotations" / "panoptic_train.json"
    return read_categories(path), read_truths(path)


def no_detections():
    return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32), [])


def test_official_example(shared):
    """The fake results that come with the COCO tools; 24 numbers as printed there."""
    folder = shared("data/eval_cases") / "cocoapi_fake100"
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    printed = (folder / "val2014_fake_eval_res.txt").read_text()
    compared = 0
    for kind in ("bbox", "segm"):
        section = printed.split(f"type={kind}")[1].split("type=")[0]
        expected = [float(line.rsplit("=", 1)[1]) for line in section.splitlines() if "maxDets" in line]
        results = folder / f"instances_val2014_fake{kind}100_results.json"
        scores = coco_scores(truth["images"], truth["annotations"], truth["categories"], results, kind)
        for name, number in zip(NUMBERS, expected, strict=True):
            assert round(scores[name] / 100, 3) == number, (kind, name)
            compared += 1
    assert compared == 24


def scores_of(predictions, truths, categories, folder):
    """Box and mask scores, by way of a finished result folder."""
    store_results(folder, predictions, categories)
    evaluators = [InstanceAP(categories, detection_file(folder, kind), kind) for kind in DETECTION_KINDS]
    for evaluator in evaluators:
        for prediction, truth in zip(predictions, truths, strict=True):
            evaluator.add(prediction, truth)
    return [evaluator.summary() for evaluator in evaluators]


def perfect(truths, categories):
    return [with_instances(as_prediction(truth), categories, np.linspace(0.9, 0.5, 9)) for truth in truths]


def test_truth_as_detections_is_perfect(miniature, tmp_path):
    categories, truths = miniature
    box, mask = scores_of(perfect(truths, categories), truths, categories, tmp_path)
    assert box["ap"] == mask["ap"] == 100.0
    assert box["ap_l"] is None, "no object of the miniature is large"


def test_a_wrong_class_and_a_poor_mask_cost(miniature, tmp_path):
    categories, truths = miniature
    predictions = perfect(truths, categories)
    for prediction in predictions:
        for i, rle in enumerate(prediction.instances.masks):
            half = coco_mask.decode(rle)
            half[:, : half.shape[1] // 4] = 0
            prediction.instances.masks[i] = coco_mask.encode(np.asfortranarray(half))
    box, mask = scores_of(predictions, truths, categories, tmp_path)
    assert box["ap"] == 100.0 and 0 < mask["ap"] < 95
    for prediction in predictions:
        prediction.instances.classes[:] = prediction.instances.classes % 3 + 1
    assert [scores["ap"] for scores in scores_of(predictions, truths, categories, tmp_path)] == [0.0, 0.0]


def test_nothing_detected_nothing_true_nothing_tested(miniature, tmp_path):
    categories, truths = miniature
    prediction = as_prediction(truths[0])
    prediction.instances = no_detections()
    assert [scores["ap"] for scores in scores_of([prediction], truths[:1], categories, tmp_path)] == [0.0, 0.0]

    bare = replace(perfect(truths, categories)[0], image_id=truths[3].image_id)  # of a photo without things
    for scores in scores_of([bare], truths[3:4], categories, tmp_path):
        assert set(scores.values()) == {None}
    (tmp_path / "bbox_results.json").write_text("[]")
    assert set(InstanceAP(categories, tmp_path / "bbox_results.json", "bbox").summary().values()) == {None}


def test_annotation_ids_may_repeat_over_photos(miniature, tmp_path):
    for truth in miniature[1]:
        for annotation in truth.annotations:
            annotation["id"] = 0
    test_truth_as_detections_is_perfect(miniature, tmp_path)


def test_true_masks_of_every_form(miniature, tmp_path):
    """Polygons, RLE as text and RLE as a list of counts are what pycocotools takes them for."""
    categories, truths = miniature
    height, width = truths[0].segment_map.shape
    start, rest = 700, height * width - 800
    masks = {
        "polygons": [[9.5, 8, 30.5, 9, 31, 29, 8, 31.5], [20.0, 20.0, 40.0, 20.0, 40.0, 40.0]],
        "counts": {"size": [height, width], "counts": [start, 100, rest]},
        "text": coco_mask.frPyObjects({"size": [height, width], "counts": [start, 100, rest]}, height, width),
    }
    for name, segmentation in masks.items():
        coco = COCO()
        coco.imgs = {1: {"height": height, "width": width}}
        rle = coco.annToRLE({"image_id": 1, "segmentation": segmentation})
        annotation = {"id": 1, "category_id": 3, "area": 100, "iscrowd": 0, "bbox": [0, 0, 1, 1]}
        truth = replace(truths[0], annotations=[{**annotation, "segmentation": segmentation}])
        found = Detections(np.zeros((1, 4), np.float32), np.asarray([3]), np.ones(1, np.float32), [rle])
        prediction = replace(as_prediction(truth), instances=found)
        assert scores_of([prediction], [truth], categories, tmp_path)[1]["ap"] == pytest.approx(100.0), name


def test_missing_and_damaged_results(miniature, tmp_path):
    categories, path = miniature[0], detection_file(tmp_path, "segm")
    with pytest.raises(PlaceError, match=r"cannot read .*segm_results\.json"):
        InstanceAP(categories, path, "segm").summary()
    path.write_text("[{")
    with pytest.raises(DataError, match=r"segm_results\.json: is not valid json"):
        InstanceAP(categories, path, "segm").summary()
