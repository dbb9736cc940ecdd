"""Indexes kept on disk: equal to those read from the jsons, whatever lies in the folder."""

import json
import logging
import multiprocessing
import os
import pickle
from dataclasses import fields

import numpy as np
import pytest

from tests.miniature import edited, write_miniature
from upsnet.dataset import index_cache
from upsnet.dataset.coco_panoptic import CocoPanoptic
from upsnet.dataset.image_sets import coco_image_sets
from upsnet.dataset.index import Texts, index_panoptic
from upsnet.dataset.index_cache import IndexCache, index_folder
from upsnet.dataset.instance_index import read_instances
from upsnet.dataset.transforms import Transform
from upsnet.structures.errors import DataError

NAMES = ("panoptic_train.json", "instances_train.json")


def read(folder):
    """Both indexes as the jsons give them now."""
    panoptic, instances = (folder / "annotations" / name for name in NAMES)
    categories, images = index_panoptic(panoptic)
    return categories, images, read_instances(instances, categories, images)


def read_by_cache(folder, cache=None):
    cache = cache or IndexCache(folder / "kept", smallest=0)
    panoptic, instances = (folder / "annotations" / name for name in NAMES)
    categories, images = cache.panoptic(panoptic)
    return categories, images, cache.instances(instances, categories, images)


def check_equal(found, expected):
    assert found[0] == expected[0] and [c.color for c in found[0]] == [c.color for c in expected[0]]
    for index, other in zip(found[1:], expected[1:], strict=True):
        assert type(index) is type(other)
        for field in fields(other):
            value, twin = getattr(index, field.name), getattr(other, field.name)
            if isinstance(twin, Texts):
                assert list(value) == list(twin), field.name
            elif isinstance(twin, np.ndarray):
                assert value.dtype == twin.dtype and value.shape == twin.shape and (value == twin).all(), field.name
            else:
                assert value == twin


def is_mapped(array):
    while array is not None and not isinstance(array, np.memmap):
        array = getattr(array, "base", None)
    return array is not None


@pytest.fixture
def kept(tmp_path):
    """A miniature whose indexes are kept."""
    read_by_cache(write_miniature(tmp_path, instances=True))
    return tmp_path


@pytest.fixture
def no_reading(monkeypatch):
    """From here on, a json that is read is an error."""

    def refuse(*_):
        raise AssertionError("the json was read")

    def forbid():
        monkeypatch.setattr(index_cache, "index_panoptic", refuse)
        monkeypatch.setattr(index_cache, "read_instances", refuse)

    return forbid


def entries(folder):
    return sorted(path.name for path in (folder / "kept").iterdir())


def test_equal_in_every_array(kept, no_reading):
    expected = read(kept)
    assert entries(kept) == ["instances_train.bin", "instances_train.json", "panoptic_train.bin", "panoptic_train.json"]
    assert len(expected[2].corners) and len(expected[2].rle_counts) and expected[1].is_crowd.any()
    no_reading()
    found = read_by_cache(kept)
    check_equal(found, expected)
    assert is_mapped(found[2].corners) and is_mapped(found[1].photo_names.utf8)


def test_entries_are_written_once(kept):
    before = {path: path.stat().st_mtime_ns for path in (kept / "kept").iterdir()}
    read_by_cache(kept)
    assert {path: path.stat().st_mtime_ns for path in (kept / "kept").iterdir()} == before


def test_nothing_in_them_is_a_pickle(kept):
    for path in (kept / "kept").iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, IndexError, KeyError, EOFError)):
            pickle.loads(path.read_bytes())


def touch(path):
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def lengthen(path):
    stat = path.stat()
    path.write_text(path.read_text() + " ")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("change", [touch, lengthen])
@pytest.mark.parametrize("name, stale", [(NAMES[0], set(NAMES)), (NAMES[1], {NAMES[1]})])
def test_other_files_make_it_stale(name, stale, change, kept):
    """The index of the instances depends on the panoptic json too."""
    before = {each: (kept / "kept" / each).read_text() for each in NAMES}
    change(kept / "annotations" / name)
    check_equal(read_by_cache(kept), read(kept))
    assert {each for each in NAMES if (kept / "kept" / each).read_text() != before[each]} == stale


def test_changed_content_is_seen(kept):
    with edited(kept / "annotations" / NAMES[0]) as content:
        content["categories"][0]["name"] = "planet"
        content["images"][0]["file_name"] = "another.jpg"
    with edited(kept / "annotations" / NAMES[1]) as content:
        content["annotations"].pop()
    found = read_by_cache(kept)
    check_equal(found, read(kept))
    assert "planet" in [category.name for category in found[0]] and "another.jpg" in list(found[1].photo_names)


def test_another_tree_in_the_same_folder(kept, tmp_path_factory):
    other = write_miniature(tmp_path_factory.mktemp("other"), images=3, instances=True)
    check_equal(read_by_cache(other, IndexCache(kept / "kept", 0)), read(other))
    check_equal(read_by_cache(kept), read(kept))


