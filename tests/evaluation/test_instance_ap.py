import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

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
from upsnet.structures.errors import UserError
from upsnet.structures.results import Detections


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    path = write_miniature(tmp_path_factory.mktemp("data")) / "annotations" / "panoptic_train.json"
    return read_categories(path), read_truths(path)


def no_detections():
    return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32), [])


@pytest.fixture(params=["pycocotools", "faster_coco_eval"])
def tool(request, monkeypatch):
    """Both tools in turn; the optional one is skipped where it is not installed."""
    if request.param == "pycocotools":
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    else:
        pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed (optional)")
    return request.param.replace("_", "-")


def official_example(folder, kind, results=None):
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    results = results or folder / f"instances_val2014_fake{kind}100_results.json"
    return coco_scores(truth["images"], truth["annotations"], truth["categories"], results, kind)


@pytest.mark.parametrize("kind", DETECTION_KINDS)
def test_official_example(shared, tool, kind, caplog):
    """The fake results that come with the COCO tools; 12 numbers of each kind as printed there."""
    folder = shared("data/eval_cases") / "cocoapi_fake100"
    section = (folder / "val2014_fake_eval_res.txt").read_text().split(f"type={kind}")[1].split("type=")[0]
    expected = [line.rsplit("=", 1)[1].strip() for line in section.splitlines() if "maxDets" in line]
    with caplog.at_level("INFO", "upsnet"):
        scores = official_example(folder, kind)
    assert [f"{scores[name] / 100:.3f}" for name in NUMBERS] == expected and len(expected) == 12
    assert f"average precision ({kind}) by {tool} " in caplog.text
    assert "100 images, 839 true instances" in caplog.text


def plain_scores(truth, records, kind):
    """pycocotools on everything at once, as its own demonstration goes."""
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(records), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return dict(zip(NUMBERS, evaluation.stats.tolist(), strict=True))


@pytest.mark.parametrize("kind", DETECTION_KINDS)
def test_class_by_class_equals_all_at_once(tool, kind, tmp_path):
    """With crowds, ties, more detections than count, and classes without truth or detections.

    pycocotools gives the same to the last bit; faster-coco-eval divides a little differently.
    """
    rng = np.random.default_rng(5)
    size = 60
    images = [{"id": int(i), "height": size, "width": size} for i in rng.permutation(40)]
    categories = [{"id": i} for i in (7, 3, 90, 12, 1)]
    truths, records = [], []
    for image in images:
        for _ in range(rng.integers(0, 6)):
            truths.append(random_box(rng, size, image["id"], int(rng.choice([7, 3, 90]))))
            truths[-1].update(id=len(truths), iscrowd=int(rng.random() < 0.2))
        near = [truth for truth in truths if truth["image_id"] == image["id"]]
        for truth in near * 2:
            records.append(random_box(rng, size, image["id"], truth["category_id"], truth["bbox"]))
        for _ in range(300 if image["id"] == 4 else 5):
            records.append(random_box(rng, size, image["id"], int(rng.choice([7, 12]))))
    for record in records:
        record["score"] = float(rng.integers(1, 20)) / 20  # many ties
        del record["area"], record["segmentation" if kind == "bbox" else "bbox"]
    path = detection_file(tmp_path, kind)
    path.write_text(json.dumps(records))
    scores = coco_scores(images, truths, categories, path, kind)
    expected = plain_scores({"images": images, "annotations": truths, "categories": categories}, records, kind)
    assert 0 < scores["ap"] < 100
    expected = {name: None if value < 0 else 100.0 * value for name, value in expected.items()}
    assert scores == (expected if tool == "pycocotools" else pytest.approx(expected, abs=1e-12))


def random_box(rng, size, image_id, category_id, near=None):
    """A record with box and mask: anywhere, or a shifted copy of a box."""
    if near is None:
        width, height = rng.integers(2, 50, 2).tolist()
        x, y = int(rng.integers(0, size - width)), int(rng.integers(0, size - height))
    else:
        x, y, width, height = near
        x, y = max(0, x + int(rng.integers(-3, 4))), max(0, y + int(rng.integers(-3, 4)))
        width, height = min(width, size - x), min(height, size - y)
    mask = np.zeros((size, size), np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    rle = coco_mask.encode(mask)
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [x, y, width, height],
        "area": width * height,
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
    }


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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, r"cannot read .*segm_results\.json"),
        ("[{", r"segm_results\.json: is not valid json"),
        ("{}", "is not a list of COCO results, each with category_id, image_id, score, segmentation"),
        ('[{"image_id": 1, "category_id": 3, "score": 1, "bbox": [0, 0, 1, 1]}]', "is not a list of COCO results"),
        ('[{"image_id": 5, "category_id": 3, "score": 1, "segmentation": {}}]', "image 5 is not among the images"),
    ],
)
def test_missing_and_damaged_results(miniature, tmp_path, text, words):
    path = detection_file(tmp_path, "segm")
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words):
        InstanceAP(miniature[0], path, "segm").summary()
