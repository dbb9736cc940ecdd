"""Image sets in tar files: the same samples as from folders, and nothing is read that is not whole."""

import json
import tarfile

import numpy as np
import pytest
import torch

from tests.miniature import write_miniature
from tests.tiny import upsnet, write_tiny
from upsnet.dataset.batches import TrainingSampler
from upsnet.dataset.coco_check import check_coco
from upsnet.dataset.coco_panoptic import CocoPanoptic
from upsnet.dataset.image_sets import coco_image_sets
from upsnet.dataset.loading import BatchLoader
from upsnet.dataset.shard_writing import write_shards
from upsnet.dataset.shards import open_shards
from upsnet.dataset.transforms import Transform
from upsnet.structures import places
from upsnet.structures.categories import Categories
from upsnet.structures.errors import DataError, PlaceError

TRANSFORM = Transform((40, 48), 64, (102.9801, 115.9465, 122.7717))


@pytest.fixture
def tree(tmp_path):
    return write_miniature(tmp_path / "data", "train", images=7, instances=True)


@pytest.fixture
def sharded(tree, tmp_path):
    assert write_shards(tree, tmp_path / "tars", shard_bytes=6_000) == {"train": 7}
    return tmp_path / "tars"


def dataset(folder, name="train", **options):
    return CocoPanoptic(coco_image_sets(folder, name), TRANSFORM, flip_copies=True, **options)


def batches(folder, start_step=0, num_workers=0):
    data = dataset(folder)
    sampler = TrainingSampler(len(data), 2, seed=5, start_step=start_step, steps=9)
    return list(BatchLoader(data, sampler, num_workers))


