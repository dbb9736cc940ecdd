"""Preparation of Cityscapes, on a generated tree in the official layout."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic
from cityscapesscripts.preparation.json2labelImg import json2labelImg
from PIL import Image
from pycocotools import mask as coco_mask

from tests.miniature import edited
from tests.miniature_cityscapes import derive, write_miniature_cityscapes
from tests.tiny import upsnet
from upsnet.dataset import cityscapes_preparation
from upsnet.dataset.cityscapes import Split
from upsnet.dataset.cityscapes_preparation import prepare_cityscapes
from upsnet.structures.errors import DataError, PlaceError

SIZE = (64, 128)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A tree whose path holds what the original's text replacement stumbled over, and characters of glob patterns."""
    root = tmp_path_factory.mktemp("images") / "train" / "leftImg8bit [1]"
    write_miniature_cityscapes(root, size=SIZE, train=3, val=4, test=1, train_extra=1, demoVideo=1)
    before = contents(root)
    counts = prepare_cityscapes(root)
    assert counts == {"train": 3, "val": 4, "test": 1, "train_extra": 1, "demoVideo": 1}
    assert {path: data for path, data in contents(root).items() if path in before} == before
    return root


@pytest.fixture
def tree(tmp_path):
    return write_miniature_cityscapes(tmp_path / "cityscapes", size=SIZE, val=3)


def contents(root):
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def read(path):
    return json.loads(path.read_text())


def pixels(path):
    return np.asarray(Image.open(path)).astype(np.int64)


def test_the_files_of_the_official_tools(prepared, tmp_path):
    split = Split(prepared, "val")
    write_miniature_cityscapes(tmp_path, size=SIZE, val=4)  # the converter cannot take brackets in its path
    with redirect_stdout(StringIO()):
        convert2panoptic(str(tmp_path / "gtFine"), str(tmp_path), False, ["val"])
    assert split.official_json.read_bytes() == (tmp_path / split.official_json.name).read_bytes()
    for photo in split.photos():
        png = split.panoptic_png(photo)
        assert (pixels(png) == pixels(tmp_path / png.parent.name / png.name)).all()
        json2labelImg(str(split.label(photo, "polygons.json")), str(tmp_path / "label.png"), "trainIds")
        assert (pixels(split.label(photo, "labelTrainIds.png")) == pixels(tmp_path / "label.png")).all()


def test_records_for_the_reader(prepared):
    split = Split(prepared, "train")
    panoptic, official = read(split.panoptic_json), read(split.official_json)
    assert [image["file_name"] for image in panoptic["images"]] == [
        "aachen/aachen_000000_000019_leftImg8bit.png",
        "aachen/aachen_000001_000079_leftImg8bit.png",
        "bochum/bochum_000000_000049_leftImg8bit.png",
    ]
    assert (
        [image["id"] for image in panoptic["images"]] == [a["image_id"] for a in panoptic["annotations"]] == [1, 2, 3]
    )
    assert {(image["height"], image["width"]) for image in panoptic["images"]} == {SIZE}
    assert [(c["id"], c["name"]) for c in panoptic["categories"]] == [
        (c["id"], c["name"]) for c in official["categories"]
    ]
    for ours, theirs in zip(panoptic["annotations"], official["annotations"], strict=True):
        assert ours["segments_info"] == theirs["segments_info"] and ours["file_name"] == theirs["file_name"]
    first_ids = {name: read(Split(prepared, name).panoptic_json)["images"][0]["id"] for name in ("val", "train_extra")}
    first_ids |= {name: read(Split(prepared, name).info_json)["images"][0]["id"] for name in ("test", "demoVideo")}
    assert len({1, *first_ids.values()}) == 5
    demo = read(Split(prepared, "demoVideo").info_json)["images"]
    assert demo[0]["file_name"] == "stuttgart_00/stuttgart_00_000000_000019_leftImg8bit.png"


