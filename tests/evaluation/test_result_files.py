import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from tests.miniature import edited, write_miniature
from tests.reference.panoptic_files import (
    as_prediction,
    read_categories,
    read_truths,
    store_results,
    with_instances,
)
from upsnet.evaluation.detection_files import detection_file
from upsnet.evaluation.instance_ap import InstanceAP
from upsnet.evaluation.panoptic_files import evaluate_files
from upsnet.evaluation.panoptic_quality import PanopticQuality
from upsnet.evaluation.result_files import ResultWriter, read_results, write_summary
from upsnet.evaluation.semantic_iou import SemanticIoU
from upsnet.structures.categories import Categories, Category
from upsnet.structures.errors import DataError, PlaceError, UserError
from upsnet.structures.results import Detections, Prediction, Segment


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    path = write_miniature(tmp_path_factory.mktemp("data")) / "annotations" / "panoptic_train.json"
    return path, read_categories(path), read_truths(path)


def imperfect(truth, categories):
    moved = np.roll(as_prediction(truth).segment_map, 3, axis=1)
    prediction = with_instances(as_prediction(truth, moved), categories, np.linspace(0.91, 0.13, 9))
    prediction.semantic_map = np.roll(truth.semantic_map, 2, axis=0)
    prediction.segments[0].score = 0.7
    prediction.file_name = prediction.file_name.replace(".png", ".jpg")
    return prediction


def score(predictions, truths, categories, folder):
    evaluators = {
        "panoptic": PanopticQuality(categories),
        "box": InstanceAP(categories, detection_file(folder, "bbox"), "bbox"),
        "mask": InstanceAP(categories, detection_file(folder, "segm"), "segm"),
        "semantic": SemanticIoU(categories),
    }
    for prediction, truth in zip(predictions, truths, strict=True):
        for evaluator in evaluators.values():
            evaluator.add(prediction, truth)
    return {name: evaluator.summary() for name, evaluator in evaluators.items()}


@pytest.fixture
def stored(miniature, tmp_path):
    """A result folder with everything in it, the predictions and their summary."""
    _, categories, truths = miniature
    predictions = [imperfect(truth, categories) for truth in truths]
    folder = tmp_path / "results"
    store_results(folder, predictions, categories)
    return folder, predictions, score(predictions, truths, categories, folder)


def test_what_is_stored_scores_the_same(miniature, stored):
    _, categories, truths = miniature
    folder, predictions, summary = stored
    assert 0 < summary["panoptic"]["all"]["pq"] < 100 and 0 < summary["box"]["ap"] < 100
    assert score(read_results(folder, categories), truths, categories, folder) == summary
    for again, first in zip(read_results(folder, categories), predictions, strict=True):
        assert (again.image_id, again.file_name, again.segments) == (first.image_id, first.file_name, first.segments)
        assert np.array_equal(again.segment_map, first.segment_map) and again.segment_map.dtype == np.int32
        assert np.array_equal(again.semantic_map, first.semantic_map) and again.semantic_map.dtype == np.int16
        assert np.array_equal(again.instances.boxes, first.instances.boxes)
        assert np.array_equal(again.instances.classes, first.instances.classes)
        assert np.array_equal(again.instances.scores, first.instances.scores)
    files = {path.name for path in folder.iterdir()}
    lists = {"bbox_results.json", "index.json", "panoptic.json", "segm_results.json"}
    assert files == {"panoptic", "semantic", *lists} and list(folder.rglob("*.part")) == []


def test_detections_are_coco_results(miniature, tmp_path):
    """Boxes with width and height, category ids, masks without boxes."""
    _, categories, truths = miniature
    prediction = as_prediction(truths[0])
    mask = coco_mask.encode(np.ones(truths[0].segment_map.shape, np.uint8, order="F"))
    prediction.instances = Detections(
        np.asarray([[2.5, 3, 4.5, 3]], np.float32), np.asarray([3]), np.asarray([0.25], np.float32), [mask]
    )
    with ResultWriter(tmp_path, categories) as writer:
        writer.add(prediction)
        assert not list(tmp_path.glob("*.json")), "names are given at the end"
    (box,), (rle,) = (json.loads((tmp_path / f"{kind}_results.json").read_text()) for kind in ("bbox", "segm"))
    common = {"image_id": truths[0].image_id, "category_id": 3, "score": 0.25}
    assert box == {**common, "bbox": [2.5, 3.0, 3.0, 1.0]}
    assert rle == {**common, "segmentation": {"size": mask["size"], "counts": mask["counts"].decode()}}


