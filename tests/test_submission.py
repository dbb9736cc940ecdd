"""Tests on images without labels, and archives for evaluation servers."""

import json
import shutil
import zipfile

import numpy as np
import pytest

from tests.miniature import CATEGORIES, edited, image_id_of, write_json
from tests.tiny import copy_run, upsnet
from upsnet import builders
from upsnet.config import load_recipe
from upsnet.structures.categories import Categories
from upsnet.structures.class_tables import class_table
from upsnet.structures.results import Detections, Prediction, Segment

TEST_DEV = "dataset.test_image_set=test-dev2017"
PACKED = {
    "panoptic_test-dev2017_tiny_results.zip",
    "bbox/detections_test-dev2017_tiny_results.zip",
    "segm/detections_test-dev2017_tiny_results.zip",
}


@pytest.fixture
def unlabelled(tiny_run, tmp_path, monkeypatch):
    """A finished run, and the photos of its test set once more as test-dev2017, with a json that lists photos only."""
    recipe = copy_run(tiny_run, tmp_path)
    data = tmp_path / "data"
    shutil.copytree(data / "images/val", data / "images/test2017")
    images = json.loads((data / "annotations/panoptic_val.json").read_text())["images"]
    write_json(data / "annotations/image_info_test-dev2017.json", {"images": images, "categories": []})
    # COCO's 133 classes stand in the place of the miniature's.
    monkeypatch.setattr("upsnet.builders.data.class_table", lambda name: Categories.from_coco(CATEGORIES, "miniature"))
    return recipe


def results_of(recipe):
    return recipe.parent / "out/tiny/test-dev2017/results"


def packed(recipe):
    folder = results_of(recipe) / "submission"
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_images_without_labels_are_predicted_stored_and_packed(unlabelled, tiny_run):
    ran = upsnet("test", "--cfg", unlabelled, TEST_DEV)
    assert ran.code == 0, ran.err
    results = results_of(unlabelled)
    assert "test-dev2017 has no labels: nothing is scored" in ran.err and not (results / "summary.json").exists()
    for name in ("panoptic.json", "bbox_results.json", "segm_results.json"):
        assert (results / name).read_bytes() == (tiny_run.results / name).read_bytes(), name
    assert packed(unlabelled) == PACKED
    assert ran.out.splitlines() == [f"submission: {results / 'submission' / name}" for name in sorted_as_printed()]


def sorted_as_printed():
    return sorted(PACKED, key=lambda name: (not name.startswith("panoptic"), name))


def test_stored_results_are_packed_later(unlabelled):
    """Without weights; under another name; the archive holds what the folder holds."""
    upsnet("test", "--cfg", unlabelled, TEST_DEV)
    shutil.rmtree(results_of(unlabelled) / "submission")
    shutil.rmtree(unlabelled.parent / "out/tiny/train")
    ran = upsnet("submission", "--cfg", unlabelled, TEST_DEV, "--name", "UPSNet_r50 (ours)")
    assert ran.code == 0, ran.err
    assert packed(unlabelled) == {name.replace("_tiny_", "_UPSNet-r50-ours_") for name in PACKED}
    with zipfile.ZipFile(
        results_of(unlabelled) / "submission/panoptic_test-dev2017_UPSNet-r50-ours_results.zip"
    ) as zipped:
        assert len(zipped.namelist()) == 1 + 6


def test_results_with_labels_can_be_packed_too(tiny_run, tmp_path):
    ran = upsnet("submission", "--cfg", copy_run(tiny_run, tmp_path))
    assert ran.code == 0 and "panoptic_val_tiny_results.zip" in ran.out, ran.err


def test_eval_only_says_that_there_is_nothing_to_score(unlabelled):
    upsnet("test", "--cfg", unlabelled, TEST_DEV)
    before = {path: path.stat().st_mtime_ns for path in results_of(unlabelled).rglob("*")}
    ran = upsnet("test", "--cfg", unlabelled, TEST_DEV, "--eval_only")
    assert ran.code == 2 and len(ran.errors) == 1, ran.err
    assert "test-dev2017 has no labels to score stored results with: pack them" in ran.errors[0]
    assert "`upsnet submission`" in ran.errors[0]
    assert {path: path.stat().st_mtime_ns for path in results_of(unlabelled).rglob("*")} == before