def test_instances_are_those_of_the_id_image(prepared):
    split = Split(prepared, "val")
    content = read(split.instances_json)
    names, seen = {image["id"]: image["file_name"] for image in content["images"]}, set()
    assert len({record["id"] for record in content["annotations"]}) == len(content["annotations"])
    assert [c["id"] for c in content["categories"]] == [24, 25, 26, 27, 28, 31, 32, 33]
    for image_id, photo in names.items():
        ids = pixels(split.label(photo, "instanceIds.png"))
        seen |= set(np.unique(ids).tolist())
        wanted = {
            i for i in np.unique(ids).tolist() if (i if i < 1000 else i // 1000) in (24, 25, 26, 27, 28, 31, 32, 33)
        }
        for record in (r for r in content["annotations"] if r["image_id"] == image_id):
            mask = coco_mask.decode(record["segmentation"]).astype(bool)
            (value,) = np.unique(ids[mask]).tolist()
            wanted.remove(value)
            assert record["area"] == (ids == value).sum() == mask.sum()
            assert record["iscrowd"] == (value < 1000) and record["category_id"] == (
                value if value < 1000 else value // 1000
            )
            ys, xs = np.nonzero(mask)
            assert record["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        assert not wanted
    assert {24, 26, 33, 29000} <= seen, "there are groups, and things that are not scored"


def test_what_is_whole_is_not_written_again(prepared):
    times = {path: path.stat().st_mtime_ns for path in contents(prepared)}
    prepare_cityscapes(prepared)
    assert {path: path.stat().st_mtime_ns for path in contents(prepared)} == times


def test_half_files_are_made_again(tree):
    prepare_cityscapes(tree)
    split, whole = Split(tree, "val"), contents(tree)
    photo = split.photos()[1]
    for path in (split.panoptic_png(photo), split.label(photo, "labelTrainIds.png"), split.panoptic_json):
        for length in (0, 30, -20):
            path.write_bytes(whole[path][:length])
            prepare_cityscapes(tree)
            assert contents(tree) == whole
    split.instances_json.unlink()
    prepare_cityscapes(tree)
    assert contents(tree) == whole


def test_an_interrupted_run_leaves_no_half_set(tree, monkeypatch):
    split, steps = Split(tree, "val"), []

    def stop(*arguments):
        steps.append(arguments)
        if len(steps) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(cityscapes_preparation, "_write_train_ids", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_cityscapes(tree)
    assert not (tree / "annotations").exists() and not list(tree.rglob("*.part"))
    monkeypatch.undo()
    prepare_cityscapes(tree)
    assert len(read(split.panoptic_json)["images"]) == 3


def test_a_split_is_not_ready_while_its_jsons_are_written(tree, monkeypatch):
    """Image ids are running numbers: an old panoptic json must never stand beside new instances."""
    prepare_cityscapes(tree)
    split, write = Split(tree, "val"), cityscapes_preparation._write_json

    def stop(path, *arguments, **options):
        if path == split.panoptic_json:
            raise KeyboardInterrupt
        write(path, *arguments, **options)

    shutil.rmtree(split.photo_dir / "frankfurt")
    shutil.rmtree(split.label_dir / "frankfurt")
    monkeypatch.setattr(cityscapes_preparation, "_write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_cityscapes(tree)
    assert len(read(split.instances_json)["images"]) == 1 and not split.panoptic_json.exists()


def test_several_processes_make_the_same(tree, tmp_path, monkeypatch):
    other = shutil.copytree(tree, tmp_path / "other")
    prepare_cityscapes(tree)
    monkeypatch.setattr(cityscapes_preparation, "_FEW", 0)
    prepare_cityscapes(other, workers=2)
    assert list(contents(tree).values()) == list(contents(other).values())


def fails(root):
    with pytest.raises(DataError) as caught:
        prepare_cityscapes(root)
    assert not (root / "annotations").exists()
    return str(caught.value)


def test_a_tree_that_is_not_there(tmp_path):
    message = fails(tmp_path / "nowhere")
    assert (
        "gtFine_trainvaltest.zip" in message and "www.cityscapes-dataset.com" in message and "registration" in message
    )
    (tmp_path / "leftImg8bit" / "train").mkdir(parents=True)
    assert "neither of train nor of val" in fails(tmp_path)


@pytest.mark.parametrize("what", ["polygons.json", "labelIds.png", "instanceIds.png"])
def test_missing_labels_are_named(tree, what):
    split = Split(tree, "val")
    split.label(split.photos()[-1], what).unlink()
    message = fails(tree)
    assert f"val: 1 photos lack their gtFine_{what}, in munster, first munster_000000_000049" in message
    assert "www.cityscapes-dataset.com" in message


def test_missing_photos_are_named(tree, caplog):
    shutil.rmtree(tree / "leftImg8bit" / "val" / "frankfurt")
    assert "val: 2 files gtFine_polygons.json lack their photo, in frankfurt" in fails(tree)
    assert "2 files gtFine_instanceIds.png lack their photo" in caplog.text


def test_other_splits_without_labels_are_left_out(tree, caplog):
    write_miniature_cityscapes(tree, size=SIZE, train_extra=1)
    shutil.rmtree(tree / "gtCoarse")
    assert prepare_cityscapes(tree) == {"val": 3}
    assert "train_extra: there is no folder" in caplog.text and "train: there are no photos" in caplog.text
    assert "val: 3 photos, the official set has 500" in caplog.text


def test_photos_of_val_without_its_labels_are_an_incomplete_tree(tree):
    write_miniature_cityscapes(tree, size=SIZE, train=1)
    shutil.rmtree(tree / "gtFine" / "val")
    assert "val: 3 photos lack their gtFine_polygons.json" in fails(tree)


def test_colour_images_are_not_needed(tree):
    for path in tree.rglob("*_color.png"):
        path.unlink()
    assert prepare_cityscapes(tree) == {"val": 3}


def test_damaged_and_contradicting_files(tree):
    split = Split(tree, "val")
    first = split.photos()[0]
    photo, ids, polygons = (
        split.photo_dir / first,
        *(split.label(first, w) for w in ("instanceIds.png", "polygons.json")),
    )
    for path, broken, message in (
        (photo, photo.read_bytes()[:-30], "cut off"),
        (ids, ids.read_bytes()[:-30], "cut off"),
        (polygons, b"{", "the official converter refuses it"),
        (polygons, polygons.read_bytes().replace(b'"building"', b'"castle"'), "the official converter refuses it"),
    ):
        kept = path.read_bytes()
        path.write_bytes(broken)
        found = fails(tree)
        assert str(path) in found and message in found
        path.write_bytes(kept)
    Image.new("RGB", (20, 10)).save(photo)
    assert "10×20" in fails(tree) and "64×128" in fails(tree)


def test_ids_and_sizes_that_do_not_fit(tree):
    split = Split(tree, "val")
    ids, polygons = (split.label(split.photos()[0], what) for what in ("instanceIds.png", "polygons.json"))
    for unknown in (35000, 50):
        Image.fromarray(np.full(SIZE, unknown, np.uint16)).save(ids)
        assert f"{ids}: holds the id {unknown}" in fails(tree)
    derive(polygons)
    with edited(polygons) as content:
        content["imgWidth"] = 130
    assert f"{polygons}: has another image size" in fails(tree)


def test_a_tree_that_cannot_be_written(tree):
    Split(tree, "val").png_dir.write_text("a file where the folder should be")
    with pytest.raises(PlaceError, match=r"cannot write .*_gtFine_panoptic\.png"):
        prepare_cityscapes(tree)
    assert not (tree / "annotations").exists()
    Split(tree, "val").png_dir.unlink()
    (tree / "annotations").write_text("a file again")
    with pytest.raises(PlaceError, match=r"cannot write .*annotations/"):
        prepare_cityscapes(tree)


def test_the_command(tree):
    ran = upsnet("prepare", "cityscapes", tree)
    assert ran.code == 0 and ran.out == "val: 3 photos, ready\n"
    failed = upsnet("prepare", "cityscapes", tree / "val")
    assert failed.code == 2 and len(failed.errors) == 1 and "leftImg8bit" in failed.errors[0]
    photo = next((tree / "leftImg8bit/val").glob("*/*.png"))
    photo.write_bytes(b"cut off")
    failed = upsnet("prepare", "cityscapes", tree)
    assert failed.code == 2 and len(failed.errors) == 1 and str(photo) in failed.errors[0], "on a line of its own"


def test_what_may_not_be_read(tree, monkeypatch):
    """Folders are closed for everybody but root; a test may run as root."""

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied", "closed")

    monkeypatch.setattr(cityscapes_preparation, "check_tree", refuse)
    ran = upsnet("prepare", "cityscapes", tree)
    assert ran.code == 2 and "closed: cannot be read (Permission denied)" in ran.errors[0]


def test_the_script(tree, tmp_path):
    """It runs this checkout with the Python of the active environment, and says what to do where there is none."""
    script = Path(__file__).resolve().parents[2] / "init_cityscapes.sh"

    def run(environment, *arguments):
        variables = {**os.environ, "VIRTUAL_ENV": str(environment)}
        return subprocess.run([script, *arguments], cwd=tmp_path, env=variables, capture_output=True, text=True)

    helped = run(tmp_path, "--help")
    assert helped.returncode == 0 and "gtFine_trainvaltest.zip" in helped.stdout
    missing = run(tmp_path, tree)
    assert missing.returncode == 2 and "run ./init.sh first" in missing.stderr
    tree.rename(tmp_path / "some tree")
    ran = run(Path(sys.executable).parents[1], "some tree")
    assert ran.returncode == 0 and ran.stdout == "val: 3 photos, ready\n", ran.stderr
    stand_in = tmp_path / "bin" / "python"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/usr/bin/env bash\necho "$@"\n')
    stand_in.chmod(0o755)
    assert run(tmp_path).stdout.splitlines()[-1] == f"-m upsnet prepare cityscapes {script.parent}/data/cityscapes"