def test_panoptic_json_is_a_coco_file(miniature, stored):
    path, categories, _ = miniature
    folder, _, summary = stored
    content = json.loads((folder / "panoptic.json").read_text())
    assert set(content) == {"annotations", "images", "categories"}
    assert {c["id"] for c in content["categories"]} == {c.id for c in categories}
    assert evaluate_files(folder / "panoptic.json", path) == {"panoptic": summary["panoptic"]}


def test_many_segments_and_many_classes(tmp_path):
    categories = Categories([Category(3 * i + 1, str(i), i % 2 == 0, (0, 0, 0)) for i in range(300)])
    ids = np.arange(1, 301, dtype=np.int32).reshape(15, 20)
    segments = [Segment(i, i - 1, 1, ((i - 1) % 20, (i - 1) // 20, 1, 1)) for i in range(1, 301)]
    semantic = np.where(ids == 7, -1, ids - 1).astype(np.int16)
    with ResultWriter(tmp_path, categories) as writer:
        writer.add(Prediction(1, "a.jpg", ids, segments, semantic_map=semantic))
    (again,) = read_results(tmp_path, categories)
    assert again.segments == segments and again.instances is None
    assert np.array_equal(again.segment_map, ids) and np.array_equal(again.semantic_map, semantic)


@pytest.mark.parametrize("num_classes", [255, 256])
def test_only_a_semantic_map(tmp_path, num_classes):
    categories = Categories([Category(i, str(i), False, (0, 0, 0)) for i in range(num_classes)])
    semantic = np.asarray([[0, num_classes - 1, -1]], dtype=np.int16)
    store_results(tmp_path, [Prediction(1, "a.jpg", semantic_map=semantic)], categories)
    (again,) = read_results(tmp_path, categories)
    assert np.array_equal(again.semantic_map, semantic) and again.segment_map is None
    assert {path.name for path in tmp_path.iterdir()} == {"index.json", "semantic"}


def test_photos_of_one_name_in_two_folders(tmp_path):
    categories = Categories([Category(1, "a", False, (0, 0, 0))])
    names = ["x/street.jpg", "y/street.jpg", "y/Street.png"]
    with ResultWriter(tmp_path, categories) as writer:
        for i, name in enumerate(names):
            writer.add(Prediction(i, name, semantic_map=np.full((1, 2), i - 2, dtype=np.int16).clip(-1)))
    again = list(read_results(tmp_path, categories))
    assert [p.file_name for p in again] == names
    assert len(list((tmp_path / "semantic").iterdir())) == 3 and again[2].semantic_map[0, 0] == 0


def test_an_error_leaves_no_complete_results(miniature, stored):
    _, categories, _ = miniature
    folder, predictions, summary = stored
    write_summary(folder, summary)
    with pytest.raises(ZeroDivisionError), ResultWriter(folder, categories) as writer:
        writer.add(predictions[0])
        raise ZeroDivisionError
    assert not (folder / "summary.json").exists(), "scores of an earlier test"
    with pytest.raises(PlaceError, match=r"holds no complete results \(no index\.json\)"):
        next(read_results(folder, categories))
    assert list(folder.rglob("*.part")) == []


def unlink(name):
    return lambda folder: next(folder.glob(name)).unlink()


def cut(name):
    def half(folder):
        path = next(folder.glob(name))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return half


def without_last_line_but_one(folder):
    path = folder / "bbox_results.json"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-2], "]"]))


DOES_NOT_FIT = r"segm_results.json: image \d+: does not fit bbox_results.json or the photo"


def in_record(kind, change):
    def damage(folder):
        path = folder / f"{kind}_results.json"
        lines = path.read_text().splitlines()
        lines[1] = json.dumps(change(json.loads(lines[1].removesuffix(",")))) + ","
        path.write_text("\n".join(lines))

    return damage


def other_image(folder):
    with edited(folder / "panoptic.json") as content:
        del content["annotations"][2]


