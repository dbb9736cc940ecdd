"""The check of a COCO tree: whole trees, trees with one fault each, and the script that users call."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.dataset.test_index_cache import enlarge
from tests.miniature import edited, write_json, write_miniature
from tests.tiny import upsnet
from upsnet.dataset.coco_check import check_coco
from upsnet.structures.errors import DataError
from upsnet.structures.pictures import photo_size

ROOT = Path(__file__).resolve().parents[2]
VAL, TRAIN = "val2017", "train2017"
LABEL, PHOTO = "annotations/panoptic_val2017/000000000010.png", "images/val2017/000000000010.jpg"


@pytest.fixture
def tree(tmp_path):
    for name in (TRAIN, VAL):
        write_miniature(tmp_path / "coco", name, instances=True)
    return tmp_path / "coco"


def contents(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def reports_of(tree, deep=False):
    return {report.name: report for report in check_coco(tree, deep)}


def only_fault(tree, image_set=VAL, deep=False):
    """The one fault of a tree, which must be in this set."""
    faults = [(report.name, fault) for report in check_coco(tree, deep) for fault in report.faults]
    ((name, fault),) = faults
    assert name == image_set
    return fault


@pytest.mark.parametrize("deep", [False, True])
def test_a_whole_tree(tree, deep):
    reports = reports_of(tree, deep)
    assert not [fault for report in reports.values() for fault in report.faults]
    assert list(reports) == [TRAIN, VAL, "test2017"]
    assert [report.photos for report in reports.values()] == [6, 6, None]
    assert reports[TRAIN].notes == ["a subset: the official set has 118287 photos"]
    assert reports[VAL].notes == ["a subset: the official set has 5000 photos"]
    (note,) = reports["test2017"].notes
    assert "http://images.cocodataset.org/zips/test2017.zip" in note and "image_info_test2017.zip" in note


def test_there_is_no_tree(tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        check_coco(tmp_path / "coco")


def test_an_empty_tree(tmp_path):
    reports = reports_of(tmp_path)
    for name in (TRAIN, VAL):
        faults = "\n".join(reports[name].faults)
        assert len(reports[name].faults) == 4 and reports[name].photos is None
        for archive in (f"zips/{name}", "annotations/annotations_trainval2017", "panoptic_annotations_trainval2017"):
            assert f"{archive}.zip" in faults


# -- one fault each ----------------------------------------------------------------------------------------------------


def remove_folder(path):
    for each in path.iterdir():
        each.unlink()
    path.rmdir()


def write_other_size(path):
    picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(path), picture[:-1])


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def edit(change):
    def apply(path):
        with edited(path) as content:
            change(content)

    return apply


def name_twice(content):
    content["images"].append(content["images"][0])


def lose_annotation(content):
    content["annotations"].pop(0)


def another_image(content):
    content["annotations"][0]["image_id"] = 77


def resize_rle(content):
    next(a for a in content["annotations"] if isinstance(a["segmentation"], dict))["segmentation"]["size"] = [9, 9]


FAULTS = {
    "photos gone": (remove_folder, "images/val2017", r"images/val2017: is not there: unpack http\S*/zips/val2017\.zip"),
    "labels gone": (
        remove_folder,
        "annotations/panoptic_val2017",
        r"panoptic_val2017: is not there: unpack http\S*/panoptic_annotations_trainval2017\.zip in \S*coco, then "
        r"unpack \S*panoptic_val2017\.zip in \S*annotations$",
    ),
    "instances gone": (
        Path.unlink,
        "annotations/instances_val2017.json",
        r"instances_val2017\.json: is not there: unpack http\S*/annotations_trainval2017\.zip",
    ),
    "json gone": (Path.unlink, "annotations/panoptic_val2017.json", r"panoptic_val2017\.json: is not there: unpack"),
    "json cut": (cut, "annotations/panoptic_val2017.json", "is not a valid json file .*copy or download it again"),
    "instances cut": (cut, "annotations/instances_val2017.json", "instances_val2017.json: is not a valid json file"),
    "photo gone": (Path.unlink, PHOTO, r"^photos that are not there: 1 \(000000000010\.jpg\): copy or unpack"),
    "photo cut": (cut, PHOTO, r"^photos that are damaged or cut off: 1 \(000000000010\.jpg\)"),
    "photo empty": (lambda path: path.write_bytes(b""), PHOTO, "^photos that are damaged or cut off: 1"),
    "photo no picture": (lambda path: path.write_text("<html>"), PHOTO, "^photos that are damaged or cut off: 1"),
    "photo of another size": (
        write_other_size,
        PHOTO,
        r"^photos of another size than the json says: 1 \(000000000010\.jpg \(47×64, json 48×64\)",
    ),
    "label gone": (Path.unlink, LABEL, r"^label PNGs that are not there: 1 \(000000000010\.png\)"),
    "label cut": (cut, LABEL, r"^label PNGs that are damaged or cut off: 1 \(000000000010\.png\)"),
    "label of another size": (write_other_size, LABEL, r"^label PNGs of another size .*\(47×64, json 48×64\)"),
    "image named twice": (edit(name_twice), "annotations/panoptic_val2017.json", "image id 38 occurs twice"),
    "image without label": (edit(lose_annotation), "annotations/panoptic_val2017.json", "image 3 has no annotation"),
    "label without image": (edit(another_image), "annotations/panoptic_val2017.json", "image 3 has no annotation"),
    "RLE of another size": (
        edit(resize_rle),
        "annotations/instances_val2017.json",
        r"image \d+: annotation \d+: the RLE has size \[9, 9\], the photo \[\d+, \d+\]",
    ),
    "instance without image": (
        edit(another_image),
        "annotations/instances_val2017.json",
        r"annotation 1 belongs to image 77, which \S*panoptic_val2017\.json does not list",
    ),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_one_fault(kind, tree):
    do, path, sentence = FAULTS[kind]
    do(tree / path)
    before = contents(tree)
    fault = only_fault(tree)
    assert re.search(sentence, fault), fault
    assert contents(tree) == before


def test_each_kind_is_told_once_with_the_first_offenders(tree):
    photos = sorted((tree / "images/train2017").iterdir())
    for path in photos[:4]:
        path.unlink()
    write_other_size(photos[5])
    faults = reports_of(tree)[TRAIN].faults
    first = ", ".join(path.name for path in photos[:3])
    assert len(faults) == 2 and faults[0].startswith(f"photos that are not there: 4 (first {first}): ")
    assert faults[1].startswith(f"photos of another size than the json says: 1 ({photos[5].name} (")


def test_files_that_no_json_names_are_noted(tree):
    for name in ("b.jpg", "a.jpg", "inner/c.jpg"):
        path = tree / "images/val2017" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tree / "annotations/panoptic_val2017/d.png").touch()
    report = reports_of(tree)[VAL]
    assert not report.faults and len(report.notes) == 3
    assert f"files in {tree}/images/val2017 that no json names, not used: 3 (a.jpg, b.jpg, inner/c.jpg)" in report.notes
    assert any(note.endswith("not used: 1 (d.png)") for note in report.notes)


def test_a_photo_that_exif_turns_is_right(tree):
    path = tree / PHOTO
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (48, 64)).save(path, exif=exif)
    assert not reports_of(tree)[VAL].faults
    Image.new("RGB", (48, 64)).save(path)
    assert "(64×48, json 48×64)" in only_fault(tree)


def test_a_photo_cut_anywhere(tree):
    path = tree / PHOTO
    data = path.read_bytes()
    for length in range(0, len(data) - 1, 7):
        path.write_bytes(data[:length])
        with pytest.raises(DataError):
            photo_size(path)
    path.write_bytes(data)
    assert photo_size(path) == (48, 64)


def test_what_follows_the_end_of_a_photo_is_no_damage(tree):
    path = tree / PHOTO
    path.write_bytes(path.read_bytes() + bytes(5000))
    assert not reports_of(tree)[VAL].faults


def test_segments_are_compared_by_a_deep_check_only(tree):
    picture = cv2.imread(str(tree / LABEL))
    picture[0, 0] = (1, 2, 3)
    cv2.imwrite(str(tree / LABEL), picture)
    assert not reports_of(tree)[VAL].faults
    fault = only_fault(tree, deep=True)
    assert fault.startswith("images damaged inside, or with labels that contradict the json: 1 (image 10: ")
    assert "has pixels of segment 66051" in fault


def test_a_photo_damaged_inside_is_found_by_a_deep_check_only(tree):
    _, encoded = cv2.imencode(".png", np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
    data, middle = encoded.tobytes(), len(encoded) // 2
    (tree / PHOTO).write_bytes(data[:middle] + bytes(40) + data[middle + 40 :])
    assert not reports_of(tree)[VAL].faults
    assert "images damaged inside" in only_fault(tree, deep=True)


def test_what_may_not_be_read(tree, monkeypatch):
    """Folders are closed for everybody but root; a test may run as root."""

    def refuse(folder):
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "scandir", refuse)
    ran = upsnet("prepare", "coco", tree)
    assert ran.code == 2 and f"{tree}/images/train2017: cannot be read (Permission denied)" in ran.errors[0]


# -- hints -------------------------------------------------------------------------------------------------------------


def test_photos_that_lie_one_folder_too_high(tree):
    (tree / "images/val2017").rename(tree / "val2017")
    assert f"is not there, but {tree / 'val2017'} is: move it" in only_fault(tree)


def test_labels_that_are_still_packed(tree):
    remove_folder(tree / "annotations/panoptic_val2017")
    (tree / "annotations/panoptic_val2017.zip").touch()
    fault = only_fault(tree)
    assert fault.endswith(f"unpack {tree}/annotations/panoptic_val2017.zip in {tree}/annotations")
    assert "http" not in fault


def test_files_of_the_original_are_not_used(tree):
    (tree / "annotations/panoptic_val2017_stff.json").touch()
    (tree / "annotations/panoptic_val2017_semantic_trainid_stff").mkdir()
    report = reports_of(tree)[VAL]
    assert not report.faults and len(report.notes) == 2
    assert "preparation made, not used: 2 (panoptic_val2017_stff.json" in report.notes[1]


def test_large_jsons_get_an_index(tree, monkeypatch):
    monkeypatch.delenv("UPSNET_INDEX", raising=False)
    enlarge(tree / "annotations/panoptic_train2017.json")
    check_coco(tree)
    assert sorted(path.name for path in (tree / ".upsnet_index").iterdir()) == [
        "panoptic_train2017.bin",
        "panoptic_train2017.json",
    ]


# -- photos of the test sets -------------------------------------------------------------------------------------------


def write_test_sets(tree):
    write_miniature(tree / "other", "test2017")
    (tree / "other/images/test2017").rename(tree / "images/test2017")
    with edited(tree / "other/annotations/panoptic_test2017.json") as content:
        images = content["images"]
    write_json(tree / "annotations/image_info_test2017.json", {"images": images, "categories": []})
    write_json(tree / "annotations/image_info_test-dev2017.json", {"images": images[:4], "categories": []})


def test_test_sets(tree):
    write_test_sets(tree)
    reports = reports_of(tree, deep=True)
    assert [reports[name].photos for name in ("test2017", "test-dev2017")] == [6, 4]
    assert not [fault for report in reports.values() for fault in report.faults]
    assert reports["test-dev2017"].notes == ["a subset: the official set has 20288 photos"]


def test_faults_of_test_sets(tree):
    write_test_sets(tree)
    next((tree / "images/test2017").glob("*17.jpg")).unlink()
    reports = reports_of(tree)
    for name in ("test2017", "test-dev2017"):
        assert reports[name].faults[0].startswith("photos that are not there: 1 (000000000017.jpg)")
    remove_folder(tree / "images/test2017")
    cut(tree / "annotations/image_info_test2017.json")
    reports = reports_of(tree)
    assert "zips/test2017.zip" in reports["test2017"].faults[0] and "not a valid json" in reports["test2017"].faults[1]


# -- the script --------------------------------------------------------------------------------------------------------


def script(*arguments, cwd=ROOT, environment=None):
    """Runs it with the interpreter of this test, unless told otherwise."""
    variables = {**os.environ, "VIRTUAL_ENV": str(environment or Path(sys.executable).parents[1])}
    command = ["bash", str(ROOT / "init_coco.sh"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)


def test_the_script_is_executable_and_explains_itself():
    assert (ROOT / "init_coco.sh").stat().st_mode & 0o111
    helped = script("--help")
    assert helped.returncode == 0 and "./init_coco.sh [PATH] [--deep]" in helped.stdout
    for archive in ("train2017", "val2017", "annotations_trainval2017", "panoptic_annotations_trainval2017"):
        assert f"/{archive}.zip" in helped.stdout


def test_the_script_on_a_whole_tree(tree):
    before = contents(tree)
    link = tree.parent / "link"
    link.symlink_to(tree)
    ran = script("link", "--deep", cwd=tree.parent)
    assert ran.returncode == 0, ran.stderr
    assert "train2017: 6 photos, ready\n" in ran.stdout and "FAULT" not in ran.stdout
    assert ran.stdout.splitlines()[-1] == "ready: train and test with dataset.dataset_path=link"
    assert contents(tree) == before


def test_the_script_on_a_tree_with_faults(tree):
    (tree / PHOTO).unlink()
    cut(tree / "annotations/instances_train2017.json")
    ran = script(tree)
    assert ran.returncode == 2 and "val2017: 6 photos, not ready\n  FAULT: photos that are not there: 1" in ran.stdout
    last = ran.stderr.strip().splitlines()[-1]
    assert last.endswith("train2017 and val2017 cannot be used as they are: see the faults above")
    assert "Traceback" not in ran.stderr and "ready:" not in ran.stdout.splitlines()[-1]


def test_the_script_without_packages(tmp_path):
    ran = script(tmp_path, environment=tmp_path)
    assert ran.returncode == 2 and "run ./init.sh first" in ran.stderr


def test_the_script_on_real_photos(shared):
    """100 + 100 of COCO's images: a subset, not an error."""
    ran = script(shared("data/coco_mini"))
    assert ran.returncode == 0, ran.stdout
    assert "FAULT" not in ran.stdout and ran.stdout.count("100 photos, ready\n  note: a subset") == 2