@pytest.mark.parametrize("what", ["FORMAT", "fields"])
def test_another_version_of_ours(what, kept, monkeypatch):
    if what == "FORMAT":
        monkeypatch.setattr(index_cache, "FORMAT", 0)
    else:
        for name in NAMES:
            with edited(kept / "kept" / name) as head:
                head["key"]["fields"].append("one_more")
    before = [(kept / "kept" / name).read_text() for name in NAMES]
    check_equal(read_by_cache(kept), read(kept))
    assert before != [(kept / "kept" / name).read_text() for name in NAMES]


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0" * 64),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a list": lambda path: path.write_text("[]"),
    "a number": lambda path: path.write_text("7"),
    "an empty object": lambda path: path.write_text("{}"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("ending", ["bin", "json"])
def test_damaged_and_half_written(ending, damage, kept):
    for name in ("panoptic_train", "instances_train"):
        DAMAGE[damage](kept / f"kept/{name}.{ending}")
    for _ in range(2):
        check_equal(read_by_cache(kept), read(kept))
    assert not list((kept / "kept").glob("*.tmp")) and not list((kept / "kept").glob(".*"))


def test_any_damaged_byte(kept):
    expected, draws = read(kept), np.random.default_rng(0)
    for path in sorted((kept / "kept").iterdir()):
        whole = path.read_bytes()
        for at in draws.integers(0, len(whole), 15).tolist():
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << int(draws.integers(8))]) + whole[at + 1 :])
            check_equal(read_by_cache(kept), expected)


def test_a_damaged_entry_is_replaced(kept, no_reading, caplog):
    path = kept / "kept/instances_train.bin"
    path.write_bytes(path.read_bytes()[::-1])
    with caplog.at_level(logging.WARNING, "upsnet"):
        read_by_cache(kept)
    assert f"{path}: is damaged" in caplog.text
    expected = read(kept)
    no_reading()
    check_equal(read_by_cache(kept), expected)


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, caplog):
    write_miniature(tmp_path, instances=True)
    (tmp_path / "file").touch()
    with caplog.at_level(logging.INFO, "upsnet"):
        check_equal(read_by_cache(tmp_path, IndexCache(tmp_path / "file/kept", 0)), read(tmp_path))
    assert "UPSNET_INDEX=DIR keeps indexes elsewhere" in caplog.text


def test_a_full_disk_is_no_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    write_miniature(tmp_path, instances=True)
    monkeypatch.setattr("upsnet.structures.places.os.fsync", full)
    check_equal(read_by_cache(tmp_path), read(tmp_path))
    assert entries(tmp_path) == []


def test_broken_jsons_are_never_kept(tmp_path):
    write_miniature(tmp_path, instances=True)
    path = tmp_path / "annotations" / NAMES[0]
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match="not a valid json"):
        read_by_cache(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        read_by_cache(tmp_path)
    assert not (tmp_path / "kept").exists()


def work(folder, expected):
    for _ in range(20):
        for path in (folder / "kept").glob("panoptic*"):
            path.unlink(missing_ok=True)
        check_equal(read_by_cache(folder), expected)


def test_processes_at_once(kept):
    """Workers of one training start together and find nothing, or each other's half-written files."""
    context, expected = multiprocessing.get_context("fork"), read(kept)
    processes = [context.Process(target=work, args=(kept, expected)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    check_equal(read_by_cache(kept), expected)


# -- where they are kept -----------------------------------------------------------------------------------------------


def enlarge(path):
    """As long as a json must be to have an index."""
    with edited(path) as content:
        content["info"] = "x" * index_cache.SMALLEST


def test_a_data_set_keeps_what_is_large(tmp_path, monkeypatch, no_reading):
    monkeypatch.delenv("UPSNET_INDEX", raising=False)
    write_miniature(tmp_path, instances=True)
    sets = coco_image_sets(tmp_path, "train")
    fresh = CocoPanoptic(sets, Transform((60,), 200), flip_copies=True)
    assert not (tmp_path / ".upsnet_index").exists(), "small jsons are read faster than kept"
    for name in NAMES:
        enlarge(tmp_path / "annotations" / name)
    CocoPanoptic(sets)
    assert len(list((tmp_path / ".upsnet_index").iterdir())) == 4
    no_reading()
    data_set = CocoPanoptic(sets, Transform((60,), 200), flip_copies=True)
    assert data_set.nbytes == fresh.nbytes
    for i in range(len(fresh)):
        assert data_set[i].targets.instances.boxes.equal(fresh[i].targets.instances.boxes)
        assert data_set[i].targets.semantic.equal(fresh[i].targets.semantic)
        assert data_set[i].targets.quarter_masks.equal(fresh[i].targets.quarter_masks)
    for i in range(fresh.num_photos):
        assert data_set.truth(i).annotations == fresh.truth(i).annotations
        assert json.dumps(data_set.truth(i).annotations)


def test_the_user_chooses_where(tmp_path, monkeypatch):
    monkeypatch.delenv("UPSNET_INDEX", raising=False)
    assert index_folder(tmp_path / "coco") == tmp_path / "coco/.upsnet_index"
    monkeypatch.setenv("UPSNET_INDEX", "0")
    assert index_folder(tmp_path / "coco") is None
    monkeypatch.setenv("UPSNET_INDEX", str(tmp_path / "kept"))
    folders = {index_folder(tmp_path / name) for name in ("coco", "a/coco", "a/../coco")}
    assert len(folders) == 2 and {folder.parent for folder in folders} == {tmp_path / "kept"}