def test_pictures_need_no_labels(unlabelled):
    ran = upsnet("test", "--cfg", unlabelled, TEST_DEV, "test.vis_mask=true")
    assert ran.code == 0 and len(list((results_of(unlabelled) / "vis").iterdir())) == 6, ran.err
    assert [path.name for path in results_of(unlabelled).iterdir()] == ["vis"]


def test_a_part_of_the_images_is_stored_but_not_packed(unlabelled):
    ran = upsnet("test", "--cfg", unlabelled, TEST_DEV, "dataset.limit=2")
    assert ran.code == 0 and "not packed for the evaluation server: dataset.limit is 2" in ran.err
    assert (results_of(unlabelled) / "index.json").exists() and not packed(unlabelled)
    for arguments, words in (
        (["dataset.limit=2"], "dataset.limit is 2, a submission needs every image of test-dev2017: set it to null"),
        ([], f"4 images have no prediction, the first is {image_id_of(2)}: run the test again"),
        (["dataset.test_image_set=val+test-dev2017"], "test-dev2017"),
    ):
        ran = upsnet("submission", "--cfg", unlabelled, TEST_DEV, *arguments)
        assert ran.code == 2 and len(ran.errors) == 1 and words in ran.errors[0], ran.err
        assert not packed(unlabelled)


def test_several_sets_are_no_submission(tiny_run):
    recipe = load_recipe(str(tiny_run.recipe), ["dataset.test_image_set=val+other"])
    assert "val+other are several image sets, a submission is of one" in builders.no_submission(recipe)


def test_a_name_needs_letters_or_digits(tiny_run, tmp_path):
    recipe = copy_run(tiny_run, tmp_path)
    ran = upsnet("submission", "--cfg", recipe, "--name", "__")
    assert ran.code == 2 and "'__' cannot name a submission" in ran.errors[0]
    assert not list(tmp_path.rglob("*.zip"))


def test_no_server_scores_the_film_of_cityscapes():
    recipe = load_recipe("upsnet_resnet50_cityscapes_16gpu", ["dataset.test_image_set=demoVideo"])
    assert "no server scores demoVideo of Cityscapes" in builders.no_submission(recipe)


def test_nothing_stored(unlabelled):
    ran = upsnet("submission", "--cfg", unlabelled, TEST_DEV)
    assert ran.code == 2 and "holds no complete results" in ran.errors[0]


def test_a_changed_image_list_is_noticed(unlabelled):
    upsnet("test", "--cfg", unlabelled, TEST_DEV)
    shutil.rmtree(results_of(unlabelled) / "submission")
    with edited(unlabelled.parent / "data/annotations/image_info_test-dev2017.json") as content:
        del content["images"][0]
    ran = upsnet("submission", "--cfg", unlabelled, TEST_DEV)
    assert ran.code == 2 and f"image {image_id_of(5)} " in ran.errors[0] and "is not in the data set" in ran.errors[0]
    assert not packed(unlabelled)


def test_a_report_needs_labels(unlabelled):
    upsnet("test", "--cfg", unlabelled, TEST_DEV)
    ran = upsnet("report", "--cfg", unlabelled, TEST_DEV)
    assert ran.code == 2 and "test-dev2017 has no labels: a report is of a test on images with labels" in ran.errors[0]


def test_cityscapes_has_archives_of_its_own(tmp_path):
    recipe = load_recipe("upsnet_resnet50_cityscapes_16gpu", ["dataset.test_image_set=test"])
    categories = class_table("Cityscapes")
    road = np.ones((2, 3), np.int32)
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32), [])
    prediction = Prediction(
        1, "berlin/berlin_000000_000019_leftImg8bit.png", road, [Segment(1, 0, 6, (0, 0, 3, 2))], nothing,
        np.zeros((2, 3), np.int16),
    )  # fmt: skip
    files = builders.write_submission(recipe, tmp_path, [prediction], categories, "tiny")
    assert [file.relative_to(tmp_path).as_posix() for file in files] == [
        f"submission/{task}.zip" for task in ("pixel", "instance", "panoptic")
    ]
