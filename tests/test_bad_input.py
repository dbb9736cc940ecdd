"""Twenty kinds of bad input: one clear sentence each, exit code 2, no traceback, nothing half-written."""

import json
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.miniature import edited
from tests.tiny import copy_run, upsnet

PHOTO, LABEL = "data/images/{0}/000000000003.jpg", "data/annotations/panoptic_{0}/000000000003.png"
JSON = "data/annotations/panoptic_{0}.json"
LOG_LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \| \w+\.py \| line \d+: "
PROGRESS = r"\s*(train|test|validate|predict|report):? .*\d+(/\d+)? \["


@pytest.fixture
def folder(tiny_run, tmp_path):
    """A data set, a trained network and its results; each test breaks one thing."""
    copy_run(tiny_run, tmp_path)
    return tmp_path


def refused(folder, command, *arguments, says=()):
    """Runs a command that must fail in one sentence which holds these words; returns the sentence."""
    before = files_of(folder)
    ran = upsnet(command, *([] if "--cfg" in arguments else ["--cfg", folder / "tiny.yaml"]), *arguments)
    assert ran.code == 2, ran.err
    (sentence,) = ran.errors
    assert "Traceback" not in ran.err and "Traceback" not in ran.out
    for line in re.split(r"[\r\n]+", ran.err):
        known = not line.strip() or line == sentence or re.match(rf"\s*{LOG_LINE}|{PROGRESS}", line)
        assert known, f"a line beside the sentence: {line!r}"
    for word in says:
        assert str(word) in sentence, sentence
    left = {path for path in files_of(folder) - before if path.suffix != ".log" and "tensorboard" not in path.parts}
    assert not [path for path in left if path.name.startswith(".") or path.suffix in (".part", ".tmp")], left
    assert not [path for path in left if path.suffix == ".pth" or path.name in ("index.json", "summary.json")], left
    for path in left:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            assert cv2.imread(str(path)) is not None, f"{path} is not whole"
    print(sentence)
    return sentence


def files_of(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def train(folder, *changes, **says):
    """A training that meets image 3 first, in a loader process."""
    first = ("train.shuffle=false", "dataset.num_workers=1", f"output_path={folder}/new")
    return refused(folder, "train", *first, *changes, **says)


def test(folder, *arguments, **says):
    return refused(folder, "test", f"output_path={folder}/new", *_weights(folder, arguments), **says)


test.__test__ = False


def _weights(folder, arguments):
    named = "--weight_path" in arguments or any("=" not in str(a) for a in arguments)
    return [*arguments, *([] if named else ["--weight_path", folder / "out/tiny/train/tiny_2.pth"])]


def of_image(content, image_id=3):
    return next(a for a in content["annotations"] if a["image_id"] == image_id)


# -- data --------------------------------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("run, image_set", [(train, "train"), (test, "val")], ids=["train", "test"])


@BOTH
def test_truncated_jpeg(folder, run, image_set):
    path = folder / PHOTO.format(image_set)
    path.write_bytes(path.read_bytes()[:700])
    run(folder, says=["image 3", path, "cut off", "download it again"])


@BOTH
def test_image_of_another_size_than_the_json_says(folder, run, image_set):
    path = folder / PHOTO.format(image_set)
    cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), (60, 48)))
    run(folder, says=["image 3", path, "48×60", "48×64", "do not belong together"])


@BOTH
def test_png_id_without_record(folder, run, image_set):
    path = folder / LABEL.format(image_set)
    picture = cv2.imread(str(path))
    picture[0, 0] = (0, 0, 77)
    cv2.imwrite(str(path), picture)
    run(folder, says=["image 3", path, "segment 77", "add the record"])


@BOTH
def test_record_without_pixels(folder, run, image_set):
    path = folder / JSON.format(image_set)
    with edited(path) as content:
        infos = of_image(content)["segments_info"]
        infos.append({**infos[0], "id": 12345})
    run(folder, says=["image 3", path, "segment 12345", "no pixel", "remove the record"])


@BOTH
def test_unknown_category(folder, run, image_set):
    path = folder / JSON.format(image_set)
    with edited(path) as content:
        of_image(content)["segments_info"][0].update(category_id=66)
    run(folder, says=["image 3", path, "category 66", "segment 41", "add the category"])


@BOTH
def test_duplicate_segment_id(folder, run, image_set):
    path = folder / JSON.format(image_set)
    with edited(path) as content:
        infos = of_image(content)["segments_info"]
        infos.append(dict(infos[0]))
    run(folder, says=["image 3", path, "segment id 41", "needs its own id"])


