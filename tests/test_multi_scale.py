"""Multi-scale and flip testing end to end: recipe, loader, network, files."""

import json

import numpy as np
import pytest

import upsnet as package
from tests.miniature import image_id_of
from tests.tiny import copy_run, upsnet
from upsnet import builders
from upsnet.config import load_recipe
from upsnet.structures.pictures import read_segment_map

CHANGES = ["test.scales=[64, 96]", "test.max_size=128", "test.flip=true"]


@pytest.fixture
def done(tiny_run, tmp_path):
    return copy_run(tiny_run, tmp_path)


@pytest.fixture
def photos(tiny_run):
    return [tiny_run.folder / f"data/images/val/{image_id_of(i):012d}.jpg" for i in range(6)]


def test_testing(done, tmp_path, photos):
    results = tmp_path / "out/tiny/val/results"
    before = (results / "summary.json").read_text()
    ran = upsnet("test", "--cfg", done, *CHANGES)
    assert ran.code == 0, ran.err
    assert "each image is seen in 4 views: short sides 64, 96, also mirrored" in ran.err
    summary = json.loads((results / "summary.json").read_text())
    assert summary.keys() == json.loads(before).keys() and (results / "summary.json").read_text() != before
    assert 0 <= summary["panoptic"]["all"]["pq"] <= 100 and 0 <= summary["semantic"]["miou"] <= 100

    # The same through the Python interface, photo by photo and in one list of mixed sizes.
    predictor = package.load(done, tmp_path / "out/tiny/train/tiny_2.pth", "cpu", CHANGES)
    together = predictor.predict(list(photos))
    for photo, result in zip(photos, together, strict=True):
        stored = read_segment_map(results / "panoptic" / f"{photo.stem}.png", result.segment_map.shape)
        alone = predictor.predict(photo)
        for other in (alone.segment_map, stored):
            assert ((other > 0) == (result.segment_map > 0)).mean() > 0.99
        assert np.array_equal(alone.semantic_map, result.semantic_map)


def test_one_scale_without_mirroring_is_a_plain_batch(tiny_run):
    recipe = load_recipe(tiny_run.recipe)
    dataset = builders.build_test_set(recipe)
    for batch in builders.build_test_loader(recipe, dataset):
        assert not batch.views
    for changes, count in ((["test.flip=true"], 2), (["test.scales=[48, 40]"], 2), (CHANGES, 4)):
        changed = load_recipe(tiny_run.recipe, changes)
        batches = list(builders.build_test_loader(changed, builders.build_test_set(changed)))
        assert {1 + len(batch.views) for batch in batches} == {count} == {builders.test_views(changed).count}
        assert sorted(i for batch in batches for i in batch.image_ids) == dataset.image_ids.tolist()


def test_losses_of_a_validation_are_formed_in_the_reference_view(tiny_run):
    recipe = load_recipe(tiny_run.recipe, CHANGES)
    for batch in builders.build_test_loader(recipe, builders.build_test_set(recipe, targets=True)):
        assert not batch.views and batch.instances is not None and batch.sizes[0][0] in (64, 85)


def test_a_longest_side_that_leaves_no_room_for_a_scale_is_told(done):
    ran = upsnet("test", "--cfg", done, "test.scales=[64, 96, 128]", "test.max_size=85")
    assert ran.code == 0, ran.err
    assert "test.max_size=85 brings scales of 6 of the 6 images to the same size" in ran.err
    assert "brings scales" not in upsnet("test", "--cfg", done, "test.scales=[64, 96]", "test.max_size=171").err


def test_a_scale_named_twice_is_refused(tiny_run):
    ran = upsnet("test", "--cfg", tiny_run.recipe, "test.scales=[64, 96, 64]")
    assert ran.code == 2 and "test.scales" in ran.errors[0] and "must name each scale once" in ran.errors[0]
