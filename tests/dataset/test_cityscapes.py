"""Reading a prepared Cityscapes: the same photos, classes and instances as in the official files."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.miniature_cityscapes import write_miniature_cityscapes
from upsnet import builders
from upsnet.config import load_recipe
from upsnet.dataset.cityscapes import Split, cityscapes_image_sets, instance_id_reader, stem_of
from upsnet.dataset.cityscapes_preparation import prepare_cityscapes
from upsnet.dataset.coco_panoptic import CocoPanoptic
from upsnet.dataset.transforms import Transform
from upsnet.structures.errors import DataError

SIZE = (64, 128)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images") / "train" / "val [1]"  # folders that text replacement stumbles over
    write_miniature_cityscapes(root, size=SIZE, train=3, val=2, test=2, train_extra=1, demoVideo=1)
    prepare_cityscapes(root)
    return root


def recipe_with(root, *overrides):
    return load_recipe("upsnet_resnet50_cityscapes_16gpu", [f"dataset.dataset_path='{root}'", *overrides])


def pixels(path):
    return np.asarray(Image.open(path)).astype(np.int64)


def test_truth_is_that_of_the_official_files(root):
    dataset = builders.build_test_set(recipe_with(root))
    split = Split(root, "val")
    assert dataset.file_names == split.photos() and dataset.sizes.tolist() == [list(SIZE)] * 2
    assert (dataset.categories.num_classes, dataset.categories.num_seg_classes) == (9, 19)
    for i, photo in enumerate(dataset.file_names):
        truth = dataset.truth(i)
        train_ids = pixels(split.label(photo, "labelTrainIds.png"))
        assert (np.where(train_ids == 255, -1, train_ids) == truth.semantic_map).all()
        ids = pixels(split.label(photo, "instanceIds.png"))
        assert (truth.segment_map[truth.segment_map > 0] == ids[truth.segment_map > 0]).all()
        for segment in truth.segments:
            is_thing = dataset.categories[segment.semantic_id].is_thing
            assert segment.is_crowd == (is_thing and segment.id < 1000)
        assert {a["area"] for a in truth.annotations if not a["iscrowd"]} == {
            s.area for s in truth.segments if s.id >= 1000
        }
        assert (dataset.photo(i) == pixels(split.photo_dir / photo)).all()
        assert (instance_id_reader(root, "train+val")(photo) == ids).all()


def test_groups_are_crowds_among_the_targets(root):
    options = ("train.scales=[64]", "train.max_size=128")
    dataset = builders.build_training_set(recipe_with(root, *options, "train.compat=null"))
    as_original = builders.build_training_set(recipe_with(root, *options))
    assert len(dataset) == 6 and dataset.num_photos == 3, "mirrored copies"
    groups = 0
    for i in range(3):
        targets = dataset[i].targets
        boxes, original = targets.instances.without_crowd().boxes, as_original[i].targets.instances
        assert not original.is_crowd.any() and (original.boxes == boxes).all(), "the original's jsons hold no groups"
        groups += int(targets.instances.is_crowd.sum())
        assert targets.quarter_masks.shape == (len(targets.instances.without_crowd()), SIZE[0] // 4, SIZE[1] // 4)
        assert targets.instances.classes.min() >= 1 and targets.instances.classes.max() <= 8
        assert tuple(targets.semantic.shape) == SIZE
    assert groups > 0


def test_the_instances_json_says_what_the_panoptic_pictures_say(root):
    (files,) = cityscapes_image_sets(root, "train")
    transform = Transform((64,), 128)
    with_json, without = CocoPanoptic(files, transform), CocoPanoptic(replace(files, instances_json=None), transform)
    for ours, other in zip(with_json, without, strict=True):
        ours, other = ours.targets.instances, other.targets.instances
        assert ours.boxes.tolist() == other.boxes.tolist() and ours.classes.tolist() == other.classes.tolist()
        assert ours.is_crowd.tolist() == other.is_crowd.tolist()
        assert (ours.masks.draw(*SIZE) == other.masks.draw(*SIZE)).all()


def test_sets_are_joined_and_may_have_no_labels(root):
    joined = builders.build_training_set(recipe_with(root, "dataset.image_set=train+val+train_extra"))
    assert joined.num_photos == 6 and len(set(joined.image_ids.tolist())) == 6
    for name, count in (("test", 2), ("demoVideo", 1)):
        dataset = builders.build_test_set(recipe_with(root, f"dataset.test_image_set={name}"))
        assert dataset.num_photos == count and not dataset.has_truth
        assert dataset.categories.num_seg_classes == 19 and dataset.photo(0).shape == (*SIZE, 3)
    assert stem_of(dataset.file_names[0]) == "stuttgart_00_000000_000019"


def test_a_tree_that_was_not_prepared(tmp_path):
    write_miniature_cityscapes(tmp_path, size=SIZE, val=1, test=1)
    for name in ("val", "test"):
        with pytest.raises(DataError, match=r"annotations.*\./init_cityscapes\.sh") as caught:
            builders.build_test_set(recipe_with(tmp_path, f"dataset.test_image_set={name}"))
        assert str(tmp_path) in str(caught.value)
    with pytest.raises(DataError, match=r"leftImg8bit.nothing: there is no such folder: check"):
        builders.build_test_set(recipe_with(tmp_path, "dataset.test_image_set=nothing"))