@BOTH
def test_missing_isthing(folder, run, image_set):
    path = folder / JSON.format(image_set)
    with edited(path) as content:
        del content["categories"][2]["isthing"]
    run(folder, says=[path, "category 'box'", "'isthing'", "add it"])


@BOTH
def test_missing_png(folder, run, image_set):
    path = folder / LABEL.format(image_set)
    path.unlink()
    run(folder, says=["image 3", path, "No such file", "check the path"])


# -- recipe ------------------------------------------------------------------------------------------------------------


def test_unknown_key(folder):
    recipe = folder / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("max_iteration:", "max_iterations:"))
    train(folder, says=["train.max_iterations", recipe, "'train.max_iteration'"])
    refused(folder, "test", "--cfg", folder.parent / "nowhere.yaml", says=["nowhere.yaml", "is not there"])


def test_wrong_type(folder):
    recipe = folder / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("lr: 0.02", "lr: fast"))
    train(folder, says=["train.lr", recipe, "must be a number", "'fast'"])


def test_negative_learning_rate(folder):
    train(folder, "train.lr=-0.1", says=["train.lr", "the overrides", "greater than 0", "-0.1"])


def test_missing_base(folder):
    recipe = folder / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("base: upsnet_resnet18_shapes", "base: ancestors.yaml"))
    train(folder, says=[recipe, "base", "ancestors.yaml", "give the path"])


def test_class_count_that_contradicts_the_data(folder):
    train(folder, "dataset.num_classes=81", says=["dataset.num_classes", "81", folder / "data", "correct the recipe"])
    test(folder, "dataset.num_seg_classes=133", says=["dataset.num_seg_classes", "133", "correct the recipe"])


# -- weights -----------------------------------------------------------------------------------------------------------


def with_weights(folder, path, says):
    """As weights to test and to predict with, and to start training from."""
    photo = folder / PHOTO.format("val")
    test(folder, "--weight_path", path, says=says)
    refused(folder, "predict", "--weight_path", path, "--out", folder / "predicted", photo, says=says)
    train(folder, f"network.pretrained={path}", says=[path])


def test_text_file_as_weights(folder):
    path = folder / "notes.pth"
    path.write_text("these are not the weights that you are looking for")
    with_weights(folder, path, [path, "is not a weight file", "download or copy it again"])


def test_weights_of_another_network(folder):
    path, names = folder / "resnet.pth", ("conv1.weight", "layer1.0.conv1.weight")
    torch.save({name: torch.zeros(64, 64, 1, 1) for name in names}, path)
    with_weights(folder, path, [path, "is a ResNet alone", "network.pretrained"])
    torch.save({"backbone.stem.conv.weight": torch.zeros(64, 3, 7, 7)}, path)
    with_weights(folder, path, [path, "belongs to another network", "missing: "])
    trained = folder / "out/tiny/train/tiny_2.pth"
    other = ("network.rcnn_feature_dim=64", "--weight_path", trained)
    test(folder, *other, says=[trained, "of another shape", "box_head", "use the recipe it was trained with"])


def test_weights_of_another_class_table(folder):
    path, trained = folder / JSON.format("val"), folder / "out/tiny/train/tiny_2.pth"
    path.write_text(path.read_text().replace('"ball"', '"globe"'))
    test(folder, says=[trained, "'ball' (id 90) there and 'globe' (id 90) in the data", "use the data set"])


def test_resuming_with_other_classes_or_anchors(folder):
    resume = ("train", "train.resume=true", "train.begin_iteration=2", "train.max_iteration=3")
    refused(folder, *resume, "network.anchor_ratios=[0.4, 1, 2]", says=["tiny_2.pth", "network.anchor_ratios"])
    path = folder / JSON.format("train")
    path.write_text(path.read_text().replace('"ball"', '"globe"'))
    refused(folder, *resume, says=["tiny_2.pth", "'ball' (id 90) there and 'globe' (id 90) in the data"])


def test_missing_weights(folder):
    with_weights(folder, folder / "lost.pth", [folder / "lost.pth", "there is no weight file", "check the path"])
    refused(folder, "test", "test.test_iteration=5", says=["tiny_5.pth", "there is no weight file"])
    refused(folder, "train", "train.resume=true", "train.begin_iteration=7", says=["tiny_7.pth is", "tiny_2.pth"])