def assert_same(ours, theirs):
    assert (ours.image_ids, ours.flipped, ours.scales) == (theirs.image_ids, theirs.flipped, theirs.scales)
    assert torch.equal(ours.images, theirs.images) and torch.equal(ours.semantic, theirs.semantic)
    for one, other in zip(ours.instances, theirs.instances, strict=True):
        assert torch.equal(one.boxes, other.boxes) and torch.equal(one.classes, other.classes)
        assert np.array_equal(one.masks.draw(64, 64), other.masks.draw(64, 64))
    assert all(torch.equal(a, b) for a, b in zip(ours.quarter_masks, theirs.quarter_masks, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_batches_are_those_of_the_folder(tree, sharded, num_workers):
    """From wherever a training goes on; several shards, which loader processes read at a time."""
    assert len(list((sharded / "shards").glob("train-*.tar"))) > 2 and not (sharded / "images").exists()
    expected = batches(tree)
    for start in (0, 4):
        for ours, theirs in zip(batches(sharded, start, num_workers), expected[start:], strict=True):
            assert_same(ours, theirs)


def test_truth_and_photos_are_those_of_the_folder(tree, sharded):
    ours, theirs = dataset(sharded), dataset(tree)
    for i in range(ours.num_photos):
        assert np.array_equal(ours.photo(i), theirs.photo(i))
        assert np.array_equal(ours.truth(i).segment_map, theirs.truth(i).segment_map)
        assert ours.truth(i).annotations == theirs.truth(i).annotations


def test_the_layout_is_that_of_webdataset(tree, sharded):
    """A photo and its label have one key and follow one another; what stands in the index is where tarfile finds it."""
    shards, names = open_shards(sharded / "shards" / "train.json"), []
    places_of = {(m.tar.name, m.start, m.length) for m in (*shards.photos.members(), *shards.labels.members())}
    for path in sorted((sharded / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            names += [member.name for member in members]
            assert {(path.name, m.offset_data, m.size) for m in members} <= places_of
    photos = dataset(tree).file_names
    assert names == [n for p in photos for n in (p, p.replace(".jpg", ".panoptic.png"))]
    assert len(places_of) == 2 * len(photos)


def test_equal_sets_give_equal_files_and_a_shorter_one_leaves_nothing_behind(tree, sharded, tmp_path):
    before = {path.name: path.read_bytes() for path in (sharded / "shards").iterdir()}
    write_shards(tree, sharded, shard_bytes=6_000)
    assert before == {path.name: path.read_bytes() for path in (sharded / "shards").iterdir()}
    write_shards(tree, sharded)
    assert sorted(path.name for path in (sharded / "shards").iterdir()) == ["train-000000.tar", "train.json"]
    assert_same(batches(sharded)[3], batches(tree)[3])


def test_sets_without_labels(tmp_path):
    write_miniature(tmp_path / "data", "test")
    annotations = tmp_path / "data" / "annotations"
    listed = json.loads((annotations / "panoptic_test.json").read_text())
    (annotations / "panoptic_test.json").unlink()
    (annotations / "image_info_test.json").write_text(json.dumps({"images": listed["images"]}))
    assert write_shards(tmp_path / "data", tmp_path / "tars") == {"test": 6}
    categories = Categories.from_coco(listed["categories"], "")
    ours, theirs = (dataset(tmp_path / f, "test", targets=False, categories=categories) for f in ("tars", "data"))
    assert all(torch.equal(ours[i].image, theirs[i].image) for i in range(len(theirs)))


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_damage_is_found_when_it_is_read(sharded):
    shards = open_shards(sharded / "shards" / "train.json")
    photo, label = shards.photos.members()[1], shards.labels.members()[2]
    for member, row in ((photo, 1), (label, 2)):
        flip_bit(member.tar, member.start + member.length // 2)
        with pytest.raises(DataError, match=rf"image \d+: .*{member.tar.name}:{member.name}.*copy {member.tar.name}"):
            dataset(sharded)[row]
    flip_bit(photo.tar, photo.start + photo.length // 2)
    assert dataset(sharded)[1].image.shape[0] == 3


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda f: (f / "train-000001.tar").unlink(), r"train-000001.tar: is not there, train.json says \d+ bytes"),
        (lambda f: (f / "train-000001.tar").write_bytes(b"x"), "train-000001.tar: has 1 bytes, train.json says"),
        (lambda f: (f / "train.json").write_text("{"), "train.json: is damaged or no index"),
        (lambda f: (f / "train.json").write_text('{"tars": {}}'), "train.json: is damaged or no index"),
        (lambda f: (f / "train.json").write_text("[]"), "train.json: is damaged or no index"),
    ],
)
def test_a_set_that_is_not_whole_is_refused_at_once(sharded, damage, sentence):
    damage(sharded / "shards")
    with pytest.raises(DataError, match=sentence):
        dataset(sharded)


def test_a_full_disk_leaves_a_set_that_does_not_count(tree, sharded, monkeypatch):
    """Also where an older one stood, whose tars are replaced one by one."""
    written = []

    def fail_later(source, target):
        written.append(target)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        replace(source, target)

    replace = places.os.replace
    monkeypatch.setattr(places.os, "replace", fail_later)
    with pytest.raises(PlaceError, match=r"train-000001\.tar: No space left"):
        write_shards(tree, sharded, shard_bytes=6_000)
    monkeypatch.undo()
    assert not (sharded / "shards" / "train.json").exists() and not list((sharded / "shards").glob("*.part"))
    with pytest.raises(DataError, match="there is no such folder"):
        dataset(sharded)


def test_what_cannot_be_written(tree, sharded, tmp_path):
    with pytest.raises(DataError, match=r"train\.json: train is in shards already"):
        write_shards(sharded, tmp_path / "again")
    with pytest.raises(DataError, match="check the path"):
        write_shards(tmp_path / "nowhere", tmp_path / "again")
    photo = next((tree / "images" / "train").iterdir())
    photo.write_bytes(photo.read_bytes()[:200])
    with pytest.raises(DataError, match=rf"{photo.name}: the file is cut off"):
        write_shards(tree, tmp_path / "again")


def test_the_check_of_a_tree_reads_all_shards(tmp_path):
    for name in ("train2017", "val2017"):
        write_miniature(tmp_path / "data", name, instances=True, seed=len(name))
    write_shards(tmp_path / "data", tmp_path / "tars")
    assert not [fault for report in check_coco(tmp_path / "tars", deep=True) for fault in report.faults]
    member = open_shards(tmp_path / "tars" / "shards" / "val2017.json").labels.members()[4]
    flip_bit(member.tar, member.start + 9)
    faults = {report.name: report.faults for report in check_coco(tmp_path / "tars")}
    assert faults["train2017"] == [] and len(faults["val2017"]) == 1
    assert f"damaged: 1 ({member})" in faults["val2017"][0]


def test_a_training_on_shards_is_that_on_folders(tmp_path):
    """By the commands; the weights are the same byte for byte."""
    recipe = write_tiny(tmp_path)
    assert upsnet("train", "--cfg", recipe, "name=a").code == 0
    made = upsnet("prepare", "coco", tmp_path / "data", "--shards", tmp_path / "tars")
    assert made.code == 0, made.err
    assert "train: 6 photos in shards" in made.out and f"dataset.dataset_path={tmp_path / 'tars'}" in made.out
    ran = upsnet("train", "--cfg", recipe, "name=b", f"dataset.dataset_path={tmp_path / 'tars'}")
    assert ran.code == 0, ran.err
    one, other = (torch.load(tmp_path / "out" / n / "train" / "tiny_2.pth", weights_only=True) for n in "ab")
    assert all(torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items())