def index(change):
    def damage(folder):
        with edited(folder / "index.json") as content:
            change(content)

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (index(lambda content: content["categories"][1].pop("name")), "index.json: is damaged"),
        (index(lambda content: content.update(categories=3)), "index.json: is damaged"),
        (index(lambda content: content["categories"].insert(0, 7)), "index.json: is damaged"),
        (index(lambda content: content["images"][0].pop("png")), "index.json: is damaged"),
        (index(lambda content: content["images"][0].update(id="3")), "index.json: is damaged"),
        (index(lambda content: content.pop("parts")), "index.json: is damaged"),
        (lambda folder: (folder / "index.json").write_text("[]"), "index.json: is damaged"),
        (unlink("index.json"), "no complete results"),
        (unlink("panoptic.json"), "cannot read .*panoptic.json"),
        (unlink("panoptic/*.png"), r"image \d+: .*panoptic.*No such file"),
        (unlink("semantic/*.png"), r"image \d+: .*semantic.*No such file"),
        (unlink("bbox_results.json"), "cannot read .*bbox_results.json"),
        (unlink("segm_results.json"), "cannot read .*segm_results.json"),
        (cut("index.json"), "index.json: is not valid json"),
        (cut("panoptic.json"), "panoptic.json: is not valid json"),
        (cut("panoptic/*.png"), r"image \d+: .*panoptic.*cut off"),
        (cut("semantic/*.png"), r"image \d+: .*semantic.*cut off"),
        (cut("segm_results.json"), "segm_results.json: is damaged"),
        (in_record("bbox", lambda r: "image_id"), "a record has no 'image_id'"),
        (in_record("bbox", lambda r: None), "a record has no 'image_id'"),
        (in_record("bbox", lambda r: {**r, "score": "high"}), DOES_NOT_FIT),
        (in_record("bbox", lambda r: {**r, "score": float("nan")}), DOES_NOT_FIT),
        (in_record("bbox", lambda r: {**r, "bbox": [1, 2, 3]}), DOES_NOT_FIT),
        (in_record("segm", lambda r: {**r, "score": r["score"] / 2}), DOES_NOT_FIT),
        (in_record("segm", lambda r: {**r, "segmentation": None}), DOES_NOT_FIT),
        (in_record("segm", lambda r: {**r, "segmentation": {"size": [48, 64], "counts": [0, 3072]}}), DOES_NOT_FIT),
        (in_record("segm", lambda r: {**r, "segmentation": {"size": [9, 9], "counts": "0i0"}}), DOES_NOT_FIT),
        (without_last_line_but_one, r"image \d+: does not fit bbox_results.json"),
        (other_image, "panoptic.json: has no annotation of image"),
    ],
)
def test_damaged_results(miniature, stored, damage, words):
    damage(stored[0])
    with pytest.raises(UserError, match=words):
        list(read_results(stored[0], miniature[1]))


def test_results_of_another_class_table(miniature, stored):
    categories = list(miniature[1])
    with pytest.raises(DataError, match="the results have 5 classes, the data set 4"):
        next(read_results(stored[0], Categories(categories[:-1])))
    with pytest.raises(DataError, match="class 4 is 'kite'"):
        next(read_results(stored[0], Categories([*categories[:-1], Category(99, "dog", True, (0, 0, 0))])))


def test_unwritable_folder(miniature, stored, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(PlaceError, match=r"cannot write .*: make room or choose"):
            ResultWriter(folder, miniature[1])
        with pytest.raises(PlaceError, match=r"cannot write .*summary\.json: (Not a directory|File exists)"):
            write_summary(folder, stored[2])


@pytest.mark.parametrize(
    "name",
    [
        "panoptic.json",
        "bbox_results.json",
        "segm_results.json",
        "index.json",
        "semantic/000000000010.png",
        "panoptic/000000000010.png",
    ],
)
def test_full_disk(miniature, stored, tmp_path, name):
    folder = tmp_path / "full"
    part = folder / f"{name}.part"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    with pytest.raises(PlaceError, match=f"{name}: No space left on device: make room"):
        store_results(folder, stored[1], miniature[1])
    assert not (folder / name).exists() and not (folder / "index.json").exists()
    assert list(folder.rglob("*.part")) == []


def test_full_disk_at_the_summary(stored, tmp_path):
    (tmp_path / "summary.json.part").symlink_to("/dev/full")
    with pytest.raises(PlaceError, match=r"summary\.json: No space left on device"):
        write_summary(tmp_path, stored[2])
    assert list(tmp_path.glob("summary*")) == []


def test_summary_file(stored, tmp_path):
    path = write_summary(tmp_path, stored[2])
    assert json.loads(path.read_text()) == stored[2], "full precision survives"
