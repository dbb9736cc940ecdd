"""Our scores on Cityscapes against those of the three official scripts, and what is packed for the server."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from tests.miniature_cityscapes import write_miniature_cityscapes
from tests.reference.cityscapes_scripts import official_scores
from tests.reference.panoptic_files import as_prediction, store_results
from tests.tiny import RECIPE, upsnet
from upsnet import builders
from upsnet.config import load_recipe, paths
from upsnet.dataset.cityscapes_preparation import prepare_cityscapes
from upsnet.evaluation.cityscapes import CityscapesAP
from upsnet.evaluation.cityscapes_submission import write_cityscapes_submission
from upsnet.evaluation.tables import ap_table
from upsnet.structures.errors import DataError
from upsnet.structures.results import Detections
from upsnet.structures.sample import VOID

HEIGHT, WIDTH = 128, 256
TEST_SET = "dataset.test_image_set=test"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cityscapes")
    write_miniature_cityscapes(folder / "data", size=(HEIGHT, WIDTH), train=2, val=4, test=1)
    prepare_cityscapes(folder / "data")
    options = "dataset: {dataset: Cityscapes, image_set: train, test_image_set: val,"
    (folder / "tiny.yaml").write_text(RECIPE.format(folder=folder).replace("dataset: {", options + " ", 1))
    return folder


@pytest.fixture(scope="module")
def recipe(folder):
    return load_recipe(str(folder / "tiny.yaml"))


def perturbed(truth, categories, draws):
    """A prediction that is right here and there: shifted, with wrong classes, gaps, doubles and inventions."""
    shift = draws.integers(-2, 3, 2)
    segment_map = np.roll(truth.segment_map, shift, axis=(0, 1))
    wrong = draws.choice([s.id for s in truth.segments], 3)
    segment_map[np.isin(segment_map, draws.choice(wrong, 1))] = 0
    prediction = as_prediction(truth, segment_map, {int(i): int(draws.integers(19)) for i in wrong})
    semantic_map = np.roll(truth.semantic_map, shift, axis=(0, 1))
    noise = draws.random(semantic_map.shape)
    semantic_map = np.where(noise < 0.1, draws.integers(19, size=semantic_map.shape), semantic_map)
    prediction.semantic_map = np.where(noise > 0.98, VOID, semantic_map).astype(np.int16)
    prediction.instances = detections(truth, categories, draws)
    return prediction


def detections(truth, categories, draws):
    masks, classes = [], []
    for record in truth.annotations:
        mask = coco_mask.decode(record["segmentation"])
        for _ in range(draws.integers(0, 3)):
            moved = np.roll(mask, draws.integers(-3, 4, 2), axis=(0, 1))
            moved[: draws.integers(0, HEIGHT // 2)] = 0  # sometimes nothing is left
            masks.append(moved)
            classes.append(categories.thing_class(record["category_id"]))
    for _ in range(30):  # anywhere: on void, groups, caravans, small things
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        y, x = draws.integers(0, HEIGHT), draws.integers(0, WIDTH)
        mask[y : y + draws.integers(1, 40), x : x + draws.integers(1, 60)] = 1
        masks.append(mask)
        classes.append(int(draws.integers(1, 9)))
    scores = (draws.integers(1, 12, len(masks)) / 12).astype(np.float32)  # ties
    rles = [coco_mask.encode(np.asfortranarray(mask)) for mask in masks]
    return Detections(np.tile([0, 0, 9, 9], (len(masks), 1)).astype(np.float32), np.array(classes), scores, rles)


def compare(summary, official):
    """All numbers that the official scripts and our summary have in common."""
    quality = summary["panoptic"]
    for group in ("all", "things", "stuff"):
        theirs = official["panoptic"][group.capitalize()]
        assert quality[group]["n"] == theirs["n"]
        for key in ("pq", "sq", "rq"):
            assert quality[group][key] == pytest.approx(100 * theirs[key], abs=1e-9)
    for row in quality["per_class"]:
        theirs = official["panoptic"]["per_class"][str(row["category_id"])]
        assert [row[key] for key in theirs] == pytest.approx([100 * value for value in theirs.values()], abs=1e-9)
    pairs = []
    if averages := official["instance"].get("averages"):
        ours = summary["cityscapes"]
        pairs += [(ours["ap"], averages["allAp"]), (ours["ap50"], averages["allAp50%"])]
        for row in ours["per_class"]:
            theirs = averages["classes"][row["name"]]
            pairs += [(row["ap"], theirs["ap"]), (row["ap50"], theirs["ap50%"])]
    semantic = summary["semantic"]
    pairs.append((semantic["miou_present"], official["pixel"]["averageScoreClasses"]))
    pairs += [(row["iou"], official["pixel"]["classScores"][row["name"]]) for row in semantic["per_class"]]
    for found, wanted in pairs:
        if np.isnan(wanted):  # a class that does not occur
            assert not found
        else:
            assert found == pytest.approx(100 * wanted, abs=1e-9)


def test_scores_are_those_of_the_official_scripts(folder, recipe, tmp_path):
    dataset = builders.build_test_set(recipe)
    truths = [dataset.truth(i) for i in range(dataset.num_photos)]
    predictions = [perturbed(t, dataset.categories, np.random.default_rng(t.image_id)) for t in truths]
    store_results(paths.results_folder(recipe), predictions, dataset.categories)
    ran = upsnet("test", "--cfg", folder / "tiny.yaml", "--eval_only")
    assert ran.code == 0, ran.err
    summary = json.loads((paths.results_folder(recipe) / "summary.json").read_text())
    assert upsnet("submission", "--cfg", folder / "tiny.yaml").code == 0
    archives = paths.results_folder(recipe) / "submission"
    official = official_scores(folder / "data", archives, tmp_path / "official")
    assert official["instance"]
    compare(summary, official)
    scores = (summary["panoptic"]["all"]["pq"], summary["cityscapes"]["ap"], summary["semantic"]["miou_present"])
    assert all(5 < score < 95 for score in scores), scores
    assert any("Mask (Cityscapes)" in line and f"{scores[1]:.1f}" in line for line in ran.out.splitlines())


def test_the_whole_road(folder, tmp_path):
    """Two steps of training, a test, and the official scripts on what it stored."""
    trained = upsnet("train", "--cfg", folder / "tiny.yaml", f"output_path={tmp_path}/out")
    assert trained.code == 0, trained.err
    ran = upsnet("test", "--cfg", folder / "tiny.yaml", f"output_path={tmp_path}/out")
    assert ran.code == 0, ran.err
    recipe = load_recipe(str(folder / "tiny.yaml"), [f"output_path={tmp_path}/out"])
    summary = json.loads((paths.results_folder(recipe) / "summary.json").read_text())
    assert upsnet("submission", "--cfg", folder / "tiny.yaml", f"output_path={tmp_path}/out").code == 0
    assert upsnet("report", "--cfg", folder / "tiny.yaml", f"output_path={tmp_path}/out").code == 0
    assert "Mask AP (Cityscapes)" in next(tmp_path.rglob("report.html")).read_text()
    archives = paths.results_folder(recipe) / "submission"
    compare(summary, official_scores(folder / "data", archives, tmp_path / "official"))

    without_labels = upsnet("test", "--cfg", folder / "tiny.yaml", f"output_path={tmp_path}/out", TEST_SET)
    assert without_labels.code == 0, without_labels.err
    archives = [line.removeprefix("submission: ") for line in without_labels.out.splitlines()]
    assert [Path(path).name for path in archives] == ["pixel.zip", "instance.zip", "panoptic.zip"]
    with zipfile.ZipFile(archives[0]) as archive:
        assert archive.namelist() == ["berlin_000000_000019.png"]


def test_archives_for_the_server(recipe, tmp_path):
    dataset = builders.build_test_set(recipe)
    truth = dataset.truth(0)
    prediction = perturbed(truth, dataset.categories, np.random.default_rng(0))
    stem = "frankfurt_000000_000019"
    assert truth.file_name == f"frankfurt/{stem}_leftImg8bit.png"
    files = write_cityscapes_submission([prediction], dataset.categories, "test", tmp_path)
    assert [path.name for path in files] == ["pixel.zip", "instance.zip", "panoptic.zip"] and not list(
        tmp_path.glob("*.part")
    )
    with zipfile.ZipFile(files[0]) as archive:
        assert archive.namelist() == [f"{stem}.png"]
        label_ids = np.asarray(Image.open(archive.open(f"{stem}.png")))
    wanted = np.array([*(category.id for category in dataset.categories), 0])[prediction.semantic_map]
    assert label_ids.dtype == np.uint8 and (label_ids == wanted).all() and {0, 7, 33} <= set(label_ids.ravel().tolist())
    with zipfile.ZipFile(files[1]) as archive:
        lines = [line.split() for line in archive.read(f"{stem}.txt").decode().splitlines()]
        for (mask, label, score), found, rle, thing_class in zip(
            lines, prediction.instances.scores, prediction.instances.masks, prediction.instances.classes, strict=True
        ):
            assert np.float32(score) == found
            assert int(label) == (24, 25, 26, 27, 28, 31, 32, 33)[thing_class - 1]
            assert (np.asarray(Image.open(archive.open(mask))) == 255 * coco_mask.decode(rle)).all()
    with zipfile.ZipFile(files[2]) as archive:
        (record,) = json.loads(archive.read("cityscapes_panoptic_test.json"))["annotations"]
        picture = np.asarray(Image.open(archive.open(f"cityscapes_panoptic_test/{record['file_name']}"))).astype(int)
    assert record["image_id"] == stem and {s["category_id"] for s in record["segments_info"]} <= set(range(7, 34))
    assert (picture @ [1, 256, 65536] == prediction.segment_map).all()


def test_no_archive_is_left_half_written(recipe, tmp_path):
    dataset = builders.build_test_set(recipe)

    def broken():
        yield perturbed(dataset.truth(0), dataset.categories, np.random.default_rng(0))
        raise DataError("stored results are damaged")

    with pytest.raises(DataError, match="damaged"):
        write_cityscapes_submission(broken(), dataset.categories, "val", tmp_path)
    with pytest.raises(DataError, match="image 1000001: a submission needs panoptic map, semantic map and instances"):
        write_cityscapes_submission([as_prediction(dataset.truth(0))], dataset.categories, "val", tmp_path)
    assert not list(tmp_path.iterdir())


def one_mask(categories, name, mask):
    category = next(category for category in categories if category.name == name)
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    classes = np.array([categories.thing_class(category.id)])
    return Detections(np.zeros((1, 4), np.float32), classes, np.ones(1, np.float32), [rle])


def scores_of(recipe, ids, name, mask):
    """The summary for a photo with this instance-id image and one detection."""
    dataset = builders.build_test_set(recipe)
    evaluator, truth = CityscapesAP(dataset.categories, lambda photo: ids), dataset.truth(0)
    prediction = as_prediction(truth)
    prediction.instances = one_mask(dataset.categories, name, mask)
    evaluator.add(prediction, truth)
    return evaluator.summary()


def test_what_counts_by_the_rule_of_cityscapes(recipe):
    ids = np.full((40, 60), 7, np.uint16)
    ids[:20, :20], ids[30:, :9], ids[:20, 40:] = 26000, 26001, 26  # a car, one of 90 pixels, a group of cars
    found = scores_of(recipe, ids, "car", ids == 26000)
    assert found["ap"] == found["ap50"] == 100.0, "the small one and the group are not missed"
    assert [row["ap"] for row in found["per_class"]] == [None, None, 100.0, None, None, None, None, None]
    assert scores_of(recipe, ids, "car", ids == 26)["ap"] == 0.0, "missed; here the official program stops"
    assert scores_of(recipe, ids, "car", ids == 7)["ap"] == 0.0
    nothing = scores_of(recipe, np.where(ids == 26000, 7, ids), "car", ids == 26000)
    assert nothing["ap"] is nothing["ap50"] is None, "no true instance counts"
    assert "–" in ap_table({"cityscapes": nothing})


@pytest.mark.parametrize(("value", "forgiven"), [(0, True), (29, True), (26, True), (29000, False), (7, False)])
def test_what_a_wrong_detection_may_lie_on(recipe, value, forgiven):
    """Void, unnumbered caravans and groups; a caravan with a number is no void (the official rule)."""
    ids = np.full((40, 60), 7, np.uint16)
    ids[:20, :20], ids[:20, 40:] = 26000, value
    dataset = builders.build_test_set(recipe)
    evaluator, truth = CityscapesAP(dataset.categories, lambda photo: ids), dataset.truth(0)
    prediction = as_prediction(truth)
    right = one_mask(dataset.categories, "car", ids == 26000)
    wrong = one_mask(dataset.categories, "car", np.pad(np.ones((20, 20)), ((0, 20), (40, 0))))
    prediction.instances = Detections(
        np.zeros((2, 4), np.float32),
        np.concatenate([right.classes, wrong.classes]),
        np.array([0.5, 0.9], np.float32),
        [*right.masks, *wrong.masks],
    )
    evaluator.add(prediction, truth)
    assert (evaluator.summary()["ap50"] == 100.0) == forgiven


def test_masks_of_another_size_and_missing_parts(recipe):
    dataset = builders.build_test_set(recipe)
    with pytest.raises(DataError, match=r"image 1000001: a mask has 10×20 pixels.*40×60"):
        scores_of(recipe, np.zeros((40, 60), np.uint16), "car", np.ones((10, 20)))
    truth = dataset.truth(0)
    with pytest.raises(ValueError, match="no instances"):
        CityscapesAP(dataset.categories, lambda photo: truth.segment_map).add(as_prediction(truth), truth)