def test_nan_inside_the_weights(folder):
    content = torch.load(folder / "out/tiny/train/tiny_2.pth", weights_only=True)
    content["weights"]["rpn.conv.bias"][3] = float("nan")
    path = folder / "sick.pth"
    torch.save(content, path)
    with_weights(folder, path, [path, "NaN", "rpn.conv.bias", "use another file"])


# -- places ------------------------------------------------------------------------------------------------------------


def test_unwritable_output(folder):
    """Below a regular file nobody can make a folder, not even root."""
    wall = folder / "wall"
    wall.write_text("")
    weights, photo = folder / "out/tiny/train/tiny_2.pth", folder / PHOTO.format("val")
    says = [wall, "Not a directory", "make room or choose a folder"]
    refused(folder, "train", f"output_path={wall}/out", says=says)
    refused(folder, "test", f"output_path={wall}/out", says=says)
    refused(folder, "report", "--out", wall / "page", says=says[:2])
    refused(folder, "predict", "--weight_path", weights, "--out", wall / "out", photo, says=says[:2])
    (folder / "closed/tiny/val").mkdir(parents=True)
    (folder / "closed/tiny/val/results").write_text("")
    refused(
        folder, "test", f"output_path={folder}/closed", "--weight_path", weights,
        says=[folder / "closed/tiny/val/results", "choose a folder"],
    )  # fmt: skip


FULL = Path("/dev/full")
full_disk = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full to stand for a full disk")


@full_disk
@pytest.mark.parametrize(
    "file", ["train/.tiny_2.pth.{pid}.tmp", "train/.tiny_2.state.pth.{pid}.tmp", "train/metrics.jsonl.part"]
)
def test_disk_full_while_training(folder, file):
    path = folder / "new/tiny" / file.format(pid=os.getpid())
    path.parent.mkdir(parents=True)
    path.symlink_to(FULL)
    train(folder, says=[folder / "new/tiny/train", "No space left on device", "make room"])
    assert not list((folder / "new").rglob("*.pth"))


@full_disk
@pytest.mark.parametrize(
    "file",
    ["panoptic.json", "bbox_results.json", "panoptic/000000000003.png", "semantic/000000000003.png", "index.json"],
)
def test_disk_full_while_testing(folder, file):
    results = folder / "new/tiny/val/results"
    path = results / f"{file}.part"
    path.parent.mkdir(parents=True)
    path.symlink_to(FULL)
    test(folder, says=[results / file, "No space left on device", "make room"])
    assert not (results / "index.json").exists() and not (results / "summary.json").exists()
    assert not path.is_symlink() and not list(results.rglob("*.part"))


@full_disk
@pytest.mark.parametrize("ending", [".png", ".json", "_drawn.png"])
def test_disk_full_while_predicting(folder, ending):
    out = folder / "predicted"
    out.mkdir()
    (out / f"000000000003{ending}.part").symlink_to(FULL)
    refused(
        folder, "predict", "--weight_path", folder / "out/tiny/train/tiny_2.pth", "--out", out,
        folder / PHOTO.format("val"), says=[f"000000000003{ending}", "No space left on device", "make room"],
    )  # fmt: skip


def test_data_path_not_there(folder):
    lost = folder / "lost"
    says = [lost, "there is no such folder", "dataset.dataset_path"]
    train(folder, f"dataset.dataset_path={lost}", says=says)
    test(folder, f"dataset.dataset_path={lost}", says=says)


# -- photos to predict -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, says", [(None, "no such photo"), (b"", "cut off"), (b"a letter", "not a picture")])
def test_photos_that_are_none(folder, content, says):
    photo = folder / "letter.jpg"
    if content is not None:
        photo.write_bytes(content)
    weights = folder / "out/tiny/train/tiny_2.pth"
    refused(folder, "predict", "--weight_path", weights, "--out", folder / "predicted", photo, says=[photo, says])


def test_evaluating_files_that_are_not_there(folder):
    truth = folder / JSON.format("val")
    ran = upsnet("evaluate", "--pred", folder / "lost.json", "--gt", truth)
    assert ran.code == 2 and "lost.json: there is no such file" in ran.errors[0]


def test_scoring_without_results(folder):
    test(folder, "--eval_only", says=["holds no complete results", "run the test without --eval_only"])


def test_an_image_that_no_network_can_see(folder):
    """Too thin for the scale: refused by its id."""
    path = folder / PHOTO.format("val")
    cv2.imwrite(str(path), np.zeros((1, 4000, 3), np.uint8))
    refused(
        folder, "predict", "--weight_path", folder / "out/tiny/train/tiny_2.pth", "--out", folder / "o", path,
        says=[path.name, "long and thin"],
    )  # fmt: skip
