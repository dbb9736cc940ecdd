import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from tests.miniature import write_miniature
from tests.reference.panoptic_files import as_prediction, read_categories, read_truths, with_instances
from upsnet.evaluation.instance_ap import NUMBERS, InstanceAP, coco_scores
from upsnet.structures.errors import PlaceError
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


def test_truth_as_detections_is_perfect(miniature, tmp_path):
    categories, truths = miniature
    ap = InstanceAP(categories, tmp_path)
    for truth in truths:
        ap.add(with_instances(as_prediction(truth), categories, np.linspace(0.9, 0.5, 9)), truth)
    assert not (tmp_path / "bbox_results.json").exists(), "the name is given at the end"
    summary = ap.summary()
    assert summary["box"]["ap"] == summary["mask"]["ap"] == 100.0
    assert summary["box"]["ap_l"] is None, "no object of the miniature is large"
    boxes, masks = (json.loads((tmp_path / f"{kind}_results.json").read_text()) for kind in ("bbox", "segm"))
    assert len(boxes) == len(masks) == 10
    assert set(boxes[0]) == {"image_id", "category_id", "bbox", "score"}
    assert set(masks[0]) == {"image_id", "category_id", "segmentation", "score"}
    assert list(tmp_path.glob("*.part")) == []


def test_boxes_are_inclusive_and_classes_become_categories(miniature, tmp_path):
    categories, truths = miniature
    ap = InstanceAP(categories, tmp_path)
    prediction = as_prediction(truths[0])
    prediction.instances = Detections(
        np.asarray([[2.5, 3, 4.5, 3]], np.float32), np.asarray([3]), np.asarray([0.25], np.float32),
        [coco_mask.encode(np.ones(truths[0].segment_map.shape, np.uint8, order="F"))],
    )
    ap.add(prediction, truths[0])
    ap.close()
    (record,) = json.loads((tmp_path / "bbox_results.json").read_text())
    assert record["bbox"] == [2.5, 3.0, 3.0, 1.0] and record["score"] == 0.25
    assert record["category_id"] == 3 and record["image_id"] == truths[0].image_id


def test_a_wrong_class_and_a_poor_mask_cost(miniature, tmp_path):
    categories, truths = miniature
    ap = InstanceAP(categories, tmp_path)
    for truth in truths:
        prediction = with_instances(as_prediction(truth), categories, [0.5] * 9)
        for i, mask in enumerate(prediction.instances.masks):
            half = coco_mask.decode(mask)
            half[:, : half.shape[1] // 4] = 0
            prediction.instances.masks[i] = coco_mask.encode(np.asfortranarray(half))
        ap.add(prediction, truth)
    summary = ap.summary()
    assert summary["box"]["ap"] == 100.0 and 0 < summary["mask"]["ap"] < 95


def test_nothing_detected_nothing_true_nothing_tested(miniature, tmp_path):
    categories, truths = miniature
    ap = InstanceAP(categories, tmp_path)
    prediction = as_prediction(truths[0])
    prediction.instances = no_detections()
    ap.add(prediction, truths[0])
    assert ap.summary()["box"]["ap"] == ap.summary()["mask"]["ap"] == 0.0

    ap = InstanceAP(categories, tmp_path)
    bare = with_instances(as_prediction(truths[0]), categories, [0.5] * 9)
    truths[3].image_id, image_id = bare.image_id, truths[3].image_id
    ap.add(bare, truths[3])  # a photo without things
    truths[3].image_id = image_id
    assert set(ap.summary()["mask"].values()) == {None}

    assert set(InstanceAP(categories, tmp_path).summary()["box"].values()) == {None}


def test_annotation_ids_may_repeat_over_photos(miniature, tmp_path):
    for truth in miniature[1]:
        for annotation in truth.annotations:
            annotation["id"] = 0
    test_truth_as_detections_is_perfect(miniature, tmp_path)


def test_stored_detections_are_scored_as_they_are(miniature, tmp_path):
    categories, truths = miniature
    scores = []
    for store in (True, False):
        ap = InstanceAP(categories, tmp_path, store)
        for truth in truths:
            ap.add(with_instances(as_prediction(truth), categories, np.linspace(0.9, 0.5, 9)), truth)
        before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("*.json")}
        scores.append(ap.summary())
    assert scores[0] == scores[1]
    assert len(before) == 2 and set(tmp_path.iterdir()) == before.keys()
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before}


def test_unwritable_folder(miniature, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PlaceError, match=r"cannot write .*bbox_results\.json"):
        InstanceAP(miniature[0], tmp_path / "file" / "results")


def test_full_disk(miniature, tmp_path):
    categories, truths = miniature
    (tmp_path / "segm_results.json.part").symlink_to("/dev/full")
    ap = InstanceAP(categories, tmp_path)
    with pytest.raises(PlaceError, match=r"segm_results\.json: No space left"):
        for _ in range(100):
            ap.add(with_instances(as_prediction(truths[0]), categories, [0.5] * 9), truths[0])
        ap.close()
    assert not (tmp_path / "segm_results.json").exists()
